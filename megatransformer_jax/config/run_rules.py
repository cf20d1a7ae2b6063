"""Rules between the sections of a run: what images and sound need, and what excludes them."""

from typing import TYPE_CHECKING, Any

from megatransformer_jax.config.data import PUZZLE_LENGTHS
from megatransformer_jax.config.option import ConfigError, require_defaults

if TYPE_CHECKING:  # run.py imports this module.
    from megatransformer_jax.config.run import RunConfig


# ------------------------------------------------------------------------------
# What runs with images and sound need, and what does not go with them.

# What runs the model on text alone, by section.
_OF_TEXT = {
    "samples": ("prompts", "max_new_tokens", "temperature"),
}


def check_media_model(run: "RunConfig") -> None:
    """Checks that the model reads media exactly if the data has them, and each kind that it reads.

    Raises:
      ConfigError: naming the option.
    """
    media, is_media = run.data.media, run.data.source == "media"
    for name, is_used in (("image", media.has_images), ("audio", media.has_audio)):
        is_used = is_used or media.has_documents
        if getattr(run.model, name).enabled and not (is_media and is_used):
            raise ConfigError(
                f"model.{name}.enabled",
                f"True, and the data has nothing of the kind (data.source={run.data.source!r}"
                + (f", data.media.tasks={media.tasks!r}" if is_media else "")
                + "); set it to False, or choose data.source='media' with a task that uses it.",
            )


def check_text_only_options(run: "RunConfig") -> None:
    """Checks that what runs the model on text alone is off in runs with media.

    Raises:
      ConfigError: naming the option.
    """
    if not run.model.has_media:
        return
    reason = "with media, which it cannot take"
    for name, options in _OF_TEXT.items():
        section: Any = run
        for part in name.split("."):
            section = getattr(section, part)
        try:
            require_defaults(section, options, reason, "train on text alone")
        except ConfigError as error:
            raise error.below(name) from None
    if run.model.residual == "admin":
        raise ConfigError(
            "model.residual",
            "'admin' is profiled on text alone so far; with media set it to 'plain'.",
        )


def check_media_samples(run: "RunConfig") -> None:
    """Checks that media are asked for only where the model makes them.

    Raises:
      ConfigError: naming the option.
    """
    if not run.model.has_media:
        try:
            require_defaults(
                run.samples,
                ("num_media",),
                "without images and sound in a transformer",
                "set model.image.enabled=True or model.audio.enabled=True",
            )
        except ConfigError as error:
            raise error.below("samples") from None


def check_sequence_room(run: "RunConfig") -> None:
    """Checks that text and media together are no longer than the model's longest sequence.

    Raises:
      ConfigError: naming the option.
    """
    if not run.model.has_media:
        return
    model, (images, clips) = run.model, media_places(run)
    total = run.data.sequence_length + images + clips
    if total > model.max_length:
        raise ConfigError(
            "model.max_length",
            f"{model.max_length} is less than {total}: data.sequence_length="
            f"{run.data.sequence_length}, {images} places of images, {clips} of sound; raise it.",
        )


def media_places(run: "RunConfig") -> tuple[int, int]:
    """Places that the slots of a row for images, and those for clips, take in the sequence."""
    media, model = run.data.media, run.model
    return (
        media.images_per_row * model.image.num_tokens if model.image.enabled else 0,
        media.audio_per_row * model.audio.num_tokens if model.audio.enabled else 0,
    )


# ------------------------------------------------------------------------------
# What texts that validation generates need.

# Tasks whose answers follow their problems; in the others each symbol of an answer stands under
# one of the problem, so that nothing is generated.
CONTINUED_TASKS = ("addition", "hop", "mano")
# Those of which the model reads the answer so far.
_READ_ANSWERS = ("addition",)


