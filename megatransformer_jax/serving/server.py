"""The life of a server: a socket, an engine, and HTTP in a thread of this process.

Notebooks start one by `mt.serve`, the command `megatransformer serve` in the same way. Nothing here
needs the packages of the extra 'serve' until a server is made.
"""

import atexit
import collections
import errno
import html
import pathlib
import socket
import threading
import time
import types
from collections.abc import Callable
from typing import Any

from megatransformer_jax.config.option import ConfigError, UserError, from_options
from megatransformer_jax.config.serving import ServingConfig
from megatransformer_jax.extras import import_extra
from megatransformer_jax.model import Model

# What is left of answers when all texts are finished is sent within this time.
FLUSH_SECONDS = 5
_POLL_SECONDS = 0.05
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def serve(model: Model, *, api_key: str | None = None, **options: Any) -> "Server":
    """Serves a model over HTTP from a thread of this process, and returns once it is ready.

    The server has OpenAI's completions and chat completions, with the depth of each request's
    tokens as a field, and a page to try them (docs/serving.md). All its programs are compiled
    before it is ready, which takes from seconds to minutes.

    Args:
      model: from `load`, `create` or `Trainer.model`.
      api_key: that requests must show. None: that of `api_key_file`, and without it anyone may ask.
      **options: those of `megatransformer serve`, such as port=8000, rows=16, capacity=2048. Unlike
        there, `port` is 0 unless it is given, which takes any free one.

    Returns:
      The running server. As a context manager it stops at the end of the block.

    Raises:
      UserError: if an option or the model cannot be used, the port is taken, or the extra 'serve'
        is missing.

    Examples:
      >>> with mt.serve(lm, rows=4, capacity=256) as server:  # doctest: +SKIP
      ...     client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-")
      ...     print(client.completions.create(model=server.config.name, prompt="The if"))
      >>> try:
      ...     mt.serve(lm, row=4)
      ... except mt.UserError as error:
      ...     print(str(error)[:41])
      row: no such option; did you mean 'rows'?
    """
    if not isinstance(model, Model):
        raise UserError(f"model: {model!r} is not an mt.Model; give one such as mt.load(folder).")
    server = Server(model, from_options(ServingConfig, {"port": 0, **options}), api_key)
    server.start()
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop(0)
        raise
    return server


