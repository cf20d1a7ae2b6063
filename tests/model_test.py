"""Models as users hold them: checked inputs, ways of reading that agree, saving and loading."""

import dataclasses
import pathlib
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_tokenizer import chat_tokenizer
from flax import nnx
from flax.nnx import bridge

import megatransformer_jax as mt
from megatransformer_jax.model import _forward

OPTIONS: dict[str, Any] = {
    "width": 16,
    "prelude_layers": 1,
    "coda_layers": 1,
    "max_length": 24,
    "attention": {"num_heads": 2},
    "mlp": {"hidden_width": 16},
    "recurrence": {"mean_steps": 3},
}
TEXT = "The if"


@pytest.fixture(scope="module")
def lm() -> mt.Model:
    return mt.create("tiny", tokenizer=mt.BytesTokenizer(), **OPTIONS)


@pytest.fixture(scope="module")
def plain() -> mt.Model:
    """Without a core, and without a tokenizer."""
    recurrence = {"mean_steps": 8, "backprop_depth": 4}  # The defaults, as they mean nothing here.
    options = {**OPTIONS, "recurrence": recurrence, "core_layers": 0, "vocab_size": 40}
    return mt.create("tiny", **options)


def test_texts_and_ids_are_the_same_inputs(lm: mt.Model) -> None:
    assert lm.tokenizer is not None
    ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(TEXT)]
    wanted = lm(TEXT, depth=2)
    assert wanted.logits.shape == (1, 7, 259) and wanted.latent.shape == (1, 7, 16)
    for inputs in (ids, [ids], np.array(ids), jnp.asarray([ids]), [TEXT], (np.array(ids),)):
        found = lm(inputs, depth=2)
        np.testing.assert_array_equal(found.logits, wanted.logits)
        assert found.lengths == (7,)


def test_a_model_that_computes_in_bfloat16_saves_what_it_was_given(
    lm: mt.Model, tmp_path: pathlib.Path
) -> None:
    """Its weights are rounded for passes alone."""
    lm.save(tmp_path / "first")
    half = mt.load(tmp_path / "first", precision="bfloat16")
    assert half.weights is not half.params
    found = half(TEXT, depth=2)
    wanted = _forward(half.module, lm.params, found.tokens, None, jnp.int32(2), jax.random.key(0))
    np.testing.assert_array_equal(found.logits, wanted.logits)
    again = mt.load(half.save(tmp_path / "second"))
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    assert again.weights["prelude"] is not None and again(TEXT).logits.dtype == jnp.float32


def test_padding_changes_nothing(lm: mt.Model) -> None:
    """The first states are random, so only where there is nothing random can rows be compared."""
    still = mt.create(
        "tiny",
        tokenizer=mt.BytesTokenizer(),
        **{**OPTIONS, "recurrence": {"mean_steps": 3, "state_init": "zero"}},
    )
    both = still(["ab", TEXT], depth=3)
    assert both.lengths == (3, 7)
    np.testing.assert_allclose(both.logits[0, :3], still("ab", depth=3).logits[0], atol=1e-5)
    np.testing.assert_array_equal(both.tokens[0, 3:], still.tokenizer.pad_id)


def test_a_call_is_the_modules_own(lm: mt.Model) -> None:
    output = lm(TEXT, depth=2, seed=5)
    wanted = lm.module.apply(
        {"params": lm.params},
        jnp.asarray(output.tokens),
        num_steps=2,
        rngs={"state": jax.random.key(5)},
    )
    np.testing.assert_allclose(output.logits, wanted.logits, atol=1e-5)
    assert not np.allclose(output.logits, lm(TEXT, depth=1, seed=5).logits)
    np.testing.assert_array_equal(lm(TEXT).logits, lm(TEXT, depth=3).logits)


def test_depths_compile_once(lm: mt.Model) -> None:
    lm(TEXT, depth=1)
    compiled = _forward._cache_size()  # type: ignore[attr-defined]
    lm(TEXT, depth=7, seed=3)
    assert _forward._cache_size() == compiled  # type: ignore[attr-defined]


