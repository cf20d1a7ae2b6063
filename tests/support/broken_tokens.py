"""Broken rules of prepared rows, for run_rules_test.py."""

from typing import Any

from megatransformer_jax.config.data import AugmentationConfig, DataConfig

TOKENS: dict[str, Any] = {"source": "tokens", "files": ("a", "b")}

# The rule, the class, what is given, the path in the error.
BROKEN_TOKENS: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_validation_files_need_a_file_source",
        DataConfig,
        {"validation_files": ("a.txt",)},
        "validation_files",
    ),
    ("_mixture_has_a_weight_per_folder", DataConfig, {**TOKENS, "mixture": (1.0,)}, "mixture"),
    ("_prepared_rows_have_one_length", DataConfig, {**TOKENS, "packing": "bucket"}, "packing"),
    (
        "_prepared_rows_are_held_out_already",
        DataConfig,
        {**TOKENS, "validation_fraction": 0.5},
        "validation_fraction",
    ),
    (
        "_prepared_texts_stay_as_they_are",
        DataConfig,
        {**TOKENS, "augmentation": AugmentationConfig(synonyms_file="a", synonym_rate=0.5)},
        "augmentation.synonyms_file",
    ),
]
