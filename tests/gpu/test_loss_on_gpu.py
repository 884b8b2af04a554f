"""The LM loss in chunks on a GPU; written without one at hand."""

import pytest
import torch
from torch.nn import functional

from l2e_ds.training import loss

TOKENS, HIDDEN, VOCABULARY = 10000, 256, 50304


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("coefficient", [0.0, 1e-2])
def test_value_and_gradients(dtype, tolerance, coefficient):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda").to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(VOCABULARY, HIDDEN, device="cuda")).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    found, z_loss = loss._ChunkedMean.apply(hidden, weight, targets, coefficient)
    (found * 1024).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    expected = functional.cross_entropy(logits, targets)
    expected_z_loss = coefficient * logits.logsumexp(1).square().mean()
    ((expected + expected_z_loss) * 1024).backward()
    for value, reference in ((found, expected), (z_loss, expected_z_loss)):
        torch.testing.assert_close(value.detach().double(), reference.detach(), rtol=tolerance, atol=0)
    for tensor, reference in zip((hidden, weight), exact, strict=True):
        assert tensor.grad.dtype == dtype
        assert float((tensor.grad.double() - reference.grad).norm() / reference.grad.norm()) < tolerance
