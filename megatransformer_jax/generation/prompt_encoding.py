"""Prompts, texts or token ids, as the ids that the model reads."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer

# Ids may be in a list, a tuple or an array.
Prompt = str | Sequence[int] | np.ndarray | jax.Array


def encode_prompts(
    prompts: Sequence[Any] | np.ndarray, tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """The ids of each prompt.

    A text gets the start token in front, unless it spells it itself, as chat formats do. Ids are
    taken as they are.

    Args:
      prompts: texts or ids (see `Prompt`; anything else is refused); ids may also be the rows of
        one array.
      tokenizer: of the model. None: all prompts must be ids.
      vocab_size: of the model.

    Raises:
      UserError: if there is no prompt, or one is empty or has something that is no id.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts are a list of texts, not the text {prompts!r}; put it in a list.")
    if not len(prompts):
        raise UserError("there is no prompt to continue; give at least one.")
    return [_encode(prompt, tokenizer, vocab_size) for prompt in prompts]


def _encode(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if not hasattr(prompt, "__len__"):
        raise UserError(f"a prompt is a text or a sequence of token ids, not {prompt!r}.")
    if not len(prompt):
        raise UserError("the prompt is empty; give it text, or token ids such as the start's.")
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("this model has no tokenizer; give prompts as token ids.")
        ids = tokenizer.encode(prompt)
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]
    array = np.asarray(prompt)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"prompt ids must be whole numbers, one after the other, not {prompt!r}.")
    # A model may have more rows than its tokenizer has ids; nothing has been learned for them.
    size = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    wrong = array[(array < 0) | (array >= size)]
    if wrong.size:
        raise UserError(f"prompt ids must be in 0 .. {size - 1}, not {wrong[0]}.")
    return [int(token) for token in array]
