"""The generation arguments of lm-eval's tasks as a `GenerationConfig`."""

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig

# What lm-eval's other models take as "does nothing". Our options are left out instead.
_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
_NAMES_OF_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def generation_config(
    arguments: Mapping[str, Any],
    *,
    max_gen_toks: int,
    batch_size: int,
    depth: int | None,
    seed: int,
) -> GenerationConfig:
    """From a task's `generation_kwargs`: greedy unless it samples with a temperature.

    Known are until, do_sample, temperature, top_k, top_p, min_p, typical_p, repetition_penalty and
    the number of tokens (max_gen_toks or one of its other names).

    Args:
      arguments: of the request.
      max_gen_toks: tokens if the request does not say.
      batch_size: texts at once.
      depth: iterations of the core; None: the model has none.
      seed: of draws.

    Raises:
      UserError: for an argument that is not known or out of range.
    """
    values: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), max_gen_toks))
    # As lm-eval's own models do, an empty text ends nothing.
    stop = tuple(text for text in values.pop("until") if text)
    length = values.pop("max_gen_toks")
    temperature = float(values.pop("temperature", 0.0))
    is_drawn = values.pop("do_sample")
    unknown = sorted(values.keys() - _NEUTRAL.keys())
    if unknown:
        known = ", ".join(("until", "do_sample", "temperature", *_NEUTRAL, *_NAMES_OF_LENGTH))
        raise UserError(
            f"generation_kwargs have {unknown[0]}={values[unknown[0]]!r}, which this model does "
            f"not know; known: {known}. Remove it from the task or from --gen_kwargs."
        )
    if is_drawn and temperature == 0:
        raise UserError(
            "generation_kwargs have do_sample=True and no temperature above 0; give one, or "
            "do_sample=False for the likeliest token."
        )
    sampling = {
        name: value for name, value in values.items() if value not in (None, _NEUTRAL[name])
    }
    if is_drawn:
        sampling["temperature"] = temperature
    return GenerationConfig(
        strategy="sample" if is_drawn else "greedy",
        max_new_tokens=length,
        batch_size=batch_size,
        seed=seed,
        stop=stop,
        depth=DepthConfig(depth=depth),
        sampling=SamplingConfig(**sampling),
    )
