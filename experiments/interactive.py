"""A session in the terminal: each line is continued, commands change the settings in between."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.continuations import stream
from experiments.depth_colors import Screen
from experiments.generate_flags import (
    GENERATION_OPTIONS,
    check_can_stream,
    generation_from,
    named_as_written,
    unknown_name,
)
from experiments.stopwatch import Stopwatch
from experiments.text_generator import TextGenerator
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError, parse_text

HELP = """\
A line of text is continued; the text before it is kept as context until /reset.
  /depth 16, /temperature 0.7   set an option, each one of those of --help; numbers take effect
                                at once, other options may compile once,
                                as does text twice as long
  /top_p default                back to the option's default
  /settings                     the options that are set
  /reset                        forgets the text so far
  /help                         this
  /quit                         leaves, as the end of the input does
Ctrl-C ends a continuation. A line that begins with // is text that begins with /."""


class Session:
    """Reads lines and shows their continuations until the input ends or says /quit.

    Args:
      make_generator: from the settings; called again after each change of them.
      given: options that are set at the start, by short names.
      screen: shows the continuations.
      stopwatch: measures them.
      read: the next line, asked for with a mark; EOFError at the end of the input.
    """

    def __init__(
        self,
        make_generator: Callable[[GenerationConfig], TextGenerator],
        given: Mapping[str, Any],
        screen: Screen,
        stopwatch: Stopwatch,
        read: Callable[[str], str] = input,
    ):
        self._make_generator = make_generator
        self._given = dict(given)
        self._generator = make_generator(generation_from(given))
        self._screen = screen
        self._stopwatch = stopwatch
        self._read = read
        self._context = ""

    def run(self) -> None:
        """Goes on until the end of the input."""
        # A piped input shows no mark, and a terminal remembers lines.
        mark = ">>> " if sys.stdin.isatty() else ""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415
        while True:
            try:
                line = self._read(mark)
            except (EOFError, KeyboardInterrupt) as end:
                if mark:
                    print()  # The line that the mark stands on is not ended.
                if isinstance(end, EOFError):
                    return
                raise
            except UnicodeDecodeError as error:
                raise UserError(f"the input is not UTF-8 ({error.reason}); convert it.") from error
            if line.strip() == "/quit":
                return
            try:
                self.handle(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def handle(self, line: str) -> None:
        """Does what a line says.

        Raises:
          UserError: if it cannot be done; the session is as before.
        """
        if line.startswith("/") and not line.startswith("//"):
            self._command(line[1:])
        elif line:
            self._continue(line[1:] if line.startswith("//") else line)

    def _continue(self, line: str) -> None:
        is_at_line_start = not self._context or self._context.endswith("\n")
        prompt = self._context + ("" if is_at_line_start else "\n") + line
        try:
            with named_as_written("/"):
                text = stream(self._generator, prompt, True, self._screen, self._stopwatch)
        except KeyboardInterrupt:
            print("stopped; the line is not kept as context.", file=sys.stderr)
            return
        self._context = prompt + text

    def _command(self, words: str) -> None:
        name, _, text = words.strip().partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name in ("help", "reset", "settings", "quit") and text:
            raise UserError(f"/{name} takes no value, but {text!r} is given.")
        if name == "help":
            print(HELP)
        elif name == "reset":
            self._context = ""
        elif name == "settings":
            print("\n".join(f"/{key} {value}" for key, value in self._given.items()) or "defaults")
        else:
            self._set(name, text)

    def _set(self, name: str, text: str) -> None:
        if name not in GENERATION_OPTIONS:
            commands = ["help", "reset", "settings", "quit"]
            raise unknown_name(name, [*GENERATION_OPTIONS, *commands], "/")
        declared = GENERATION_OPTIONS[name].declared
        if not text:
            raise UserError(f"/{name} needs a value, or 'default'.")
        given = {key: value for key, value in self._given.items() if key != name}
        if text != "default":
            try:
                given[name] = parse_text(text, declared)
            except UserError as error:
                raise UserError(f"/{name}: {error}") from None
        with named_as_written("/"):
            config = generation_from(given)
            check_can_stream(config)
            self._generator = self._make_generator(config)
        self._given = given
