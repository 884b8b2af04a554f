"""Traffic and time of a training step on given GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.models.counts import flops_per_token
from l2e_ds.planning.memory import is_bf16_optimizer
from l2e_ds.planning.work import Work
from l2e_ds.system.gpus import Gpu

LINK_EFFICIENCY = 0.8  # of the data sheet's bandwidth
LATENCY = 1e-5  # s, of one hop of a collective
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends in a step, bytes; `collectives`: how many of inhibition's in that step."""

    gradients: float
    weights: float
    inhibition: float
    collectives: int


def ring_all_reduce(size: float, ranks: int) -> float:
    """Bytes that each rank sends: 2 (R - 1) / R of the data (Thakur, section 4.4)."""
    return 2 * (ranks - 1) / ranks * size


def gradient_bytes(work: Work) -> int:
    """Payload of one reduction of all gradients, in the network's precision unless the JSON says otherwise (engine.py,
    communication_data_type)."""
    return work.parameters * work.communication


def inhibition_payload(work: Work, accumulation: int) -> tuple[int, int]:
    """Bytes and number of inhibition's all-reduces in a step. One packed float64 buffer of 3 N + 3 a hooked layer; with
    `reduce: forward` also 2 N + 1 in every forward of a hooked layer, and 3 N + 1 for the scale-invariant loss. While
    a regulariser inhibits, 2 a hooked layer in every step and, of the projected loss, 4 N + 1 in every micro-batch."""
    if work.collectives == "none":
        return 0, 0
    size, count = len(work.hooked) * NeuronHook.buffer_size(work.neurons) * 8, 1
    if work.collectives.startswith("forward"):
        passes = accumulation * len(work.hooked)
        size, count = size + passes * (2 * work.neurons + 1) * 8, count + passes
        if work.collectives == "forward-exact":
            size, count = size + passes * (3 * work.neurons + 1) * 8, count + passes
    if not work.deactivation:
        size, count = size + len(work.hooked) * 2 * 8, count + 1
    if work.projected:
        size, count = size + accumulation * len(work.hooked) * (4 * work.neurons + 1) * 8, count + accumulation
    return size, count


def traffic(work: Work, ranks: int, accumulation: int) -> Traffic:
    """ZeRO, section 7: stages 0 to 2 reduce gradients, stage 3 also gathers weights in forward and in backward.

    As DeepSpeed does it: stages 1 and 2 all-reduce whole buckets (`use_multi_rank_bucket_allreduce`), stage 2 and 3 in
    every micro-batch; stages 1 and 2 gather the weights once a step.
    """
    size, sent = gradient_bytes(work), (ranks - 1) / ranks
    gathered = sent * work.parameters * work.element
    inhibition, collectives = inhibition_payload(work, accumulation)
    if work.stage == 3:
        gradients, weights = sent * size * accumulation, 2 * gathered * accumulation
    else:
        gradients = ring_all_reduce(size, ranks) * (accumulation if work.stage == 2 else 1)
        weights = gathered if work.stage else 0.0
    return Traffic(gradients, weights, ring_all_reduce(inhibition, ranks), collectives if ranks > 1 else 0)


@dataclass(frozen=True)
class Times:
    """Seconds of a step; `hidden`: communication behind computation. mfu: of the whole step, without recomputation."""

    compute: float
    communication: float
    inhibition: float
    hidden: bool
    mfu: float

    @property
    def step(self) -> float:
        if self.hidden:
            return max(self.compute, self.communication) + self.inhibition
        return self.compute + self.communication + self.inhibition


def model_flops(work: Work, global_batch: int) -> float:
    """Of a step, all GPUs, without recomputation (PaLM, appendix B, as in `metrics.flops_per_token`)."""
    matrices = work.parameters - work.embedding
    each = flops_per_token(matrices, work.layers, work.hidden, work.sequence_length)
    return each * global_batch * work.sequence_length


def recomputed_flops(work: Work, global_batch: int) -> float:
    """A third of the layers' share: one more forward of them (Korthikanti, section 5)."""
    if not work.checkpointing:
        return 0.0
    layers = work.parameters - 2 * work.embedding
    each = flops_per_token(layers, work.layers, work.hidden, work.sequence_length)
    return each / 3 * global_batch * work.sequence_length


def bus_bandwidth(gpu: Gpu, ranks: int, given: float | None) -> float:
    """Bytes/s of a ring through all GPUs: `given` GB/s, else LINK_EFFICIENCY of its slowest link's data sheet."""
    if given is not None:
        return given * 1e9
    slowest = gpu.within_node if ranks <= GPUS_A_NODE else min(gpu.within_node, gpu.between_nodes)
    return slowest * 1e9 * LINK_EFFICIENCY


def is_hidden(work: Work) -> bool:
    """Whether gradients are reduced behind backward: `overlap_comm`, but not by ZeRO-0 and the BF16_Optimizer, which
    reduce when backward is over (engine.py, allreduce_gradients)."""
    return work.overlap and work.stage > 0 and not is_bf16_optimizer(work)


def times(
    work: Work, gpu: Gpu, ranks: int, global_batch: int, accumulation: int, mfu: float, bandwidth: float
) -> Times:
    """Computation at `mfu` of the peak (of float32 in float32); each collective of inhibition costs also 2 log2(R) hops
    of a tree, which NCCL takes for small data."""
    peak = (gpu.peak_fp32 if work.precision == "fp32" else gpu.peak) * 1e12 * ranks
    flops = model_flops(work, global_batch)
    compute = (flops + recomputed_flops(work, global_batch)) / (peak * mfu)
    sent = traffic(work, ranks, accumulation)
    communication = (sent.gradients + sent.weights) / bandwidth
    inhibition = sent.collectives * 2 * math.log2(ranks) * LATENCY + sent.inhibition / bandwidth
    found = Times(compute, communication, inhibition, is_hidden(work), 0)
    return replace(found, mfu=flops / (peak * found.step))
