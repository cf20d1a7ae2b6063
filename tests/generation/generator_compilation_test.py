"""What compiles again and what does not, when requests differ."""

import jax.monitoring
import numpy as np
from tiny_generator import assert_same, generator
from tiny_model import PLAIN, PROMPTS

from megatransformer_jax.config.sampling import CacheConfig, DepthConfig, SamplingConfig

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts what XLA compiles; a function that is found in the cache on disk counts too."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, seconds, **details):
        self.count += event == COMPILE_EVENT


def request(
    depth=3,
    threshold=0.3,
    min_depth=1,
    seed=0,
    stop=("ab", "x c"),
    new=8,
    capacity=None,
    **sampling,
):
    sampling = {"top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.1, **sampling}
    return {
        "max_new_tokens": new,
        "seed": seed,
        "stop": stop,
        "depth": DepthConfig(
            depth=depth,
            exit_criterion="latent_diff",
            exit_threshold=threshold,
            min_depth=min_depth,
        ),
        "cache": CacheConfig(capacity=capacity),
        "sampling": SamplingConfig(**sampling),
    }


CHANGES = {
    "depth": {"depth": 8},
    "depth and min_depth": {"depth": 2, "min_depth": 2},
    "threshold": {"threshold": 1.2},
    "seed": {"seed": 77},
    "more new tokens": {"new": 40},
    "temperature": {"temperature": 0.3},
    "top_p": {"top_p": 0.4},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.0, "frequency_penalty": 1.0},
    "stops": {"stop": ("c", "b\n", " a")},
    "capacity within the block": {"capacity": 60},
}


def test_numbers_and_prompts_compile_nothing():
    wanted = generator(**request()).generate(PROMPTS)
    for name, changes in CHANGES.items():
        with Compilations() as compilations:
            got = generator(**request(**changes)).generate(PROMPTS)
        assert compilations.count == 0, name
        assert "capacity" in name or got != wanted, name
    for prompts in ([[5], [1, 9], list(range(1, 17))], ["a", "b", "x c"]):
        with Compilations() as compilations:
            generator(**request()).generate(prompts)
        assert compilations.count == 0, prompts


def test_streams_compile_nothing_after_the_first():
    first = list(generator(PLAIN, seed=2).stream(PROMPTS[0]))
    assert len(first) > 2
    with Compilations() as compilations:
        hot = SamplingConfig(temperature=2.0)
        second = list(generator(PLAIN, seed=5, max_new_tokens=12, sampling=hot).stream(PROMPTS[1]))
    assert compilations.count == 0
    assert [token.token_id for token in second] != [token.token_id for token in first]


def test_adaptive_depth_tells_the_steps_of_each_token():
    texts = generator(**request(depth=8, min_depth=2)).generate(PROMPTS)
    assert all(len(text.depths) == len(text.token_ids) for text in texts)
    steps = [count for text in texts for count in text.depths]
    assert min(steps) >= 2 and max(steps) <= 8
    assert len(set(steps)) > 2 and np.mean(steps) < 7


def test_prompts_in_chunks():
    plain = generator(PLAIN, strategy="greedy").generate(PROMPTS)
    chunks = CacheConfig(prefill_chunk=6)
    with Compilations() as compilations:
        assert_same(generator(PLAIN, strategy="greedy", cache=chunks).generate(PROMPTS), plain)
    assert compilations.count == 4  # Two sizes of chunks, cut out and passed through the model.
