"""The Pythia family: sizes, published hyper-parameters, initialisation; building and loading networks; their layers.

Sources: Biderman et al. 2023 and the released configuration files (docs/method.md, 10). GPT-NeoX initialises
with `small_init` (Nguyen & Salazar 2019) and, where a layer writes to the residual stream, `wang_init`.
Where the neurons of these and of other families are: families.py. Shapes: N neurons of a layer.
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


def build_network(config: ModelConfig, network: PretrainedConfig, seed: int, zero3: dict | None) -> PreTrainedModel:
    """Return the network in float32 with its first weights, in training mode, on the CPU.

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

    small_init: N(0, 2 / (5 h)); wang_init: N(0, (2 / (L sqrt(h)))^2), h hidden size, L layers (docs/method.md, 10).
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
                if not hasattr(parameter, "ds_id") or collectives.is_main():  # under ZeRO-3 rank 0's values are taken
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
