"""Devices and processes of a run, as frozen dataclasses."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product must be the number of devices of all processes."""

    data: int = option(-1, "Batch axis. -1: all devices that the other axes leave.", minimum=-1)
    fsdp: int = option(1, "Batch axis over which parameters are sharded too.", minimum=1)
    tensor: int = option(1, "Heads, feed-forward and vocabulary axis.", minimum=1)
    sequence: int = option(1, "Sequence axis.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("data")
    def _data_axis_is_not_empty(self) -> None:
        """Not 0. The product of all axes is the number of devices (checked when they are known)."""
        if self.data == 0:
            raise ConfigError("data", "0 is not allowed; use -1 (what is left) or at least 1.")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Start of `jax.distributed`. On TPU pods set enabled alone; the rest is found by JAX."""

    enabled: bool = option(False, "Joins several processes into one run.")
    coordinator: str | None = option(None, "host:port of process 0.")
    num_processes: int | None = option(None, "How many processes.", minimum=1)
    process_id: int | None = option(None, "Which one this is, from 0.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("coordinator", "num_processes", "process_id")
    def _process_options_go_together(self) -> None:
        """All three or none, and only with enabled=True."""
        given = [self.coordinator, self.num_processes, self.process_id]
        if not self.enabled and any(value is not None for value in given):
            raise ConfigError("enabled", "False, yet process options are given; set enabled=True.")
        if len({value is None for value in given}) > 1:
            raise ConfigError(
                "coordinator",
                f"coordinator={self.coordinator!r}, num_processes={self.num_processes!r}, "
                f"process_id={self.process_id!r}: give all three, or none.",
            )

    @rule("process_id")
    def _process_is_one_of_them(self) -> None:
        """Below num_processes."""
        if self.num_processes is None or self.process_id is None:
            return
        if self.process_id >= self.num_processes:
            raise ConfigError(
                "process_id",
                f"{self.process_id} is not below num_processes={self.num_processes}; "
                "processes count from 0.",
            )
