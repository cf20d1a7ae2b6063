"""One transformer layer, and stacks of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.attention import SelfAttention
from megatransformer_jax.nn.context import NEW_ROWS, LayerContext
from megatransformer_jax.nn.cut_matrices import PRODUCT
from megatransformer_jax.nn.layer_sharing import scan_layers
from megatransformer_jax.nn.loop_parameters import scaled_update
from megatransformer_jax.nn.mlp import Mlp
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import WeightInit, vector
from megatransformer_jax.nn.peer import Peer
from megatransformer_jax.nn.quantized import PRODUCT_INPUTS
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# Collection that blocks sow their updates into, and stacks their inputs, for `profile_admin`.
RESIDUAL_UPDATES = "residual_updates"
# Everything that layers sow. A loop over layers would lose it.
SOWN_BY_LAYERS = (NEW_ROWS, RESIDUAL_UPDATES, PRODUCT_INPUTS, "intermediates")

# The name of what layers and iterations are computed again from, for policies of `jax.checkpoint`.
KEPT_STATE = "kept_state"

Module = TypeVar("Module", bound=nn.Module)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    The norm's placement is `config.norm.placement`; `NormConfig` has the formulas. How an update
    joins the stream is `config.residual`. `names_input` gives the input the name `KEPT_STATE`.
    """

    config: ModelConfig
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder
    platform: str
    names_input: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, layer: int | Int[Array, ""]
    ) -> Float[Array, "B T D"]:
        """Runs the layer; `layer` is its place in its stack, traced where layers are scanned."""
        if self.names_input:
            x = checkpoint_name(x, KEPT_STATE)
        parts = (self.config, self.inits, self.policy, self.sharder, self.platform)
        attend = SelfAttention(*parts, name="attention")
        feed_forward = self._feed_forward(context)
        x = self._add(x, lambda h: attend(h, context, layer), "attention", context)
        x = self._add(x, feed_forward, "mlp", context)
        return self.sharder.constrain(x, "batch", "length", None)

    def _feed_forward(self, context: LayerContext) -> Callable[[jax.Array], jax.Array]:
        config = self.config.mlp
        if config.kind == "peer":
            peer = Peer(config, self.inits, self.policy, self.sharder, name="mlp")
            segment_ids = context.mask.query_segment_ids
            is_token = None if segment_ids is None else segment_ids > 0
            return lambda h: peer(h, context.deterministic, is_token)
        mlp = Mlp(config, self.inits, self.policy, name="mlp")
        return lambda h: mlp(h, context.deterministic, context.loop)

    def _add(
        self,
        x: jax.Array,
        layer: Callable[[jax.Array], jax.Array],
        name: str,
        context: LayerContext,
    ) -> jax.Array:
        placement = self.config.norm.placement

        def norm(array: jax.Array, when: str) -> jax.Array:
            return Norm(self.config.norm, name=f"{name}_norm_{when}")(array)

        update = layer(x if placement in ("post", "output", "none") else norm(x, "in"))
        if placement in ("peri", "output"):
            update = norm(update, "out")
        dropout = nn.Dropout(self.config.residual_dropout_rate)
        update = dropout(update, deterministic=context.deterministic)
        update = scaled_update(self, f"{name}_loop_scale", update, context.loop)
        self.sow(RESIDUAL_UPDATES, f"{name}_update", update)
        x = self._join(x, update, f"{name}_residual_scale")
        return norm(x, "out") if placement in ("post", "sandwich") else x

    def _join(self, x: jax.Array, update: jax.Array, scale_name: str) -> jax.Array:
        match self.config.residual:
            case "plain":
                return x + update
            case "rezero":
                alpha = vector(self, scale_name, nn.initializers.zeros, ())
                return x + alpha.astype(update.dtype) * update
            case "admin":
                omega = vector(self, scale_name, nn.initializers.ones, (x.shape[-1],))
                return omega.astype(x.dtype) * x + update
        raise ValueError(f"unknown residual {self.config.residual!r}; known: plain, rezero, admin")


