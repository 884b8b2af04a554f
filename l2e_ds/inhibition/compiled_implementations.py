"""Compute one layer's micro-batches with torch.compile (`fused.py`) or in Triton kernels (`triton_gelu.py`).

`NeuronHook` imports this late, as it imports PyTorch's compiler, which takes seconds.

Shapes: M samples (tokens) of a micro-batch, N neurons of a layer.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from l2e_ds.inhibition import fused
from l2e_ds.inhibition.implementations import Implementation
from l2e_ds.inhibition.losses import BackwardTerms
from l2e_ds.inhibition.moments import sample_count

if TYPE_CHECKING:
    from l2e_ds.inhibition.hook import NeuronHook

_HAS_TRITON = getattr(find_spec("triton"), "origin", None) is not None  # None for a mere folder of that name
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in tests: Triton then runs on a CPU, too


def choose_implementation(hook: NeuronHook, z: Tensor, before_gelu: bool) -> Implementation:
    """Return the fastest implementation. z: [M, N], the activations, or if before_gelu, the input of their GELU."""
    if before_gelu and _has_kernel(z):
        return GeluInKernel(hook)
    return Gelu(hook) if before_gelu and z.device.type == "cpu" else OnePass(hook)


def _has_kernel(x: Tensor) -> bool:
    """Return whether the Triton kernels take x."""
    return _HAS_TRITON and (x.is_cuda or _IS_INTERPRETED) and x.dtype != torch.float64


class OnePass(Implementation):
    """Uses one compiled pass over the activations in forward, and one in backward."""

    moved = staticmethod(fused.moved)

    def observe(self, z: Tensor) -> None:
        observe = fused.observe if self.owner.has_history else fused.observe_without_history
        self.hook.add_sums(*observe(z, self.hook.step_statistics, self.hook.regulariser))

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        return fused.add_gradient(incoming, x, terms)


class Gelu(OnePass):
    """Computes the gradient of the GELU in the same pass in backward."""

    computes_gelu = True
    keeps_activations = True  # which costs no memory: the next layer keeps them anyway

    def forward(self, x: Tensor) -> Tensor:
        return fused.WithInhibition.apply(x, self._compute, self.add_gradient, self.keeps_activations)

    def _compute(self, x: Tensor) -> Tensor:
        is_first = self.hook.count_forward()
        z = functional.gelu(x)
        if is_first:
            self.observe(z)
        return z

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        assert z is not None
        return fused.gelu_backward(incoming, x, z, terms)


class GeluInKernel(Gelu):
    """Computes the GELU in the same pass in forward, too, with one Triton kernel each way."""

    keeps_activations = False

    def _compute(self, x: Tensor) -> Tensor:
        from l2e_ds.inhibition import triton_gelu  # needs Triton, which may be missing

        hook = self.hook
        is_first = hook.count_forward()
        z, sums = triton_gelu.forward(x, hook.step_statistics, hook.regulariser)
        if is_first:
            hook.add_sums(*fused.compiled_totals(sums, hook.step_statistics, hook.regulariser, sample_count(x)))
        return z

    def backward(self, incoming: Tensor, x: Tensor, z: Tensor | None, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
        from l2e_ds.inhibition import triton_gelu

        return triton_gelu.backward(incoming, x, terms)
