"""Which trials a search makes, in which order; nothing is compiled."""

import math
import types

import pytest
from tpu_chips import torus

from megatransformer_jax.config.build import build
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.runs import compile_search
from megatransformer_jax.runs.compile import Speed
from megatransformer_jax.runs.compile_search import Candidate, search

COMPILING = CompileConfig(topology="v4-8")


@pytest.fixture
def tried(monkeypatch):
    """Runs in the order in which they were tried; those without remat do not fit."""
    runs = []

    def compile_for_topology(config, compiling, progress):
        runs.append(config)
        fits = config.model.remat != "none"
        seconds = 2.0 if config.mesh.tensor > 1 else 1.0
        speeds = (Speed(8, 0.5, seconds, 1024, 0.5),) if fits else ()
        return types.SimpleNamespace(fits=fits, speeds=speeds, programs=())

    monkeypatch.setattr(compile_search, "describe_devices", lambda topology: torus(2, 2, 1))
    monkeypatch.setattr(compile_search, "compile_for_topology", compile_for_topology)
    monkeypatch.setattr(compile_search, "_expected_bytes", lambda config, kind: 0)
    return runs


def run(heads=4, **data):
    data = {"batch_size": 8, "sequence_length": 128, **data}
    model = {"attention": {"num_heads": heads}}
    return build({"preset": "tiny", "model": model, "data": data})


def test_what_cannot_be_faster_than_what_fits_is_not_compiled(tried):
    found = search(run(), COMPILING, 600.0)
    by_mesh = {}
    for config in tried:
        sizes = tuple(getattr(config.mesh, axis) for axis in compile_search.MESH_AXES)
        by_mesh.setdefault(sizes, []).append((config.train.accumulation, config.model.remat))
    for attempts in by_mesh.values():
        # remat=dots fits with one micro-batch, so neither what keeps less nor more micro-batches.
        assert {remat for _, remat in attempts} == {"none", "dots"} and attempts[0] == (1, "none")
        assert attempts.count((1, "dots")) == 1 and (2, "dots") not in attempts
    assert all(math.prod(sizes) == 4 for sizes in by_mesh) and (1, 4, 1, 1) in by_mesh
    # The cheapest to compile come first, and the fastest stands last.
    assert next(iter(by_mesh))[2:] == (1, 1)
    assert found.fits and found.left == 0
    assert found.trials[0].no_overlap_s == math.inf and found.trials[-1].no_overlap_s == 1.0


def test_states_go_to_the_host_where_nothing_else_fits(tried, monkeypatch):
    compile_one = compile_search.compile_for_topology

    def only_offload(config, compiling, progress):
        done = compile_one(config, compiling, progress)
        fits = config.model.remat == "offload"
        return types.SimpleNamespace(**(vars(done) | {"fits": fits}))

    monkeypatch.setattr(compile_search, "compile_for_topology", only_offload)
    found = search(run(), COMPILING, 600.0)
    fitting = {trial.candidate.remat for trial in found.trials if trial.report.fits}
    assert fitting == {"offload"}
    mesh = found.trials[-1].candidate.mesh
    tries = [trial.candidate for trial in found.trials if trial.candidate.mesh == mesh]
    # With one micro-batch, so no more of them are tried with it.
    assert [tried.accumulation for tried in tries if tried.remat == "offload"] == [1]


def test_a_search_ends_with_its_budget_but_tries_once(tried):
    found = search(run(), COMPILING, 0.0)
    assert len(tried) == len(found.trials) == 1 and found.left > 0 and not found.fits


def test_what_is_far_too_large_is_not_compiled(tried, monkeypatch):
    monkeypatch.setattr(
        compile_search,
        "_expected_bytes",
        lambda config, kind: 1 << (20 if config.mesh.fsdp == 4 else 50),
    )
    found = search(run(), COMPILING, 600.0)
    assert {config.mesh.fsdp for config in tried} == {4} and found.hopeless > 0


def test_a_run_without_a_mesh_is_an_error(tried):
    with pytest.raises(ConfigError, match=r"no mesh over the 4 chips of v4:2x2x1 suits this run"):
        search(run(heads=1, batch_size=7, sequence_length=127), COMPILING, 600.0)


def test_a_candidate_says_how_to_repeat_it():
    candidate = Candidate((2, 2, 1, 1), "full", 4)
    assert candidate.options() == (
        "--config.mesh.data=2 --config.mesh.fsdp=2 --config.model.remat=full "
        "--config.train.accumulation=4"
    )
