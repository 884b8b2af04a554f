"""Count the parameters and floating-point operations of a network without building it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def unbuilt(hf_config: PretrainedConfig) -> PreTrainedModel:
    """Return the network without weights (on the meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def parameter_counts(hf_config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of all parameters, and of those outside the token embedding and the output matrix."""
    if hf_config.model_type == "gpt_neox" and hf_config.attention_bias:
        # what the network below would give, without the seconds that it takes to import
        hidden, inner = hf_config.hidden_size, hf_config.intermediate_size
        attention, mlp, norms = 4 * hidden * (hidden + 1), hidden * (2 * inner + 1) + inner, 4 * hidden
        rest = hf_config.num_hidden_layers * (attention + mlp + norms) + 2 * hidden
        return rest + (1 if hf_config.tie_word_embeddings else 2) * hf_config.vocab_size * hidden, rest
    model = unbuilt(hf_config)
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.parameters() if id(p) not in ends)


def layer_matrices(model: Any) -> list[nn.Parameter]:
    """Return the matrices of the layers: all but embeddings and the output matrix. Not under ZeRO-3."""
    ends = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ends.add(id(model.get_output_embeddings().weight))
    return [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]


def layer_matrix_parameters(hf_config: PretrainedConfig) -> int:
    """Return how many parameters `layer_matrices` have."""
    if hf_config.model_type == "gpt_neox":
        hidden, inner = hf_config.hidden_size, hf_config.intermediate_size
        return hf_config.num_hidden_layers * hidden * (4 * hidden + 2 * inner)
    return sum(p.numel() for p in layer_matrices(unbuilt(hf_config)))


def matrix_parameters(model: Any) -> int:
    """Return the number of parameters that every token is multiplied with: of embeddings only an output matrix."""
    output = model.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(output)}
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in looked_up)


def attention_width(hf_config: PretrainedConfig) -> int:
    """Return the size of all heads of a layer together, which need not be the hidden size (Qwen3)."""
    heads = hf_config.num_attention_heads
    return heads * (getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads)


def flops_per_token(parameters: int, layers: int, width: int, sequence_length: int) -> float:
    """Return the operations of forward and backward pass without recomputation: 6 P + 6 L h T.

    P are all parameters but the input embedding; h, the width, is that of the attention. PaLM (Chowdhery et al. 2022,
    appendix B) has 12 L h T for full attention, of which a causal mask needs half.
    """
    return 6 * parameters + 6 * layers * width * sequence_length
