import pathlib

import pytest

from megatransformer_jax.config.build import parse_variants, read_experiment
from megatransformer_jax.config.option import UserError

PYTHON = """
from ml_collections import ConfigDict

def get_config(arg=""):
    return ConfigDict({"preset": "tiny", "workdir": arg or "none", "model": {"width": 32}})
"""


def write(folder: pathlib.Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_python_yaml_and_json_give_the_same_values(tmp_path: pathlib.Path) -> None:
    expected = {"preset": "tiny", "workdir": "none", "model": {"width": 32}}
    assert read_experiment(write(tmp_path, PYTHON)) == expected
    yaml = write(tmp_path, "preset: tiny\nworkdir: none\nmodel: {width: 32}\n", "mine.yaml")
    assert read_experiment(yaml) == expected
    json = '{"preset": "tiny", "workdir": "none", "model": {"width": 32}}'
    assert read_experiment(write(tmp_path, json, "mine.json")) == expected


def test_what_follows_the_colon_goes_to_get_config(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, PYTHON)
    assert read_experiment(f"{path}:a,b:c.json")["workdir"] == "a,b:c.json"
    assert read_experiment(f"{path}:")["workdir"] == "none"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1", "has no get_config"),
        ("def get_config(): return 3", "returned int"),
        ("def get_config(): return {'modle': {}}", r"modle: no such option; did you mean 'model'"),
        ("def get_config(): return {'train': {'steps': '9'}}", "train.steps: '9' is of type str"),
        ("\n\ndef get_config(: pass", r"mine\.py:3: SyntaxError"),
        ("def get_config():\n    return unknown", r"mine\.py:2: NameError: name 'unknown'"),
        ("\nimport no_such_module", r"mine\.py:2: ModuleNotFoundError"),
    ],
)
def test_a_faulty_python_file_is_named(tmp_path: pathlib.Path, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        read_experiment(write(tmp_path, text))
    assert "mine.py" in str(caught.value)


def test_an_argument_that_nothing_takes_is_an_error(tmp_path: pathlib.Path) -> None:
    without = write(tmp_path, "def get_config(): return {}")
    with pytest.raises(UserError, match="takes no argument; remove ':tiny'"):
        read_experiment(f"{without}:tiny")
    with pytest.raises(UserError, match=r"only \.py files take an argument"):
        read_experiment(write(tmp_path, "{}", "mine.json") + ":tiny")


@pytest.mark.parametrize("reference", ["", "mine", "mine.toml", "py", "mine.pyc"])
def test_another_kind_of_file_is_an_error(reference: str) -> None:
    with pytest.raises(UserError, match="is not an experiment"):
        read_experiment(reference)


def test_variants_of_one_group_exclude_each_other() -> None:
    known, groups = ("tiny", "linear", "diagonal"), (("linear", "diagonal"),)
    assert parse_variants("tiny,linear", known, groups) == {"tiny", "linear"}
    with pytest.raises(UserError, match="'linear' and 'diagonal' exclude each other; choose one"):
        parse_variants("diagonal,linear", known, groups)


def test_variants_combine_and_unknown_ones_are_errors() -> None:
    assert parse_variants("", ("tiny", "diagonal")) == set()
    assert parse_variants("tiny, diagonal", ("tiny", "diagonal")) == {"tiny", "diagonal"}
    with pytest.raises(
        UserError, match=r"unknown variant 'tinny'; did you mean 'tiny'\? known: tiny, diagonal"
    ):
        parse_variants("tinny", ("tiny", "diagonal"))
