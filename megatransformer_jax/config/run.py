"""One run: model, data, optimiser, mesh, loop, checkpoints, logging, as frozen dataclasses."""

import dataclasses

from megatransformer_jax.config.data import MIN_TRAINED_PIECES, DataConfig
from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.config.loop import (
    GENERATED_METRICS,
    MEDIA_METRICS,
    RECURRENT_KINDS,
    TEXT_METRICS,
    CheckpointConfig,
    DiagnosticsConfig,
    EvaluationConfig,
    MeshConfig,
    SampleConfig,
    TrainConfig,
)
from megatransformer_jax.config.media_tasks import AUDIO_TASKS, IMAGE_TASKS
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import (
    ConfigError,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.config.recurrence import ExitGateTrainingConfig
from megatransformer_jax.config.run_base import BaseRunConfig, kind_option
from megatransformer_jax.config.run_rules import (
    check_generated_texts,
    check_media_model,
    check_media_samples,
    check_sequence_room,
    check_sight,
    check_supervision,
    check_text_only_options,
)


@dataclasses.dataclass(frozen=True)
class RunConfig(BaseRunConfig):
    """Everything that defines a run of a transformer, on text, problems or media."""

    kind: str = kind_option("transformer", ("transformer",))
    preset: str | None = option(None, "Named model size from gin/, applied before other values.")
    model: ModelConfig = section(ModelConfig, "Architecture.")
    data: DataConfig = section(DataConfig, "Data.")
    train: TrainConfig = section(TrainConfig, "Training loop.")
    fine_tuning: FineTuningConfig = section(
        FineTuningConfig, "Start from another model; which parameters are trained."
    )
    mesh: MeshConfig = section(MeshConfig, "Device mesh.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Checkpoints.")
    evaluation: EvaluationConfig = section(EvaluationConfig, "Validation.")
    samples: SampleConfig = section(SampleConfig, "Samples.")
    diagnostics: DiagnosticsConfig = section(
        DiagnosticsConfig, "Figures that show the inside of the model during training."
    )

    @property
    def task(self) -> str:
        """See `BaseRunConfig`."""
        return self.data.task

    @property
    def trained_parts(self) -> FineTuningConfig:
        """See `BaseRunConfig`."""
        return self.fine_tuning

    @rule("data.sequence_length")
    def _sequences_fit_the_model(self) -> None:
        """At most model.max_length."""
        if self.data.sequence_length > self.model.max_length:
            raise ConfigError(
                "data.sequence_length",
                f"{self.data.sequence_length} exceeds model.max_length={self.model.max_length}; "
                "lower it or raise model.max_length.",
            )

    @rule("data.tokenizer.vocab_size")
    def _tokens_fit_the_model(self) -> None:
        """At most model.vocab_size for a tokenizer that the run trains; None needs a
        model.vocab_size of at least 300."""
        tokenizer = self.data.tokenizer
        is_given = not tokenizer.is_trained or self.fine_tuning.init_from is not None
        if self.data.source == "reasoning" or is_given:
            return  # The size is known, and checked, once the vocabulary is loaded.
        if tokenizer.vocab_size is None:
            if self.model.vocab_size < MIN_TRAINED_PIECES:
                raise ConfigError(
                    "model.vocab_size",
                    f"{self.model.vocab_size} is too few for a trained tokenizer; it takes at "
                    f"least {MIN_TRAINED_PIECES}, and data.tokenizer.kind='bytes' takes 259.",
                )
        elif tokenizer.vocab_size > self.model.vocab_size:
            raise ConfigError(
                "data.tokenizer.vocab_size",
                f"{tokenizer.vocab_size} exceeds model.vocab_size={self.model.vocab_size}; "
                "lower it or raise model.vocab_size.",
            )

    @rule("fine_tuning.retrofit")
    def _retrofit_makes_a_core(self) -> None:
        """Needs model.core_layers >= 1 without model.recurrence.core_width and model.sharing,
        model.recurrence.head_norm=True, and any adapter but gate, which cannot pass the injection
        on."""
        if not self.fine_tuning.retrofit:
            return
        recurrence = self.model.recurrence
        for option_name, is_bad, value, wanted in (
            ("core_layers", not self.model.is_recurrent, self.model.core_layers, "1 or more"),
            (
                "recurrence.core_width",
                self.model.core_width != self.model.width,
                recurrence.core_width,
                "None",
            ),
            ("recurrence.adapter", recurrence.adapter == "gate", recurrence.adapter, "'linear'"),
            ("recurrence.head_norm", not recurrence.head_norm, recurrence.head_norm, "True"),
            (
                "sharing.scheme",
                self.model.sharing.scheme != "none",
                self.model.sharing.scheme,
                "'none'",
            ),
        ):
            if is_bad:
                raise ConfigError(
                    f"model.{option_name}",
                    f"{value!r} does not go with fine_tuning.retrofit=True; set it to {wanted}.",
                )

    @rule("fine_tuning.retrofit", "fine_tuning.train_only", "fine_tuning.lora.targets")
    def _retrofit_trains_its_adapter(self) -> None:
        """With the linear adapter, core/adapter/state_kernel, which starts at zero, is trained."""
        path = "core/adapter/state_kernel"
        options = self.fine_tuning
        is_linear = self.model.recurrence.adapter == "linear"
        if options.retrofit and is_linear and not options.trains(path):
            name = "lora.targets" if options.lora.rank else "train_only"
            name = "freeze" if options.freeze else name
            raise ConfigError(
                f"fine_tuning.{name}",
                f"{path} is not trained. With retrofit=True it starts at zero, so that iterations "
                "would never depend on each other; "
                + ("let freeze leave it out." if options.freeze else f"add {path!r}."),
            )

    @rule("data.media.tasks")
    def _tasks_fit_the_model(self) -> None:
        """With data.source='media', tasks of images need model.image.enabled=True and those of
        sound model.audio.enabled=True."""
        media = self.data.media
        for is_used, enabled, name, tasks in (
            (media.has_images, self.model.image.enabled, "image", IMAGE_TASKS),
            (media.has_audio, self.model.audio.enabled, "audio", AUDIO_TASKS),
        ):
            if self.data.source == "media" and is_used and not enabled:
                task = next(task for task in tasks if task in media.task_weights)
                raise ConfigError(
                    "data.media.tasks",
                    f"{task!r} needs a model with {name}, and model.{name}.enabled=False; set that "
                    "to True, or leave the task out.",
                )

    @rule("model.image.enabled", "model.audio.enabled")
    def _media_models_have_media(self) -> None:
        """True only with data.source='media' and a task that uses it."""
        check_media_model(self)

    @rule("model.image", "model.audio")
    def _media_go_without_text_only_options(self) -> None:
        """Models with images or sound do not support text samples other than the defaults, and
        model.residual='admin'."""
        check_text_only_options(self)

    @rule("samples.num_media")
    def _media_samples_need_media(self) -> None:
        """Keep the default unless the model is a transformer with images or sound."""
        check_media_samples(self)

    @rule("model.max_length")
    def _sequences_with_media_fit(self) -> None:
        """At least data.sequence_length and the places of all media slots of a row."""
        check_sequence_room(self)

    @rule("model.attention.is_causal")
    def _answers_are_not_in_sight(self) -> None:
        """False only with data.source='reasoning', a task other than addition (whose digits are
        read one after another) and no evaluation.generated.metrics. sudoku and maze need False."""
        check_sight(self)

    @rule("optimizer.name")
    def _muon_has_matrices(self) -> None:
        """Not 'muon' with fine_tuning.lora.rank >= 1."""
        if self.optimizer.name == "muon" and self.fine_tuning.lora.rank:
            raise ConfigError(
                "optimizer.name",
                "'muon' makes updates of whole matrices orthogonal, and fine_tuning.lora.rank="
                f"{self.fine_tuning.lora.rank} trains the factors a and b, on which it does not "
                "act; set it to 'adamw'.",
            )

    @rule("train.exit_gate")
    def _gate_training_needs_a_gate(self) -> None:
        """Keep the default unless model.exit_gate.enabled=True."""
        if not self.model.exit_gate.enabled:
            names = [field.name for field in dataclasses.fields(ExitGateTrainingConfig)]
            try:
                require_defaults(
                    self.train.exit_gate,
                    names,
                    "with model.exit_gate.enabled=False",
                    "set model.exit_gate.enabled=True",
                )
            except ConfigError as error:
                raise error.below("train.exit_gate") from None

    @rule("fine_tuning.freeze", "fine_tuning.train_only")
    def _a_fresh_gate_is_trained(self) -> None:
        """With model.exit_gate.enabled=True, exit_gate/weight is trained, unless
        fine_tuning.init_from has a gate."""
        if self.fine_tuning.init_from is None or self.fine_tuning.retrofit:
            self.check_fresh_gate()

    def check_fresh_gate(self) -> None:
        """Checks that the gate is trained if there is one, given that it starts fresh.

        Raises:
          ConfigError: otherwise.
        """
        path, options = "exit_gate/weight", self.fine_tuning
        if self.model.exit_gate.enabled and not options.trains(path):
            raise ConfigError(
                "fine_tuning.freeze" if options.freeze else "fine_tuning.train_only",
                f"{path} is not trained, and with model.exit_gate.enabled=True the gate starts "
                "fresh, as no model to start from has one: it would say nothing, though "
                "train.exit_gate costs passes; "
                + ("let freeze leave it out" if options.freeze else "add '^exit_gate/'")
                + ", or set model.exit_gate.enabled=False.",
            )

    @rule("train.exit_gate.detach")
    def _a_detached_term_trains_something(self) -> None:
        """True only if fine_tuning trains the gate."""
        if self.train.exit_gate.detach and not self.fine_tuning.trains("exit_gate/weight"):
            raise ConfigError(
                "train.exit_gate.detach",
                "True lets the term train the gate alone, and fine_tuning freezes it; set it to "
                "False, or let fine_tuning train '^exit_gate/'.",
            )

    @rule("train.supervision.prior", "train.supervision.mix")
    def _supervision_fits_the_run(self) -> None:
        """A prior needs a core of at least 2 model.recurrence.mean_steps (or a max_steps). With
        mix=1 there is no pass at a drawn depth, so model.recurrence.sampling is 'fixed' and has no
        ramp, model.recurrence.kept_every is 1, train.stability is off and the data has no media.
        """
        check_supervision(self)

    @rule("train.stability.jacobian_weight", "train.stability.fixed_point_weight")
    def _stability_needs_a_core(self) -> None:
        """0 when model.core_layers=0."""
        for name in ("jacobian_weight", "fixed_point_weight"):
            weight = getattr(self.train.stability, name)
            if weight and not self.model.is_recurrent:
                raise ConfigError(
                    f"train.stability.{name}",
                    f"{weight} needs a core, and model.core_layers=0; set it to 0.",
                )

    @rule("train.stability.fixed_point_weight")
    def _fixed_point_needs_two_iterations(self) -> None:
        """0 when each draw is 1: sampling='fixed' with mean_steps=1, or max_steps=1."""
        recurrence, weight = self.model.recurrence, self.train.stability.fixed_point_weight
        most = recurrence.mean_steps if recurrence.sampling == "fixed" else recurrence.max_steps
        if weight and self.model.is_recurrent and most == 1:
            raise ConfigError(
                "train.stability.fixed_point_weight",
                f"{weight} looks at how far the last of several iterations moves the state, and "
                "training makes one iteration only; set it to 0, or raise "
                "model.recurrence.mean_steps.",
            )

    @rule("train.stability.fixed_point_weight", "model.recurrence.gradient")
    def _fixed_point_loss_sees_the_last_iteration(self) -> None:
        """0 with model.recurrence.gradient='implicit'."""
        weight, gradient = self.train.stability.fixed_point_weight, self.model.recurrence.gradient
        if weight and gradient == "implicit":
            raise ConfigError(
                "train.stability.fixed_point_weight",
                f"{weight} with model.recurrence.gradient='implicit', to which a state that still "
                "moves is settled, so that nothing pulls it there; set it to 0 "
                "(jacobian_weight goes with both), or gradient='truncated'.",
            )

    @rule("diagnostics.kinds", "diagnostics.num_steps")
    def _diagnostics_fit_the_model(self) -> None:
        """With model.core_layers=0 no recurrence, spectral_radius, depth_draws; num_steps=None."""
        if self.model.is_recurrent:
            return
        wrong = [kind for kind in self.diagnostics.kinds if kind in RECURRENT_KINDS]
        if wrong:
            raise ConfigError(
                "diagnostics.kinds",
                f"{wrong[0]!r} has no meaning with model.core_layers=0; leave it out.",
            )
        if self.diagnostics.num_steps is not None:
            raise ConfigError(
                "diagnostics.num_steps",
                f"{self.diagnostics.num_steps} has no meaning with model.core_layers=0; leave it "
                "None.",
            )

    @rule("diagnostics.num_rows")
    def _diagnosed_rows_are_in_the_batch(self) -> None:
        """At most data.batch_size unless diagnostics.every_steps=0."""
        num_rows, batch_size = self.diagnostics.num_rows, self.data.batch_size
        if self.diagnostics.every_steps and num_rows > batch_size:
            raise ConfigError(
                "diagnostics.num_rows",
                f"{num_rows} rows are more than a batch has, data.batch_size={batch_size}; use at "
                f"most {batch_size}.",
            )

    @rule("samples.depth")
    def _sample_depth_needs_a_core(self) -> None:
        """None when model.core_layers=0."""
        if not self.model.is_recurrent and self.samples.depth is not None:
            raise ConfigError(
                "samples.depth",
                f"{self.samples.depth} has no meaning with model.core_layers=0; leave it None.",
            )

    @rule("samples.prompts", "samples.max_new_tokens", "samples.temperature")
    def _text_samples_need_text(self) -> None:
        """Keep the default with data.source='reasoning', which shows solved problems instead."""
        if self.data.source == "reasoning":
            try:
                require_defaults(
                    self.samples,
                    ("prompts", "max_new_tokens", "temperature"),
                    "with data.source='reasoning'",
                    "choose another source",
                )
            except ConfigError as error:
                raise error.below("samples") from None

    @rule("evaluation.generated")
    def _generated_texts_have_prompts(self) -> None:
        """With metrics: on text, references are given. On reasoning, the task is addition or hop,
        and references, max_new_tokens and stop keep their defaults. Not with data.source='media'.
        """
        check_generated_texts(self)

    @rule("checkpoint.best_metric")
    def _best_metric_is_returned(self) -> None:
        """validation/exact_accuracy only with data.source='reasoning'; those of media only with
        the task of data.media that makes them; those of generated text only if
        evaluation.generated.metrics has them."""
        metric = self.checkpoint.best_metric
        if metric in GENERATED_METRICS:
            name = metric.removeprefix("validation/")
            if name not in self.evaluation.generated.metrics:
                raise ConfigError(
                    "checkpoint.best_metric",
                    f"{metric!r} needs {name!r} in evaluation.generated.metrics; add it, or use "
                    f"one of {', '.join(TEXT_METRICS)}.",
                )
            return
        if metric in MEDIA_METRICS:
            task = MEDIA_METRICS[metric][1]
            if self.data.source != "media" or task not in self.data.media.task_weights:
                raise ConfigError(
                    "checkpoint.best_metric",
                    f"{metric!r} needs data.source='media' with the task {task!r}; add it, or use "
                    f"one of {', '.join(TEXT_METRICS)}.",
                )
        elif self.data.source != "reasoning" and metric not in TEXT_METRICS:
            raise ConfigError(
                "checkpoint.best_metric",
                f"{metric!r} is returned by no validation on text; use one of "
                f"{', '.join(TEXT_METRICS)}, or data.source='reasoning'.",
            )
