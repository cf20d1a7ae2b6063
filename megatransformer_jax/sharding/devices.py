"""Accelerators by name: what runs on them and how much memory one device has.

For costs of machines that are not here. Nothing of this is asked of a device that is.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """One kind of device, as JAX counts devices.

    Attributes:
      name: what users call it.
      platform: 'gpu' or 'tpu'.
      memory_gib: of one device, before JAX takes its share.
    """

    name: str
    platform: str
    memory_gib: float


# Device memory as the vendors state it. A TPU v4 or v5p chip is one device.
DEVICE_KINDS = (
    DeviceKind("v5e", "tpu", 16),
    DeviceKind("v4", "tpu", 32),
    DeviceKind("v6e", "tpu", 32),
    DeviceKind("v5p", "tpu", 95),
    DeviceKind("l4", "gpu", 24),
    DeviceKind("a100-40gb", "gpu", 40),
    DeviceKind("a100-80gb", "gpu", 80),
    DeviceKind("h100", "gpu", 80),
    DeviceKind("h200", "gpu", 140),
    DeviceKind("b200", "gpu", 178),
)
DEVICE_NAMES = tuple(kind.name for kind in DEVICE_KINDS)
# The rest is for what is not the step: batches made ahead, validation, fragments.
USABLE_SHARE = 0.9


def device_kind(name: str) -> DeviceKind:
    """The kind of this name.

    Raises:
      ValueError: if there is none; lists those there are.
    """
    for kind in DEVICE_KINDS:
        if kind.name == name:
            return kind
    raise ValueError(f"unknown device {name!r}; known: {', '.join(DEVICE_NAMES)}")


def devices_with_room(num_bytes: int, platform: str) -> list[str]:
    """Names of a platform's devices that have room for a step of so many bytes on each."""
    return [
        kind.name
        for kind in DEVICE_KINDS
        if kind.platform == platform and num_bytes <= USABLE_SHARE * kind.memory_gib * 2**30
    ]