class Stack(nn.Module):
    """Layers in sequence. Layer i has the weights `layer_{owners[i]}` (nn/layer_sharing.py).

    `stack` is 'prelude', 'core' or 'coda', whose layers may have their own windows and value
    embeddings; other stacks leave it empty.
    """

    config: ModelConfig
    owners: tuple[int, ...]
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder
    platform: str
    remat: str = "none"
    stack: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        """Runs the layers; `remat` as in `ModelConfig.remat`, applied to each."""
        if self._can_scan():
            return self._scan(x, context)
        # `layer`, argument 3 after self, x and context, picks a parameterless row: static.
        block_class = rematerialized(Block, self.remat, static_argnums=(3,))
        self.sow(RESIDUAL_UPDATES, "stream", x)
        parts = (self.config, self.inits, self.policy, self.sharder, self.platform)
        blocks = [
            block_class(*parts, names_input=self.remat == "offload", name=f"layer_{owner}")
            for owner in sorted(set(self.owners))
        ]
        for layer, owner in enumerate(self.owners):
            x = blocks[owner](x, self._context_of(context, layer, layer), layer)
        return x

    def _context_of(self, context: LayerContext, layer: int | jax.Array, like: int) -> LayerContext:
        """The context as the layer at this place of the stack sees it; `like` is a static place of
        the same kind."""
        if not self.stack:
            return context
        mask = dataclasses.replace(context.mask, window=self.config.windows(self.stack)[like])
        rows, having = None, self.config.value_layers(self.stack)
        if like in having:
            if context.value_embeddings is None:
                raise ValueError(
                    "this pass has no value embeddings, but the model's layers want them; give its "
                    "context those of its tokens (`MegaTransformer.embed_values`)."
                )
            of_stack = context.value_embeddings[self.stack]
            rows = of_stack[jnp.sum(jnp.asarray(having) < layer)]
        return dataclasses.replace(context, mask=mask, value_embeddings=None, value_embedding=rows)

    def _can_scan(self) -> bool:
        """Not to declare parameters, nor when somebody asks for what layers sow."""
        if not self.config.scan_layers or len(self.owners) < 2 or self.is_initializing():
            return False
        assert self.scope is not None  # It is bound, or could not be called.
        return not any(self.scope.is_mutable_collection(name) for name in SOWN_BY_LAYERS)

    def _scan(self, x: jax.Array, context: LayerContext) -> jax.Array:
        parts = (self.config, self.inits, self.policy, self.sharder, self.platform)
        block = Block(*parts, names_input=self.remat == "offload", parent=None)
        dropout_key = None if context.deterministic else self.make_rng("dropout")

        def apply_layer(params: Any, x: jax.Array, layer: jax.Array, like: int) -> jax.Array:
            rngs = {}
            if dropout_key is not None:
                rngs = {"dropout": jax.random.fold_in(dropout_key, layer)}
            seen = self._context_of(context, layer, like)
            return cast(jax.Array, block.apply({"params": params}, x, seen, layer, rngs=rngs))

        if self.remat != "none":
            # The loop keeps the two computations apart by itself.
            apply_layer = jax.checkpoint(
                apply_layer,
                policy=remat_policy(self.remat),
                prevent_cse=False,
                static_argnums=(3,),
            )
        return scan_layers(apply_layer, self.variables["params"], self.owners, x, self._kinds())

    def _kinds(self) -> tuple[tuple[int | None, bool], ...]:
        """What differs between the layers of a stack: window, and whether there is a value gate."""
        if not self.stack:
            return ()
        having = self.config.value_layers(self.stack)
        windows = enumerate(self.config.windows(self.stack))
        return tuple((window, layer in having) for layer, window in windows)


def rematerialized(
    module_class: type[Module], remat: str, *, static_argnums: tuple[int, ...] = ()
) -> type[Module]:
    """The module, computed again in the backward pass as `ModelConfig.remat` says.

    Parameters keep their names, if the module is given its own: a wrapped class is called
    otherwise.

    Args:
      module_class: of a layer.
      remat: none, full, dots or offload.
      static_argnums: arguments of its call that are not arrays, counted from `self`, which is 0.

    Raises:
      ValueError: for other values of `remat`.
    """
    if remat == "none":
        return module_class
    return nn.remat(module_class, policy=remat_policy(remat), static_argnums=static_argnums)


def remat_policy(remat: str) -> Callable[..., bool] | None:
    """What a rematerialised layer keeps: nothing (full), its products and convolutions with weights
    (dots), or its input in the host's memory (offload).

    Raises:
      ValueError: for 'none', which rematerialises nothing, and for unknown names.
    """
    match remat:
        case "full":
            return jax.checkpoint_policies.nothing_saveable
        case "dots":
            policies = jax.checkpoint_policies
            return policies.save_from_both_policies(
                policies.save_from_both_policies(
                    policies.dots_with_no_batch_dims_saveable, _is_convolution
                ),
                policies.save_only_these_names(PRODUCT),
            )
        case "offload":
            return jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[KEPT_STATE],
                offload_src="device",
                offload_dst="pinned_host",
            )
    raise ValueError(f"remat={remat!r} has no policy; it must be 'full', 'dots' or 'offload'")


def _is_convolution(primitive: Any, *unused: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`."""
    del unused, params
    return primitive is jax.lax.conv_general_dilated_p
