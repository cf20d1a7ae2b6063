import time

import jax
import jax.numpy as jnp
import pytest

from megatransformer_jax.cli.screen import Stopwatch

EVENT = "/jax/core/compile/backend_compile_duration"


def test_compilation_is_kept_apart() -> None:
    with Stopwatch() as watch:
        function = jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x.T))
        watch.start()
        function(jnp.ones((4, 3))).block_until_ready()
        first = watch.compile_seconds()
        assert first > 0
        assert watch.seconds() >= 0
        watch.start()
        function(jnp.ones((4, 3))).block_until_ready()
        assert watch.compile_seconds() == 0


def test_time_outside_of_compilation_counts() -> None:
    with Stopwatch() as watch:
        watch.start()
        time.sleep(0.02)
        assert 0.02 <= watch.seconds() < 1


def test_nested_and_separate_intervals_count_once() -> None:
    with Stopwatch() as watch:
        time.sleep(0.03)
        jax.monitoring.record_event_duration_secs(EVENT, 0.002)
        jax.monitoring.record_event_duration_secs(EVENT, 0.005)  # Holds the one before.
        assert watch.compile_seconds() == pytest.approx(0.005, abs=1e-6)
        time.sleep(0.01)
        jax.monitoring.record_event_duration_secs(EVENT, 0.004)
        assert watch.compile_seconds() == pytest.approx(0.009, abs=1e-6)
        jax.monitoring.record_event_duration_secs("/jax/other", 1.0)
        assert watch.compile_seconds() == pytest.approx(0.009, abs=1e-6)


def test_it_listens_only_inside() -> None:
    with Stopwatch() as watch:
        pass
    jax.monitoring.record_event_duration_secs(EVENT, 0.5)
    assert watch.compile_seconds() == 0
