"""The command line of evaluate: what goes together and what does not."""

import re

import pytest

from megatransformer_jax.cli import flags
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.cli.evaluate import COMMAND


def parse(*words):
    return flags.parse(COMMAND, words)


def test_values_reach_the_command():
    parsed = parse("--model=a", "--depths=1,4", "--files=x.txt,y.txt", "--num_batches=3")
    assert parsed.options.model == "a"
    assert parsed.options.depths == (1, 4)
    assert parsed.options.files == ("x.txt", "y.txt")
    assert parsed.options.num_batches == 3
    assert parsed.generation.strategy == "greedy"


def test_generation_has_its_options():
    parsed = parse(
        "--model=a", "--references=r.jsonl", "--strategy=sample", "--temperature=0.5", "--stop=x"
    )
    assert parsed.generation.strategy == "sample"
    assert parsed.generation.sampling.temperature == 0.5
    assert parsed.generation.stop == ("x",)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--model: is missing"),
        (("--predictions=p",), "--references: is missing"),
        (("--model=a", "--predictions=p", "--references=r"), "--predictions: are scored without"),
        (("--model=a", "--references=r", "--files=x.txt"), "--files: .* with references"),
        (("--model=a", "--references=r", "--num_batches=1"), "--num_batches: .* with references"),
        (("--references=r", "--predictions=p", "--depths=1"), "--depths: .* with predictions"),
        (("--references=r", "--predictions=p", "--top_k=1"), "--top_k: would be ignored"),
        (("--model=a", "--max_new_tokens=3"), "--max_new_tokens: would be ignored"),
        (("--model=a", "--references=r", "--temperature=2"), "--temperature: .*strategy"),
        (("--model=a", "--depths=0"), "--depths: .*at least 1"),
        (("--model=a", "--depths=2,2"), "--depths: .*names one twice"),
        (("--model=a", "--text_field=body"), "--text_field: .*without files"),
        (("--model=a", "--files=a.doc"), "--files: '.doc' is not known"),
        (("--model=a", "--files=a.txt,b.jsonl"), "--files: has .*all names must end"),
        (("--model=a", "--batch_size=0"), "--batch_size: .*at least 1"),
        (("--model=a", "--depth=2"), "--depth: no such option; did you mean --depths?"),
        (("--model=a", "--refrences=2"), "did you mean --references?"),
        (("--model=a", "--num_samples=2"), "--num_samples: no such option"),
        (("a",), "'a' is not an option"),
    ],
)
def test_what_does_not_go_together(words, problem, capsys):
    with pytest.raises(SystemExit) as caught:
        command("evaluate", words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(problem, error)