def test_numbers_of_numpy_and_jax_are_numbers(lm: mt.Model) -> None:
    wanted = lm(TEXT, depth=2, seed=1).logits
    np.testing.assert_array_equal(lm(TEXT, depth=np.int64(2), seed=jnp.int32(1)).logits, wanted)
    ids = lm(TEXT).tokens[0]
    np.testing.assert_array_equal(lm(list(ids), depth=2, seed=1).logits, wanted)
    np.testing.assert_array_equal(lm(list(jnp.asarray(ids)), depth=2, seed=1).logits, wanted)
    options = {"depth": np.int64(2), "max_new_tokens": np.int32(2), "temperature": np.float32(0.5)}
    assert len(lm.generate(TEXT, **options).token_ids) <= 2


def test_models_can_be_pickled(lm: mt.Model) -> None:
    again = pickle.loads(pickle.dumps(lm))
    np.testing.assert_array_equal(again(TEXT, depth=2).logits, lm(TEXT, depth=2).logits)
    assert again.config == lm.config and again.tokenizer == lm.tokenizer


def test_the_last_iteration_of_a_trace_is_the_call(lm: mt.Model) -> None:
    trace = lm.trace(["ab", TEXT], depth=4, top_k=3, seed=2)
    output = lm(["ab", TEXT], depth=4, seed=2)
    assert trace.depth == 4 and trace.latents.shape == (4, 2, 7, 16)
    np.testing.assert_allclose(trace.latents[-1], output.latent, atol=1e-5)
    probs, ids = jax.lax.top_k(jax.nn.softmax(output.logits), 3)
    np.testing.assert_allclose(trace.top_probs[-1], probs, atol=1e-5)
    np.testing.assert_array_equal(trace.top_ids[-1][1], ids[1])
    # An iteration before is a call with less depth.
    np.testing.assert_allclose(
        trace.latents[1], lm(["ab", TEXT], depth=2, seed=2).latent, atol=1e-5
    )
    assert np.all(trace.residuals > 0)


def test_a_trace_shows_itself(lm: mt.Model) -> None:
    trace = lm.trace(TEXT, depth=2, top_k=2)
    likely = trace.next_tokens(2)
    assert len(likely) == 2 and likely[0][1] >= likely[1][1]
    assert f"{trace.residuals[1, 0, -1]:.4f}" in str(trace)
    assert trace._repr_html_().count("<tr>") == 3
    figure = trace.figure()
    assert len(figure.axes[0].texts) == 2 * 7
    moves, says, answer = trace.plot().axes
    assert len(moves.lines) == 7 + 1 and len(says.texts) == 2 * 7
    for line in answer.lines:
        # The tokens that were ever the likeliest after the last one, with their probabilities.
        values = line.get_ydata()
        assert any(np.isclose(values, trace.top_probs[:, 0, -1, 0]))
    for name, wrong in (
        ("iteration", {"iteration": 0}),
        ("position", {"iteration": 1, "position": 7}),
        ("row", {"iteration": 1, "row": 1}),
    ):
        with pytest.raises(mt.UserError, match=name):
            trace.next_tokens(**wrong)
    assert repr(trace) == str(trace)


def test_generation_is_one_or_a_list(lm: mt.Model) -> None:
    one = lm.generate(TEXT, strategy="greedy", max_new_tokens=4, depth=2)
    assert isinstance(one, mt.Completion) and one.depths == (2,) * len(one.token_ids)
    several = lm.generate([TEXT, "a"], strategy="greedy", max_new_tokens=4, depth=2)
    assert len(several) == 2 and several[0].score == pytest.approx(one.score, abs=1e-4)
    assert dataclasses.replace(several[0], score=one.score) == one
    samples = lm.generate("a", num_samples=3, max_new_tokens=2, stop="z")
    assert len(samples) == 3
    config = mt.GenerationConfig.of(strategy="greedy", max_new_tokens=4, depth=2)
    assert lm.generate(TEXT, config) == one
    assert lm.generate(lm(TEXT).tokens[0], config).token_ids == one.token_ids
    assert "mean depth 2.0" in one._repr_html_()
    streamed = list(lm.stream(TEXT, config))
    assert "".join(map(str, streamed)) == one.text
    assert [token.depth for token in streamed] == list(one.depths)


