"""The options of `megatransformer generate`, and the prompts that they name; without JAX."""

import codecs
import dataclasses
from collections.abc import Sequence

from megatransformer_jax.cli.model_options import MeshOptions, ModelOptions
from megatransformer_jax.config.build import json_object
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError, option, rule
from megatransformer_jax.config.sampling import check_encodable
from megatransformer_jax.storage import as_path

_PROMPT_SOURCES = ("prompt", "prompts_file", "prompt_ids", "interactive")


@dataclasses.dataclass(frozen=True)
class GenerateOptions(MeshOptions, ModelOptions):
    """What is continued, with which model, and where the result goes."""

    prompt: tuple[str, ...] = option((), "Text to continue; may be repeated.")
    prompts_file: str | None = option(
        None,
        'One prompt per line (.txt), or JSON lines with {"prompt": "..."} (.jsonl). Blank lines '
        "are left out.",
    )
    prompt_ids: tuple[int, ...] = option(
        (),
        "Token ids to continue, taken as they are, so with the model's start token if it is to "
        "have one; for models without a tokenizer too.",
        minimum=0,
    )
    interactive: bool = option(
        False, "Reads lines and streams their continuations; /help lists commands for settings."
    )
    chat: bool = option(
        False,
        "Takes every prompt, or line of --interactive, as a message of a chat: it is written with "
        "the chat template that came with the model's tokenizer.",
    )
    system: str | None = option(None, "With chat: the system message before the first prompt.")
    json: str | None = option(
        None,
        "Also writes every text with its ids, iterations and score to this file, as JSON lines.",
    )
    show_depth: bool = option(
        False,
        "Colours each token by the number of iterations it took. Without colours the number "
        "follows the token, as in token[3].",
    )

    image: tuple[str, ...] = option(
        (),
        "Image file; may be repeated. Images are placed where the prompt has <|IMAGE|><|/IMAGE|>, "
        "or before it.",
    )
    audio: tuple[str, ...] = option(
        (),
        "Sound file (WAV, FLAC), as --image; its place is <|VOICE|><|/VOICE|> or "
        "<|AUDIO|><|/AUDIO|>.",
    )
    convert: bool = option(
        False, "Resizes images and resamples sound whose format differs from the model's."
    )
    draw: bool = option(False, "Draws an image right after each prompt; needs output.")
    speak: bool = option(False, "Speaks right after each prompt; needs output.")
    output: str | None = option(
        None,
        "Folder for what is made: PNG and WAV files, contact_sheet.png and results.jsonl.",
    )
    vocoder: str | None = option(
        None,
        "Folder of a run with kind='vocoder', which makes the waveforms. Default (None): Griffin "
        "and Lim's method.",
    )

    @property
    def names_media(self) -> bool:
        """Whether an option asks for images or sound."""
        return bool(self.image or self.audio or self.draw or self.speak or self.output)

    @rule("prompt", "prompts_file", "prompt_ids", "interactive")
    def _prompts_have_one_source(self) -> None:
        """Exactly one of prompt, prompts_file, prompt_ids and interactive; or image or audio."""
        given = [name for name in _PROMPT_SOURCES if getattr(self, name) not in (None, (), False)]
        if not given and not (self.image or self.audio):
            raise ConfigError(
                "prompt",
                'is missing; give --prompt="...", or --prompts_file, --prompt_ids or '
                "--interactive.",
            )
        if len(given) > 1:
            raise ConfigError(
                given[1], f"does not go together with --{given[0]}; give one of the two."
            )

    @rule("prompt")
    def _prompts_have_text(self) -> None:
        """No empty text, only UTF-8."""
        if "" in self.prompt:
            raise ConfigError(
                "prompt",
                "is empty; give some text. To start from nothing, give the id of the start token "
                "with --prompt_ids.",
            )
        check_encodable("prompt", self.prompt)

    @rule("chat", "system")
    def _chats_are_of_text(self) -> None:
        """chat not with prompt_ids, images and sound; system only with chat."""
        if self.chat and (self.prompt_ids or self.names_media):
            name = "prompt_ids" if self.prompt_ids else "chat"
            raise ConfigError(name, "a chat is of text alone; leave --chat or the other out.")
        if self.system is not None and not self.chat:
            raise ConfigError("system", "would be ignored without --chat.")

    @rule("json")
    def _json_needs_finished_texts(self) -> None:
        """Not with interactive."""
        if self.json is not None and self.interactive:
            raise ConfigError("json", "does not go together with --interactive; leave one out.")

    @rule("image", "audio")
    def _files_belong_to_one_prompt(self) -> None:
        """With at most one prompt, and no prompts_file."""
        for name in ("image", "audio"):
            if getattr(self, name) and (self.prompts_file is not None or len(self.prompt) > 1):
                raise ConfigError(name, "belongs to one prompt; give one --prompt, or none.")

    @rule("image", "audio", "draw", "speak", "output")
    def _media_need_prompts_of_text(self) -> None:
        """Not with prompt_ids and json; draw, speak and output not with interactive either."""
        names = ["prompt_ids", "json"] if self.names_media else []
        if self.draw or self.speak or self.output:
            names.append("interactive")
        for name in names:
            if getattr(self, name) not in (None, (), False):
                raise ConfigError(name, "is for text alone; leave it out (results go to --output).")

    @rule("draw", "speak")
    def _one_medium_comes_first(self) -> None:
        """Not both, and only with output."""
        if self.draw and self.speak:
            raise ConfigError("speak", "does not go together with --draw; leave one out.")
        if (self.draw or self.speak) and self.output is None:
            name = "draw" if self.draw else "speak"
            raise ConfigError(name, "needs a folder for the result; give --output=FOLDER.")

    @rule("convert", "vocoder")
    def _media_options_have_an_effect(self) -> None:
        """convert only with image or audio, vocoder only with output."""
        if self.convert and not (self.image or self.audio):
            raise ConfigError("convert", "would be ignored without --image or --audio.")
        if self.vocoder is not None and self.output is None:
            raise ConfigError("vocoder", "would be ignored without --output=FOLDER.")


