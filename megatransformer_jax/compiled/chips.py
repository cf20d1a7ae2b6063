"""What chips can do at most: the numbers that estimates of a compiled program divide by."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from megatransformer_jax.sharding.topology import Topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      name: as in topologies, such as 'v4'.
      bf16_flops: of matrix products, FLOP/s.
      hbm_bandwidth: bytes/s read and written.
      hbm_bytes: that a program can use: less than is built in, because the system keeps some.
      ici_bandwidth: bytes/s that a chip sends over one axis of its torus, to both neighbours; of a
        GPU, to the others of its machine.
      dcn_bandwidth: bytes/s that a chip sends to other slices or machines, if all chips of its host
        send.
      linked: how many devices, one after the other, `ici_bandwidth` joins. None: all of a program,
        as on a slice of TPUs.
    """

    name: str
    bf16_flops: float
    hbm_bandwidth: float
    hbm_bytes: int
    ici_bandwidth: float
    dcn_bandwidth: float
    linked: int | None = None

    @property
    def platform(self) -> str:
        """'tpu' or 'gpu'."""
        return "tpu" if self.linked is None else "gpu"


# FLOP/s, HBM bandwidth and links: Google Cloud's pages of each generation (docs.cloud.google.com/
# tpu/docs/v4, v5e, v5p, v6e). They state ICI for all links of a chip: v4 2400 and v5p 4800 Gbit/s
# sent over 6 links, v5e 1600 and v6e 3200 over 4; an axis has two of them. DCN: 6.4 Tbit/s for
# 256 chips of v5e, 25.6 for 256 of v6e, and 200 Gbit/s for a host of 4 chips of v4 and v5p ("How to
# scale your model", jax-ml.github.io/scaling-book). HBM: what libtpu 0.0.42's compiler reports as
# available when a program does not fit.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("v4", 275e12, 1.228e12, int(30.75 * GIB), 100e9, 6.25e9),
            Chip("v5e", 197e12, 0.819e12, int(15.75 * GIB), 100e9, 3.125e9),
            Chip("v5p", 459e12, 2.765e12, int(95.74 * GIB), 200e9, 6.25e9),
            Chip("v6e", 918e12, 1.638e12, int(31.25 * GIB), 200e9, 12.5e9),
        )
    }
)

# Of a GPU's memory JAX takes three quarters, unless it is told otherwise.
_GPU_SHARE = 0.75


def chip_of(topology: Topology) -> Chip:
    """What a topology is made of.

    Examples:
      >>> from megatransformer_jax.sharding.topology import parse_topology
      >>> chip_of(parse_topology("v5e-16")).name, chip_of(parse_topology("h100-4")).linked
      ('v5e', 4)
    """
    kind = topology.gpu
    if kind is None:
        return CHIPS[topology.kind]
    return Chip(
        kind.name,
        kind.bf16_flops,
        kind.memory_bandwidth,
        int(_GPU_SHARE * kind.memory_bytes),
        kind.link_bandwidth,
        kind.network_bandwidth,
        linked=math.prod(topology.box),
    )
