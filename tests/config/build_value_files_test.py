import pathlib

import pytest

from megatransformer_jax.config.build import read_values
from megatransformer_jax.config.option import UserError


def write(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
    path = folder / name
    path.write_text(text)
    return path


def test_yaml_and_json_give_the_same_values(tmp_path: pathlib.Path) -> None:
    yaml_path = write(
        tmp_path, "a.yaml", "model: {width: 64}\ndata:\n  files: [a, b]\n  shuffle: false\n"
    )
    json_path = write(
        tmp_path,
        "a.json",
        '{"model": {"width": 64}, "data": {"files": ["a", "b"], "shuffle": false}}',
    )
    assert read_values(yaml_path) == read_values(json_path)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "+1e-3", "1.0e-3"])
def test_yaml_reads_numbers_with_an_exponent(tmp_path: pathlib.Path, text: str) -> None:
    values = read_values(write(tmp_path, "a.yaml", f"optimizer: {{learning_rate: {text}}}"))
    assert values["optimizer"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"train": {"steps": 1, "steps": 2}}'),
        ("a.yaml", "train:\n  steps: 1\n  steps: 2\n"),
        ("a.yml", "train: {steps: 1}\ntrain: {seed: 2}\n"),
    ],
)
def test_a_repeated_key_is_an_error(tmp_path: pathlib.Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .*appears twice"):
        read_values(write(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "- 1", "holds list"),
        ("a.yaml", "", "holds NoneType"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: pathlib.Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"{name}: {problem}"):
        read_values(write(tmp_path, name, text))


def test_a_missing_file_names_its_neighbours(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "other.yaml", "")
    with pytest.raises(UserError, match=r"no such config file\. .* has: other\.yaml"):
        read_values(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="There is no folder"):
        read_values(tmp_path / "folder" / "missing.yaml")


def test_a_file_that_is_not_text_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_values(tmp_path / "a.json")