def check_can_stream(config: GenerationConfig) -> None:
    """Checks that there is one text, whose tokens are final as they come.

    Raises:
      ConfigError: if there are several, or beam search.
    """
    if config.num_samples > 1:
        raise ConfigError(
            "num_samples",
            f"{config.num_samples} texts cannot be shown at once as they come; leave it at 1.",
        )
    if config.strategy == "beam":
        raise ConfigError(
            "strategy", "'beam' knows its text only at the end, so cannot stream; use another."
        )


# ------------------------------------------------------------------------------
# Prompts, checked before a model is loaded.

# Texts, or lists of token ids.
Prompts = Sequence[str] | Sequence[Sequence[int]]


def read_prompts(options: GenerateOptions) -> Prompts:
    """The prompts of a command; none if it is interactive.

    Raises:
      UserError: if a file cannot be used; names the line.
    """
    if options.prompts_file is not None:
        return read_prompts_file(options.prompts_file)
    return [options.prompt_ids] if options.prompt_ids else options.prompt


def read_prompts_file(name: str) -> list[str]:
    """One prompt per line of a .txt file, or per JSON object of a .jsonl file.

    Empty lines are left out, as is a byte order mark. Other fields of an object are not read.

    Raises:
      UserError: for another extension, an unreadable file, a bad line, or no prompt at all.
    """
    path = as_path("prompts_file", name)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"--prompts_file={name}: the name must end in .txt (a prompt per line) or .jsonl "
            '({"prompt": "..."} per line), so that it is known how to read it.'
        )
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(
            f"--prompts_file={name}: cannot be read ({error.strerror or error}); name another file."
        ) from error
    prompts = []
    for number, raw in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        line = _decoded(raw, where)
        if line.strip():
            prompts.append(line if path.suffix == ".txt" else _prompt_of(line, where))
    if not prompts:
        raise UserError(f"--prompts_file={name}: has no prompt; write one per line.")
    return prompts


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file, for example "
            "with `iconv -f latin1 -t utf-8`."
        ) from error


def _prompt_of(line: str, where: str) -> str:
    form = 'write it as {"prompt": "..."}.'
    record = json_object(line, where, form)
    if "prompt" not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}: no field 'prompt'; its fields: {fields}; {form}")
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f"{where}: 'prompt' is {prompt!r}; it must be a text, not an empty one.")
    check_encodable(where, (prompt,))
    return prompt
