"""Build and load networks, with the initialisation of Pythia.

GPT-NeoX initialises with `small_init` (Nguyen & Salazar 2019) and, where a layer writes to the residual stream,
`wang_init` (docs/method.md, 10).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from l2e_ds.config.sections import ModelConfig
from l2e_ds.distributed import collectives
from l2e_ds.models.families import blocks_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def build_network(config: ModelConfig, hf_config: PretrainedConfig, seed: int, zero3: dict | None) -> PreTrainedModel:
    """Return the network in float32 with its initial weights, in training mode, on the CPU.

    zero3: the DeepSpeed configuration under ZeRO-3, else None. Parameters are then sharded while the network is built,
    module by module. The initial weights depend on the seed only, not on ranks, ZeRO stage or order of construction.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if config.pretrained is not None:
        with loading_sharded(zero3):
            model = AutoModelForCausalLM.from_pretrained(
                config.pretrained, revision=config.revision, dtype=torch.float32, attn_implementation=config.attention
            )
    else:
        with _sharded(zero3, hf_config), no_init_weights():  # every weight is written afterwards
            model = AutoModelForCausalLM.from_config(
                hf_config, attn_implementation=config.attention, dtype=torch.float32
            )
        if config.name is not None:
            initialise(model, seed)
        else:
            model.tie_weights()
            initialise_as_transformers(model, seed)
    model.config.use_cache = False
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in blocks_of(model):
            block.compile()  # inside the recomputation, so that a hook's `in_backward` is seen
    model.train()
    return model


@contextlib.contextmanager
def _sharded(zero3: dict | None, hf_config: PretrainedConfig) -> Iterator[None]:
    if zero3 is None:
        yield
        return
    import deepspeed
    from transformers.integrations.deepspeed import prevent_arange_dtype_change
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    # The network's module is imported before Init, which replaces torch's constructors by functions of its own. It
    # imports torch._dynamo, which compares their signatures and fails.
    MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]

    # prevent_arange_dtype_change keeps rotary frequencies in float32. Init would round every floating-point tensor that
    # is made inside it, and an exported model would differ from the trained one.
    # Init is given no dtype: with one, DeepSpeed 0.19.8 builds in bfloat16 wherever fp16 is not supported.
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=zero3):
        yield


@contextlib.contextmanager
def loading_sharded(zero3: dict | None) -> Iterator[None]:
    """Make transformers' from_pretrained shard the network while rank 0 reads it tensor by tensor, unless None."""
    if zero3 is None:
        yield
        return
    from transformers.integrations import deepspeed as integration

    class Zero3:
        """The part of HfDeepSpeedConfig that from_pretrained uses. The class itself needs the package accelerate."""

        config = zero3

        def is_zero3(self) -> bool:
            return True

    settings = Zero3()  # kept in a variable, as transformers keeps only a weak reference
    integration.set_hf_deepspeed_config(settings)
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Initialise as Pythia: small_init, wang_init on residual outputs, zero biases, norms of one (docs/method.md, 10).

    small_init is N(0, 2 / (5 h)) and wang_init is N(0, (2 / (L sqrt(h)))^2) with hidden size h and L layers.
    """
    from deepspeed.runtime.zero import GatheredParameters  # a parameter that is not sharded stays as it is

    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers  # type: ignore[union-attr]
    small, wang = math.sqrt(2 / (5 * hidden)), 2 / (layers * math.sqrt(hidden))  # type: ignore[operator,arg-type]
    for name, parameter in model.named_parameters():
        with GatheredParameters([parameter], modifier_rank=0):  # what rank 0 writes counts
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = wang if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else small
                generator = torch.Generator().manual_seed(_own_seed(seed, name))
                if not hasattr(parameter, "ds_id") or collectives.is_main():  # under ZeRO-3 rank 0's values are used
                    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.copy_(values.mul_(std))


@torch.no_grad()
def initialise_as_transformers(model: PreTrainedModel, seed: int) -> None:
    """Initialise as transformers does in the model's family, each module with a generator of its own, parts before what
    contains them, which in some families writes their weights once more (GPT-2)."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, module in reversed(list(model.named_modules())):
        own = [parameter for part in (module, *module.children()) for parameter in part.parameters(recurse=False)]
        with torch.random.fork_rng(devices=[]), GatheredParameters(own, modifier_rank=0):
            # not torch.manual_seed, which would give the GPUs of all ranks one state: dropout draws from it
            torch.default_generator.manual_seed(_own_seed(seed, name))
            model._init_weights(module)


def _own_seed(seed: int, name: str) -> int:
    """Return the seed of one part of the network, which depends neither on the order of construction nor the rank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
