"""Low-rank updates: nothing at the start, then the model with its updates computed separately."""

import ast
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.fine_tuning import LoraConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.adaptation import init_lora, lora_axes, merge_lora
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.nn import attention as attention_module
from megatransformer_jax.nn import mlp as mlp_module
from megatransformer_jax.nn import quantized as quantized_module
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONFIG = ModelConfig(
    vocab_size=24,
    width=16,
    max_length=8,
    prelude_layers=0,
    core_layers=1,
    coda_layers=0,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MlpConfig(hidden_width=12),
    recurrence=RecurrenceConfig(state_init="zero"),
)
LORA = LoraConfig(rank=2, alpha=6.0)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)


@pytest.fixture(scope="module")
def parts():
    """Model, base, axes, and updates of which none is zero."""
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    params, axes = init_params(model, jax.random.key(0)), param_axes(model)
    fresh = init_lora(params, axes, LORA, jax.random.key(1))
    drawn = jax.tree.map(lambda leaf: 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), fresh)
    return model, params, axes, fresh, drawn


def logits(model, params):
    return model.apply({"params": params}, TOKENS, num_steps=2).logits


def test_updates_start_at_nothing_and_have_the_shapes_of_their_targets(parts):
    _, params, axes, fresh, _ = parts
    merged = merge_lora(params, fresh, LORA)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    layer, names = (tree["core"]["layers"]["layer_0"] for tree in (fresh, lora_axes(axes, LORA)))
    shapes = jax.tree.map(jnp.shape, layer)
    assert shapes == {
        "attention": {
            "qkv": {"a": (16, 2), "b": (2, 2, 4, 4)},
            "output": {"a": (4, 4, 2), "b": (2, 16)},
        },
        "mlp": {"up": {"a": (16, 2), "b": (2, 2, 12)}, "down": {"a": (12, 2), "b": (2, 16)}},
    }
    assert names["attention"]["output"] == {
        "a": ("head_rows", "head_width", None),
        "b": (None, "embed"),
    }
    assert names["mlp"]["up"] == {"a": ("embed", None), "b": (None, None, "mlp")}
    assert set(fresh) == {"core"}
    assert float(jnp.std(layer["mlp"]["down"]["a"])) > 0


def test_the_spread_of_a_keeps_the_scale_of_its_input():
    wide = {"mlp": {"up": jnp.zeros((4096, 2, 8))}}
    config = LoraConfig(rank=8, targets=("mlp/up$",))
    lora = init_lora(wide, {"mlp": {"up": ("embed", None, "mlp")}}, config, jax.random.key(0))
    assert float(jnp.std(lora["mlp"]["up"]["a"])) == pytest.approx(1 / 64, rel=0.03)
    assert float(jnp.max(jnp.abs(lora["mlp"]["up"]["b"]))) == 0


class Unmerged:
    """A kernel and its update, multiplied one after the other as the paper draws it."""

    def __init__(self, kernel, a, b):
        self.kernel, self.a, self.b = kernel, a, b

    def reshape(self, *shape):
        rank = self.b.shape[0]
        return Unmerged(self.kernel.reshape(shape), self.a.reshape(-1, rank), self.b)

    def __rmatmul__(self, x):
        return x @ self.kernel + LORA.alpha / LORA.rank * ((x @ self.a) @ self.b)


def einsum(equation, x, kernel, **options):
    if not isinstance(kernel, Unmerged):
        return jnp.einsum(equation, x, kernel, **options)
    low = jnp.tensordot(x, kernel.a, axes=1)
    return jnp.einsum(equation, x, kernel.kernel) + LORA.alpha / LORA.rank * jnp.tensordot(
        low, kernel.b, axes=1
    )


def test_merged_weights_equal_updates_computed_beside_them(parts, monkeypatch):
    model, params, _, _, drawn = parts
    merged = logits(model, merge_lora(params, drawn, LORA))
    apart = unmerged_logits(model, params, drawn, monkeypatch)
    np.testing.assert_allclose(merged, apart, rtol=0, atol=1e-5)
    assert float(jnp.max(jnp.abs(merged - logits(model, params)))) > 0.02


def unmerged_logits(model, params, lora, monkeypatch):
    """Logits of the base with each update applied to the layer's input."""

    def matrix_of(original):
        def matrix(owner, name, *rest):
            kernel = original(owner, name, *rest)
            updates = lora_at(lora, owner.path)
            return Unmerged(kernel, **updates[name])

        return matrix

    numpy = types.SimpleNamespace(**{**vars(jnp), "einsum": einsum})
    for module in (attention_module, mlp_module):
        monkeypatch.setattr(module, "matrix", matrix_of(module.matrix))
    monkeypatch.setattr(quantized_module, "jnp", numpy)
    result = logits(model, params)
    monkeypatch.undo()
    return result


def lora_at(lora, path):
    """The updates of a module; the core's own paths begin below 'core'."""
    tree = lora["core"] if path[0] == "layers" else lora
    for name in path:
        tree = tree[name]
    return tree


def test_targets_that_fit_nothing_or_no_matrix_are_refused(parts):
    _, params, axes, _, _ = parts
    for pattern, words in (
        ("mlp/absent", r"'mlp/absent' matches no parameter; their paths are like "),
        ("attention_norm_in", r"matches .*attention_norm_in/scale, which is not a matrix"),
    ):
        with pytest.raises(ConfigError, match=rf"fine_tuning\.lora\.targets: .*{words}"):
            config = LoraConfig(rank=1, targets=(pattern,))
            init_lora(params, axes, config, jax.random.key(0))


def test_a_rank_above_the_smaller_side_is_refused(parts):
    """up maps 16 to 24, down 12 to 16."""
    _, params, axes, _, _ = parts
    words = (
        r"fine_tuning\.lora\.rank: 13 .*layer_0/mlp/down, which maps 12 inputs to 16 outputs; .*12"
    )
    with pytest.raises(ConfigError, match=words):
        init_lora(params, axes, LoraConfig(rank=13), jax.random.key(0))
    lora = init_lora(params, axes, LoraConfig(rank=12), jax.random.key(0))
    assert lora["core"]["layers"]["layer_0"]["mlp"]["down"]["a"].shape == (12, 12)


def test_default_targets_on_experts_say_which_to_use():
    axes = {
        "attention": {"qkv": ("embed", "kv_heads", None, None), "output": ("heads", None, "embed")},
        "mlp": {"query": ("embed", None, None)},
    }
    params = {
        "attention": {"qkv": jnp.zeros((8, 2, 3, 4)), "output": jnp.zeros((2, 4, 8))},
        "mlp": {"query": jnp.zeros((8, 2, 4))},
    }
    with pytest.raises(ConfigError, match=r"kind='peer'.*\(qkv\|output\)") as caught:
        init_lora(params, axes, LoraConfig(rank=1), jax.random.key(0))
    # What it says to type works.
    targets = ast.literal_eval(re.search(r'targets="(.*)"', str(caught.value)).group(1))
    lora = init_lora(params, axes, LoraConfig(rank=1, targets=targets), jax.random.key(0))
    assert set(lora) == {"attention"}


def test_only_targets_get_updates(parts):
    _, params, axes, _, _ = parts
    config = LoraConfig(rank=1, targets=(r"^core/layers/layer_0/mlp/up$", "embedding/embedding"))
    lora = init_lora(params, axes, config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, lora) == {
        "core": {"layers": {"layer_0": {"mlp": {"up": {"a": (16, 1), "b": (1, 2, 12)}}}}},
        "embedding": {"embedding": {"a": (24, 1), "b": (1, 16)}},
    }
