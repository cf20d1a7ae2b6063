"""Models of a hub: downloaded once, resumed after a break, safetensors alone, errors in a line."""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hub_server import Handler, Hub, serve_hub

from megatransformer_jax.checkpoints.hub import download_model, find_model
from megatransformer_jax.checkpoints.safetensors_files import SafetensorsReader, write_safetensors
from megatransformer_jax.config.option import UserError

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "org/name"
TENSORS = {f"t{number}": np.full((64, 64), number, np.float32) for number in range(4)}
SHARD = "model-00003-of-00004.safetensors"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def model(tmp_path: pathlib.Path, hub: Hub) -> pathlib.Path:
    """A folder of four shards, and of what must not be downloaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder, TENSORS.items(), max_shard_bytes=1)
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("x")
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "README.md"):
        (folder / name).write_text("never read")
    (folder / "original").mkdir()
    (folder / "original" / "model-1-of-1.safetensors.bin").write_text("never read")
    hub.add(NAME, folder)
    return folder


@pytest.fixture
def find(hub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def find(name: str = NAME, revision: str | None = None) -> pathlib.Path:
        return find_model(name, revision, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return find


def same(folder: pathlib.Path) -> bool:
    tensors = SafetensorsReader(folder)
    return all(np.array_equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_model_is_downloaded_once_and_then_read_from_the_cache(
    hub: Hub, model: pathlib.Path, find: Any
) -> None:
    folder = find()
    assert same(folder)
    wanted = {"config.json", "chat_template.jinja", "model.safetensors.index.json"}
    wanted |= {f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)}
    assert {path.name for path in folder.iterdir()} == wanted == set(hub.downloads())
    hub.requests.clear()
    assert find() == folder
    assert hub.downloads() == []


def test_offline_the_cache_serves(hub: Hub, model: pathlib.Path, find: Any) -> None:
    folder = find()
    with serve_hub() as gone:
        pass
    hub.endpoint = gone.endpoint  # Nobody listens there.
    assert find() == folder and same(folder)
    with pytest.raises(UserError, match=r"org/other: no such folder in .* cannot be reached") as e:
        find("org/other")
    assert str(e.value).count("\n") == 0


def test_a_revision_is_another_folder(
    hub: Hub, model: pathlib.Path, find: Any, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_safetensors(other, [("t", np.ones(3, np.float32))], 2**20)
    (other / "config.json").write_text("{}")
    commit = hub.add(NAME, other, "v2")
    found = find(revision="v2")
    assert list(SafetensorsReader(found)) == ["t"] and found != find()
    assert find(revision=commit) == find(f"{NAME}@v2") == found
    with pytest.raises(UserError, match=r"revision='v3': org/name has no such branch, tag or com"):
        find(revision="v3")


def test_a_broken_download_goes_on_where_it_stopped(
    hub: Hub, model: pathlib.Path, find: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library throws away what is less than a piece; its own pieces have ten megabytes.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut[SHARD] = 5000
    assert same(find())
    ranges = [asked for _, path, asked in hub.requests if path.endswith(SHARD) and asked]
    assert ranges == ["bytes=5000-"]


def test_after_a_break_only_the_missing_files_are_downloaded(
    hub: Hub, model: pathlib.Path, find: Any
) -> None:
    whole = (model / SHARD).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "_send_file", _refuse(SHARD))
        with pytest.raises(UserError, match=r"org/name cannot be downloaded .* run the same again"):
            find()
    done = set(hub.downloads()) - {SHARD}
    assert len(done) >= 3
    hub.requests.clear()
    folder = find()
    assert same(folder) and (folder / SHARD).read_bytes() == whole
    assert SHARD in hub.downloads() and not done & set(hub.downloads())


def _refuse(name: str) -> Any:
    send_file = Handler._send_file

    def refuse(self: Any, path: pathlib.Path, commit: str) -> None:
        if path.name == name and self.command == "GET":
            return self._fail(403, "Forbidden")
        return send_file(self, path, commit)

    return refuse


def test_pickles_are_refused_and_never_downloaded(
    hub: Hub, find: Any, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    hub.add(NAME, folder)
    with pytest.raises(UserError, match=r"as pickles only \(pytorch_model\.bin\).*save_pretrained"):
        find()
    assert hub.downloads() == ["config.json"]
    hub.add("org/empty", tmp_path / "here")
    with pytest.raises(UserError, match=r"org/empty has neither model\.safetensors nor"):
        find("org/empty")


def test_a_local_folder_wins_and_paths_are_no_names(hub: Hub, find: Any) -> None:
    pathlib.Path("org/name").mkdir(parents=True)
    assert find() == pathlib.Path("org/name")
    for path in ("org/other", "runs/recurrent", "name", "/a/b", "../a", "a/b/c", "a b/c"):
        assert find(path) == pathlib.Path(path)
    assert hub.requests == []
    with pytest.raises(UserError, match=r"revision='v1' .* 'org/name' is a folder here"):
        find(revision="v1")
    with pytest.raises(UserError, match="'a/b/c' is not a name on the hub"):
        find("a/b/c", revision="v1")
    with pytest.raises(UserError, match="'org/other@v1' is one with a revision"):
        find("org/other@v1", revision="v1")
    # With a revision it can only be a name.
    with pytest.raises(UserError, match=r"org/other: no such folder .* has no model of this name"):
        find("org/other", revision="main")


def test_an_address_is_told_from_a_name(hub: Hub, find: Any) -> None:
    for address in (f"{hub.endpoint}/org/name", "https://hub.example/org/name/tree/main"):
        with pytest.raises(
            UserError, match="is an address; name the model of the hub as 'org/name'"
        ):
            find(address)
    assert not hub.requests


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"org/name: no such folder; .*jax\[hub\]"):
        download_model(NAME)
