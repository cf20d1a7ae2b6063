"""Generation with media against whole passes without a cache, and rows against each other."""

import dataclasses
import html

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_media_generator import (
    CLIP_PART,
    CONFIG,
    IMAGE_PART,
    SAMPLER,
    TOKENIZER,
    generator,
    parts,
)
from tiny_model import DEPTH, make

from megatransformer_jax import streams
from megatransformer_jax.config.generation import (
    BeamConfig,
    GenerationConfig,
    MediaGenerationConfig,
    ParallelConfig,
)
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.sampling import CacheConfig, SamplingConfig
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.generation.media_making import (
    draw_images,
    make_clips,
    sampler_settings,
)
from megatransformer_jax.generation.media_prompt import (
    EncodedPrompt,
    MediaPrompt,
    follows_of,
    media_batch,
    prompt_of_text,
    sequence_length,
)
from megatransformer_jax.generation.processors.processor import allowed_tokens
from megatransformer_jax.generation.request import (
    GeneratedClip,
    GeneratedImage,
    parts_of_ids,
    prompt_keys,
    sample_keys,
)
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.passes.cached import token_states

PROMPTS = (
    MediaPrompt(("ab", IMAGE_PART, "c")),
    MediaPrompt(("abc",), opens="<|IMAGE|>"),
    MediaPrompt((CLIP_PART, "x"), opens="<|VOICE|>"),
    MediaPrompt(("xx",)),
)
# Text, images and clips that a row has at most.
LENGTH, SLOTS = 40, 4
SEED = 3


@pytest.fixture(scope="module")
def completions():
    return generator({"max_media": 2}, seed=SEED).generate(PROMPTS)


@jax.jit
def whole_pass(tokens, length, media, key, prompt_key, num_read):
    """Log-probabilities of the next token and all conditions of one row, without a cache.

    The first states of the first `num_read` places are drawn with the prompt's key.
    """
    model, params = parts()
    segments = (jnp.arange(LENGTH) < length)[None].astype(jnp.int32)

    def lay_out(module):
        return module.media.layout(media, segments).positions

    positions = model.apply({"params": params}, method=lay_out)
    injected = jnp.zeros((*positions.shape, CONFIG.width))
    own, of_prompt = (token_states(CONFIG, k[None], positions, injected) for k in (key, prompt_key))
    output = model.apply(
        {"params": params},
        tokens[None],
        segment_ids=segments,
        num_steps=DEPTH,
        state=jnp.where((positions < num_read)[..., None], of_prompt, own),
        media=media,
    )
    return jax.nn.log_softmax(output.logits[0]), output.conditions


def recomputed(prompt, completion, key, prompt_key):
    """(log-probabilities [T, V], conditions, ids, prompt's length) of a finished row."""
    encoded = [TOKENIZER.bos_id]
    images, mels = [], []
    for part in prompt.parts:
        if isinstance(part, str):
            encoded += TOKENIZER.encode(part)
            continue
        marker = "<|IMAGE|>" if part is IMAGE_PART else "<|VOICE|>"
        encoded += [TOKENIZER.marker_id(marker), TOKENIZER.marker_id(marker) + 1]
        if part is IMAGE_PART:
            images.append(part.pixels)
        else:
            mels.append(normalized_mel(part.waveform, CONFIG.audio.mel))
    if prompt.opens:
        encoded.append(TOKENIZER.marker_id(prompt.opens))
    ids = [*encoded, *completion.token_ids]
    if completion.finish_reason == "end_of_text":
        ids.append(TOKENIZER.eos_id)
    tokens = np.zeros(LENGTH, np.int32)
    tokens[: len(ids)] = ids
    lengths = np.array([len(ids)])
    media = media_batch(
        CONFIG,
        follows_of(tokens[None], lengths, TOKENIZER),
        [[*images, *completion.images]],
        [[*mels, *completion.mels]],
        (SLOTS, SLOTS),
    )
    # The prompt was read once for all samples, without a token that opens a medium at its end.
    read = EncodedPrompt(tuple(encoded), tuple(images), tuple(mels))
    num_read = sequence_length(CONFIG, read) - (prompt.opens is not None)
    log_probs, _ = whole_pass(tokens, lengths[0], media, key, prompt_key, num_read)
    _, conditions = whole_pass(tokens, lengths[0], media, key, key, 0)
    return np.asarray(log_probs), conditions, ids, len(encoded), (len(images), len(mels))


