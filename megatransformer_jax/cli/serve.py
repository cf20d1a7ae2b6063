"""Serves a model over HTTP: `megatransformer serve`."""

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    MeshOptions,
    ModelOptions,
    load_chosen_model,
)
from megatransformer_jax.config.option import part_of
from megatransformer_jax.config.serving import ServingConfig, name_of_folder
from megatransformer_jax.extras import import_extra

if TYPE_CHECKING:
    from rich.console import Console

    from megatransformer_jax.serving.server import Server

API_KEY_VARIABLE = "MEGATRANSFORMER_API_KEY"
_REFRESH_SECONDS = 0.5
# Time over which tokens per second are counted, in refreshes.
_RATE_REFRESHES = 10


@dataclasses.dataclass(frozen=True)
class ServeOptions(ServingConfig, MeshOptions, ModelOptions):
    """Which model is served, and how."""


def serve(parsed: Parsed) -> None:
    """Serves the model that the command line names, until Ctrl-C or SIGTERM.

    Raises:
      UserError: if an option does not fit the model, or the address or the key cannot be used.
    """
    options: ServeOptions = parsed.options
    options.check_model_is_named()
    import_extra("uvicorn", "serve", "megatransformer serve")
    config = part_of(options, ServingConfig)
    if config.name is None:
        config = dataclasses.replace(config, name=name_of_folder(options.folder.resolve().name))
    api_key = os.environ.get(API_KEY_VARIABLE) if config.api_key_file is None else None
    # These import JAX, which takes long.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.model import Model  # noqa: PLC0415
    from megatransformer_jax.serving.server import Server, check_address  # noqa: PLC0415

    check_address(config)
    lm = Model(load_chosen_model(options))
    console = Console(highlight=False, soft_wrap=True)
    with _stop_signals() as stopping, Server(lm, config, api_key) as server:
        server.start()
        _show_start(console, server, lm)
        started = time.monotonic()
        _watch_loading(console, server, stopping)
        server.wait_until_ready(stopping)
        if not stopping.is_set():
            console.print(f"ready after {time.monotonic() - started:.1f} s; Ctrl-C stops")
            _watch(console, server, stopping)
        num_open = server.engine.num_open
        texts = "1 text has" if num_open == 1 else f"{num_open} texts have"
        wait = f"; {texts} {config.shutdown_seconds:g} s to end" if num_open else ""
        console.print(f"stopping{wait}")
    console.print("stopped")


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C or SIGTERM; the next one interrupts at once."""
    stopping = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_start(console: "Console", server: "Server", lm: Any) -> None:
    config = server.config
    lines = {"model": f"{config.name}: {lm.description}, {lm.num_parameters:,} parameters"}
    if lm.trained_depth is not None:
        criteria = ", ".join(config.criteria)
        lines["depth"] = f"{lm.trained_depth} unless a request says otherwise, up to "
        lines["depth"] += f"{config.max_depth}; {criteria}"
    lines["rows"] = f"{config.rows} texts at once, of up to {config.capacity} tokens"
    lines["OpenAI API"] = f"{server.url}/v1" + (", with a key" if server.has_key else "")
    lines["playground"] = f"{server.url}/"
    for name, text in lines.items():
        console.print(f"{name:>10}  {text}", markup=False)
    if not (config.is_local or server.has_key):
        console.print(
            "Anyone who reaches this machine may ask; --api_key_file=FILE asks them for a key.",
            style="yellow",
        )


def _watch_loading(console: "Console", server: "Server", stopping: threading.Event) -> None:
    """Until it is ready, or time to stop, shows in a terminal what is compiled."""
    console.print("compiling ...")
    if not console.is_terminal:
        return
    with console.status("") as status:
        while server.state == "loading" and not stopping.wait(_REFRESH_SECONDS):
            status.update(server.engine.progress)


def _watch(console: "Console", server: "Server", stopping: threading.Event) -> None:
    """Until it is time to stop, shows in a terminal what the server does."""
    if not console.is_terminal:
        stopping.wait()
        return
    seen: collections.deque[tuple[float, float]] = collections.deque(maxlen=_RATE_REFRESHES)
    with console.status("") as status:
        while not stopping.wait(_REFRESH_SECONDS):
            counted = server.counts()
            seen.append((time.monotonic(), counted["generation_tokens_total"]))
            seconds = seen[-1][0] - seen[0][0]
            rate = (seen[-1][1] - seen[0][1]) / seconds if seconds else 0.0
            state = "" if server.state == "ready" else f"{server.state}: "
            status.update(
                f"{state}{counted['num_requests_running']:.0f} running, "
                f"{counted['num_requests_waiting']:.0f} waiting, {rate:.1f} tokens/s"
            )


COMMAND = Command(
    name="serve",
    doc="""Serves a model over HTTP, by OpenAI's API, with a page to try it.

Each request may have its own depth and exit criterion; all of them share one batch. Every program
is compiled before the first request is answered. Ctrl-C or SIGTERM refuses new requests and ends
when those that are open have ended. docs/serving.md has examples.""",
    options=ServeOptions,
    run=serve,
    examples=(
        "--model=runs/recurrent",
        "--model=runs/recurrent --port=8080 --rows=16 --capacity=1024 --criteria=fixed,latent_diff",
        "--model=runs/recurrent --host=0.0.0.0 --api_key_file=key.txt --allowed_hosts=example.org",
    ),
    old_names=OLD_MODEL_NAMES,
)
