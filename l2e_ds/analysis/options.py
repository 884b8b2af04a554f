"""The options that `l2e-ds analyze` and `l2e-ds neuron` share, and their checks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2e_ds.analysis.features import FeatureSet, load_feature_set
from l2e_ds.checkpoint.weights import DTYPES
from l2e_ds.console import warn
from l2e_ds.distributed import collectives
from l2e_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("texts").add_argument
    add(
        "--features",
        required=True,
        metavar="FILE|DATASET",
        help="texts with one feature each: .jsonl, .parquet, a folder or a hub data set (docs/feature-sets.md)",
    )
    add("--text-column", default="text", metavar="NAME", help="column of the texts (default: %(default)s)")
    add("--feature-column", default="feature", metavar="NAME", help="column of the features (default: %(default)s)")
    add("--split", default="train", metavar="NAME", help="split of a data set (default: %(default)s)")
    add(
        "--sequence-length",
        type=int,
        default=128,
        metavar="T",
        help="tokens a text; shorter texts are left out (default: %(default)s)",
    )
    add(
        "--texts-per-feature",
        type=int,
        metavar="N",
        help="texts of each feature (default: as many as the scarcest feature has)",
    )
    add("--seed", type=int, default=1234, metavar="S", help="seed of every random choice (default: %(default)s)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--tokenizer", metavar="NAME|FILE", help="tokenizer (default: the model's own)")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="precision of the model (default: %(default)s)")
    add("--batch", type=int, default=8, metavar="B", help="texts at a time (default: %(default)s)")


def load_features(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> FeatureSet:
    """Return the texts that the command's options describe. Raises what `load_feature_set` raises."""
    texts = load_feature_set(
        arguments.features,
        tokenizer,
        sequence_length=arguments.sequence_length,
        texts_per_feature=arguments.texts_per_feature,
        seed=arguments.seed,
        text_column=arguments.text_column,
        feature_column=arguments.feature_column,
        split=arguments.split,
    )
    repeated = 1 - len(np.unique(texts.tokens, axis=0)) / len(texts.tokens)
    if repeated > 0.01 and collectives.is_main():
        warn(
            f"{repeated:.0%} of the texts are the same as another in their first"
            f" {texts.tokens.shape[1]} tokens; probes and intervals take them for independent (docs/feature-sets.md)"
        )
    return texts


def name_of_set(features: str) -> str:
    """Return the name by which figures call a set of features."""
    path = Path(features)
    return path.name.partition(".")[0] if path.exists() else features


def check_fits(hf_config: PretrainedConfig, texts: FeatureSet, given: str) -> None:
    """Raise ConfigError if the texts are too long for the model, or hold ids outside its vocabulary."""
    longest = getattr(hf_config, "max_position_embeddings", None)
    if longest is not None and texts.tokens.shape[1] > longest:
        raise ConfigError(f"--sequence-length: got {texts.tokens.shape[1]}, {given} takes at most {longest} tokens")
    largest = int(texts.tokens.max())
    if largest >= hf_config.vocab_size:
        raise ConfigError(
            f"{given}: its tokenizer gives token {largest}, its vocabulary has {hf_config.vocab_size} rows"
        )
