"""Beam search over small recurrent nets: against all texts, and against Hugging Face's."""

import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from megatransformer_jax.generation.beam_loop import BeamModel, BeamSettings, search
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    LENGTH,
    STOP,
    Ending,
    PieceTable,
    text_automaton,
)
from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.processors.penalties import NoRepeatNgram, RepetitionPenalty
from megatransformer_jax.generation.processors.processor import AllowedTokens

WIDTH, FIRST_STEPS = 5, 7
PENALTIES = (-1.5, 0.0, 0.6, 1.0, 2.0)


@flax.struct.dataclass
class Net:
    """A net whose memory holds the whole text, so that beams mixed up would show."""

    embed: jax.Array
    mix: jax.Array
    head: jax.Array

    @property
    def vocab_size(self):
        return len(self.embed)

    def advance(self, memory, tokens, is_running):
        read = jnp.tanh(memory @ self.mix + self.embed[tokens])
        # What stands in places without a text must not matter.
        logits = jnp.where(is_running[:, None], read @ self.head, jnp.nan)
        return logits, 1 + tokens % 3, read

    def reorder(self, memory, rows):
        return memory[rows]

    def read(self, ids):
        """Memory and logits behind a text, on the host."""
        memory = np.zeros(WIDTH)
        for token in ids:
            memory = np.tanh(memory @ self.mix + self.embed[token])
        return memory, memory @ self.head

    def log_probs(self, ids):
        logits = self.read(ids)[1]
        return logits - np.log(np.sum(np.exp(logits)))


def make(vocab_size, seed=0, sharpness=1.5):
    rng = np.random.default_rng(seed)
    return Net(
        rng.normal(0, 1, (vocab_size, WIDTH)).astype(np.float32),
        rng.normal(0, 0.5, (WIDTH, WIDTH)).astype(np.float32),
        rng.normal(0, sharpness, (WIDTH, vocab_size)).astype(np.float32),
    )


def ending(count, end_ids=(), stops=None):
    return Ending(jnp.asarray(end_ids, jnp.int32), jnp.asarray(count, jnp.int32), stops)


def settings(num_beams, ending, length_penalty=1.0, early_stopping=False, chain=()):
    return BeamSettings(
        chain,
        ending,
        jnp.asarray(length_penalty, jnp.float32),
        jnp.asarray(early_stopping, bool),
        num_beams,
    )


searched = jax.jit(search)


def run(net, prompts, given, capacity=16):
    """Texts of each prompt, best first: (new tokens, score, log-probability, reason, steps)."""
    history = history_of_prompts(prompts, capacity, pad_id=0)
    reads = [net.read(prompt) for prompt in prompts]
    memory = np.repeat(np.stack([memory for memory, _ in reads]), given.num_beams, axis=0)
    logits = jnp.asarray(np.stack([logits for _, logits in reads]), jnp.float32)
    num_steps = jnp.full((len(prompts),), FIRST_STEPS, jnp.int32)
    memory = jnp.asarray(memory, jnp.float32)
    found = jax.device_get(searched(net, memory, given, history, logits, num_steps))
    texts = []
    for row, prompt in enumerate(prompts):
        texts.append([])
        for place in range(given.num_beams):
            end = found.history.lengths[row, place]
            assert found.history.tokens[row, place, : len(prompt)].tolist() == list(prompt)
            assert not found.steps[row, place, : len(prompt)].any()
            assert not found.steps[row, place, end:].any()
            texts[-1].append(
                (
                    tuple(found.history.tokens[row, place, len(prompt) : end].tolist()),
                    float(found.scores[row, place]),
                    float(found.log_probs[row, place]),
                    int(found.end.reason[row, place]),
                    found.steps[row, place, len(prompt) : end].tolist(),
                )
            )
    return texts


def every_text(net, prompt, count, has_ended=lambda text: False, chain=None):
    """All texts with their sums of log-probabilities, as {new tokens: sum}."""
    texts, running = {}, {(): 0.0}
    for _ in range(count):
        continued = {}
        for text, total in running.items():
            scores = net.log_probs((*prompt, *text))
            scores = scores if chain is None else chain(text, scores)
            for token in np.flatnonzero(np.isfinite(scores)).tolist():
                continued[(*text, token)] = total + scores[token]
            if not np.isfinite(scores).any():
                texts[text] = total
        texts |= {text: total for text, total in continued.items() if has_ended(text)}
        running = {text: total for text, total in continued.items() if text not in texts}
    return texts | running


def ranked(texts, length_penalty):
    scores = {text: total / len(text) ** length_penalty for text, total in texts.items()}
    return sorted(scores.items(), key=lambda item: -item[1])


