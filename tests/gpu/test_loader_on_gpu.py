"""Batches that are copied beside what the GPU computes; written without a GPU at hand."""

import numpy as np
import pytest
import torch

from l2e_ds.training.loader import Loader


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_as_they_were_read():
    device = torch.device("cuda", 0)
    steps, shape = 60, (2, 8, 2049)

    def read(step):
        return np.random.default_rng(step).integers(0, 50_000, shape)

    matrix = torch.randn(2048, 2048, device=device)
    loader, sums = Loader(read, 0, steps, device), []
    for _ in range(steps):
        batch = loader.take()
        assert batch.device == device and batch.dtype == torch.int64
        for _ in range(20):  # the copy of the next batch must neither wait for this nor overwrite what is still used
            matrix = torch.tanh(matrix @ matrix)
        sums.append((batch * torch.arange(batch.numel(), device=device).view(shape)).sum())
        del batch
    assert loader.close()
    expected = [int((read(step) * np.arange(np.prod(shape)).reshape(shape)).sum()) for step in range(steps)]
    assert [int(one) for one in sums] == expected
