import pytest
from tpu_programs import looping, straight

from megatransformer_jax.compiled.hlo import parse_hlo, parse_shapes
from megatransformer_jax.config.option import UserError


@pytest.mark.parametrize(
    ("text", "num_bytes", "padded", "memory"),
    [
        ("f32[]", 4, 4, 0),
        ("f32[3,5]{1,0}", 60, 60, 0),
        (
            "bf16[4,8,1024,64]{3,2,1,0:T(8,128)(2,1)}",
            2 * 4 * 8 * 1024 * 64,
            2 * 4 * 8 * 1024 * 128,
            0,
        ),
        # The same in the other order: nothing is wasted.
        ("bf16[4,8,1024,64]{2,3,1,0:T(8,128)(2,1)S(3)}", 4 * 2**20, 4 * 2**20, 3),
        ("pred[2,128]{1,0:T(4,128)(4,1)}", 256, 512, 0),
        ("s4[16]{0}", 8, 8, 0),
        ("token[]", 0, 0, 0),
    ],
)
def test_bytes_of_shapes(text, num_bytes, padded, memory):
    (shape,) = parse_shapes(text)
    assert (shape.num_bytes, shape.padded_bytes, shape.memory) == (num_bytes, padded, memory)


def test_a_tuple_has_all_its_shapes():
    shapes = parse_shapes("(s32[]{:T(128)}, (f32[2,3]{1,0}), /*index=2*/u32[]{:S(2)})")
    assert [shape.dims for shape in shapes] == [(), (2, 3), ()]


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        ({}, 4),
        ({"start": 1, "step": 2}, 2),
        ({"direction": "LE"}, 5),
        ({"start": 7, "last": 0, "step": -1, "direction": "GT"}, 7),
        ({"start": 4}, 0),
        ({"bound": "bound.2"}, None),  # An argument of the program.
        ({"direction": "NE"}, None),
    ],
)
def test_turns_of_a_loop(loop, trips):
    module = parse_hlo(looping(**loop))
    assert module.trips(module.main.ops["while.1"]) == trips


def test_turns_that_the_compiler_states():
    text = looping(bound="bound.2").replace(
        "body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"12"}},'
    )
    module = parse_hlo(text)
    assert module.trips(module.main.ops["while.1"]) == 12


def test_values_are_followed_through_copies_and_loops():
    module = parse_hlo(looping("%y = bf16[64,256]{1,0} copy(%x)"))
    body = module.computations["body"]
    assert module.origin(body.ops["y"]).source == "state.params['core']['up']"
    assert module.constant(body.ops["bound"]) == 4
    changing = parse_hlo(looping())
    assert changing.origin(changing.main.ops["result"]).opcode == "while"


def test_attributes_go_over_several_lines():
    text = straight(
        "ROOT %k = (f32[8,128]{1,0:T(8,128)}, f32[2]{0}) custom-call(%x, /*index=1*/%z), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
    ).replace("metadata={\n", 'metadata={\n\n}}, metadata={op_name="a/b" stack_frame_id=3}\n')
    op = parse_hlo(text).main.ops["k"]
    assert (op.operands, op.target, op.source) == (("x", "z"), "tpu_custom_call", "a/b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module @jit_step {", "not with 'HloModule'; give the text of `compiled.as_text"),
        ("HloModule jit_step\n", "not scheduled.*is_scheduled=true"),
        ("HloModule jit_step, is_scheduled=true\n%a (b: f32[]) -> f32[] {\n}\n", "'ENTRY'"),
        (straight("ROOT %x = what is this"), "'ROOT %x = what is this' of 'main' cannot be read"),
    ],
)
def test_what_is_no_scheduled_program_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_hlo(text)