def made_again(kind, condition, key):
    """The medium of a condition, by the compiled function that rows of a batch share."""
    make = draw_images if kind == "image" else make_clips
    alike = jax.tree.map(lambda array: jnp.repeat(array, len(PROMPTS), axis=0), condition)
    return make(*parts(), alike, jnp.zeros((1,), jnp.int32), key[None], settings=SAMPLER)


def test_text_and_media_are_those_of_whole_passes(completions):
    keys = prompt_keys(SEED, range(len(PROMPTS)))
    num_media = []
    for prompt, completion, *both in zip(
        PROMPTS, completions, sample_keys(keys, 1), keys, strict=True
    ):
        log_probs, conditions, ids, start, given = recomputed(prompt, completion, *both)
        closing = [TOKENIZER.marker_id(f"<|/{kind}|>") for kind in ("IMAGE", "AUDIO", "VOICE")]
        score = sum(
            log_probs[at - 1, ids[at]] for at in range(start, len(ids)) if ids[at] not in closing
        )
        assert completion.score == pytest.approx(score, abs=2e-3)
        made = [part for part in completion.parts if not isinstance(part, str)]
        num_media.append(len(made))
        counts = list(given)
        for number, part in enumerate(made):
            own = jax.random.fold_in(jax.random.fold_in(both[0], streams.GENERATED_MEDIA), number)
            is_image = isinstance(part, GeneratedImage)
            kind = "image" if is_image else "audio"
            slot = counts[not is_image]
            counts[not is_image] += 1
            condition = Condition(
                conditions[kind].context[slot : slot + 1],
                conditions[kind].is_context[slot : slot + 1],
            )
            assert np.any(condition.is_context)
            if is_image:
                wanted = made_again(kind, condition, own)[0]
                np.testing.assert_allclose(part.pixels, wanted, atol=1e-3)
            else:
                mels, frames = made_again(kind, condition, own)
                assert part.mel.shape == (frames[0], CONFIG.audio.mel.num_mels)
                np.testing.assert_allclose(part.mel, mels[0, : frames[0]], atol=1e-3)
    # The prompts' own, and at least one that the text asked for.
    assert num_media[1] >= 1 and num_media[2] >= 1
    assert sum(num_media) > 2
    assert max(num_media) <= 2


def test_parts_say_what_the_tokens_say(completions):
    assert isinstance(completions[1].parts[0], GeneratedImage)
    assert isinstance(completions[2].parts[0], GeneratedClip) and completions[2].parts[0].is_voice
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        opened = [TOKENIZER.medium_after(token) for token in completion.token_ids]
        made = [part for part in completion.parts if not isinstance(part, str)]
        assert len(made) == np.count_nonzero(opened) + (prompt.opens is not None)
        assert completion.finish_reason in ("end_of_text", "length")
        assert html.escape(str(prompt)) in completion._repr_html_()
        # A closing token can come after the last that counts.
        assert 1 <= len(completion.token_ids) <= 13


def assert_same_parts(one, other):
    assert one.token_ids == other.token_ids
    for first, second in zip(one.parts, other.parts, strict=True):
        if isinstance(first, str):
            assert first == second
        else:
            arrays = [
                getattr(part, "pixels", getattr(part, "mel", None)) for part in (first, second)
            ]
            np.testing.assert_allclose(*arrays, atol=1e-4)


def test_rows_do_not_depend_on_others(completions):
    others = [PROMPTS[0], MediaPrompt(("c b",)), PROMPTS[2], PROMPTS[1]]
    again = generator({"max_media": 2}, seed=SEED).generate(others)
    for row in (0, 2):
        assert_same_parts(completions[row], again[row])
    # Nor on the size of batches.
    batched = generator({"max_media": 2}, seed=SEED, batch_size=4).generate([*PROMPTS, PROMPTS[1]])
    assert_same_parts(completions[1], batched[1])
    assert not np.allclose(batched[1].images[0], batched[4].images[0], atol=1e-3)


