"""What a run costs, without allocating the model: parameters, FLOPs, memory, and their tables."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax.config.fine_tuning import TRAIN_ALL
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.evaluation.depth_table import evaluated_depths
from megatransformer_jax.models.attention_kernels import KernelChoice, describe_choices
from megatransformer_jax.models.cost.flops import (
    ForwardFlops,
    MediumFlops,
    forward_flops,
    media_flops,
    train_flops,
)
from megatransformer_jax.models.cost.memory import (
    activation_memory,
    cache_bytes_per_token,
    tree_bytes,
)
from megatransformer_jax.models.cost.parameter_counts import (
    KINDS,
    LayerSizes,
    ParameterCounts,
    count_layers,
    count_parameters,
    effective_parameters,
    total_parameters,
)
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    abstract_params,
    build_model,
)
from megatransformer_jax.runs.build import (
    abstract_batches,
    abstract_train_state,
    trained_depth,
    training_kernels,
)
from megatransformer_jax.sharding.devices import device_kind, devices_with_room
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_sharder, resolve_mesh_shape
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder
from megatransformer_jax.storage import write_json
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.trainable import split_params
from megatransformer_jax.types import DTypePolicy, MediaBatch

# ------------------------------------------------------------------------------
# The report.


@dataclasses.dataclass(frozen=True)
class TrainMemory:
    """Bytes on one device while it trains. What is from `gathered` on is estimated.

    `summed` are the gradients that micro-batches add up, `gradients` those of one of them. `merged`
    are the float32 weights that LoRA's updates are added to in every step. `gathered` are
    whole copies of parameters that the axis fsdp cuts, or of their gradients; those in another type
    are in `activations`. `activations` sums all of `ActivationMemory`, of which
    `per_iteration` comes with every iteration that has gradients.
    """

    parameters: int
    optimizer: int
    gradients: int
    summed: int
    merged: int
    gathered: int
    activations: int
    per_iteration: int

    @property
    def total(self) -> int:
        """The most at any time: gradients take the place of the activations that they are made
        of."""
        always = self.parameters + self.optimizer + self.summed + self.merged + self.gathered
        return always + max(self.activations, self.gradients)


@dataclasses.dataclass(frozen=True)
class DepthCost:
    """What depends on the number of iterations. FLOPs and cache bytes are per token.

    `depth` is None for a model without a core. `train_flops` has gradients through the last
    `backprop_depth` iterations; `hardware_train_flops` adds rematerialisation and masked
    iterations. `cache_bytes` is a full key/value cache: a slot per layer and iteration.
    """

    depth: int | None
    effective_parameters: int
    forward_flops: float
    train_flops: float
    hardware_train_flops: float
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class CostReport:
    """All that `megatransformer inspect` shows. `media` has 'image' and 'audio' where there are
    such; `places` are those of a sequence, text and media together; `layers` are by name;
    `attention` has the kernels of the train step."""

    parameters: ParameterCounts
    flops: ForwardFlops
    media: dict[str, MediumFlops]
    places: int
    depths: tuple[DepthCost, ...]
    layers: dict[str, LayerSizes]
    memory: TrainMemory
    attention: tuple[KernelChoice, ...]
    device: str | None
    mesh: dict[str, int]
    platform: str
    compute_type: str
    trained_depth: int | None

    @property
    def fits(self) -> list[str]:
        """Kinds of devices of the platform that have room for the training step."""
        return devices_with_room(self.memory.total, self.platform)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["memory"]["total"] = self.memory.total
        values["fits"] = self.fits
        return values

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes cost.json with all numbers, exact, into a folder; returns its path."""
        path = folder / "cost.json"
        write_json(path, self.to_dict())
        return [path]