def check_best(found, texts, length_penalty, count):
    """What was found is the best of all texts, in order, with their scores."""
    wanted = ranked(texts, length_penalty)[:count]
    assert [text for text, *_ in found[:count]] == [text for text, _ in wanted]
    np.testing.assert_allclose([score for _, score, *_ in found[:count]], [s for _, s in wanted],
                               rtol=1e-5)  # fmt: skip
    for text, _, log_prob, *_ in found[:count]:
        assert log_prob == pytest.approx(texts[text], rel=1e-5)


@pytest.mark.parametrize(
    ("vocab_size", "count", "end_ids"), [(5, 3, ()), (5, 3, (0, 2)), (4, 4, (3,))], ids=str
)
def test_with_enough_beams_it_finds_the_best_of_all_texts(vocab_size, count, end_ids):
    net = make(vocab_size, seed=vocab_size)
    assert isinstance(net, BeamModel)
    prompts = [[1], [2, 0, 1]]
    for length_penalty in PENALTIES:
        given = settings(
            vocab_size ** (count - 1), ending(count, end_ids), length_penalty=length_penalty
        )
        for prompt, found in zip(prompts, run(net, prompts, given), strict=True):
            texts = every_text(net, prompt, count, lambda text: text[-1] in end_ids)
            check_best(found, texts, length_penalty, given.num_beams)
            for text, _, _, reason, steps in found:
                is_end = text[-1] in end_ids
                assert reason == (END_OF_TEXT if is_end else LENGTH)
                # Each new token has the steps of the pass that read the one before.
                assert steps == [FIRST_STEPS, *(1 + token % 3 for token in text[:-1])]
            if end_ids and length_penalty == 0:
                assert len({len(text) for text, *_ in found}) > 1


def test_stop_texts_end_a_text_across_tokens():
    letters = np.frombuffer(b"abcd", np.uint8)[:, None]
    stops = text_automaton([["ab", "cc"]], PieceTable(letters, np.ones(4, np.int32)))

    def has_ended(text):
        return text[-2:] in ((0, 1), (2, 2))

    net = make(4, seed=3)
    given = settings(64, ending(4, (), stops), length_penalty=0.0)
    # A stop does not begin in the prompt: the first text may begin with 'b'.
    for prompt, found in zip([[0], [2, 2]], run(net, [[0], [2, 2]], given), strict=True):
        texts = every_text(net, prompt, 4, has_ended)
        check_best(found, texts, 0.0, 40)
        for text, *_, reason, _ in found:
            assert reason == (STOP if has_ended(text) else LENGTH)
        assert {reason for *_, reason, _ in found} == {STOP, LENGTH}


def test_texts_that_cannot_go_on_are_finished():
    """No token twice: after four at most, or with the prompt's one three, all are banned."""
    net = make(4, seed=5)

    def chain(text, scores, prompt):
        used = np.isin(np.arange(4), [*prompt, *text])
        return np.where(used, -np.inf, scores)

    given = settings(24, ending(6), 0.6, chain=(NoRepeatNgram(jnp.int32(1), 4),))
    prompts = [[2], [3, 1], [0, 1, 2, 3]]
    for prompt, found in zip(prompts, run(net, prompts, given), strict=True):
        texts = every_text(net, prompt, 6, chain=functools.partial(chain, prompt=prompt))
        if len(prompt) < 4:
            check_best(found, texts, 0.6, len(texts))
        else:
            assert found[0] == ((), 0.0, 0.0, EXHAUSTED, [])
        # More places than texts.
        assert [score for _, score, *_ in found[len(texts) :]] == [-np.inf] * (24 - len(texts))
        assert {reason for *_, reason, _ in found} == {EXHAUSTED}
        assert all(text == () for text, *_ in found[len(texts) :])


def test_banned_everything_is_no_nan():
    given = settings(2, ending(3), chain=(AllowedTokens(jnp.zeros(4, bool)),))
    for penalty in (-300.0, 0.0, 300.0):
        found = run(make(4), [[1]], given.replace(length_penalty=jnp.float32(penalty)))[0]
        assert found == [((), 0.0, 0.0, EXHAUSTED, []), ((), -np.inf, -np.inf, EXHAUSTED, [])]


def test_one_beam_takes_the_likeliest_token():
    net = make(9, seed=6)
    for early_stopping, length_penalty in itertools.product((False, True), PENALTIES):
        given = settings(1, ending(8, [5]), length_penalty, early_stopping)
        for prompt, found in zip([[1], [2, 4]], run(net, [[1], [2, 4]], given), strict=True):
            text = []
            while len(text) < 8 and text[-1:] != [5]:
                text.append(int(np.argmax(net.log_probs([*prompt, *text]))))
            assert found[0][0] == tuple(text)


