"""Options of generation: defaults, bounds, and every rule that ties options together."""

import dataclasses
import traceback
from typing import Any

import pytest

from megatransformer_jax.config.generation import (
    BeamConfig,
    GenerationConfig,
    MediaGenerationConfig,
    ParallelConfig,
    SpeculativeConfig,
    flag_name,
    for_model,
)
from megatransformer_jax.config.option import (
    ConfigError,
    options_of,
    rules_of,
    section_rules,
    sections_of,
)
from megatransformer_jax.config.sampling import (
    EXIT_CRITERIA,
    CacheConfig,
    DepthConfig,
    SamplingConfig,
)
from megatransformer_jax.models import exit_criteria
from megatransformer_jax.nn import kv_cache

COLD = SamplingConfig(temperature=0.0)

# The rule, the class, what is given, the path in the error.
BROKEN: list[tuple[str, type, dict[str, Any], str]] = [
    ("_exit_options_need_a_criterion", DepthConfig, {"exit_threshold": 0.1}, "exit_threshold"),
    ("_exit_options_need_a_criterion", DepthConfig, {"min_depth": 2}, "min_depth"),
    (
        "_least_depth_is_not_above_depth",
        DepthConfig,
        {"exit_criterion": "kl", "depth": 3, "min_depth": 4},
        "min_depth",
    ),
    (
        "_survival_is_a_probability",
        DepthConfig,
        {"exit_criterion": "learned_gate", "exit_threshold": 1.0},
        "exit_threshold",
    ),
    (
        "_readouts_make_all_iterations",
        DepthConfig,
        {"exit_criterion": "kl", "gate_readout": "weighted"},
        "gate_readout",
    ),
    ("_readouts_make_all_iterations", DepthConfig, {"gate_threshold": 0.1}, "gate_threshold"),
    ("_sharing_needs_slots", CacheConfig, {"sharing": "last"}, "sharing"),
    ("_anchor_needs_two_slots", CacheConfig, {"sharing": "anchor", "slots": 1}, "sharing"),
    *(
        ("_cuts_need_draws", SamplingConfig, {"temperature": 0, name: value}, name)
        for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.9))
    ),
    ("_words_have_text", SamplingConfig, {"banned_words": ("a", "")}, "banned_words"),
    ("_words_have_text", SamplingConfig, {"forced_words": ("",)}, "forced_words"),
    ("_words_have_text", SamplingConfig, {"banned_words": ("a\udcff",)}, "banned_words"),
    (
        "_no_word_is_banned_and_forced",
        SamplingConfig,
        {"banned_words": ("at",), "forced_words": ("cat",)},
        "forced_words",
    ),
    (
        "_sections_belong_to_strategies",
        GenerationConfig,
        {"beam": BeamConfig(num_beams=2)},
        "beam.num_beams",
    ),
    (
        "_sections_belong_to_strategies",
        GenerationConfig,
        {"strategy": "parallel", "speculative": SpeculativeConfig(draft_length=2)},
        "speculative.draft_length",
    ),
    (
        "_sections_belong_to_strategies",
        GenerationConfig,
        {"strategy": "greedy", "parallel": ParallelConfig(max_wavefront=2)},
        "parallel.max_wavefront",
    ),
    *(
        (
            "_draws_need_a_strategy_that_draws",
            GenerationConfig,
            {"strategy": strategy, "sampling": SamplingConfig(**{name: value})},
            f"sampling.{name}",
        )
        for strategy in ("greedy", "beam")
        for name, value in (("temperature", 0.7), ("top_k", 5), ("min_p", 0.1))
    ),
    ("_sampling_draws", GenerationConfig, {"sampling": COLD}, "sampling.temperature"),
    *(
        (
            "_parallel_knows_no_history",
            GenerationConfig,
            {"strategy": "parallel", "sampling": SamplingConfig(**{name: value})},
            f"sampling.{name}",
        )
        for name, value in (("repetition_penalty", 1.1), ("forced_words", ("a",)))
    ),
    *(
        (
            "_fixed_depth_for_many_tokens_at_once",
            GenerationConfig,
            {"strategy": strategy, "depth": depth},
            path,
        )
        for strategy in ("speculative", "parallel")
        for depth, path in (
            (DepthConfig(exit_criterion="kl"), "depth.exit_criterion"),
            (DepthConfig(gate_readout="weighted"), "depth.gate_readout"),
            (DepthConfig(warm_start=True), "depth.warm_start"),
        )
    ),
    ("_samples_differ", GenerationConfig, {"strategy": "greedy", "num_samples": 2}, "num_samples"),
    ("_samples_differ", GenerationConfig, {"strategy": "beam", "num_samples": 5}, "num_samples"),
    (
        "_samples_differ",
        GenerationConfig,
        {"strategy": "speculative", "sampling": COLD, "num_samples": 2},
        "num_samples",
    ),
    (
        "_texts_of_a_prompt_are_decoded_together",
        GenerationConfig,
        {"num_samples": 3, "batch_size": 2},
        "batch_size",
    ),
    (
        "_texts_of_a_prompt_are_decoded_together",
        GenerationConfig,
        {"strategy": "beam", "batch_size": 3},
        "batch_size",
    ),
    ("_stops_have_text", GenerationConfig, {"stop": ("",)}, "stop"),
    (
        "_slots_fit_the_depth",
        GenerationConfig,
        {"depth": DepthConfig(depth=4), "cache": CacheConfig(slots=5)},
        "cache.slots",
    ),
    (
        "_verification_needs_all_slots",
        GenerationConfig,
        {"strategy": "speculative", "cache": CacheConfig(slots=2)},
        "cache.slots",
    ),
    (
        "_exited_reads_need_exits",
        GenerationConfig,
        {"cache": CacheConfig(exited_reads="skip")},
        "cache.exited_reads",
    ),
    (
        "_new_tokens_fit_the_cache",
        GenerationConfig,
        {"max_new_tokens": 64, "cache": CacheConfig(capacity=64)},
        "cache.capacity",
    ),
    (
        "_drafts_are_shallower",
        GenerationConfig,
        {"strategy": "speculative", "depth": DepthConfig(depth=2)},
        "speculative.draft_depth",
    ),
    (
        "_rounds_fit_the_depth",
        GenerationConfig,
        {"strategy": "parallel", "depth": DepthConfig(depth=1)},
        "parallel.iterations_per_round",
    ),
    (
        "_beams_write_text",
        GenerationConfig,
        {"strategy": "beam", "media": MediaGenerationConfig(max_media=1)},
        "media.max_media",
    ),
    (
        "_samplers_need_media_to_make",
        GenerationConfig,
        {"media": MediaGenerationConfig(max_media=0, guidance_scale=2.0)},
        "media.guidance_scale",
    ),
]


