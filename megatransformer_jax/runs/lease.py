"""The lock of a workdir in a bucket: an object that its run renews, and that others take when old.

A bucket has no locks, but it can write an object on the condition that the one there is still the
version that the writer has seen. So two runs cannot both take the lock, and one that has lost it
learns so when it renews it, which it does before every checkpoint becomes one. Ages are told by the
bucket's clock alone, because clocks of machines differ.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import json
import os
import pathlib
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from absl import logging

from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.failures import SaveFailed, fix_of, storage_problem
from megatransformer_jax.storage import AnyPath, file_system

LOCK_FILE = "LOCK"
RENEW_S = 60.0
EXPIRES_S = 300.0


class WorkdirTaken(UserError):
    """Another run holds the workdir; it may have ended, or its lock expired, later."""

    exit_code = TRY_AGAIN


class LostLease(UserError):
    """Another run has taken the workdir over, so this one must not write to it any more."""


# ------------------------------------------------------------------------------
# Objects that are written on a condition.


class Held(NamedTuple):
    """What is in a store.

    Attributes:
      content: of the object.
      version: another one after every write.
      age_s: since the last write, by the store's clock.
    """

    content: bytes
    version: str
    age_s: float


class LockStore(Protocol):
    """One object that is written only where nobody else has written it."""

    def read(self) -> Held | None:
        """The object, or None if there is none."""

    def write(self, content: bytes, version: str | None) -> str | None:
        """Writes the object if it still is of this version (None: absent).

        Returns:
          Its new version, or None if it was another and nothing was written.
        """

    def delete(self, version: str) -> None:
        """Removes the object if it still is of this version."""


class GcsStore:
    """An object of Google Cloud Storage, by gcsfs.

    Args:
      address: gs://BUCKET/PATH.
    """

    def __init__(self, address: str):
        self._files = file_system(address)
        self._object = tuple(address.partition("://")[2].split("/", 1))

    def read(self) -> Held | None:
        """See `LockStore`."""
        while True:
            try:
                headers, about = self._files.call("GET", "b/{}/o/{}", *self._object)
            except FileNotFoundError:
                return None
            fields = json.loads(about)
            version = str(fields["generation"])
            written = datetime.datetime.fromisoformat(fields["updated"])
            # The next version may be there before the content of this one is read.
            with contextlib.suppress(FileNotFoundError):
                _, content = self._files.call(
                    "GET", "b/{}/o/{}", *self._object, alt="media", generation=version
                )
                return Held(bytes(content), version, _age(headers["Date"], written))

    def write(self, content: bytes, version: str | None) -> str | None:
        """See `LockStore`."""
        bucket, name = self._object
        try:
            _, about = self._files.call(
                "POST",
                f"{self._files._location}/upload/storage/v1/b/{bucket}/o",
                uploadType="media",
                name=name,
                ifGenerationMatch=version or "0",
                headers={"Content-Type": "text/plain"},
                data=content,
            )
        except FileExistsError:  # gcsfs's name of the answer that a condition does not hold.
            return None
        return str(json.loads(about)["generation"])

    def delete(self, version: str) -> None:
        """See `LockStore`."""
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            self._files.call("DELETE", "b/{}/o/{}", *self._object, ifGenerationMatch=version)


class S3Store:
    """An object of S3, by s3fs. What it says is in its metadata too, which one request reads.

    Args:
      address: s3://BUCKET/PATH.
    """

    def __init__(self, address: str):
        self._files = file_system(address)
        bucket, name = address.partition("://")[2].split("/", 1)
        self._object = {"Bucket": bucket, "Key": name}

    def read(self) -> Held | None:
        """See `LockStore`."""
        try:
            about = self._files.call_s3("head_object", **self._object)
        except FileNotFoundError:
            return None
        date = about["ResponseMetadata"]["HTTPHeaders"]["date"]
        content = about["Metadata"].get("holder", "").encode()
        return Held(content, about["ETag"], _age(date, about["LastModified"]))

    def write(self, content: bytes, version: str | None) -> str | None:
        """See `LockStore`."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        metadata = {"holder": content.decode()}
        try:
            about = self._files.call_s3(
                "put_object", **self._object, **condition, Body=content, Metadata=metadata
            )
        except OSError as error:
            if _status(error) not in (404, 409, 412):  # Removed, being written, another version.
                raise
            return None
        return about["ETag"]

    def delete(self, version: str) -> None:
        """See `LockStore`."""
        try:
            self._files.call_s3("delete_object", **self._object, IfMatch=version)
        except OSError as error:
            if _status(error) not in (404, 409, 412):
                raise


