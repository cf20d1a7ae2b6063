"""The tokens of each row so far, as the loop carries them and the logits processors read them."""

import dataclasses
import typing
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from megatransformer_jax.config.option import UserError

NO_TOKEN = -1


@flax.struct.dataclass
class History:
    """Prompt and generated tokens of a batch; rows are left-aligned and hold no padding inside.

    Attributes:
      tokens: row b's tokens are `tokens[b, :lengths[b]]`; what follows has no meaning.
      lengths: tokens of each row, the prompt's (bos included) and the generated ones.
      prompt_lengths: of these, how many are the prompt's.
    """

    # Any because transformations put other things in the arrays' place.
    tokens: typing.Any  # int32 [B, C]
    lengths: typing.Any  # int32 [B]
    prompt_lengths: typing.Any  # int32 [B]

    @property
    def capacity(self) -> int:
        """Most tokens that a row can hold; static."""
        return self.tokens.shape[1]

    @property
    def num_generated(self) -> Int[Array, "B"]:
        """Tokens behind each prompt."""
        return self.lengths - self.prompt_lengths

    def content_mask(self) -> Bool[Array, "B C"]:
        """True where a token stands."""
        return jnp.arange(self.capacity) < self.lengths[:, None]

    def generated_mask(self) -> Bool[Array, "B C"]:
        """True where a generated token stands."""
        return self.content_mask() & (jnp.arange(self.capacity) >= self.prompt_lengths[:, None])

    def append(self, tokens: Int[Array, "B"], where: Bool[Array, "B"] | None = None) -> "History":
        """The history with one more token in each row, or in the rows at `where`.

        A row that is full stays as it is: whoever starts the loop has to see to the capacity.
        """
        has_room = self.lengths < self.capacity
        where = has_room if where is None else where & has_room
        columns = jnp.where(where, self.lengths, self.capacity)
        return dataclasses.replace(
            self,
            tokens=put_in_rows(self.tokens, columns, tokens),
            lengths=self.lengths + where.astype(self.lengths.dtype),
        )

    def suffix(self, count: int, of_generated: bool = False) -> Int[Array, "B {count}"]:
        """The last tokens of each row, the newest at the right end.

        Args:
          count: how many; static.
          of_generated: leaves the prompt out.

        Returns:
          The tokens, NO_TOKEN where the row, or its generated part, is shorter.
        """
        columns = self.lengths[:, None] - count + jnp.arange(count)
        start = self.prompt_lengths[:, None] if of_generated else 0
        tokens = jnp.take_along_axis(self.tokens, jnp.maximum(columns, 0), axis=1)
        return jnp.where(columns >= start, tokens, NO_TOKEN)


def put_in_rows(
    array: Int[Array, "B C"], columns: Int[Array, "B"], values: Int[Array, "B"]
) -> Int[Array, "B C"]:
    """The array with one more value in each row; in none whose column is behind the end.

    Row by row, so that rows on different devices need not be brought together.
    """

    def put(row: jax.Array, column: jax.Array, value: jax.Array) -> jax.Array:
        return row.at[column].set(value.astype(row.dtype), mode="drop")

    return jax.vmap(put)(array, columns, values)


def history_of_prompts(prompts: Sequence[Sequence[int]], capacity: int, pad_id: int) -> History:
    """The history before the first token is generated.

    Args:
      prompts: ids of each prompt, bos included.
      capacity: most tokens of a row, the new ones included.
      pad_id: fills the rows.

    Raises:
      UserError: if there is no prompt, an empty one, or one that fills the capacity.
    """
    if not prompts:
        raise UserError("there is no prompt to continue; give at least one.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {number} has no token; give it text, or the start token at least."
            )
        if len(prompt) >= capacity:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, which leaves no room for a new one in "
                f"a capacity of {capacity}; shorten it or raise the capacity."
            )
    tokens = np.full((len(prompts), capacity), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    return History(jnp.asarray(tokens), lengths, lengths)
