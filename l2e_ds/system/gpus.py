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

    written: a regular expression of the names that people write for it, in small letters and digits alone, without its
    brand; cuda_name: the part of CUDA's name for it; memory: GiB as CUDA reports it; peak: dense bf16/fp16 TFLOP/s
    (without sparsity); peak_fp32: without TF32.
    """

    written: str
    cuda_name: str
    memory: float
    peak: float
    peak_fp32: float
    bf16: bool = True

    def peak_in(self, precision: str) -> float:
        """Return the peak in TFLOP/s of a precision: `fp32`, `bf16` or `fp16`."""
        return self.peak_fp32 if precision == "fp32" else self.peak


GPUS = {
    "B200": Gpu(r"b200(sxm6?)?(180gb|192gb)?", "B200", 178, 2250.0, 75),
    "GH200": Gpu(r"gh200(96gb|480gb)?", "GH200", 94, 989.4, 67),
    "H200": Gpu(r"h200(sxm5?)?(141gb)?", "H200", 139, 989.4, 67),
    "H200-NVL": Gpu(r"h200nvl(141gb?)?", "H200 NVL", 139, 835.0, 60),
    "H100": Gpu(r"h100(sxm5?)?(80gb?)?(sxm5?)?(hbm3)?", "H100", 79, 989.4, 67),
    "H100-NVL": Gpu(r"h100nvl(94gb?)?", "H100 NVL", 93, 835.0, 60),
    "H100-PCIe": Gpu(r"h100(pcie(80gb?)?|80gb?pcie)", "H100 PCIe", 79, 756.0, 51),
    "A100-80GB": Gpu(r"a100(sxm4?|pcie)?80gb?(sxm4?|pcie)?", "A100", 79, 312.0, 19.5),
    "A100-40GB": Gpu(r"a100(sxm4?|pcie)?40gb?(sxm4?|pcie)?", "A100", 39, 312.0, 19.5),
    "V100-32GB": Gpu(r"v100(sxm[23]?|pcie)?32gb?(sxm[23]?)?", "V100", 31.7, 125.0, 15.7, bf16=False),
    "V100-16GB": Gpu(r"v100(sxm2?|pcie)?16gb?(sxm2?)?", "V100", 15.8, 125.0, 15.7, bf16=False),
    "L40S": Gpu(r"l40s(48gb?)?", "L40S", 44.5, 362.0, 91.6),
    "A10": Gpu(r"a10(24gb?)?", "A10", 22, 125.0, 31.2),
    "L4": Gpu(r"l4(24gb?)?", "L4", 22, 121.0, 30.3),
    "RTX-4090": Gpu(r"(rtx)?4090(24gb?)?", "RTX 4090", 23.5, 165.2, 82.6),
}


def peak_tflops(device: torch.device, precision: str, given: float | None) -> float | None:
    """Return the peak of one device in TFLOP/s: as given in `logging.peak_tflops`, else that of the table in a
    precision (`fp32`, `bf16` or `fp16`), else None."""
    if given is not None or device.type != "cuda":
        return given
    import torch  # only now: `l2e-ds plan --help` reads the table alone

    name = torch.cuda.get_device_name(device)
    known = [gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.cuda_name}\b", name)]
    if not known:
        return None
    return max(known, key=lambda gpu: len(gpu.cuda_name)).peak_in(precision)  # "H100 PCIe" before "H100"
