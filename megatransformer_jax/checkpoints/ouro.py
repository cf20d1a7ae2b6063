"""The format of Ouro: one stack of layers that goes round, without prelude, coda or injection.

Source: upstream's `modeling_ouro.py`, as its folders on the Hugging Face hub hold it, and
arXiv 2510.25741. Names and layouts are Llama's but for the norms behind attention and feed-forward
layer, the norm after every loop and the exit gate.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from absl import logging

from megatransformer_jax.checkpoints.foreign import check_fixed, checked_values
from megatransformer_jax.checkpoints.llama import EMBEDDING, HEAD, Llama
from megatransformer_jax.checkpoints.tensor_map import Check, FormatError, Link, reshaped, same
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import ExitGateConfig, RecurrenceConfig

_GATE = "model.early_exit_gate"


class Ouro(Llama):
    """Folders of OuroForCausalLM, such as ByteDance/Ouro-1.4B."""

    name = "ouro"
    title = "Ouro"
    model_type = "ouro"
    architecture = "OuroForCausalLM"
    norms: ClassVar[Mapping[str, str]] = {
        "attention_norm_in": "input_layernorm",
        "attention_norm_out": "input_layernorm_2",
        "mlp_norm_in": "post_attention_layernorm",
        "mlp_norm_out": "post_attention_layernorm_2",
    }
    placement = "peri"
    has_attention_bias = False
    has_mlp_bias = False
    has_windows = True

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """See `Format.read_config`."""
        supported = "set it to null there and choose the depth of each request instead"
        check_fixed(values, {"early_exit_step": None}, where, supported)
        stack = super().read_config(values, where)
        own = checked_values(
            values, {}, {"total_ut_steps": (int, 4), "early_exit_threshold": (float, 1.0)}, where
        )
        threshold = own["early_exit_threshold"]
        if threshold != 1.0:
            logging.info(
                "%s: early_exit_threshold is %g; upstream reads its output by it, and here "
                "gate_readout='threshold' with gate_threshold=%g does",
                where,
                threshold,
                threshold,
            )
        try:
            return _looped(stack, own["total_ut_steps"])
        except ConfigError as error:
            raise FormatError(f"{where}: these values make no model: {error}") from error

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """See `Format.write_config`."""
        return {
            **super().write_config(_stack(config)),
            "total_ut_steps": config.recurrence.mean_steps,
            "early_exit_threshold": 1.0,
        }

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """See `Format.comparable`."""
        if not config.is_recurrent:
            looped = _looped(dataclasses.replace(config, prelude_layers=1, coda_layers=0), 4)
            return looped, ["model.core_layers: 0, Ouro has a core"]
        windows = config.windows("core")
        alike = len(set(windows)) == 1
        attention = dataclasses.replace(
            config.attention,
            window=windows[0] if alike else None,
            prelude_windows=(),
            core_windows=() if alike else tuple(window or 0 for window in windows),
            coda_windows=(),
        )
        return dataclasses.replace(config, attention=attention), []

    def links(self, config: ModelConfig) -> list[Link]:
        """See `Format.links`."""
        width, vocabulary = config.width, (config.vocab_size, config.width)
        links = [same("embedding/embedding", EMBEDDING, vocabulary)]
        for layer in range(config.core_layers):
            links += self._layer(f"core/layers/layer_{layer}", f"model.layers.{layer}", config)
        links += [
            same("core/iteration_norm/scale", "model.norm.weight", (width,)),
            reshaped("exit_gate/weight", f"{_GATE}.weight", (1, width), (width,)),
            reshaped("exit_gate/bias", f"{_GATE}.bias", (1,), ()),
        ]
        if not config.tie_embeddings:
            links.append(same("embedding/head", HEAD, vocabulary))
        return links

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """See `Format.extras`."""
        return super().extras(_stack(config), tensors)


def _looped(stack: ModelConfig, steps: int) -> ModelConfig:
    """A plain model's layers as the core of an Ouro that is trained at `steps` iterations."""
    attention = dataclasses.replace(
        stack.attention, prelude_windows=(), core_windows=stack.attention.prelude_windows
    )
    return dataclasses.replace(
        stack,
        prelude_layers=0,
        core_layers=stack.prelude_layers,
        attention=attention,
        recurrence=RecurrenceConfig(
            adapter="none",
            iteration_norm=True,
            output_norm=False,
            head_norm=False,
            state_init="none",
            mean_steps=steps,
            backprop_depth=steps,
            sampling="fixed",
            max_steps=max(steps, RecurrenceConfig().max_steps),
        ),
        exit_gate=ExitGateConfig(enabled=True, norm=False),
    )


def _stack(config: ModelConfig) -> ModelConfig:
    """The layers of a core as those of a plain model."""
    attention = dataclasses.replace(
        config.attention, prelude_windows=config.attention.core_windows, core_windows=()
    )
    return dataclasses.replace(
        config,
        prelude_layers=config.core_layers,
        core_layers=0,
        coda_layers=0,
        attention=attention,
        recurrence=RecurrenceConfig(),
        exit_gate=ExitGateConfig(),
    )
