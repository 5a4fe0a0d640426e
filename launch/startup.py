"""What an attempt needs before its first step: a machine, the image, the weights, and loading them. Pure.

The provider's clock runs through all of it. None of these was timed on a cloud by us: each says so, and its p90 is far
from its p50.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Final, NamedTuple

IMAGE_BYTES: Final = 7e9
"""What the image's layers unpack to."""
_PULL: Final = (50e6, 20e6)
"""Bytes a second, half of the time and at worst one time in ten: pulled and unpacked."""
_DOWNLOAD: Final = (200e6, 80e6)
"""From the hub or a bucket."""
_LOAD: Final = (700e6, 300e6)
"""From disk to GPU, quantised and digested on the way."""
_IMPORT: Final = (15.0, 30.0)
"""Seconds of loading torch and its company from a fresh image."""
_IMPORT_HERE: Final = (6.0, 11.0)
"""The same where everything is in the page cache, with the process before it: the quickstart on two AMD EPYC cores,
2026-11-23. Twice that where others use the machine."""
_PROVISION: Final = {
    "slurm": (30.0, 120.0),
    "kubernetes": (60.0, 300.0),
    "runpod": (120.0, 300.0),
    "vast": (120.0, 400.0),
}
_PROVISION_ELSEWHERE: Final = (240.0, 600.0)
"""Seconds from the provider's yes to SkyPilot's first command: boot, ssh, SkyPilot's own runtime."""
_WITHOUT_IMAGE: Final = frozenset({"slurm", "local"})
_P90: Final = NormalDist().inv_cdf(0.9)


class Phase(NamedTuple):
    """Part of a start, in seconds."""

    name: str
    p50: float
    p90: float
    basis: str


class Startup(NamedTuple):
    """All of it, in order."""

    phases: tuple[Phase, ...]

    def seconds(self, luck: float) -> float:
        """Of one start.

        Args:
            luck: standard normal; all phases are slow together, as on a busy network.
        """
        p50, p90 = sum(phase.p50 for phase in self.phases), sum(phase.p90 for phase in self.phases)
        return p50 * math.exp(luck * math.log(p90 / p50) / _P90) if p50 else 0.0


def startup_of(cloud: str, base_bytes: int, *, fetched: bool = True, guessed: bool = False) -> Startup:
    """What a start takes.

    Args:
        cloud: as offers name it; "local" for this machine.
        base_bytes: of the base model's files.
        fetched: whether they come from the hub or a bucket; a folder of the machine's own is only read.
        guessed: whether that is two bytes a parameter, since nobody told.
    """
    size = f"{base_bytes / 1e9:.1f} GB" + (", two bytes a parameter" if guessed else "")
    phases = []
    if cloud != "local":
        p50, p90 = _PROVISION.get(cloud, _PROVISION_ELSEWHERE)
        phases.append(Phase("provisioning", p50, p90, "assumed"))
        if cloud not in _WITHOUT_IMAGE:
            pulled = f"{IMAGE_BYTES / 1e9:.0f} GB at {_PULL[0] / 1e6:.0f} MB/s, assumed"
            phases.append(Phase("image", *_at(IMAGE_BYTES, _PULL), pulled))
    if base_bytes and fetched:
        phases.append(
            Phase("weights", *_at(base_bytes, _DOWNLOAD), f"{size} at {_DOWNLOAD[0] / 1e6:.0f} MB/s, assumed")
        )
    imports = _IMPORT_HERE if cloud == "local" else _IMPORT
    load = _at(base_bytes, _LOAD)
    how = "as the quickstart was timed" if cloud == "local" else "assumed"
    if base_bytes:
        how = f"{size} at {_LOAD[0] / 1e6:.0f} MB/s, assumed"
    phases.append(Phase("loading", imports[0] + load[0], imports[1] + load[1], how))
    return Startup(tuple(phases))


def _at(size: float, rate: tuple[float, float]) -> tuple[float, float]:
    return size / rate[0], size / rate[1]