def test_saved_models_are_the_same(lm: mt.Model, tmp_path: pathlib.Path) -> None:
    loaded = mt.load(lm.save(tmp_path / "run"))
    np.testing.assert_array_equal(loaded(TEXT, depth=2).logits, lm(TEXT, depth=2).logits)
    with pytest.raises(mt.UserError, match="holds parameters only"):
        mt.Trainer.resume(tmp_path / "run").step()
    with pytest.raises(mt.UserError, match=r"folder: .* is not empty"):
        lm.save(tmp_path / "run")


def test_huginns_format_is_written_where_it_can_express_the_model(
    lm: mt.Model, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(
        mt.UserError, match=r"cannot be written as a Huginn(.|\n)*rotary_convention"
    ):
        lm.save(tmp_path / "not", format="huginn")
    huginn = mt.create(
        "tiny",
        vocab_size=64,
        scale_embeddings=True,
        norm={"placement": "sandwich"},
        positions={"rotary_convention": "interleaved"},
        attention={"num_heads": 2},
    )
    folder = huginn.save(tmp_path / "huginn", format="huginn")
    wanted = huginn([[3, 4, 5]], depth=2, seed=1).logits
    np.testing.assert_array_equal(mt.load(folder)([[3, 4, 5]], depth=2, seed=1).logits, wanted)
    with pytest.raises(mt.UserError, match="is not empty"):
        huginn.save(folder, format="huginn")
    huginn.save(folder, format="huginn", overwrite=True)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda lm: lm("x" * 24), "the longest input has 25 tokens .* at most max_length=24"),
        (lambda lm: lm([[1, 259]]), r"ids must be in 0 \.\. 258, not 259"),
        (lambda lm: lm([-1, 2]), r"ids must be in 0 \.\. 258, not -1"),
        (lambda lm: lm([[1.5, 2.0]]), "must be whole numbers"),
        (lambda lm: lm(""), "the prompt is empty"),
        (lambda lm: lm([]), "there is no prompt"),
        (lambda lm: lm(TEXT, depth=0), "depth: 0 is not allowed; it must be 1 to"),
        (lambda lm: lm(TEXT, depth=2.5), r"depth: 2\.5 is not a whole number"),
        (lambda lm: lm(TEXT, seed=2**32), "seed: 4294967296 is not allowed; it must be 0 to"),
        (lambda lm: lm(TEXT, seed=None), "seed: None is not a whole number"),
        (lambda lm: lm([1, [2]]), "must be whole numbers, one after the other"),
        (lambda lm: lm(np.array(3)), "neither a text nor a sequence"),
        (lambda lm: lm("a\ud800"), r"^prompt: .* has '\\ud800' at character 1, which"),
        (lambda lm: jax.jit(lambda ids: lm(ids).logits)(jnp.ones(3, int)), "inputs are traced"),
        (lambda lm: lm.trace(TEXT, depth=10**9), r"depth: a trace of 1000000000 .* GiB"),
        (lambda lm: lm(TEXT, dpeth=2), "dpeth: no such option; did you mean 'depth'"),
        (lambda lm: lm.trace(TEXT, top_k=0), "top_k: 0 is not allowed; it must be 1 to 259"),
        (lambda lm: lm.trace(TEXT, topk=3), "topk: no such option; did you mean 'top_k'"),
        (lambda lm: lm.generate(TEXT, temprature=3), "did you mean 'temperature'"),
        (lambda lm: lm.generate(TEXT, depth=0), r"depth\.depth: 0 is not allowed"),
        (lambda lm: lm.generate(TEXT, max_new_tokens=30), "more than the model's max_length=24"),
        (
            lambda lm: lm.generate(TEXT, mt.GenerationConfig(), depth=3),
            "depth: give either a GenerationConfig or options",
        ),
        (lambda lm: lm.generate(TEXT, {"depth": 3}), "is not a GenerationConfig; give options by"),
        (lambda lm: lm.generate(TEXT, strategy="gredy"), "'gredy' .* did you mean 'greedy'"),
        (lambda lm: lm.save(""), "folder: '' is not a path"),
        (lambda lm: lm.stream([TEXT, "a"]), "stream continues one prompt"),
        (lambda lm: lm.stream("x" * 30), "max_length=24"),
        (lambda lm: lm.generate(TEXT, images=[np.zeros((8, 8, 1))]), "reads and makes text alone"),
        (lambda lm: lm.generate(TEXT, images=None), "images: has NoneType; give a list of arrays"),
        (lambda lm: lm.stream(TEXT, images=["a.png"]), "images: has str; give a list of arrays"),
        (lambda lm: lm.generate(TEXT, clips=[[0.0]]), "clips: has list; give a list of arrays"),
        (lambda lm: lm.save("x", format="gguf"), "format: 'gguf' is unknown; known: 'run', 'hu"),
        (lambda lm: lm.save("x", dtype="bfloat16"), "dtype: is for formats of other projects"),
        (lambda lm: mt.evaluate(lm), "files: is missing; new tiny, seed 0 has no validation data"),
        (lambda lm: mt.evaluate(lm, filse="a"), "filse: no such option; did you mean 'files'"),
        (lambda lm: mt.evaluate(lm, files="a.txt", depths=(0,)), "depths: .* at least 1"),
    ],
)
def test_bad_input_is_a_user_error_that_names_value_limit_and_fix(
    lm: mt.Model, call: Any, problem: str
) -> None:
    with pytest.raises(mt.UserError, match=problem):
        call(lm)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda lm: lm("a"), "this model has no tokenizer"),
        (lambda lm: lm([1, 2], depth=2), "depth: new tiny, seed 0 has no recurrent core"),
        (lambda lm: lm.trace([1, 2]), "has no recurrent core, so nothing to trace"),
        (lambda lm: lm.save("absent/x"), "has no tokenizer, which the folder of a run needs"),
    ],
)
def test_what_a_plain_model_lacks_is_said(plain: mt.Model, call: Any, problem: str) -> None:
    assert plain([1, 2]).logits.shape == (1, 2, 40)
    with pytest.raises(mt.UserError, match=problem):
        call(plain)