def test_settings_may_differ_between_prompts_and_prompts_do_not_matter_to_each_other():
    """Every prompt of a batch gets what it gets alone."""
    net = make(8, seed=7)
    prompts = [[1], [2, 4, 4], [3], [5, 6]]
    counts, penalties = [3, 8, 6, 1], [2.0, -1.0, 0.5, 0.0]
    early, repetition = [False, True, False, True], [1.0, 1.5, 0.8, 1.2]

    def given(rows):
        # A chain whose number per prompt could be mistaken for one per beam.
        chain = (RepetitionPenalty(jnp.asarray(np.take(repetition, rows), jnp.float32), 8),)
        return settings(
            4,
            ending(np.take(counts, rows), [0]),
            np.take(penalties, rows),
            np.take(early, rows),
            chain,
        )

    together = run(net, prompts, given(range(4)))
    assert len({len(found[0][0]) for found in together}) > 2
    for row, prompt in enumerate(prompts):
        (alone,) = run(net, [prompt], given([row]))
        for one, other in zip(alone, together[row], strict=True):
            assert one[0] == other[0] and one[3:] == other[3:]
            np.testing.assert_allclose(one[1:3], other[1:3], rtol=1e-5)


def test_other_numbers_compile_nothing():
    net = make(8, seed=8)
    before = searched._cache_size()
    lengths = set()
    for count, penalty, early in [(3, 0.0, True), (5, 1.0, False), (7, -0.5, True)]:
        found = run(net, [[1], [2, 3]], settings(3, ending(count, [count]), penalty, early))
        lengths.add(max(len(text) for text, *_ in found[0]))
    assert lengths == {3, 5, 7}
    assert searched._cache_size() == before + 1


class TheirConfig(transformers.PretrainedConfig):
    model_type = "net"


class TheirNet(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The same net for their `generate`, which recomputes the whole text for every token."""

    config_class = TheirConfig

    def __init__(self, net):
        super().__init__(TheirConfig(vocab_size=net.vocab_size))
        weights = (torch.tensor(w) for w in (net.embed, net.mix, net.head))
        self.embed, self.mix, self.head = map(torch.nn.Parameter, weights)

    def prepare_inputs_for_generation(self, input_ids, **unused):
        return {"input_ids": input_ids}

    def forward(self, input_ids, **unused):
        memory = torch.zeros(len(input_ids), WIDTH)
        for tokens in input_ids.T:
            memory = torch.tanh(memory @ self.mix + self.embed[tokens])
        logits = (memory @ self.head)[:, None]
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


PROMPTS = [[1, 4], [2, 3], [5, 5], [7, 6]]
CHAINS = {
    "plain": ((), {}),
    "penalties": (
        (RepetitionPenalty(jnp.float32(1.4), 10), NoRepeatNgram(jnp.int32(2), 4)),
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    ),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("end_ids", [[9], [9, 8]], ids=str)
def test_it_equals_hugging_face(end_ids, early_stopping, chain):
    """Texts and scores; beams finish at many different lengths."""
    ours, theirs = CHAINS[chain]
    lengths = set()
    for seed, length_penalty in itertools.product(range(2), PENALTIES):
        net = make(10, seed=seed, sharpness=0.7)
        given = settings(3, ending(9, end_ids), length_penalty, early_stopping, ours)
        texts = run(net, PROMPTS, given)
        expected = TheirNet(net).generate(
            torch.tensor(PROMPTS),
            max_new_tokens=9,
            num_beams=3,
            num_return_sequences=3,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            **theirs,
        )
        rows = [text for found in texts for text in found]
        for row, (text, score, *_) in enumerate(rows):
            wanted = expected.sequences[row, 2:].tolist()
            assert wanted == [*text, *[end_ids[0]] * (len(wanted) - len(text))]
            assert score == pytest.approx(float(expected.sequences_scores[row]), rel=1e-4)
            lengths.add(len(text))
    assert len(lengths) > 4


def test_early_stopping_ends_earlier():
    """With it, later texts that would be better are not waited for."""
    differ = 0
    for seed in range(6):
        net = make(10, seed=seed, sharpness=0.7)
        early, late = (
            run(net, PROMPTS, settings(3, ending(9, [9]), 2.0, e)) for e in (True, False)
        )
        for one, other in zip(early, late, strict=True):
            assert one[0][1] <= other[0][1] + 1e-6
            differ += one[0][0] != other[0][0]
    assert differ
