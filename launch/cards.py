"""What is known of GPUs: peak arithmetic, bandwidth and memory, by the names that SkyPilot gives them. Pure.

Sources: NVIDIA's datasheets of each (bf16 tensor cores, dense, with fp32 accumulation; sparsity would double the
number, and no training has it). Memory is what the driver leaves: measured on H100 and H200, 2 % under the decimal
size elsewhere. H200, measured 2026-11-22 with torch 2.11: bf16 matmuls of random data reach 690-700 TFLOP/s, 0.70 of
the datasheet.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Card(NamedTuple):
    """One GPU.

    Args:
        name: as people call it.
        tflops: bf16 dense, datasheet.
        gb_per_second: of its memory, datasheet.
        gib: usable memory.
        hopper: of the generation that was timed: kernels and their choice are the same.
        fp8: whether it multiplies in e4m3: compute capability 8.9 or more, which is Ada, Hopper and Blackwell (NVIDIA,
            "CUDA GPU Compute Capability").
    """

    name: str
    tflops: float
    gb_per_second: float
    gib: float
    hopper: bool = False
    fp8: bool = False


MATMUL_SHARE: Final = 0.70
"""Of the datasheet's peak that a large bf16 matmul reaches (measured on H200, above)."""


CONTEXT_GIB: Final = 0.75
"""CUDA's context and the libraries' workspaces: what the card had taken beyond torch's allocator (H200, 2026-11-23)."""


def _gib(gigabytes: float) -> float:
    return gigabytes * 1e9 / 2**30 * 0.98


_H100 = Card("H100 SXM", 989, 3350, 79.1, hopper=True, fp8=True)
_H100_PCIE = Card("H100 PCIe", 756, 2000, 79.1, hopper=True, fp8=True)
_H200 = Card("H200", 989, 4800, 139.8, hopper=True, fp8=True)
_A100_80 = Card("A100 80 GB", 312, 2039, 79.1)

CARDS: Final[dict[str, Card]] = {
    "H200": _H200,
    "H200-SXM": _H200,
    "H100": _H100,
    "H100-SXM": _H100,
    "H100-MEGA": _H100,
    "H100-80GB": _H100,
    "H100-NVL": Card("H100 NVL", 835, 3938, _gib(94), hopper=True, fp8=True),
    "H100-PCIE": _H100_PCIE,
    "GH200": Card("GH200", 989, 4000, _gib(96), hopper=True, fp8=True),
    "B200": Card("B200", 2250, 8000, _gib(180), fp8=True),
    "A100": Card("A100 40 GB", 312, 1555, 39.4),
    "A100-80GB": _A100_80,
    "A100-80GB-SXM": _A100_80,
    "L40S": Card("L40S", 362, 864, 44.4, fp8=True),
    "L40": Card("L40", 181, 864, 44.4, fp8=True),
    "L4": Card("L4", 121, 300, 22.0, fp8=True),
    "A10": Card("A10", 125, 600, 22.0),
    "A10G": Card("A10G", 70, 600, 22.0),
    "A40": Card("A40", 150, 696, 44.4),
    "A6000": Card("RTX A6000", 155, 768, 47.4),
    "RTXA6000": Card("RTX A6000", 155, 768, 47.4),
    "RTX6000-Ada": Card("RTX 6000 Ada", 182, 960, 47.4, fp8=True),
    "RTX3090": Card("RTX 3090", 71, 936, 23.5),
    "RTX4090": Card("RTX 4090", 165, 1008, 23.5, fp8=True),
    "RTX5090": Card("RTX 5090", 209, 1792, 31.3, fp8=True),
}
"""By SkyPilot's name."""

WITHOUT_BF16: Final = frozenset({"V100", "V100-32GB", "T4", "P100", "P4", "K80", "M60", "RTX6000"})
"""Older than Ampere: they do not compute in bf16, and the job does. RTX6000 is the Quadro of 2018."""


def card_of(gpu: str, cloud: str = "") -> Card | str:
    """What is known of a GPU, or why nothing is.

    Args:
        gpu: SkyPilot's name, in any case.
        cloud: RunPod calls the PCIe card H100, and the faster one H100-SXM.
    """
    if cloud == "runpod" and gpu.upper() == "H100":
        return _H100_PCIE
    by_name = {name.upper(): card for name, card in CARDS.items()}
    if found := by_name.get(gpu.upper()):
        return found
    if gpu.upper() in WITHOUT_BF16:
        return f"{gpu} does not compute in bf16, which the job trains in"
    return f"nobody measured {gpu}, nor told ftjob its speed"


def lacks_fp8(gpu: str, cloud: str = "") -> bool:
    """Whether a GPU is known not to multiply in e4m3."""
    card = card_of(gpu, cloud)
    return gpu.upper() in WITHOUT_BF16 if isinstance(card, str) else not card.fp8
