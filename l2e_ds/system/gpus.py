"""Memory and peak throughput of known GPUs, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.2,
}
"""Dense bf16/fp16 peaks in TFLOP/s (without sparsity), by a part of the name that CUDA gives."""


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Return the peak of one device: as given in `logging.peak_tflops`, else from the table, else None."""
    if given is not None or device.type != "cuda":
        return given
    import torch  # only now: `l2e-ds plan --help` reads the tables alone

    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


@dataclass(frozen=True)
class Gpu:
    """Holds what a data sheet says. memory: GiB as CUDA reports it; peak: dense bf16/fp16 TFLOP/s; peak_fp32: no
    TF32."""

    memory: float
    peak: float
    peak_fp32: float
    bf16: bool = True


GPUS = {
    "B200": Gpu(178, PEAK_TFLOPS["B200"], 75),
    "GH200": Gpu(94, PEAK_TFLOPS["GH200"], 67),
    "H200": Gpu(139, PEAK_TFLOPS["H200"], 67),
    "H100": Gpu(79, PEAK_TFLOPS["H100"], 67),
    "H100-PCIe": Gpu(79, PEAK_TFLOPS["H100 PCIe"], 51),
    "A100-80GB": Gpu(79, PEAK_TFLOPS["A100"], 19.5),
    "A100-40GB": Gpu(39, PEAK_TFLOPS["A100"], 19.5),
    "V100-32GB": Gpu(31.7, PEAK_TFLOPS["V100"], 15.7, bf16=False),
    "V100-16GB": Gpu(15.8, PEAK_TFLOPS["V100"], 15.7, bf16=False),
    "L40S": Gpu(44.5, PEAK_TFLOPS["L40S"], 91.6),
    "A10": Gpu(22, PEAK_TFLOPS["A10"], 31.2),
    "L4": Gpu(22, PEAK_TFLOPS["L4"], 30.3),
    "RTX-4090": Gpu(23.5, PEAK_TFLOPS["RTX 4090"], 82.6),
}
