"""Paths of this machine and of buckets."""

import pathlib
import sys

import pytest

import megatransformer_jax as mt
from megatransformer_jax import storage
from megatransformer_jax.config.option import BAD_INPUT, TRY_AGAIN, ConfigError, UserError
from megatransformer_jax.storage import (
    as_path,
    check_served,
    files_below,
    is_bucket_path,
    local_path,
    make_and_probe,
    tree_bytes,
    write_atomically,
    write_into,
)


@pytest.mark.parametrize(
    ("path", "served", "problem"),
    [
        ("s3://bucket/run", ("gs",), r"s3:// is not served here; mount the bucket"),
        ("gs://bucket/run", (), r"gs:// is not served here"),
        ("ftp://a/b", ("gs",), r"ftp:// is not served; give a path or gs://BUCKET/PATH\."),
        ("file:///a", (), r"file:// is not served; give a path\."),
        ("gs:/bucket/run", ("gs",), r"has lost or gained a slash.* 'gs://bucket/run'"),
        (pathlib.Path("gs://bucket/run"), ("gs",), r"as text, 'gs://bucket/run'"),
        ("gs://", ("gs",), r"'gs://' names no bucket; give gs://BUCKET/PATH"),
        ("", ("gs",), r"'' is not a path"),
        (None, ("gs",), r"None is not a path"),
    ],
)
def test_what_is_not_served_is_told(path, served, problem):
    with pytest.raises(ConfigError, match=f"^workdir: .*{problem}"):
        check_served("workdir", path, served)


@pytest.mark.parametrize("path", ["runs/a", "/runs/a", "a:b", "C:/a", "recurrent:tiny", "a//b"])
def test_other_names_are_paths_of_this_machine(path):
    assert local_path("workdir", path) == pathlib.Path(path)
    assert not is_bucket_path(path)


@pytest.mark.parametrize(
    ("use", "option"),
    [
        (lambda: mt.configure("tiny", workdir="s3://bucket/run"), "workdir"),
        (lambda: mt.Trainer(mt.configure("tiny"), "s3://bucket/run"), "workdir"),
        (lambda: mt.Trainer(mt.configure("tiny"), pathlib.Path("gs://bucket/run")), "workdir"),
        (lambda: mt.Trainer.resume("hf://a/run"), "workdir"),
        (lambda: mt.load("s3://bucket/run"), "model"),
        (lambda: mt.configure("tiny", logging={"mirror": "runs/copy"}), "logging.mirror"),
        (lambda: mt.configure("tiny", logging={"mirror": "ftp://a/b"}), "logging.mirror"),
        (
            lambda: mt.configure("tiny", workdir="gs://a/b", logging={"mirror": "s3://a/b"}),
            "logging.mirror",
        ),
        (
            lambda: mt.configure(
                "tiny", data={"source": "arrayrecord", "files": "gs://a/*.array_record"}
            ),
            "data.files",
        ),
        (
            lambda: mt.configure(
                "image:tiny", data={"media": {"documents": {"folder": "gs://a/b"}}}
            ),
            "data.media.documents.folder",
        ),
    ],
)
def test_addresses_are_refused_before_a_folder_is_made(use, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{option}: .*({option}|served|slash|bucket)"):
        use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_the_extra_is_named_where_its_package_is_missing(scheme, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"a='{scheme}://bucket/x'.*jax\[{extra}\]"):
        as_path("a", f"{scheme}://bucket/x")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_folders_of_a_bucket(scheme, request):
    bucket = request.getfixturevalue(f"{scheme}_bucket")
    folder = as_path("a", f"{bucket.url}/storage_test/")
    assert make_and_probe("a", folder) == folder
    assert files_below(folder) == []  # The probe is gone.
    write_atomically(folder / "a" / "b.txt", "text")

    def write(local):
        (local / "c").mkdir()
        (local / "c" / "d.bin").write_bytes(bytes(10))
        return [local / "c" / "d.bin"]

    assert write_into(folder, write) == [folder / "c" / "d.bin"]
    assert files_below(folder) == ["a/b.txt", "c/d.bin"]
    assert tree_bytes(folder) == 14
    assert (folder / "a" / "b.txt").read_text() == "text"


def test_a_bucket_that_is_not_there_is_told(gs_bucket):
    folder = as_path("workdir", "gs://not-there/run")
    with pytest.raises(
        ConfigError, match=r"'gs://not-there/run' cannot be written to \(.*\); check"
    ):
        make_and_probe("workdir", folder)
    with pytest.raises(UserError, match=r"^gs://not-there/run: no such folder in the bucket"):
        mt.load("gs://not-there/run")
    with pytest.raises(UserError, match=r"^gs://not-there/run does not exist"):
        mt.read_metrics("gs://not-there/run")


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (ConnectionRefusedError(111, "Connection refused"), TRY_AGAIN, "cannot be reached"),
        (PermissionError("Forbidden: b/bucket"), BAD_INPUT, "cannot be written to"),
    ],
)
def test_a_bucket_that_does_not_answer_may_later(error, exit_code, told, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(storage, "write_atomically", fail)
    folder = as_path("workdir", "gs://bucket/run")
    with pytest.raises(UserError, match=f"^workdir: 'gs://bucket/run' {told}") as raised:
        make_and_probe("workdir", folder)
    assert raised.value.exit_code == exit_code
