"""What `megatransformer generate` shows in the terminal: texts as they come, depths as colours.

A single text is streamed; many are shown when they are finished, and saved if the command says so.
A session continues each line that is typed, and changes settings in between.
"""

import codecs
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.monitoring
from rich.console import Console
from rich.text import Text

from megatransformer_jax.cli.context import ChatContext, Context, TextContext, chat_prompts
from megatransformer_jax.cli.flags import (
    Parsed,
    named_as_written,
    unknown_name,
)
from megatransformer_jax.cli.generate_options import Prompts, check_can_stream
from megatransformer_jax.config.generation import (
    GENERATION_OPTIONS,
    GenerationConfig,
    MediaGenerationConfig,
)
from megatransformer_jax.config.option import ConfigError, UserError, parse_text
from megatransformer_jax.data.media_tokenizer import MARKERS, MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.generator import AnyPrompt, Generator
from megatransformer_jax.generation.media_prompt import MediaPrompt
from megatransformer_jax.generation.request import (
    Completion,
    GeneratedImage,
    GeneratedMedium,
    PromptTooLong,
    out_of_memory_is_bad_input,
)
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.storage import local_path

if TYPE_CHECKING:
    from megatransformer_jax.cli.generate_media import MediaFiles

# ------------------------------------------------------------------------------
# Colours: tokens by the iterations that each took.

