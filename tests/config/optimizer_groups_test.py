"""Parameter groups as text."""

import pytest

from megatransformer_jax.config.optimizer import EXAMPLE, OptimizerConfig, parse_groups
from megatransformer_jax.config.option import ConfigError, parse_text


def test_groups_are_read():
    both, one = parse_groups(
        ("mlp/(up|down)$: learning_rate=0.5, weight_decay=0", "(?:a:b): weight_decay=1e-2")
    )
    assert both.pattern.search("core/layers/layer_0/mlp/up")
    assert (both.learning_rate, both.weight_decay) == (0.5, 0.0)
    # The last colon ends the expression.
    assert one.pattern.pattern == "(?:a:b)"
    assert (one.learning_rate, one.weight_decay) == (None, 0.01)


def test_the_example_of_the_error_is_right():
    assert len(parse_groups((EXAMPLE.strip("'"),))) == 1


def test_the_command_line_can_say_them():
    text = "('mlp: learning_rate=0.5, weight_decay=0', 'head: weight_decay=0')"
    groups = parse_text(text, tuple[str, ...])
    assert len(parse_groups(OptimizerConfig(groups=groups).groups)) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mlp", "'mlp' is not 'REGEX: NAME=VALUE"),
        (": learning_rate=1", "is not 'REGEX: NAME=VALUE"),
        ("mlp:", "is not 'REGEX: NAME=VALUE"),
        ("(mlp: learning_rate=1", "is not a regular expression"),
        ("mlp: rate=1", "'rate' in .* is unknown; known: learning_rate, weight_decay"),
        ("mlp: learning_rate=1, learning_rate=2", "sets learning_rate twice"),
        ("mlp: learning_rate=fast", "learning_rate=fast in .* a number of at least 0"),
        ("mlp: weight_decay=-1", "weight_decay=-1 in .* a number of at least 0"),
        ("mlp: weight_decay=nan", "a number of at least 0"),
        ("mlp: weight_decay=", "a number of at least 0"),
    ],
)
def test_what_cannot_be_read_is_an_error(text, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        OptimizerConfig(groups=(text,))
    assert caught.value.path == "groups"
