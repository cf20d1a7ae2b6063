"""Tokenises and packs the data of a run once: `megatransformer prepare`."""

import dataclasses
import os
import sys

from megatransformer_jax.cli.flags import PROGRAM, Command, Parsed
from megatransformer_jax.cli.model_options import check_output_is_named, output_option
from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    check_options,
    option,
    rule,
)
from megatransformer_jax.config.run_kinds import require_transformer


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Where the rows go, and how the work is shared."""

    output: str | None = output_option()
    workers: int | None = option(
        None,
        "Processes that tokenise; the files do not depend on it. Default (None): one per CPU, but "
        "at most one per file of the training split.",
        minimum=1,
        maximum=1024,
    )
    shard_mb: int = option(
        32,
        "Megabytes of text in each file, about; there are at most 256 files per split. What is "
        "not finished when the command is killed is lost, a file per process.",
        minimum=1,
        maximum=MAX_COUNT,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        check_output_is_named(self.output)


def prepare(parsed: Parsed) -> None:
    """Prepares the data that the configuration names.

    Raises:
      UserError: if it cannot be prepared or written.
    """
    options: PrepareOptions = parsed.options
    if parsed.config is None:
        raise ConfigError(
            "config",
            f"is missing; name an experiment, such as {PROGRAM} prepare --config=recurrent "
            "--output=tokens.",
        )
    config = require_transformer(parsed.config)
    assert options.output is not None  # A rule says so.
    if "jax" not in sys.modules:
        # Nothing is computed, and an accelerator may be in use by a run.
        os.environ["JAX_PLATFORMS"] = "cpu"
    from megatransformer_jax.runs.prepare import prepare as prepare_rows  # noqa: PLC0415

    done = prepare_rows(
        config, options.output, num_workers=options.workers, shard_mb=options.shard_mb
    )
    if done.num_bytes:
        megabytes = done.num_bytes / 1e6
        print(
            f"{megabytes:,.1f} MB in {done.duration_s:.1f} s, "
            f"{megabytes / max(done.duration_s, 1e-9):.1f} MB/s"
        )
    else:
        print("nothing was left to do")
    print(f"{done.rows:,} rows of {done.tokens:,} tokens -> {options.output}")


COMMAND = Command(
    name="prepare",
    doc="""Tokenises and packs the data of a run once, for data.source='tokens'.

Trains the tokenizer, or takes the one that the configuration names, and writes the rows of both
splits into files that processes can share: each then reads its own rows only, and nothing is
tokenised while training. Killed and started again it goes on where it stopped. Train on it with
--config.data.source=tokens --config.data.files=OUTPUT.""",
    options=PrepareOptions,
    run=prepare,
    examples=(
        "--config=recurrent --output=tokens/topics",
        "--config=recurrent --config.data.source=jsonl --config.data.files='corpus/*.jsonl' \\\n"
        "      --output=tokens/corpus --workers=8",
    ),
    takes_run=True,
)