# From few iterations to many; the terminal's own colours, so that its theme keeps them readable.
_COLORS = ("blue", "cyan", "green", "yellow", "red")
# What decoders write for bytes that are not a character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Screen:
    """Where prompts and continuations are shown.

    Args:
      console: the output. If it has no colours, text is written as it is.
      depth: most iterations of a token, for the colours; may be changed between texts. None:
        iterations are not shown.
    """

    def __init__(self, console: Console, depth: int | None):
        self.depth = depth
        self._console = console
        self._has_colors = console.color_system is not None and not console.no_color
        self._waiting: list[int] = []  # Iterations of tokens whose character is not complete.
        self._seen: list[int] = []

    def heading(self, text: str) -> None:
        """A line above one of several texts."""
        self._write(f"--- {text} ---\n", "bold")

    def prompt(self, text: str) -> None:
        """What is continued."""
        self._write(text, "dim")

    def token(self, text: str, steps: int) -> None:
        """The next token's text, which is empty if its character is not complete yet."""
        if self.depth is None:
            self._write(text)
            return
        self._seen.append(steps)
        self._waiting.append(steps)
        if not text:
            return
        if self._has_colors:
            self._write(text, color(max(self._waiting), self.depth))
        else:
            self._write(f"{text}[{','.join(map(str, self._waiting))}]")
        self._waiting = []

    def medium(self, name: str) -> None:
        """An image or a clip between the tokens."""
        self._waiting = []
        self._write(name)

    def end(self) -> None:
        """Ends a text."""
        if self._waiting and not self._has_colors:
            self._write(f"[{','.join(map(str, self._waiting))}]")
        self._waiting = []
        self._write("\n")

    def legend(self) -> None:
        """What the colours mean, and the mean since the last legend; nothing without tokens."""
        if self.depth is None or not self._seen:
            return
        self._write("iterations:")
        if self._has_colors:
            for first, last in color_ranges(self.depth):
                words = f" {first}" if first == last else f" {first}-{last}"
                self._write(words, color(first, self.depth))
            self._write(",")
        self._write(f" mean {sum(self._seen) / len(self._seen):.2f} of {self.depth}\n")
        self._seen = []

    def _write(self, text: str, style: str = "") -> None:
        if self._console.is_terminal:
            # A model may write the character that begins commands to the terminal.
            text = text.replace("\x1b", _INCOMPLETE)
        if self._has_colors:
            self._console.print(Text(text, style), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
            self._console.file.flush()


def color(steps: int, depth: int) -> str:
    """The colour of a token that took `steps` of at most `depth` iterations."""
    return _COLORS[min(max(steps - 1, 0) * len(_COLORS) // depth, len(_COLORS) - 1)]


def color_ranges(depth: int) -> Iterator[tuple[int, int]]:
    """First and last number of iterations of each colour that occurs."""
    first = 1
    for steps in range(1, depth + 1):
        if steps == depth or color(steps + 1, depth) != color(steps, depth):
            yield first, steps
            first = steps + 1


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[str]:
    """The part of `text` that each token adds; the token that completes a character has all of it.

    Args:
      tokenizer: that of the model.
      token_ids: generated tokens.
      text: what they stand for, perhaps without a space at its start or a stop text at its end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.piece_bytes(token)) for token in token_ids]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    # Where each token's part begins and ends in `text`.
    ends = list(itertools.accumulate(map(len, texts), initial=-max("".join(texts).find(text), 0)))
    return [text[max(begin, 0) : max(end, 0)] for begin, end in itertools.pairwise(ends)]


# ------------------------------------------------------------------------------
# Time that programs run, with the time that JAX takes to compile them kept apart.

# Tracing, lowering and compiling; each is reported at its end with its length.
_COMPILE_EVENTS = "/jax/core/compile/"


class Stopwatch:
    """Seconds since it was started, without those of compilation.

    Use it as a context manager: inside, it listens to JAX.
    """

    def __init__(self) -> None:
        self._compilations: list[tuple[float, float]] = []  # Intervals that do not overlap.
        self._started = (time.perf_counter(), 0.0)

    def __enter__(self) -> "Stopwatch":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def start(self) -> None:
        """Sets it to 0."""
        self._started = (time.perf_counter(), self._compiled())

    def seconds(self) -> float:
        """Time since the start, compilation left out."""
        return time.perf_counter() - self._started[0] - self.compile_seconds()

    def compile_seconds(self) -> float:
        """Compilation since the start."""
        return self._compiled() - self._started[1]

    def _compiled(self) -> float:
        return sum(end - begin for begin, end in self._compilations)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith(_COMPILE_EVENTS):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        # One function's tracing holds that of the functions it calls.
        while self._compilations and self._compilations[-1][1] > begin:
            begin = min(begin, self._compilations.pop()[0])
        self._compilations.append((begin, end))


# ------------------------------------------------------------------------------
# Texts of prompts: one as it comes, or many.

# What a command line can ask to continue.
ShownPrompt = str | Sequence[int] | MediaPrompt


def continue_texts(loaded: LoadedModel, parsed: Parsed, prompts: Prompts) -> None:
    """Continues the prompts of a command, with their media, or talks.

    Args:
      loaded: the model.
      parsed: the command line.
      prompts: what is continued; not read in an interactive session.

    Raises:
      UserError: if an option or a prompt does not fit the model, or a file cannot be written.
    """
    options, media = parsed.options, None
    given: Sequence[ShownPrompt] = prompts
    if options.chat:
        given = chat_prompts(loaded.tokenizer, options.system, [str(prompt) for prompt in prompts])
    elif _wants_media(parsed, prompts):
        # It imports what reads and draws images, which takes long.
        from megatransformer_jax.cli.generate_media import MediaFiles  # noqa: PLC0415

        media = MediaFiles(loaded, parsed)
        given = media.prompts(prompts)
        parsed = media.fitted(given)
    screen = Screen(Console(), depth=None)

    def make_generator(config: GenerationConfig) -> Generator:
        generator = loaded.generator(config)
        if options.show_depth:
            screen.depth = generator.config.depth.depth
        return generator

    with Stopwatch() as stopwatch:
        if options.interactive:
            context: Context = TextContext(None if media is None else media.prompt)
            if options.chat:
                context = ChatContext(loaded.tokenizer, options.system)
            Session(make_generator, parsed.given, screen, stopwatch, context=context).run()
        else:
            generator = make_generator(parsed.generation)
            tokenizer = loaded.tokenizer
            continue_prompts(generator, tokenizer, given, parsed, screen, stopwatch, media)


def _wants_media(parsed: Parsed, prompts: Prompts) -> bool:
    """Whether the command has to do with media: by its options, or a marker in a prompt."""
    has_markers = any(
        marker in text for text in prompts if isinstance(text, str) for marker in MARKERS
    )
    has_options = parsed.generation.media != MediaGenerationConfig()
    return parsed.options.names_media or has_options or has_markers


def continue_prompts(
    generator: Generator,
    tokenizer: Tokenizer | None,
    prompts: Sequence[ShownPrompt],
    parsed: Parsed,
    screen: Screen,
    stopwatch: Stopwatch,
    media: "MediaFiles | None" = None,
) -> None:
    """Shows the continuations of all prompts, and writes them to files if the command says so.

    Raises:
      UserError: if a prompt or the file cannot be used.
    """
    if _streams(parsed, prompts):
        _show_prompt(prompts[0], tokenizer, parsed, screen)
        stream(generator, prompts[0], tokenizer is not None, screen, stopwatch)
        return
    stopwatch.start()
    with out_of_memory_is_bad_input():
        completions = generator.generate(prompts)
    seconds = stopwatch.seconds()
    num_samples = parsed.generation.num_samples
    names = [[_name(part) for part in completion.media] for completion in completions]
    if media is not None and parsed.options.output is not None:
        names = media.write(completions)
    for index, completion in enumerate(completions):
        prompt = prompts[index // num_samples]
        if len(completions) > 1:
            screen.heading(
                f"prompt {index // num_samples + 1}, text {index % num_samples + 1}: "
                f"{completion.finish_reason}, score {completion.score:.2f}"
            )
        _show_prompt(prompt, tokenizer, parsed, screen)
        _show(completion, tokenizer, screen, names[index])
    screen.legend()
    steps = [count for completion in completions for count in completion.depths]
    num_media = sum(map(len, names))
    line = summary(steps, seconds, None, stopwatch.compile_seconds(), num_media)
    print(line, file=sys.stderr)
    if parsed.options.output is not None:
        print(f"files are in {parsed.options.output}", file=sys.stderr)
    if parsed.options.json is not None:
        _write_json(parsed.options.json, completions, prompts, num_samples)


def stream(
    generator: Generator,
    prompt: AnyPrompt,
    has_text: bool,
    screen: Screen,
    stopwatch: Stopwatch,
) -> str:
    """Shows one continuation as it comes, then how fast it came; returns its text.

    On Ctrl-C the text so far stays on the screen, the line is ended, and KeyboardInterrupt goes on.
    """
    steps: list[int] = []
    texts = []
    first_seconds, num_media = None, 0
    stopwatch.start()
    try:
        with out_of_memory_is_bad_input():
            for token in generator.stream(prompt):
                if first_seconds is None:
                    first_seconds = stopwatch.seconds()
                steps.append(token.depth)
                texts.append(token.text if has_text else f" {token.token_id}")
                if token.medium is None:
                    screen.token(texts[-1], token.depth)
                else:
                    num_media += 1
                    screen.medium(_name(token.medium))
    finally:
        screen.end()
    seconds = stopwatch.seconds()
    screen.legend()
    compile_seconds = stopwatch.compile_seconds()
    print(summary(steps, seconds, first_seconds, compile_seconds, num_media), file=sys.stderr)
    return "".join(texts)


def summary(
    steps: Sequence[int],
    seconds: float,
    first_seconds: float | None,
    compile_seconds: float,
    num_media: int = 0,
) -> str:
    """The line about speed.

    Args:
      steps: iterations of each token.
      seconds: all of them took, without compilation.
      first_seconds: the first one took, if it is known.
      compile_seconds: compilation besides.
      num_media: images and clips among them.
    """
    if not steps:
        return f"no token in {seconds:.2f} s"
    parts = [
        f"{len(steps)} tokens in {seconds:.2f} s ({len(steps) / max(seconds, 1e-9):.1f} tokens/s)"
    ]
    if num_media:
        parts.append(f"{num_media} images and clips")
    if first_seconds is not None:
        parts.append(f"the first after {first_seconds:.3f} s")
    parts.append(f"mean depth {sum(steps) / len(steps):.2f}")
    if compile_seconds >= 0.01:
        parts.append(f"compilation took {compile_seconds:.1f} s more")
    return ", ".join(parts)


def _streams(parsed: Parsed, prompts: Sequence[ShownPrompt]) -> bool:
    """Whether the result is one text that can be shown as it comes, and not written to a file."""
    try:
        check_can_stream(parsed.generation)
    except ConfigError:
        return False
    options = parsed.options
    return len(prompts) == 1 and options.json is None and options.output is None


def _show(
    completion: Completion, tokenizer: Tokenizer | None, screen: Screen, names: Sequence[str]
) -> None:
    """Tokens, and the names of media in the places of the tokens that close them."""
    if tokenizer is None:
        texts = [f" {token}" for token in completion.token_ids]
    else:
        texts = token_texts(tokenizer, completion.token_ids, completion.text)
    left = iter(names)
    closing = tokenizer.closing_ids if isinstance(tokenizer, MediaTokenizer) else ()
    for token, text, steps in zip(completion.token_ids, texts, completion.depths, strict=True):
        if token in closing:
            screen.medium(next(left))
        else:
            screen.token(text, steps)
    screen.end()


def _name(medium: GeneratedMedium) -> str:
    """What is shown of a medium that is not kept."""
    return "[image]" if isinstance(medium, GeneratedImage) else "[sound]"


def _show_prompt(
    prompt: ShownPrompt, tokenizer: Tokenizer | None, parsed: Parsed, screen: Screen
) -> None:
    """What is continued. An answer in a chat stands alone."""
    if not parsed.options.chat:
        screen.prompt(_shown(prompt, tokenizer))


def _shown(prompt: ShownPrompt, tokenizer: Tokenizer | None) -> str:
    if isinstance(prompt, str | MediaPrompt):
        return str(prompt)
    return " ".join(map(str, prompt)) if tokenizer is None else tokenizer.decode(prompt)


def _write_json(
    name: str, completions: Sequence[Completion], prompts: Sequence[ShownPrompt], num_samples: int
) -> None:
    lines = []
    for index, completion in enumerate(completions):
        prompt = prompts[index // num_samples]
        record = {
            "prompt": completion.prompt,
            "prompt_ids": None if isinstance(prompt, str | MediaPrompt) else list(prompt),
            "sample": index % num_samples,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "depths": list(completion.depths),
            "score": completion.score,
            "finish_reason": completion.finish_reason,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    try:
        local_path("json", name).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json={name}: cannot be written ({error.strerror}); choose another file."
        ) from error


# ------------------------------------------------------------------------------
# A session in the terminal.

HELP = """\
A line of text is continued, or with --chat answered; what stands before it is kept as context until
/reset.
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
      context: what was said so far. None: a text.
    """

    def __init__(
        self,
        make_generator: Callable[[GenerationConfig], Generator],
        given: Mapping[str, Any],
        screen: Screen,
        stopwatch: Stopwatch,
        read: Callable[[str], str] = input,
        context: Context | None = None,
    ):
        self._make_generator = make_generator
        self._given = dict(given)
        self._generator = make_generator(GenerationConfig.of(**given))
        self._screen = screen
        self._stopwatch = stopwatch
        self._read = read
        self._context = TextContext() if context is None else context

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
                print(f"error: {error}{self._hint(error)}", file=sys.stderr)

    def _hint(self, error: UserError) -> str:
        """What to do here about a text that has grown too long."""
        is_too_long = isinstance(error, PromptTooLong) and not self._context.is_empty
        return " /reset forgets the text so far." if is_too_long else ""

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
        try:
            with named_as_written(GENERATION_OPTIONS, "/"):
                given = self._context.prompt(line)
                text = stream(self._generator, given, True, self._screen, self._stopwatch)
        except KeyboardInterrupt:
            print("stopped; the line is not kept as context.", file=sys.stderr)
            return
        self._context.keep(line, text)

    def _command(self, words: str) -> None:
        name, _, text = words.strip().partition(" ")
        name, text = name.replace("-", "_"), text.strip()
        if name in ("help", "reset", "settings", "quit") and text:
            raise UserError(f"/{name} takes no value, but {text!r} is given.")
        if name == "help":
            print(HELP)
        elif name == "reset":
            self._context.reset()
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
        with named_as_written(GENERATION_OPTIONS, "/"):
            config = GenerationConfig.of(**given)
            check_can_stream(config)
            self._generator = self._make_generator(config)
        self._given = given
