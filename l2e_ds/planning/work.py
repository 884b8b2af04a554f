"""Read from a run the sizes that memory and time follow from, and predict what a step computes and sends."""

from __future__ import annotations

from dataclasses import dataclass

from l2e_ds.config.sections import METHODS
from l2e_ds.engine.configuration import is_adam, is_offloaded, optimizer_type, zero_stage
from l2e_ds.errors import ConfigError
from l2e_ds.inhibition.hook import NeuronHook
from l2e_ds.models.counts import flops_per_token, parameter_counts
from l2e_ds.models.families import neurons_of
from l2e_ds.training.loss import CHUNK
from l2e_ds.training.preflight import ResolvedRun, moments_of

BUCKET = 500_000_000  # elements; engine.py: MEMORY_OPT_ALLREDUCE_SIZE, and the default of reduce_bucket_size

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


class Work:
    """Holds what the formulae need to know of a resolved run; sizes in elements, those of an element and of all moments
    in bytes."""

    def __init__(self, run: ResolvedRun) -> None:
        """Raises ConfigError for a JSON's optimizer other than Adam, or a network that is not of Pythia's family."""
        from deepspeed.runtime.config import DtypeEnum

        config, hf_config, ds = run.config, run.hf_config, run.ds
        if hf_config.model_type != "gpt_neox":
            raise ConfigError(
                f"model: {config.model.origin!r} is a {hf_config.model_type}; a plan knows the memory and time"
                " of gpt_neox (Pythia) only"
            )
        if not is_adam(ds):
            kind = optimizer_type(ds)
            raise ConfigError(f"deepspeed.config: optimizer.type: got {kind}; a plan knows Adam and AdamW only")
        self.parameters, self.layer_parameters = parameter_counts(hf_config)
        self.layers, self.hidden = hf_config.num_hidden_layers, hf_config.hidden_size
        self.heads = hf_config.num_attention_heads
        self.neurons, self.vocabulary = neurons_of(hf_config), hf_config.vocab_size
        self.moments = moments_of(run)
        self.largest_matrix = self.hidden * max(3 * self.hidden, self.neurons) if config.optimizer.name == "muon" else 0
        self.embedding = self.vocabulary * self.hidden
        self.sequence_length = config.data.sequence_length
        self.chunk = CHUNK["cuda"]  # tokens whose logits exist together
        self.attention, self.checkpointing = config.model.attention, config.model.activation_checkpointing

        zero = ds.get("zero_optimization", {})

        def size_of(given: str | None) -> int:
            return DtypeEnum(given).value.itemsize if given else self.element

        self.precision, self.stage = config.training.precision, zero_stage(ds)
        self.element = 4 if self.precision == "fp32" else 2  # of a weight in the network
        self.accumulator = size_of(ds.get("data_types", {}).get("grad_accum_dtype"))  # of an accumulated gradient
        self.communication = size_of(ds.get("communication_data_type"))  # of one that is reduced
        self.immediate = bool(ds.get("bf16", {}).get("immediate_grad_update"))  # whether it is accumulated at once
        self.bucket = int(float(zero.get("reduce_bucket_size", BUCKET))) if self.stage else BUCKET
        self.contiguous = bool(zero.get("contiguous_gradients", True))
        self.overlap = bool(zero["overlap_comm"]) if zero.get("overlap_comm") is not None else self.stage == 3
        self.offload_optimizer = is_offloaded(ds, "offload_optimizer")
        self.offload_parameters = is_offloaded(ds, "offload_param")

        section = config.inhibition
        self.hooked = run.inhibited_layers
        self.deactivation = section.retrieval_and_mechanism[1] != "regulariser"
        self.projected = section.loss == "projected" and not self.deactivation and bool(self.hooked)
        # inhibition in one pass (inhibition/fused.py)
        self.fused = (
            section.fused is not False
            and section.reduce == "step"
            and section.retrieval_and_mechanism == METHODS["l2e"]
        )
        # when statistics cross ranks: none, step, forward or forward-exact
        self.collectives: str = section.reduce if self.hooked else "none"
        if self.collectives == "forward" and section.loss == "scale-invariant":
            self.collectives = "forward-exact"


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
    """Return what one GPU sends in a step: gradients, and under stage 3 also weights in forward and backward (ZeRO,
    section 7).

    As DeepSpeed does it: stages 1 and 2 all-reduce whole buckets (`use_multi_rank_bucket_allreduce`), stage 2 and 3 in
    every micro-batch; stages 1 and 2 gather the weights once a step.
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
    """Return the operations of a step, of all GPUs (`models.counts.flops_per_token`); activation checkpointing adds one
    more forward of the layers, a third of their share (Korthikanti, section 5)."""

    def of(matrices: int) -> float:
        each = flops_per_token(matrices, work.layers, work.hidden, work.sequence_length)
        return each * global_batch * work.sequence_length

    recomputed = of(work.layer_parameters) / 3 if work.checkpointing else 0.0
    return of(work.layer_parameters + work.embedding) + recomputed  # with the output matrix, tied or not
