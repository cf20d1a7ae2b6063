"""Compares a checkpoint with the run that wants it, and explains what does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatransformer_jax.config.build import build, to_dict
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig

# Options that a resumed run may change: they do not reach into a step that was saved, or only say
# how long, how often and where. Everything else below these sections must stay as it was.
RESUME_SECTIONS = ("model", "data", "optimizer", "train")
FREE_ON_RESUME = (
    "data.num_workers",
    "data.prefetch_batches",
    "train.steps",
    "train.max_bad_steps",
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
    saved: Mapping[str, Any], current: Mapping[str, Any], sections: Sequence[str]
) -> list[str]:
    """One line per option of `sections` that differs: 'model.width: saved 256, now 128'."""
    old, new = flatten_config(saved), flatten_config(current)
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if path.split(".")[0] not in sections or path in FREE_ON_RESUME:
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


def check_model(saved: Mapping[str, Any], current: RunConfig, where: str) -> None:
    """Checks that a checkpoint's architecture is this one.

    Args:
      saved: the checkpoint's config as nested plain values.
      current: this run's config.
      where: the checkpoint, for the message.

    Raises:
      CheckpointMismatch: listing the options of `model` that differ.
    """
    lines = config_differences(_complete(saved, where), to_dict(current), ("model",))
    if lines:
        raise CheckpointMismatch(
            _message(
                f"the checkpoint {where} is of another architecture",
                lines,
                "Give these options their saved values (the saved config is config.json in the "
                "run's workdir), or choose another workdir.",
            )
        )


def check_resumable(saved: Mapping[str, Any], current: RunConfig, where: str) -> None:
    """Checks that a run can go on from a checkpoint exactly as if it had not stopped.

    Raises:
      CheckpointMismatch: listing the options that differ; only those of `FREE_ON_RESUME` and of
        other sections than `RESUME_SECTIONS` may.
    """
    check_model(saved, current, where)
    lines = config_differences(_complete(saved, where), to_dict(current), RESUME_SECTIONS)
    if lines:
        raise CheckpointMismatch(
            _message(
                f"the checkpoint {where} was written with other options, so it cannot be resumed",
                lines,
                "Give these options their saved values to resume it, or choose another workdir "
                "to start afresh. More train.steps are allowed.",
            )
        )


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
