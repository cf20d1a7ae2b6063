"""Joining processes, and what an error says that comes of a lost one."""

import jax
import pytest

from megatransformer_jax.config.loop import DistributedConfig
from megatransformer_jax.training.distributed import (
    LostProcess,
    naming_lost_processes,
    start_distributed,
)

# As gloo, and JAX's coordination service, call it.
CLOSED = "UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:5"
BARRIER = "DEADLINE_EXCEEDED: Barrier timed out. Id: save\nSome tasks: 1"


def test_the_timeouts_reach_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    start_distributed(DistributedConfig())
    start_distributed(DistributedConfig(enabled=True))
    start_distributed(
        DistributedConfig(
            enabled=True,
            coordinator="a:1",
            num_processes=2,
            process_id=1,
            heartbeat_seconds=7,
            initialization_seconds=9,
        )
    )
    joined = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert calls == [
        {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100},
        {**joined, "initialization_timeout": 9, "heartbeat_timeout_seconds": 7},
    ]


@pytest.mark.parametrize("text", [CLOSED, BARRIER])
def test_what_fails_for_want_of_another_process_says_so(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with naming_lost_processes():
            try:
                raise jax.errors.JaxRuntimeError(text)
            except jax.errors.JaxRuntimeError as error:  # As Orbax hands on what has failed.
                raise ValueError("in the background") from error

    with pytest.raises(ValueError, match="in the background") as alone:
        fail()
    assert not isinstance(alone.value, LostProcess)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcess, match=r"process 0 of 2 .*start all processes again") as lost:
        fail()
    assert " ".join(text.split()) in str(lost.value) and lost.value.exit_code == 3


def test_other_errors_of_a_device_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory"), KeyError("a bug")):
        with pytest.raises(type(error)) as raised, naming_lost_processes():
            raise error
        assert raised.value is error
