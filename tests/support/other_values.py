"""For every option a value other than its default, and what must be said with it."""

from typing import Any

from other_media_values import (
    MEDIA_COMPANIONS,
    MEDIA_NEW_VALUES,
    MEDIA_SECTION_COMPANIONS,
)

from megatransformer_jax.config.option import Option

# What else must be said for the new value of an option to be allowed.
COMPANIONS = {
    "model.norm.bias": ["--config.model.norm.kind=layernorm"],
    "model.head_bias": ["--config.model.tie_embeddings=false"],
    "model.init.std": ["--config.model.init.scheme=scaled"],
    "model.recurrence.zero_order_hold": ["--config.model.recurrence.adapter=diagonal"],
    "model.recurrence.implicit_tolerance": ["--config.model.recurrence.gradient=implicit"],
    "model.recurrence.loop_iterations": ["--config.model.recurrence.loop_scale"],
    "model.exit_gate.norm": ["--config.model.exit_gate.enabled"],
    "model.recurrence.ramp": ["--config.model.recurrence.ramp_steps=9"],
    "model.recurrence.ramp_steps": ["--config.model.recurrence.ramp=linear"],
    "model.recurrence.ramp_backprop": [
        "--config.model.recurrence.ramp=linear",
        "--config.model.recurrence.ramp_steps=9",
    ],
    "model.recurrence.ramp_from": [
        "--config.model.recurrence.ramp=linear",
        "--config.model.recurrence.ramp_steps=9",
    ],
    "data.source": ["--config.data.files=a.txt"],
    "data.files": ["--config.data.source=text"],
    "data.validation_files": ["--config.data.source=text", "--config.data.files=a.txt"],
    "data.mixture": ["--config.data.source=tokens", "--config.data.files=a,b"],
    "data.text_field": ["--config.data.source=jsonl", "--config.data.files=a.jsonl"],
    "data.on_bad_record": ["--config.data.source=text", "--config.data.files=a.txt"],
    "data.tfds_name": ["--config.data.source=tfds"],
    "data.tfds_split": ["--config.data.source=tfds", "--config.data.tfds_name=x"],
    "data.tfds_validation_split": ["--config.data.source=tfds", "--config.data.tfds_name=x"],
    "data.tfds_data_dir": ["--config.data.source=tfds", "--config.data.tfds_name=x"],
    "optimizer.schedule": ["--config.optimizer.decay_steps=9"],
    "optimizer.decay_steps": ["--config.optimizer.schedule=wsd"],
    "optimizer.decay_fraction": ["--config.optimizer.schedule=wsd"],
    "optimizer.decay_shape": [
        "--config.optimizer.schedule=wsd",
        "--config.optimizer.decay_steps=9",
    ],
    "optimizer.muon.momentum_from": [
        "--config.optimizer.name=muon",
        "--config.optimizer.muon.momentum_warmup_steps=9",
    ],
    "optimizer.muon.momentum_warmup_steps": [
        "--config.optimizer.name=muon",
        "--config.optimizer.muon.momentum_from=0.8",
    ],
    "distributed.coordinator": [
        "--config.distributed.enabled",
        "--config.distributed.num_processes=2",
        "--config.distributed.process_id=0",
    ],
    "distributed.num_processes": [
        "--config.distributed.enabled",
        "--config.distributed.coordinator=h:1",
        "--config.distributed.process_id=0",
    ],
    "distributed.process_id": [
        "--config.distributed.enabled",
        "--config.distributed.coordinator=h:1",
        "--config.distributed.num_processes=4",
    ],
    "distributed.heartbeat_seconds": ["--config.distributed.enabled"],
    "distributed.initialization_seconds": ["--config.distributed.enabled"],
    "logging.wandb_project": ["--config.logging.writers=wandb"],
    "logging.writers": ["--config.logging.wandb_project=mine"],
}
_BUCKETS = ["--config.data.packing=bucket"]
_SCORED = ["--config.evaluation.generated.metrics=exact_match"]
_GATE = ["--config.model.exit_gate.enabled"]
_GAIN = [*_GATE, "--config.train.exit_gate.target=gain", "--config.train.exit_gate.detach"]
_FIXED = ["--config.model.recurrence.sampling=fixed"]
_LORA = ["--config.fine_tuning.init_from=runs/a", "--config.fine_tuning.lora.rank=4"]
_PEER = ["--config.model.mlp.kind=peer", "--config.model.mlp.hidden_width=704"]
_QK_NORM = ["--config.model.attention.qk_norm"]
_RETROFIT = [
    "--config.fine_tuning.init_from=runs/a",
    "--config.fine_tuning.retrofit",
    "--config.model.prelude_layers=1",
]
_LINEAR = ["--config.model.positions.scaling.kind=linear"]
_LLAMA3 = [
    "--config.model.positions.scaling.kind=llama3",
    "--config.model.positions.scaling.factor=4",
]
_YARN = [_LLAMA3[0].replace("llama3", "yarn"), _LLAMA3[1]]
_SGD = ["--config.optimizer.name=sgd"]
_SHARED = ["--config.model.sharing.scheme=cycle"]
_DEEP = [*_SHARED, "--config.model.prelude_layers=2", "--config.model.coda_layers=2"]
COMPANIONS |= {
    "model.attention.is_causal": ["--config.data.source=reasoning"],
    "model.attention.qk_norm_span": _QK_NORM,
    "model.attention.qk_norm_scale": _QK_NORM,
    "model.attention.qk_norm_after_rotary": _QK_NORM,
    "model.attention.qk_norm_eps": _QK_NORM,
    "model.value_embedding.gate_channels": ["--config.model.value_embedding.layers=1"],
    "model.positions.scaling.kind": _LLAMA3[1:],
    "model.positions.scaling.factor": _LINEAR,
    "model.positions.scaling.low_freq_factor": _LLAMA3,
    "model.positions.scaling.high_freq_factor": _LLAMA3,
    "model.sharing.scheme": ["--config.model.sharing.core_unique=1"],
    "model.sharing.prelude_unique": _DEEP,
    "model.sharing.coda_unique": _DEEP,
    "data.bucket_lengths": _BUCKETS,
    "data.augmentation.synonyms_file": ["--config.data.augmentation.synonym_rate=0.1"],
    "data.augmentation.synonym_rate": ["--config.data.augmentation.synonyms_file=a.tsv"],
    "data.augmentation.back_translation": ["--config.data.augmentation.back_translation_rate=0.1"],
    "data.augmentation.back_translation_rate": ["--config.data.augmentation.back_translation=a:b"],
    "optimizer.grokfast.alpha": ["--config.optimizer.grokfast.filter=ema"],
    "optimizer.grokfast.lamb": ["--config.optimizer.grokfast.filter=ema"],
    "optimizer.grokfast.window": ["--config.optimizer.grokfast.filter=ma"],
    "optimizer.grokfast.warmup": ["--config.optimizer.grokfast.filter=ma"],
    "optimizer.sgd.nesterov": _SGD,
    "train.exit_gate.prior": [*_GATE, "--config.train.exit_gate.prior_mean=4"],
    "train.exit_gate.prior_mean": [*_GATE, "--config.train.exit_gate.prior=geometric"],
    "train.exit_gate.target": [*_GATE, "--config.train.exit_gate.detach"],
    "train.exit_gate.gain_slope": _GAIN,
    "train.exit_gate.gain_threshold": _GAIN,
    "train.supervision.prior": _FIXED,
    "train.supervision.prior_mean": ["--config.train.supervision.prior=geometric", *_FIXED],
    "train.supervision.mix": ["--config.train.supervision.prior=uniform"],
    "train.supervision.max_steps": [
        "--config.train.supervision.prior=uniform",
        "--config.train.supervision.mix=0.5",
    ],
    "train.stability.jacobian_warmup_steps": ["--config.train.stability.jacobian_weight=0.1"],
    "data.reasoning.modulus": [
        "--config.data.source=reasoning",
        "--config.data.reasoning.task=mano",
    ],
    "train.stability.fixed_point_warmup_steps": ["--config.train.stability.fixed_point_weight=0.1"],
    "fine_tuning.init_step": ["--config.fine_tuning.init_from=runs/a"],
    "fine_tuning.base_precision": _LORA,
    "fine_tuning.retrofit": [flag for flag in _RETROFIT if "retrofit" not in flag],
    "fine_tuning.core_start": _RETROFIT,
    "fine_tuning.lora.rank": _LORA[:1],
    "diagnostics.kinds": ["--config.diagnostics.every_steps=5"],
    "diagnostics.num_rows": ["--config.diagnostics.every_steps=5"],
    "diagnostics.num_steps": ["--config.diagnostics.every_steps=5"],
}
# The same for every option of a section.
SECTION_COMPANIONS = {
    "model.mlp.peer.": _PEER,
    "model.positions.scaling.": _YARN,
    "model.sharing.": _SHARED,
    "data.reasoning.": ["--config.data.source=reasoning", "--config.data.reasoning.task=hop"],
    "optimizer.adafactor.": ["--config.optimizer.name=adafactor"],
    "optimizer.muon.": ["--config.optimizer.name=muon"],
    "optimizer.sgd.": _SGD,
    "train.exit_gate.": _GATE,
    "evaluation.generated.": [*_SCORED, "--config.evaluation.generated.references=r.jsonl"],
    "fine_tuning.lora.": _LORA,
}
COMPANIONS |= {
    "evaluation.generated.metrics": ["--config.evaluation.generated.references=r.jsonl"],
    "evaluation.generated.references": _SCORED,
}
COMPANIONS |= {
    "lock_owner": ["--config.workdir=gs://bucket/run"],
    "steal_lock": ["--config.workdir=gs://bucket/run"],
    "model.recurrence.kept_every": ["--config.model.remat=full"],
}
COMPANIONS |= MEDIA_COMPANIONS
SECTION_COMPANIONS |= MEDIA_SECTION_COMPANIONS