def make_report(run: BaseRunConfig, device: str | None = None) -> CostReport:
    """The costs of a run on the mesh that the config names, which need not exist.

    Args:
      run: its configuration; `mesh.data=-1`, all devices that there are, counts as 1.
      device: one of `DEVICE_NAMES`, whose kernels and types count. None: this machine's.

    Raises:
      ConfigError: if mesh, model and batch do not fit each other, the run trains no transformer, or
        the device is a GPU and there is none here.
    """
    config = require_transformer(run)
    here = jax.default_backend()
    platform = here if device is None else device_kind(device).platform
    if platform == "gpu" != here:
        raise ConfigError(
            "device",
            f"{device!r}: the kernel of GPUs (cuDNN) can only be traced where there is a GPU, and "
            f"this machine has {here!r}; run it there, or choose a TPU.",
        )
    policy = DTypePolicy.from_precision(config.train.precision, platform)
    model = build_model(config.model, policy, Sharder(), platform)
    params = abstract_params(model)
    counts = count_parameters(params)
    places = config.data.sequence_length + sum(media_places(config))
    flops = forward_flops(config.model, places)
    mesh = _abstract_mesh(config.mesh)
    check_run_fits_mesh(config, mesh)
    sharder = make_sharder(config.model, mesh)
    return CostReport(
        parameters=counts,
        flops=flops,
        media=media_flops(model),
        places=places,
        depths=tuple(
            _depth_cost(config, counts, flops, depth, model) for depth in evaluated_depths(config)
        ),
        layers=count_layers(params),
        memory=_train_memory(config, model, sharder, device),
        attention=training_kernels(config, model, sharder),
        device=device,
        mesh=dict(mesh.shape),
        platform=platform,
        compute_type=str(policy.compute),
        trained_depth=trained_depth(config),
    )


def _abstract_mesh(config: MeshConfig) -> Mesh:
    """The mesh without its devices; only shapes of shards are asked of it."""
    others = config.fsdp * config.tensor * config.sequence
    shape = resolve_mesh_shape(config, others * max(1, config.data))
    return cast(Mesh, AbstractMesh(tuple(shape.values()), tuple(shape)))


def _depth_cost(
    config: RunConfig,
    counts: ParameterCounts,
    flops: ForwardFlops,
    depth: int | None,
    model: MegaTransformer,
) -> DepthCost:
    iterations = 0 if depth is None else depth
    trained = train_flops(config.model, flops, iterations)
    return DepthCost(
        depth=depth,
        effective_parameters=effective_parameters(counts, max(1, iterations)),
        forward_flops=flops.total(iterations),
        train_flops=trained.model,
        hardware_train_flops=trained.hardware,
        cache_bytes=cache_bytes_per_token(
            config.model, iterations, model.policy.compute, model.platform
        ),
    )


def _train_memory(
    config: RunConfig, model: MegaTransformer, sharder: Sharder, device: str | None
) -> TrainMemory:
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    shape = cast(Mesh, sharder.mesh).shape
    rows = config.data.batch_size // config.train.accumulation // (shape["data"] * shape["fsdp"])
    length = config.data.sequence_length // shape["sequence"]
    activations = activation_memory(
        model,
        rows,
        length,
        _media_on_device(config, rows, length),
        _learned(config, rows, shape),
        shape["tensor"],
    )
    parameters = tree_bytes(state.params)
    gradients = tree_bytes(split_params(state.params, config.fine_tuning)[0])
    # Weights in another type than the parameters' are among the activations already.
    merged = 0
    if config.fine_tuning.lora.rank:
        plain = abstract_train_state(model, optax.identity(), sharder, TRAIN_ALL)
        merged = tree_bytes(plain.params)
    has_own_copies = model.policy.compute != model.policy.param
    gathered = 0
    if shape["fsdp"] > 1:
        # Copies in another type are gathered; about three quarters of them are there once more, in
        # the order of axes that loops read.
        whole = (merged or parameters) * shape["fsdp"]
        gathered = activations.weights * 3 // 4 if has_own_copies else whole
    return TrainMemory(
        parameters=parameters,
        optimizer=tree_bytes(state.opt_state),
        gradients=gradients,
        summed=0 if config.train.accumulation == 1 else gradients,
        merged=merged,
        gathered=gathered,
        activations=_in_memory(
            activations.total(config.model.recurrence.kept_states), model.platform, device
        ),
        per_iteration=activations.per_iteration,
    )


