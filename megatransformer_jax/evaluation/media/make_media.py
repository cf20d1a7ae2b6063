"""Makes images and clips for prompts whose text is given, many at once.

Only the medium is made; the tokens before it are the prompt's, and the closing token is not needed.
So there is one pass over the text, and one run of the decoder's sampler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.evaluation.media.media_eval_step import run_model
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import Batch

DrawStep = Callable[[Any, Batch, Any, Key[Array, ""]], Float[Array, "B height width C"]]
SpeakStep = Callable[
    [Any, Batch, Any, Key[Array, ""]], tuple[Float[Array, "B F M"], Int[Array, "B"]]
]


def make_draw_step(model: MegaTransformer, state_key: Key[Array, ""], settings: Any) -> DrawStep:
    """Builds (params, batch, num_steps, key) -> the image in the first slot of each row.

    Args:
      model: that draws.
      state_key: of the core's first states.
      settings: of the decoder's sampler; None: the config's.
    """

    def draw_step(
        params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]
    ) -> Float[Array, "B height width C"]:
        output = run_model(model, params, batch, num_steps, state_key)
        condition = _first_slots(output.conditions["image"], len(batch.tokens))
        images: Any = model.apply(
            {"params": params}, condition, key, settings, method="sample_images"
        )
        return images

    return draw_step


def make_speak_step(model: MegaTransformer, state_key: Key[Array, ""], settings: Any) -> SpeakStep:
    """Builds (params, batch, num_steps, key) -> spectrogram and frames of the first clip of each
    row, of the length that the decoder decides on.

    Args:
      model: that makes sound.
      state_key: of the core's first states.
      settings: of the decoder's sampler; None: the config's.
    """

    def speak_step(
        params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, "B F M"], Int[Array, "B"]]:
        output = run_model(model, params, batch, num_steps, state_key)
        condition = _first_slots(output.conditions["audio"], len(batch.tokens))
        clips: Any = model.apply(
            {"params": params}, condition, key, None, settings, method="sample_audio"
        )
        return clips

    return speak_step


def make_all(
    step: Callable[[Any, Batch, Any, Key[Array, ""]], Any],
    params: Any,
    batches: Sequence[Batch],
    num_steps: Any,
    key: Key[Array, ""],
    count: int,
) -> Any:
    """What `step` makes of all batches, one below the other, as NumPy arrays.

    Args:
      step: compiled; `make_draw_step` or `make_speak_step`.
      params: the model's.
      batches: on the host.
      num_steps: iterations of the core, int32 [].
      key: every batch has its own of it.
      count: rows that are kept; those behind them are padding.
    """
    device = jax.local_devices()[0]
    parts = [
        jax.device_get(
            step(params, jax.device_put(batch, device), num_steps, jax.random.fold_in(key, number))
        )
        for number, batch in enumerate(batches)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def _first_slots(condition: Any, num_rows: int) -> Any:
    """Of each row's slots the first."""
    return jax.tree.map(
        lambda array: array.reshape(num_rows, -1, *array.shape[1:])[:, 0], condition
    )
