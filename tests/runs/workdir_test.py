"""What a process keeps of the programs that it compiles, and what it shows."""

import collections
import os
import pathlib
import platform
import subprocess
import sys
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from bucket_server import Bucket
from jax.experimental.compilation_cache import compilation_cache

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.runs.workdir import quiet_libraries, use_compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)
# Prints the number of programs that were compiled, and of those that were taken from the cache.
GENERATE = """
import collections
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
import megatransformer_jax as mt
model = mt.create("tiny", tokenizer=mt.BytesTokenizer(), core_layers=1)
print(len(model.generate("a", strategy="greedy", max_new_tokens=2).token_ids))
print(counts["/jax/compilation_cache/cache_misses"], counts["/jax/compilation_cache/cache_hits"])
"""


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """JAX's settings are put back."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_jax_is_set_to_stays_unless_a_folder_is_named(tmp_path: pathlib.Path) -> None:
    before = getattr(jax.config, NAMES[0])
    assert before is not None  # Set by conftest.py.
    for folder in ("auto", None):
        use_compilation_cache(folder)
        assert getattr(jax.config, NAMES[0]) == before
    use_compilation_cache(str(tmp_path / "cache"))
    assert getattr(jax.config, NAMES[0]) == str(tmp_path / "cache")


def test_programs_are_kept_in_a_bucket(gs_bucket: Bucket) -> None:
    with pytest.raises(ConfigError, match=r"compilation_cache_dir: 'ftp://a/b': .* not served"):
        use_compilation_cache("ftp://a/b")
    folder = f"{gs_bucket.url}/cache"
    counts: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
    use_compilation_cache(folder)
    jax.config.update(NAMES[1], 0.0)
    for _ in range(2):
        jax.clear_caches()
        jax.jit(lambda x: x * 3 + 5)(np.float32(1)).block_until_ready()
    found = {name.rsplit("/", 1)[-1]: count for name, count in counts.items()}
    assert found["cache_hits"] >= 1
    puts = [line for line in gs_bucket.requests() if line.startswith(("POST", "PUT"))]
    assert any("cache" in line for line in puts), gs_bucket.requests()


def test_a_home_that_cannot_be_written_to_is_no_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax.config.update(NAMES[0], None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    use_compilation_cache("auto")
    assert getattr(jax.config, NAMES[0]) is None
    with pytest.raises(ConfigError, match=r"compilation_cache_dir: .* cannot be written to"):
        use_compilation_cache(str(tmp_path / "file" / "x"))


def test_the_second_process_takes_the_programs_of_the_first(tmp_path: pathlib.Path) -> None:
    without = {key: value for key, value in os.environ.items() if "CACHE" not in key}
    environment = {**without, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def run() -> tuple[int, int]:
        words = [sys.executable, "-c", GENERATE]
        shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        misses, hits = shown.stdout.split()[-2:]
        return int(misses), int(hits)

    misses, hits = run()
    assert misses > 0 and hits == 0
    [folder] = (tmp_path / ".cache" / "megatransformer_jax" / "xla").iterdir()
    assert folder.name.startswith(platform.machine()) and any(folder.iterdir())
    # All of them; others count as missed if they took longer than in the first process.
    assert run()[1] == misses


def test_late_ends_of_threads_are_silent_after_an_error_too(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "another")
    )
    with quiet_libraries("info"):
        pass
    sys.unraisablehook(late)
    assert shown.pop() is late
    with pytest.raises(UserError), quiet_libraries("info"):
        raise UserError("the checkpoint is damaged")
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert shown == [other]
