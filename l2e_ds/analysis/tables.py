"""The tables of one model's analysis, from what was collected of each layer, and the change between two models.

Shapes: F features, T tokens of a text, N neurons of a layer, L layers, B bootstrap resamples, BINS bins of the score.

There are two stages, as the model runs over the texts twice. `first_tables` needs only each text's moments. It gives
the mean, S and own feature by which the second pass counts scores. `build_tables` takes that pass's histograms and
returns all tables, whose columns docs/analysis.md names ("What is written"), and `resamples`: what `layer_change`
pairs, a row for each layer and bootstrap resample.

Columns *_low and *_high are 95 % bootstrap intervals over texts. Dead neurons have scores and F1 of 0 and no own
feature. Means over own features and samples of neurons leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from l2e_ds.analysis import bootstrap, measures, probing
from l2e_ds.analysis.measures import SHARES, Array, FalseKilling
from l2e_ds.errors import ConfigError

RANDOM_NEURONS = 1000
REPORTED_SHARE = 0.02  # the paper's default: the FKR at this share is compared between models and over time
REPORTED_SHARES = (0.01, REPORTED_SHARE, 0.05)
Tables = dict[str, pd.DataFrame]


Moments = tuple[Array, Array]
"""A layer's table of texts: mean and population variance of each text's activations, float32 [texts, N] each. Where a
text is one sample, its variance is 0."""


@dataclass(frozen=True)
class LayerOwn:
    """The moments and own features by which the second pass counts the scores of a layer, [N] each.

    mean, s: float64, over all tokens; own: int64, index of the own feature l*, or -1 for dead neurons.
    """

    mean: Array
    s: Array
    own: Array


@dataclass(frozen=True)
class LayerCounts:
    """What the second pass counted of a layer.

    histogram: [texts, 2, BINS] integer, scores of a text's tokens by bin; index 1 counts the neurons whose own feature
    is the text's; fourth: [N] float64, mean of phi^2 over all tokens.
    """

    histogram: Array
    fourth: Array


@dataclass(frozen=True)
class FirstTables:
    """The result of stage one.

    tables: those that need no histogram, of which `neurons` still lacks the kurtosis; own: for each layer; tokens: T;
    weights: [B, texts], how often each resample holds each text; own_score, mean_s: [L, B], those of each resample.
    """

    tables: Tables
    own: list[LayerOwn]
    tokens: int
    weights: Array
    own_score: Array
    mean_s: Array


def first_tables(
    layers: Sequence[Moments],
    labels: Array,
    features: Sequence[str],
    *,
    tokens: int,
    parameters: int,
    seed: int,
    resamples: int = bootstrap.RESAMPLES,
) -> FirstTables:
    """Return everything that follows from each text's moments.

    labels: [texts] int64, index into `features`; tokens: T, or 1 if a text is one sample; parameters: the model's, for
    `scale`. The same seed and labels give the same splits, samples and resamples for every model. Raises ConfigError
    if no neuron varies.
    """
    weights = bootstrap.resample_weights(labels, resamples, seed)
    masks = probing.training_masks(labels, probing.SPLITS, seed)
    parts, own_score, mean_s = zip(
        *(_layer_moments(layer, labels, len(features), tokens, weights, masks) for layer in layers), strict=True
    )
    found = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    alive = found["own"] >= 0
    live = np.flatnonzero(alive)
    if not len(live):
        raise ConfigError(
            "analysis: no neuron of any layer varies over the texts; is the model trained and read right?"
        )
    sample = np.sort(np.random.default_rng(seed).choice(live, min(RANDOM_NEURONS, len(live)), replace=False))
    best = probing.best_neurons(found["f1_train"], alive)
    scores = _scores_of(layers, labels, len(features), tokens, weights, np.union1d(sample, best))
    sizes = [len(part["own"]) for part in parts]
    place = pd.DataFrame(
        {"layer": np.repeat(np.arange(len(sizes)), sizes), "neuron": np.concatenate([np.arange(n) for n in sizes])}
    )
    tables = {
        "neurons": _neurons(found, features, place),
        "neuron_features": _neuron_features(found, features, place),
        "probes": _probes(found, features, best, scores, np.bincount(labels), place),
        "significance": _significance(features, best, sample, scores),
        "scale": _scale(parameters, sample, scores),
    }
    own = [LayerOwn(part["mean"], part["s"], part["own"]) for part in parts]
    return FirstTables(tables, own, tokens, weights, np.stack(own_score), np.stack(mean_s))


def build_tables(first: FirstTables, counts: Sequence[LayerCounts], edges: Array) -> Tables:
    """Return all tables of a model. edges: [BINS] float64, lower edge of each bin of the score, ascending from 0."""
    tables = dict(first.tables)
    neurons = tables["neurons"].copy()
    kurtosis = np.where(neurons["alive"], np.concatenate([layer.fourth for layer in counts]), 0.0)
    neurons.insert(neurons.columns.get_loc("s") + 1, "kurtosis", kurtosis)
    tables["neurons"] = neurons
    # The first row is the texts as they are, the others are the resamples.
    weights = np.vstack([np.ones(first.weights.shape[1]), first.weights])
    pairs = [len(layer.histogram) * first.tokens * len(layer.fourth) for layer in counts]
    curves = [
        measures.false_killing(bootstrap.resampled_histogram(weights, layer.histogram), edges, SHARES, of_layer)
        for layer, of_layer in zip(counts, pairs, strict=True)
    ]
    everything = measures.join_layers(curves)
    suggestions = [measures.suggested_share(curve, SHARES) for curve in curves]
    tables["layers"] = _layers(first, neurons, suggestions)
    tables["fkr"] = pd.concat(
        [_fkr(-1, everything, sum(pairs)), *(_fkr(i, curve, pairs[i]) for i, curve in enumerate(curves))],
        ignore_index=True,
    )
    tables["scale"] = tables["scale"].assign(**_suggested(*measures.suggested_share(everything, SHARES)))
    resamples = len(first.weights)
    tables["resamples"] = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(len(curves)), resamples),
            "resample": np.tile(np.arange(resamples), len(curves)),
            "own_score": first.own_score.ravel(),
            "mean_s": first.mean_s.ravel(),
            "suggested_share": np.concatenate([share[1:] for share, _ in suggestions]),
            "fkr": np.concatenate([curve.rate[1:, SHARES.index(REPORTED_SHARE)] for curve in curves]),
        }
    )
    return tables


def layer_change(before: Mapping[str, pd.DataFrame], after: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the change between two models of one shape, a row for each layer: values after minus values before.

    Both were analysed on the same texts with the same seed and B. docs/analysis.md names the columns. own_changed and
    own_correlation have no interval: resampling texts adds noise to each model, which increases the first and decreases
    the second.
    """
    columns: dict[str, Any] = {"layer": before["layers"]["layer"]}
    for name in ("kurtosis", "dead_share"):
        columns[name] = after["layers"][name] - before["layers"][name]
    layers = len(before["layers"])
    for name in ("own_score", "mean_s", "suggested_share", "fkr"):
        old, new = (_at_reported_share(of["fkr"]) if name == "fkr" else of["layers"][name] for of in (before, after))
        difference = after["resamples"][name] - before["resamples"][name]
        columns[name] = new - old
        columns |= _bounds(name, difference.to_numpy().reshape(layers, -1).T)
    both = before["neurons"].merge(after["neurons"], on=["layer", "neuron"], suffixes=("_before", "_after"))
    alive = both["alive_before"] & both["alive_after"]
    by_layer = [both[alive & (both["layer"] == layer)] for layer in before["layers"]["layer"]]
    columns["own_changed"] = [(rows["own_feature_before"] != rows["own_feature_after"]).mean() for rows in by_layer]
    columns["own_correlation"] = [rows["own_score_before"].corr(rows["own_score_after"]) for rows in by_layer]
    return pd.DataFrame(columns)