def test_the_module_goes_into_flax_nnx() -> None:
    """The example of docs/api.md, and that values and gradients are ours."""
    recurrence = {"mean_steps": 3, "state_init": "zero"}
    lm = mt.create("tiny", tokenizer=mt.BytesTokenizer(), **{**OPTIONS, "recurrence": recurrence})
    tokens = jnp.asarray(lm(TEXT).tokens)
    with nnx.use_eager_sharding(False):
        module = bridge.ToNNX(lm.module, rngs=nnx.Rngs(0))
        module.lazy_init(tokens, num_steps=2)
        nnx.update(module, lm.params)
        logits = module(tokens, num_steps=2).logits
        np.testing.assert_allclose(logits, lm(TEXT, depth=2).logits, atol=1e-5)

        def loss(module: Any) -> jax.Array:
            return jnp.square(module(tokens, num_steps=2, backprop_depth=2).logits).mean()

        found = nnx.to_pure_dict(nnx.grad(loss)(module))

    def own_loss(params: Any) -> jax.Array:
        output = lm.module.apply({"params": params}, tokens, num_steps=2, backprop_depth=2)
        return jnp.square(output.logits).mean()

    wanted = jax.grad(own_loss)(lm.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_a_chat_is_answered_in_the_models_format(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("jinja2")
    tokenizer = chat_tokenizer(tmp_path)
    lm = mt.create("tiny", tokenizer=tokenizer, **{**OPTIONS, "max_length": 40})
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": 4, "depth": 2}
    wanted = lm.generate(tokenizer.encode(text), **options)
    assert lm.chat(messages, **options).token_ids == wanted.token_ids
    with pytest.raises(mt.UserError, match="'Hello' is not a dict with a role"):
        lm.chat(["Hello"])  # type: ignore[list-item]


def test_models_without_a_template_do_not_chat(lm: mt.Model, plain: mt.Model) -> None:
    with pytest.raises(mt.UserError, match="no chat template"):
        lm.chat([{"role": "user", "content": "Hello"}])
    with pytest.raises(mt.UserError, match="no tokenizer, so no chat"):
        plain.chat([{"role": "user", "content": "Hello"}])