def check_generated_texts(run: "RunConfig") -> None:
    """Checks that there are prompts to continue and references to compare with.

    Raises:
      ConfigError: naming the option.
    """
    options, path = run.evaluation.generated, "evaluation.generated"
    if not options.metrics:
        return
    match run.task:
        case "text" if options.references is None:
            raise ConfigError(
                f"{path}.references",
                "is None, and evaluation.generated.metrics asks for scores; name a file of JSON "
                'lines {"prompt": "...", "reference": "..."}.',
            )
        case "media":
            raise ConfigError(
                f"{path}.metrics",
                f"{options.metrics!r} are not for data.source='media', whose answers "
                "validation/caption_accuracy and validation/transcription_accuracy score; leave it "
                "empty.",
            )
        case "reasoning":
            own = ("references", "max_new_tokens", "stop")
            try:
                require_defaults(options, own, "with data.source='reasoning'", "leave it out")
            except ConfigError as error:
                raise error.below(path) from None
            if run.data.reasoning.task not in CONTINUED_TASKS:
                raise ConfigError(
                    f"{path}.metrics",
                    f"{options.metrics!r} are not for data.reasoning.task="
                    f"{run.data.reasoning.task!r}, whose answers stand under the problem and are "
                    "not generated; leave it empty: validation/exact_accuracy scores them.",
                )


# ------------------------------------------------------------------------------
# A loss at every iteration, and what only the pass at the drawn depth has.


def check_supervision(run: "RunConfig") -> None:
    """Checks that the model has iterations to supervise, and that nothing that is asked for needs
    a pass that supervision alone does not make.

    Raises:
      ConfigError: naming the option.
    """
    supervision, recurrence = run.train.supervision, run.model.recurrence
    stability = run.train.stability
    if supervision.prior == "none":
        return
    if not run.model.is_recurrent:
        raise ConfigError(
            "train.supervision.prior",
            f"{supervision.prior!r} needs a core, and model.core_layers=0; set it to 'none'.",
        )
    if supervision.max_steps is None and recurrence.mean_steps < 2:
        raise ConfigError(
            "train.supervision.prior",
            f"{supervision.prior!r} says nothing of a single iteration "
            f"(model.recurrence.mean_steps={recurrence.mean_steps}); set it to 'none', or raise "
            "mean_steps.",
        )
    if not supervision.is_alone:
        return
    for name, value, wanted in (
        ("model.recurrence.sampling", recurrence.sampling, "fixed"),
        ("model.recurrence.ramp", recurrence.ramp, "none"),
        ("model.recurrence.kept_every", recurrence.kept_every, 1),
        ("model.recurrence.gradient", recurrence.gradient, "truncated"),
        ("train.stability.jacobian_weight", stability.jacobian_weight, 0),
        ("train.stability.fixed_point_weight", stability.fixed_point_weight, 0),
        ("data.source", run.data.source if run.data.source == "media" else "text", "text"),
    ):
        if value != wanted:
            raise ConfigError(
                name,
                f"{value!r} needs a pass at the drawn depth, and with train.supervision.mix=1 "
                f"there is none; set it to {wanted!r}, or lower mix.",
            )


# ------------------------------------------------------------------------------
# What a model that sees the whole row needs.


def check_sight(run: "RunConfig") -> None:
    """Checks that attention sees what a problem needs, and not its answer.

    Raises:
      ConfigError: naming the option.
    """
    path, task = "model.attention.is_causal", run.data.reasoning.task
    is_problem = run.data.source == "reasoning"
    if run.model.attention.is_causal:
        if is_problem and task in PUZZLE_LENGTHS:
            raise ConfigError(
                path,
                f"True with data.reasoning.task={task!r}, whose first cells depend on the last "
                "ones; set it to False.",
            )
        return
    if not is_problem:
        raise ConfigError(
            path,
            f"False with data.source={run.data.source!r} lets a token see the next one, which it "
            "must predict; set it to True, or choose data.source='reasoning'.",
        )
    if task in _READ_ANSWERS:
        raise ConfigError(
            path,
            f"False with data.reasoning.task={task!r} lets a token see the answer, which stands "
            "in the row; set it to True, or choose another task.",
        )
    if run.evaluation.generated.metrics:
        raise ConfigError(
            "evaluation.generated.metrics",
            f"{run.evaluation.generated.metrics!r} with {path}=False, which cannot continue a "
            "prompt; leave it empty: validation/exact_accuracy scores the answers.",
        )
