"""Every random stream of a seed, in one table.

A stream is a number that is folded into a key, so that whatever draws from the result is
independent of everything else that draws from the same key. Two purposes must never share one.

| key                      | folded in                       | what is drawn                      |
|--------------------------|---------------------------------|------------------------------------|
| `train.seed`             | `VALIDATION`                    | first states of validation         |
|                          | `ADMIN_PROFILE`                 | first states of Admin's profile    |
|                          | split: first half               | weights; `ADDED_WEIGHTS`: LoRA's   |
|                          | split: second half, then step   | depth; the step's objective        |
| objective of a step      | split                           | first state; dropout               |
|                          | `GATE`, `PROBE`, `MEDIA`,       | terms of gate, Jacobian, media,    |
|                          | `SUPERVISION`                   | the loss at every iteration        |
| a validated batch        | `VALIDATED_IMAGES`, `..._CLIPS` | noise that decoders are judged on  |
| generation seed, prompt, | place of the token              | the token                          |
| sample                   | `FIRST_STATE`, then place       | the token's first state            |
|                          | `GENERATED_MEDIA`, then count   | a medium                           |
|                          | place, then `DRAFT`, `ACCEPT`,  | speculative decoding               |
|                          | `REPLACE`                       |                                    |
| `data.seed` (NumPy)      | `SPLIT`, `Purpose`              | what is held out; see `Purpose`    |

Where a number only counts (layers, micro-batches, steps, rows, places), it stands at its use.
"""

import enum

import numpy as np

# Of a run: jax.random.key(train.seed). The largest numbers, which no step reaches.
VALIDATION = 2**32 - 1
ADMIN_PROFILE = 2**32 - 2

# Of the half of that key which the weights come from.
ADDED_WEIGHTS = 1

# Of the objective of one step. `jax.random.split` of the same key has the first two.
GATE, PROBE, MEDIA, SUPERVISION = 2, 3, 4, 5

# Of one medium's term in a validation.
VALIDATED_IMAGES, VALIDATED_CLIPS = 1, 2

# Of one generated text. Places of tokens are folded into the same key: these are beyond any.
FIRST_STATE = 0x57A7E
GENERATED_MEDIA = 0x3ED1A
# Of one place in it.
DRAFT, ACCEPT, REPLACE = range(3)

# Of the data: streams of NumPy's Philox with `data.seed`. Orders and problems use small numbers.
SPLIT = 1 << 62


class Purpose(enum.IntEnum):
    """What numbers of a document or row are for: each has its own stream of the data seed."""

    BACK_TRANSLATION = 1 << 61
    SYNONYMS = (1 << 61) + 1
    TOKEN_DROPOUT = (1 << 61) + 2
    MEDIA_ROW = (1 << 61) + 3
    IMAGE_AUGMENTATION = (1 << 61) + 4
    AUDIO_AUGMENTATION = (1 << 61) + 5
    TONES = (1 << 61) + 6
    CROPS = (1 << 61) + 7
    SEGMENTS = (1 << 61) + 8
    MEDIA_TASKS = (1 << 61) + 9


def generator_of(seed: int, number: int, purpose: Purpose) -> np.random.Generator:
    """The generator of a document or row: the same in every process, worker and resumed run.

    Args:
      seed: `data.seed`.
      number: of the document in the stream of all epochs, so that each epoch draws again.
      purpose: which stream.
    """
    # Philox counts up from the lowest word, so that documents never share numbers.
    counter = np.array([0, number, 0, 0], np.uint64)
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
