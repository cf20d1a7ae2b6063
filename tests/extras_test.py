"""Packages of extras are asked for by name, in one wording."""

import pytest
from without_extras import run_without

from megatransformer_jax.config.option import UserError
from megatransformer_jax.extras import import_extra

MAIN = """
from megatransformer_jax.cli.commands import main
main(None, sys.argv[1:])
"""


def test_a_module_that_is_there_is_imported():
    assert import_extra("json.decoder", "media", "an example").__name__ == "json.decoder"


def test_one_that_is_not_says_what_needs_it_and_how_to_get_it():
    with pytest.raises(UserError) as raised:
        import_extra("not_there.inner", "media", "files of sound")
    assert str(raised.value) == (
        "files of sound: not_there cannot be imported (No module named 'not_there'); install the "
        "extra 'media': pip install 'megatransformer_jax[media]', or pip install -e '.[media]' in "
        "a checkout."
    )


@pytest.mark.parametrize(
    ("command", "names", "extra"),
    [
        (["lm-eval", "--tasks=x", "--model=y"], {"lm_eval"}, "eval"),
        (["serve", "--model=x"], {"uvicorn"}, "serve"),
        (["train", "--config=image"], {"sklearn"}, "media"),
        (["train", "--config=vocoder"], {"soxr", "librosa", "soundfile"}, "media"),
    ],
)
def test_a_command_that_needs_an_extra_says_which(tmp_path, command, names, extra):
    if command[0] == "train":
        command = [*command, f"--config.workdir={tmp_path}"]
    done = run_without(names, MAIN, *command)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("\n") < 5
    assert f"pip install 'megatransformer_jax[{extra}]'" in done.stderr
