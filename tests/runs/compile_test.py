"""Programs for slices that are not here: one process compiles them all, where libtpu is."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatransformer_jax.sharding.topology import QUIET_ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, which compiles for TPUs: pip install -e '.[tpu]'",
    ),
]

# tiny with the head width of larger models.
PROGRAM = """
import contextlib, io, json, sys
import jax
import jax.numpy as jnp
import megatransformer_jax as mt
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.build import build
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.generation.parallel import _sample
from megatransformer_jax.runs import compile_programs as programs
from megatransformer_jax.sharding.topology import describe_devices, parse_topology

folder = sys.argv[1]
TINY = [
    "--config.preset=tiny", "--config.model.attention.num_heads=1", "--config.data.batch_size=8",
    "--config.data.sequence_length=128",
]

def run(name, *words):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            main("compile", [*TINY, *words, f"--json={folder}/{name}.json"])
            code = 0
        except SystemExit as ended:
            code = ended.code
    return {"code": code, "shown": shown.getvalue()}

found = {
    "v4": run("v4", "--topology=v4-8", f"--hlo={folder}/v4.hlo"),
    "v5e": run("v5e", "--topology=v5e-4", "--config.mesh.fsdp=4"),
    "slices": run("slices", "--topology=v6e:2x2", "--slices=2", "--config.model.remat=full"),
    "serve": run("serve", "--topology=v4-8", "--phase=serve", "--rows=4", "--depth=6"),
    "large": run(
        "large", "--topology=v5e-1", "--phase=prefill", "--rows=65536", "--prompt_tokens=128",
        "--new_tokens=64",
    ),
    "long": run("long", "--topology=v4-8", "--phase=decode", "--new_tokens=9"),
    "misfit": run("misfit", "--topology=v4-8", "--config.mesh.fsdp=3"),
}
def lower_parallel():
    # The command does not compile it.
    config = build({"preset": "tiny", "model": {"attention": {"num_heads": 1}}})
    options = CompileConfig(
        topology="v4-8", phase="decode", rows=2, prompt_tokens=64, new_tokens=64
    )
    place = programs._Placement.of(config, describe_devices(parse_topology("v4-8")))
    generation, _ = programs._generation(config, options, place)
    state = generation.state()
    cache = place.cache(2, state.cache)
    state = place.rows(2, state.replace(cache=None)).replace(cache=cache)
    numbers = [jax.ShapeDtypeStruct((), kind) for kind in (jnp.int32, jnp.float32)]
    return _sample.lower(
        generation.model, generation.params, generation.settings, state,
        *place.replicated(numbers), max_wavefront=4,
    )

found["parallel"] = lower_parallel().compile().as_text()[:10]
report = mt.inspect(
    "recurrent:tiny", topology="v5e-1", phase="decode", prompt_tokens=32, new_tokens=16
)
found["inspect"] = {"rows": report.rows, "shown": str(report)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def found(folder, repository):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=repository,
        env={**os.environ, **QUIET_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_train_step_for_v4_is_read(found, folder):
    assert found["v4"]["code"] == 0
    report = read(folder, "v4")
    assert report["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert report["attention"][0]["kernel"] == "splash"
    (program,) = report["programs"]
    mean, most = program["readings"]
    # Iterations without gradients: 2 of 4 at the mean, 62 of 64 at most.
    assert (mean["depth"], most["depth"]) == (4, 64)
    (given,) = (loop for loop in mean["loops"] if loop["trips_are"] == "given")
    assert given["trips"] == 2 and given["flops"] > 0
    assert most["flops"] - mean["flops"] == pytest.approx(60 * given["flops"])
    reductions = [item for item in mean["collectives"] if item["axes"] == ["data"]]
    assert reductions and all(item["loop"] is None for item in reductions)
    assert "splash in prelude, core and coda" in found["v4"]["shown"]
    assert (folder / "v4.hlo").read_text().startswith("HloModule jit_train_step")


def test_estimates_are_ordered_and_count_all_tokens(found, folder):
    mean, most = read(folder, "v5e")["speeds"]
    assert 0 < mean["floor_s"] < mean["no_overlap_s"] < most["no_overlap_s"]
    assert mean["tokens"] == 8 * 128
    assert mean["tokens_per_s"] == pytest.approx(1024 / mean["no_overlap_s"])
    assert 0 < mean["utilisation"] < 1


def test_weights_are_gathered_over_fsdp(found, folder):
    (program,) = read(folder, "v5e")["programs"]
    kinds = {item["kind"] for item in program["readings"][0]["collectives"]}
    assert "all-gather" in kinds
    assert "over" in found["v5e"]["shown"] and "fsdp" in found["v5e"]["shown"]


def test_two_slices_meet_over_their_network(found, folder):
    report = read(folder, "slices")
    assert report["chips"] == 8 and report["layout"].startswith("data on 2 slices")
    (program,) = report["programs"]
    assert any(item["kind"] == "send" for item in program["readings"][0]["collectives"])


def test_a_servers_programs_give_each_row_a_token(found, folder):
    report = read(folder, "serve")
    assert [program["name"] for program in report["programs"]] == ["prefill", "turn", "step"]
    readings = {program["name"]: program["readings"][0] for program in report["programs"]}
    # The step's other loops are the turn's.
    assert [loop["source"] for loop in readings["step"]["loops"] if loop["trips"] == 6] == [
        "jit(step)/while/body/advance/while"
    ]
    assert readings["step"]["hbm_bytes"] > readings["turn"]["hbm_bytes"]
    (speed,) = report["speeds"]
    assert (speed["depth"], speed["tokens"]) == (6, 4)


def test_what_does_not_fit_ends_with_4(found, folder):
    assert found["large"]["code"] == 4
    report = read(folder, "large")
    assert not report["fits"] and report["speeds"] == []
    assert "HBM" in report["programs"][0]["problem"]
    assert "does not fit v5e-1" in found["stderr"]


def test_a_mesh_that_does_not_fit_is_bad_input(found):
    assert found["misfit"]["code"] == 2
    assert "The nearest mesh that fits is mesh.data=" in found["stderr"]


def test_texts_that_are_too_long_are_bad_input(found):
    assert found["long"]["code"] == 2
    message = "--prompt_tokens: 512, with new_tokens=9, is more than the model's max_length=256"
    assert message in found["stderr"]


def test_parallel_decoding_compiles(found):
    assert found["parallel"] == "HloModule "


def test_a_notebook_gets_the_same(found):
    (row,) = found["inspect"]["rows"]
    assert row["program"] == "decode" and row["fits"] and row["no_overlap_s"] > 0
    shown = " ".join(found["inspect"]["shown"].split())
    assert "Loops of the decode" in shown
    assert "in HBM besides arguments and results" in shown
    assert "CMEM" in found["v4"]["shown"] and "CMEM" not in shown  # Only v4 has it.
    assert "Products of a single row are computed element by element" in shown
