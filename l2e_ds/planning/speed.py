"""Predict traffic and computation of a training step."""

from __future__ import annotations

from dataclasses import dataclass

from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.models.counts import flops_per_token
from l2e_ds.planning.work import Work

MFU = (
    (100e6, (0.10, 0.35), (0.06, 0.24)),  # no table was found: guesses below the next line's
    (300e6, (0.26, 0.40), (0.17, 0.27)),
    (600e6, (0.30, 0.46), (0.20, 0.31)),
    (2e9, (0.32, 0.56), (0.24, 0.40)),
    (float("inf"), (0.39, 0.62), (0.29, 0.45)),
)
"""Shares of the peak that steps of other programs reached: models below so many parameters, on A100s, on H100s. Nothing
of it was measured by this project. docs/planning.md has the sources, and how the two ends follow from them."""
FAST = 500  # TFLOP/s; a GPU with a higher peak is taken for an H100, any other for an A100


@dataclass(frozen=True)
class Traffic:
    """Holds the bytes that one GPU sends in a step."""

    gradients: float
    weights: float
    inhibition: float


def ring_all_reduce(size: float, ranks: int) -> float:
    """Return the bytes that each rank sends: 2 (R - 1) / R of the data (Thakur, section 4.4)."""
    return 2 * (ranks - 1) / ranks * size


def inhibition_payload(work: Work, accumulation: int) -> int:
    """Return the bytes of inhibition's all-reduces in a step, float64. A hooked layer has one packed buffer of 3 N + 3;
    with `reduce: forward` also 2 N + 1 in every forward, and 3 N + 1 for the scale-invariant loss. While a regulariser
    inhibits, 2 in every step and, of the projected loss, 4 N + 1 in every micro-batch."""
    if work.collectives == "none":
        return 0
    n = work.neurons
    in_step = NeuronHook.buffer_size(n) + (0 if work.deactivation else 2)
    in_forward = {"step": 0, "forward": 2 * n + 1, "forward-exact": 5 * n + 2}[work.collectives]
    in_forward += 4 * n + 1 if work.projected else 0
    return 8 * len(work.hooked) * (in_step + accumulation * in_forward)


def traffic(work: Work, ranks: int, accumulation: int) -> Traffic:
    """Return what one GPU sends in a step. Stages 0 to 2 reduce gradients, stage 3 also gathers weights in forward and
    in backward (ZeRO, section 7).

    As DeepSpeed does it: gradients in the network's precision unless the JSON says otherwise (engine.py,
    communication_data_type); stages 1 and 2 all-reduce whole buckets (`use_multi_rank_bucket_allreduce`), stage 2 and 3
    in every micro-batch; stages 1 and 2 gather the weights once a step.
    """
    size, sent = work.parameters * work.communication, (ranks - 1) / ranks
    gathered = sent * work.parameters * work.element
    if work.stage == 3:
        gradients, weights = sent * size * accumulation, 2 * gathered * accumulation
    else:
        gradients = ring_all_reduce(size, ranks) * (accumulation if work.stage == 2 else 1)
        weights = gathered if work.stage else 0.0
    return Traffic(gradients, weights, ring_all_reduce(inhibition_payload(work, accumulation), ranks))


def mfu_range(parameters: int, peak: float) -> tuple[float, float]:
    """Return the lowest and the highest share of the peak to expect of a step. peak: of one GPU, TFLOP/s in bf16."""
    of_a100, of_h100 = next(ranges for limit, *ranges in MFU if parameters < limit)
    return of_h100 if peak > FAST else of_a100


def step_flops(work: Work, global_batch: int) -> float:
    """Return the operations of a step, of all GPUs (PaLM, appendix B, as in `models.counts.flops_per_token`).

    Activation checkpointing adds one more forward of the layers, a third of their share (Korthikanti, section 5).
    """

    def of(matrices: int) -> float:
        each = flops_per_token(matrices, work.layers, work.hidden, work.sequence_length)
        return each * global_batch * work.sequence_length

    recomputed = of(work.parameters - 2 * work.embedding) / 3 if work.checkpointing else 0.0
    return of(work.parameters - work.embedding) + recomputed
