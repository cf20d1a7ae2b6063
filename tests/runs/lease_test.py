"""The lock of a workdir in a bucket: taken, refused, renewed, expired, stolen, lost."""

import dataclasses
import datetime
import itertools
import json
import time
from typing import Any

import pytest

from megatransformer_jax.config.option import BAD_INPUT, TRY_AGAIN
from megatransformer_jax.failures import SaveFailed
from megatransformer_jax.runs.lease import (
    Held,
    Holder,
    Lease,
    LostLease,
    WorkdirTaken,
    open_store,
)

WORKDIR = "gs://bucket/run"


class FakeStore:
    """A store in memory with a clock of its own; it can be unreachable, or lose its answers."""

    def __init__(self) -> None:
        self.held: tuple[bytes, str, float] | None = None
        self.now = 0.0
        self.writes = 0
        self.loses_answers = False
        self.is_down = False
        self._versions = map(str, itertools.count(1))

    def read(self) -> Held | None:
        if self.is_down:
            raise OSError("no route to host")
        if self.held is None:
            return None
        content, version, written = self.held
        return Held(content, version, self.now - written)

    def write(self, content: bytes, version: str | None) -> str | None:
        if self.is_down:
            raise OSError("no route to host")
        if version != (self.held and self.held[1]):
            return None
        self.writes += 1
        self.held = (content, next(self._versions), self.now)
        # As a client sees it that has sent the same request twice.
        return None if self.loses_answers else self.held[1]

    def delete(self, version: str) -> None:
        if self.held and self.held[1] == version:
            self.held = None


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def of_another_machine(store: FakeStore, owner: str | None = None) -> Holder:
    """Writes the lock as a run on another machine does."""
    other = dataclasses.replace(Holder.present(owner), host="elsewhere", pid=7, born="x")
    other = dataclasses.replace(other, owner=owner or "elsewhere")
    held = store.read()
    assert store.write(other.content(NOW), held and held.version)
    return other


NOW = datetime.datetime.now(datetime.UTC)


def test_a_lock_is_taken_renewed_and_given_back(store: FakeStore) -> None:
    with Lease(store, WORKDIR, "a", renew_s=0.01):
        deadline = time.monotonic() + 10
        while store.writes < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert Holder.parse(store.read().content).owner == "a"
    assert store.held is None


def test_a_second_run_is_refused_until_the_lock_expires(store: FakeStore) -> None:
    of_another_machine(store)
    store.now = 299
    with pytest.raises(WorkdirTaken, match=r"process 7 on elsewhere.* 299 s.* in 1 s\.$") as error:
        Lease(store, WORKDIR, "b").__enter__()
    assert error.value.exit_code == TRY_AGAIN
    store.now = 301
    with Lease(store, WORKDIR, "b"):
        assert Holder.parse(store.read().content).owner == "b"


def test_a_run_takes_its_own_lock_at_once_unless_it_is_alive(store: FakeStore) -> None:
    of_another_machine(store, "mine")  # A preempted machine does not come back by its name.
    with Lease(store, WORKDIR, "mine"):
        pass
    with Lease(store, WORKDIR, steals=False) as first:
        with pytest.raises(WorkdirTaken, match="steal_lock=True takes it now"):
            Lease(store, WORKDIR, steals=False).__enter__()
        dead = dataclasses.replace(Holder.parse(store.read().content), born="of an earlier boot")
        assert store.write(dead.content(NOW), store.read().version)
        with Lease(store, WORKDIR), pytest.raises(LostLease):
            first.confirm()
    assert store.held is None


def test_a_store_that_does_not_answer_is_one_line(store: FakeStore) -> None:
    store.is_down = True
    with pytest.raises(SaveFailed, match=r"its lock could not be taken \(no route to host\)"):
        Lease(store, WORKDIR).__enter__()


def test_a_run_whose_lock_is_stolen_ends_before_it_commits_anything(store: FakeStore) -> None:
    with Lease(store, WORKDIR, "a") as first:
        first.confirm()
        with Lease(store, WORKDIR, "b", steals=True) as second:
            with pytest.raises(LostLease, match=r"'b', process .* has taken") as error:
                first.confirm()
            assert error.value.exit_code == BAD_INPUT and first.is_lost
            with pytest.raises(LostLease):
                first.check()
            first.release()  # It is not its own to give back.
            second.confirm()


