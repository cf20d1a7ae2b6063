"""Scores a trained model at several depths: `megatransformer evaluate`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    ModelOptions,
    load_chosen_model,
)
from megatransformer_jax.config.option import ConfigError, option, part_of, require_defaults, rule
from megatransformer_jax.config.scoring import OF_GENERATION, ScoringConfig, check_generation
from megatransformer_jax.storage import AnyPath, as_path, make_and_probe, write_into

if TYPE_CHECKING:
    from rich.table import Table

_OF_MODEL = ("step", "weights", "depths", "batch_size", "precision", "param_dtype", "seed")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(ScoringConfig, ModelOptions):
    """What is evaluated, on what, and where the result goes."""

    predictions: str | None = option(
        None,
        'JSON lines {"text": "..."}, one per line of references: these texts are scored instead, '
        "without a model.",
    )
    output: str | None = option(
        None,
        "Folder for tables and plots, made if absent. Default (None): evaluation/ in the model's "
        "folder; with predictions nothing is written.",
    )

    @rule("model")
    def _something_is_evaluated(self) -> None:
        """Given, unless there are predictions."""
        if self.model is None and self.predictions is None:
            raise ConfigError("model", "is missing; give the folder of a run, as runs/recurrent.")
        if self.model is not None and self.predictions is not None:
            raise ConfigError(
                "predictions", "are scored without a model; leave out the model or the predictions."
            )

    @rule("references")
    def _predictions_need_references(self) -> None:
        """Given with predictions."""
        if self.predictions is not None and self.references is None:
            raise ConfigError(
                "references", "is missing; predictions are compared with the texts of this file."
            )

    @rule(*_OF_MODEL)
    def _predictions_have_no_model(self) -> None:
        """Only without predictions."""
        if self.predictions is not None:
            require_defaults(self, _OF_MODEL, "with predictions", "leave predictions out")

    @property
    def scoring(self) -> ScoringConfig:
        """On what the model is scored, and how."""
        return part_of(self, ScoringConfig)


def _check_generation(options: EvaluateOptions, given: Mapping[str, Any]) -> None:
    check_generation(given, has_prompts=options.references is not None and not options.predictions)


def evaluate(parsed: Parsed) -> None:
    """Scores, prints tables and writes files.

    Raises:
      UserError: if an option does not fit the model, or a file or folder cannot be used.
    """
    options: EvaluateOptions = parsed.options
    # These import JAX, which takes long.
    from megatransformer_jax.generation.request import (  # noqa: PLC0415
        out_of_memory_is_bad_input,
    )
    from megatransformer_jax.runs.evaluate import evaluate as score  # noqa: PLC0415
    from megatransformer_jax.runs.evaluate_text import score_predictions  # noqa: PLC0415

    folder: AnyPath | None = None
    if options.predictions is not None:
        assert options.references is not None  # A rule says so.
        report = score_predictions(options.references, options.predictions)
        if options.output is not None:
            folder = make_and_probe("output", as_path("output", options.output))
    else:
        loaded = load_chosen_model(options)
        # A model of the hub has no folder here.
        if options.output is not None or options.folder.is_dir():
            output = options.output or options.folder / "evaluation"
            folder = make_and_probe("output", as_path("output", output))
        with out_of_memory_is_bad_input():
            report = score(loaded, options.scoring, parsed.generation)
    _print(report.tables)
    if folder is not None:
        for path in write_into(folder, report.write):
            logging.info("written: %s", path)


def _print(tables: Sequence["Table"]) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    for table in tables:
        console.print(table)


COMMAND = Command(
    name="evaluate",
    doc="""Scores a trained model at several depths.

Perplexity of text, answers to problems, or texts that it generates, by BLEU, chrF, ROUGE and exact
match. Of a model with images and sound also its captions, transcripts and losses, and how many of
the digits that it makes a judge recognises.

The table goes to stdout; files with the same numbers and plots go to a folder. A line of references
is {"prompt": "...", "reference": "..."}, or a list of several references. A line of predictions is
{"text": "..."}, as megatransformer generate --json writes it. Options of generation go with
references; texts are greedy unless --strategy says otherwise.""",
    options=EvaluateOptions,
    run=evaluate,
    examples=(
        "--model=runs/recurrent --step=best --depths=1,2,4,8",
        "--model=my/huginn --files=my/book.txt --depths=8,32",
        "--model=runs/recurrent --references=my/references.jsonl --max_new_tokens=32 \\\n"
        "      --stop=\"['\\n']\"",
        "--references=my/references.jsonl --predictions=my/texts.jsonl",
        "--model=runs/image --depths=4 --media_per_class=50",
    ),
    generation=OF_GENERATION,
    check=_check_generation,
    generation_defaults={"strategy": "greedy"},
    old_names={**OLD_MODEL_NAMES, "data": "files"},
    hints={
        "depth": "did you mean --depths? --help lists all.",
        "prompts_file": "did you mean --references? --help lists all.",
    },
)