def test_options_reach_the_samplers():
    options = MediaGenerationConfig(guidance_scale=3.0, sampler_steps=7)
    changed = dataclasses.replace(SAMPLER, guidance_scale=3.0, num_steps=7)
    assert sampler_settings(CONFIG, GenerationConfig(media=options)) == {
        "image": changed,
        "audio": changed,
    }
    plain = sampler_settings(CONFIG, GenerationConfig())
    assert plain == {"image": SAMPLER, "audio": SAMPLER}


def test_samples_of_a_prompt_differ(completions):
    options = {"seed": SEED, "num_samples": 2}
    made = generator({"max_media": 2}, **options).generate([PROMPTS[3], PROMPTS[1]])
    assert len(made) == 4
    assert not np.allclose(made[2].images[0], made[3].images[0], atol=1e-3)
    # The first is what it is without the second.
    np.testing.assert_allclose(made[2].images[0], completions[1].images[0], atol=1e-4)


def assert_streams(given, prompt):
    """What is streamed is what `generate` gives."""
    (wanted,) = given.generate([prompt])
    tokens = list(given.stream(prompt))
    assert tuple(token.token_id for token in tokens) == wanted.token_ids
    assert tuple(token.depth for token in tokens) == wanted.depths
    assert "".join(map(str, tokens)) == wanted.text
    made = tuple(token.medium for token in tokens if token.medium is not None)
    streamed = dataclasses.replace(wanted, parts=(wanted.text, *made))
    assert_same_parts(
        streamed,
        dataclasses.replace(
            wanted,
            parts=(wanted.text, *(part for part in wanted.parts if not isinstance(part, str))),
        ),
    )
    return wanted, tokens


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_a_stream_gives_the_text_and_the_media_of_generate(number):
    given = generator({"max_media": 2}, seed=SEED, stop=("xc",))
    wanted, tokens = assert_streams(given, PROMPTS[number])
    for token in tokens:
        marker = TOKENIZER.marker_of(token.token_id) or ""
        # A medium comes with the token that closes it.
        assert (token.medium is not None) == marker.startswith("<|/")
    assert len(wanted.depths) == len(wanted.token_ids)


def test_speculative_and_parallel_decoding_give_what_greedy_does():
    options = {"media": {"max_media": 2}, "max_new_tokens": 10}
    greedy = generator(**options, strategy="greedy").generate(PROMPTS)
    assert sum(len(one.images) + len(one.mels) for one in greedy) >= 2
    draws = SamplingConfig(temperature=0.0)
    fast = generator(**options, strategy="speculative", sampling=draws)
    for one, other in zip(fast.generate(PROMPTS), greedy, strict=True):
        assert_same_parts(one, other)
    # One position at a time, of which all iterations read the newest keys and values.
    slot = {**options, "cache": CacheConfig(slots=1)}
    slow = ParallelConfig(settle_threshold=1e-9, iterations_per_round=DEPTH, max_wavefront=1)
    parallel = generator(**slot, strategy="parallel", sampling=draws, parallel=slow)
    wanted = generator(**slot, strategy="greedy").generate(PROMPTS)
    for one, other in zip(parallel.generate(PROMPTS), wanted, strict=True):
        assert_same_parts(one, other)
    assert_streams(fast, PROMPTS[2])


def test_beams_continue_prompts_with_media():
    prompts = [PROMPTS[0], PROMPTS[3]]
    greedy = generator({"max_media": 0}, strategy="greedy").generate(prompts)
    beam = BeamConfig(num_beams=1, length_penalty=0.0)
    for one, other in zip(
        generator(strategy="beam", beam=beam).generate(prompts), greedy, strict=True
    ):
        assert_same_parts(one, other)
        assert one.score == pytest.approx(other.score, abs=1e-3)
    assert_streams(generator(strategy="beam"), PROMPTS[0])
    with pytest.raises(UserError, match=r"ends with <\|IMAGE\|>.*max_media=0.*another strategy"):
        generator(strategy="beam").check([PROMPTS[1]])


