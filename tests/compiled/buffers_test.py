import jax
import jax.numpy as jnp
import pytest
from tpu_programs import straight

from megatransformer_jax.compiled.chips import CHIPS
from megatransformer_jax.compiled.program import read_program


def _read(text):
    return read_program(text, {"data": 1}, CHIPS["v4"])


def test_arrays_live_from_their_making_to_their_last_use():
    big = "f32[1024,256]{1,0:T(8,128)}"
    reading = _read(
        straight(
            f"""
            %p = {big} parameter(0)
            %a = {big} sort(%p)
            %b = {big} sort(%a)
            %c = f32[512,256]{{1,0:T(8,128)}} slice(%b)
            %near = f32[1024,256]{{1,0:T(8,128)S(1)}} sort(%p)
            %d = {big} concatenate(%c, %c)
            ROOT %e = {big} sort(%d)
            """
        )
    )
    mib = 2**20
    # a and b; c and d are less, the result and memory on the chip are not counted.
    assert reading.live_bytes == 2 * mib
    assert [buffer.name for buffer in reading.buffers] == ["a", "b"]


def test_updates_in_place_take_no_second_array():
    cache, row = "f32[1024,256]{1,0:T(8,128)}", "f32[1,256]{1,0:T(1,128)}"
    reading = _read(
        straight(
            f"""
            %p = {row} parameter(0)
            %i = s32[] parameter(1)
            %a = {cache} broadcast(%p), dimensions={{}}
            %b = {cache} dynamic-update-slice(%a, %p, %i, %i)
            %c = {cache} negate(%b)
            ROOT %d = {row} dynamic-slice(%c, %i, %i)
            """
        )
    )
    assert reading.live_bytes == 2**20
    assert [buffer.name for buffer in reading.buffers] == ["a"]


def test_a_loop_is_as_the_compiler_counts_it():
    """What is kept for the backward pass of a loop, and what a turn needs as well.

    Which results of element-wise operations take the place of their operands is the compiler's
    choice: it takes one array of 13 more here.
    """

    def gradient(weight, x):
        def turn(x, _):
            return jnp.tanh(x @ weight), None

        return jax.grad(lambda x: jnp.sum(jax.lax.scan(turn, x, length=6)[0]))(x)

    shapes = [jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((256, 256), (512, 256))]
    compiled = jax.jit(gradient).lower(*shapes).compile()
    reading = _read(compiled.as_text())
    assert reading.live_bytes == pytest.approx(
        compiled.memory_analysis().temp_size_in_bytes, rel=0.1
    )
    assert reading.buffers[0].shape.startswith("f32[6,512,256]")
