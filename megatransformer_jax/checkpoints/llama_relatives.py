"""The formats of Qwen 2 (and 2.5), Qwen 3 and OLMo 2: Llama's with other biases and norms.

Source: transformers 5, `models/qwen2`, `models/qwen3` and `models/olmo2`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from megatransformer_jax.checkpoints.llama import Llama


class Qwen2(Llama):
    """Folders of Qwen2ForCausalLM: biases of queries, keys and values, but of no output."""

    name = "qwen2"
    title = "Qwen 2"
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    has_attention_bias = False
    has_mlp_bias = False
    has_head_dim = False
    has_windows = True

    def attention_options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.attention_options`."""
        del known
        return {"qkv_bias": True, "output_bias": False}


class Qwen3(Llama):
    """Folders of Qwen3ForCausalLM: queries and keys are normalised per head."""

    name = "qwen3"
    title = "Qwen 3"
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 128}
    has_mlp_bias = False
    has_windows = True

    def attention_options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.attention_options`."""
        return {**super().attention_options(known), "qk_norm": True}


class Olmo2(Llama):
    """Folders of Olmo2ForCausalLM: norms of what a layer adds, and of queries and keys over heads
    together."""

    name = "olmo2"
    title = "OLMo 2"
    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm_out": "post_attention_layernorm",
        "mlp_norm_out": "post_feedforward_layernorm",
    }
    placement = "output"
    has_mlp_bias = False
    has_head_dim = False

    def attention_options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `Llama.attention_options`."""
        return {**super().attention_options(known), "qk_norm": True, "qk_norm_span": "width"}
