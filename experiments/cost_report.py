"""What a run costs, computed from its config: nothing of the model's size is allocated."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from experiments.assemble import abstract_train_state, require_transformer, trained_depth
from megatransformer_jax.config.fine_tuning import TRAIN_ALL
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.evaluation.depth_table import evaluated_depths
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
    ParameterCounts,
    abstract_params,
    count_parameters,
    effective_parameters,
)
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, resolve_mesh_shape
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.trainable import split_params
from megatransformer_jax.types import DTypePolicy, MediaBatch


@dataclasses.dataclass(frozen=True)
class TrainMemory:
    """Bytes on one device while it trains. What is from `activations` on is estimated.

    `merged` are the float32 weights that LoRA's updates are added to in every step. `gathered` are
    whole copies of parameters that the axis fsdp cuts, beyond those in another type that
    `activations` holds. `activations` sums all of `ActivationMemory`, of which
    `per_iteration` comes with every iteration that has gradients.
    """

    parameters: int
    optimizer: int
    gradients: int
    merged: int
    gathered: int
    activations: int
    per_iteration: int

    @property
    def total(self) -> int:
        """All together."""
        kept = self.parameters + self.optimizer + self.gradients
        return kept + self.merged + self.gathered + self.activations


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
    """All that `experiments.inspect` shows. `media` has 'image' and 'audio' where there are such;
    `places` are those of a sequence, text and media together."""

    parameters: ParameterCounts
    flops: ForwardFlops
    media: dict[str, MediumFlops]
    places: int
    depths: tuple[DepthCost, ...]
    memory: TrainMemory
    mesh: dict[str, int]
    platform: str
    compute_type: str
    trained_depth: int | None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def make_report(config: RunConfig) -> CostReport:
    """The costs of a run on this machine's kind of device, on the mesh that the config names.

    The mesh need not exist: `mesh.data=-1`, all devices that there are, counts as 1.

    Raises:
      ConfigError: if mesh, model and batch do not fit each other, or the run trains no transformer.
    """
    require_transformer(config)
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(config.train.precision, platform)
    model = build_model(config.model, policy, Sharder(), platform)
    counts = count_parameters(abstract_params(model))
    places = config.data.sequence_length + sum(media_places(config))
    flops = forward_flops(config.model, places)
    mesh = _abstract_mesh(config.mesh)
    check_run_fits_mesh(config, mesh)
    return CostReport(
        parameters=counts,
        flops=flops,
        media=media_flops(model),
        places=places,
        depths=tuple(
            _depth_cost(config, counts, flops, depth, policy) for depth in evaluated_depths(config)
        ),
        memory=_train_memory(config, model, Sharder(mesh)),
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
    policy: DTypePolicy,
) -> DepthCost:
    iterations = 0 if depth is None else depth
    trained = train_flops(config.model, flops, iterations)
    return DepthCost(
        depth=depth,
        effective_parameters=effective_parameters(counts, max(1, iterations)),
        forward_flops=flops.total(iterations),
        train_flops=trained.model,
        hardware_train_flops=trained.hardware,
        cache_bytes=cache_bytes_per_token(config.model, iterations, policy.compute),
    )


def _train_memory(config: RunConfig, model: MegaTransformer, sharder: Sharder) -> TrainMemory:
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    shape = cast(Mesh, sharder.mesh).shape
    rows = config.data.batch_size // config.train.accumulation // (shape["data"] * shape["fsdp"])
    length = config.data.sequence_length // shape["sequence"]
    activations = activation_memory(
        model, rows, length, _abstract_media(config, rows, length), _learned(config, rows, shape)
    )
    parameters = tree_bytes(state.params)
    # Accumulation adds a micro-batch's gradients to a sum of the same size.
    trained, _ = split_params(state.params, config.fine_tuning)
    gradients = tree_bytes(trained) * (1 if config.train.accumulation == 1 else 2)
    # Weights in another type than the parameters' are among the activations already.
    merged = 0
    if config.fine_tuning.lora.rank:
        plain = abstract_train_state(model, optax.identity(), sharder, TRAIN_ALL)
        merged = tree_bytes(plain.params)
    has_own_copies = model.policy.compute != model.policy.param
    is_cut = shape["fsdp"] > 1 and not has_own_copies
    return TrainMemory(
        parameters=parameters,
        optimizer=tree_bytes(state.opt_state),
        gradients=gradients,
        merged=merged,
        gathered=(merged or parameters) * shape["fsdp"] if is_cut else 0,
        activations=activations.total(config.model.recurrence.backprop_depth),
        per_iteration=activations.per_iteration,
    )


def _abstract_media(config: RunConfig, rows: int, length: int) -> MediaBatch | None:
    """Shapes of the media of a batch. With a mesh axis `sequence` slots are not cut."""
    model, data = config.model, config.data.media
    if not model.has_media:
        return None

    def shape(dtype: Any, *extents: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *extents), dtype)

    media = MediaBatch(follows=shape(jnp.int32, length), task=shape(jnp.int32))
    if model.image.enabled:
        slots = data.images_per_row
        media = media._replace(
            images=shape(jnp.float32, slots, *model.image.shape),
            is_image=shape(jnp.bool_, slots),
            is_drawn=shape(jnp.bool_, slots),
        )
    if model.audio.enabled:
        slots, audio = data.audio_per_row, model.audio
        media = media._replace(
            mels=shape(jnp.float32, slots, audio.max_frames, audio.mel.num_mels),
            mel_lengths=shape(jnp.int32, slots),
            is_spoken=shape(jnp.bool_, slots),
        )
    return media


def _learned(config: RunConfig, rows: int, mesh: Mapping[str, int]) -> tuple[int, int]:
    """Images and clips of a micro-batch on one device that decoders learn to make, at most."""
    media, ways = config.data.media, mesh["data"] * mesh["fsdp"]

    def count(task: str, slots: int) -> int:
        return min(-(-media.most_rows(task, config.data.batch_size) * slots // ways), rows * slots)

    return count("draw", media.images_per_row), count("speak", media.audio_per_row)
