"""Which parameters of ours are which tensors of another format, declared once for both directions.

A format declares a list of `Link`s. Reading takes them one by one, so that no more than the tensors
of one link need to be in memory; writing goes through the same list. Only names and layouts differ:
no value is computed, so importing and then exporting gives the same bytes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from megatransformer_jax.checkpoints.safetensors_files import SafetensorsReader, shortened
from megatransformer_jax.config.option import UserError

Shape = tuple[int, ...]
# From tensors in the order of a link to those of the other side, in its order.
Convert = Callable[..., Sequence[np.ndarray]]
# Puts a parameter, given its path ('core/layers/layer_0/mlp/down') and its value, where it belongs.
Place = Callable[[str, np.ndarray], Any]
# Looks at a tensor that holds nothing of its own; says what is wrong with it, or None.
Check = Callable[[np.ndarray], str | None]


class FormatError(UserError):
    """Not a checkpoint that we represent exactly, or a model that a format cannot express."""


@dataclasses.dataclass(frozen=True)
class Link:
    """Parameters of ours and tensors of another format that hold the same numbers.

    Attributes:
      ours: paths of the parameters, such as ('prelude/layer_0/mlp/down',).
      theirs: the shapes of the tensors by their names.
      read: from their tensors, in the order of `theirs`, to ours in the order of `ours`.
      write: the inverse.
    """

    ours: tuple[str, ...]
    theirs: Mapping[str, Shape]
    read: Convert
    write: Convert


# ------------------------------------------------------------------------------
# Layouts that several formats share. Shapes are those of the other format; a linear layer of
# PyTorch's is [outputs, inputs].


def same(ours: str, theirs: str, shape: Shape) -> Link:
    """The same array under another name."""
    return Link((ours,), {theirs: shape}, _alone(lambda x: x), _alone(lambda x: x))


def transposed(ours: str, theirs: str, shape: Shape) -> Link:
    """[outputs, inputs] there, [inputs, outputs] here."""
    return Link((ours,), {theirs: shape}, _alone(lambda x: x.T), _alone(lambda x: x.T))


def reshaped(ours: str, theirs: str, shape: Shape, our_shape: Shape) -> Link:
    """The same numbers in the same order."""
    return Link(
        (ours,),
        {theirs: shape},
        _alone(lambda x: x.reshape(our_shape)),
        _alone(lambda x: x.reshape(shape)),
    )


def attention_output(ours: str, theirs: str, heads: int, head_dim: int, width: int) -> Link:
    """[D, N*H] there, [N, H, D] here."""
    return Link(
        (ours,),
        {theirs: (width, heads * head_dim)},
        _alone(lambda x: x.T.reshape(heads, head_dim, width)),
        _alone(lambda x: x.reshape(-1, width).T),
    )


def separate_qkv(
    ours: str, theirs: tuple[str, str, str], heads: int, kv_heads: int, rest: Shape
) -> Link:
    """Queries [N*H, *rest], keys and values [K*H, *rest] there; [*rest, K, G+2, H] here.

    Args:
      ours: the fused parameter's path.
      theirs: names of the tensors of queries, keys and values.
      heads: query heads (N).
      kv_heads: key/value heads (K).
      rest: (head_dim, D) of matrices, (head_dim,) of biases.
    """
    head_dim, inputs = rest[0], rest[1:]
    counts = (heads, kv_heads, kv_heads)
    shapes = {name: (count * head_dim, *inputs) for name, count in zip(theirs, counts, strict=True)}
    return Link(
        (ours,),
        shapes,
        lambda query, key, value: (fuse_heads(query, key, value, kv_heads, head_dim),),
        split_heads,
    )


def fused_qkv(
    ours: str, theirs: str, heads: int, kv_heads: int, rest: Shape, *, is_transposed: bool = False
) -> Link:
    """As `separate_qkv`, but there the three stand one after the other in one tensor.

    `is_transposed`: it is [D, (N+2K)*H], as GPT-2 stores matrices.
    """
    head_dim, inputs = rest[0], rest[1:]
    shape = ((heads + 2 * kv_heads) * head_dim, *inputs)
    bounds = [heads * head_dim, (heads + kv_heads) * head_dim]

    def read(fused: np.ndarray) -> Sequence[np.ndarray]:
        query, key, value = np.split(fused.T if is_transposed else fused, bounds)
        return (fuse_heads(query, key, value, kv_heads, head_dim),)

    def write(kernel: np.ndarray) -> Sequence[np.ndarray]:
        fused = np.concatenate(split_heads(kernel))
        return (fused.T if is_transposed else fused,)

    return Link((ours,), {theirs: shape[::-1] if is_transposed else shape}, read, write)


def fuse_heads(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, kv_heads: int, head_dim: int
) -> np.ndarray:
    """Rows of queries [N*H, ...], keys and values [K*H, ...] as [..., K, G+2, H]."""
    rest = query.shape[1:]
    grouped = [part.reshape(kv_heads, -1, head_dim, *rest) for part in (query, key, value)]
    return np.moveaxis(np.concatenate(grouped, axis=1), (0, 1, 2), (-3, -2, -1))


def split_heads(fused: np.ndarray) -> list[np.ndarray]:
    """The inverse of `fuse_heads`."""
    grouped = np.moveaxis(fused, (-3, -2, -1), (0, 1, 2))
    group = grouped.shape[1] - 2
    parts = np.split(grouped, [group, group + 1], axis=1)
    return [part.reshape(-1, *grouped.shape[3:]) for part in parts]


def separate_gate(ours: str, gate: str, up: str, hidden: int, width: int) -> Link:
    """Gate and up as two matrices [F, D] there, as [D, 2, F] here."""
    return Link(
        (ours,),
        {gate: (hidden, width), up: (hidden, width)},
        lambda gate, up: (np.stack([gate, up]).transpose(2, 0, 1),),
        lambda kernel: list(kernel.transpose(1, 2, 0)),
    )


def fused_gate(ours: str, theirs: str, hidden: int, width: int) -> Link:
    """Gate, then up, as one matrix [2F, D] there, as [D, 2, F] here."""
    return Link(
        (ours,),
        {theirs: (2 * hidden, width)},
        _alone(lambda x: x.reshape(2, hidden, width).transpose(2, 0, 1)),
        _alone(lambda x: x.transpose(1, 2, 0).reshape(-1, width)),
    )


def stacked_qk_bias(attention: str, theirs: str, heads: int, head_dim: int) -> Link:
    """Vectors per head for queries and keys, [2, 1, N, H] there, two of [N, H] here."""
    return Link(
        (f"{attention}/query_bias", f"{attention}/key_bias"),
        {theirs: (2, 1, heads, head_dim)},
        lambda both: list(both[:, 0]),
        lambda query, key: (np.stack([query, key])[:, None],),
    )


def linear_adapter(ours: str, theirs: str, width: int) -> Link:
    """Matrices of state and embedding side by side, [D, 2D] there, two of [D, D] here."""
    return Link(
        (f"{ours}/state_kernel", f"{ours}/embedding_kernel"),
        {theirs: (width, 2 * width)},
        lambda both: [half.T for half in np.split(both, 2, axis=1)],
        lambda state, embedding: (np.concatenate([state.T, embedding.T], axis=1),),
    )


def _alone(convert: Callable[[np.ndarray], np.ndarray]) -> Convert:
    return lambda tensor: (convert(tensor),)


# ------------------------------------------------------------------------------
# Both directions.


def params_from_tensors(
    tensors: Mapping[str, np.ndarray],
    links: Sequence[Link],
    extras: Mapping[str, Check] | None = None,
    place: Place = lambda path, tensor: np.asarray(tensor),
) -> dict[str, Any]:
    """Our parameter tree.

    Args:
      tensors: by their names; each is taken once, so they may be read as they are asked for.
      links: of the format, for the architecture.
      extras: tensors that may be there besides and hold nothing of their own, each with its check.
      place: called with each parameter as soon as its link is read, such as to convert it or to put
        it on a device; its result is what the tree holds.

    Raises:
      FormatError: naming the tensors that are missing, unknown, of another shape than the config
        says, or contradictory.
    """
    extras = {} if extras is None else extras
    _check_names_and_shapes(tensors, links, extras)
    for name, check in extras.items():
        complaint = check(tensors[name]) if name in tensors else None
        if complaint is not None:
            raise FormatError(f"tensor {name!r} {complaint}")
    params: dict[str, Any] = {}
    for link in links:
        parts = link.read(*(tensors[name] for name in link.theirs))
        for path, part in zip(link.ours, parts, strict=True):
            params[path] = place(path, part)
    return unflatten_dict(params, sep="/")


def iterate_tensors(
    params: Mapping[str, Any], links: Sequence[Link]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and tensors one by one, the inverse of `params_from_tensors`.

    Raises:
      ValueError: if the tree has parameters that no link takes, or lacks some.
    """
    flat = flatten_dict(params, sep="/")
    linked = {path for link in links for path in link.ours}
    if flat.keys() != linked:
        raise ValueError(
            f"parameters that only the model has: {sorted(flat.keys() - linked)}; that only the "
            f"format has: {sorted(linked - flat.keys())}"
        )
    for link in links:
        parts = link.write(*(np.asarray(flat[path]) for path in link.ours))
        yield from zip(link.theirs, parts, strict=True)


