"""Groups of parameters with a learning rate or weight decay of their own, written as text."""

import dataclasses
import math
import re

from megatransformer_jax.config.option import ConfigError

EXAMPLE = "'mlp/(up|down)$: learning_rate=0.5, weight_decay=0'"
_SETTINGS = ("learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """What holds for the parameters whose path has a match of `pattern`.

    Attributes:
      pattern: searched for in paths such as 'core/layers/layer_0/mlp/up'; ^ and $ anchor it.
      learning_rate: factor on the schedule, or None: 1.
      weight_decay: in place of what the parameter would have, or None: that.
    """

    pattern: re.Pattern[str]
    learning_rate: float | None
    weight_decay: float | None


def parse_groups(texts: tuple[str, ...]) -> tuple[ParameterGroup, ...]:
    """Reads `REGEX: learning_rate=FACTOR, weight_decay=VALUE`, one text per group.

    Raises:
      ConfigError: at 'groups', quoting the text that cannot be read and what is allowed.
    """
    return tuple(_parse_group(text) for text in texts)


def _parse_group(text: str) -> ParameterGroup:
    regex, colon, settings = text.rpartition(":")
    if not colon or not regex.strip() or not settings.strip():
        raise ConfigError("groups", f"{text!r} is not 'REGEX: NAME=VALUE, ...', as {EXAMPLE}.")
    try:
        pattern = re.compile(regex.strip())
    except re.error as error:
        raise ConfigError(
            "groups", f"{regex.strip()!r} in {text!r} is no regular expression ({error}); mend it."
        ) from error
    values: dict[str, float] = {}
    for setting in settings.split(","):
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in _SETTINGS:
            raise ConfigError(
                "groups", f"{name!r} in {text!r} is unknown; known: {', '.join(_SETTINGS)}."
            )
        if name in values:
            raise ConfigError("groups", f"{text!r} sets {name} twice; keep one of them.")
        values[name] = _number(value, name, text)
    return ParameterGroup(pattern, values.get("learning_rate"), values.get("weight_decay"))


def _number(value: str, name: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(
            "groups",
            f"{name}={value} in {text!r} is not allowed; it must be a number of at least 0.",
        )
    return number
