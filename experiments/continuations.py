"""Continues the prompts of one command: streams a single text, or shows and saves many."""

import json
import pathlib
import sys
from collections.abc import Sequence

from experiments.depth_colors import Screen, token_texts
from experiments.generate_flags import Command, check_can_stream
from experiments.out_of_memory import out_of_memory_is_bad_input
from experiments.prompts import Prompts
from experiments.stopwatch import Stopwatch
from experiments.text_generator import Completion, TextGenerator
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.tokenizer import Tokenizer


def continue_prompts(
    generator: TextGenerator,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    command: Command,
    screen: Screen,
    stopwatch: Stopwatch,
) -> None:
    """Shows the continuations of all prompts, and writes them to a file if the command says so.

    Raises:
      UserError: if a prompt or the file cannot be used.
    """
    if _streams(command, prompts):
        screen.prompt(_shown(prompts[0], tokenizer))
        stream(generator, prompts[0], tokenizer is not None, screen, stopwatch)
        return
    stopwatch.start()
    with out_of_memory_is_bad_input():
        completions = generator.generate(prompts)
    seconds = stopwatch.seconds()
    num_samples = command.config.num_samples
    for index, completion in enumerate(completions):
        prompt = prompts[index // num_samples]
        if len(completions) > 1:
            screen.heading(
                f"prompt {index // num_samples + 1}, text {index % num_samples + 1}: "
                f"{completion.finish_reason}, score {completion.score:.2f}"
            )
        screen.prompt(_shown(prompt, tokenizer))
        _show(completion, tokenizer, screen)
    screen.legend()
    steps = [count for completion in completions for count in completion.steps]
    print(summary(steps, seconds, None, stopwatch.compile_seconds()), file=sys.stderr)
    if command.options.json is not None:
        _write_json(command.options.json, completions, prompts, num_samples)


def stream(
    generator: TextGenerator,
    prompt: str | Sequence[int],
    has_text: bool,
    screen: Screen,
    stopwatch: Stopwatch,
) -> str:
    """Shows one continuation as it comes, then how fast it came; returns its text.

    On Ctrl-C the text so far stays on the screen, the line is ended, and KeyboardInterrupt goes on.
    """
    steps: list[int] = []
    texts = []
    first_seconds = None
    stopwatch.start()
    try:
        with out_of_memory_is_bad_input():
            for token in generator.stream(prompt):
                if first_seconds is None:
                    first_seconds = stopwatch.seconds()
                steps.append(token.steps)
                texts.append(token.text if has_text else f" {token.token_id}")
                screen.token(texts[-1], token.steps)
    finally:
        screen.end()
    seconds = stopwatch.seconds()
    screen.legend()
    print(summary(steps, seconds, first_seconds, stopwatch.compile_seconds()), file=sys.stderr)
    return "".join(texts)


def summary(
    steps: Sequence[int], seconds: float, first_seconds: float | None, compile_seconds: float
) -> str:
    """The line about speed.

    Args:
      steps: iterations of each token.
      seconds: all of them took, without compilation.
      first_seconds: the first one took, if it is known.
      compile_seconds: compilation besides.
    """
    if not steps:
        return f"no token in {seconds:.2f} s"
    parts = [
        f"{len(steps)} tokens in {seconds:.2f} s ({len(steps) / max(seconds, 1e-9):.1f} tokens/s)"
    ]
    if first_seconds is not None:
        parts.append(f"the first after {first_seconds:.3f} s")
    parts.append(f"mean depth {sum(steps) / len(steps):.2f}")
    if compile_seconds >= 0.01:
        parts.append(f"compilation took {compile_seconds:.1f} s more")
    return ", ".join(parts)


def check_json_path(name: str) -> None:
    """Checks before the work that its result can be written.

    Raises:
      UserError: if the folder is not there.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"folder {path.parent} does not exist"
        raise UserError(f"--json={name}: {problem}; name a file in a folder that is there.")


def _streams(command: Command, prompts: Prompts) -> bool:
    """Whether the result is one text that can be shown as it comes, and needs no score."""
    try:
        check_can_stream(command.config)
    except ConfigError:
        return False
    return len(prompts) == 1 and command.options.json is None


def _show(completion: Completion, tokenizer: Tokenizer | None, screen: Screen) -> None:
    if tokenizer is None:
        texts = [f" {token}" for token in completion.token_ids]
    else:
        texts = token_texts(tokenizer, completion.token_ids, completion.text)
    for text, steps in zip(texts, completion.steps, strict=True):
        screen.token(text, steps)
    screen.end()


def _shown(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(map(str, prompt)) if tokenizer is None else tokenizer.decode(prompt)


def _write_json(
    name: str, completions: Sequence[Completion], prompts: Prompts, num_samples: int
) -> None:
    lines = []
    for index, completion in enumerate(completions):
        prompt = prompts[index // num_samples]
        record = {
            "prompt": completion.prompt,
            "prompt_ids": None if isinstance(prompt, str) else list(prompt),
            "sample": index % num_samples,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "steps": list(completion.steps),
            "score": completion.score,
            "finish_reason": completion.finish_reason,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    try:
        pathlib.Path(name).expanduser().write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json={name}: cannot be written ({error.strerror}); choose another file."
        ) from error
