"""The experiments that come with the project build, with every variant."""

import ast
import itertools
from typing import Any

import pytest
from tpu_chips import torus

from megatransformer_jax.config.build import configure, experiment_folder, experiment_names
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.runs.cost import make_report
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.topology import parse_topology

# All but the one whose argument is a model.
NAMES = tuple(name for name in experiment_names() if name != "retrofit")


def parse(reference: str) -> RunConfig:
    return configure(reference, {})


def source(name: str) -> ast.Module:
    return ast.parse((experiment_folder() / f"{name}.py").read_text(encoding="utf-8"))


def constant(name: str, variable: str) -> Any:
    """The literal that the file of an experiment assigns, or None."""
    for statement in source(name).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == variable:
            return ast.literal_eval(statement.value)
    return None


def combinations_of(name: str) -> list[tuple[str, ...]]:
    """Of variants, without those of which two exclude each other (EXCLUSIVE): of many, pairs."""
    known = constant(name, "VARIANTS")
    exclusive = constant(name, "EXCLUSIVE") or ()
    most = len(known) if len(known) <= 6 else 2
    combinations = itertools.chain.from_iterable(
        itertools.combinations(known, count) for count in range(most + 1)
    )
    return [
        chosen
        for chosen in combinations
        if all(len(set(group) & set(chosen)) < 2 for group in exclusive)
    ]


def test_all_experiments_are_found() -> None:
    assert {"recurrent", "reasoning", "image", "audio", "multimodal", "vocoder"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_of_variants_builds(name: str) -> None:
    combinations = combinations_of(name)
    workdirs = set()
    for variants in combinations:
        config = parse(f"{name}:{','.join(variants)}")
        workdirs.add(config.workdir)
        assert (config.train.steps <= 100) == ("tiny" in variants)
    assert len(workdirs) == len(combinations)  # No variant overwrites another's run.


def test_an_unknown_variant_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"reasoning\.py: unknown variant 'huge'; known: tiny"):
        parse("reasoning:tiny,huge")


def test_the_recurrent_run_is_the_one_described() -> None:
    config = parse("recurrent")
    assert (config.preset, parse("recurrent:small").preset) == (
        "recurrent_mini",
        "recurrent_small_sandwich",
    )
    assert config.data.source == "embedded_text"
    assert config.data.tokenizer.kind == "sentencepiece"
    assert config.evaluation.final_depths == (1, 2, 4, 8, 16, 32)
    assert config.model.is_recurrent
    tiny = parse("recurrent:tiny")
    assert (tiny.preset, tiny.model.vocab_size) == ("tiny", 512)
    assert tiny.evaluation.final_depths == (1, 2, 4, 8)


def test_the_reasoning_run_is_judged_on_longer_problems_than_it_trains_on() -> None:
    for variant, adapter in (("", "linear"), (":diagonal", "diagonal")):
        config = parse(f"reasoning{variant}")
        assert config.model.recurrence.adapter == adapter
        assert config.data.reasoning.eval_min_length > config.data.reasoning.max_length
        assert config.data.sequence_length > config.data.reasoning.eval_max_length


def test_the_variants_of_stability_and_learned_depth_do_what_they_say() -> None:
    stable = parse("reasoning:stable")
    assert stable.train.stability.jacobian_weight > 0
    assert not stable.model.exit_gate.enabled
    gate = parse("reasoning:diagonal,stable,gate")
    assert gate.model.exit_gate.enabled and gate.train.exit_gate.detach
    assert gate.fine_tuning.init_from == parse("reasoning:diagonal,stable").workdir
    assert gate.fine_tuning.trains("exit_gate/weight")
    assert not gate.fine_tuning.trains("core/layers/layer_0/mlp/up")
    plain = parse("reasoning")
    assert plain.train.stability.jacobian_weight == 0 and not plain.model.exit_gate.enabled


@pytest.mark.parametrize("name", NAMES)
def test_each_config_states_its_command_and_result(name: str) -> None:
    text = ast.get_docstring(source(name)) or ""
    assert f"megatransformer train --config={name}" in text
    assert "Expected" in text


PODS = {
    "recurrent_pod": ("v4-8", 1),
    "recurrent_pod:v5e_16": ("v5e-16", 1),
    "huginn_pod": ("v4-128", 1),
    "huginn_pod:v5e_256": ("v5e-256", 1),
    "huginn_pod:two_slices": ("v4-128", 2),
    "huginn_pod:v5e_256,two_slices": ("v5e-256", 2),
    "multimodal_pod": ("v4-32", 1),
}


@pytest.mark.parametrize("reference", PODS)
def test_the_mesh_of_a_run_for_a_slice_can_be_laid_on_it(reference: str) -> None:
    topology = parse_topology(*PODS[reference])
    x, y, *z = topology.box
    chips = [chip for number in range(topology.slices) for chip in torus(x, y, *z or [1], number)]
    config = parse(reference)
    mesh = make_mesh(config.mesh, chips)
    check_run_fits_mesh(config, mesh)
    assert mesh.size == topology.chips
    assert mesh.shape["data"] == config.mesh.data  # As it says, not what is left.


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["recurrent_pod:v5e_16", "huginn_pod:v5e_256"])
def test_a_run_for_a_slice_fits_its_chips(reference: str) -> None:
    device = PODS[reference][0].partition("-")[0]
    assert device in make_report(parse(reference), device).fits
