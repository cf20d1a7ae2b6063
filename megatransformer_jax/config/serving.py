"""Options of a server, and what a request to it may say besides how its texts are generated."""

import dataclasses
import ipaddress
import re
from collections.abc import Sequence

from megatransformer_jax.config.generation import GENERATION_OPTIONS
from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
)
from megatransformer_jax.config.sampling import (
    cache_exited_reads_option,
    cache_sharing_option,
    cache_slots_option,
    check_anchor,
)

CRITERIA = GENERATION_OPTIONS["exit_criterion"].check.choices

# What a server has if the model says nothing smaller.
DEFAULT_CAPACITY = 2048
# Requests may ask for so many times the trained mean depth, unless `max_depth` says otherwise.
DEPTH_FACTOR = 4
# Widths of compiled arrays, one row each per text.
MAX_LOGIT_BIAS = 32
MAX_END_IDS = 4
# Widest `logprobs` of OpenAI's chat.
MAX_LOGPROBS = 20
# As OpenAI's.
MAX_STOPS = 4
DEFAULT_MAX_TOKENS = 16

_OF_THE_CORE = (
    "criteria",
    "cache_slots",
    "cache_sharing",
    "cache_exited_reads",
    "max_depth",
    "min_waiting",
)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# A name or an address, without scheme, port and path.
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_ORIGIN = re.compile(r"https?://[^\s/?#@]+")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,127}")


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How a model is served. Shapes are fixed at the start; what requests say compiles nothing."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: every interface; set "
        "api_key_file too.",
    )
    port: int = option(8000, "Port to listen on. 0: any free one.", minimum=0, maximum=65535)
    name: str | None = option(
        None, "Name of the model in requests and answers. Default (None): that of its folder."
    )
    rows: int = option(
        8, "Texts that are generated at once; each has a row of the cache.", minimum=1, maximum=4096
    )
    capacity: int | None = option(
        None,
        "Tokens per row, prompt included; rounded up to whole blocks of the cache. Default (None): "
        f"max_length of the model, at most {DEFAULT_CAPACITY}.",
        minimum=2,
        maximum=MAX_COUNT,
    )
    chunk: int = option(
        64,
        "Prompt tokens that are read between two launches, at most.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    short_chunks: tuple[int, ...] = option(
        (8, 16),
        "Prompt tokens of shorter chunks, a program each: for short prompts, and while whole ones "
        "would keep a text that is streamed waiting for most of a token. Sizes from chunk on "
        "are left out.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    criteria: tuple[str, ...] = option(
        (),
        "Exit criteria that requests may choose from; they are compiled in. Default (empty): all "
        "that the model has. Those that read logits cost time only while a request uses them.",
        choices=CRITERIA,
    )
    max_depth: int | None = option(
        None,
        "Largest depth of a request. Default (None): cache_slots, or four times the trained mean "
        "if that is more.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    cache_slots: int | None = cache_slots_option()
    cache_sharing: str = cache_sharing_option()
    cache_exited_reads: str = cache_exited_reads_option()
    prefix_reuse: bool = option(
        True,
        "Copies the cached rows of a prompt's beginning from a text that began alike, instead of "
        "reading it again.",
    )
    min_waiting: int | None = option(
        None,
        "Rows that must have finished their token before the next one is begun. 1: none waits for "
        "another; rows: all tokens keep step. Default (None): chosen from the depths of recent "
        "tokens.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_ticks: int = option(
        64,
        "Iterations of a launch, at most; a text that is cancelled frees its row after them.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_turns: int = option(
        4,
        "Tokens that a row may get in one launch, while nobody who is served streams and no prompt "
        "is being read. More take less of the host's time; a request that comes waits for them.",
        minimum=1,
        maximum=1024,
    )
    max_prefill_share: float = option(
        0.5,
        "Share of the time that reading prompts may take while texts are being generated.",
        above=0,
        maximum=1,
    )
    max_bypasses: int = option(
        8,
        "How often prompts with less left to read may overtake one that is being read.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    queue: int = option(
        64, "Texts that may wait for a row; more are refused.", minimum=0, maximum=MAX_COUNT
    )
    max_prompts: int = option(64, "Prompts of a request, at most.", minimum=1, maximum=MAX_COUNT)
    max_n: int = option(16, "Texts per prompt, at most.", minimum=1, maximum=MAX_COUNT)
    max_tokens: int | None = option(
        None,
        "New tokens per text, at most. Default (None): as many as a row has room for.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_logprobs: int = option(
        MAX_LOGPROBS,
        "Likeliest tokens that a request may ask for at each place.",
        minimum=1,
        maximum=MAX_LOGPROBS,
    )
    max_body_bytes: int = option(
        2**20, "Bytes of a request, at most.", minimum=1024, maximum=MAX_COUNT
    )
    request_seconds: float = option(
        600.0, "Seconds after which a request ends with what it has.", above=0, maximum=86400
    )
    shutdown_seconds: float = option(
        30.0, "Seconds that open requests have to end after SIGTERM.", minimum=0, maximum=86400
    )
    api_key_file: str | None = option(
        None,
        "File whose first line is the key that requests must show. Default (None): the "
        "environment variable MEGATRANSFORMER_API_KEY, and without it anyone may ask.",
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Host names by which the server may be addressed; *: any. Default (empty): names of this "
        "machine's loopback if it listens there, otherwise any.",
    )
    cors_origins: tuple[str, ...] = option(
        (),
        "Origins whose pages may read answers, such as https://example.org; *: any. Default "
        "(empty): none but the server's own.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("host")
    def _host_is_an_address(self) -> None:
        """A name or an address, without a port."""
        if not _HOST.fullmatch(self.host):
            raise ConfigError(
                "host", f"{self.host!r} is not an address; write it as 127.0.0.1 or localhost."
            )

    @rule("name")
    def _name_can_be_written(self) -> None:
        """Letters, digits and . _ / @ : - only, at most 128."""
        if self.name is not None and not _MODEL_NAME.fullmatch(self.name):
            raise ConfigError(
                "name",
                f"{self.name!r} is not a name; use at most 128 letters, digits and . _ / @ : -, a "
                "letter or digit first.",
            )

    @rule("criteria")
    def _criteria_differ(self) -> None:
        """Each once."""
        if len(set(self.criteria)) < len(self.criteria):
            raise ConfigError(
                "criteria", f"{self.criteria} names one twice; name each once: {CRITERIA}."
            )

    @rule("cache_sharing")
    def _anchor_needs_two_slots(self) -> None:
        """anchor needs at least 2 slots."""
        check_anchor(self.cache_sharing, self.cache_slots, "cache_")

    @rule("cache_slots")
    def _slots_fit_the_depth(self) -> None:
        """At most max_depth."""
        slots, depth = self.cache_slots, self.max_depth
        if slots is not None and depth is not None and slots > depth:
            raise ConfigError(
                "cache_slots",
                f"{slots} exceeds max_depth={depth}, so {slots - depth} would stay empty; lower "
                "it.",
            )

    @rule("cache_exited_reads")
    def _exited_reads_need_exits(self) -> None:
        """Keep the default with criteria='fixed' alone."""
        if self.criteria == ("fixed",):
            require_defaults(
                self, ("cache_exited_reads",), "as no token exits early", "add a criterion"
            )

    @rule("min_waiting")
    def _no_more_wait_than_there_are(self) -> None:
        """At most rows."""
        if self.min_waiting is not None and self.min_waiting > self.rows:
            raise ConfigError(
                "min_waiting", f"{self.min_waiting} exceeds rows={self.rows}; lower it."
            )

    @rule("max_tokens")
    def _new_tokens_fit_a_row(self) -> None:
        """Below capacity, as the prompt needs room too."""
        if None not in (self.max_tokens, self.capacity) and self.max_tokens >= self.capacity:  # type: ignore[operator]
            raise ConfigError(
                "max_tokens",
                f"{self.max_tokens} leaves no room for a prompt in capacity={self.capacity}; lower "
                "it or raise capacity.",
            )

    @rule("allowed_hosts")
    def _hosts_are_names(self) -> None:
        """Names or addresses without port, or *."""
        for host in self.allowed_hosts:
            if host != "*" and not _HOST.fullmatch(host):
                raise ConfigError(
                    "allowed_hosts",
                    f"{host!r} is not a host name; write it as example.org, without http:// and "
                    "port.",
                )

    @rule("cors_origins")
    def _origins_are_origins(self) -> None:
        """Scheme and host, or *."""
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins",
                    f"{origin!r} is not an origin; write it as https://example.org, with the port "
                    "if there is one, and without a path.",
                )

    @property
    def is_local(self) -> bool:
        """Whether it listens on this machine's loopback only."""
        return is_loopback(self.host)

    def allows_host(self, header: str) -> bool:
        """Whether a request may name this host.

        A page of another site that has its name resolve to this machine is so kept out.

        Args:
          header: the value of Host, with or without port.
        """
        if "*" in self.allowed_hosts or (not self.allowed_hosts and not self.is_local):
            return True
        host = _without_port(header.strip()).lower().rstrip(".")
        if self.allowed_hosts:
            return host in {name.lower() for name in self.allowed_hosts}
        return host == self.host.lower() or is_loopback(host)

    def check_model_without_core(self) -> None:
        """Checks that nothing is asked of a core.

        Raises:
          ConfigError: if an option is not at its default.
        """
        require_defaults(self, _OF_THE_CORE, "as the model has no recurrent core", "leave it out")


def name_of_folder(folder: str) -> str:
    """A name for the model of a folder: the folder's, with - for what names may not have.

    Examples:
      >>> name_of_folder("my run (2)")
      'my-run-2'
    """
    name = re.sub(r"[^A-Za-z0-9._/@:-]+", "-", folder).strip("._/@:-")
    return name[:128] or "model"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, reachable from nowhere else."""
    if host.lower() in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(header: str) -> str:
    if header.startswith("["):  # [::1]:8000
        return header[1:].partition("]")[0]
    name, _, port = header.rpartition(":")
    return name if name and port.isdecimal() else header


# ------------------------------------------------------------------------------
# What a request may say besides the options of generation, by the names that OpenAI's have.


@dataclasses.dataclass(frozen=True)
class ModelNameConfig:
    """What every request may say."""

    model: str | None = option(
        None, "Name of the model, as /v1/models tells it. Default (null): the one that is served."
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class TokenizeRequestConfig(ModelNameConfig):
    """What a request to /tokenize may say besides its text."""

    add_special_tokens: bool = option(
        True, "The text gets the start token in front, as prompts do."
    )
    return_token_strs: bool = option(False, "The answer has the tokens as texts, too.")


@dataclasses.dataclass(frozen=True)
class RequestConfig(ModelNameConfig):
    """What requests for texts may say."""

    n: int = option(1, "Texts per prompt.", minimum=1, maximum=MAX_COUNT)
    stream: bool = option(
        False, "Sends tokens as they come, as server-sent events that end with [DONE]."
    )
    min_tokens: int = option(
        0, "No end token comes before so many new tokens.", minimum=0, maximum=MAX_COUNT
    )
    ignore_eos: bool = option(False, "The tokenizer's end tokens do not end a text.")
    stop_token_ids: tuple[int, ...] = option((), "More tokens that end a text.", minimum=0)
    return_token_ids: bool = option(False, "Choices have the ids of their tokens.")
    return_depths: bool = option(
        False, "Choices have the iterations of the core that led to each of their tokens."
    )
    user: str | None = option(
        None, "A name for whom the request is made. It changes nothing in the answer."
    )


@dataclasses.dataclass(frozen=True)
class CompletionRequestConfig(RequestConfig):
    """What a request to /v1/completions may say besides."""

    max_tokens: int = option(
        DEFAULT_MAX_TOKENS,
        "New tokens per text, at most. 0 with echo and logprobs scores the prompt alone.",
        minimum=0,
        maximum=MAX_COUNT,
    )
    logprobs: int | None = option(
        None,
        "Log-probabilities of the tokens, and of so many of the likeliest at each place. Default "
        "(null): none.",
        minimum=0,
        maximum=MAX_LOGPROBS,
    )
    echo: bool = option(False, "Texts begin with their prompt.")

    @rule("max_tokens")
    def _something_is_asked_for(self) -> None:
        """0 only with echo."""
        if self.max_tokens == 0 and not self.echo:
            raise ConfigError(
                "max_tokens",
                "0 generates nothing; raise it, or set echo=true, with which the prompt comes back "
                "(and its log-probabilities with logprobs).",
            )

    @rule("min_tokens")
    def _fewest_are_not_more_than_most(self) -> None:
        """At most max_tokens."""
        check_min_tokens(self.min_tokens, self.max_tokens)


@dataclasses.dataclass(frozen=True)
class ChatRequestConfig(RequestConfig):
    """What a request to /v1/chat/completions may say besides."""

    max_completion_tokens: int | None = option(
        None,
        "New tokens per text, at most. Default (null): as many as there is room for.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    max_tokens: int | None = option(
        None, "The older name of max_completion_tokens.", minimum=1, maximum=MAX_COUNT
    )
    logprobs: bool = option(False, "Choices have log-probabilities of their tokens.")
    top_logprobs: int | None = option(
        None,
        "So many of the likeliest tokens at each place. Default (null): none.",
        minimum=0,
        maximum=MAX_LOGPROBS,
    )

    @rule("max_tokens")
    def _one_name_is_enough(self) -> None:
        """Not given with max_completion_tokens."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ConfigError(
                "max_tokens", "is another name of max_completion_tokens; give one of the two."
            )

    @rule("top_logprobs")
    def _likeliest_come_with_log_probabilities(self) -> None:
        """Only with logprobs=true."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ConfigError(
                "top_logprobs",
                f"{self.top_logprobs} would be ignored without logprobs=true; set that, or leave "
                "it out.",
            )

    @rule("min_tokens")
    def _fewest_are_not_more_than_most(self) -> None:
        """At most max_completion_tokens."""
        most = self.max_completion_tokens or self.max_tokens
        if most is not None:
            check_min_tokens(self.min_tokens, most)


def check_min_tokens(least: int, most: int) -> None:
    """Checks that a text may have as many tokens as it must have.

    Raises:
      ConfigError: otherwise.
    """
    if least > most:
        raise ConfigError("min_tokens", f"{least} exceeds the {most} tokens of a text; lower it.")


def check_end_ids(stop_token_ids: Sequence[int], end_ids: Sequence[int]) -> None:
    """Checks that what ends a text fits the compiled arrays.

    Args:
      stop_token_ids: of the request.
      end_ids: of the tokenizer, unless they are ignored.

    Raises:
      ConfigError: if there are more than `MAX_END_IDS` in all.
    """
    count = len({*stop_token_ids, *end_ids})
    if count > MAX_END_IDS:
        raise ConfigError(
            "stop_token_ids",
            f"with the tokenizer's own, {count} tokens would end a text; at most {MAX_END_IDS} "
            "may.",
        )
