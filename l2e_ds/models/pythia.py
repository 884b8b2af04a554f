"""The Pythia suite: sizes, learning rates and the configurations of its networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2e_ds.config.reading import find_model_config
from l2e_ds.config.sections import ModelConfig
from l2e_ds.errors import ConfigError
from l2e_ds.models.families import check_trainable
from l2e_ds.system.files import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PythiaSize:
    """One size, from Biderman et al. 2023 and the released configuration files (docs/method.md, 10): learning_rate is
    the published peak, vocabulary the rows of the embedding."""

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
    """Raise ConfigError if one of an option's names is not a Pythia size."""
    for name in names:
        if name not in PYTHIA:
            raise ConfigError(f"{option}: got {name!r}, allowed: {', '.join(PYTHIA)}")


def network_config(config: ModelConfig, sequence_length: int) -> PretrainedConfig:
    """Return the Hugging Face configuration of the run's network. Raises ConfigError naming the key."""
    if config.name is None:
        return _given_config(config)
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
        hidden_act="gelu",  # the exact one, not the tanh approximation
        # The published rotary dimensions are 25 %. The context is longer than published only if the run needs it.
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        max_position_embeddings=max(2048, sequence_length),
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=None,  # set by `take_special_tokens`
        eos_token_id=None,
        use_cache=False,
    )


def _given_config(config: ModelConfig) -> PretrainedConfig:
    """Return the configuration of `model.config` or `model.pretrained`. Raises ConfigError."""
    from transformers import AutoConfig

    key, name = "model.pretrained", config.origin
    if config.config is not None:  # not a name of the hub
        key, found = "model.config", find_model_config(name)
        if found is None:
            raise ConfigError(f"{key}: no such file, or folder with a config.json: {name}")
        name = str(found)
    try:
        hf_config = AutoConfig.from_pretrained(name, revision=config.revision)
    except Exception as error:  # of many kinds, for what a file may say
        raise ConfigError(
            f"{key}: cannot load {config.origin!r}"
            f"{f' at revision {config.revision!r}' if config.revision else ''}: {one_line(error.__cause__ or error)}"
        ) from None
    check_trainable(hf_config, config.attention, f"{key}: {config.origin!r}")
    return hf_config


def published_learning_rate(config: ModelConfig) -> float:
    """Return the published peak learning rate of a Pythia size. Raises ConfigError for another model."""
    if config.name is None:
        key = "model.pretrained" if config.config is None else "model.config"
        raise ConfigError(f"optimizer.peak_learning_rate: is required with {key}")
    return PYTHIA[config.name].learning_rate
