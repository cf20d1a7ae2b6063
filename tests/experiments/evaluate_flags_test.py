"""The command line of experiments.evaluate: what goes together and what does not."""

import pytest

from experiments import evaluate, evaluate_flags
from experiments.evaluate_flags import OF_GENERATION, OWN_OPTIONS
from experiments.evaluate_help import help_text
from megatransformer_jax.config.option import UserError


def parse(*words):
    return evaluate_flags.parse(["evaluate", *words])


def test_values_reach_the_command():
    command = parse("--from=a", "--depths=1,4", "--data=x.txt,y.txt", "--num_batches=3")
    assert command.options.model == "a"
    assert command.options.depths == (1, 4)
    assert command.options.data == ("x.txt", "y.txt")
    assert command.options.num_batches == 3
    assert command.generation.strategy == "greedy"


def test_generation_has_its_options():
    command = parse(
        "--from=a", "--references=r.jsonl", "--strategy=sample", "--temperature=0.5", "--stop=x"
    )
    assert command.generation.strategy == "sample"
    assert command.generation.sampling.temperature == 0.5
    assert command.generation.stop == ("x",)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "--from: is missing"),
        (("--predictions=p",), "--references: is missing"),
        (("--from=a", "--predictions=p", "--references=r"), "--predictions: are scored without"),
        (("--from=a", "--references=r", "--data=x.txt"), "--data: .* with references"),
        (("--from=a", "--references=r", "--num_batches=1"), "--num_batches: .* with references"),
        (("--references=r", "--predictions=p", "--depths=1"), "--depths: .* with predictions"),
        (("--references=r", "--predictions=p", "--top_k=1"), "--top_k: would be ignored"),
        (("--from=a", "--max_new_tokens=3"), "--max_new_tokens: would be ignored"),
        (("--from=a", "--references=r", "--temperature=2"), "--temperature: .*strategy"),
        (("--from=a", "--depths=0"), "--depths: .*at least 1"),
        (("--from=a", "--depths=2,2"), "--depths: .*names one twice"),
        (("--from=a", "--text_field=body"), "--text_field: .*without data"),
        (("--from=a", "--data=a.doc"), "--data: '.doc' is not known"),
        (("--from=a", "--data=a.txt,b.jsonl"), "--data: has .*all names must end"),
        (("--from=a", "--batch_size=0"), "--batch_size: .*at least 1"),
        (("--workdir=a",), "--workdir: no such option; did you mean --from?"),
        (("--from=a", "--depth=2"), "--depth: no such option; did you mean --depths?"),
        (("--from=a", "--refrences=2"), "did you mean --references?"),
        (("--from=a", "--num_samples=2"), "--num_samples: no such option"),
        (("a",), "'a' is no option"),
    ],
)
def test_what_does_not_go_together(words, problem, capsys):
    with pytest.raises(UserError, match=problem):
        parse(*words)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["evaluate", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_has_every_option(capsys):
    evaluate.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert text == help_text(evaluate.__doc__) + "\n"
    for name in (*OWN_OPTIONS, *OF_GENERATION):
        assert f"  --{name} (" in text
