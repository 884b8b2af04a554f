"""Compute the exact GELU and the method in one Triton kernel forward and one backward: `fused.py` on a GPU.

Forward reads the pre-activation x, writes z = GELU(x), and makes the sums that the method needs of z on the way.
Backward computes z again from x, which is all that a GELU keeps. The memory traffic beyond that of a GELU alone is a
few floats per neuron and STRETCH tokens. `losses.py` defines what is computed (docs/method.md, 3 and 5).

Shapes: M samples (tokens) of a micro-batch, N neurons; x, z and their gradients [M, N] float32, bfloat16 or float16;
statistics [N] float32; all arithmetic in float32.
"""

# A Triton kernel has the types of the arguments of each call.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from l2e_ds.errors import CompileError
from l2e_ds.inhibition.fused import FACTORS
from l2e_ds.inhibition.losses import BackwardTerms, FrozenStatistics, Regulariser
from l2e_ds.system.files import one_line

# A program takes COLUMNS neurons. A warp reads 256 of them in one row, 8 per thread: 16 bytes in half precision.
COLUMNS = 256
WARPS = 4
# Forward walks down STRETCH tokens, ROWS at a time (one per warp), and writes one row of sums for all of them. There
# are no atomics, so the sums are the same every time. STRETCH is small enough that there are programs to fill a GPU,
# and large enough that the sums are little traffic. The five sums of 8 neurons per thread stay in registers: 167 per
# thread on an H100, so that 12 warps share a multiprocessor.
ROWS = 4
STRETCH = 128
# How many iterations the loads of forward run ahead; each takes registers. Not chosen by measurement yet: `l2e-ds
# accept` on a GPU times these numbers and others. (A review of the machine code found no overlap with 2, and 189
# registers with 3.)
STAGES = 2
# Backward walks down BACKWARD_STRETCH tokens, BACKWARD_ROWS at a time, and keeps only two sums from one row to the
# next. With more tokens it reads the statistics less often. Not chosen by measurement yet.
BACKWARD_ROWS = 8
BACKWARD_STRETCH = 8

# Multiplication and addition are not contracted, except within erf, so that forward, backward and `losses.py` select
# the same activations.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


@triton.jit
def _one_and_erf(x):
    """Return 1 + erf(x / sqrt 2), in the form that ATen has; on a GPU `tl.erf` is libdevice's."""
    return 1.0 + tl.erf(x * 0.7071067811865476)


@triton.jit
def _force(d, inverse_s, inverse_variance, factor: tl.constexpr, POWER: tl.constexpr):
    """Return what `fused._force` does."""
    if POWER == 0:
        force = factor / d
    elif POWER == 1:
        force = tl.where(d > 0, inverse_s, -inverse_s)
    else:
        force = d * inverse_variance
    return force


@triton.jit
def _place(N, COLUMNS: tl.constexpr):
    """Return what this program takes: the number of its stretch of rows, int64, and its columns, [COLUMNS]."""
    blocks = tl.cdiv(N, COLUMNS)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)