class Server:
    """A model that is served at `url` until `stop` is called.

    Attributes:
      url: where, such as 'http://127.0.0.1:8000'; the page to try it is there.
      engine: what makes the texts.
      config: the options, with a number for each that was left to the model.
      has_key: whether requests must show an API key.

    Args:
      model: what is served.
      config: how.
      api_key: that requests must show. None: that of `config.api_key_file`, and without it anyone
        may ask.
      make_batcher: as of `Engine`.

    Raises:
      UserError: if the model cannot be served so, the port is taken, or the extra 'serve' is
        missing.
    """

    def __init__(
        self,
        model: Model,
        config: ServingConfig,
        api_key: str | None = None,
        make_batcher: Callable[[Any, Any], Any] | None = None,
    ):
        for package in ("starlette", "uvicorn", "prometheus_client"):
            import_extra(package, "serve", "serving")
        import uvicorn  # noqa: PLC0415

        from megatransformer_jax.serving.app import Service, make_app  # noqa: PLC0415
        from megatransformer_jax.serving.engine import Engine  # noqa: PLC0415
        from megatransformer_jax.serving.lens import Lens  # noqa: PLC0415
        from megatransformer_jax.serving.page import PAGE_PATHS, page_routes  # noqa: PLC0415
        from megatransformer_jax.serving.served import served_model, settle  # noqa: PLC0415

        api_key = _checked_key(api_key, config.api_key_file)
        self.has_key = api_key is not None
        self.config = settle(config, model)
        self._socket = _bind(config.host, config.port)
        try:
            served = served_model(model, self.config, int(time.time()))
            lens = None
            if served.has_lens:
                lens = Lens(model.module, model.weights, served, self.config)
            # Where the batcher compiles nothing, the lens does so when it is asked.
            prepare = lens.compile if lens is not None and make_batcher is None else None
            self.engine = Engine(model, self.config, make_batcher, prepare)
            service = Service(self.engine, served, self.config)
            routes = page_routes(lens, service.body, self.engine.run)
            app = make_app(service, api_key, routes, PAGE_PATHS)
        except BaseException:
            self._socket.close()
            raise
        self.url = _url(config.host, self._socket.getsockname()[1])
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        self._http = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._http.run, args=([self._socket],), name="http", daemon=True
        )
        self._stopping = threading.Lock()
        self._is_stopped = False

    def start(self) -> None:
        """Starts the engine and HTTP, and returns at once; until it is ready, answers are 503."""
        self.engine.start()
        self._thread.start()
        # What still runs when the interpreter goes away may crash in native code.
        atexit.register(self.stop, 0)

    @property
    def state(self) -> str:
        """'loading', 'ready', 'draining', 'dead' or 'stopped'."""
        return "stopped" if self._is_stopped else self.engine.state

    def wait_until_ready(self, giving_up: threading.Event | None = None) -> None:
        """Returns when requests are answered, or when the event is set.

        Raises:
          UserError: if the engine has failed.
        """
        giving_up = giving_up or threading.Event()
        while self.engine.state == "loading" or not self._http.started:
            if giving_up.wait(_POLL_SECONDS):
                return
            if not self._thread.is_alive():
                raise UserError("the HTTP server has ended; its log says why.")
            if self.engine.state == "dead":
                break
        if self.engine.state == "dead":
            raise UserError("the engine could not start; its log says why.")

    def counts(self) -> dict[str, float]:
        """The values of counters and gauges that /metrics shows, by their short names."""
        found: dict[str, float] = collections.defaultdict(float)
        for metric in self.engine.metrics.registry.collect():
            for sample in metric.samples:
                found[sample.name.partition(":")[2]] += sample.value
        return found

    def stop(self, seconds: float | None = None) -> None:
        """Refuses new requests, finishes those that are open, and ends both threads.

        Args:
          seconds: after which requests that are still open are ended. None: `shutdown_seconds`.
        """
        atexit.unregister(self.stop)
        with self._stopping:
            if self._is_stopped:
                return
            if self._thread.ident is not None:
                self.engine.drain(self.config.shutdown_seconds if seconds is None else seconds)
                # Whoever still waits for a text is told that it will not come.
                self.engine.close()
                self._http.should_exit = True
                self._thread.join(2 * FLUSH_SECONDS)
            self._socket.close()
            self._is_stopped = True

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        # After an error nobody waits for texts.
        self.stop(None if kind is None else 0)

    def __repr__(self) -> str:
        return f"Server({self.url}, {self.state})"

    def _repr_html_(self) -> str:
        url = html.escape(self.url)
        link = f'<a href="{url}/" target="_blank" rel="noopener">{url}</a>'
        return f"megatransformer server ({self.state}): {link}"


def check_address(config: ServingConfig) -> None:
    """Checks that a server could listen where the options say.

    Raises:
      ConfigError: otherwise.
    """
    _bind(config.host, config.port).close()


def _url(host: str, port: int) -> str:
    shown = _ANY_ADDRESS.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the address, so that a port that is taken is known at once.

    Raises:
      ConfigError: if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            "host", f"{host!r} is not an address of this machine ({error}); use 127.0.0.1."
        ) from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        raise _cannot_listen(host, port, error) from error
    return found


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        fix = "choose another, or 0 for any free one."
        return ConfigError("port", f"{port} is taken at {host}; {fix}")
    if error.errno == errno.EACCES:
        return ConfigError(
            "port", f"{port} needs rights of an administrator; choose one from 1024."
        )
    return ConfigError("host", f"{host!r} cannot be used ({error.strerror}); use 127.0.0.1.")


def _checked_key(key: str | None, file: str | None) -> str | None:
    """The key that is given, or that of the file.

    Raises:
      ConfigError: if it cannot be read or sent. The key itself is in no message.
    """
    if key is None and file is None:
        return None
    if key is not None and file is not None:
        raise ConfigError("api_key_file", "does not go together with api_key; give one of the two.")
    if file is not None:
        try:
            key = pathlib.Path(file).expanduser().read_text(encoding="utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_key_file", f"{file} cannot be read ({error}).") from error
    key = "" if key is None else key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "api_key" if file is None else "api_key_file",
            "is not a key; it is one word of visible ASCII characters, such as the output of "
            "openssl rand -hex 24.",
        )
    return key
