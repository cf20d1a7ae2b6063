"""Scores texts against references: those that a model generates at each depth, or given ones.

References are JSON lines, one object per text:

    {"prompt": "The capital of France is", "reference": "Paris."}
    {"prompt": "Translate: Guten Tag", "reference": ["Good day", "Hello"]}

Predictions are JSON lines with a field "text", as `megatransformer generate --json` writes them,
one for each reference in the same order. Other fields are not read; empty lines are left out.
"""

import codecs
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.progress import Progress

from megatransformer_jax.config.build import json_object
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.config.scoring import ScoringConfig
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.evaluation.text_metrics import (
    ScoresByDepth,
    make_text_table,
    plot_text_scores,
    score_texts,
    text_rows,
    write_text_scores,
)
from megatransformer_jax.generation.generator import continue_in_batches
from megatransformer_jax.generation.request import encode_prompts
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.storage import as_path


def evaluate_generation(
    loaded: LoadedModel,
    options: ScoringConfig,
    generation: GenerationConfig,
    depths: Sequence[int | None],
    *,
    batch_size: int,
    progress: Progress,
) -> Report:
    """Continues the prompts of a reference file at each depth, and scores the texts.

    The report also writes predictions.jsonl with the texts of every depth.

    Args:
      loaded: the model.
      options: with references.
      generation: how prompts are continued; its depth and seed are still open.
      depths: iterations of the core; None: the model has none.
      batch_size: prompts that are continued at once.
      progress: shows how far it is.

    Raises:
      UserError: if the model has no tokenizer, or an option or a prompt does not fit it.
    """
    assert options.references is not None
    references = read_references(options.references, needs_prompts=True)
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.description} has no tokenizer, so it continues no text.")
    prompts = encode_prompts(
        [reference.prompt for reference in references], loaded.tokenizer, loaded.config.vocab_size
    )
    configs = {depth: _at_depth(generation, depth, options) for depth in depths}

    texts: dict[int | None, list[str]] = {}
    with progress:
        task = progress.add_task("generating", total=len(prompts) * len(depths))
        for depth, config in configs.items():
            completions = continue_in_batches(
                loaded.generator,
                config,
                prompts,
                batch_size=batch_size,
                progress=lambda count: progress.advance(task, count),
            )
            texts[depth] = [completion.text for completion in completions]
    targets = [reference.texts for reference in references]
    scores = {depth: score_texts(found, targets) for depth, found in texts.items()}

    def write(folder: pathlib.Path) -> list[pathlib.Path]:
        predictions = _write_predictions(folder, references, texts)
        return [*write_text_scores(folder, scores, loaded.trained_depth), predictions]

    return dataclasses.replace(_report(scores, loaded.trained_depth), write=write)


def score_predictions(references_file: str, predictions_file: str) -> Report:
    """Scores the texts of a file, without a model.

    Raises:
      UserError: if a file cannot be used, or there is not one text per reference.
    """
    references = read_references(references_file, needs_prompts=False)
    texts = read_predictions(predictions_file, count=len(references))
    return _report({None: score_texts(texts, [reference.texts for reference in references])}, None)


def _report(scores: ScoresByDepth, trained_depth: int | None) -> Report:
    return Report(
        text_rows(scores),
        [make_text_table(scores, trained_depth)],
        functools.partial(write_text_scores, scores=scores, trained_depth=trained_depth),
        functools.partial(plot_text_scores, scores, trained_depth),
    )


def _at_depth(
    config: GenerationConfig, depth: int | None, options: ScoringConfig
) -> GenerationConfig:
    changed = dataclasses.replace(
        config.depth,
        depth=depth,
        gate_readout=options.gate_readout,
        gate_threshold=options.gate_threshold,
    )
    return dataclasses.replace(config, seed=options.seed or 0, depth=changed)


def _write_predictions(
    output: pathlib.Path,
    references: Sequence["Reference"],
    texts: Mapping[int | None, list[str]],
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


# ------------------------------------------------------------------------------
# Files of references and of predictions.

_REFERENCE_FORM = 'write it as {"prompt": "...", "reference": "..."}, or a list of references.'
_PREDICTION_FORM = 'write it as {"text": "..."}.'


@dataclasses.dataclass(frozen=True)
class Reference:
    """A prompt and its right continuations; the prompt is None where none is needed."""

    prompt: str | None
    texts: tuple[str, ...]


def read_references(name: str, *, needs_prompts: bool) -> list[Reference]:
    """The references of a file.

    Args:
      name: of the file.
      needs_prompts: whether each line must have a prompt.

    Raises:
      UserError: if the file cannot be used; names the line.
    """
    references = []
    for where, record in _records(name, "references", _REFERENCE_FORM):
        prompt = record.get("prompt")
        if needs_prompts and (not isinstance(prompt, str) or not prompt):
            raise UserError(
                f"{where}: 'prompt' is {prompt!r}; it must be a text, not an empty one; "
                f"{_REFERENCE_FORM}"
            )
        texts = record.get("reference")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{where}: 'reference' is {texts!r}; {_REFERENCE_FORM}")
        check_encodable(where, [*texts, *([prompt] if isinstance(prompt, str) else [])])
        references.append(Reference(prompt if isinstance(prompt, str) else None, tuple(texts)))
    return references


def read_predictions(name: str, *, count: int) -> list[str]:
    """The texts of a file.

    Args:
      name: of the file.
      count: how many there must be.

    Raises:
      UserError: if the file cannot be used; names the line.
    """
    texts = []
    for where, record in _records(name, "predictions", _PREDICTION_FORM):
        text = record.get("text")
        if not isinstance(text, str):
            raise UserError(f"{where}: 'text' is {text!r}; {_PREDICTION_FORM}")
        texts.append(text)
    if len(texts) != count:
        raise ConfigError(
            "predictions",
            f"{name} has {len(texts)} texts for {count} references; write one for each, in the "
            "same order.",
        )
    return texts


def _records(name: str, option: str, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not empty."""
    try:
        raw = as_path(option, name).read_bytes().removeprefix(codecs.BOM_UTF8)
        lines = raw.decode("utf-8").split("\n")
    except OSError as error:
        raise ConfigError(
            option, f"{name} cannot be read ({error.strerror or error}); name another file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(option, f"{name} is not UTF-8 ({error}); convert it.") from error
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        record = json_object(line, where, form)
        is_empty = False
        yield where, record
    if is_empty:
        raise ConfigError(option, f"{name} has no text; {form}")