def _layer_moments(
    layer: Moments, labels: Array, features: int, tokens: int, weights: Array, masks: Array
) -> tuple[dict[str, Array], Array, Array]:
    """Return the measures of a layer's neurons by name, and the own score and mean S of its resamples, [B] each.

    mean, s, own, own_score: [N]; inside, outside, feature_mean, feature_s, and the arrays of `Probes`: [F, N].
    """
    means, variances = layer
    texts, neurons = means.shape
    resamples = len(weights)
    own_score_sum, s_sum = np.zeros(resamples), np.zeros(resamples)
    blocks: list[dict[str, Array]] = []
    for columns in measures.column_blocks(neurons, max(texts, resamples * features)):
        mean, variance = np.asarray(means[:, columns]), np.asarray(variances[:, columns])
        moments = measures.feature_moments(mean, variance, labels, features, tokens)
        overall, square = measures.overall_moments(moments)
        inside = measures.mean_scores(moments)
        count = moments.texts * tokens
        own, own_score = measures.own_features(inside)
        blocks.append(
            {
                "mean": overall,
                "s": np.sqrt(square),
                "own": own,
                "own_score": own_score,
                "inside": inside,
                "feature_mean": moments.mean,
                "feature_s": np.sqrt(moments.variance * (count / np.maximum(count - 1, 1))[:, None]),
            }
        )
        resampled = bootstrap.resampled_moments(weights, mean, variance, labels, moments)
        own_score_sum += bootstrap.own_scores_of_resamples(measures.mean_scores(resampled), own).sum(axis=1)
        s_sum += np.sqrt(measures.overall_moments(resampled)[1]).sum(axis=1)
    found = {name: np.concatenate([block[name] for block in blocks], axis=-1) for name in blocks[0]}
    found["outside"] = measures.scores_outside(found["inside"], np.bincount(labels))
    found |= vars(probing.probe_layer(means, labels, features, masks))
    alive = int((found["own"] >= 0).sum())
    return found, own_score_sum / alive if alive else np.full(resamples, np.nan), s_sum / neurons


