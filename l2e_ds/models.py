"""The Pythia family: sizes, published hyper-parameters, initialisation; building and loading networks; their layers.

Sources: Biderman et al. 2023 and the released configuration files (METHOD, section 10). GPT-NeoX initialises
with `small_init` (Nguyen & Salazar 2019) and, where a layer writes to the residual stream, `wang_init`.
Where the neurons of these and of other families are: families.py. Shapes: N neurons of a layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from l2e_ds import distributed
from l2e_ds.config import LayerChoice, ModelConfig
from l2e_ds.errors import ConfigError, DataError
from l2e_ds.families import blocks_of, check_trainable, site_of
from l2e_ds.inhibition.hook import NeuronSite

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class PythiaSize:
    """One row of the family table."""

    layers: int
    hidden: int
    heads: int
    learning_rate: float
    vocabulary: int


PYTHIA = {
    "pythia-14m": PythiaSize(6, 128, 4, 1.0e-3, 50304),
    "pythia-31m": PythiaSize(6, 256, 8, 1.0e-3, 50304),
    "pythia-70m": PythiaSize(6, 512, 8, 1.0e-3, 50304),
    "pythia-160m": PythiaSize(12, 768, 12, 6.0e-4, 50304),
    "pythia-410m": PythiaSize(24, 1024, 16, 3.0e-4, 50304),
    "pythia-1b": PythiaSize(16, 2048, 8, 2.5e-4, 50304),
    "pythia-1.4b": PythiaSize(24, 2048, 16, 2.0e-4, 50304),
    "pythia-2.8b": PythiaSize(32, 2560, 32, 1.6e-4, 50304),
    "pythia-6.9b": PythiaSize(32, 4096, 32, 1.2e-4, 50432),
    "pythia-12b": PythiaSize(36, 5120, 40, 1.2e-4, 50688),
}


def check_sizes(option: str, names: Iterable[str]) -> None:
    """That an option names Pythia sizes. Raises ConfigError."""
    for name in names:
        if name not in PYTHIA:
            raise ConfigError(f"{option}: got {name!r}, allowed: {', '.join(PYTHIA)}")


def network_config(config: ModelConfig, sequence_length: int) -> PretrainedConfig:
    """The Hugging Face configuration of the run's network. Raises ConfigError naming the key."""
    if config.pretrained is not None:
        return _pretrained_config(config)
    from transformers import GPTNeoXConfig

    name = str(config.name)
    check_sizes("model.name", [name])
    size = PYTHIA[name]
    hidden, heads = config.hidden_size or size.hidden, config.num_heads or size.heads
    if hidden % heads or (hidden // heads) % 2:
        raise ConfigError(
            f"model.num_heads: {heads} heads do not divide model.hidden_size {hidden} into heads of even size"
        )
    return GPTNeoXConfig(
        vocab_size=config.vocab_size or size.vocabulary,
        hidden_size=hidden,
        num_hidden_layers=config.num_layers or size.layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_act="gelu",  # exact, not the tanh approximation
        # the published 25 % rotary dimensions; longer contexts only where the run asks for them
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        max_position_embeddings=max(2048, sequence_length),
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=None,  # `take_special_tokens`
        eos_token_id=None,
        use_cache=False,
    )


def _pretrained_config(config: ModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        network = AutoConfig.from_pretrained(config.pretrained, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: cannot load {config.pretrained!r}"
            f"{f' at revision {config.revision!r}' if config.revision else ''}: {str(error).splitlines()[0]}"
        ) from None
    check_trainable(network, config.attention, f"model.pretrained: {config.pretrained!r}")
    return network


def take_special_tokens(network: PretrainedConfig | GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """End, beginning and padding of text as the tokenizer has them, which the network is trained and used with.

    A pretrained network that ends its texts with this tokenizer's end, maybe with others too, keeps what it says.
    """
    from l2e_ds.data.tokenizer import end_of_text_id

    try:
        end = end_of_text_id(tokenizer)
    except DataError:  # token files need none
        return
    ends = network.eos_token_id
    if end in (ends if isinstance(ends, list) else [ends]):
        return
    network.eos_token_id, network.bos_token_id = end, tokenizer.bos_token_id
    if getattr(network, "model_type", None) == "gpt_neox":  # other families do not train the embedding that pads
        network.pad_token_id = tokenizer.pad_token_id


def published_learning_rate(config: ModelConfig) -> float:
    """Peak learning rate of the family table. Raises ConfigError for a pretrained model, which has none there."""
    if config.name is None:
        raise ConfigError("optimizer.peak_learning_rate: is required with model.pretrained")
    return PYTHIA[config.name].learning_rate


def build_network(config: ModelConfig, network: PretrainedConfig, seed: int, zero3: dict | None) -> PreTrainedModel:
    """The network in float32 with its first weights, in training mode, on the CPU.

    zero3: the DeepSpeed configuration under ZeRO-3, whose parameters are sharded while the network is built so
    that no rank ever holds more than one whole tensor; else None. The weights depend on the seed alone: not on
    the number of ranks, the stage or the order of construction.
    """
    from transformers import AutoModelForCausalLM

    if config.pretrained is not None:
        with loading_sharded(zero3):
            model = AutoModelForCausalLM.from_pretrained(
                config.pretrained, revision=config.revision, dtype=torch.float32, attn_implementation=config.attention
            )
    else:
        with _sharded(zero3), without_default_init():
            model = AutoModelForCausalLM.from_config(network, attn_implementation=config.attention, dtype=torch.float32)
        initialise(model, seed)
    model.config.use_cache = False
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in blocks_of(model):
            block.compile()  # within what recomputes it, so that a hook's `in_backward` is seen
    model.train()
    return model


@contextlib.contextmanager
def _sharded(zero3: dict | None) -> Iterator[None]:
    if zero3 is None:
        yield
        return
    import deepspeed
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    # Now, not when it is first used within Init, which puts functions of its own in place of torch's constructors:
    # torch._dynamo, which this imports, compares their signatures and gives up.
    from transformers.models.gpt_neox import modeling_gpt_neox  # noqa: F401

    # The first keeps rotary frequencies in float32: Init would round every floating tensor made within it, and an
    # exported model would not be the trained one.
    # no dtype given: with one, 0.19.8 builds in bfloat16 wherever fp16 is not supported, whatever was asked for
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=zero3):
        yield


@contextlib.contextmanager
def loading_sharded(zero3: dict | None) -> Iterator[None]:
    """Within, transformers' from_pretrained shards the network while rank 0 reads it tensor by tensor."""
    if zero3 is None:
        yield
        return
    from transformers.integrations import deepspeed as integration

    class Zero3:
        """What from_pretrained asks of HfDeepSpeedConfig, which itself would need the package accelerate."""

        config = zero3

        def is_zero3(self) -> bool:
            return True

    known = Zero3()  # transformers keeps a weak reference only
    integration.set_hf_deepspeed_config(known)
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


@contextlib.contextmanager
def without_default_init() -> Iterator[None]:
    """Skip transformers' own initialisation: every weight is written afterwards."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Pythia's initialisation: small_init, wang_init on residual outputs, zero biases, unit norms.

    small_init: N(0, 2 / (5 h)); wang_init: N(0, (2 / (L sqrt(h)))^2), h hidden size, L layers (METHOD, section 10).
    """
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers  # type: ignore[union-attr]
    small, wang = math.sqrt(2 / (5 * hidden)), 2 / (layers * math.sqrt(hidden))  # type: ignore[operator,arg-type]
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = wang if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else small
                # a generator per parameter: the same weights in any order of construction and on any rank
                key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
                generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
                if not hasattr(parameter, "ds_id") or distributed.is_main():  # under ZeRO-3 rank 0's values are taken
                    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.copy_(values.mul_(std))


@contextlib.contextmanager
def _gathered(parameter: nn.Parameter) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):  # not under ZeRO-3
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


# --- neurons -----------------------------------------------------------------------------------------------------


def chosen_layers(choice: str | list[int], layers: int) -> list[int]:
    """Indices of the hooked layers (METHOD, section 7), ascending. Raises ConfigError."""
    named = get_args(LayerChoice)
    numbers = isinstance(choice, list) and all(isinstance(i, Integral) for i in choice)
    if not (numbers and 0 < len(choice) == len(set(choice))) and choice not in named:
        raise ConfigError(
            f"inhibition.layers: got {choice!r}, allowed: {', '.join(named)}, or a list of distinct numbers from 0 to"
            f" {layers - 1}"
        )
    if isinstance(choice, list):
        wrong = [i for i in choice if not 0 <= i < layers]
        if wrong:
            raise ConfigError(f"inhibition.layers: got {wrong[0]}, allowed: 0 to {layers - 1} ({layers} layers)")
        return sorted(choice)
    if choice == "all":
        return list(range(layers))
    if choice == "top-bottom":
        return sorted({0, layers - 1})
    width = min(layers, 2) if choice == "mid-2" else max(1, round(layers / 3))
    first = (layers - width) // 2
    return list(range(first, first + width))


def neuron_sites(model: Any, layers: str | list[int] = "mid-2") -> list[NeuronSite]:
    """Where the neurons of the chosen layers are, each [B, T, N]; model: of transformers, with or without its head.

    Raises ConfigError for a model of another kind, a family that is not registered (families.py) and for layers out of
    range.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ConfigError(
            f"neuron_sites: got a {type(model).__name__} without `config`, allowed: a transformers model (not wrapped);"
            " of any other say where its neurons are, with a NeuronSite a layer (docs/python-api.md)"
        )
    return [site_of(model, layer) for layer in chosen_layers(layers, len(blocks_of(model)))]


def unbuilt(network: PretrainedConfig) -> PreTrainedModel:
    """The network without its weights, to be counted."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(network)


def parameter_counts(network: PretrainedConfig) -> tuple[int, int]:
    """Parameters in all, and those outside the token embedding and the output matrix."""
    model = unbuilt(network)
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if id(p) not in ends)


def matrix_parameters(model: Any) -> int:
    """Parameters that every token is multiplied with: not those of embeddings, which are looked up; but where one is
    also the output matrix, it counts."""
    output = model.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(output)}
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in looked_up)
