"""Continues the prompts of a reference file at each depth, and scores the texts."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from experiments.evaluate_flags import Command
from experiments.evaluation_data import DEFAULT_BATCH_SIZE
from experiments.load_model import LoadedModel
from experiments.reference_file import Reference, read_references
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.lm_eval import continue_in_batches
from megatransformer_jax.evaluation.text_metrics import (
    make_text_table,
    score_texts,
    write_text_scores,
)
from megatransformer_jax.generation.request import encode_prompts


def evaluate_generation(
    command: Command,
    loaded: LoadedModel,
    depths: Sequence[int | None],
    output: pathlib.Path,
    progress: Progress,
) -> Sequence[pathlib.Path]:
    """Prints the table and writes it, and predictions.jsonl with the texts of every depth.

    Args:
      command: with references.
      loaded: the model.
      depths: iterations of the core; None: the model has none.
      output: an existing folder.
      progress: shows how far it is.

    Returns:
      The files that were written.

    Raises:
      UserError: if the model has no tokenizer, or an option or a prompt does not fit it.
    """
    options = command.options
    assert options.references is not None
    references = read_references(options.references, needs_prompts=True)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.description} has no tokenizer, so it continues no text.")
    prompts = encode_prompts(
        [reference.prompt for reference in references], loaded.tokenizer, loaded.config.vocab_size
    )
    configs = {depth: _at_depth(command, depth) for depth in depths}

    texts: dict[int | None, list[str]] = {}
    with progress:
        task = progress.add_task("generating", total=len(prompts) * len(depths))
        for depth, config in configs.items():
            completions = continue_in_batches(
                loaded.generator,
                config,
                prompts,
                batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
                progress=lambda count: progress.advance(task, count),
            )
            texts[depth] = [completion.text for completion in completions]
    targets = [reference.texts for reference in references]
    scores = {depth: score_texts(found, targets) for depth, found in texts.items()}
    Console().print(make_text_table(scores, loaded.trained_depth))
    predictions = _write_predictions(output, references, texts)
    return [*write_text_scores(output, scores, loaded.trained_depth), predictions]


def _at_depth(command: Command, depth: int | None) -> GenerationConfig:
    config = command.generation
    return dataclasses.replace(
        config,
        seed=command.options.seed or 0,
        depth=dataclasses.replace(config.depth, depth=depth),
    )


def _write_predictions(
    output: pathlib.Path,
    references: Sequence[Reference],
    texts: dict[int | None, list[str]],
) -> pathlib.Path:
    path = output / "predictions.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for depth, found in texts.items():
            for reference, text in zip(references, found, strict=True):
                record = {
                    "depth": depth,
                    "prompt": reference.prompt,
                    "text": text,
                    "reference": reference.texts,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path
