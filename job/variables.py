"""The environment variables of libraries, settled before those are imported: a shell's or a cluster's decide nothing of
what is trained, and nobody is told of it. A run is its recipe and its data; where it is resumed the shell is another.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final

_LAUNCHED: Final = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")
"""Beginnings of what `accelerate launch`, MPI and their like leave. ACCELERATE_MIXED_PRECISION, for one, overrules the
trainer's arguments."""

_TAKEN: Final = frozenset(
    {
        # One process trains. Of these torchrun's and Kubeflow's ranks make a group of it, whose others never come.
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        # How sums are made, on the very same hardware.
        "MKL_CBWR",
        "MKL_DEBUG_CPU_TYPE",
        "MKL_ENABLE_INSTRUCTIONS",
        "DNNL_DEFAULT_FPMATH_MODE",
        "DNNL_MAX_CPU_ISA",
        "ONEDNN_DEFAULT_FPMATH_MODE",
        "ONEDNN_MAX_CPU_ISA",
        "NVIDIA_TF32_OVERRIDE",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        # transformers reports to it, also where it is told to report to nobody.
        "KUBEFLOW_TRAINER_SERVER_URL",
    }
)


def settle(variables: MutableMapping[str, str]) -> None:
    """Take away what would change a run or tell of it, and set what it needs."""
    for name in [name for name in variables if name in _TAKEN or name.startswith(_LAUNCHED)]:
        del variables[name]
    variables["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL tells of each training
    # One GPU trains; of several, transformers would make a DataParallel, whose sums nobody asked for.
    variables["CUDA_VISIBLE_DEVICES"] = variables.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    # Segments that grow leave no gaps that are too small; and cuBLAS sums in one order (torch: "Reproducibility").
    variables.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    variables.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
