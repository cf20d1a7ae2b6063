"""Rules about buckets, and values that break them: (name, class, values, the option named)."""

from typing import Any

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.loop import LoggingConfig
from megatransformer_jax.config.media_data import DocumentsDataConfig
from megatransformer_jax.config.run import RunConfig

BROKEN_ADDRESSES: list[tuple[str, type, dict[str, Any], str]] = [
    ("_workdir_is_served", RunConfig, {"workdir": "s3://bucket/run"}, "workdir"),
    (
        "_bucket_is_not_copied",
        RunConfig,
        {"workdir": "gs://a/b", "logging": LoggingConfig(mirror="s3://a/b")},
        "logging.mirror",
    ),
    ("_bucket_has_a_lock", RunConfig, {"steal_lock": True}, "steal_lock"),
    ("_bucket_has_a_lock", RunConfig, {"lock_owner": "me"}, "lock_owner"),
    (
        "_bucket_has_a_lock",
        RunConfig,
        {"lock_owner": " ", "workdir": "gs://bucket/run"},
        "lock_owner",
    ),
    ("_mirror_is_a_bucket", LoggingConfig, {"mirror": "runs/copy"}, "mirror"),
    ("_mirror_is_a_bucket", LoggingConfig, {"mirror": "az://bucket/copy"}, "mirror"),
    ("_files_are_served", DataConfig, {"source": "text", "files": ("az://a/b",)}, "files"),
    (
        "_files_are_served",
        DataConfig,
        {"source": "arrayrecord", "files": ("a",), "validation_files": ("gs://a/b",)},
        "validation_files",
    ),
    (
        "_files_are_served",
        DataConfig,
        {"source": "tfds", "tfds_name": "a", "tfds_data_dir": "gs://a/b"},
        "tfds_data_dir",
    ),
    ("_folder_is_here", DocumentsDataConfig, {"folder": "gs://a/b"}, "folder"),
]
