"""Which attention kernel the layers of a model get, told from its options before it is traced.

Kernels that serve only some calls fall back to XLA without an error if the option says 'auto', so
runs, `inspect` and generation say what was chosen and why.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.ops.attention import (
    PLATFORM_KERNELS,
    SPLASH_BLOCK,
    AttentionFeatures,
    choose_kernel,
    kernel_obstacles,
)
from megatransformer_jax.ops.attention_exchange import Exchange, choose_exchange
from megatransformer_jax.sharding.rules import Sharder


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What some layers get in a pass over whole rows.

    Attributes:
      kernel: 'xla', 'cudnn' or 'splash'.
      stacks: of 'prelude', 'core' and 'coda' those that get it.
      lengths: of the rows, media included.
      obstacles: why not the fused kernel of the platform, if that was asked for and there is one.
      exchange: what the devices that rows are cut over exchange, see `ops.attention_exchange`.
      row_devices: how many these are.
    """

    kernel: str
    stacks: tuple[str, ...]
    lengths: tuple[int, ...]
    obstacles: tuple[str, ...]
    exchange: Exchange = "none"
    row_devices: int = 1


def kernel_choices(
    model: MegaTransformer,
    lengths: Sequence[int],
    *,
    is_training: bool,
    sharder: Sharder | None = None,
) -> tuple[KernelChoice, ...]:
    """The kernels of all stacks; stacks and lengths that are alike share an entry.

    Args:
      model: with its platform and type of activations.
      lengths: of rows, the places of media included.
      is_training: dropout is on.
      sharder: with a mesh that the model is not on. None: the model's.

    Raises:
      UnsupportedKernelError: `model.attention.kernel` names one that cannot serve.
    """
    requested, fused = model.config.attention.kernel, PLATFORM_KERNELS[model.platform]
    sharder = sharder or model.sharder
    kv_heads = sharder.num_heads(model.config.attention.kv_heads)
    found: dict[tuple[str, tuple[str, ...], tuple[str, ...], Exchange], list[int]] = {}
    for length in lengths:
        exchange = choose_exchange(sharder, length, length, kv_heads)
        row_shards = sharder.ways("length") if exchange == "keys" else 1
        stacks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for stack, width in _widths(model).items():
            features = _features(model, width, length, is_training, row_shards)
            chosen = choose_kernel(requested, model.platform, features)
            obstacles = kernel_obstacles(fused, features) if requested == "auto" else []
            stacks.setdefault((chosen, tuple(obstacles)), []).append(stack)
        for (chosen, why), names in stacks.items():
            found.setdefault((chosen, tuple(names), why, exchange), []).append(length)
    devices = sharder.ways("length")
    return tuple(
        KernelChoice(chosen, names, tuple(rows), why, exchange, devices)
        for (chosen, names, why, exchange), rows in found.items()
    )


def prompt_kernels(model: MegaTransformer) -> tuple[KernelChoice, ...]:
    """The kernels that read prompts whose padded length suits any of them. Passes with a cache have
    no fused kernel."""
    return kernel_choices(model, [SPLASH_BLOCK], is_training=False)


EXCHANGED = {"heads": "heads exchanged for rows", "keys": "keys and values gathered"}


def describe_choices(choices: Iterable[KernelChoice]) -> str:
    """As in 'splash in prelude and coda; xla in core (no fused kernel: it needs ...)'."""
    choices = list(choices)
    names_lengths = len({choice.lengths for choice in choices}) > 1
    parts = []
    for choice in choices:
        *others, last = choice.stacks
        part = f"{choice.kernel} in {', '.join(others)}{' and ' if others else ''}{last}"
        if names_lengths:
            part += f" for rows of {', '.join(map(str, choice.lengths))}"
        if choice.exchange != "none":
            part += f", {EXCHANGED[choice.exchange]} over {choice.row_devices} devices"
        if choice.obstacles:
            part += f" (no fused kernel: {'; '.join(choice.obstacles)})"
        parts.append(part)
    return "; ".join(parts)


def _widths(model: MegaTransformer) -> dict[str, int]:
    """Widths of the stacks that have layers."""
    config = model.config
    stacks = {
        "prelude": (config.prelude_layers, config.width),
        "core": (config.core_layers, config.core_width),
        "coda": (config.coda_layers, config.width),
    }
    return {name: width for name, (layers, width) in stacks.items() if layers}


def _features(
    model: MegaTransformer, width: int, length: int, is_training: bool, row_shards: int
) -> AttentionFeatures:
    attention = model.config.attention
    return AttentionFeatures(
        dtype=model.policy.compute.name,
        head_width=model.config.head_dim(width),
        query_length=length,
        key_length=length,
        is_causal=attention.is_causal,
        window=attention.window,
        has_segments=True,
        has_softcap=attention.logit_softcap is not None,
        has_alibi=model.config.positions.scheme == "alibi",
        has_dropout=is_training and attention.dropout_rate > 0.0,
        row_shards=row_shards,
    )
