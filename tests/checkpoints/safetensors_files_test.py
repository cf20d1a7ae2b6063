"""Weights come back from one file or many; damaged folders are one clear error."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatransformer_jax.checkpoints.safetensors_files import (
    SafetensorsReader,
    WeightsFileError,
    write_safetensors,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def some_tensors() -> dict[str, np.ndarray]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(8, dtype=ml_dtypes.bfloat16),
        "c": np.linspace(0, 1, 5, dtype=np.float16),
        "d": np.ones((2, 3), np.float32).T,  # Not as it lies in memory.
    }


@pytest.fixture
def sharded(tmp_path):
    """a and b in the first file, c and d in the second."""
    write_safetensors(tmp_path, some_tensors().items(), max_shard_bytes=40)
    return tmp_path


def change_index(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


@pytest.mark.parametrize("max_bytes", [1, 24, 40, 10**6])
def test_tensors_come_back_bit_for_bit(tmp_path, max_bytes):
    tensors = some_tensors()
    total = write_safetensors(tmp_path, tensors.items(), max_bytes)
    assert total == sum(tensor.nbytes for tensor in tensors.values())
    reader = SafetensorsReader(tmp_path)
    assert list(reader) == sorted(reader) and len(reader) == len(tensors)
    for name, tensor in tensors.items():
        assert reader[name].dtype == tensor.dtype and reader.shape(name) == tensor.shape
        np.testing.assert_array_equal(reader[name], tensor)
    assert [reader.type_name(name) for name in "abcd"] == ["F32", "BF16", "F16", "F32"]


def test_small_weights_are_one_file(tmp_path):
    write_safetensors(tmp_path, some_tensors().items(), 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644  # As other files.


def test_shards_have_the_names_and_the_index_that_others_read(sharded):
    assert sorted(path.name for path in sharded.iterdir()) == [FIRST, SECOND, INDEX]
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}
    assert index["metadata"] == {"total_size": 24 + 16 + 10 + 24}
    assert set(load_file(sharded / FIRST)) == {"a", "b"}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    tensors = {"a": np.zeros(2), "large": np.zeros(100), "b": np.zeros(2), "c": np.zeros(2)}
    write_safetensors(tmp_path, tensors.items(), max_shard_bytes=40)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert [int(places[name][6:11]) for name in tensors] == [1, 2, 3, 3]


def test_no_more_than_a_shard_is_taken_ahead(tmp_path):
    taken = []

    def tensors():
        for number in range(4):
            finished = len(list(tmp_path.iterdir()))
            taken.append(finished)
            yield str(number), np.zeros(10)

    write_safetensors(tmp_path, tensors(), max_shard_bytes=80)
    # When tensor n is asked for, all but the one before it are in files.
    assert taken == [0, 0, 1, 2]


def cut_off(folder):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-5])


def make_an_lfs_pointer(folder):
    (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")


def delete_a_shard(folder):
    (folder / SECOND).unlink()


def repeat_a_tensor(folder):
    save_file({**load_file(folder / SECOND), "a": np.zeros(1)}, folder / SECOND)


def drop_a_tensor(folder):
    save_file({"c": np.zeros(1)}, folder / SECOND)


def unname_a_tensor(folder):
    change_index(folder, lambda places: places.pop("b"))


def name_a_tensor_twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"a":', f'"b": "{FIRST}", "a":'))


def leave_the_folder(folder):
    change_index(folder, lambda places: places.update(a="../model.safetensors"))


def break_the_index(folder):
    (folder / INDEX).write_text('{"weight_map": {"a"')


def empty_the_index(folder):
    (folder / INDEX).write_text("{}")


def add_a_single_file(folder):
    save_file({"a": np.zeros(1)}, folder / "model.safetensors")


def delete_the_index(folder):
    (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, rf"{SECOND}: is damaged or cut off, \d+ bytes"),
        (make_an_lfs_pointer, rf"{FIRST}: is a Git LFS pointer .* run 'git lfs pull'"),
        (delete_a_shard, rf"index\.json: names files that are not there: {SECOND};"),
        (repeat_a_tensor, rf"tensors that two files hold: a \({FIRST} and {SECOND}\)"),
        (drop_a_tensor, rf"tensors that their files do not hold: d \({SECOND}\)"),
        (unname_a_tensor, rf"tensors in the files that it does not name: b \({FIRST}\)"),
        (name_a_tensor_twice, r"index\.json: not valid JSON: .*b"),
        (leave_the_folder, r"'a' in '\.\./model\.safetensors', which is not the name of a file"),
        (break_the_index, r"index\.json: not valid JSON"),
        (empty_the_index, r"index\.json: has no 'weight_map'"),
        (add_a_single_file, r"has both model\.safetensors and model\.safetensors\.index\.json"),
        (delete_the_index, r"model\.safetensors does not exist, nor does model\.safetensors\.ind"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(sharded, damage, message):
    damage(sharded)
    # UserError, which entry points print without a traceback.
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsReader(sharded)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_folder_of_pickles_is_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsFileError, match=r"as a pickle only \(pytorch_model\.bin\).*save_p"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"no weights at all", b"\0" * 64])
def test_what_is_no_safetensors_file_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsFileError, match=r"model\.safetensors: is damaged or cut off"):
        SafetensorsReader(tmp_path)


def test_long_lists_are_shortened(tmp_path):
    write_safetensors(tmp_path, ((f"t{n}", np.zeros(4)) for n in range(50)), 100)
    change_index(tmp_path, lambda places: [places.pop(name) for name in list(places)[::3]])
    with pytest.raises(WeightsFileError, match=r"t0 .* and 9 more\. The index"):
        SafetensorsReader(tmp_path)