@pytest.mark.parametrize(
    ("name", "config_class", "values", "path"),
    BROKEN,
    ids=[f"{index}-{name}" for index, (name, *_) in enumerate(BROKEN)],
)
def test_a_broken_rule_names_the_option(
    name: str, config_class: type, values: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_class(**values)
    assert caught.value.path == path
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert name in frames


def test_every_rule_has_a_case_and_says_what_it_wants() -> None:
    owners = [("", GenerationConfig)]
    owners += [(f"{path}.", owner) for path, owner, _ in sections_of(GenerationConfig)]
    known = {option.path for option in options_of(GenerationConfig)}
    known |= set(section_rules(GenerationConfig))
    declared = set()
    for prefix, owner in owners:
        for check in rules_of(owner):
            declared.add(check.__name__)
            assert check.__doc__
            assert {prefix + path for path in check.rule_paths} <= known  # type: ignore[attr-defined]
    assert declared == {name for name, *_ in BROKEN}


@pytest.mark.parametrize(
    ("config_class", "values", "allowed"),
    [
        (SamplingConfig, {"top_p": 0.0}, "above 0 and at most 1"),
        (SamplingConfig, {"top_p": 1.1}, "above 0 and at most 1"),
        (SamplingConfig, {"min_p": 2.0}, "above 0 and at most 1"),
        (SamplingConfig, {"typical_p": 0.0}, "above 0 and at most 1"),
        (SamplingConfig, {"temperature": -0.1}, "at least 0"),
        (SamplingConfig, {"top_k": 0}, "at least 1"),
        (SamplingConfig, {"repetition_penalty": 0.0}, "above 0"),
        (DepthConfig, {"depth": 0}, "at least 1"),
        (DepthConfig, {"exit_criterion": "entropi"}, "one of 'fixed', 'latent_diff', 'cosine'"),
        (GenerationConfig, {"strategy": "nucleus"}, "one of 'greedy', 'sample', 'beam'"),
        (GenerationConfig, {"max_new_tokens": 0}, "at least 1"),
        (GenerationConfig, {"max_new_tokens": 2**31}, r"at least 1 and at most 2\^31 - 1"),
        (DepthConfig, {"depth": 2**31}, r"at least 1 and at most 2\^31 - 1"),
    ],
)
def test_a_value_out_of_range_names_what_is_allowed(
    config_class: type, values: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(ConfigError, match=allowed):
        config_class(**values)


@pytest.mark.parametrize(
    ("values", "one_further", "path"),
    [
        ({"strategy": "beam", "num_samples": 4}, {"num_samples": 5}, "num_samples"),
        (
            {"strategy": "beam", "beam": BeamConfig(early_stopping=True)},
            {"strategy": "sample"},
            "beam.early_stopping",
        ),
        (
            {"strategy": "greedy", "sampling": SamplingConfig(repetition_penalty=1.2)},
            {"strategy": "parallel"},
            "sampling.repetition_penalty",
        ),
        (
            {"strategy": "speculative", "sampling": COLD, "depth": DepthConfig(depth=3)},
            {"depth": DepthConfig(depth=2)},
            "speculative.draft_depth",
        ),
        (
            {
                "depth": DepthConfig(exit_criterion="kl", depth=4, min_depth=4),
                "cache": CacheConfig(slots=4, sharing="anchor", exited_reads="skip"),
            },
            {"depth": DepthConfig(depth=3, exit_criterion="kl")},
            "cache.slots",
        ),
        (
            {"max_new_tokens": 63, "cache": CacheConfig(capacity=64)},
            {"max_new_tokens": 64},
            "cache.capacity",
        ),
        (
            {"cache": CacheConfig(slots=1, sharing="last"), "depth": DepthConfig(warm_start=True)},
            {"strategy": "parallel"},
            "depth.warm_start",
        ),
    ],
)
def test_what_goes_together_is_accepted_and_a_step_further_is_not(
    values: dict[str, Any], one_further: dict[str, Any], path: str
) -> None:
    config = GenerationConfig(**values)
    assert {name: getattr(config, name) for name in values} == values
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, **one_further)
    assert caught.value.path == path


def test_the_defaults_draw_from_the_models_own_distribution() -> None:
    config = GenerationConfig()
    assert (config.strategy, config.sampling.temperature) == ("sample", 1.0)
    neutral = {None, 1.0, 0.0, ()}
    assert set(dataclasses.asdict(config.sampling).values()) <= neutral
    assert not config.is_deterministic
    assert GenerationConfig(strategy="parallel", sampling=COLD).is_deterministic


def test_the_exit_criteria_are_those_of_the_models() -> None:
    assert tuple(exit_criteria.EXIT_CRITERIA) == EXIT_CRITERIA


def test_the_cache_has_the_ways_of_sharing_and_reading() -> None:
    options = {option.path: option for option in options_of(CacheConfig)}
    assert options["sharing"].check.choices == kv_cache.SHARINGS
    assert options["exited_reads"].check.choices == kv_cache.EXITED_READS


def test_short_names_are_unique() -> None:
    names = [flag_name(option.path) for option in options_of(GenerationConfig)]
    assert len(set(names)) == len(names)
    assert {"depth", "top_p", "exit_criterion", "cache_slots", "num_beams", "stop"} <= set(names)


def test_the_depth_of_a_model_is_filled_in_and_checked() -> None:
    assert for_model(GenerationConfig(), 8, has_exit_gate=False).depth.depth == 8
    own = GenerationConfig(depth=DepthConfig(depth=3))
    assert for_model(own, 8, has_exit_gate=False) == own
    with pytest.raises(ConfigError, match=r"cache\.slots: 9 exceeds depth=8"):
        for_model(GenerationConfig(cache=CacheConfig(slots=9)), 8, has_exit_gate=False)
    with pytest.raises(ConfigError, match=r"depth\.min_depth: 9 exceeds depth=8"):
        own = GenerationConfig(depth=DepthConfig(exit_criterion="kl", min_depth=9))
        for_model(own, 8, has_exit_gate=False)
    gated = GenerationConfig(depth=DepthConfig(exit_criterion="learned_gate"))
    with pytest.raises(ConfigError, match=r"depth\.exit_criterion: 'learned_gate' needs a model"):
        for_model(gated, 8, has_exit_gate=False)
    assert for_model(gated, 8, has_exit_gate=True).depth.depth == 8


def test_media_and_text_alone_have_their_own_options() -> None:
    more = GenerationConfig(media=MediaGenerationConfig(max_media=2))
    assert for_model(more, 8, has_exit_gate=False, makes_media=True).media.max_media == 2
    with pytest.raises(ConfigError, match=r"media\.max_media: 2 would be ignored for text alone"):
        for_model(more, 8, has_exit_gate=False)
    assert GenerationConfig().most_media == 1
    # Beams are known at the end, so they cannot wait for media.
    assert GenerationConfig(strategy="beam").most_media == 0
    with pytest.raises(ConfigError, match=r"media\.max_media: 2 with strategy='beam'"):
        GenerationConfig(strategy="beam", media=MediaGenerationConfig(max_media=2))
    with pytest.raises(ConfigError, match=r"media\.sampler_steps: 4 would be ignored as no media"):
        GenerationConfig(media=MediaGenerationConfig(max_media=0, sampler_steps=4))


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"depth": DepthConfig(depth=2)}, "depth.depth"),
        ({"depth": DepthConfig(exit_criterion="kl")}, "depth.exit_criterion"),
        ({"cache": CacheConfig(slots=2)}, "cache.slots"),
        ({"strategy": "speculative"}, "strategy"),
    ],
)
def test_a_model_without_a_core_takes_no_options_of_the_core(
    values: dict[str, Any], path: str
) -> None:
    assert for_model(GenerationConfig(), None, has_exit_gate=False) == GenerationConfig()
    with pytest.raises(ConfigError) as caught:
        for_model(GenerationConfig(**values), None, has_exit_gate=False)
    assert caught.value.path == path
