"""The session: context, settings that change live, errors that do not end it."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from small_generator import SmallGenerator

from megatransformer_jax.cli.screen import Screen, Session, Stopwatch
from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.request import PromptTooLong


class Talk:
    """A session with lines given in advance."""

    def __init__(self, *lines: str, **given: Any):
        self.file = io.StringIO()
        self.generators: list[SmallGenerator] = []
        self._lines: Iterator[str] = iter(lines)
        screen = Screen(Console(file=self.file), None)
        self.session = Session(self._make, given, screen, Stopwatch(), self._read)

    def _make(self, config: Any) -> SmallGenerator:
        self.generators.append(SmallGenerator(config))
        return self.generators[-1]

    def _read(self, mark: str) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None

    def run(self) -> str:
        self.session.run()
        return self.file.getvalue()

    @property
    def prompts(self) -> list[Any]:
        return [prompt for generator in self.generators for prompt in generator.prompts]


def test_lines_are_continued_with_what_was_before_as_context() -> None:
    talk = Talk("ab", "", "c", "/reset", "d", max_new_tokens=2)
    assert talk.run() == "ba\nc\n\nd\n"
    assert talk.prompts == ["ab", "abba\nc", "d"]


def test_a_text_may_begin_with_a_slash() -> None:
    talk = Talk("//a")
    talk.run()
    assert talk.prompts == ["/a"]


def test_settings_change_at_once_and_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(
        "/depth 16",
        "/temperature 0.7",
        "/stop ['.', ',']",
        "/top-p 0.5",
        "/top_p default",
        "/settings",
        "abcdef",
        seed=3,
    )
    talk.run()
    config = talk.generators[-1].config
    assert (config.depth.depth, config.sampling.temperature) == (16, 0.7)
    assert (config.stop, config.seed, config.sampling.top_p) == ((".", ","), 3, None)
    assert talk.generators[-1].prompts == ["abcdef"]
    assert capsys.readouterr().out == ("/seed 3\n/depth 16\n/temperature 0.7\n/stop ('.', ',')\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/dpeth 3", r"^/dpeth: no such option; did you mean /depth\? /help lists all\."),
        ("/resett", r"did you mean /reset\?"),
        ("/depth", r"^/depth needs a value, or 'default'"),
        ("/depth deep", r"^/depth: 'deep' is not a whole number"),
        ("/depth 0", r"^/depth: 0 is not allowed; it must be at least 1"),
        ("/top_p 2", r"^/top_p: 2\.0 is not allowed"),
        ("/temperature 0", r"^/temperature: 0 draws nothing"),
        ("/strategy beam", r"^/strategy: 'beam' .* cannot stream"),
        ("/num_samples 2", r"^/num_samples: 2 texts"),
        ("/num_beams 2", r"^/num_beams: 2 would be ignored"),
        ("/reset now", r"^/reset takes no value"),
        ("/quit now", r"^/quit takes no value"),
        ("x" * 100, r"^/cache_capacity: the prompt has 100 tokens"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    line: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk()
    with pytest.raises(UserError, match=problem):
        talk.session.handle(line)
    assert len(talk.generators) == 1
    again = Talk(line, "ab", "/settings")
    assert again.run().strip() == "ba"
    assert again.prompts[-1] == "ab"
    shown = capsys.readouterr()
    assert "error: " in shown.err
    assert shown.out == "defaults\n"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    Talk("/help", "/quit", "not read").run()
    text = capsys.readouterr().out
    for command in ("/depth 16", "/temperature 0.7", "/settings", "/reset", "/help", "/quit"):
        assert command in text


@pytest.mark.parametrize(
    ("error", "is_told"), [(PromptTooLong("full."), True), (UserError("full."), False)]
)
def test_a_text_that_has_grown_too_long_can_be_forgotten(
    error: UserError,
    is_told: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = SmallGenerator.stream

    def stream(self: SmallGenerator, prompt: Any) -> Iterator[Any]:
        if len(prompt) > 4:
            raise error
        return original(self, prompt)

    monkeypatch.setattr(SmallGenerator, "stream", stream)
    Talk("ab", "c", "/reset", "abcde").run()
    lines = capsys.readouterr().err.splitlines()
    first, second = [line for line in lines if line.startswith("error")]
    assert first == "error: full." + " /reset forgets the text so far." * is_told
    assert second == "error: full."


def test_quit_leaves() -> None:
    talk = Talk("/quit", "a")
    assert talk.run() == ""


def test_ctrl_c_ends_a_continuation_and_not_the_session(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SmallGenerator.stream

    def stream(self: SmallGenerator, prompt: Any) -> Iterator[Any]:
        for token in original(self, prompt):
            yield token
            if prompt == "stop":
                raise KeyboardInterrupt

    monkeypatch.setattr(SmallGenerator, "stream", stream)
    talk = Talk("stop", "ab")
    assert talk.run() == "p\nba\n"
    assert talk.prompts == ["stop", "ab"]
    assert "stopped" in capsys.readouterr().err


def test_ctrl_c_at_the_mark_leaves() -> None:
    def read(mark: str) -> str:
        raise KeyboardInterrupt

    talk = Talk()
    talk.session._read = read
    with pytest.raises(KeyboardInterrupt):
        talk.run()


def test_input_that_is_no_text_is_an_error() -> None:
    def read(mark: str) -> str:
        return b"\xff".decode("utf-8")

    talk = Talk()
    talk.session._read = read
    with pytest.raises(UserError, match="not UTF-8"):
        talk.run()


def test_the_first_settings_are_checked() -> None:
    with pytest.raises(UserError, match="top_p"):
        Talk(top_p=2.0)