# Measured on what TPU's compiler assigns, see docs/cost.md: space between buffers that nothing fits
# into, and what v4 holds in its CMEM of 128 MiB instead of its memory.
TPU_SPACING = 1.06
V4_CMEM_BYTES = 56 * 2**20


def _in_memory(num_bytes: int, platform: str, device: str | None) -> int:
    """What a compiler takes of a device's memory for values of so many bytes."""
    if platform != "tpu":
        return num_bytes
    spaced = int(TPU_SPACING * num_bytes)
    return spaced - min(V4_CMEM_BYTES, spaced // 4) if device == "v4" else spaced


def _media_on_device(config: RunConfig, rows: int, length: int) -> MediaBatch | None:
    """Shapes of the media of these rows. With a mesh axis `sequence` slots are not cut."""
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES)
    media = abstract_batches(config, Sharder(cast(Mesh, mesh)))[-1].media
    if media is None:
        return None
    follows = jax.ShapeDtypeStruct((rows, length), media.follows.dtype)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), media
    )
    return shapes._replace(follows=follows)


def _learned(config: RunConfig, rows: int, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Images and clips of a micro-batch on one device that decoders learn to make, at most."""
    media, ways = config.data.media, mesh["data"] * mesh["fsdp"]

    batch_size = config.data.batch_size

    def count(most: int, slots: int) -> int:
        return min(-(-most // ways), rows * slots)

    return (
        count(media.most_drawn(batch_size), media.images_per_row),
        count(media.most_spoken(batch_size), media.audio_per_row),
    )


# ------------------------------------------------------------------------------
# Its tables.

# In the order of a layer, then what stands outside of layers.
PRODUCTS = (
    "qkv",
    "value_gate",
    "attention",
    "output",
    "query",
    "keys",
    "up",
    "down",
    "loop_lora",
    "adapter",
    "core_in",
    "core_out",
    "c_matrix",
    "head",
)
_UNITS = ("", "k", "M", "G", "T", "P", "E")


def cost_tables(report: CostReport, run: BaseRunConfig) -> list[Table]:
    """Parameters, by part and by layer, FLOPs, costs by depth, memory."""
    config = require_transformer(run)
    found = [
        _parameters(report, config),
        _layers(report),
        _flops(report, config),
        *([_media(report, config)] if report.media else []),
        _depths(report, config),
        _memory(report, config),
    ]
    for table in found:
        table.title_justify = table.caption_justify = "left"
    return found


def print_tables(console: Console, report: CostReport, run: BaseRunConfig) -> None:
    """Prints everything; in plain characters where the console is not a terminal."""
    for table in cost_tables(report, run):
        table.box = box.ROUNDED if console.is_terminal else box.ASCII
        console.print(table)


def format_number(value: float) -> str:
    """Three significant digits with a decimal prefix: 3.57G."""
    index = 0
    while value >= 999.5 and index < len(_UNITS) - 1:
        value, index = value / 1000, index + 1
    decimals = 0 if value >= 99.95 or value == int(value) else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}{_UNITS[index]}"


def format_bytes(value: float) -> str:
    """Three significant digits with a binary prefix: 1.50 GiB."""
    index = 0
    while value >= 1023.5 and index < len(_UNITS) - 1:
        value, index = value / 1024, index + 1
    unit = f"{_UNITS[index].upper()}iB" if index else "B"
    decimals = 0 if value >= 99.95 or value == int(value) else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {unit}"


def _parameters(report: CostReport, config: RunConfig) -> Table:
    table = _table("Parameters", ["part", *(kind.replace("_", "-") for kind in KINDS), "all"])
    for part, kinds in report.parameters.items():
        cells = [f"{kinds[kind]:,}" if kind in kinds else "" for kind in KINDS]
        table.add_row(part, *cells, f"{sum(kinds.values()):,}")
    total = total_parameters(report.parameters)
    by_kind = [sum(kinds.get(kind, 0) for kinds in report.parameters.values()) for kind in KINDS]
    table.add_section()
    table.add_row("all", *(f"{count:,}" if count else "" for count in by_kind), f"{total:,}")
    if config.model.tie_embeddings:
        table.caption = "The head is the token embedding (tied), counted once."
    return table


def _flops(report: CostReport, config: RunConfig) -> Table:
    parts: dict[str, Mapping[str, float]] = {}
    for part, products in report.flops.once.items():
        parts[part] = products
        if part == "injection":
            parts["one iteration"] = report.flops.iteration
    used = [name for name in PRODUCTS if any(part.get(name) for part in parts.values())]
    table = _table("Forward FLOPs per token", ["part", *used, "all"])
    for part, products in parts.items():
        total = sum(products.values())
        if total:
            cells = [format_number(products[name]) if products.get(name) else "" for name in used]
            table.add_row(part, *cells, format_number(total))
    table.caption = (
        f"Matrix products only. Attention: rows of {report.places} "
        f"{'tokens and places of media' if report.media else 'tokens'}, visible keys only."
    )
    return table


def _media(report: CostReport, config: RunConfig) -> Table:
    """A column per kind: what one medium costs, in training and to be made."""
    depth = report.trained_depth or 0
    # Places of media go through the prelude too, before the encoder's vectors replace it there.
    per_place = report.flops.total(depth) - sum(report.flops.once["head"].values())
    trained = _per_place(report, config)
    names = {"image": "one image", "audio": f"one clip of {config.model.audio.max_frames} frames"}
    table = _table("FLOPs per medium", ["part", *(names[kind] for kind in report.media)])
    rows: dict[str, list[str]] = {}
    for medium in report.media.values():
        stack = medium.places * per_place
        for label, value in (
            ("places in the sequence", str(medium.places)),
            ("encoder", format_number(medium.prelude)),
            ("its places in the text's layers", format_number(stack)),
            ("coda of its decoder", format_number(medium.coda)),
            ("decoder, one call", format_number(medium.decoder)),
            ("forward, all of these", format_number(medium.forward + stack)),
            ("train", format_number(3 * medium.forward + medium.places * trained)),
            ("to be made: a step", format_number(medium.sampling / medium.sampling_steps)),
            ("to be made: all steps", format_number(medium.sampling)),
            ("steps", str(medium.sampling_steps)),
        ):
            rows.setdefault(label, []).append(value)
    for label, values in rows.items():
        table.add_row(label, *values)
    table.caption = (
        "Products and convolutions. Train: a medium that its decoder learns to make; one that is "
        "only read takes no decoder, and slots that are not used cost as much. Left out: the text "
        "before a medium that is made, and a vocoder."
    )
    return table


def _per_place(report: CostReport, config: RunConfig) -> float:
    """Train FLOPs of a place that has no head, at the trained depth."""
    trained = train_flops(config.model, report.flops, report.trained_depth or 0).model
    return trained - 3 * sum(report.flops.once["head"].values())


def _depths(report: CostReport, config: RunConfig) -> Table:
    length, depth = config.model.max_length, report.trained_depth
    headings = ["depth", "effective parameters", "forward FLOPs", "train FLOPs"]
    # Rematerialisation, and iterations that are masked where the depth is below backprop_depth.
    has_overhead = any(row.hardware_train_flops > row.train_flops for row in report.depths)
    if has_overhead:
        headings.append("executed, at most")
    headings += ["KV cache", f"cache of {length} tokens"]
    table = _table("Per token, by depth" if depth else "Per token", headings)
    for row in report.depths:
        table.add_row(*_depth_cells(row, length, depth, has_overhead))
    if depth is not None:
        backprop_depth = config.model.recurrence.backprop_depth
        gradients = f"gradients through the last {backprop_depth} iterations"
        if config.model.recurrence.gradient == "implicit":
            gradients = f"an implicit gradient of {backprop_depth} terms"
        table.caption = (
            f"* mean depth in training, with {gradients}. KV cache: full, a slot per "
            f"layer and iteration, {report.compute_type}.{_not_counted(config)}"
        )
    return table


def _not_counted(config: RunConfig) -> str:
    """Says which passes of training the FLOPs leave out; empty if none."""
    extra = []
    if config.model.exit_gate.enabled:
        extra.append("the exit gate's own pass")
    if config.train.supervision.is_alone:
        extra.append("coda and head of all iterations but the last")
    elif config.train.supervision.prior != "none":
        extra.append("the pass with a loss at every iteration")
    if config.train.stability.jacobian_weight:
        extra.append("the probe of the core's Jacobian")
    return f" Train FLOPs leave out {' and '.join(extra)}." if extra else ""


def _depth_cells(
    row: DepthCost, length: int, trained_depth: int | None, has_overhead: bool
) -> Iterable[str]:
    is_trained = row.depth is not None and row.depth == trained_depth
    yield ("-" if row.depth is None else str(row.depth)) + (" *" if is_trained else "")
    yield format_number(row.effective_parameters)
    yield format_number(row.forward_flops)
    yield format_number(row.train_flops)
    if has_overhead:
        yield format_number(row.hardware_train_flops)
    yield format_bytes(row.cache_bytes)
    yield format_bytes(row.cache_bytes * length)


def _memory(report: CostReport, config: RunConfig) -> Table:
    memory = report.memory
    mesh = " x ".join(f"{name}={size}" for name, size in report.mesh.items() if size > 1)
    table = _table(f"Training memory per device ({mesh or 'one device'})", ["what", "bytes"])
    table.add_row("parameters", format_bytes(memory.parameters))
    table.add_row("optimiser state", format_bytes(memory.optimizer))
    table.add_row("gradients", format_bytes(memory.gradients))
    if memory.summed:
        table.add_row("sum of gradients over micro-batches", format_bytes(memory.summed))
    if memory.merged:
        table.add_row("weights with LoRA's updates", format_bytes(memory.merged))
    if memory.gathered:
        table.add_row(
            "whole over fsdp: parameters, gradients, about", format_bytes(memory.gathered)
        )
    table.add_row("kept for the backward pass, about", format_bytes(memory.activations))
    table.add_section()
    table.add_row("at most at one time, about", format_bytes(memory.total))
    caption = (
        f"Batch {config.data.batch_size} x {config.data.sequence_length} tokens, in "
        f"{config.train.accumulation} part(s), remat={config.model.remat}, activations "
        f"{report.compute_type}, attention by {describe_choices(report.attention)}. The same at "
        "every depth"
    )
    if memory.per_iteration:
        caption += f"; each iteration with gradients keeps {format_bytes(memory.per_iteration)}"
    table.caption = f"{caption}. {_machines(report)}"
    return table


def _machines(report: CostReport) -> str:
    """Which devices have room, in a sentence; a CPU's memory is not known from its name."""
    if report.platform == "cpu":
        return "For accelerators, whose kernels and types differ: --device, such as --device=v4."
    count = math.prod(report.mesh.values())
    words = f"{count} devices" if count > 1 else "One device"
    fits = ", ".join(report.fits) or f"no {report.platform} of those that are known"
    sentence = f"{words} with room for it, a tenth of the memory being left: {fits}."
    if report.device is not None:
        verdict = "fits" if report.device in report.fits else "does not fit"
        sentence = f"It {verdict} {report.device}. " + sentence
    return sentence


def _layers(report: CostReport) -> Table:
    """Layers of the same sizes that follow each other share a row."""
    table = _table("Parameters by layer", ["layer", "parameters of one", "layers", "all"])
    groups: list[tuple[str, str, int, int]] = []
    for name, sizes in report.layers.items():
        part = name.rpartition("/")[0]
        if groups and groups[-1][2] == sizes.parameters and groups[-1][0].startswith(f"{part}/"):
            first, _, size, count = groups[-1]
            groups[-1] = (first, name, size, count + 1)
        else:
            groups.append((name, name, sizes.parameters, 1))
    for first, last, size, count in groups:
        label = first if count == 1 else f"{first} to {last.rpartition('/')[2]}"
        table.add_row(label, f"{size:,}", str(count), f"{size * count:,}")
    return table


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    return table
