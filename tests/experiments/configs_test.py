"""The experiments that come with the project build, with every variant."""

import itertools
import pathlib

import pytest

from experiments import launch
from experiments.configs import image_vae, reasoning, recurrent, vocoder
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig

FOLDER = pathlib.Path(recurrent.__file__).parent


def parse(reference: str) -> RunConfig:
    return launch.parse(["program", f"--config={FOLDER}/{reference}"])


@pytest.mark.parametrize("module", [recurrent, reasoning, vocoder, image_vae])
def test_every_combination_of_variants_builds(module) -> None:
    name = pathlib.Path(module.__file__).name
    workdirs = set()
    counts = range(len(module.VARIANTS) + 1)
    combinations = [c for n in counts for c in itertools.combinations(module.VARIANTS, n)]
    for variants in combinations:
        config = parse(f"{name}:{','.join(variants)}")
        workdirs.add(config.workdir)
        assert (config.train.steps <= 100) == ("tiny" in variants)
    assert len(workdirs) == len(combinations)  # No variant overwrites another's run.


def test_an_unknown_variant_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"reasoning\.py: unknown variant 'huge'; known: tiny"):
        parse("reasoning.py:tiny,huge")


def test_the_recurrent_run_is_the_one_described() -> None:
    config = parse("recurrent.py")
    assert config.preset.startswith("recurrent_small")
    assert config.data.source == "embedded_text"
    assert config.data.tokenizer.kind == "sentencepiece"
    assert config.evaluation.final_depths == (1, 2, 4, 8, 16, 32)
    assert config.model.is_recurrent
    tiny = parse("recurrent.py:tiny")
    assert (tiny.preset, tiny.model.vocab_size) == ("tiny", 512)
    assert tiny.evaluation.final_depths == (1, 2, 4, 8)


def test_the_reasoning_run_is_judged_on_longer_problems_than_it_trains_on() -> None:
    for variant, adapter in (("", "linear"), (":diagonal", "diagonal")):
        config = parse(f"reasoning.py{variant}")
        assert config.model.recurrence.adapter == adapter
        assert config.data.reasoning.eval_min_length > config.data.reasoning.max_length
        assert config.data.sequence_length > config.data.reasoning.eval_max_length


def test_the_variants_of_stability_and_learned_depth_do_what_they_say() -> None:
    stable = parse("reasoning.py:stable")
    assert stable.train.stability.jacobian_weight > 0
    assert not stable.model.exit_gate.enabled
    gate = parse("reasoning.py:diagonal,stable,gate")
    assert gate.model.exit_gate.enabled and gate.train.exit_gate.detach
    assert gate.fine_tuning.init_from == parse("reasoning.py:diagonal,stable").workdir
    assert gate.fine_tuning.trains("exit_gate/weight")
    assert not gate.fine_tuning.trains("core/layers/layer_0/mlp/up")
    plain = parse("reasoning.py")
    assert plain.train.stability.jacobian_weight == 0 and not plain.model.exit_gate.enabled


def test_each_config_states_its_command() -> None:
    for module in (recurrent, reasoning, vocoder, image_vae):
        name = pathlib.Path(module.__file__).name
        command = f"python -m experiments.train --config=experiments/configs/{name}"
        assert command in (module.__doc__ or "")
        assert "Expected" in (module.__doc__ or "")
