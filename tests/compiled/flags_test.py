import pytest
from tpu_programs import looping, straight

from megatransformer_jax.compiled.chips import CHIPS
from megatransformer_jax.compiled.program import read_program

MIB = 2**20
BACKWARD = 'metadata={op_name="jit(step)/transpose(jvp())/dot_general"}'
WHOLE = 256 * 256 * 2
LAYOUTS = ("{3,4,2,1,0:T(8,128)(2,1)}", "{4,3,2,1,0:T(8,128)(2,1)}")


def _flags(text, devices=4, axis="fsdp"):
    reading = read_program(text, {axis: devices}, CHIPS["v4"])
    return {flag.kind: flag for flag in reading.flags}


def _reduction(size, cut, source=BACKWARD):
    """The gradient of a weight of which a device has [64, 256], reduced over four devices."""
    return straight(
        f"""
        %p = bf16[64,256]{{1,0}} parameter(0), metadata={{op_name="state.params['core']['up']"}}
        %g = bf16[{size}]{{1,0}} parameter(1)
        ROOT %r = bf16[{cut}]{{1,0}} all-reduce(%g), replica_groups={{}}, to_apply=%add, {source}
        """,
        devices=4,
    )


def test_a_part_with_merged_extents_is_not_taken_for_a_whole_of_another_weight():
    text = straight(
        f"""
        %p = bf16[64,2,256]{{2,1,0}} parameter(0), metadata={{op_name="state.params['core']['up']"}}
        %q = bf16[256,64]{{1,0}} parameter(1), metadata={{op_name="state.params['core']['down']"}}
        %g = bf16[64,512]{{1,0}} parameter(2)
        ROOT %r = bf16[64,512]{{1,0}} all-reduce(%g), replica_groups={{}}, to_apply=%add, {BACKWARD}
        """,
        devices=4,
    )
    assert not _flags(text)


def test_gradients_that_are_reduced_whole():
    flags = _flags(_reduction("256,256", "256,256"))
    assert list(flags) == ["all-reduced-gradient"]
    flag = flags["all-reduced-gradient"]
    assert (flag.num_bytes, flag.names) == (2 * 3 / 4 * WHOLE, ("r",))
    assert "an all-reduce of bf16[256,256] over fsdp, outside of loops" in flag.text


@pytest.mark.parametrize(
    ("size", "source"),
    [
        ("64,256", BACKWARD),  # Of a weight that is not cut over these devices.
        ("96,256", BACKWARD),  # Of no weight's shape.
        ("256,256", 'metadata={op_name="jit(step)/jvp()/dot_general"}'),  # An activation.
    ],
)
def test_other_reductions_are_no_gradients(size, source):
    assert _flags(_reduction(size, size, source)) == {}


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (f"all-reduce(%x), replica_groups={{}}, to_apply=%add, {BACKWARD}", "gradient-in-loop"),
        ("all-to-all(%x), replica_groups={}", "resharding-in-loop"),
        ("collective-permute(%x), source_target_pairs={{0,1}}", "resharding-in-loop"),
        # Asked for, as a ring of devices does.
        (
            "collective-permute(%x), source_target_pairs={{0,1}}, "
            'metadata={op_name="jit(step)/while/body/ppermute"}',
            None,
        ),
        ("all-gather(%x), replica_groups={}, dimensions={0}", None),
    ],
)
def test_what_should_not_be_in_a_loop(operation, kind):
    flags = _flags(looping(f"%y = bf16[64,256]{{1,0}} {operation}", devices=4))
    assert list(flags) == ([kind] if kind else [])
    for flag in flags.values():
        assert "4 times in a loop" in flag.text


@pytest.mark.parametrize(("rows", "kinds"), [(16384, ["gradient-in-loop"]), (262144, [])])
def test_gradients_in_a_loop_that_are_little_of_what_is_sent_are_not_worth_a_flag(rows, kinds):
    reduce = f"all-reduce(%x), replica_groups={{}}, to_apply=%add, {BACKWARD}"
    gather = f"bf16[{rows},256]{{1,0}} all-gather(%params), replica_groups={{}}, dimensions={{0}}"
    text = looping(f"%y = bf16[64,256]{{1,0}} {reduce}", devices=4)
    text = text.replace("  %start =", f"  %gathered = {gather}\n  %start =")
    assert list(_flags(text)) == kinds


