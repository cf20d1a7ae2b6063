"""The user's function is found, called and its result checked."""

import pickle
import sys
import types

import pytest
from markdown_pages import python_blocks

import megatransformer_jax as mt
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.augmentation.text import BackTranslation, FailedAugmentation


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch):
    """Puts a function where 'user_module:translate' finds it."""

    def install(value) -> BackTranslation:
        module = types.ModuleType("user_module")
        module.translate = value
        monkeypatch.setitem(sys.modules, "user_module", module)
        return BackTranslation("user_module:translate")

    return install


def test_the_function_gets_text_and_seed(function):
    translation = function(lambda text, seed: f"{text}/{seed}")
    assert translation.apply("one", 7, 0) == "one/7"
    assert pickle.loads(pickle.dumps(translation)).apply("two", 8, 0) == "two/8"


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, "returned NoneType, not text"),
        (b"x", "returned bytes, not text"),
        (" \n", "returned an empty text"),
        ("a\ud800", "returned a lone surrogate"),
    ],
)
def test_a_bad_result_names_the_document(function, result, problem: str):
    failed = function(lambda text, seed: result).apply("The first words", 1, 42)
    assert isinstance(failed, FailedAugmentation)
    assert problem in failed.message
    assert "user_module:translate" in failed.message
    assert "document 42 of the training stream, which begins 'The first words'" in failed.message


def test_an_exception_names_the_place(function):
    def translate(text: str, seed: int) -> str:
        raise KeyError("no model")

    failed = function(translate).apply("text", 1, 3)
    assert isinstance(failed, FailedAugmentation)
    assert "raised KeyError: 'no model' (" in failed.message and __file__ in failed.message


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module_of_mine:f", "importing no_such_module_of_mine raised ModuleNotFoundError"),
        ("math:no_such", "math has no no_such"),
        ("math:pi", "is float, not a function"),
    ],
)
def test_a_name_without_a_function_is_an_error(name: str, problem: str):
    with pytest.raises(ConfigError, match=problem) as caught:
        BackTranslation(name)
    assert caught.value.path == "data.augmentation.back_translation"


def test_the_documented_translation_runs(repository, monkeypatch: pytest.MonkeyPatch):
    """With one small model, which has learned nothing, in place of both."""
    page = (repository / "docs" / "data.md").read_text()
    [code] = [block for block in python_blocks(page) if "there_and_back" in block]
    model = mt.create(
        "tiny",
        tokenizer=mt.BytesTokenizer(),
        width=16,
        prelude_layers=0,
        core_layers=1,
        coda_layers=0,
        attention={"num_heads": 2},
        mlp={"hidden_width": 16},
    )
    asked = []
    monkeypatch.setattr(mt, "load", lambda folder: asked.append(folder) or model)
    module = types.ModuleType("documented_translation")
    exec(compile(code, "docs/data.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    translation = BackTranslation(f"{module.__name__}:there_and_back")
    text = "Good morning.\n\nGood night."
    first, again, other = (translation.apply(text, seed, 0) for seed in (1, 1, 2))
    assert isinstance(first, str) and first == again != other
    assert first != text and first.splitlines()[1] == ""
    assert asked == ["runs/to_german", "runs/to_english"]
