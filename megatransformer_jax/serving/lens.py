"""How one token of a text came about, iteration by iteration: what POST /lens answers.

The text before the token is read into a cache for one text, in chunks, by the depth rule of the
request that made it. Then one pass looks at every iteration over the token. Both are programs that
are compiled once. The cache stays, so the next token of the same text costs one short pass.
"""

import asyncio
import dataclasses
import functools
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GENERATION_OPTIONS, depth_for_model
from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    UserError,
    as_whole,
)
from megatransformer_jax.config.sampling import AUTO, DepthConfig
from megatransformer_jax.config.serving import ModelNameConfig, ServingConfig
from megatransformer_jax.evaluation.lens import TokenTrace, trace_token
from megatransformer_jax.export.program import one_of
from megatransformer_jax.generation.placement import empty_cache, for_rows
from megatransformer_jax.generation.request import prompt_keys
from megatransformer_jax.models.exit_criteria import EXIT_CRITERIA, DepthRule
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward, token_states
from megatransformer_jax.nn.kv_cache import CacheShape, KVCache
from megatransformer_jax.serving.bodies import (
    as_declared,
    check_names,
    is_whole,
    kind_of,
    named,
    read_options,
)
from megatransformer_jax.serving.prompts import check_model, check_token
from megatransformer_jax.serving.served import ServedModel

# Likeliest next tokens of each iteration.
NUM_TOP = 5
# Tokens that are read one by one in one launch, at most.
SINGLES = 16
# Criteria that settle a token by a value that is not below their threshold.
_AT_LEAST = ("argmax_stability",)
FIELDS = (
    *("model", "ids", "position", "prompt_tokens", "seed", "sample"),
    *("depth", "min_depth", "exit_criterion", "exit_threshold"),
)

