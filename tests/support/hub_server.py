"""A small Hugging Face hub on loopback: what `huggingface_hub` asks for when it downloads."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any


class Hub:
    """Serves folders as models.

    Attributes:
      endpoint: its address.
      revisions: the folder of every (model, revision).
      requests: (method, path, Range) of all requests so far.
      cut: how many bytes of a file's answer are sent before the connection breaks, by its name;
        once each. A negative number: it always breaks there.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.revisions: dict[tuple[str, str], pathlib.Path] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}

    def add(self, name: str, folder: pathlib.Path, revision: str = "main") -> str:
        """Serves a folder; returns its commit."""
        commit = hashlib.sha1(f"{name} {revision} {folder}".encode()).hexdigest()
        self.revisions[name, revision] = self.revisions[name, commit] = folder
        return commit

    def downloads(self) -> list[str]:
        """Files whose content was asked for."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return [
            path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path
        ]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub as long as the context lasts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is printed."""

    @property
    def _hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self._hub.requests.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, kind, revision = found[1], found[2], found[3] or "main"
            if folder := self._folder(name, revision):
                commit = self._hub.add(name, folder, revision) if len(revision) < 40 else revision
                self._send_json(_tree(folder) if kind == "tree" else _info(name, commit, folder))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if folder := self._folder(found[1], found[2]):
                self._send_file(folder / found[3], found[2])
        else:
            self._fail(404, "EntryNotFound")

    def _folder(self, name: str, revision: str) -> pathlib.Path | None:
        known = self._hub.revisions
        if not any(name == other for other, _ in known):
            self._fail(404, "RepoNotFound")
        elif (name, revision) not in known:
            self._fail(404, "RevisionNotFound")
        return known.get((name, revision))

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: pathlib.Path, commit: str) -> None:
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        content, total = path.read_bytes(), path.stat().st_size
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            headers["Content-Range"] = f"bytes {found[1]}-{total - 1}/{total}"
            content, status = content[int(found[1]) :], 206
        return self._send(status, content, headers, path.name)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], file: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self._hub.cut.get(file or "")
        if limit is None:
            self.wfile.write(content)
            return
        if limit >= 0:
            del self._hub.cut[file or ""]
        self.wfile.write(content[: abs(limit)])
        self.close_connection = True

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _tree(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": _digest(path),
        }
        for path in _files(folder)
    ]


def _info(name: str, commit: str, folder: pathlib.Path) -> dict[str, Any]:
    siblings = [{"rfilename": str(path.relative_to(folder))} for path in _files(folder)]
    return {"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings}
