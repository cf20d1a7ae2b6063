"""Time of exchanges in which the schedule has other operations."""

import pytest
from tpu_programs import looping, straight

from megatransformer_jax.compiled.chips import CHIPS
from megatransformer_jax.compiled.program import read_program

MESH = {"data": 2, "fsdp": 4}
CHIP = CHIPS["v4"]
WHOLE = 64 * 256 * 2
GATHER_S = 3 / 4 * WHOLE / CHIP.ici_bandwidth
# One negation reads and writes the array.
NEGATE_S = 2 * WHOLE / CHIP.hbm_bandwidth
START = (
    "(bf16[16,256]{1,0}, bf16[64,256]{1,0}) all-gather-start(%v), replica_groups=[2,4]<=[8], "
    "dimensions={0}"
)


def read(text):
    return read_program(text, MESH, CHIP, traced_trips={"core/while": 3})


def test_what_runs_between_start_and_end_hides_as_much_of_an_exchange_as_it_takes():
    reading = read(
        straight(
            f"""
            %v = bf16[16,256]{{1,0}} parameter(0)
            %x = bf16[64,256]{{1,0}} parameter(1)
            %before = bf16[64,256]{{1,0}} negate(%x)
            %s = {START}
            %a = bf16[64,256]{{1,0}} negate(%before)
            %b = bf16[64,256]{{1,0}} negate(%a)
            %d = bf16[64,256]{{1,0}} all-gather-done(%s)
            %after = bf16[64,256]{{1,0}} negate(%d)
            ROOT %whole = bf16[64,256]{{1,0}} all-gather(%v), replica_groups=[2,4]<=[8]
            """,
            devices=8,
        )
    )
    hidden, shown = reading.collectives
    assert hidden.seconds == shown.seconds == pytest.approx(GATHER_S)
    assert hidden.hidden_s == pytest.approx(2 * NEGATE_S) and 2 * NEGATE_S < GATHER_S
    assert shown.hidden_s == 0
    estimate = reading.estimate
    assert estimate.hidden_s == pytest.approx(2 * NEGATE_S)
    assert estimate.scheduled_s == pytest.approx(4 * NEGATE_S + 2 * GATHER_S - 2 * NEGATE_S)


def test_two_exchanges_take_turns_and_none_is_hidden_longer_than_it_takes():
    negations = "\n".join(f"%n{i} = bf16[64,256]{{1,0}} negate(%x)" for i in range(6))
    reading = read(
        straight(
            f"""
            %v = bf16[16,256]{{1,0}} parameter(0)
            %x = bf16[64,256]{{1,0}} parameter(1)
            %s = {START}
            %t = {START}
            {negations}
            %d = bf16[64,256]{{1,0}} all-gather-done(%s)
            ROOT %e = bf16[64,256]{{1,0}} all-gather-done(%t)
            """,
            devices=8,
        )
    )
    first, second = reading.collectives
    assert first.hidden_s == pytest.approx(GATHER_S)
    assert second.hidden_s == pytest.approx(6 * NEGATE_S - GATHER_S)


def test_pieces_in_other_computations_hide_an_exchange_in_every_turn_of_a_loop():
    """As the TPU compiler writes it: start and end are fusions with the collective's channel."""
    gather = "all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}"

    def fusion(name, target):
        return f"""
%{name} (p: bf16[16,256]) -> bf16[64,256] {{
  %p = bf16[16,256]{{1,0}} parameter(0)
  %all-gather.{name} = bf16[64,256]{{1,0}} {gather}
  ROOT %own.{name} = bf16[64,256]{{1,0}} custom-call(%all-gather.{name}), \
custom_call_target="{target}"
}}
"""

    def call(name, operand):
        return f"bf16[64,256]{{1,0}} fusion(%{operand}), kind=kCustom, calls=%{name}\n  "

    text = looping(
        f"%b = {call('begin', 'x')}%n = bf16[64,256]{{1,0}} negate(%x)\n  %y = {call('end', 'b')}",
        devices=8,
        before=fusion("begin", "AsyncCollectiveStart") + fusion("end", "AsyncCollectiveDone"),
        bound="bound.2",
    )
    reading = read(text)
    (gathered,) = reading.collectives
    assert (gathered.times, gathered.is_async) == (3, True)
    assert gathered.hidden_s == pytest.approx(NEGATE_S)
    assert reading.estimate.hidden_s == pytest.approx(3 * NEGATE_S)