Scores = Callable[[Array], tuple[Array, Array]]
"""Returns the scores inside each feature of some neurons, [F, neurons], and those of each resample, [B, F, neurons]."""


def _scores_of(
    layers: Sequence[Moments], labels: Array, features: int, tokens: int, weights: Array, neurons: Array
) -> Scores:
    """Return the scores of `neurons`, which are sorted indices among all layers' neurons in order."""
    starts = np.cumsum([0, *(means.shape[1] for means, _ in layers)])
    inside, resampled = [], []
    for (means, variances), start, end in zip(layers, starts[:-1], starts[1:], strict=True):
        within = neurons[(neurons >= start) & (neurons < end)] - start
        for block in measures.column_blocks(len(within), max(len(labels), len(weights) * features)):
            mean, variance = means[:, within[block]], variances[:, within[block]]
            moments = measures.feature_moments(mean, variance, labels, features, tokens)
            inside.append(measures.mean_scores(moments))
            resampled.append(
                measures.mean_scores(bootstrap.resampled_moments(weights, mean, variance, labels, moments))
            )
    all_inside, all_resampled = np.concatenate(inside, axis=-1), np.concatenate(resampled, axis=-1)

    def scores(some: Array) -> tuple[Array, Array]:
        at = np.searchsorted(neurons, some)
        return all_inside[:, at], all_resampled[..., at]

    return scores


def _neurons(found: Mapping[str, Array], features: Sequence[str], place: pd.DataFrame) -> pd.DataFrame:
    names = np.array([*features, ""], dtype=object)  # the index of dead neurons, -1, is the last
    return place.assign(
        mean=found["mean"],
        s=found["s"],
        alive=found["own"] >= 0,
        own_feature=names[found["own"]],
        own_score=found["own_score"],
    )


