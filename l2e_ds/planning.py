"""`l2e-ds plan`: memory, time and traffic of a run on GPUs that one does not have, from formulae alone.

Nothing is built or measured; docs/planning.md says how well each formula was checked. Pure functions of a resolved run.

Sources, by the names that the docstrings use:
    ZeRO        Rajbhandari et al. 2020, arXiv 1910.02054: model states under data parallelism, stages 1 to 3
    Korthikanti Korthikanti et al. 2022, arXiv 2205.05198: activations that a transformer layer keeps for backward
    PaLM        Chowdhery et al. 2022, arXiv 2204.02311, appendix B: FLOPs a token, model FLOPs utilisation (MFU)
    Thakur      Thakur, Rabenseifner and Gropp 2005: ring all-reduce sends 2 (R - 1) / R of the data from each rank
    DeepSpeed   its 0.19.8 source, for what it keeps beyond the papers; file names in the docstrings

Shapes: B micro-batch sequences, T tokens a sequence, M = B * T, h hidden size, N neurons of a layer, L layers, V
vocabulary rows, P parameters, R ranks (one a GPU). Sizes are bytes of one GPU unless said otherwise; GiB = 2**30, GB =
10**9.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from l2e_ds.config import METHODS, divisors
from l2e_ds.errors import ConfigError
from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.train import Plan, resolve_run
from l2e_ds.training.checkpoint import is_due
from l2e_ds.training.deepspeed_config import less_memory, zero_stage
from l2e_ds.training.loss import CHUNK, IN_ONE_PIECE
from l2e_ds.training.metrics import PEAK_TFLOPS, flops_per_token

GIB = 2**30
MASTER = 4  # bytes of a float32 master weight
MOMENTS = 8  # bytes of Adam's two float32 moments
BUCKET = 500_000_000  # elements; engine.py: MEMORY_OPT_ALLREDUCE_SIZE, and the default of reduce_bucket_size
MAX_LIVE = 1_000_000_000  # elements; ZeRO-3's defaults of max_live_parameters and max_reuse_distance
SUB_GROUP = 1_000_000_000  # elements; its default of sub_group_size

# Assumptions, printed with every plan. None of them was measured by this project.
DEFAULT_MFU = 0.4
USABLE_MEMORY = 0.9  # the rest: CUDA context, NCCL, fragmentation
LINK_EFFICIENCY = 0.8  # of the data sheet's bandwidth
LATENCY = 1e-5  # s, of one hop of a collective
GPUS_A_NODE = 8
STORAGE_GB_S = 20.0  # GB/s of a shared file system, all ranks together


@dataclass(frozen=True)
class Gpu:
    """memory: GiB as CUDA reports it; peak: dense bf16/fp16 TFLOP/s; peak_fp32: without TF32; within_node: GB/s in one
    direction that a ring has through a GPU; between_nodes: through a node with all its network cards."""

    memory: float
    peak: float
    peak_fp32: float
    within_node: float
    between_nodes: float
    bf16: bool = True


# Vendors' data sheets; between nodes: the network of the vendors' own servers of 8 (DGX-1, DGX A100, H100, B200), and
# one card of 100 Gbit/s a node for PCIe cards, which talk over PCIe 4.0 x16.
GPUS = {
    "B200": Gpu(178, PEAK_TFLOPS["B200"], 75, 900, 400),
    "GH200": Gpu(94, PEAK_TFLOPS["GH200"], 67, 450, 50),
    "H200": Gpu(139, PEAK_TFLOPS["H200"], 67, 450, 400),
    "H100": Gpu(79, PEAK_TFLOPS["H100"], 67, 450, 400),
    "H100-PCIe": Gpu(79, PEAK_TFLOPS["H100 PCIe"], 51, 32, 12.5),
    "A100-80GB": Gpu(79, PEAK_TFLOPS["A100"], 19.5, 300, 200),
    "A100-40GB": Gpu(39, PEAK_TFLOPS["A100"], 19.5, 300, 200),
    "V100-32GB": Gpu(31.7, PEAK_TFLOPS["V100"], 15.7, 150, 50, bf16=False),
    "V100-16GB": Gpu(15.8, PEAK_TFLOPS["V100"], 15.7, 150, 50, bf16=False),
    "L40S": Gpu(44.5, PEAK_TFLOPS["L40S"], 91.6, 32, 12.5),
    "A10": Gpu(22, PEAK_TFLOPS["A10"], 31.2, 32, 12.5),
    "L4": Gpu(22, PEAK_TFLOPS["L4"], 30.3, 32, 12.5),
    "RTX-4090": Gpu(23.5, PEAK_TFLOPS["RTX 4090"], 82.6, 32, 12.5),
}


@dataclass(frozen=True)
class Work:
    """What the formulae need to know of a resolved run; sizes in elements, those of an element in bytes.

    embedding: V h; element: of a weight in the network; accumulator: of an accumulated gradient; communication: of one
    that is reduced; hooked: indices of the layers with a hook, empty with `method: none`.
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    heads: int
    neurons: int
    vocabulary: int
    sequence_length: int
    attention: str
    checkpointing: bool
    precision: str
    element: int
    accumulator: int
    communication: int
    stage: int
    bucket: int
    contiguous: bool
    overlap: bool
    offload_optimizer: bool
    offload_parameters: bool
    hooked: tuple[int, ...]
    deactivation: bool
    fused: bool  # inhibition in one pass (inhibition/fused.py)
    chunk: int  # tokens whose logits exist together
    collectives: str  # "none", "step", "forward" or "forward-exact": when statistics cross ranks
    projected: bool  # a regulariser with the projected loss


