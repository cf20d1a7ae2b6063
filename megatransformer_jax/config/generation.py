"""Generation: strategies and all other options of a continuation.

On the command line, and as keywords in Python, every option has a short name, see `flag_name`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatransformer_jax.config.calibration import Calibration, calibrated_threshold
from megatransformer_jax.config.option import (
    MAX_COUNT,
    MAX_SEED,
    ConfigError,
    Option,
    check_options,
    option,
    options_of,
    require_defaults,
    rule,
    section,
    sections_of,
    unknown_key,
)
from megatransformer_jax.config.sampling import (
    AUTO,
    CacheConfig,
    DepthConfig,
    SamplingConfig,
    check_texts,
)

# ------------------------------------------------------------------------------
# Images and sound between the words.


@dataclasses.dataclass(frozen=True)
class MediaGenerationConfig:
    """Images and sound that a model makes. For models with parts for them."""

    max_media: int | None = option(
        None,
        "Largest number of images and clips made per text; each opening token asks for one. With 0 "
        "the answer is text alone. Default (None): 1, and 0 with strategy='beam'.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    guidance_scale: float | None = option(
        None,
        "Guidance of the decoders: 1 follows the text, above 1 exaggerates it. Default (None): as "
        "the model's config says.",
        minimum=0,
    )
    sampler_steps: int | None = option(
        None,
        "Steps of the decoders' samplers. Default (None): as the model's config says.",
        minimum=1,
        maximum=MAX_COUNT,
    )

    def __post_init__(self) -> None:
        check_options(self)


# ------------------------------------------------------------------------------
# The options of a continuation.

STRATEGIES = ("greedy", "sample", "beam", "speculative", "parallel")

# What changes the distribution that a token is drawn from.
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# What depends on the tokens so far.
_DEPENDS_ON_HISTORY = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram",
    "banned_words",
    "forced_words",
)


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Beam search, strategy='beam'."""

    num_beams: int = option(4, "Number of texts kept at every token.", minimum=1, maximum=MAX_COUNT)
    length_penalty: float = option(
        1.0,
        "A finished text scores its log-probability divided by its length to this power: 0 "
        "favours short texts, more favours long ones.",
    )
    early_stopping: bool = option(
        False,
        "Stops once num_beams texts are finished. False: stops when no unfinished text can become "
        "better.",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """Self-speculative decoding, strategy='speculative': drafts at few iterations are verified at
    full depth in one pass. The result is distributed as without it (arXiv 2211.17192)."""

    draft_depth: int = option(
        2, "Iterations for a drafted token; fewer than depth.", minimum=1, maximum=MAX_COUNT
    )
    draft_length: int = option(
        4, "Tokens drafted before a verification.", minimum=1, maximum=MAX_COUNT
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Diffusion-style sampling, strategy='parallel': many positions are refined at once
    (arXiv 2510.14961)."""

    iterations_per_round: int = option(
        2,
        "Iterations after which the unsettled tokens are drawn again.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_wavefront: int = option(
        8, "Largest number of positions that are refined at once.", minimum=1, maximum=MAX_COUNT
    )
    settle_threshold: float = option(
        0.03,
        "A position is settled, and its token final, once a round changes its state by less than "
        "this fraction.",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How prompts are continued. The defaults draw from the model's own distribution."""

    strategy: str = option(
        "sample",
        "greedy: the likeliest token. sample: a draw. beam: beam search for the likeliest text. "
        "speculative: as sample, faster by drafting at fewer iterations. parallel: several "
        "positions at once, approximate.",
        choices=STRATEGIES,
    )
    max_new_tokens: int = option(
        128, "Largest number of new tokens per text.", minimum=1, maximum=MAX_COUNT
    )
    num_samples: int = option(1, "Number of texts per prompt.", minimum=1, maximum=MAX_COUNT)
    batch_size: int | None = option(
        None,
        "Number of texts (with beam search, beams) to decode at once, which limits memory; the "
        "others follow. Default (None): all.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    seed: int = option(
        0, "Seed of the draws and of the core's first states.", minimum=0, maximum=MAX_SEED
    )
    stop: tuple[str, ...] = option(
        (), "Stop texts: generation ends when one occurs; the result does not include it."
    )
    depth: DepthConfig = section(DepthConfig, "Iterations of the core.")
    cache: CacheConfig = section(CacheConfig, "Key/value cache.")
    sampling: SamplingConfig = section(SamplingConfig, "Scores of the next token.")
    beam: BeamConfig = section(BeamConfig, "Beam search.")
    speculative: SpeculativeConfig = section(SpeculativeConfig, "Speculative decoding.")
    parallel: ParallelConfig = section(ParallelConfig, "Parallel sampling.")
    media: MediaGenerationConfig = section(MediaGenerationConfig, "Images and sound.")

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def of(cls, **options: Any) -> "GenerationConfig":
        """From options by the short names that the command line has, see `flag_name`.

        Raises:
          ConfigError: if a name is not known, a value is out of range, or values exclude each
            other.

        Examples:
          >>> config = GenerationConfig.of(depth=16, exit_criterion="kl", top_p=0.9)
          >>> config.depth.depth, config.sampling.top_p
          (16, 0.9)
        """
        top: dict[str, Any] = {}
        sections: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            if name not in GENERATION_OPTIONS:
                raise unknown_key(name, GENERATION_OPTIONS)
            section_name, _, field = GENERATION_OPTIONS[name].path.rpartition(".")
            (sections.setdefault(section_name, {}) if section_name else top)[field] = value
        classes = {path: owner for path, owner, _ in sections_of(cls)}
        for section_name, values in sections.items():
            with _errors_below(section_name):
                top[section_name] = classes[section_name](**values)
        return cls(**top)

    def with_options(self, **options: Any) -> "GenerationConfig":
        """The same generation with some options changed, by their short names.

        Raises:
          ConfigError: as `of`, for the options together.

        Examples:
          >>> GenerationConfig.of(depth=16).with_options(exit_criterion="kl").depth.depth
          16
        """
        values = {
            name: functools.reduce(getattr, declared.path.split("."), self)
            for name, declared in GENERATION_OPTIONS.items()
        }
        return GenerationConfig.of(**(values | options))

    @property
    def is_deterministic(self) -> bool:
        """Whether no token is drawn at random."""
        return self.strategy in ("greedy", "beam") or self.sampling.temperature == 0

    @rule("beam", "speculative", "parallel")
    def _sections_belong_to_strategies(self) -> None:
        """Keep the default unless `strategy` names the section."""
        for name in ("beam", "speculative", "parallel"):
            if self.strategy != name:
                self._require_defaults(
                    name,
                    [field.name for field in dataclasses.fields(getattr(self, name))],
                    f"set strategy={name!r}",
                )

    @rule(*(f"sampling.{name}" for name in _DRAWING))
    def _draws_need_a_strategy_that_draws(self) -> None:
        """Keep the default with strategy 'greedy' or 'beam'."""
        if self.strategy in ("greedy", "beam"):
            self._require_defaults("sampling", _DRAWING, "set strategy='sample'")

    @rule("sampling.temperature")
    def _sampling_draws(self) -> None:
        """Above 0 with strategy='sample'."""
        if self.strategy == "sample" and self.sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature",
                "0 draws nothing; for the likeliest token set strategy='greedy' and leave "
                "temperature at 1.0.",
            )

    @rule(*(f"sampling.{name}" for name in _DEPENDS_ON_HISTORY))
    def _parallel_knows_no_history(self) -> None:
        """Keep the default with strategy='parallel', because earlier tokens are not final yet."""
        if self.strategy == "parallel":
            self._require_defaults("sampling", _DEPENDS_ON_HISTORY, "set strategy='sample'")

    @rule("depth.exit_criterion", "depth.gate_readout", "depth.warm_start")
    def _fixed_depth_for_many_tokens_at_once(self) -> None:
        """Keep the default with strategy 'speculative' or 'parallel'."""
        if self.strategy in ("speculative", "parallel"):
            self._require_defaults(
                "depth",
                ("exit_criterion", "gate_readout", "warm_start"),
                "set strategy='sample'",
            )

    @rule("num_samples")
    def _samples_differ(self) -> None:
        """At most num_beams with strategy='beam'; 1 if no token is drawn."""
        if self.strategy == "beam":
            if self.num_samples > self.beam.num_beams:
                raise ConfigError(
                    "num_samples",
                    f"{self.num_samples} exceeds num_beams={self.beam.num_beams}; "
                    "lower it or raise num_beams.",
                )
        elif self.is_deterministic and self.num_samples > 1:
            raise ConfigError(
                "num_samples",
                f"{self.num_samples} texts would be the same, as no token is drawn; set "
                "strategy='sample' and a temperature above 0, or leave it at 1.",
            )

    @property
    def texts_per_prompt(self) -> int:
        """Texts of one prompt that are decoded side by side."""
        return self.beam.num_beams if self.strategy == "beam" else self.num_samples

    @rule("batch_size")
    def _texts_of_a_prompt_are_decoded_together(self) -> None:
        """At least num_samples, or num_beams with strategy='beam'."""
        if self.batch_size is not None and self.batch_size < self.texts_per_prompt:
            name = "num_beams" if self.strategy == "beam" else "num_samples"
            raise ConfigError(
                "batch_size",
                f"{self.batch_size} is less than {name}={self.texts_per_prompt}, which are decoded "
                f"together; raise it or lower {name}.",
            )

    @rule("stop")
    def _stops_have_text(self) -> None:
        """No empty text, only UTF-8."""
        check_texts("stop", self.stop)

    @rule("cache.slots")
    def _slots_fit_the_depth(self) -> None:
        """At most depth."""
        depth, slots = self.depth.depth, self.cache.slots
        if depth is not None and slots is not None and slots > depth:
            raise ConfigError(
                "cache.slots",
                f"{slots} exceeds depth={depth}, so {slots - depth} would stay empty; lower it, "
                "or leave it None for one slot per iteration.",
            )

    @rule("cache.slots")
    def _verification_needs_all_slots(self) -> None:
        """Keep the default with strategy='speculative': it passes several tokens at once, and
        iterations that share slots would read other iterations than they do one token at a time."""
        if self.strategy == "speculative":
            self._require_defaults("cache", ("slots",), "leave it None")

    @rule("cache.exited_reads")
    def _exited_reads_need_exits(self) -> None:
        """Keep the default with exit_criterion='fixed'."""
        if self.depth.exit_criterion == "fixed":
            self._require_defaults(
                "cache", ("exited_reads",), "choose an exit_criterion", "as no token exits early"
            )

    @rule("cache.capacity")
    def _new_tokens_fit_the_cache(self) -> None:
        """Above max_new_tokens, as the prompt needs room too."""
        capacity = self.cache.capacity
        if capacity is not None and capacity <= self.max_new_tokens:
            raise ConfigError(
                "cache.capacity",
                f"{capacity} leaves no room for a prompt in addition to max_new_tokens="
                f"{self.max_new_tokens}; raise it or lower max_new_tokens.",
            )

    @rule("speculative.draft_depth")
    def _drafts_are_shallower(self) -> None:
        """Below depth."""
        depth, draft_depth = self.depth.depth, self.speculative.draft_depth
        if self.strategy == "speculative" and depth is not None and draft_depth >= depth:
            raise ConfigError(
                "speculative.draft_depth",
                f"{draft_depth} is not below depth={depth}, so drafts would save nothing; "
                "lower it or raise depth.",
            )

    @rule("parallel.iterations_per_round")
    def _rounds_fit_the_depth(self) -> None:
        """At most depth."""
        depth, iterations = self.depth.depth, self.parallel.iterations_per_round
        if self.strategy == "parallel" and depth is not None and iterations > depth:
            raise ConfigError(
                "parallel.iterations_per_round",
                f"{iterations} exceeds depth={depth}; lower it or raise depth.",
            )

    @property
    def most_media(self) -> int:
        """Images and clips per text, at most."""
        if self.media.max_media is None:
            return 0 if self.strategy == "beam" else 1
        return self.media.max_media

    @rule("media.max_media")
    def _beams_write_text(self) -> None:
        """0 or None with strategy='beam', whose texts are known only at the end."""
        if self.strategy == "beam" and self.most_media:
            raise ConfigError(
                "media.max_media",
                f"{self.most_media} with strategy='beam', which knows its texts only at the end "
                "and so cannot wait for media; set it to 0, or choose another strategy.",
            )

    @rule("media.guidance_scale", "media.sampler_steps")
    def _samplers_need_media_to_make(self) -> None:
        """Keep the default if no media are made."""
        if not self.most_media:
            self._require_defaults(
                "media",
                ("guidance_scale", "sampler_steps"),
                "set max_media=1, and a strategy other than 'beam'",
                "as no media are made",
            )

    def _require_defaults(
        self, section_name: str, names: Sequence[str], fix: str, because: str | None = None
    ) -> None:
        because = because or f"with strategy={self.strategy!r}"
        with _errors_below(section_name):
            require_defaults(getattr(self, section_name), names, because, fix)


def for_model(
    config: GenerationConfig,
    trained_depth: int | None,
    *,
    has_exit_gate: bool,
    makes_media: bool = False,
    calibration: Calibration | None = None,
) -> GenerationConfig:
    """The same generation for a certain model: `depth.depth` is a number unless it has no core, and
    `depth.exit_threshold` is not 'auto'.

    Args:
      config: as the user gave it.
      trained_depth: mean number of iterations in training. None: a plain model without a core.
      has_exit_gate: whether the model was given a gate that learns when to stop.
      makes_media: whether the model has parts for images or sound.
      calibration: thresholds that were found for the model. None: nobody has looked for them.

    Raises:
      ConfigError: if an option does not fit the depth, or needs a core or a gate and there is none.
    """
    with _errors_below("depth"):
        config.depth.check_gate(has_exit_gate)
    if not makes_media:
        with _errors_below("media"):
            own = [field.name for field in dataclasses.fields(MediaGenerationConfig)]
            require_defaults(config.media, own, "for text alone", "use a model that makes media")
    if trained_depth is not None:
        with _errors_below("depth"):
            depth = depth_for_model(config.depth, trained_depth, calibration)
        return config if depth == config.depth else dataclasses.replace(config, depth=depth)
    if config.strategy in ("speculative", "parallel"):
        raise ConfigError(
            "strategy",
            f"{config.strategy!r} iterates a core, and this model has none; choose another.",
        )
    core_options: dict[str, Sequence[str]] = {
        "depth": [field.name for field in dataclasses.fields(DepthConfig)],
        "cache": ("slots", "sharing", "exited_reads"),
    }
    for section_name, names in core_options.items():
        with _errors_below(section_name):
            require_defaults(
                getattr(config, section_name),
                names,
                "by this model, which has no recurrent core",
                "use a recurrent model",
            )
    return config


def depth_for_model(
    rule: DepthConfig, trained_depth: int, calibration: Calibration | None
) -> DepthConfig:
    """The same rule with a depth, and with a number in place of an 'auto' threshold.

    Raises:
      ConfigError: if it does not fit the depth, or there is no such number.
    """
    depth = trained_depth if rule.depth is None else rule.depth
    changed: dict[str, Any] = {"depth": depth}
    if rule.exit_threshold == AUTO:
        found = calibrated_threshold(calibration, rule.exit_criterion, depth)
        changed["exit_threshold"] = found
    return dataclasses.replace(rule, **changed)


def flag_name(path: str) -> str:
    """The option's name on the command line: its own, with `cache_` before those of the cache."""
    section_name, _, name = path.rpartition(".")
    return f"cache_{name}" if section_name == "cache" else name


# All options by their short names.
GENERATION_OPTIONS: Mapping[str, Option] = {
    flag_name(declared.path): declared for declared in options_of(GenerationConfig)
}


@contextlib.contextmanager
def _errors_below(section_name: str) -> Iterator[None]:
    """Errors about a section's option name the section too."""
    try:
        yield
    except ConfigError as error:
        raise error.below(section_name) from None
