"""The one entry to this folder: `read_program`."""

from collections.abc import Mapping

from megatransformer_jax.compiled.chips import Chip
from megatransformer_jax.compiled.reading import ProgramReading


def read_program(
    hlo_text: str,
    mesh: Mapping[str, int],
    chip: Chip,
    *,
    traced_trips: Mapping[str, int] | int = 1,
) -> ProgramReading:
    """Reads what a compiled program does on one device.

    Args:
      hlo_text: `compiled.as_text()`: scheduled HLO after partitioning.
      mesh: devices on each axis, in the order of `Mesh.shape`.
      chip: that it was compiled for.
      traced_trips: turns of loops whose number of turns depends on data: by a part of the loop's
        `source`, such as {"_iterate_core": 4}, or one number for all of them. Others count once.

    Raises:
      UserError: if the text is not scheduled HLO.
    """
    raise NotImplementedError
