"""Every rule against JAX: functions become one small model each, which onnxruntime runs."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax
from onnx import helper

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.export.onnx_flow import RULES
from megatransformer_jax.export.onnx_graph import OPSET, Names, Scope, Value, value_info


def model_of(function, arrays):
    scope = Scope(Names(RULES))
    closed = jax.make_jaxpr(function)(*arrays)
    inputs = [
        Value(array.shape, array.dtype, f"input_{number}") for number, array in enumerate(arrays)
    ]
    graph = scope.graph("main", inputs, scope.run(closed, inputs))
    graph.initializer.extend(scope.names.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(function, *arrays):
    """Results of a function of arrays, by onnxruntime."""
    session = onnxruntime.InferenceSession(model_of(function, arrays).SerializeToString())
    return session.run(None, {f"input_{n}": array for n, array in enumerate(arrays)})


def agrees(function, *arrays, atol=1e-6):
    wanted = jax.tree.leaves(jax.jit(function)(*arrays))
    for got, expected in zip(run(function, *arrays), wanted, strict=True):
        expected = np.asarray(expected)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=atol, rtol=2e-6)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
Y = RNG.normal(size=(3, 4)).astype(np.float32)
I = RNG.integers(-9, 9, (3, 4)).astype(np.int32)  # noqa: E741
J = RNG.integers(1, 5, (3, 4)).astype(np.int32)
U = RNG.integers(0, 2**32, (3, 4), dtype=np.uint32)
W = RNG.integers(0, 2**32, (3, 4), dtype=np.uint32)
P = X > 0

FUNCTIONS = {
    "arithmetic": (lambda x, y: (x + y, x - 2 * y, x / y, -x, x**2, x**3, x**-2), (X, Y)),
    "integers": (lambda i, j: (i + j, i // j, i % j, lax.rem(i, j), lax.div(i, j), abs(i)), (I, J)),
    "words": (lambda u, w: (u + w, u * w, u ^ w, u & w, u | w, u < w, ~u), (U, W)),
    "shifts": (lambda u: (u << jnp.uint32(5), u >> jnp.uint32(9), u >> jnp.uint32(32)), (U,)),
    "nibbles": (
        lambda b: (b >> 4, (b << 4) >> 4, b >> 1),
        (RNG.integers(-128, 128, (9,), np.int8),),
    ),
    "functions": (
        lambda x: (jnp.exp(x), jnp.tanh(x), jnp.sin(x), jnp.cos(x), lax.erf(x), jnp.sign(x)),
        (X,),
    ),
    "roots": (lambda x: (jnp.sqrt(x), lax.rsqrt(x), jnp.log(x), x**1.5), (np.abs(X),)),
    "activations": (lambda x: (jax.nn.silu(x), jax.nn.gelu(x), jax.nn.softplus(x)), (X,)),
    "small_steps": (lambda x: (jnp.log1p(x), jnp.expm1(x)), (1e-5 * X,)),
    "inverse_error": (lax.erf_inv, (np.linspace(-0.999, 0.999, 99, dtype=np.float32),)),
    "bits": (
        lambda u: lax.bitcast_convert_type(u >> 9 | jnp.uint32(0x3F800000), jnp.float32),
        (U,),
    ),
    "comparisons": (lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y), (I, J)),
    "logic": (lambda p: (p & ~p[::-1], p | p[::-1], jnp.any(p, 1), jnp.all(p, 0)), (P,)),
    "choices": (
        lambda p, x, y, i: (
            jnp.where(p, x, y),
            jnp.where(p, x > y, p),
            jnp.where(p, i, 0),
            jnp.where(p, i.astype(jnp.uint32), jnp.uint32(7)),
            jnp.clip(x, -0.5, 0.5),
        ),
        (P, X, Y, I),
    ),
    "finiteness": (
        lambda x: (jnp.isfinite(x), jnp.maximum(x, 0)),
        (np.asarray([1, np.inf, -np.inf], np.float32),),
    ),
    "casts": (lambda x, p, i: (x.astype(jnp.int32), p.astype(jnp.float32), i > p), (X, P, I)),
    "reductions": (
        lambda x, i: (
            *(x.sum(0), x.max(1), x.min(), i.sum(1), i.max()),
            *(jnp.argmax(x, 1), jnp.argmin(x, 0), jnp.cumsum(i, 1), lax.cumsum(x, 0, reverse=True)),
            jax.nn.softmax(x),
        ),
        (X, I),
    ),
    "shapes": (
        lambda x: (
            *(x.T, x.reshape(2, 6), x[::-1], x[1:, ::2], x[:, None, :, None]),
            *(jnp.tile(x, (2, 1)), jnp.stack([x, x + 1], 1), jnp.pad(x, ((1, 0), (0, 2)))),
            *jnp.split(x, 2, 1),
            jnp.concatenate([x, x * 2], 1),
            jnp.broadcast_to(x[:, None], (3, 2, 4)).reshape(6, 4),
            (x[:, None] * jnp.ones((3, 5, 1))).transpose(1, 2, 0),
        ),
        (X,),
    ),
    "products": (
        lambda x, y: (
            x @ y.T,
            jnp.einsum("ab,cb->ca", x, y),
            jnp.einsum("ab,ab->a", x, y),
            jnp.einsum("abc,dcb->bad", x.reshape(3, 2, 2), y.reshape(3, 2, 2)),
            jnp.einsum("BKRH,BKSH->BKRS", x.reshape(1, 3, 2, 2), y.reshape(1, 3, 2, 2)),
        ),
        (X, Y),
    ),
    "small_integers": (
        lambda i, j: lax.dot_general(
            i, j, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        ),
        (I.astype(np.int8), J.astype(np.int8)),
    ),
    "cuts": (
        lambda x, i: (
            lax.dynamic_slice(x, (i[0, 0], i[0, 1]), (2, 3)),
            lax.dynamic_slice(x, (1, i[0, 1]), (1, 4)),
            lax.dynamic_update_slice(x, x[:1, :2] * 9, (i[1, 0], i[1, 1])),
            lax.dynamic_update_slice(x, x[:, :1] * 9, (0, i[1, 1])),
        ),
        (X, I),
    ),
    "rows_by_number": (
        lambda x, i, j: (
            x[i[:, 0]],
            jnp.take(x, i, axis=0, mode="clip"),
            jnp.take(x, i, axis=1),
            jnp.take_along_axis(x, j - 1, axis=1),
            x[j[:, 0] % 3, j[:, 1] % 4],
            jax.vmap(lambda row, at: row[at])(x, j[:, :2] % 4),
        ),
        (X, I % 6, J),
    ),
    "largest": (lambda x: lax.top_k(x, 2), (X,)),
    "loop": (
        lambda x, n: lax.while_loop(
            lambda c: (c[0] < n) & (jnp.sum(c[1]) < 100),
            lambda c: (c[0] + 1, c[1] * 2 + x, c[1]),
            (0, x, x),
        ),
        (np.abs(X), np.asarray(4, np.int32)),
    ),
    "loop_of_no_turns": (
        lambda x, n: lax.fori_loop(0, n, lambda i, x: x * i, x),
        (X, np.asarray(0, np.int32)),
    ),
    "loop_in_a_loop": (
        lambda x, n: lax.fori_loop(
            0, n, lambda i, x: lax.fori_loop(0, i, lambda j, x: x + j * x[0, 0], x), x
        ),
        (X, np.asarray(4, np.int32)),
    ),
    "scan": (
        lambda x, y: (
            lax.scan(lambda c, row: (c + row, c * row), x[0], y),
            lax.scan(lambda c, row: (c * 0.5 + row, c), x[0], y, reverse=True),
        ),
        (X, Y),
    ),
    "branches": (
        lambda x, n: (
            lax.cond(n > 2, lambda x: x * 2, lambda x: jnp.zeros_like(x), x),
            lax.cond(n < 2, lambda x: (x, x.sum()), lambda x: (x + 1, x.max()), x),
        ),
        (X, np.asarray(3, np.int32)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_agrees_with_jax(name):
    function, arrays = FUNCTIONS[name]
    agrees(function, *arrays, atol=1e-5 if name == "inverse_error" else 1e-6)


def test_draws_are_those_of_jax():
    def draw(data, numbers):
        keys = jax.random.wrap_key_data(data, impl="threefry2x32")
        keys = jax.vmap(jax.random.fold_in)(keys, numbers)
        bits = jax.vmap(lambda key: jax.random.bits(key, (5,)))(keys)
        normal = jax.vmap(lambda key: jax.random.normal(key, (2, 3)))(keys)
        return bits, normal, jax.vmap(lambda key: jax.random.truncated_normal(key, -3, 3))(keys)

    agrees(draw, U[:, :2], np.arange(3, dtype=np.int32), atol=1e-5)


def test_an_operation_without_a_rule_is_named():
    with pytest.raises(ConfigError, match=r"'sort' of here; use format='stablehlo', which can"):
        run(jax.named_scope("here")(lax.sort), X)


def test_constants_are_computed_and_what_nobody_reads_is_dropped():
    def function(x):
        unused = jnp.exp(x)
        del unused
        table = jnp.sin(jnp.arange(4.0)) ** 2
        return x + table

    nodes = model_of(function, [X]).graph.node
    assert [node.op_type for node in nodes] == ["Add"]


def test_a_broadcast_stays_small_among_elementwise_operations():
    def function(x):
        return jnp.broadcast_to(jnp.exp(x[:, :1]), (3, 4)) * 2 + x

    model = model_of(function, [X])
    assert "Expand" not in [node.op_type for node in model.graph.node]
    agrees(function, X)
    assert value_info("x", Value((3, 1), np.dtype(np.float32))).name == "x"