def _neuron_features(found: Mapping[str, Array], features: Sequence[str], place: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all neurons, neuron by neuron."""
    alive = found["own"] >= 0
    columns = {
        "score_inside": found["inside"],
        "score_outside": found["outside"],
        "mean": found["feature_mean"],
        "s": found["feature_s"],
        "f1_train": np.where(alive, found["f1_train"], 0.0),
        "f1_test": np.where(alive, found["f1_test"], 0.0),
    }
    repeated = place.loc[place.index.repeat(len(features))].reset_index(drop=True)
    names = np.tile(np.array(features, dtype=object), len(place))
    return repeated.assign(feature=names, **{name: values.T.ravel() for name, values in columns.items()})


def _probes(
    found: Mapping[str, Array], features: Sequence[str], best: Array, scores: Scores, texts: Array, place: pd.DataFrame
) -> pd.DataFrame:
    tables = []
    for f, neurons in enumerate(best):
        inside, resampled = scores(neurons)
        outside, resampled_outside = (measures.scores_outside(a, texts) for a in (inside, resampled))
        tables.append(
            pd.DataFrame(
                {
                    "feature": features[f],
                    "place": np.arange(1, len(neurons) + 1),
                    "layer": place["layer"].to_numpy()[neurons],
                    "neuron": place["neuron"].to_numpy()[neurons],
                    **{name: found[name][f, neurons] for name in ("direction", "f1_train", "f1_test", "f1_test_sd")},
                    "score_inside": inside[f],
                    **_bounds("score_inside", resampled[:, f]),
                    "score_outside": outside[f],
                    **_bounds("score_outside", resampled_outside[:, f]),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _significance(features: Sequence[str], best: Array, sample: Array, scores: Scores) -> pd.DataFrame:
    """Return one-sided Mann-Whitney tests of the probed neurons' scores inside the feature against random neurons'.

    A probed neuron that is also in the sample is left out of the sample. The probed neurons were found on the same
    texts, so that p describes these texts only, as in the paper.
    """
    from scipy import stats

    rows = []
    for f, probed in enumerate(best):
        inside, resampled = scores(probed)
        random_inside, random_resampled = scores(np.setdiff1d(sample, probed))
        monosemantic, random = inside[f], random_inside[f]
        row: dict[str, Any] = {"feature": features[f], "monosemantic_score": monosemantic.mean()}
        if len(random):
            test = stats.mannwhitneyu(monosemantic, random, alternative="greater")
            ratios = resampled[:, f].mean(axis=1) / random_resampled[:, f].mean(axis=1)
            row |= {"random_score": random.mean(), "ratio": monosemantic.mean() / random.mean()}
            row |= _bounds("ratio", ratios) | {"u": test.statistic, "p_value": test.pvalue}
        else:  # the model has no more neurons than are probed
            names = ("random_score", "ratio", "ratio_low", "ratio_high", "u", "p_value")
            row |= dict.fromkeys(names, np.nan)
        rows.append(row | {"p_adjusted": np.nan, "monosemantic": len(monosemantic), "random": len(random)})
    table = pd.DataFrame(rows)
    table["p_adjusted"] = measures.holm(table["p_value"].to_numpy())
    return table


def _scale(parameters: int, sample: Array, scores: Scores) -> pd.DataFrame:
    inside, resampled = scores(sample)
    ks = np.array([measures.own_against_all(replicate) for replicate in resampled])
    row = {"parameters": parameters, "neurons": len(sample), "ks": measures.own_against_all(inside)}
    own, own_score = measures.own_features(inside)
    row |= _bounds("ks", ks) | {"own_score": own_score.mean()}
    return pd.DataFrame([row | _bounds("own_score", bootstrap.own_scores_of_resamples(resampled, own).mean(axis=1))])


def _layers(first: FirstTables, neurons: pd.DataFrame, suggestions: list[tuple[Array, Array]]) -> pd.DataFrame:
    rows = []
    for layer, group in neurons.groupby("layer"):
        live = group[group["alive"]]
        row = {
            "layer": layer,
            "depth": layer / max(1, len(suggestions) - 1),
            "neurons": len(group),
            "dead_share": 1 - len(live) / len(group),
            "kurtosis": live["kurtosis"].median(),
            "mean_s": group["s"].mean(),
            "own_score": live["own_score"].mean(),
        }
        rows.append(row | _bounds("own_score", first.own_score[layer]) | _suggested(*suggestions[layer]))
    return pd.DataFrame(rows)


def _suggested(share: Array, rate: Array) -> dict[str, Any]:
    """Return the columns of a suggested share and its FKR, [1 + B] each: the texts as they are, then the resamples."""
    return {"suggested_share": share[0], **_bounds("suggested_share", share[1:]), "suggested_fkr": rate[0]}


def _fkr(layer: int, curve: FalseKilling, pairs: int) -> pd.DataFrame:
    rate = curve.rate
    return pd.DataFrame(
        {
            "layer": layer,
            "share": SHARES,
            "tau": curve.tau[0],
            "share_counted": curve.selected[0] / pairs,
            "fkr": rate[0],
            **_bounds("fkr", rate[1:]),
            "fkr_error": curve.error[0],
        }
    )


def _bounds(name: str, resampled: Array) -> dict[str, Any]:
    """Return the columns NAME_low and NAME_high of an interval, given the resamples, [B, ...]."""
    low, high = bootstrap.interval(resampled)
    return {f"{name}_low": low, f"{name}_high": high}


def _at_reported_share(fkr: pd.DataFrame) -> pd.Series:
    """Return each layer's FKR at a share of 2 %, in the order of layers."""
    rows = fkr[(fkr["share"] == REPORTED_SHARE) & (fkr["layer"] >= 0)]
    return rows.sort_values("layer")["fkr"].reset_index(drop=True)
