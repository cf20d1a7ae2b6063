"""How many rows fit, found by compiling few sizes; the compiler is played by a straight line."""

import dataclasses
import types

import pytest

from megatransformer_jax.compiled.chips import CHIPS
from megatransformer_jax.config.build import build
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.runs import compile as compiling
from megatransformer_jax.runs.compile_programs import PhasePrograms
from megatransformer_jax.training.micro_batch import StepMemory

DEVICES = [types.SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")]
MIB = 2**20
FIXED, HBM = 1024 * MIB, int(15.75 * 2**30)


@pytest.fixture
def headroom(monkeypatch):
    """A function from (rows, MiB of a row) to the headroom, and the rows that were compiled."""

    def find(rows, mib):
        asked = []

        def program(name, rows):
            needed = FIXED + rows * mib * MIB
            memory = StepMemory(needed, 0, 0) if needed <= HBM else None
            problem = "" if memory else "exceeds HBM"
            return compiling.CompiledProgram(name, 0.0, 0.0, memory, 0, problem, {}, "")

        def phase(config, options, devices):
            held = options.rows * mib * MIB // 2
            return PhasePrograms({"decode": lambda: None}, None, (), 0, held, options.rows, 2)

        def compile_program(name, lower, read, progress, options):
            asked.append(int(name.split()[-2]))
            return program(name, asked[-1])

        monkeypatch.setattr(compiling, "phase_programs", phase)
        monkeypatch.setattr(compiling, "compile_program", compile_program)
        config = build({"preset": "tiny"})
        options = CompileConfig(topology="v5e-1", phase="decode", rows=rows)
        first = phase(config, options, DEVICES)
        given = (config, options, DEVICES, CHIPS["v5e"], first, [program("decode", rows)])
        found = compiling._find_headroom(*given, lambda doing: None)
        return dataclasses.astuple(found), asked

    return find


def test_twice_the_rows_that_fit_show_how_many_would(headroom):
    # 15104 MiB are left, of which a row takes 100.
    assert headroom(32, 100) == ((64, None, 150), [64])


def test_halving_ends_between_what_fits_and_what_does_not(headroom):
    (most, too_many, estimate), asked = headroom(100, 100)
    assert most <= 151 < too_many and too_many - most <= 100 // 16
    assert estimate is None and asked[0] == 200 and len(asked) <= 6
    assert all(rows % 2 == 0 for rows in asked)


def test_rows_that_cannot_be_cut_finer_end_the_halving(headroom):
    assert headroom(2, 7000) == ((2, 4, None), [4])


def test_rows_that_no_chip_could_hold_are_not_compiled(headroom):
    assert headroom(2, 9000) == ((2, 4, None), [])
