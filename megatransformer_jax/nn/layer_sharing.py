"""Which layers of a stack use which weights (arXiv 2104.06022, algorithm 1)."""

from megatransformer_jax.config.model import ModelConfig


def layer_owners(scheme: str, num_layers: int, num_unique: int) -> tuple[int, ...]:
    """The weights of each layer, as numbers below `num_unique`.

    Where `num_unique` does not divide `num_layers`, `sequence` makes runs whose lengths differ by
    at most one, and the last round of `cycle` and `cycle_rev` is cut short.

    Args:
      scheme: as `SharingConfig.scheme`.
      num_layers: layers of the stack.
      num_unique: different ones, at most `num_layers`.

    Raises:
      ValueError: for an unknown scheme, 'none' with fewer unique layers than layers, or more.

    Example:
      >>> layer_owners("cycle_rev", 6, 3)
      (0, 1, 2, 2, 1, 0)
    """
    if num_unique > num_layers:
        raise ValueError(f"{num_unique} unique layers of {num_layers}; there must be fewer")
    layers = range(num_layers)
    match scheme:
        case "none" | "sequence" | "cycle" | "cycle_rev" if num_unique == num_layers:
            return tuple(layers)
        case "sequence":
            return tuple(layer * num_unique // num_layers for layer in layers)
        case "cycle":
            return tuple(layer % num_unique for layer in layers)
        case "cycle_rev":
            last_round = (num_layers - 1) // num_unique
            return tuple(
                layer % num_unique
                if layer // num_unique < last_round
                else num_unique - 1 - layer % num_unique
                for layer in layers
            )
    raise ValueError(
        f"scheme {scheme!r} does not share {num_unique} unique layers among {num_layers}; "
        "known: sequence, cycle, cycle_rev"
    )


def stack_owners(config: ModelConfig, stack: str) -> tuple[int, ...]:
    """`layer_owners` of the stack 'prelude', 'core' or 'coda'; layer i has the parameters
    `layer_{owners[i]}`."""
    num_layers: int = getattr(config, f"{stack}_layers")
    return layer_owners(config.sharing.scheme, num_layers, config.unique_layers(stack))


def earlier_uses(owners: tuple[int, ...]) -> tuple[int, ...]:
    """How often each layer's weights were used by layers before it: where its call stands among
    those that its module has recorded."""
    return tuple(owners[:layer].count(owner) for layer, owner in enumerate(owners))
