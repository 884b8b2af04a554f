"""Memory and peak throughput of known GPUs, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """Holds the data of one GPU.

    cuda_name: the part of CUDA's name for it; memory: GiB as CUDA reports it; peak: dense bf16/fp16 TFLOP/s (without
    sparsity); peak_fp32: without TF32.
    """

    cuda_name: str
    memory: float
    peak: float
    peak_fp32: float
    bf16: bool = True


GPUS = {
    "B200": Gpu("B200", 178, 2250.0, 75),
    "GH200": Gpu("GH200", 94, 989.4, 67),
    "H200": Gpu("H200", 139, 989.4, 67),
    "H100": Gpu("H100", 79, 989.4, 67),
    "H100-80GB": Gpu("H100", 79, 989.4, 67),
    "H100-NVL": Gpu("H100 NVL", 93, 835.0, 60),
    "H100-PCIe": Gpu("H100 PCIe", 79, 756.0, 51),
    "A100-80GB": Gpu("A100", 79, 312.0, 19.5),
    "A100-40GB": Gpu("A100", 39, 312.0, 19.5),
    "V100-32GB": Gpu("V100", 31.7, 125.0, 15.7, bf16=False),
    "V100-16GB": Gpu("V100", 15.8, 125.0, 15.7, bf16=False),
    "L40S": Gpu("L40S", 44.5, 362.0, 91.6),
    "A10": Gpu("A10", 22, 125.0, 31.2),
    "L4": Gpu("L4", 22, 121.0, 30.3),
    "RTX-4090": Gpu("RTX 4090", 23.5, 165.2, 82.6),
}


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Return the peak of one device: as given in `logging.peak_tflops`, else from the table, else None."""
    if given is not None or device.type != "cuda":
        return given
    import torch  # only now: `l2e-ds plan --help` reads the table alone

    name = torch.cuda.get_device_name(device)
    known = [gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.cuda_name}\b", name)]
    return max(known, key=lambda gpu: len(gpu.cuda_name)).peak if known else None  # "H100 PCIe" before "H100"
