"""Every rule that ties options together: it fires, names the option, and nothing else fires."""

import dataclasses
import traceback
from typing import Any

import pytest
from broken_addresses import BROKEN_ADDRESSES
from broken_audio import BROKEN_AUDIO
from broken_diagnostics import BROKEN_DIAGNOSTICS
from broken_images import BROKEN_IMAGES
from broken_media_data import BROKEN_MEDIA_DATA
from broken_media_runs import BROKEN_MEDIA_RUNS
from broken_models import BROKEN_MODELS
from broken_puzzles import BROKEN_PUZZLES
from broken_stability import BROKEN_STABILITY
from broken_supervision import BROKEN_SUPERVISION
from broken_tokens import BROKEN_TOKENS
from broken_validation import BROKEN_VALIDATION
from broken_vocoder import BROKEN_VOCODER

from megatransformer_jax.config.build import build, merge
from megatransformer_jax.config.data import (
    AugmentationConfig,
    DataConfig,
    ReasoningConfig,
    TokenizerConfig,
)
from megatransformer_jax.config.fine_tuning import FineTuningConfig, LoraConfig
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig, SharingConfig
from megatransformer_jax.config.loop import (
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    SampleConfig,
    TrainConfig,
)
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.optimizer import (
    AdafactorConfig,
    GrokfastConfig,
    MuonConfig,
    OptimizerConfig,
    SgdConfig,
)
from megatransformer_jax.config.option import ConfigError, rules_of, sections_of
from megatransformer_jax.config.recurrence import (
    ExitGateConfig,
    ExitGateTrainingConfig,
    RecurrenceConfig,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import AllOptions

JOINED = {"enabled": True, "coordinator": "host:1234", "num_processes": 2, "process_id": 0}
RETROFIT = FineTuningConfig(init_from="runs/plain", retrofit=True)


# The rule, the class, what is given, the path in the error.
BROKEN: list[tuple[str, type, dict[str, Any], str]] = [
    *BROKEN_MODELS,
    *BROKEN_PUZZLES,
    *BROKEN_STABILITY,
    *BROKEN_TOKENS,
    *BROKEN_ADDRESSES,
    *BROKEN_DIAGNOSTICS,
    *BROKEN_VALIDATION,
    *BROKEN_AUDIO,
    *BROKEN_IMAGES,
    *BROKEN_MEDIA_DATA,
    *BROKEN_MEDIA_RUNS,
    *BROKEN_SUPERVISION,
    *BROKEN_VOCODER,
    (
        "_prior_mean_goes_with_geometric",
        ExitGateTrainingConfig,
        {"prior_mean": 4.0},
        "prior_mean",
    ),
    (
        "_prior_mean_goes_with_geometric",
        ExitGateTrainingConfig,
        {"prior": "geometric"},
        "prior_mean",
    ),
    (
        "_prior_needs_a_weight",
        ExitGateTrainingConfig,
        {"kl_weight": 0.0, "prior": "geometric", "prior_mean": 4.0},
        "prior",
    ),
    (
        "_gate_training_needs_a_gate",
        RunConfig,
        {"train": TrainConfig(exit_gate=ExitGateTrainingConfig(detach=True))},
        "train.exit_gate.detach",
    ),
    (
        "_a_detached_term_trains_something",
        RunConfig,
        {
            "model": ModelConfig(exit_gate=ExitGateConfig(enabled=True)),
            "train": TrainConfig(exit_gate=ExitGateTrainingConfig(detach=True)),
            "fine_tuning": FineTuningConfig(init_from="runs/gated", freeze=("gate",)),
        },
        "train.exit_gate.detach",
    ),
    (
        "_a_fresh_gate_is_trained",
        RunConfig,
        {
            "model": ModelConfig(exit_gate=ExitGateConfig(enabled=True)),
            "fine_tuning": FineTuningConfig(freeze=("gate",)),
        },
        "fine_tuning.freeze",
    ),
    (
        "_a_fresh_gate_is_trained",
        RunConfig,
        {
            "model": ModelConfig(exit_gate=ExitGateConfig(enabled=True)),
            "fine_tuning": dataclasses.replace(RETROFIT, train_only=("^core/",)),
        },
        "fine_tuning.train_only",
    ),
    ("_lora_needs_a_source", FineTuningConfig, {"lora": LoraConfig(rank=2)}, "init_from"),
    (
        "_muon_has_matrices",
        RunConfig,
        {
            "optimizer": OptimizerConfig(name="muon"),
            "fine_tuning": FineTuningConfig(init_from="runs/base", lora=LoraConfig(rank=2)),
        },
        "optimizer.name",
    ),
    (
        "_training_options_need_training",
        TokenizerConfig,
        {"kind": "bytes", "vocab_size": 512},
        "vocab_size",
    ),
    (
        "_training_options_need_training",
        TokenizerConfig,
        {"model_file": "a.model", "model_type": "unigram"},
        "model_type",
    ),
    (
        "_model_file_needs_sentencepiece",
        TokenizerConfig,
        {"kind": "bytes", "model_file": "a.model"},
        "model_file",
    ),
    (
        "_shortest_is_not_longer_than_longest",
        ReasoningConfig,
        {"min_length": 17, "max_length": 16},
        "min_length",
    ),
    (
        "_shortest_is_not_longer_than_longest",
        ReasoningConfig,
        {"eval_min_length": 33},
        "eval_min_length",
    ),
    (
        "_number_of_symbols_goes_with_task",
        ReasoningConfig,
        {"task": "parity", "num_symbols": 4},
        "num_symbols",
    ),
    ("_modulus_is_for_mano", ReasoningConfig, {"task": "hop", "modulus": 7}, "modulus"),
    ("_file_sources_need_files", DataConfig, {"source": "jsonl"}, "files"),
    ("_tfds_needs_a_name", DataConfig, {"source": "tfds"}, "tfds_name"),
    ("_files_need_a_file_source", DataConfig, {"files": ("a.txt",)}, "files"),
    ("_tfds_options_need_tfds", DataConfig, {"tfds_name": "lm1b"}, "tfds_name"),
    (
        "_tfds_options_need_tfds",
        DataConfig,
        {"source": "text", "files": ("a",), "tfds_split": "test"},
        "tfds_split",
    ),
    ("_text_field_needs_records_with_fields", DataConfig, {"text_field": "body"}, "text_field"),
    (
        "_reasoning_options_need_reasoning",
        DataConfig,
        {"reasoning": ReasoningConfig(task="hop")},
        "reasoning.task",
    ),
    ("_reasoning_brings_its_own", DataConfig, {"source": "reasoning", "packing": "pad"}, "packing"),
    (
        "_reasoning_brings_its_own",
        DataConfig,
        {"source": "reasoning", "tokenizer": TokenizerConfig(kind="bytes")},
        "tokenizer.kind",
    ),
    (
        "_fraction_needs_a_split_to_make",
        DataConfig,
        {
            "source": "text",
            "files": ("a",),
            "validation_files": ("b",),
            "validation_fraction": 0.5,
        },
        "validation_fraction",
    ),
    ("_bucket_lengths_need_buckets", DataConfig, {"bucket_lengths": (256,)}, "bucket_lengths"),
    (
        "_bucket_lengths_increase",
        DataConfig,
        {"packing": "bucket", "bucket_lengths": (64, 128)},
        "bucket_lengths",
    ),
    (
        "_bucket_lengths_increase",
        DataConfig,
        {"packing": "bucket", "bucket_lengths": (128, 64, 256)},
        "bucket_lengths",
    ),
    (
        "_final_fraction_needs_a_decay",
        OptimizerConfig,
        {"schedule": "constant", "final_fraction": 0.5},
        "final_fraction",
    ),
    ("_nesterov_needs_momentum", SgdConfig, {"momentum": 0.0, "nesterov": True}, "nesterov"),
    ("_options_go_with_their_filter", GrokfastConfig, {"lamb": 5.0}, "lamb"),
    ("_options_go_with_their_filter", GrokfastConfig, {"filter": "ema", "window": 5}, "window"),
    ("_options_go_with_their_filter", GrokfastConfig, {"filter": "ma", "alpha": 0.5}, "alpha"),
    ("_options_go_with_their_optimizer", OptimizerConfig, {"name": "sgd", "beta1": 0.8}, "beta1"),
    (
        "_options_go_with_their_optimizer",
        OptimizerConfig,
        {"name": "schedule_free_sgd", "schedule": "constant", "beta2": 0.9},
        "beta2",
    ),
    ("_options_go_with_their_optimizer", OptimizerConfig, {"name": "lion", "eps": 1e-6}, "eps"),
    (
        "_options_go_with_their_optimizer",
        OptimizerConfig,
        {"muon": MuonConfig(momentum=0.9)},
        "muon.momentum",
    ),
    (
        "_options_go_with_their_optimizer",
        OptimizerConfig,
        {"name": "muon", "adafactor": AdafactorConfig(decay_power=0.7)},
        "adafactor.decay_power",
    ),
    (
        "_options_go_with_their_optimizer",
        OptimizerConfig,
        {"sgd": SgdConfig(momentum=0.8)},
        "sgd.momentum",
    ),
    (
        "_schedule_free_has_a_constant_rate",
        OptimizerConfig,
        {"name": "schedule_free_adamw"},
        "schedule",
    ),
    (
        "_schedule_free_needs_beta1",
        OptimizerConfig,
        {"name": "schedule_free_sgd", "schedule": "constant", "beta1": 0.0},
        "beta1",
    ),
    ("_groups_can_be_read", OptimizerConfig, {"groups": ("mlp",)}, "groups"),
    (
        "_weights_are_averaged_once",
        RunConfig,
        {
            "optimizer": OptimizerConfig(name="schedule_free_sgd", schedule="constant"),
            "train": TrainConfig(ema_decay=0.9),
        },
        "train.ema_decay",
    ),
    ("_decay_goes_with_wsd", OptimizerConfig, {"schedule": "wsd"}, "decay_steps"),
    ("_decay_goes_with_wsd", OptimizerConfig, {"decay_steps": 10}, "decay_steps"),
    ("_decay_goes_with_wsd", OptimizerConfig, {"decay_shape": "linear"}, "decay_shape"),
    (
        "_decay_goes_with_wsd",
        OptimizerConfig,
        {"schedule": "wsd", "decay_steps": 10, "decay_fraction": 0.5},
        "decay_steps",
    ),
    (
        "_decay_options_need_a_decay",
        OptimizerConfig,
        {"weight_decay": 0.0, "cautious_decay": True},
        "cautious_decay",
    ),
    ("_ramp_has_both_ends", MuonConfig, {"momentum_from": 0.8}, "momentum_warmup_steps"),
    ("_ramp_has_both_ends", MuonConfig, {"momentum_warmup_steps": 9}, "momentum_warmup_steps"),
    (
        "_polynomials_are_known",
        MuonConfig,
        {"polynomial": "polar_express", "newton_schulz_steps": 6},
        "newton_schulz_steps",
    ),
    ("_data_axis_is_not_empty", MeshConfig, {"data": 0}, "data"),
    ("_process_options_go_together", DistributedConfig, {"num_processes": 2}, "enabled"),
    (
        "_process_options_go_together",
        DistributedConfig,
        {"enabled": True, "num_processes": 2},
        "coordinator",
    ),
    ("_process_is_one_of_them", DistributedConfig, {**JOINED, "process_id": 2}, "process_id"),
    (
        "_one_process_waits_for_no_other",
        DistributedConfig,
        {"heartbeat_seconds": 30},
        "heartbeat_seconds",
    ),
    (
        "_kept_steps_are_saved_steps",
        CheckpointConfig,
        {"every_steps": 100, "keep_every_steps": 250},
        "keep_every_steps",
    ),
    ("_depths_are_increasing", EvaluationConfig, {"final_depths": ()}, "final_depths"),
    ("_depths_are_increasing", EvaluationConfig, {"final_depths": (2, 2)}, "final_depths"),
    ("_samples_need_prompts", SampleConfig, {"prompts": ()}, "prompts"),
    ("_writers_are_different", LoggingConfig, {"writers": ("tensorboard",) * 2}, "writers"),
    ("_wandb_project_goes_with_wandb", LoggingConfig, {"writers": ("wandb",)}, "wandb_project"),
    ("_wandb_project_goes_with_wandb", LoggingConfig, {"wandb_project": "mine"}, "wandb_project"),
    ("_lora_options_need_a_rank", LoraConfig, {"alpha": 8.0}, "alpha"),
    ("_lora_options_need_a_rank", LoraConfig, {"targets": ("mlp",)}, "targets"),
    ("_targets_are_patterns", LoraConfig, {"rank": 2, "targets": ()}, "targets"),
    ("_targets_are_patterns", LoraConfig, {"rank": 2, "targets": ("mlp/(up",)}, "targets"),
    ("_init_step_names_a_checkpoint", FineTuningConfig, {"init_step": "last"}, "init_step"),
    ("_init_step_names_a_checkpoint", FineTuningConfig, {"init_step": "best"}, "init_step"),
    ("_init_from_is_named", FineTuningConfig, {"init_from": ""}, "init_from"),
    ("_parts_are_chosen_once", FineTuningConfig, {"freeze": ("(",)}, "freeze"),
    (
        "_parts_are_chosen_once",
        FineTuningConfig,
        {"freeze": ("a",), "train_only": ("b",)},
        "train_only",
    ),
    (
        "_parts_are_chosen_once",
        FineTuningConfig,
        {"train_only": ("a",), "lora": LoraConfig(rank=2)},
        "train_only",
    ),
    ("_int8_needs_lora", FineTuningConfig, {"base_precision": "int8"}, "base_precision"),
    ("_retrofit_needs_a_source", FineTuningConfig, {"retrofit": True}, "retrofit"),
    ("_retrofit_needs_a_source", FineTuningConfig, {"core_start": 1}, "core_start"),
    (
        "_retrofit_makes_a_core",
        RunConfig,
        {"fine_tuning": RETROFIT, "model": ModelConfig(core_layers=0)},
        "model.core_layers",
    ),
    *(
        (
            "_retrofit_makes_a_core",
            RunConfig,
            {
                "fine_tuning": RETROFIT,
                "model": ModelConfig(recurrence=RecurrenceConfig(**{name: value})),
            },
            f"model.recurrence.{name}",
        )
        for name, value in {"adapter": "gate", "head_norm": False, "core_width": 128}.items()
    ),
    (
        "_retrofit_makes_a_core",
        RunConfig,
        {
            "fine_tuning": RETROFIT,
            "model": ModelConfig(sharing=SharingConfig(scheme="cycle", core_unique=1)),
        },
        "model.sharing.scheme",
    ),
    (
        "_retrofit_trains_its_adapter",
        RunConfig,
        {"fine_tuning": dataclasses.replace(RETROFIT, lora=LoraConfig(rank=2))},
        "fine_tuning.lora.targets",
    ),
    (
        "_retrofit_trains_its_adapter",
        RunConfig,
        {"fine_tuning": dataclasses.replace(RETROFIT, freeze=("^core/adapter",))},
        "fine_tuning.freeze",
    ),
    (
        "_retrofit_trains_its_adapter",
        RunConfig,
        {"fine_tuning": dataclasses.replace(RETROFIT, train_only=("mlp",))},
        "fine_tuning.train_only",
    ),
    ("_workdir_is_named", RunConfig, {"workdir": ""}, "workdir"),
    ("_environment_has_pairs", RunConfig, {"environment": ("XLA_FLAGS",)}, "environment"),
    ("_environment_has_pairs", RunConfig, {"environment": ("A=1", "A=2")}, "environment"),
    (
        "_sequences_fit_the_model",
        RunConfig,
        {"model": ModelConfig(max_length=128)},
        "data.sequence_length",
    ),
    (
        "_tokens_fit_the_model",
        RunConfig,
        {
            "model": ModelConfig(vocab_size=512),
            "data": DataConfig(tokenizer=TokenizerConfig(vocab_size=513)),
        },
        "data.tokenizer.vocab_size",
    ),
    (
        "_tokens_fit_the_model",
        RunConfig,
        {"model": ModelConfig(vocab_size=299)},
        "model.vocab_size",
    ),
    (
        "_batch_fits_processes",
        RunConfig,
        {"data": DataConfig(batch_size=7), "distributed": DistributedConfig(**JOINED)},
        "data.batch_size",
    ),
    (
        "_accumulation_divides_the_batch",
        RunConfig,
        {"train": TrainConfig(accumulation=3)},
        "train.accumulation",
    ),
    (
        "_schedule_fits_the_run",
        RunConfig,
        {"train": TrainConfig(steps=49)},
        "optimizer.warmup_steps",
    ),
    (
        "_sample_depth_needs_a_core",
        RunConfig,
        {"model": ModelConfig(core_layers=0), "samples": SampleConfig(depth=4)},
        "samples.depth",
    ),
    (
        "_media_samples_need_media",
        RunConfig,
        {"samples": SampleConfig(num_media=4)},
        "samples.num_media",
    ),
    (
        "_text_samples_need_text",
        RunConfig,
        {"data": DataConfig(source="reasoning"), "samples": SampleConfig(temperature=0.1)},
        "samples.temperature",
    ),
    (
        "_budget_chooses_the_accumulation",
        TrainConfig,
        {"memory_budget_gib": 2.0, "accumulation": 2},
        "accumulation",
    ),
    (
        "_best_checkpoints_are_validated",
        RunConfig,
        {"checkpoint": CheckpointConfig(every_steps=30)},
        "checkpoint.every_steps",
    ),
    (
        "_synonyms_need_file_and_rate",
        AugmentationConfig,
        {"synonyms_file": "words.tsv"},
        "synonym_rate",
    ),
    ("_synonyms_need_file_and_rate", AugmentationConfig, {"synonym_rate": 0.1}, "synonym_rate"),
    (
        "_back_translation_needs_function_and_rate",
        AugmentationConfig,
        {"back_translation": "mine:f"},
        "back_translation_rate",
    ),
    (
        "_back_translation_needs_function_and_rate",
        AugmentationConfig,
        {"back_translation_rate": 0.1},
        "back_translation_rate",
    ),
    (
        "_function_has_module_and_name",
        AugmentationConfig,
        {"back_translation": "mine.f", "back_translation_rate": 0.1},
        "back_translation",
    ),
    (
        "_reasoning_brings_its_own",
        DataConfig,
        {"source": "reasoning", "augmentation": AugmentationConfig(token_dropout=0.1)},
        "augmentation.token_dropout",
    ),
    (
        "_bad_records_need_records_of_others",
        DataConfig,
        {"on_bad_record": "skip"},
        "on_bad_record",
    ),
]


@pytest.mark.parametrize(
    ("name", "config_class", "values", "path"),
    BROKEN,
    ids=[f"{name}-{path}" for name, _, _, path in BROKEN],
)
def test_a_broken_rule_names_the_option(
    name: str, config_class: type, values: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_class(**values)
    assert caught.value.path == path
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert name in frames


def test_every_rule_has_a_case() -> None:
    classes = [AllOptions, *(section_class for _, section_class, _ in sections_of(AllOptions))]
    declared = {check.__name__ for owner in classes for check in rules_of(owner)}
    assert declared == {name for name, *_ in BROKEN}


def test_positions_schemes_without_rotation_allow_odd_heads() -> None:
    model = ModelConfig(
        width=60,
        attention=AttentionConfig(num_heads=4),
        positions=PositionConfig(scheme="alibi"),
    )
    assert model.head_dim(model.width) == 15


def test_only_a_tokenizer_that_is_trained_has_a_size_to_compare() -> None:
    small, trained = ModelConfig(vocab_size=299), DataConfig()
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: 299 is too few"):
        RunConfig(model=small, data=trained)
    for free in (
        DataConfig(tokenizer=TokenizerConfig(kind="bytes")),
        DataConfig(tokenizer=TokenizerConfig(model_file="my.model")),
        DataConfig(source="reasoning"),
    ):
        assert RunConfig(model=small, data=free).model.vocab_size == 299
    just = DataConfig(tokenizer=TokenizerConfig(vocab_size=300))
    assert RunConfig(model=ModelConfig(vocab_size=300), data=just).data is just
    assert RunConfig(model=ModelConfig(vocab_size=300), data=trained).data is trained


def test_uniform_may_just_reach_the_limit() -> None:
    values = {"sampling": "uniform", "mean_steps": 8}
    assert RecurrenceConfig(**values, max_steps=15).max_steps == 15
    with pytest.raises(ConfigError, match=r"^max_steps: 14 .* at least 15"):
        RecurrenceConfig(**values, max_steps=14)


def test_recurrence_without_a_core_names_the_options_and_the_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(
            core_layers=0, recurrence=RecurrenceConfig(mean_steps=4, backprop_depth=2, unroll=2)
        )
    assert "mean_steps=4, backprop_depth=2, unroll=2 (from the preset" in str(caught.value)
    assert (
        "--config.model.recurrence.mean_steps=8 --config.model.recurrence.backprop_depth=4 "
        "--config.model.recurrence.unroll=1"
    ) in str(caught.value)


def test_an_option_that_a_section_would_ignore_is_named_and_not_the_whole_section() -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(source="reasoning", augmentation=AugmentationConfig(token_dropout=0.1))
    assert str(caught.value) == (
        "augmentation.token_dropout: 0.1 would be ignored with source='reasoning'; choose another "
        "source, or leave it at 0.0."
    )


def test_lora_trains_a_gate_itself_and_a_gate_of_the_source_may_stay_frozen() -> None:
    gated = ModelConfig(exit_gate=ExitGateConfig(enabled=True))
    lora = FineTuningConfig(init_from="runs/base", lora=LoraConfig(rank=2))
    RunConfig(model=gated, fine_tuning=lora).check_fresh_gate()
    frozen = FineTuningConfig(init_from="runs/gated", train_only=("^core/",))
    run = RunConfig(model=gated, fine_tuning=frozen)
    with pytest.raises(ConfigError, match=r"train_only: exit_gate/weight .* add '\^exit_gate/'"):
        run.check_fresh_gate()


def test_experts_over_a_preset_are_told_what_to_type() -> None:
    values = {"preset": "tiny", "model": {"mlp": {"kind": "peer"}}}
    flag = r"hidden_width: 176 \(from the preset.* --config\.model\.mlp\.hidden_width=704,"
    with pytest.raises(ConfigError, match=rf"^model\.mlp\.{flag}"):
        build(values)
    assert build(merge(values, {"model": {"mlp": {"hidden_width": 704}}})).model.mlp.kind == "peer"