def open_store(address: str) -> LockStore:
    """The store for an object at gs:// or s3://.

    Raises:
      UserError: if the package for such a bucket is not installed.
    """
    return GcsStore(address) if address.startswith("gs://") else S3Store(address)


def lease_of(folder: AnyPath, owner: str | None = None, *, steals: bool | None = None) -> "Lease":
    """The lease of a folder in a bucket; see `Lease`.

    Raises:
      UserError: if the package for such a bucket is not installed.
    """
    return Lease(open_store(os.fspath(folder / LOCK_FILE)), str(folder), owner, steals=steals)


def _age(date: str, written: datetime.datetime) -> float:
    """Seconds from a write to an answer with this header `Date`, both by the server's clock."""
    return (email.utils.parsedate_to_datetime(date) - written).total_seconds()


def _status(error: BaseException) -> int | None:
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")


# ------------------------------------------------------------------------------
# Who holds it.


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who has written a lock.

    Attributes:
      owner: name of the run; a later start with the same name goes on in its place.
      host: name of the machine.
      pid: of the process on it.
      born: when that process was started, in the words of its machine.
      mark: another one for every start.
      until: when the lock expires unless it is renewed, for a reader; clocks may differ.
    """

    owner: str
    host: str
    pid: int
    born: str
    mark: str
    until: str = ""

    @classmethod
    def present(cls, owner: str | None) -> "Holder":
        """This process. Without a name, that of the machine is the owner's."""
        host = socket.gethostname()
        mark = uuid.uuid4().hex
        # Machines that nobody has given a name must not take each other's locks.
        named = owner or (mark if host.partition(".")[0] in ("", "localhost") else host)
        return cls(named, host, os.getpid(), _born(os.getpid()), mark)

    @classmethod
    def parse(cls, content: bytes) -> "Holder":
        """The holder that has written `content`; one of nobody if that cannot be read."""
        try:
            values = json.loads(content)
            names = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in names})
        except (ValueError, TypeError, AttributeError):
            return cls("?", "?", 0, "", "")

    @property
    def is_alive_here(self) -> bool:
        """Whether this process runs on this machine."""
        is_here = self.host == socket.gethostname() and bool(self.born)
        return is_here and self.born == _born(self.pid)

    def content(self, until: datetime.datetime) -> bytes:
        """What the lock has in it."""
        values = {**dataclasses.asdict(self), "until": until.isoformat(timespec="seconds")}
        return json.dumps(values).encode()


