"""Measure how specific the neurons of runs are to kinds of text, beside what chance alone would give.

    python launch/studies/evidence/features.py OUTPUT.csv RUN [RUN ...] --features FEATURES.jsonl

One line a run: its newest checkpoint, the two layers that the main study inhibits (`mid-2`), whether it inhibits them
or not, the mean over these; 50 texts of each feature, 128 tokens each. FEATURES.jsonl: lines of a text and its feature,
as for `l2e-ds analyze` (docs/feature-sets.md). With phi = (z - mean)^2 / S^2, over all tokens:

`ms`: the mean of the highest 2 % of all phi. `active_share`: of activations above zero.
`own_ms`: a neuron's mean phi over the texts of its own feature, on half of the texts; its own feature has the highest
on the other half. `ks`: the Kolmogorov-Smirnov statistic between each neuron's highest mean phi of a feature and those
of all features; `ks_chance`: with the labels of the texts permuted. `fkr`: the False Killing Rate, how many of the
highest 2 % of all phi are on texts of another feature than their neuron's own.
`own_share`: how many of a neuron's own highest 2 % of activations are on texts of its own feature, chosen and counted
on different halves as above. It does not depend on how peaked the neuron is; by chance it is 1 / features.
`eta2`: the share of a neuron's variance that the features explain; `eta2_clipped`: the same where activations are
clipped at 2 S from the mean, so that rare peaks do not decide; `eta2_chance`: of permuted labels, not clipped.

Lines that are there already are kept, so that the same command resumes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.stats import ks_2samp
from shared import LAYERS, SHARE, parser_of, write_rows
from torch import Tensor

from l2e_ds.analysis.features import FeatureSet, load_feature_set
from l2e_ds.evaluation.model_source import find_model, load_causal_model, load_tokenizer_of
from l2e_ds.inhibition.measure import observed
from l2e_ds.models.sites import neuron_sites

TEXTS, LENGTH, BATCH, CLIP, SEED = 50, 128, 25, 2.0, 0


def measure(z: np.ndarray, labels: np.ndarray, length: int) -> dict[str, float]:
    """Return the measures of one layer, by column.

    z: [texts * length, N] float32; labels: [texts], the number of each text's feature.
    """
    random = np.random.default_rng(SEED)
    features, neurons = int(labels.max()) + 1, np.arange(z.shape[1])
    first = np.zeros(len(labels), bool)  # of each feature's texts one half
    for feature in range(features):
        rows = random.permutation(np.flatnonzero(labels == feature))
        first[rows[: len(rows) // 2]] = True
    permuted = random.permutation(labels)

    def of_texts(values: np.ndarray) -> np.ndarray:
        """Return the mean over each text, [texts, N] float64."""
        return values.reshape(len(labels), length, -1).mean(1, dtype=np.float64)

    def of_features(texts: np.ndarray, labels: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Return the mean over the chosen texts of each feature, [features, N]."""
        chosen = np.ones(len(labels), bool) if chosen is None else chosen
        return np.stack([texts[(labels == feature) & chosen].mean(0) for feature in range(features)])

    mean, variance = z.mean(0, dtype=np.float64), z.var(0, dtype=np.float64)
    phi = ((z - mean) ** 2 / variance).astype(np.float32)
    phi_of_texts, z_of_texts = of_texts(phi), of_texts(z)

    def statistic(labels: np.ndarray) -> float:
        by_feature = of_features(phi_of_texts, labels)
        return float(ks_2samp(by_feature.max(0), by_feature.ravel()).statistic)

    def eta2(texts: np.ndarray, variance: np.ndarray, labels: np.ndarray) -> float:
        return float((of_features(texts, labels).var(0) / variance).mean())

    selected = phi >= np.partition(phi, -int(SHARE * phi.size), axis=None)[-int(SHARE * phi.size)]
    own = of_features(phi_of_texts, labels).argmax(0)
    is_own = labels.repeat(length)[:, None] == own
    own_elsewhere = of_features(phi_of_texts, labels, first).argmax(0)
    highest = of_texts(z >= np.partition(z, -int(SHARE * len(z)), axis=0)[-int(SHARE * len(z))])
    highest_elsewhere, counted = of_features(highest, labels, first), of_features(highest, labels, ~first)
    clipped = np.clip((z - mean) / np.sqrt(variance), -CLIP, CLIP)
    return {
        "ms": float(phi[selected].mean(dtype=np.float64)),
        "active_share": float((z > 0).mean()),
        "own_ms": float(of_features(phi_of_texts, labels, ~first)[own_elsewhere, neurons].mean()),
        "ks": statistic(labels),
        "ks_chance": statistic(permuted),
        "fkr": float((selected & ~is_own).sum() / selected.sum()),
        "own_share": float((counted[highest_elsewhere.argmax(0), neurons] / counted.sum(0)).mean()),
        "eta2": eta2(z_of_texts, variance, labels),
        "eta2_clipped": eta2(of_texts(clipped), clipped.var(0, dtype=np.float64), labels),
        "eta2_chance": eta2(z_of_texts, variance, permuted),
    }


@torch.no_grad()
def activations_of(run: Path, texts: FeatureSet) -> list[np.ndarray]:
    """Return the activations of each of the layers, [texts * length, N] float32. Neurons that do not vary are left
    out."""
    model = load_causal_model(find_model(str(run)), "fp32", None)[0].eval()
    sites = neuron_sites(model, LAYERS)
    seen: list[list[Tensor]] = [[] for _ in sites]

    with observed(sites, lambda index, z: seen[index].append(z)):
        for tokens in np.array_split(texts.tokens, -(-len(texts.tokens) // BATCH)):
            model(input_ids=torch.from_numpy(tokens.astype(np.int64)))
    layers = [torch.cat(parts).numpy() for parts in seen]
    return [z[:, z.std(0) > 0] for z in layers]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--features", required=True, metavar="FEATURES.jsonl")
    arguments = parser.parse_args()

    def of_run(run: Path) -> dict[str, float]:
        tokenizer = load_tokenizer_of(find_model(str(run)), None)
        texts = load_feature_set(
            arguments.features, tokenizer, sequence_length=LENGTH, texts_per_feature=TEXTS, seed=SEED
        )
        layers = [measure(z, texts.labels, LENGTH) for z in activations_of(run, texts)]
        return {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}

    write_rows(arguments, of_run)


if __name__ == "__main__":
    main()