def test_the_thread_that_renews_notices_a_theft_and_survives_an_outage(
    store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease(store, WORKDIR, "a", renew_s=0.01) as lease:
        store.is_down = True
        time.sleep(0.05)
        lease.check()
        with pytest.raises(SaveFailed, match="no route"):  # So a checkpoint is not committed then.
            lease.confirm()
        store.is_down = False
        of_another_machine(store)
        deadline = time.monotonic() + 10
        with pytest.raises(LostLease, match="on elsewhere"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.005)
    assert "could not be renewed (no route to host); the next try is in 0 s" in caplog.text
    assert "again" not in caplog.text  # The run goes on.


def test_an_answer_that_was_lost_is_not_taken_for_a_theft(store: FakeStore) -> None:
    store.loses_answers = True
    with Lease(store, WORKDIR, "a") as lease:
        lease.confirm()
    assert store.held is None


def test_a_lock_that_cannot_be_read_is_somebody_elses(store: FakeStore) -> None:
    store.held = (b"\xff{", "1", 0.0)
    with pytest.raises(WorkdirTaken, match="renewed 0 s ago"):
        Lease(store, WORKDIR, "a").__enter__()


# ------------------------------------------------------------------------------
# Clients.


class FakeGcs:
    """As gcsfs with a bucket of one object that honours conditions; the emulator ignores them."""

    _location = "https://storage.example"

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.generation = 0

    def call(self, method: str, path: str, *names: str, **given: Any) -> tuple[dict, bytes]:
        present = "0" if self.content is None else str(self.generation)
        wanted = given.get("ifGenerationMatch", present)
        if method == "POST":
            assert path == "https://storage.example/upload/storage/v1/b/bucket/o"
            assert (given["uploadType"], given["name"]) == ("media", "run/LOCK")
        else:
            assert (path, names) == ("b/{}/o/{}", ("bucket", "run/LOCK"))
            if self.content is None or given.get("generation", present) != present:
                raise FileNotFoundError
        if wanted != present:
            raise FileExistsError
        match method:
            case "POST":
                self.content, self.generation = given["data"], self.generation + 1
            case "DELETE":
                self.content = None
            case "GET" if given.get("alt") == "media":
                assert self.content is not None
                return {}, self.content
        about = {"generation": str(self.generation), "updated": "2026-11-30T15:00:00.500Z"}
        return {"Date": "Mon, 30 Nov 2026 15:01:40 GMT"}, json.dumps(about).encode()


def test_google_cloud_storage_writes_on_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatransformer_jax.runs.lease.file_system", lambda _: FakeGcs())
    store = open_store("gs://bucket/run/LOCK")
    assert store.read() is None
    assert (store.write(b"a", None), store.write(b"b", None)) == ("1", None)
    assert (store.write(b"b", "1"), store.write(b"c", "1")) == ("2", None)
    assert store.read() == Held(b"b", "2", 99.5)
    store.delete("1")
    assert store.read() is not None
    store.delete("2")
    assert store.read() is None and store.write(b"d", "2") is None


def test_s3_writes_on_conditions(s3_bucket: Any) -> None:
    store = open_store(f"{s3_bucket.url}/lease/store/LOCK")
    assert store.read() is None
    first = store.write(b'{"owner": "a"}', None)
    assert first is not None and store.write(b"{}", None) is None
    second = store.write(b'{"owner": "b"}', first)
    assert second is not None and store.write(b"{}", first) is None
    held = store.read()
    assert held is not None and (held.content, held.version) == (b'{"owner": "b"}', second)
    assert -2 < held.age_s < 30
    store.delete(second)
    assert store.read() is None
    assert store.write(b"{}", second) is None


def test_a_lease_at_s3_is_taken_once_and_lost_when_it_is_stolen(s3_bucket: Any) -> None:
    store = open_store(f"{s3_bucket.url}/lease/run/LOCK")
    with Lease(store, s3_bucket.url, "a") as first:
        first.confirm()
        with pytest.raises(WorkdirTaken):
            Lease(store, s3_bucket.url, "b").__enter__()
        with Lease(store, s3_bucket.url, "b", steals=True), pytest.raises(LostLease):
            first.confirm()
    assert store.read() is None