def test_media_are_made_without_text(completions):
    prompts = [PROMPTS[2], PROMPTS[1], PROMPTS[2]]
    given = generator({"max_media": 2}, seed=SEED, batch_size=2)
    made, wanted = given.make(prompts), given.generate(prompts)
    assert [type(medium) for medium in made] == [GeneratedClip, GeneratedImage, GeneratedClip]
    for medium, completion in zip(made, wanted, strict=True):
        first = dataclasses.replace(completion, parts=completion.parts[:1])
        assert_same_parts(dataclasses.replace(completion, parts=(medium,)), first)
    np.testing.assert_allclose(made[1].pixels, completions[1].images[0], atol=1e-4)
    with pytest.raises(UserError, match="asks for no medium"):
        given.make([PROMPTS[0]])


def test_texts_continue_the_prompt_and_begin_anew_behind_media():
    a, b = TOKENIZER.encode("a"), TOKENIZER.encode(" b")
    image, closed = TOKENIZER.marker_id("<|IMAGE|>"), TOKENIZER.marker_id("<|/IMAGE|>")
    medium = GeneratedImage(np.zeros((4, 4, 1), np.float32))
    made = parts_of_ids(TOKENIZER, [1, *a], [*b, image, closed, *a, *a], [medium], ("aa",))
    assert made == (" b", medium)
    assert parts_of_ids(TOKENIZER, [1, *a, image], [closed, *a], [medium]) == (medium, "a")
    # An image that the prompt has is none of the new ones.
    assert parts_of_ids(TOKENIZER, [1, image, closed], [*a, image, closed], [medium]) == (
        "a",
        medium,
    )


def test_text_alone_never_has_tokens_around_media():
    is_allowed = np.asarray(allowed_tokens(TOKENIZER, CONFIG.vocab_size).is_allowed)
    base = TOKENIZER.base
    assert not is_allowed[base.vocab_size :].any()
    np.testing.assert_array_equal(
        is_allowed[: base.vocab_size], allowed_tokens(base, base.vocab_size).is_allowed
    )


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"strategy": "beam", "media": {"max_media": 1}}, "media.max_media"),
        ({"strategy": "beam", "media": {"guidance_scale": 2.0}}, "media.guidance_scale"),
        ({"media": {"sampler_steps": 1001}}, "media.sampler_steps"),
    ],
)
def test_options_that_do_not_fit_are_errors(options, path):
    with pytest.raises(ConfigError) as caught:
        generator(**options)
    assert caught.value.path == path


def test_prompts_that_do_not_fit_are_errors():
    with pytest.raises(UserError, match="no prompt"):
        generator().generate([])
    ids = [TOKENIZER.marker_id("<|IMAGE|>"), TOKENIZER.marker_id("<|/IMAGE|>")]
    with pytest.raises(UserError, match="prompt 1: has places for 1 images, but 0"):
        generator().generate([[TOKENIZER.bos_id, *ids]])
    with pytest.raises(UserError, match=r"prompt: .* has '\\ud800' at character 0, which is not"):
        prompt_of_text("\ud800<|IMAGE|>", (), TOKENIZER)
    with pytest.raises(UserError, match=r"opens='<\|/IMAGE\|>' opens nothing"):
        generator().generate([MediaPrompt(("a",), "<|/IMAGE|>")])
    with pytest.raises(
        ConfigError, match=r"max_new_tokens: 100 new tokens after 9.* to 67 or less"
    ):
        generator(max_new_tokens=100).generate([PROMPTS[0]])
    images_off = dataclasses.replace(CONFIG, image=ImageConfig())
    model, params = make(images_off)
    deaf = Generator(model, params, TOKENIZER, GenerationConfig(max_new_tokens=8), DEPTH)
    with pytest.raises(UserError, match=r"prompt: ends with <\|IMAGE\|>.*no image decoder"):
        deaf.generate([PROMPTS[1]])
    with pytest.raises(UserError, match=r"has an image, but model.image.enabled=False"):
        deaf.generate([PROMPTS[0]])