def test_loops_that_multiply_while_they_exchange_are_not_the_programs():
    permute = "%y = bf16[64,256]{1,0} collective-permute(%x), source_target_pairs={{0,1}}"
    text = looping(permute, devices=4)
    assert list(_flags(text)) == ["resharding-in-loop"]
    assert _flags(text.replace("core/while", "mlp/btd,dpf->btpf/dot_general")) == {}


def _decode(argument, *copies, dtype="bf16"):
    """A program that makes copies of an argument of 64 MiB, and one of 4 KiB."""
    lines = [
        f'%a = {dtype}[16,8,4,1024,64]{LAYOUTS[0]} parameter(0), metadata={{op_name="{argument}"}}',
        *(f"%c{place} = {copy}" for place, copy in enumerate(copies)),
        "ROOT %r = s32[] constant(0)",
    ]
    return straight("\n".join(lines))


SAME = f"bf16[16,8,4,1024,64]{LAYOUTS[0]}"
OTHER = f"bf16[16,8,4,1024,64]{LAYOUTS[1]}"


@pytest.mark.parametrize(
    ("text", "kind", "mib"),
    [
        (_decode("state.cache.core.key", f"{OTHER} copy(%a)"), "copied-argument", 128),
        (
            _decode("state.cache.core.key", f"{OTHER} copy(%a)", f"{SAME} copy(%c0)"),
            "copied-argument",
            192,
        ),
        # Fetched to memory on the chip as it is.
        (_decode("state.cache.core.key", f"{SAME[:-1]}S(3)}} copy(%a)"), None, 0),
        (
            _decode("state.cache.core.key", "bf16[1,1,4,1024,64]{4,3,2,1,0} slice(%a)"),
            None,
            0,
        ),
        # Weights, of which 1% of the memory may be copied.
        (_decode("params['up']", f"{OTHER} copy(%a)"), None, 0),
        (_decode("params['up']", *[f"{OTHER} copy(%a)"] * 3), "copied-argument", 384),
        (
            _decode("params['up']", *[f"{OTHER} convert(%a)"] * 3, dtype="f32"),
            "converted-weights",
            384,
        ),
    ],
)
def test_copies_of_arguments(text, kind, mib):
    flags = _flags(text, devices=1)
    assert list(flags) == ([kind] if kind else [])
    if kind:
        assert flags[kind].num_bytes == mib * MIB


def test_copies_to_donated_arguments_are_theirs():
    text = straight(
        f"""
        %a = {SAME} parameter(0), metadata={{op_name="state.cache.core.key"}}
        %made = {OTHER} broadcast(%a), dimensions={{}}
        %out = {SAME} copy(%made)
        ROOT %r = ({SAME}) tuple(%out)
        """,
        header=", input_output_alias={ {0}: (0, {}, may-alias) }",
    )
    (copy,) = read_program(text, {"data": 1}, CHIPS["v4"]).copies
    assert (copy.of, copy.kind, copy.num_bytes) == ("state.cache.core.key", "copy", 64 * MIB)


@pytest.mark.parametrize(("dtype", "is_flagged"), [("f32", True), ("bf16", False)])
def test_floats_on_the_wire(dtype, is_flagged):
    text = straight(
        f"""
        %x = bf16[1024,1024]{{1,0}} parameter(0)
        %y = {dtype}[1024,1024]{{1,0}} convolution(%x, %x), dim_labels=bf_io->bf
        ROOT %z = {dtype}[1024,1024]{{1,0}} all-reduce(%y), replica_groups={{}}, to_apply=%add
        """,
        devices=4,
    )
    flags = _flags(text)
    assert list(flags) == (["float32-on-wire"] if is_flagged else [])
    if is_flagged:
        assert flags["float32-on-wire"].num_bytes == 6 * MIB
