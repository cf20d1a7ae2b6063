"""Which axes of a weight are its input and which its output, from their logical names.

Kernels are fused: [D, K, G+2, H] for queries, keys and values, [D, 2, F] for gate and up, [N, H, D]
for the attention's output. The axis `embed` (the residual stream) tells which side is which.
"""

from typing import Any

# The first axis of a table, whose rows are looked up; as a head its rows are the outputs.
_ROWS = ("vocab", "experts", None)


def num_input_axes(axes: tuple[str | None, ...]) -> int | None:
    """How many leading axes are the input; None if this is no matrix.

    Example:
      >>> num_input_axes(("embed", "kv_heads", None, None))
      1
      >>> num_input_axes(("heads", None, "embed"))
      2
    """
    if len(axes) < 2:
        return None
    if axes[0] == "embed":
        return 1
    return len(axes) - 1 if axes[-1] == "embed" else None


def output_axes(axes: tuple[str | None, ...]) -> tuple[int, ...] | None:
    """The numbers of the axes that make an output channel; None if this is no matrix.

    Of a table (embeddings, learned positions, head, experts) it is the rows.
    """
    inputs = num_input_axes(axes)
    if inputs is None:
        return None
    if axes[0] in _ROWS:
        return (0,)
    return tuple(range(inputs, len(axes)))


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is the names of one array, and no branch."""
    return isinstance(node, tuple)
