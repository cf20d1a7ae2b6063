"""Phases of generation with random weights, and the work that each of them needs at least."""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bounds import weight_bytes
from benchmarks.timing import Phase
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState, decode, start
from megatransformer_jax.generation.endings import Ending
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.prefill import left_padded, prefill
from megatransformer_jax.models.cost.flops import forward_flops
from megatransformer_jax.models.cost.memory import cache_bytes_per_token
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model, init_params
from megatransformer_jax.nn.kv_cache import CacheShape, KVCache, init_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase of the model needs at least.

    Attributes:
      tokens: read or made, of all rows.
      flops: of its matrix products.
      num_bytes: of weights and of keys and values.
      rows: of the chain that it is compared with.
    """

    tokens: int
    flops: float
    num_bytes: float
    rows: int


class GenerationPhases:
    """The model, and phases of it.

    Args:
      arguments: prompt, new, depth, precision and capacities.
      config: another model than that of `benchmarks.generate`, for the same depth.
    """

    def __init__(self, arguments: argparse.Namespace, config: ModelConfig | None = None):
        self.prompt, self.new, self.depth = arguments.prompt, arguments.new, arguments.depth
        self.length = self.prompt + self.new
        self.policy = DTypePolicy.from_precision(arguments.precision, jax.default_backend())
        recurrence = RecurrenceConfig(
            mean_steps=self.depth,
            backprop_depth=min(4, self.depth),
            max_steps=self.depth,
            sampling="fixed",
            state_init="zero",
        )
        longest = max(arguments.capacities)
        self.config = config or ModelConfig(
            vocab_size=4096, max_length=longest, recurrence=recurrence
        )
        self.model: MegaTransformer = build_model(
            self.config, self.policy, Sharder(), jax.default_backend()
        )
        self.params = init_params(self.model, jax.random.key(0))
        numbers = jnp.int32(self.depth), jnp.float32(0), jnp.int32(1)
        self.rule = DepthRule(*numbers, exit_criterion("fixed"))

    def prefill(self, rows: int, capacity: int) -> Phase:
        """Passes the prompts through the model; a fresh cache per round is not timed."""
        history, keys = self._history(rows, capacity), self._keys(rows)

        def run(cache: KVCache) -> Any:
            prompts = left_padded(history, keys, self.prompt)
            return prefill(self.model, self.params, prompts, cache, self.rule)

        name = f"prefill {self.prompt}, {rows} rows"
        return Phase(name, lambda: self._empty_cache(rows, capacity), run)

    def decode(self, rows: int, capacity: int) -> Phase:
        """Adds the new tokens to prompts that have been read; each round begins with a copy."""
        settings, history = self._settings(rows), self._history(rows, capacity)
        begin = self.prefill(rows, capacity)

        @functools.cache
        def first() -> DecodeState:
            return start(settings, begin.run(begin.prepare()), history)

        def run(state: DecodeState) -> DecodeState:
            return decode(self.model, self.params, settings, state, jnp.int32(self.new))

        name = f"decode {self.new}, {rows} rows, capacity {capacity}"
        return Phase(name, lambda: jax.tree.map(jnp.copy, first()), run, self._check)

    def decode_temporaries(self, rows: int, capacity: int) -> int:
        """Bytes of memory that the compiled decode loop needs besides what it is given."""
        settings, history = self._settings(rows), self._history(rows, capacity)
        begin = self.prefill(rows, capacity)
        state = start(settings, begin.run(begin.prepare()), history)
        # As a flat list: what is lowered has no arrays that a checker of shapes could look at.
        given, tree = jax.tree.flatten((self.params, settings, state))
        count = len(jax.tree.leaves(state))

        def run(*leaves: Any) -> DecodeState:
            params, settings, state = jax.tree.unflatten(tree, leaves)
            return decode(self.model, params, settings, state, jnp.int32(self.new))

        is_donated = tuple(range(len(given) - count, len(given)))
        compiled = jax.jit(run, donate_argnums=is_donated).lower(*given).compile()
        memory: Any = compiled.memory_analysis()
        return int(memory.temp_size_in_bytes)

    def uncached(self) -> Phase:
        """One token without a cache: one pass over prompt and new tokens."""
        apply = jax.jit(
            lambda params, tokens: self.model.apply(
                {"params": params}, tokens, num_steps=jnp.int32(self.depth)
            ).logits[:, -1]  # type: ignore[union-attr]
        )
        tokens = self._tokens(1, self.length)
        return Phase(
            f"one pass over {self.length}, no cache",
            lambda: tokens,
            lambda t: apply(self.params, t),
        )

    def prefill_work(self, rows: int) -> Work:
        """Logits are computed for the last token only."""
        flops = self._flops(self.prompt) - (self.prompt - 1) * self._head_flops()
        weights = weight_bytes(self.config, self.depth, self.policy.compute)
        return Work(rows * self.prompt, rows * flops, weights, rows)

    def decode_work(self, rows: int) -> Work:
        """The new tokens; the one at position p sees p keys before its own."""
        compute, seen = self.policy.compute, range(self.prompt, self.length)
        keys_and_values = sum(seen) * cache_bytes_per_token(self.config, self.depth, compute)
        weights = self.new * weight_bytes(self.config, self.depth, compute)
        return Work(
            rows * self.new,
            rows * (self._flops(self.length) - self._flops(self.prompt)),
            weights + rows * keys_and_values,
            rows,
        )

    def _flops(self, length: int) -> float:
        return length * forward_flops(self.config, length).total(self.depth)

    def _head_flops(self) -> float:
        return forward_flops(self.config, 1).once["head"]["head"]

    def _tokens(self, rows: int, length: int) -> np.ndarray:
        shape = (rows, length)
        return np.random.default_rng(0).integers(0, self.config.vocab_size, shape, np.int32)

    def _settings(self, rows: int) -> DecodeSettings:
        ending = Ending(jnp.zeros((0,), jnp.int32), jnp.int32(self.length))
        return DecodeSettings(self.rule, (), ending, self._keys(rows))

    def _history(self, rows: int, capacity: int) -> Any:
        return history_of_prompts(self._tokens(rows, self.prompt).tolist(), capacity, 0)

    def _keys(self, rows: int) -> jax.Array:
        return jax.random.split(jax.random.key(1), rows)

    def _empty_cache(self, rows: int, capacity: int) -> KVCache:
        return init_cache(
            self.config,
            CacheShape(
                rows,
                capacity,
                num_slots=self.depth,
                dtype=self.policy.compute,
                platform=self.model.platform,
            ),
        )

    def _check(self, result: DecodeState) -> None:
        steps, lengths, scores = jax.device_get(
            (result.steps, result.history.lengths, result.scores)
        )
        steps = steps[:, self.prompt + 1 : self.length + 1]
        is_whole = np.all(lengths == self.length + 1) and np.all(steps == self.depth)
        if not is_whole or not np.all(np.isfinite(scores)):
            raise RuntimeError("decoding did not make the tokens that it was asked for")
