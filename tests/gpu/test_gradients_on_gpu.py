"""The gradient matrix of tests/distributed on real GPUs (nccl); written without one at hand."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.test_gradients import COMBINATIONS

WORKER = Path(__file__).parents[1] / "distributed/workers/gradient_matrix.py"
LARGEST_ERROR = {"fp32": 1e-5, "fp16": 0.03, "bf16": 0.1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_equal_float64_autograd_on_gpu(run_ranks, tmp_path):
    run_ranks(min(2, torch.cuda.device_count()), WORKER, tmp_path, "all", accelerator="cuda")
    matrix = json.loads((tmp_path / "matrix.json").read_text())
    assert len(matrix) == COMBINATIONS
    for name, result in matrix.items():
        assert result["part"] > 0.4, name
        assert result["error"] < LARGEST_ERROR[name.split("-")[1]], (name, result)
