"""Turns exhausted memory into an error of one line that names what takes it."""

import contextlib
from collections.abc import Iterator

import jax

from megatransformer_jax.config.option import UserError


@contextlib.contextmanager
def out_of_memory_is_bad_input() -> Iterator[None]:
    """Reports memory that generation asks for and does not get.

    Raises:
      UserError: instead of the allocator's error, be it NumPy's or XLA's.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0].rstrip(".")
        raise UserError(
            f"memory does not suffice: {reason}; lower batch_size, num_samples, num_beams, "
            "max_new_tokens, depth or cache_capacity, or set cache_slots."
        ) from error