def companions(path: str) -> list[str]:
    """The flags that the other value of the option at `path` needs next to it."""
    if path == "data.reasoning.task":
        return ["--config.data.source=reasoning"]
    if path in COMPANIONS:
        return COMPANIONS[path]
    sections = [flags for start, flags in SECTION_COMPANIONS.items() if path.startswith(start)]
    return sections[0] if sections else []


# New values where the rule by type below would break another rule, or needs a special form.
NEW_VALUES: dict[str, Any] = {
    "preset": "tiny",
    "environment": ("XLA_FLAGS=--a=b --c=d", "B="),
    "workdir": "runs/with space, =\"quotes' ünïcode",
    "logging.mirror": "gs://bucket/copy",
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 32,
    "model.attention.prelude_windows": (5,),
    "model.attention.core_windows": (5, 0),
    "model.attention.coda_windows": (5,),
    "model.positions.scaling.factor": 2.0,
    "model.value_embedding.layers": (1, 3),
    "model.value_embedding.gate_channels": 16,
    "model.positions.scaling.high_freq_factor": 8.0,
    "model.positions.scaling.beta_fast": 16.0,
    "model.positions.rotary_base": 500.0,
    "model.recurrence.core_width": 128,
    "model.recurrence.hyper_connections": 3,
    "mesh.data": 2,
    "model.mlp.peer.num_experts": 64**2,
    "model.sharing.prelude_unique": 1,
    "model.sharing.core_unique": 1,
    "model.sharing.coda_unique": 1,
    "data.bucket_lengths": (64, 256),
    "data.mixture": (0.25, 0.75),
    "data.augmentation.back_translation": "package.module:function",
    "optimizer.groups": ("mlp/: learning_rate=0.5",),
    "diagnostics.kinds": ("recurrence",),
    "train.exit_gate.prior_mean": 3.0,
    "train.supervision.prior_mean": 3.0,
    "fine_tuning.init_step": "best",
    "fine_tuning.lora.targets": ("mlp/up",),
    "model.recurrence.ramp_from": 3,
    "model.recurrence.unroll": 2,
    "data.tokenizer.vocab_size": 300,
    "data.reasoning.min_length": 2,
    "data.reasoning.eval_min_length": 18,
    "data.reasoning.modulus": 7,
    "data.batch_size": 16,
    "train.accumulation": 2,
    "checkpoint.keep_every_steps": 300,
    "evaluation.final_depths": (1, 3),
    "evaluation.generated.metrics": ("bleu", "exact_match"),
    "evaluation.generated.stop": ("a, b", "c"),
    "logging.writers": ("wandb",),
}
NEW_VALUES |= MEDIA_NEW_VALUES


def new_value(option: Option) -> Any:
    """Another allowed value than the default."""
    if option.path in NEW_VALUES:
        return NEW_VALUES[option.path]
    if option.check.choices:
        others = [choice for choice in option.check.choices if choice != option.default]
        return others[0] if others else option.default
    if option.check.words:
        return option.check.words[0]
    kinds = str(option.declared)
    if option.declared is bool:
        return not option.default
    if "tuple" in kinds:
        return ("first, with comma", "second")
    if "str" in kinds:
        return "other"
    if "float" in kinds:
        return 0.25 if option.default != 0.25 else 0.5
    return (option.default or 1) * 2
