"""Compares a checkpoint with the run that wants it, and explains what does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.build import build, to_dict
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import ConfigError, UserError, options_of
from megatransformer_jax.config.run_base import BaseRunConfig

# What a resumed run must keep: everything below these sections but for the options that follow.
RESUME_SECTIONS = (
    "kind",
    "model",
    "data",
    "optimizer",
    "train",
    "fine_tuning",
    "vocoder",
    "image_vae",
)

# They do not reach into a step that was saved, or only say how long, how often and where. What lies
# at a path is compared by content (digest of the vocabulary, fingerprint of the data), not by name.
FREE_ON_RESUME = (
    "data.num_workers",
    "data.prefetch_batches",
    "data.files",
    "data.validation_files",
    "data.augmentation.synonyms_file",
    "data.tfds_data_dir",
    "data.tokenizer.model_file",
    "train.steps",
    "train.max_bad_steps",
)

# The same numbers in another order of additions.
SAME_UP_TO_ROUNDING = (
    "model.remat",
    "model.attention.kernel",
    "model.recurrence.unroll",
    "model.recurrence.kept_every",
)

# A user's code, which is corrected where it fails; what a name stands for cannot be compared.
USER_CODE = ("data.augmentation.back_translation",)

# Options of the optimiser that say which arrays its state has, or what those mean.
STATE_SHAPING = (
    "optimizer.name",
    "optimizer.sgd.momentum",
    "optimizer.adafactor.min_factored_size",
    "optimizer.muon.row_decay",
    "optimizer.weight_decay_schedule",
    "optimizer.grokfast.filter",
    "optimizer.grokfast.window",
)

# A run that diverged is saved by changing these; the state has the same arrays whatever they are.
OPTIMIZER_OPTIONS = tuple(
    path
    for path in (f"optimizer.{option.path}" for option in options_of(OptimizerConfig))
    if path not in STATE_SHAPING
)

# Options of `model` that only training reads: the trained parameters make the same model.
TRAINING_ONLY = (
    "model.embedding_dropout_rate",
    "model.residual_dropout_rate",
    "model.attention.dropout_rate",
    "model.mlp.dropout_rate",
    # The same up to rounding in evaluation; in training other draws of dropout.
    "model.scan_layers",
    "model.init.scheme",
    "model.init.std",
    "model.init.zero_outputs",
    "model.recurrence.mean_steps",
    "model.recurrence.backprop_depth",
    "model.recurrence.gradient",
    "model.recurrence.implicit_tolerance",
    "model.recurrence.sampling",
    "model.recurrence.sampling_sigma",
    "model.recurrence.max_steps",
    "model.recurrence.draw_per",
    "model.recurrence.ramp",
    "model.recurrence.ramp_steps",
    "model.recurrence.ramp_from",
    "model.recurrence.ramp_backprop",
)

_SHOWN = 12


class CheckpointMismatch(UserError):
    """A checkpoint does not belong to this run. The message lists what differs and the fix."""


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one flat mapping with dotted paths; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix + name
        if isinstance(value, Mapping):
            flat.update(flatten_config(value, path + "."))
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def config_differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    sections: Sequence[str],
    ignored: Sequence[str] = (),
) -> list[str]:
    """One line per option that differs: 'model.width: saved 256, now 128'.

    Args:
      saved: nested plain values.
      current: the same of today.
      sections: compared are the options below these (or these options themselves),
      ignored: but for these.
    """
    old, new = flatten_config(saved), flatten_config(current)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        is_inside = any(path == name or path.startswith(f"{name}.") for name in sections)
        if not is_inside or path in ignored:
            continue
        before, now = old.get(path, "(not there)"), new.get(path, "(not there)")
        if before != now:
            lines.append(f"{path}: saved {before!r}, now {now!r}")
    return lines


def shape_differences(
    saved: Mapping[str, tuple[int, ...]], current: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """One line per array whose shape differs or that only one side has."""
    lines = []
    for path in sorted(saved.keys() | current.keys()):
        before, now = saved.get(path), current.get(path)
        if before is None:
            lines.append(f"{path}: not in the checkpoint, now {now}")
        elif now is None:
            lines.append(f"{path}: saved {before}, not in this model")
        elif before != now:
            lines.append(f"{path}: saved {before}, now {now}")
    return lines


def check_model(saved: Mapping[str, Any], current: BaseRunConfig, where: str) -> None:
    """Checks that a checkpoint's parameters make the model of this config.

    Compared are the options of `model` that shape the parameters or say how they are used; not
    those of training alone (dropout, draws of depth, initialisation) nor of how it is computed.

    Args:
      saved: the checkpoint's config as nested plain values.
      current: this run's config.
      where: the checkpoint, for the message.

    Raises:
      CheckpointMismatch: listing the options of `model` that differ.
    """
    ignored = (*TRAINING_ONLY, *SAME_UP_TO_ROUNDING)
    lines = config_differences(_complete(saved, where), to_dict(current), ("model",), ignored)
    if lines:
        raise CheckpointMismatch(
            _message(
                f"the checkpoint {where} is of another architecture",
                lines,
                "Give these options their saved values (the saved config is config.json in the "
                "run's workdir), or choose another workdir.",
            )
        )


def check_resumable(saved: Mapping[str, Any], current: BaseRunConfig, where: str) -> None:
    """Checks that a run can go on from a checkpoint.

    Exactly as if it had not stopped, unless `resume_warnings` says otherwise.

    Raises:
      CheckpointMismatch: listing the options that differ; only those of `FREE_ON_RESUME`,
        `SAME_UP_TO_ROUNDING`, `USER_CODE`, `OPTIMIZER_OPTIONS` and of other sections than
        `RESUME_SECTIONS` may.
    """
    check_model(saved, current, where)
    ignored = [*FREE_ON_RESUME, *SAME_UP_TO_ROUNDING, *USER_CODE, *OPTIMIZER_OPTIONS]
    if current.optimizer.is_schedule_free:
        # The average is computed from the parameters with it.
        ignored.remove("optimizer.beta1")
    lines = config_differences(_complete(saved, where), to_dict(current), RESUME_SECTIONS, ignored)
    if lines:
        raise CheckpointMismatch(
            _message(
                f"the checkpoint {where} is of another run: it was written with other options",
                lines,
                "Give these options their saved values to resume it, or choose another workdir "
                "to start afresh. More train.steps and other optimizer options are allowed.",
            )
        )


def resume_warnings(saved: Mapping[str, Any], current: BaseRunConfig, where: str) -> list[str]:
    """What makes a resumed run differ from one that was never stopped; empty if nothing does.

    Args:
      saved: the checkpoint's config as nested plain values, which `check_resumable` accepts.
      current: this run's config.
      where: the checkpoint, for the message.
    """
    old, new = _complete(saved, where), to_dict(current)
    warnings = []
    if lines := config_differences(old, new, OPTIMIZER_OPTIONS):
        warnings.append(
            f"optimizer options have changed ({'; '.join(lines)}): from here on this is no longer "
            "the run that was started."
        )
    if lines := config_differences(old, new, USER_CODE):
        warnings.append(
            f"another function ({'; '.join(lines)}): from here on the documents are those that it "
            "makes, and this is no longer the run that was started unless it does the same."
        )
    if lines := config_differences(old, new, SAME_UP_TO_ROUNDING):
        warnings.append(
            f"computed in another way ({'; '.join(lines)}): the numbers may differ in their last "
            "bits from those of a run that was never stopped."
        )
    if lines := config_differences(old, new, ("train.steps",)):
        warnings.append(
            f"{lines[0]}: from here on the learning rate follows the schedule of the new length."
        )
    return warnings


def check_shapes(
    saved: Mapping[str, tuple[int, ...]], current: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Checks that a checkpoint's arrays are those of this train state.

    Raises:
      CheckpointMismatch: listing the arrays that differ.
    """
    lines = shape_differences(saved, current)
    if lines:
        raise CheckpointMismatch(
            _message(
                f"the arrays of the checkpoint {where} are not those of this run",
                lines,
                "It was written by another version of this library or another optimiser; use "
                "that version, or choose another workdir.",
            )
        )


def _complete(saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The saved config with today's defaults for options that it does not know yet."""
    try:
        return to_dict(build(saved))
    except ConfigError as error:
        raise CheckpointMismatch(
            f"the config saved with the checkpoint {where} does not fit this version of the "
            f"library ({error}); use the version that wrote it, or choose another workdir."
        ) from error


def _message(problem: str, lines: Sequence[str], fix: str) -> str:
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  ... and {len(lines) - _SHOWN} more")
    return "\n".join([problem + ":", *shown, fix])