# tau is a row of all layers' and lies at any multiple of 4 bytes: one kernel for all of them
@triton.jit(do_not_specialize_on_alignment=["tau_ptr"])
def _forward_kernel(
    x_ptr,
    z_ptr,
    partial_ptr,
    mean_ptr,
    inverse_variance_ptr,
    inverse_limit_ptr,
    tau_ptr,
    M,
    N,
    POWER: tl.constexpr,
    PROJECTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STRETCH: tl.constexpr,
    FACTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write z = GELU(x) and, for each stretch, the sums that `column_sums_of` takes, [5 or 6, N], into `partial`."""
    stretch, columns = _place(N, COLUMNS)
    in_row = columns < N
    mean = tl.load(mean_ptr + columns, mask=in_row, other=0.0)
    inverse_variance = tl.load(inverse_variance_ptr + columns, mask=in_row, other=0.0)
    inverse_limit = tl.load(inverse_limit_ptr + columns, mask=in_row, other=0.0)
    tau = tl.load(tau_ptr)
    sum_d = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_d2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_score = tl.zeros([ROWS, COLUMNS], tl.float32)
    measure = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_force = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, STRETCH, ROWS * FACTORS, num_stages=STAGES):  # loads the next x meanwhile
        product = tl.full([ROWS, COLUMNS], 1.0, tl.float32)  # one logarithm for many factors (`fused.FACTORS`)
        for factor in tl.static_range(FACTORS):
            rows = stretch * STRETCH + start + factor * ROWS + tl.arange(0, ROWS)
            inside = (rows < M)[:, None] & in_row[None, :]
            at = rows[:, None] * N + columns[None, :]
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            wide = x.to(tl.float32)
            z = (wide * 0.5 * _one_and_erf(wide)).to(x.dtype)
            tl.store(z_ptr + at, z, mask=inside)
            d = tl.where(inside, z.to(tl.float32) - mean[None, :], 0.0)
            d2 = d * d
            score = d2 * inverse_variance[None, :]
            selected = score >= tau  # nothing outside, where the score is 0
            sum_d += d
            sum_d2 += d2
            count += tl.where(selected, 1.0, 0.0)
            sum_score += tl.where(selected, score, 0.0)
            if POWER == 0:
                product *= tl.where(selected, tl.abs(d) * inverse_limit[None, :], 1.0)
            if POWER == 1:
                measure += tl.where(selected, tl.abs(d), 0.0)
            if PROJECTED:  # without its power of S, by which `fused.column_sums_of` multiplies
                force = _force(tl.where(selected, d, 1.0), 1.0, 1.0, 1.0, POWER)
                sum_force += tl.where(selected, force, 0.0)
        if POWER == 0:
            measure += 2.0 * tl.log(product)
    at = stretch * (6 if PROJECTED else 5) * N + columns
    tl.store(partial_ptr + at, tl.sum(sum_d, 0), mask=in_row)
    tl.store(partial_ptr + at + N, tl.sum(sum_d2, 0), mask=in_row)
    tl.store(partial_ptr + at + 2 * N, tl.sum(count, 0), mask=in_row)
    tl.store(partial_ptr + at + 3 * N, tl.sum(sum_score, 0), mask=in_row)
    tl.store(partial_ptr + at + 4 * N, tl.sum(measure, 0), mask=in_row)
    if PROJECTED:
        tl.store(partial_ptr + at + 5 * N, tl.sum(sum_force, 0), mask=in_row)


@triton.jit(do_not_specialize_on_alignment=["tau_ptr"])
def _backward_kernel(
    x_ptr,
    incoming_ptr,
    outgoing_ptr,
    squares_ptr,
    mean_ptr,
    inverse_s_ptr,
    inverse_variance_ptr,
    shift_ptr,
    pull_ptr,
    tau_ptr,
    gradient_scale_ptr,
    M,
    N,
    FACTOR: tl.constexpr,
    POWER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Write the gradient of x and, for each program, both sums of squares that `fused.gelu_backward` measures."""
    stretch, columns = _place(N, COLUMNS)
    in_row = columns < N
    mean = tl.load(mean_ptr + columns, mask=in_row, other=0.0)
    inverse_s = tl.load(inverse_s_ptr + columns, mask=in_row, other=0.0)
    inverse_variance = tl.load(inverse_variance_ptr + columns, mask=in_row, other=0.0)
    shift = tl.load(shift_ptr + columns, mask=in_row, other=0.0)
    pull = tl.load(pull_ptr + columns, mask=in_row, other=0.0)
    tau, gradient_scale = tl.load(tau_ptr), tl.load(gradient_scale_ptr)
    squares_of_incoming = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares_of_inhibition = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, STRETCH, ROWS):
        rows = stretch * STRETCH + start + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & in_row[None, :]
        at = rows[:, None] * N + columns[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        incoming = tl.load(incoming_ptr + at, mask=inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        one_and_erf = _one_and_erf(wide)
        z = (wide * 0.5 * one_and_erf).to(x.dtype)
        d = z.to(tl.float32) - mean[None, :]
        selected = (d * d * inverse_variance[None, :] >= tau) & inside
        force = _force(tl.where(selected, d, 1.0), inverse_s[None, :], inverse_variance[None, :], FACTOR, POWER)
        inhibition = tl.where(selected, force, 0.0) - shift[None, :] - pull[None, :] * d
        # Rounded only once, at the end: what is added would by itself be among fp16's subnormal numbers.
        gradient = incoming + inhibition * gradient_scale
        density = tl.exp(-0.5 * wide * wide) * 0.3989422804014327
        tl.store(outgoing_ptr + at, (gradient * (0.5 * one_and_erf + wide * density)).to(x.dtype), mask=inside)
        squares_of_incoming += tl.where(selected, incoming * incoming, 0.0)
        squares_of_inhibition += tl.where(selected, inhibition * inhibition, 0.0)
    place = squares_ptr + 2 * tl.program_id(0)
    tl.store(place, tl.sum(tl.sum(squares_of_incoming, 1), 0))
    tl.store(place + 1, tl.sum(tl.sum(squares_of_inhibition, 1), 0))


def forward(x: Tensor, statistics: FrozenStatistics, regulariser: Regulariser) -> tuple[Tensor, Tensor]:
    """Return GELU(x), [M, N] in the dtype of x, and its sums that `fused.column_sums_of` takes, [5 or 6, N] float64.

    x: [M, N] on a GPU, or with TRITON_INTERPRET=1 on a CPU. Raises CompileError.
    """
    x = x.contiguous()
    samples, neurons = x.shape
    stretches = triton.cdiv(samples, STRETCH)
    z = torch.empty_like(x)
    rows = 5 + regulariser.is_projected
    partial = torch.empty(stretches, rows, neurons, dtype=torch.float32, device=x.device)
    s = statistics
    with _explained(), torch.cuda.device_of(x):
        _forward_kernel[(stretches * triton.cdiv(neurons, COLUMNS),)](
            x,
            z,
            partial,
            s.mean,
            s.inverse_variance,
            s.inverse_limit,
            s.tau,
            samples,
            neurons,
            POWER=regulariser.force_power,
            PROJECTED=regulariser.is_projected,
            COLUMNS=COLUMNS,
            ROWS=ROWS,
            STRETCH=STRETCH,
            FACTORS=FACTORS,
            STAGES=STAGES,
            **OPTIONS,
        )
    return z, partial.sum(0, dtype=torch.float64)


def backward(incoming: Tensor, x: Tensor, terms: BackwardTerms) -> tuple[Tensor, Tensor]:
    """Return what `fused.gelu_backward` does, without being given GELU(x).

    incoming, x: [M, N]. Raises CompileError.
    """
    x, incoming = x.contiguous(), incoming.contiguous()
    samples, neurons = x.shape
    outgoing = torch.empty_like(x)
    programs = triton.cdiv(samples, BACKWARD_STRETCH) * triton.cdiv(neurons, COLUMNS)
    squares = torch.empty(programs, 2, dtype=torch.float32, device=x.device)
    s, correction = terms.statistics, terms.correction
    with _explained(), torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            x,
            incoming,
            outgoing,
            squares,
            s.mean,
            s.inverse_s,
            s.inverse_variance,
            correction.shift,
            correction.pull,
            s.tau,
            terms.gradient_scale,
            samples,
            neurons,
            FACTOR=terms.regulariser.factor,
            POWER=terms.regulariser.force_power,
            COLUMNS=COLUMNS,
            ROWS=BACKWARD_ROWS,
            STRETCH=BACKWARD_STRETCH,
            **OPTIONS,
        )
    return outgoing, terms.per_token_squares(squares.sum(0, dtype=torch.float64))


@contextmanager
def _explained() -> Iterator[None]:
    """Raise a CompileError of one line in place of an error of Triton or of the C compiler that it calls."""
    try:
        yield
    except (TritonError, subprocess.CalledProcessError, RuntimeError) as error:
        # A missing compiler is a RuntimeError. The other RuntimeErrors come from the device.
        if isinstance(error, RuntimeError) and "C compiler" not in str(error):
            raise
        raise CompileError(
            f"inhibition.fused: Triton failed ({one_line(error)[:200]}); it needs a C compiler,"
            " and is not needed with inhibition.fused: false, or Settings(fused=False)"
        ) from error
