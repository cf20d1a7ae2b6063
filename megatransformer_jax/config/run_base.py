"""What runs of every kind have: data, optimiser, mesh, loop, checkpoints, logging."""

import abc
import dataclasses

from megatransformer_jax.config.data import LoaderConfig
from megatransformer_jax.config.fine_tuning import TRAIN_ALL, FineTuningConfig
from megatransformer_jax.config.loop import (
    DataMeshConfig,
    DistributedConfig,
    LoggingConfig,
    LoopConfig,
    SavingConfig,
    ShowingConfig,
    ValidationConfig,
)
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    compilation_cache_option,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.storage import CHECKPOINTS, NO_CHECKPOINTS, check_served, is_bucket_path

RUN_KINDS = ("transformer", "vocoder", "image_vae")
TASKS = ("text", "reasoning", "media", "vocoder", "image_vae")


def kind_option(default: str, choices: tuple[str, ...] = RUN_KINDS) -> str:
    """What a run trains."""
    return option(
        default,
        "What is trained. transformer: the model. vocoder: from mel spectrograms to waveforms. "
        "image_vae: an autoencoder, for decoders of images in latent space. Each kind has its own "
        "options; one that belongs to another kind is an error.",
        choices=choices,
    )


@dataclasses.dataclass(frozen=True)
class BaseRunConfig(abc.ABC):
    """A run of any kind. `megatransformer_jax.config.run_kinds` has the classes."""

    kind: str = kind_option("transformer")
    workdir: str = option("runs/recurrent", "Checkpoints, metrics, logs, samples and plots.")
    lock_owner: str | None = option(
        None,
        "Name of the run that the lock of a workdir in a bucket is in. A start with the same name "
        "takes it over at once, as a run does that comes back on another machine; others wait "
        "until it is five minutes old. Default (None): the name of the machine.",
    )
    steal_lock: bool = option(
        False,
        "Takes the lock of a workdir in a bucket from the run that has it. That run ends before it "
        "saves again. config.json does not keep this option.",
    )
    environment: tuple[str, ...] = option(
        (),
        "NAME=value pairs put into the process environment before JAX starts, such as XLA_FLAGS.",
    )
    compilation_cache_dir: str | None = compilation_cache_option()
    data: LoaderConfig = section(LoaderConfig, "Data.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "Optimiser.")
    train: LoopConfig = section(LoopConfig, "Training loop.")
    mesh: DataMeshConfig = section(DataMeshConfig, "Device mesh.")
    distributed: DistributedConfig = section(DistributedConfig, "Multi-process start.")
    checkpoint: SavingConfig = section(SavingConfig, "Checkpoints.")
    evaluation: ValidationConfig = section(ValidationConfig, "Validation.")
    samples: ShowingConfig = section(ShowingConfig, "Samples.")
    logging: LoggingConfig = section(LoggingConfig, "Logging.")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    @abc.abstractmethod
    def task(self) -> str:
        """What is learned, one of `TASKS`."""

    @property
    def trained_parts(self) -> FineTuningConfig:
        """Which parameters are trained; all unless the kind of run can choose."""
        return TRAIN_ALL

    @rule("workdir")
    def _workdir_is_named(self) -> None:
        """Not empty."""
        if not self.workdir:
            raise ConfigError("workdir", "'' is not a folder; name one, such as 'runs/mine'.")

    @rule("workdir")
    def _workdir_is_served(self) -> None:
        """A folder of this machine, or gs://BUCKET/PATH, which needs the extra 'gcs'."""
        check_served("workdir", self.workdir, CHECKPOINTS, NO_CHECKPOINTS)

    @rule("logging.mirror")
    def _bucket_is_not_copied(self) -> None:
        """None if the workdir is in a bucket itself."""
        if self.logging.mirror is not None and is_bucket_path(self.workdir):
            raise ConfigError(
                "logging.mirror",
                f"{self.logging.mirror!r} would be a copy of a bucket, workdir={self.workdir!r}; "
                "leave it None.",
            )

    @rule("lock_owner", "steal_lock")
    def _bucket_has_a_lock(self) -> None:
        """Keep the default unless workdir or logging.mirror is in a bucket."""
        if self.lock_owner is not None and not self.lock_owner.strip():
            raise ConfigError("lock_owner", f"{self.lock_owner!r} is not a name; give one.")
        if not any(map(is_bucket_path, filter(None, (self.workdir, self.logging.mirror)))):
            require_defaults(
                self,
                ("lock_owner", "steal_lock"),
                f"with workdir={self.workdir!r}, whose lock ends with its process",
                "leave it out",
            )

    @rule("environment")
    def _environment_has_pairs(self) -> None:
        """Each item is NAME=value, each name once."""
        names = [item.partition("=")[0] for item in self.environment]
        for item, name in zip(self.environment, names, strict=True):
            if "=" not in item or not name.isidentifier():
                raise ConfigError(
                    "environment",
                    f"{item!r} is not a NAME=value pair; write for example 'JAX_PLATFORMS=cpu'.",
                )
            if names.count(name) > 1:
                raise ConfigError("environment", f"sets {name} twice; keep one of them.")

    @rule("data.batch_size")
    def _batch_fits_processes(self) -> None:
        """Divisible by distributed.num_processes."""
        if self.data.batch_size % (self.distributed.num_processes or 1):
            raise ConfigError(
                "data.batch_size",
                f"{self.data.batch_size} is not divisible by distributed.num_processes="
                f"{self.distributed.num_processes}; use a multiple.",
            )

    @rule("train.accumulation")
    def _accumulation_divides_the_batch(self) -> None:
        """Divides data.batch_size."""
        if self.data.batch_size % self.train.accumulation:
            raise ConfigError(
                "train.accumulation",
                f"{self.train.accumulation} does not divide data.batch_size="
                f"{self.data.batch_size}; use a divisor.",
            )

    @rule("optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.decay_fraction")
    def _schedule_fits_the_run(self) -> None:
        """Warm-up and decay take at most train.steps together."""
        decay_steps = self.optimizer.num_decay_steps(self.train.steps)
        if self.optimizer.warmup_steps + decay_steps > self.train.steps:
            raise ConfigError(
                "optimizer.warmup_steps",
                f"{self.optimizer.warmup_steps} + {decay_steps} steps of the final decay exceed "
                f"train.steps={self.train.steps}; shorten them.",
            )

    @rule("train.ema_decay")
    def _weights_are_averaged_once(self) -> None:
        """None with optimizer.name='schedule_free_*', which evaluates an average already."""
        if self.optimizer.is_schedule_free and self.train.ema_decay is not None:
            raise ConfigError(
                "train.ema_decay",
                f"{self.train.ema_decay} does not go with optimizer.name={self.optimizer.name!r}, "
                "which evaluates an average already; leave it None.",
            )

    @rule("checkpoint.every_steps")
    def _best_checkpoints_are_validated(self) -> None:
        """With checkpoint.keep_best, a multiple or a divisor of evaluation.every_steps."""
        saves, validations = self.checkpoint.every_steps, self.evaluation.every_steps
        if self.checkpoint.keep_best and saves % validations and validations % saves:
            raise ConfigError(
                "checkpoint.every_steps",
                f"{saves} and evaluation.every_steps={validations} seldom coincide, so that "
                "checkpoint.keep_best would have few to choose from; make one a multiple of the "
                "other, or set checkpoint.keep_best=0.",
            )
