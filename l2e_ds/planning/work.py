"""Read from a run the sizes that memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass

from l2e_ds.checkpoint.schedule import checkpoint_bytes
from l2e_ds.config.sections import METHODS
from l2e_ds.engine.configuration import is_adam, optimizer_type, zero_stage
from l2e_ds.errors import ConfigError
from l2e_ds.models.counts import parameter_counts
from l2e_ds.models.families import neurons_of
from l2e_ds.training.loss import CHUNK
from l2e_ds.training.preflight import Plan

BUCKET = 500_000_000  # elements; engine.py: MEMORY_OPT_ALLREDUCE_SIZE, and the default of reduce_bucket_size


@dataclass(frozen=True)
class Work:
    """Holds what the formulae need to know of a resolved run; sizes in elements, those of an element in bytes.

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

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of one checkpoint."""
        return checkpoint_bytes(self.parameters, self.stage, self.element, len(self.hooked), self.neurons)


def work_of(plan: Plan) -> Work:
    """Return the sizes of a resolved run.

    Raises ConfigError where the DeepSpeed JSON names an optimizer other than Adam, or the network is not of Pythia's
    family, whose activations the formulae count.
    """
    from deepspeed.runtime.config import DtypeEnum

    config, network, ds = plan.config, plan.network, plan.ds
    if network.model_type != "gpt_neox":
        raise ConfigError(
            f"model: {config.model.origin!r} is a {network.model_type}; a plan knows the memory and time"
            " of gpt_neox (Pythia) only"
        )
    if not is_adam(ds):
        kind = optimizer_type(ds)
        raise ConfigError(f"deepspeed.config: optimizer.type: got {kind}; a plan knows Adam and AdamW only")
    zero = ds.get("zero_optimization", {})
    stage, precision, section = zero_stage(ds), config.training.precision, config.inhibition
    element = 4 if precision == "fp32" else 2
    hooked = tuple(plan.layers) if section.method != "none" else ()
    collectives: str = section.reduce if hooked else "none"
    if collectives == "forward" and section.loss == "scale-invariant":
        collectives = "forward-exact"

    def size_of(given: str | None) -> int:
        return DtypeEnum(given).value.itemsize if given else element

    def offloaded(part: str) -> bool:
        return bool((zero.get(part) or {}).get("device", "none") != "none")

    return Work(
        parameters=parameter_counts(network)[0],
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