def work_of(plan: Plan) -> Work:
    """Raises ConfigError where the DeepSpeed JSON names an optimizer other than Adam, or the network is none of
    Pythia's family, whose activations the formulae count."""
    from deepspeed.runtime.config import DtypeEnum

    from l2e_ds.families import neurons_of
    from l2e_ds.models import unbuilt

    config, network, ds = plan.config, plan.network, plan.ds
    if network.model_type != "gpt_neox":
        raise ConfigError(
            f"model.pretrained: {config.model.pretrained!r} is a {network.model_type}; a plan knows the memory and time"
            " of gpt_neox (Pythia) only"
        )
    kind = str(ds.get("optimizer", {}).get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise ConfigError(
            f"deepspeed.config: optimizer.type: got {kind}; a plan knows the states of Adam and AdamW only"
        )
    zero = ds.get("zero_optimization", {})
    stage, precision = zero_stage(ds), config.training.precision
    element = 4 if precision == "fp32" else 2
    section = config.inhibition
    hooked = tuple(plan.layers) if section.method != "none" else ()
    collectives: str = section.reduce if hooked else "none"
    if collectives == "forward" and section.loss == "scale-invariant":
        collectives = "forward-exact"

    def size_of(given: str | None) -> int:
        return DtypeEnum(given).value.itemsize if given else element

    def offloaded(part: str) -> bool:
        return bool((zero.get(part) or {}).get("device", "none") != "none")

    return Work(
        parameters=sum(p.numel() for p in unbuilt(network).parameters()),
        embedding=network.vocab_size * network.hidden_size,
        layers=network.num_hidden_layers,
        hidden=network.hidden_size,
        heads=network.num_attention_heads,
        neurons=neurons_of(network),
        vocabulary=network.vocab_size,
        sequence_length=config.data.sequence_length,
        attention=config.model.attention,
        checkpointing=config.model.activation_checkpointing,
        precision=precision,
        element=element,
        accumulator=size_of(ds.get("data_types", {}).get("grad_accum_dtype")),
        communication=size_of(ds.get("communication_data_type")),
        stage=stage,
        bucket=int(float(zero.get("reduce_bucket_size", BUCKET))) if stage else BUCKET,
        contiguous=bool(zero.get("contiguous_gradients", True)),
        overlap=bool(zero["overlap_comm"]) if zero.get("overlap_comm") is not None else stage == 3,
        offload_optimizer=offloaded("offload_optimizer"),
        offload_parameters=offloaded("offload_param"),
        hooked=hooked,
        deactivation=section.parts[1] != "regulariser",
        fused=section.fused is not False and section.reduce == "step" and section.parts == METHODS["l2e"],
        chunk=CHUNK["cuda"],
        collectives=collectives,
        projected=section.loss == "projected" and section.parts[1] == "regulariser" and bool(hooked),
    )


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Model states of one GPU, and on its host where offloaded; bytes.

    gradients: as they are when backward ends; held: of these, what stays allocated after the step; buffers: DeepSpeed's
    own, held through forward and backward; gathered: ZeRO-3's full parameters; reducing, stepping: what comes on top
    after backward, when no activation is left.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    gathered: float
    held: float
    reducing: float
    stepping: float
    host: float


def is_bf16_optimizer(work: Work) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer: ZeRO-1, bf16, float32 accumulation, no offload (engine.py,
    _do_optimizer_sanity_check). It keeps all gradients in float32 on every rank."""
    return work.stage == 1 and work.precision == "bf16" and work.accumulator == 4 and not work.offload_optimizer


def model_states(work: Work, ranks: int) -> States:
    """ZeRO, section 3 and 5, with what DeepSpeed really keeps (runtime/engine.py, bf16_optimizer.py, fp16/,
    zero/stage_1_and_2.py, zero/stage3.py).

    In the network's precision, e bytes: weights e P, under stage 3 e P / R and the gathered ones. Float32 master
    weights and Adam's moments 12 P, under stages 1 to 3 12 P / R; where the network is float32 itself, stage 0 needs no
    master weights. Accumulated gradients, g bytes (`data_types.grad_accum_dtype`): g P in stages 0 and 1, g P / R in 2
    and 3; the BF16_Optimizer also keeps those of one micro-batch, e P. A bucket in which gradients are reduced:
    `reduce_bucket_size` elements, whatever the model's size, twice with `overlap_comm` in stages 1 and 2.
    """
    p, e, g = work.parameters, work.element, work.accumulator
    share = p / ranks
    in_bucket = min(p, work.bucket)
    full = States(e * p, g * p, 0, 0, 0, 0, 0, 0, 0)
    if work.stage == 0:
        reducing = in_bucket * e  # allreduce_bucket flattens
        if e == 4:
            return replace(full, optimizer=MOMENTS * p, reducing=reducing)
        return replace(full, optimizer=(MASTER + MOMENTS) * p, reducing=reducing, stepping=MASTER * p)
    optimizer = (MASTER + MOMENTS) * share
    if is_bf16_optimizer(work):  # flattens in float32, converts to bf16, reduces
        return replace(full, gradients=(g + e) * p, held=g * p, optimizer=optimizer, reducing=in_bucket * (4 + 2))
    staged = g if work.stage == 1 else e  # _gradient_reduction_buffer_dtype
    copies = 2 if work.overlap and work.stage < 3 else 1
    buffers = float(work.bucket * staged * copies) if work.contiguous else 0.0
    reducing = in_bucket * staged  # flattened once more to be reduced
    if work.stage == 1:
        # the rank's own partition is flattened before the gradients are freed
        states = replace(full, optimizer=optimizer, buffers=buffers, reducing=reducing, stepping=MASTER * share)
    elif work.stage == 2:
        stepping = MASTER * share if g != 4 or e == 4 else 0.0
        states = replace(
            full, gradients=g * share, optimizer=optimizer, buffers=buffers, reducing=reducing, stepping=stepping
        )
    else:
        gathered = e * min(p, MAX_LIVE)
        stepping = MASTER * min(share, SUB_GROUP)  # the flat gradient of one sub-group
        states = States(e * share, g * share, optimizer, buffers, gathered, g * share, reducing, stepping, 0)
    host = 0.0
    if work.offload_optimizer:  # with float32 gradients; up to stage 2 also the new weights on their way back
        host = optimizer + (4 + (e if work.stage < 3 else 0)) * share
        states = replace(states, optimizer=0, gradients=0, held=0, stepping=0)
    if work.offload_parameters:
        host += e * share
        states = replace(states, weights=0)
    return replace(states, host=host)


def layer_activation_bytes(work: Work, micro_batch: int) -> float:
    """What one layer keeps for backward. Korthikanti, section 4.1, counted anew for this network: no dropout masks, a
    parallel residual, rotary copies of query and key, attention without a [T, T] matrix unless it is `eager`.

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
    """What all layers keep for backward, and the last norm's input and output. With activation checkpointing a layer
    keeps its input only: Korthikanti, section 5, full recomputation (2 s b h L)."""
    tokens = micro_batch * work.sequence_length
    layer = tokens * work.hidden * work.element if work.checkpointing else layer_activation_bytes(work, micro_batch)
    return work.layers * layer + 2 * tokens * work.hidden * work.element


def logits_bytes(work: Work, micro_batch: int) -> float:
    """What the LM loss needs at its most (training/loss.py).

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
    """Moments (mean, m2), faded selections (float64) and frozen mean, variance and rate (float32) of a layer's N
    neurons, the packed sums (float64; NeuronHook.buffer_size) and a micro-batch's sums for the projection (float64)."""
    projection = (1 + 4 * work.neurons) * 8
    return len(work.hooked) * (work.neurons * (3 * 8 + 3 * 4) + NeuronHook.buffer_size(work.neurons) * 8 + projection)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part; `total` is the peak. step: what reducing gradients or the optimizer's step needs beyond
    forward and backward."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    inhibition: float
    step: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(work: Work, ranks: int, micro_batch: int, accumulation: int) -> Memory:
    """Peak memory a GPU: the largest of (1) the beginning of the last micro-batch's backward, when all activations and
    logits are there, and the gradients of the micro-batches before; (2) the reduction of gradients; (3) the step.

    Within backward what a layer needs for a while (recomputed activations, gradients of [M, N], float32 copies of a
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
    backward = Memory(
        states.weights + states.gathered, early, states.optimizer, states.buffers, activations, logits, inhibition, 0
    )
    states_after = states.weights + states.gathered + states.gradients + states.optimizer + inhibition_state_bytes(work)
    after = states_after + max(states.buffers + states.reducing, states.stepping)
    return replace(backward, step=max(0.0, after - backward.total))


def accumulation_of(global_batch: int, ranks: int, micro_batch: int) -> int:
    return global_batch // (micro_batch * ranks)


def largest_micro_batch(work: Work, ranks: int, global_batch: int, usable: float) -> int | None:
    """The largest that divides the sequences of a rank and needs at most `usable` bytes; None where none does."""
    for micro_batch in reversed(divisors(global_batch // ranks)):
        if memory(work, ranks, micro_batch, accumulation_of(global_batch, ranks, micro_batch)).total <= usable:
            return micro_batch
    return None


# --- traffic ------------------------------------------------------------------------------------------------------


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


# --- time ---------------------------------------------------------------------------------------------------------


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


def checkpoint_bytes(work: Work) -> float:
    """All files of one checkpoint: master weights and Adam's moments, 12 P, and the network's weights, e P, which stage
    3 leaves out; in float32 stage 0 has one copy of the weights. The inhibition's state is 3 N float64 a layer."""
    states = MOMENTS + (0 if work.stage == 0 and work.element == 4 else MASTER)
    weights = 0 if work.stage == 3 else work.element
    return work.parameters * (states + weights) + len(work.hooked) * (3 * work.neurons + 3) * 8


# --- the command --------------------------------------------------------------------------------------------------


def find_gpu(name: str) -> tuple[str, Gpu]:
    """By its name in any case. Raises ConfigError, naming those known."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return known, gpu
    raise ConfigError(f"--gpu: got {name!r}, allowed: {', '.join(GPUS)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the run file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, one rank each")
    parser.add_argument("--gpu", required=True, metavar="TYPE", help=", ".join(GPUS))
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        metavar="SHARE",
        help="of the peak, computing (default: %(default)s)",
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of a ring through all GPUs (default: by type)")
    parser.add_argument(
        "--storage", type=float, default=STORAGE_GB_S, metavar="GB/S", help="all ranks together (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from l2e_ds.train import quiet_libraries

    quiet_libraries()
    print(
        describe(
            *(arguments.run_file, arguments.overrides, arguments.gpus, arguments.gpu),
            *(arguments.mfu, arguments.bandwidth, arguments.storage),
        )
    )
    return 0


def describe(
    run_file: str,
    overrides: Sequence[str],
    gpus: int,
    gpu_name: str,
    mfu: float = DEFAULT_MFU,
    bandwidth: float | None = None,
    storage: float = STORAGE_GB_S,
) -> str:
    """What `l2e-ds plan` prints. Raises ConfigError."""
    name, gpu = find_gpu(gpu_name)
    if gpus < 1:
        raise ConfigError(f"--gpus: got {gpus}, allowed: an integer >= 1")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: got {mfu:g}, allowed: above 0, at most 1")
    for option, value in (("--bandwidth", bandwidth), ("--storage", storage)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}: got {value:g}, allowed: GB/s above 0")
    plan = resolve_run(run_file, overrides, gpus, has_bf16=gpu.bf16)
    if plan.config.training.precision == "bf16" and not gpu.bf16:
        raise ConfigError(f"training.precision: got bf16, which a {name} does not have; allowed: fp16, fp32")
    work = work_of(plan)
    batch, usable = plan.batch, gpu.memory * GIB * USABLE_MEMORY
    largest = largest_micro_batch(work, gpus, batch.global_batch, usable)
    is_auto = plan.config.training.micro_batch == "auto"
    given = largest or 1 if is_auto else batch.micro_batch
    return "\n".join(
        [
            _head(plan, work, gpus, name),
            "",
            *_memory_table(plan, work, gpus, batch.global_batch, given, largest, gpu),
            "",
            *_run_lines(plan, work, gpu, largest, mfu, bus_bandwidth(gpu, gpus, bandwidth), storage),
            "",
            *_assumptions(gpu, work, gpus, mfu, bus_bandwidth(gpu, gpus, bandwidth), storage),
        ]
    )


def _head(plan: Plan, work: Work, gpus: int, name: str) -> str:
    model = plan.config.model.name or plan.config.model.pretrained
    checkpointing = ", activation checkpointing" if work.checkpointing else ""
    return (
        f"{model} ({work.parameters:,} parameters), {work.precision}, ZeRO-{work.stage}{checkpointing}, on {gpus:,}"
        f" {name}; {plan.batch.global_batch:,} x {work.sequence_length:,} tokens a step"
    )


def _memory_table(
    plan: Plan, work: Work, gpus: int, global_batch: int, micro_batch: int, largest: int | None, gpu: Gpu
) -> list[str]:
    sizes = [micro_batch] if largest in (None, micro_batch) else [micro_batch, largest]
    columns = [memory(work, gpus, size, accumulation_of(global_batch, gpus, size)) for size in sizes]
    heads = [f"micro-batch {size}" for size in sizes]
    lines = ["GiB a GPU     " + "".join(f"{head:>18}" for head in heads)]
    for part in vars(columns[0]):
        lines.append(f"  {part:<12}" + "".join(f"{getattr(column, part) / GIB:18.3f}" for column in columns))
    lines.append("  total       " + "".join(f"{column.total / GIB:18.3f}" for column in columns))
    fits = [column.total <= gpu.memory * GIB * USABLE_MEMORY for column in columns]
    lines.append("  fits        " + "".join(f"{'yes' if fit else 'no':>18}" for fit in fits))
    usable = gpu.memory * USABLE_MEMORY
    if largest is None:
        lines.append(f"largest micro-batch: none fits {usable:.1f} GiB; try {less_memory(plan.config, plan.ds)}")
    else:
        lines.append(f"largest micro-batch: {largest} (of those that divide {global_batch // gpus} sequences a GPU)")
    states = model_states(work, gpus)
    if states.host:
        lines.append(f"host memory a GPU: {states.host / GIB:.3f} GiB of offloaded states")
    return lines


def _run_lines(
    plan: Plan, work: Work, gpu: Gpu, largest: int | None, mfu: float, bandwidth: float, storage: float
) -> list[str]:
    batch, config = plan.batch, plan.config
    gpus, steps = batch.ranks, config.training.steps
    micro_batch = largest or batch.micro_batch
    accumulation = accumulation_of(batch.global_batch, gpus, micro_batch)
    step = times(work, gpu, gpus, batch.global_batch, accumulation, mfu, bandwidth)
    sent = traffic(work, gpus, accumulation)
    payload, _ = inhibition_payload(work, accumulation)
    size = checkpoint_bytes(work)
    writing = size / (storage * 1e9)
    every, early = config.checkpoint.every, config.checkpoint.early
    checkpoints = sum(is_due(done, steps, every, early) for done in range(steps + 1))
    seconds = steps * step.step + checkpoints * writing
    tokens = batch.tokens_per_step
    hidden = "hidden behind it" if step.hidden else "not hidden"
    return [
        f"with micro-batch {micro_batch} and {accumulation} accumulation steps:",
        f"step          {_seconds(step.step)}: computation {_seconds(step.compute)}, communication"
        f" {_seconds(step.communication)} ({hidden}), inhibition's {_seconds(step.inhibition)}",
        f"tokens/s      {tokens / step.step:,.0f} (MFU {step.mfu:.1%})",
        f"run           {steps:,} steps, {steps * tokens:,} tokens: {seconds / 86400:,.2f} days,"
        f" {seconds * gpus / 3600:,.0f} GPU-hours",
        f"traffic       a GPU sends in a step: gradients {sent.gradients:,.0f} B, weights {sent.weights:,.0f} B,"
        f" inhibition {sent.inhibition:,.0f} B ({_ratio(payload, gradient_bytes(work))} of the gradients' data)",
        f"checkpoint    {size:,.0f} B ({size / GIB:,.2f} GiB), {_seconds(writing)}; {checkpoints:,} in the run",
    ]


def _assumptions(gpu: Gpu, work: Work, gpus: int, mfu: float, bandwidth: float, storage: float) -> list[str]:
    peak = gpu.peak_fp32 if work.precision == "fp32" else gpu.peak
    return [
        "predicted, not measured (docs/planning.md), under these assumptions:",
        f"  {mfu:.0%} of {peak:g} TFLOP/s while computing (--mfu); {bandwidth / 1e9:g} GB/s through a ring of"
        f" {gpus:,} GPUs, {GPUS_A_NODE} a node (--bandwidth); {LATENCY * 1e6:g} us a hop",
        f"  checkpoints at {storage:g} GB/s in all, training waits (--storage); {USABLE_MEMORY:.0%} of"
        f" {gpu.memory:g} GiB usable; evaluations and restarts not counted",
    ]


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3%}"
