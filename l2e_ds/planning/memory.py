"""Predict the memory of a training step on one rank, by what holds it.

Shapes: T tokens a sequence, h hidden size, N neurons of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from l2e_ds.checkpoint.disk import MASTER
from l2e_ds.config.batch import divisors
from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.planning.work import Work
from l2e_ds.training.loss import IN_ONE_PIECE

GIB = 2**30
MAX_LIVE = 1_000_000_000  # elements; ZeRO-3's defaults of max_live_parameters and max_reuse_distance
SUB_GROUP = 1_000_000_000  # elements; its default of sub_group_size


@dataclass(frozen=True)
class States:
    """Holds the bytes of the model states of one GPU, and of its host where they are offloaded.

    gradients: as they are when backward ends; held: of these, what stays allocated after the step; buffers: DeepSpeed's
    own, held through forward and backward; gathered: ZeRO-3's full parameters; reducing, stepping: what comes on top
    after backward.
    """

    weights: float
    gradients: float
    optimizer: float
    reducing: float
    buffers: float = 0.0
    gathered: float = 0.0
    held: float = 0.0
    stepping: float = 0.0
    host: float = 0.0


def model_states(work: Work, ranks: int) -> States:
    """Return what DeepSpeed keeps of a model: ZeRO, section 3 and 5, with what it really allocates (runtime/engine.py,
    bf16_optimizer.py, fp16/, zero/stage_1_and_2.py, zero/stage3.py).

    In the network's precision, e bytes: weights e P, under stage 3 e P / R and the gathered ones. Float32 master
    weights and moments, with AdamW 12 P, under stages 1 to 3 12 P / R; where the network is float32 itself, stage 0
    needs no master weights. Accumulated gradients, g bytes (`data_types.grad_accum_dtype`): g P in stages 0 and 1, g P
    / R in 2 and 3; the BF16_Optimizer also keeps those of one micro-batch, e P, unless `bf16.immediate_grad_update` is
    set. A bucket in which gradients are reduced: `reduce_bucket_size` elements, whatever the model's size, twice with
    `overlap_comm` in stages 1 and 2. What is reduced is copied to the type of `communication_data_type` where it has
    another.
    """
    p, e, g = work.parameters, work.element, work.accumulator
    orthogonalising = 14 * work.largest_matrix  # a float32 copy, the iteration's in half precision, and the update
    share, in_bucket = p / ranks, min(p, work.bucket)

    def reduced(size: int) -> float:
        """Return what a bucket of elements of `size` bytes takes while it is reduced."""
        return in_bucket * (size + (work.communication if work.communication != size else 0))

    if work.stage == 0:
        master = 0 if e == 4 else MASTER * p
        # allreduce_bucket flattens
        return States(e * p, g * p, master + work.moments, reducing=reduced(e), stepping=master + orthogonalising)
    optimizer = MASTER * share + work.moments / ranks
    if work.stage == 1 and work.precision == "bf16" and g == 4 and not work.offload_optimizer:
        # the BF16_Optimizer (engine.py, _do_optimizer_sanity_check): flattens in float32, converts, reduces
        gradients = g * p + (0 if work.immediate else e * p)
        return States(e * p, gradients, optimizer, reducing=reduced(4), held=g * p, stepping=orthogonalising)
    staged = g if work.stage == 1 else e  # _gradient_reduction_buffer_dtype
    copies = 2 if work.overlap and work.stage < 3 else 1
    buffers = float(work.bucket * staged * copies) if work.contiguous else 0.0
    reducing = reduced(staged)  # flattened once more to be reduced
    if work.stage == 1:
        # the rank's own partition is flattened before the gradients are freed
        states = States(e * p, g * p, optimizer, reducing, buffers, stepping=MASTER * share)
    elif work.stage == 2:
        stepping = MASTER * share if g != 4 or e == 4 else 0.0
        states = States(e * p, g * share, optimizer, reducing, buffers, stepping=stepping)
    else:
        stepping = MASTER * min(share, SUB_GROUP)  # the flat gradient of one sub-group
        gathered = e * min(p, MAX_LIVE)
        states = States(e * share, g * share, optimizer, reducing, buffers, gathered, g * share, stepping)
    host = 0.0
    if work.offload_optimizer:  # with float32 gradients; up to stage 2 also the new weights on their way back
        host = optimizer + (4 + (e if work.stage < 3 else 0)) * share
        states = replace(states, optimizer=0, gradients=0, held=0, stepping=0)
    if work.offload_parameters:
        host += e * share
        states = replace(states, weights=0)
    return replace(states, host=host)


def layer_activation_bytes(work: Work, micro_batch: int) -> float:
    """Return what one layer keeps for backward. Korthikanti, section 4.1, counted anew for this network: no dropout
    masks, a parallel residual, rotary copies of query and key, no [T, T] matrix of attention unless it is `eager`.

    Elements a token: layer input h, two norms 2 h, qkv 3 h, query and key after rotation 2 h, attention's output 2 h
    (as computed, and as the projection reads it), before and after GELU 2 N. Float32: attention's log-sum-exp, one a
    head. `eager`: query, key, value 3 h, output h, and heads * T probabilities in float32 and the network's precision.
    """
    tokens = micro_batch * work.sequence_length
    h, e = work.hidden, work.element
    if work.attention == "eager":
        probabilities = work.heads * work.sequence_length * (4 if e == 4 else 4 + e)
        return tokens * (e * (7 * h + 2 * work.neurons) + probabilities)
    return tokens * (e * (10 * h + 2 * work.neurons) + 4 * work.heads)


def stored_activation_bytes(work: Work, micro_batch: int) -> float:
    """Return what all layers keep for backward, and the last norm's input and output. With activation checkpointing a
    layer keeps its input only: Korthikanti, section 5, full recomputation (2 s b h L)."""
    tokens = micro_batch * work.sequence_length
    layer = tokens * work.hidden * work.element if work.checkpointing else layer_activation_bytes(work, micro_batch)
    return work.layers * layer + 2 * tokens * work.hidden * work.element


def logits_bytes(work: Work, micro_batch: int) -> float:
    """Return what the LM loss needs at its most (training/loss.py).

    Few logits, computed in one piece: 12 M V, for at the beginning of backward there are, in float32, the
    log-probabilities that cross-entropy kept, its gradient with respect to them, and with respect to the logits. Else,
    of the tokens of one chunk, logits and log-probabilities in float32; and kept until backward the gradients of the
    hidden states and, in float32, of the output matrix, with a copy of it in half precision.
    """
    tokens = micro_batch * work.sequence_length
    if tokens * work.vocabulary <= IN_ONE_PIECE:
        return 12.0 * tokens * work.vocabulary
    e = work.element
    half = 0 if e == 4 else e
    return 8.0 * min(tokens, work.chunk) * work.vocabulary + tokens * work.hidden * e + work.embedding * (4 + half)


def inhibition_state_bytes(work: Work) -> float:
    """Return the bytes of inhibition's state. Of each layer's N neurons: moments (mean, m2), faded selections, variance
    at the start and kept pull (float64); six of the frozen statistics in float32 and one in bool; the packed sums
    (float64; NeuronHook.buffer_size) and a micro-batch's sums for the projection (float64)."""
    projection = (1 + 4 * work.neurons) * 8
    of_neurons = work.neurons * (5 * 8 + 6 * 4 + 1)
    return len(work.hooked) * (of_neurons + NeuronHook.buffer_size(work.neurons) * 8 + projection)