def _born(pid: int) -> str:
    """The start of a process; empty if it is not there, or the system does not tell."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        status = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name, in brackets, may have spaces and brackets of its own; the start is the 22nd field.
    return f"{boot}:{status.rpartition(')')[2].split()[19]}"


# ------------------------------------------------------------------------------
# The lease.


class Lease:
    """Holds a workdir in a bucket; a context manager that takes it, renews it and gives it back.

    Args:
      store: the lock's object.
      workdir: for messages.
      owner: name of the run, for starts on machines with other names. None: the machine's name.
      steals: takes a lock that another run holds. None: does not, and cannot be told to.
      renew_s: seconds between renewals.
      expires_s: age of a lock that may be taken.

    Raises:
      WorkdirTaken: when the block is entered, if another run holds the lock.
      SaveFailed: then, if the bucket does not answer.
    """

    def __init__(
        self,
        store: LockStore,
        workdir: str,
        owner: str | None = None,
        *,
        steals: bool | None = None,
        renew_s: float = RENEW_S,
        expires_s: float = EXPIRES_S,
    ):
        self._store = store
        self._workdir = workdir
        self._steals = steals
        self._renew_s = renew_s
        self._expires_s = expires_s
        self._self = Holder.present(owner)
        self._version: str | None = None
        self._lost: LostLease | None = None
        # One request at a time: of the thread that renews, and before commits.
        self._requests = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        with self._asking("taken"):
            self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Says in one line that the bucket did not answer."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            problem = storage_problem(error)
            if problem is None:
                raise
            raise SaveFailed(
                f"{self._workdir}: its lock could not be {what} ({problem}); {fix_of(error)}, then "
                "start the same command again."
            ) from error

    def _take(self) -> None:
        held = self._store.read()
        if held is not None:
            self._check_free(held)
        self._version = self._write(None if held is None else held.version)
        if self._version is None:
            held = self._store.read()
            if held is None:
                raise WorkdirTaken(f"{self._workdir}: another run has just ended here; try again.")
            raise self._taken(held)

    def _check_free(self, held: Held) -> None:
        holder = Holder.parse(held.content)
        is_own = holder.owner == self._self.owner and not holder.is_alive_here
        if is_own or held.age_s > self._expires_s:
            return
        if not self._steals:
            raise self._taken(held)
        logging.warning("%s: its lock is taken from %s.", self._workdir, _described(holder))

    def _taken(self, held: Held) -> WorkdirTaken:
        left = max(self._expires_s - held.age_s, 0)
        return WorkdirTaken(
            f"{self._workdir}: {_described(Holder.parse(held.content))} is writing to this "
            f"workdir; its lock was renewed {held.age_s:.0f} s ago. Wait until it has ended, stop "
            f"it, or name another workdir. If it is dead, its lock expires in {left:.0f} s"
            f"{'' if self._steals is None else '; steal_lock=True takes it now'}."
        )

    def confirm(self) -> None:
        """Renews the lock; to be called before what only its holder may do.

        Raises:
          LostLease: if another run has taken it.
          SaveFailed: if the bucket does not answer.
        """
        with self._requests, self._asking("renewed"):
            self.check()
            if self._version is None:
                raise RuntimeError(f"the lock of {self._workdir} is not held")
            version = self._write(self._version)
            if version is None:
                held = self._store.read()
                who = "somebody" if held is None else _described(Holder.parse(held.content))
                self._lost = LostLease(
                    f"{self._workdir}: {who} has taken this workdir over, so this run ends and "
                    "saves nothing more. The checkpoints there are whole. Give every run its own "
                    "workdir, or start one of them only."
                )
                raise self._lost
            self._version = version

    @property
    def is_lost(self) -> bool:
        """Whether another run is known to have taken the lock."""
        return self._lost is not None

    def check(self) -> None:
        """Raises what renewals in the background have found; asks nobody.

        Raises:
          LostLease: if another run has taken the lock.
        """
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Gives the lock back if it still is this run's; where that fails it expires."""
        self._ended.set()
        with self._requests:
            version, self._version = self._version, None
            if version is None or self._lost is not None:
                return
            try:
                self._store.delete(version)
            except Exception as error:
                logging.warning(
                    "%s: its lock could not be given back (%s) and expires in %.0f s.",
                    self._workdir,
                    storage_problem(error) or error,
                    self._expires_s,
                )

    def _write(self, version: str | None) -> str | None:
        """Writes the lock; an answer that was lost on the way is asked for again."""
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self._expires_s)
        content = self._self.content(until)
        written = self._store.write(content, version)
        if written is None:
            # A client that repeats a request whose answer it has not got finds its own write.
            held = self._store.read()
            if held is not None and Holder.parse(held.content).mark == self._self.mark:
                return held.version
        return written

    def _keep(self) -> None:
        has_failed = False
        while not self._ended.wait(self._renew_s):
            try:
                self.confirm()
                has_failed = False
            except LostLease as error:
                logging.error("%s", error)
                return
            except Exception as error:
                if self._ended.is_set():
                    return
                if not has_failed:
                    logging.warning(
                        "%s: its lock could not be renewed (%s); the next try is in %.0f s.",
                        self._workdir,
                        storage_problem(error.__cause__ or error) or error,
                        self._renew_s,
                    )
                has_failed = True


def _described(holder: Holder) -> str:
    name = "" if holder.owner in (holder.host, holder.mark) else f"{holder.owner!r}, "
    return f"a run ({name}process {holder.pid} on {holder.host})"