# Runs a function where the device may be used, and waits for it.
Run = Callable[[Callable[[], Any]], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class LensRequest:
    """Which token, and how the text was made.

    Attributes:
      ids: the text.
      position: the token that is read; what is looked at is what comes after it.
      prompt_tokens: how many of the ids were the prompt; first states that are drawn depend on it.
      depth: iterations that are looked at.
      rule: of the tokens before: most iterations, fewest, and when they leave.
      threshold: of its criterion.
      seed: of the request that made the text.
      sample: number of the text among those of its prompt.
    """

    ids: tuple[int, ...]
    position: int
    prompt_tokens: int
    depth: int
    rule: DepthConfig
    threshold: float
    seed: int
    sample: int

    @property
    def kept_for(self) -> tuple[Any, ...]:
        """What the cache depends on besides the ids."""
        return (self.rule, self.threshold, self.depth, self.prompt_tokens, self.seed, self.sample)


class Lens:
    """Looks at tokens of one model; one thread at a time may call `step`.

    Args:
      model: what is served, with a core; it reads text alone.
      params: its parameters.
      served: facts about it.
      config: how it is served, settled; the cache of the texts that are looked at is like a row's.

    Raises:
      UserError: if the model has no core, or reads more than text.
    """

    def __init__(
        self, model: MegaTransformer, params: Any, served: ServedModel, config: ServingConfig
    ):
        if not served.has_lens:
            raise UserError(f"{served.name} has no recurrent core over text alone to look into.")
        assert config.max_depth is not None and config.cache_slots is not None  # It is settled.
        self._model = for_rows(model, 1)
        self._params = params
        self._served = served
        self._chunk = config.chunk
        self._max_depth = config.max_depth
        self._shape = CacheShape(
            1,
            served.capacity + config.chunk,  # The last chunk of a text may be padded.
            config.cache_slots,
            model.policy.compute,
            model.platform,
            config.cache_sharing,
            config.cache_exited_reads,
            kv_heads=model.sharder.num_heads(model.config.attention.kv_heads),
        )
        # The criteria that a text may have been made with.
        self._names = ("fixed", *(name for name in config.criteria if name != "fixed"))
        size = min(NUM_TOP, model.config.vocab_size)
        read = functools.partial(_read, self._model, self._names)
        look = functools.partial(_look, self._model, (config.max_depth, size))
        self._read, self._look = jax.jit(read, donate_argnums=1), jax.jit(look)
        self._cache: Any = None
        self._known: tuple[tuple[Any, ...], tuple[int, ...]] = ((), ())
        self._lock = asyncio.Lock()

    def compile(self) -> None:
        """Runs all programs once; afterwards nothing is compiled."""
        judging = next((n for n in self._names if EXIT_CRITERIA[n].needs_logits), "fixed")
        # A chunk twice: to JAX an empty cache is bound to no device, and one that was filled is.
        for seed, prompt_tokens, criterion in ((0, 2, "fixed"), (1, 2, "fixed"), (0, 1, judging)):
            body = {"ids": [0, 0], "prompt_tokens": prompt_tokens, "seed": seed}
            body |= {"depth": self._max_depth, "exit_criterion": criterion}
            request = self.request(body)
            while self.step(request) is None:
                pass
        self._known = ((), ())

    def request(self, body: Mapping[str, Any]) -> LensRequest:
        """Checks what a client asks for.

        Args:
          body: `ids`, the text; `position` of the token after which is looked, from 0 (default: the
            last); `depth`, iterations to look at (default: the mean in training);
            `exit_criterion`, `exit_threshold`, `min_depth`, `seed`, `sample`, `prompt_tokens` as in
            the request and the answer that the text is from.

        Raises:
          RequestError: naming the field and what is allowed.
        """
        check_names(body, FIELDS, {})
        with named("ids"):
            check_model(read_options(body, ModelNameConfig).model, self._served)
            ids = self._ids(body.get("ids"))
            rule = self._rule(body)
            depth = self._served.trained_depth if rule.depth is None else rule.depth
            threshold = rule.threshold
            if threshold is None:
                threshold = EXIT_CRITERIA[rule.exit_criterion].default_threshold

            def whole(name: str, default: int, minimum: int, maximum: int) -> int:
                value = as_declared(body.get(name), int)
                return as_whole(name, default if value is None else value, minimum, maximum)

            return LensRequest(
                ids=ids,
                position=whole("position", len(ids) - 1, 0, len(ids) - 1),
                prompt_tokens=whole("prompt_tokens", len(ids), 0, len(ids)),
                depth=as_whole("depth", depth, 1, self._max_depth),
                rule=rule,
                threshold=threshold,
                seed=whole("seed", 0, 0, MAX_SEED),
                sample=whole("sample", 0, 0, MAX_SEED),
            )

    def _rule(self, body: Mapping[str, Any]) -> DepthConfig:
        names = ("depth", "min_depth", "exit_criterion", "exit_threshold")
        rule = DepthConfig(
            **{
                name: as_declared(body[name], GENERATION_OPTIONS[name].declared)
                for name in names
                if body.get(name) is not None
            }
        )
        rule.check_gate(self._served.has_exit_gate)
        if rule.exit_threshold == AUTO:
            trained = self._served.trained_depth or 1
            rule = depth_for_model(rule, trained, self._served.calibration)
        if rule.exit_criterion not in self._names:
            raise ConfigError(
                "exit_criterion",
                f"{rule.exit_criterion!r} is not among those that this server was started with: "
                f"{', '.join(self._names)}.",
            )
        return rule

    async def answer(self, request: LensRequest, run: Run) -> dict[str, Any]:
        """What POST /lens answers; one request at a time, as there is one cache.

        Args:
          request: checked.
          run: has a function called where the device may be used, and awaits its result.
        """
        async with self._lock:
            while (found := await run(functools.partial(self.step, request))) is None:
                pass
        answer: dict[str, Any] = found
        return answer

    def step(self, request: LensRequest) -> dict[str, Any] | None:
        """Does one launch's work for a request: reads a chunk of its text (None), or looks.

        Calls for one request must not be mixed with those for another.
        """
        if self._cache is None:  # The first time, or a launch has failed.
            self._cache = empty_cache(self._model.sharder, self._model.config, self._shape)
        keys = (self._keys(request.seed, request.sample), np.int32(request.prompt_tokens))
        for _ in range(SINGLES):
            known = self._num_known(request)
            if known == request.position:
                break
            if self._pass(request, known, keys) > 1:
                return None
        if self._num_known(request) < request.position:
            return None
        following = request.ids[request.position + 1 : request.position + 2]
        token, position = np.int32(request.ids[request.position]), np.int32(request.position)
        target, depth = np.int32(following[0] if following else 0), np.int32(request.depth)
        found = self._look(self._params, self._cache, (token, position, target), keys, depth)
        return self._shown(request, jax.device_get(dict(vars(found))))

    def _pass(self, request: LensRequest, known: int, keys: Any) -> int:
        """Reads what comes after the first `known` tokens; returns how many columns the pass had.

        Mostly it does not matter how a text is cut into passes. Where it does, it is cut as
        generation.prefill cuts prompts, and behind the prompt come single tokens, as they did when
        the text was made.
        """
        criterion, columns = request.rule.exit_criterion, self._chunk
        judges = EXIT_CRITERIA[criterion].needs_logits
        start, end = known, request.position
        if judges or request.depth > self._shape.num_slots:
            alone = max(request.prompt_tokens - 1, 0)
            if known < alone:
                start, end = known - known % columns, min(end, alone)
                criterion = "fixed" if judges else criterion
            else:
                columns = 1
        part = request.ids[start : min(start + columns, end)]
        tokens = np.zeros((1, columns), np.int32)
        tokens[0, : len(part)] = part
        numbers = self._rule_numbers(request, criterion)
        # Whatever happens, the donated cache is not read again.
        cache, self._cache, self._known = self._cache, None, ((), ())
        chunk = (tokens, np.int32(start), np.int32(len(part)))
        self._cache = self._read(self._params, cache, chunk, keys, numbers)
        self._known = (request.kept_for, request.ids[: start + len(part)])
        return columns

    def _num_known(self, request: LensRequest) -> int:
        """Tokens before the one that is looked at whose rows are in the cache already."""
        kept_for, ids = self._known
        if kept_for != request.kept_for:
            return 0
        before = request.ids[: request.position]
        pairs = zip(ids, before, strict=False)
        same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        return min(len(ids), len(before)) if same is None else same

    def _ids(self, given: Any) -> tuple[int, ...]:
        if not isinstance(given, list) or not given:
            what = "is empty" if given == [] else f"is {kind_of(given)}"
            raise ConfigError("ids", f"{what}; give a list of at least one token id.")
        if len(given) > self._served.capacity:
            raise ConfigError(
                "ids", f"has {len(given)} tokens; at most {self._served.capacity} are looked at."
            )
        for token in given:
            if not is_whole(token):
                raise ConfigError("ids", f"has {kind_of(token)}; give token ids.")
            check_token(token, "ids", self._served)
        return tuple(given)

    def _keys(self, seed: int, sample: int) -> tuple[jax.Array, jax.Array] | None:
        """Of first states in the prompt, and behind it; None if they are not drawn."""
        if self._model.config.recurrence.state_init in ("zero", "none"):
            return None
        prompt = prompt_keys(seed, [0])
        return prompt, _sample_key(prompt, np.uint32(sample))

    def _rule_numbers(self, request: LensRequest, criterion: str) -> tuple[Any, ...]:
        code, rule = self._names.index(criterion), request.rule
        integers = map(np.int32, (request.depth, rule.min_depth, code))
        return (*integers, np.float32(request.threshold))

    def _shown(self, request: LensRequest, found: Mapping[str, Any]) -> dict[str, Any]:
        depth, rule = request.depth, request.rule
        following = request.ids[request.position + 1 : request.position + 2]
        values = {name: _plain(array[:depth]) for name, array in found["values"].items()}
        answer: dict[str, Any] = {
            "object": "lens",
            "position": request.position,
            "token": self._token(request.ids[request.position]),
            "depth": depth,
            "exit_depth": _exit_depth(rule, request.threshold, depth, found["values"]),
            "entropies": _plain(found["entropies"][:depth]),
            "values": values,
            "criteria": {
                name: {
                    "default_threshold": EXIT_CRITERIA[name].default_threshold,
                    "settles": "at_least" if name in _AT_LEAST else "below",
                }
                for name in values
            },
            "top": [
                [
                    {**self._token(token), "log_prob": log_prob}
                    for token, log_prob in zip(ids, _plain(log_probs), strict=True)
                ]
                for ids, log_probs in zip(
                    found["top_ids"][:depth].tolist(), found["top_log_probs"][:depth], strict=True
                )
            ],
            "next": None,
        }
        if following:
            log_probs = _plain(found["next_log_probs"][:depth])
            answer["next"] = {**self._token(following[0]), "log_probs": log_probs}
        return answer

    def _token(self, token: int) -> dict[str, Any]:
        piece = b""
        if token < self._served.vocab_size:  # A model may have more rows than its tokenizer.
            piece = self._served.token_bytes(token)
        text = piece.decode("utf-8", "replace")
        return {"id": token, "text": text or f"<{token}>"}


def _exit_depth(rule: DepthConfig, threshold: float, depth: int, values: Mapping[str, Any]) -> int:
    """Iterations after which the rule ends the token."""
    if rule.exit_criterion == "fixed":
        return depth
    reached, limit = values[rule.exit_criterion][:depth], np.float32(threshold)
    settled = reached >= limit if rule.exit_criterion in _AT_LEAST else reached < limit
    settled[: rule.min_depth - 1] = False
    return int(np.argmax(settled)) + 1 if settled.any() else depth


def _plain(numbers: Any) -> list[float | None]:
    """For JSON, which has neither infinities nor what is not a number."""
    return [float(value) if math.isfinite(value) else None for value in numbers.tolist()]


@jax.jit
def _sample_key(prompt: jax.Array, sample: jax.Array) -> jax.Array:
    """The entry `sample` of `sample_keys`, whose number of samples is static."""
    return jax.vmap(jax.random.fold_in, (0, None))(prompt, sample)


def _first_states(model: MegaTransformer, keys: Any, places: jax.Array) -> jax.Array | None:
    """First states of tokens [1, T], which are drawn by other keys behind the prompt."""
    drawn_by, num_prompt = keys
    if drawn_by is None:
        return None
    config = model.config
    like = jnp.zeros((*places.shape, config.core_width), model.policy.compute)
    prompt, behind = (token_states(config, key, places, like) for key in drawn_by)
    return jnp.where((places < num_prompt)[..., None], prompt, behind)


def _cut(cache: KVCache, tokens: jax.Array) -> Any:
    """The cache as it was before its later tokens came."""
    return cache.replace(  # type: ignore[attr-defined]
        positions=jnp.where(cache.positions < tokens, cache.positions, -1),
        next_position=jnp.broadcast_to(tokens, cache.next_position.shape),
    )


def _read(
    model: MegaTransformer,
    names: tuple[str, ...],
    params: Any,
    cache: KVCache,
    chunk: tuple[jax.Array, jax.Array, jax.Array],
    keys: Any,
    rule_numbers: tuple[Any, ...],
) -> KVCache:
    """The cache of the first `start` tokens, a multiple of a chunk, with `count` more."""
    tokens, start, count = chunk
    depth, min_depth, code, threshold = rule_numbers
    rule = DepthRule(depth, threshold, min_depth, one_of(names, code))
    columns = jnp.arange(tokens.shape[1])[None]
    state = _first_states(model, keys, start + columns)
    new = NewTokens(tokens, columns < count, state=state)
    # Rows hold the tokens in their order without gaps, as only the last chunk is padded.
    cache = _cut(cache, start).replace(length=start)
    return cached_forward(model, params, new, cache, rule, last_logits_only=True).cache


def _look(
    model: MegaTransformer,
    sizes: tuple[int, int],
    params: Any,
    cache: KVCache,
    place: tuple[jax.Array, jax.Array, jax.Array],
    keys: Any,
    depth: jax.Array,
) -> TokenTrace:
    (num_iterations, top_k), (token, position, next_token) = sizes, place
    state = _first_states(model, keys, position[None, None])
    new = NewTokens(token[None, None], jnp.ones((1, 1), bool), state=state)
    return trace_token(
        model,
        params,
        new,
        _cut(cache, position),
        depth,
        next_token,
        num_iterations=num_iterations,
        top_k=top_k,
    )