@dataclass(frozen=True)
class Memory:
    """Holds the bytes of one GPU by part; `total` is the peak. step: what reducing gradients or the optimizer's step
    needs beyond forward and backward."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    inhibition: float
    step: float = 0.0

    @property
    def total(self) -> float:
        """Return the peak in bytes."""
        return sum(vars(self).values())


def memory(work: Work, ranks: int, micro_batch: int, accumulation: int) -> Memory:
    """Return the peak memory a GPU: the largest of (1) the beginning of the last micro-batch's backward; (2) the
    reduction of gradients; (3) the step.

    What a layer needs for a while within backward (recomputed activations, gradients of [M, N], float32 copies of a
    hooked layer, 24 M N) counts where it is more than the logits, which are gone by then.
    """
    states = model_states(work, ranks)
    tokens = micro_batch * work.sequence_length
    logits = logits_bytes(work, micro_batch)
    layer = layer_activation_bytes(work, micro_batch)
    passing = 2 * tokens * work.neurons * work.element + (layer if work.checkpointing else 0)
    activations = stored_activation_bytes(work, micro_batch) + max(0.0, passing - logits)
    inhibition, hooked = inhibition_state_bytes(work), 0.0
    if work.hooked:
        freed = 0 if work.checkpointing else (work.layers - 1 - work.hooked[-1]) * layer
        copies = 0 if work.fused else 24 * tokens * work.neurons
        hooked = copies + (layer if work.checkpointing else 0) - freed
        inhibition += max(0.0, hooked - max(logits, passing))
        inhibition += tokens * work.neurons * len(work.hooked) * work.deactivation  # the selection, one byte
    early = states.gradients if accumulation > 1 else states.held
    weights, optimizer = states.weights + states.gathered, states.optimizer
    backward = Memory(weights, early, optimizer, states.buffers, activations, logits, inhibition)
    after = weights + states.gradients + optimizer + inhibition_state_bytes(work)
    after += max(states.buffers + states.reducing, states.stepping)
    return replace(backward, step=max(0.0, after - backward.total))


def accumulation_of(global_batch: int, ranks: int, micro_batch: int) -> int:
    """Return the number of micro-batches that a rank computes in a step."""
    return global_batch // (micro_batch * ranks)


def largest_micro_batch(work: Work, ranks: int, global_batch: int, usable: float) -> int | None:
    """Return the largest micro-batch that divides the sequences of a rank and needs at most `usable` bytes, or None."""
    for micro_batch in reversed(divisors(global_batch // ranks)):
        if memory(work, ranks, micro_batch, accumulation_of(global_batch, ranks, micro_batch)).total <= usable:
            return micro_batch
    return None
