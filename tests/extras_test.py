"""Packages of extras are asked for by name, in one wording, and the base needs none of them."""

import subprocess
import sys

import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.extras import import_extra

# Modules that the base install does not bring, neither itself nor through what it brings.
OF_EXTRAS = (
    "librosa",
    "sklearn",
    "soundfile",
    "soxr",
    "pyarrow",
    "tensorflow_datasets",
    "lm_eval",
    "jiwer",
    "pesq",
    "pystoi",
    "rouge_score",
    "sacrebleu",
    "tokenizers",
    "qwix",
    "wandb",
)
# Whatever a finder does not find is as good as not installed.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without(names, code, *arguments):
    script = HIDE.format(names=set(names)) + code
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )


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


@pytest.fixture(scope="module")
def in_the_base(tmp_path_factory):
    code = """
import megatransformer_jax as mt

config = mt.configure(
    "recurrent:tiny",
    workdir=sys.argv[1],
    train={"steps": 2},
    evaluation={"every_steps": 2, "num_batches": 1, "final_depths": [1, 2]},
    samples={"every_steps": 2, "max_new_tokens": 2},
    optimizer={"warmup_steps": 1},
)
mt.Trainer(config).run()
lm = mt.load(sys.argv[1])
assert len(lm.generate("The", depth=2, max_new_tokens=2).token_ids) == 2
assert len(mt.evaluate(lm, depths=[1, 2], num_batches=1).rows) == 2
from megatransformer_jax.cli.commands import main
main("train", ["--help"])
"""
    return run_without(OF_EXTRAS, code, str(tmp_path_factory.mktemp("base") / "run"))


def test_the_base_trains_evaluates_and_generates_without_any_extra(in_the_base):
    assert in_the_base.returncode == 0, in_the_base.stderr[-3000:]
    assert "--config" in in_the_base.stdout


def test_a_script_sees_each_message_once_and_none_of_other_libraries(in_the_base):
    assert in_the_base.stderr.count("compiling the train step") == 1
    assert in_the_base.stderr.count("validation after step 2") == 1
    assert "orbax" not in in_the_base.stderr


@pytest.mark.parametrize(
    ("command", "names", "extra"),
    [
        (["lm-eval", "--tasks=x", "--model=y"], {"lm_eval"}, "eval"),
        (["train", "--config=image"], {"sklearn"}, "media"),
        (["train", "--config=vocoder"], {"soxr", "librosa", "soundfile"}, "media"),
    ],
)
def test_a_command_that_needs_an_extra_says_which(tmp_path, command, names, extra):
    code = """
from megatransformer_jax.cli.commands import main
main(None, sys.argv[1:])
"""
    if command[0] == "train":
        command = [*command, f"--config.workdir={tmp_path}"]
    done = run_without(names, code, *command)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("\n") < 5
    assert f"pip install 'megatransformer_jax[{extra}]'" in done.stderr