def tensor_shapes(links: Sequence[Link]) -> dict[str, Shape]:
    """The shape of every tensor by its name, in the order in which they are read."""
    return {name: shape for link in links for name, shape in link.theirs.items()}


def _check_names_and_shapes(
    tensors: Mapping[str, np.ndarray], links: Sequence[Link], extras: Mapping[str, Check]
) -> None:
    wanted = tensor_shapes(links)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise FormatError(
            f"tensors that the config asks for are missing: {shortened(missing)}; check the "
            "numbers of layers in config.json, and that the weights are of the same model."
        )
    unknown = sorted(set(tensors) - set(wanted) - set(extras))
    if unknown:
        raise FormatError(
            f"unknown tensors {shortened(unknown)}; this config has no use for them. Check the "
            "numbers of layers in config.json, and that the weights are of the same model."
        )
    wrong = [
        f"{name} is {shape}, not {wanted[name]}"
        for name in wanted
        if (shape := _shape(tensors, name)) != wanted[name]
    ]
    if wrong:
        raise FormatError(
            f"tensors do not have the shapes that config.json asks for: {shortened(wrong)}; "
            "config and weights are not of the same model."
        )


def _shape(tensors: Mapping[str, np.ndarray], name: str) -> Shape:
    if isinstance(tensors, (SafetensorsReader, Prefixed)):
        return tensors.shape(name)
    return tensors[name].shape


class Prefixed(Mapping[str, np.ndarray]):
    """The tensors of a folder whose names lack a prefix, under the names that have it.

    transformers saves so what it calls the base model, such as OpenAI's own GPT-2.
    """

    def __init__(self, tensors: SafetensorsReader, prefix: str):
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        return self._tensors[name.removeprefix(self._prefix)]

    def __contains__(self, name: object) -> bool:
        is_name = isinstance(name, str) and name.startswith(self._prefix)
        return is_name and str(name).removeprefix(self._prefix) in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""
        return self._tensors.shape(name.removeprefix(self._prefix))

    def type_name(self, name: str) -> str:
        """The type of a tensor, without reading it."""
        return self._tensors.type_name(name.removeprefix(self._prefix))
