"""The tables of a model against slow measures over its single tokens. Shapes: F features, T tokens, N neurons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from l2e_ds.analysis import bootstrap, measures, probing, tables
from l2e_ds.analysis.measures import SHARES
from l2e_ds.errors import ConfigError
from tests.unit.analysis.single_tokens import (
    EDGES,
    activations,
    kurtosis,
    planted,
    slow_histogram,
    slow_killing,
    slow_ks,
    slow_own,
    slow_scores,
    text_moments,
)

FEATURES = ("Danish", "French", "Greek", "Polish", "Welsh")
RESAMPLES = 25
COLUMNS = {
    "neurons": "layer neuron mean s kurtosis alive own_feature own_score",
    "neuron_features": "layer neuron feature score_inside score_outside mean s f1_train f1_test",
    "probes": "feature place layer neuron direction f1_train f1_test f1_test_sd score_inside score_inside_low"
    " score_inside_high score_outside score_outside_low score_outside_high",
    "significance": "feature monosemantic_score random_score ratio ratio_low ratio_high u p_value p_adjusted"
    " monosemantic random",
    "scale": "parameters neurons ks ks_low ks_high own_score own_score_low own_score_high suggested_share"
    " suggested_share_low suggested_share_high suggested_fkr",
    "layers": "layer depth neurons dead_share kurtosis mean_s own_score own_score_low own_score_high suggested_share"
    " suggested_share_low suggested_share_high suggested_fkr",
    "fkr": "layer share tau share_counted fkr fkr_low fkr_high fkr_error",
    "resamples": "layer resample own_score mean_s suggested_share fkr",
}


def collected(z: np.ndarray) -> tables.Moments:
    """What the first pass keeps: float32."""
    mean, variance = (a.astype(np.float32) for a in text_moments(z))
    return mean, variance


def analysed(layers: list[np.ndarray], labels: np.ndarray, features: int, seed: int = 0) -> tables.Tables:
    """Both stages; the second pass counts by what the first says."""
    first = tables.first_tables(
        [collected(z) for z in layers],
        labels,
        FEATURES[:features],
        tokens=layers[0].shape[1],
        parameters=1234,
        seed=seed,
        resamples=RESAMPLES,
    )
    counts = []
    for z, own in zip(layers, first.own, strict=True):
        np.testing.assert_array_equal(own.own, slow_own(z, labels, features))
        np.testing.assert_allclose(own.mean, z.mean(axis=(0, 1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(own.s, z.std(axis=(0, 1), ddof=1), rtol=1e-5, atol=1e-7)
        fourth = np.where(own.own >= 0, kurtosis(z), np.nan)  # nobody counts dead neurons
        counts.append(tables.LayerCounts(slow_histogram(z, labels, own.own), fourth))
    return tables.build_tables(first, counts, EDGES)


@pytest.fixture(scope="module")
def example() -> tuple[list[np.ndarray], np.ndarray, tables.Tables]:
    """Three layers of different sizes and three features of different numbers of texts; two neurons are dead."""
    layers = [activations(seed, (12, 10, 14), neurons=n)[0] for seed, n in ((1, 9), (2, 14), (3, 6))]
    labels = np.repeat([0, 1, 2], [12, 10, 14])
    layers = [z + np.linspace(0, 2, 3)[labels][:, None, None] * np.arange(z.shape[2]) / 5 for z in layers]
    layers = [z.astype(np.float32).astype(np.float64) for z in layers]
    layers[0][:, :, 4] = 0.5
    layers[1][:, :, 0] = 0.0
    return layers, labels, analysed(layers, labels, 3)


INTEGERS = {"layer", "neuron", "place", "direction", "monosemantic", "random", "parameters", "neurons", "resample"}


def test_columns_and_rows(example):
    """The interface's tables, no more columns and no fewer; numbers are numbers, names are strings."""
    made = example[2]
    assert {name: list(table.columns) for name, table in made.items()} == {
        name: columns.split() for name, columns in COLUMNS.items()
    }
    rows = {name: len(table) for name, table in made.items()}
    assert rows == {
        "neurons": 29,
        "neuron_features": 29 * 3,
        "probes": 30,
        "significance": 3,
        "scale": 1,
        "layers": 3,
        "fkr": 4 * len(SHARES),
        "resamples": 3 * RESAMPLES,
    }
    for table in made.values():
        for column in table:
            values = table[column]
            if column in ("feature", "own_feature"):
                assert all(isinstance(value, str) for value in values)
            elif column == "alive":
                assert values.dtype == bool
            elif column in INTEGERS:
                assert values.dtype == np.int64, column
            else:
                assert values.dtype == np.float64, column


def test_tables_survive_parquet(example, tmp_path):
    for name, table in example[2].items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / f"{name}.parquet"), table)


def test_neurons(example):
    layers, labels, made = example
    for layer, rows in made["neurons"].groupby("layer"):
        z = layers[layer]
        inside, _ = slow_scores(z, labels, 3)
        own = slow_own(z, labels, 3)
        assert rows["neuron"].tolist() == list(range(z.shape[2]))
        np.testing.assert_allclose(rows["own_score"], inside.max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(rows["kurtosis"], kurtosis(z), rtol=1e-12)
        assert rows["own_feature"].tolist() == [FEATURES[f] if f >= 0 else "" for f in own]
        assert rows["alive"].tolist() == (own >= 0).tolist()
    dead = made["neurons"][~made["neurons"]["alive"]]
    assert dead[["layer", "neuron"]].to_numpy().tolist() == [[0, 4], [1, 0]]
    assert np.all(dead[["own_score", "kurtosis"]] == 0)


def test_neuron_features(example):
    layers, labels, made = example
    table = made["neuron_features"]
    masks = probing.training_masks(labels, probing.SPLITS, 0)
    for layer, z in enumerate(layers):
        rows = table[table["layer"] == layer]
        inside, outside = slow_scores(z, labels, 3)
        found = probing.probe_layer(collected(z)[0], labels, 3, masks)
        alive = slow_own(z, labels, 3) >= 0
        for f in range(3):
            of_feature = rows[rows["feature"] == FEATURES[f]]
            tokens = z[labels == f].reshape(-1, z.shape[2])
            assert of_feature["neuron"].tolist() == list(range(z.shape[2]))
            np.testing.assert_allclose(of_feature["score_inside"], inside[f], rtol=1e-5)
            np.testing.assert_allclose(of_feature["score_outside"], outside[f], rtol=1e-5)
            np.testing.assert_allclose(of_feature["mean"], tokens.mean(axis=0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(of_feature["s"], tokens.std(axis=0, ddof=1), rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(of_feature["f1_train"], np.where(alive, found.f1_train[f], 0))
            np.testing.assert_array_equal(of_feature["f1_test"], np.where(alive, found.f1_test[f], 0))


def looked_up(made: tables.Tables, feature: str) -> pd.DataFrame:
    """neuron_features of one feature, by (layer, neuron)."""
    table = made["neuron_features"]
    return table[table["feature"] == feature].set_index(["layer", "neuron"])


def test_probes_are_the_ten_best(example):
    made = example[2]
    for feature, rows in made["probes"].groupby("feature"):
        every = looked_up(made, feature)
        assert rows["place"].tolist() == list(range(1, 11))
        best = every.reset_index().sort_values(["f1_train", "layer", "neuron"], ascending=[False, True, True])[:10]
        assert rows[["layer", "neuron"]].to_numpy().tolist() == best[["layer", "neuron"]].to_numpy().tolist()
        chosen = every.loc[list(zip(rows["layer"], rows["neuron"], strict=True))]
        for column in ("f1_train", "f1_test", "score_inside", "score_outside"):
            np.testing.assert_allclose(rows[column], chosen[column], rtol=1e-12)
        assert set(rows["direction"]) <= {-1, 1}


def repeated(layers: list[np.ndarray], labels: np.ndarray) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Each resample as texts that stand in it as often as they were drawn."""
    weights = bootstrap.resample_weights(labels, RESAMPLES, 0).astype(int)
    return [([np.repeat(z, row, axis=0) for z in layers], np.repeat(labels, row)) for row in weights]


def ends(values: list) -> tuple[np.ndarray, np.ndarray]:
    """The interval's definition: of 25 sorted values the first and the last."""
    ordered = np.sort(np.array(values), axis=0)
    return ordered[int(0.025 * 24)], ordered[24]


def test_intervals_of_scores(example):
    """probes, significance, scale and layers: derived anew from each resample's tokens, but for held own features."""
    layers, labels, made = example
    probes, alive = made["probes"], made["neurons"]["alive"].to_numpy()
    at = made["neurons"].reset_index().set_index(["layer", "neuron"])["index"]
    resampled = [
        (
            np.concatenate([slow_scores(z, their_labels, 3)[0] for z in zs], axis=1),
            np.concatenate([slow_scores(z, their_labels, 3)[1] for z in zs], axis=1),
        )
        for zs, their_labels in repeated(layers, labels)
    ]
    for f, (feature, rows) in enumerate(probes.groupby("feature")):
        probed = at.loc[list(zip(rows["layer"], rows["neuron"], strict=True))].to_numpy()
        for which, name in enumerate(("score_inside", "score_outside")):
            low, high = ends([scores[which][f, probed] for scores in resampled])
            np.testing.assert_allclose(rows[f"{name}_low"], low, rtol=1e-5)
            np.testing.assert_allclose(rows[f"{name}_high"], high, rtol=1e-5)
        random = np.setdiff1d(np.flatnonzero(alive), probed)  # fewer than 1,000 live: all are in the sample
        row = made["significance"].set_index("feature").loc[feature]
        low, high = ends([inside[f, probed].mean() / inside[f, random].mean() for inside, _ in resampled])
        assert [row["ratio_low"], row["ratio_high"]] == pytest.approx([low, high], rel=1e-5)
    scale = made["scale"].iloc[0]
    live = [inside[:, alive] for inside, _ in resampled]
    low, high = ends([slow_ks(inside.max(axis=0), inside.ravel()) for inside in live])
    assert [scale["ks_low"], scale["ks_high"]] == pytest.approx([low, high], rel=1e-6)
    own = np.concatenate([slow_own(z, labels, 3) for z in layers])
    own_scores = [inside[np.maximum(own, 0), np.arange(len(own))] for inside, _ in resampled]
    low, high = ends([scores[alive].mean() for scores in own_scores])
    assert [scale["own_score_low"], scale["own_score_high"]] == pytest.approx([low, high], rel=1e-5)
    layer_of = made["neurons"]["layer"].to_numpy()
    for layer, row in made["layers"].iterrows():
        scores = [of_all[alive & (layer_of == layer)].mean() for of_all in own_scores]
        low, high = ends(scores)
        assert [row["own_score_low"], row["own_score_high"]] == pytest.approx([low, high], rel=1e-5)
        resamples = made["resamples"][made["resamples"]["layer"] == layer]
        np.testing.assert_allclose(resamples["own_score"], scores, rtol=1e-5)
        s = [zs[layer].std(axis=(0, 1), ddof=1).mean() for zs, _ in repeated(layers, labels)]
        np.testing.assert_allclose(resamples["mean_s"], s, rtol=1e-5)


def test_significance_and_scale(example):
    """Mann-Whitney and K-S of the scores in the tables; Holm over features."""
    made = example[2]
    alive = made["neurons"].set_index(["layer", "neuron"])["alive"]
    p_values = []
    for _, row in made["significance"].iterrows():
        every = looked_up(made, row["feature"])["score_inside"]
        rows = made["probes"][made["probes"]["feature"] == row["feature"]]
        probed = pd.MultiIndex.from_frame(rows[["layer", "neuron"]])
        inside, outside = every[probed], every[alive & ~alive.index.isin(probed)]
        assert (row["monosemantic"], row["random"]) == (10, 17)
        assert row["monosemantic_score"] == pytest.approx(inside.mean(), rel=1e-12)
        assert row["random_score"] == pytest.approx(outside.mean(), rel=1e-12)
        assert row["ratio"] == pytest.approx(inside.mean() / outside.mean(), rel=1e-12)
        assert row["u"] == sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
        p_values.append(stats.mannwhitneyu(inside, outside, alternative="greater").pvalue)
    np.testing.assert_allclose(made["significance"]["p_value"], p_values, rtol=1e-9)
    first, second, third = np.argsort(p_values)
    holm = np.empty(3)
    holm[first] = min(1, 3 * p_values[first])
    holm[second] = max(holm[first], min(1, 2 * p_values[second]))
    holm[third] = max(holm[second], p_values[third])
    np.testing.assert_allclose(made["significance"]["p_adjusted"], holm, rtol=1e-9)
    scale = made["scale"].iloc[0]
    live = made["neuron_features"].set_index(["layer", "neuron"])[alive.repeat(3).to_numpy()]
    own = live.groupby(["layer", "neuron"])["score_inside"].max()
    assert scale["ks"] == pytest.approx(slow_ks(own.to_numpy(), live["score_inside"].to_numpy()), abs=1e-9)
    assert (scale["parameters"], scale["neurons"]) == (1234, 27)
    assert scale["own_score"] == pytest.approx(own.mean(), rel=1e-9)


def test_sample_is_seeded_and_of_live_neurons(monkeypatch):
    """Fewer than there are: the seed decides which; never a dead one."""
    monkeypatch.setattr(tables, "RANDOM_NEURONS", 12)
    labels = np.repeat([0, 1, 2], 6)
    z = activations(4, (6, 6, 6), neurons=40)[0]
    z[:, :, ::2] = 1.0
    found = [analysed([z], labels, 3, seed=seed)["scale"].iloc[0] for seed in (0, 0, 1)]
    assert found[0]["neurons"] == 12 and found[0].equals(found[1]) and found[0]["ks"] != found[2]["ks"]
    assert found[0]["own_score"] > 1  # a dead one counts 0


def test_layers_and_fkr(example):
    layers, labels, made = example
    fkr = made["fkr"].set_index(["layer", "share"])
    for layer, row in made["layers"].iterrows():
        z = layers[layer]
        own = slow_own(z, labels, 3)
        assert (row["layer"], row["depth"], row["neurons"]) == (layer, layer / 2, z.shape[2])
        assert row["dead_share"] == pytest.approx((own < 0).mean())
        assert row["kurtosis"] == pytest.approx(np.median(kurtosis(z)[own >= 0]))
        assert row["mean_s"] == pytest.approx(z.std(axis=(0, 1), ddof=1).mean(), rel=1e-5)
        assert row["own_score"] == pytest.approx(slow_scores(z, labels, 3)[0].max(axis=0)[own >= 0].mean(), rel=1e-5)
        for share in SHARES:
            tau, selected, false = slow_killing(z, labels, own, share)
            found = fkr.loc[(layer, share)]
            assert found["tau"] == pytest.approx(tau, rel=0.025)
            assert found["share_counted"] == pytest.approx(selected / z.size, rel=1e-9)
            assert abs(found["fkr"] - false / selected) <= found["fkr_error"] + 1e-12
        curve = fkr.loc[layer]["fkr"]
        assert row["suggested_share"] == curve.idxmin() and row["suggested_fkr"] == curve.min()
        assert row["suggested_share_low"] <= row["suggested_share_high"]
    together, scale = fkr.loc[-1], made["scale"].iloc[0]
    for share in SHARES:
        slow = [slow_killing(z, labels, slow_own(z, labels, 3), share) for z in layers]
        rate = sum(false for *_, false in slow) / sum(selected for _, selected, _ in slow)
        assert abs(together.loc[share, "fkr"] - rate) <= together.loc[share, "fkr_error"] + 1e-12
    assert together["tau"].isna().all()
    assert (scale["suggested_share"], scale["suggested_fkr"]) == (together["fkr"].idxmin(), together["fkr"].min())


def test_intervals_of_fkr(example):
    """Each resample's histogram of repeated texts; own features and scores are held."""
    layers, labels, made = example
    fkr = made["fkr"].set_index(["layer", "share"])
    weights = bootstrap.resample_weights(labels, RESAMPLES, 0).astype(int)
    curves = []
    for layer, z in enumerate(layers):
        histogram = slow_histogram(z, labels, slow_own(z, labels, 3))
        counts = [np.repeat(histogram, row, axis=0).sum(axis=0) for row in weights]
        curves.append([measures.false_killing(count, EDGES, SHARES, z.size) for count in counts])
        low, high = ends([curve.rate for curve in curves[-1]])
        np.testing.assert_allclose(fkr.loc[layer]["fkr_low"], low, rtol=1e-12)
        np.testing.assert_allclose(fkr.loc[layer]["fkr_high"], high, rtol=1e-12)
        shares = [SHARES[int(np.argmin(curve.rate))] for curve in curves[-1]]
        row = made["layers"].iloc[layer]
        assert [row["suggested_share_low"], row["suggested_share_high"]] == [min(shares), max(shares)]
        resamples = made["resamples"][made["resamples"]["layer"] == layer]
        assert resamples["suggested_share"].tolist() == shares
        np.testing.assert_allclose(resamples["fkr"], [curve.rate[SHARES.index(0.02)] for curve in curves[-1]])
    rates = [sum(c.false for c in group) / sum(c.selected for c in group) for group in zip(*curves, strict=True)]
    low, high = ends(rates)
    np.testing.assert_allclose(fkr.loc[-1]["fkr_low"], low, rtol=1e-12)
    np.testing.assert_allclose(fkr.loc[-1]["fkr_high"], high, rtol=1e-12)


def test_mapped_files_in_blocks(example, tmp_path, monkeypatch):
    """Arrays on disk, read a few neurons at a time, give the same tables."""
    layers, labels, made = example

    def mapped(array: np.ndarray, name: str) -> np.ndarray:
        array.tofile(tmp_path / name)
        return np.memmap(tmp_path / name, dtype=array.dtype, mode="r", shape=array.shape)

    monkeypatch.setattr(measures, "BLOCK_VALUES", 4 * len(labels) * 4)
    whole = [collected(z) for z in layers]
    parts = [(mapped(mean, f"{i}mean"), mapped(variance, f"{i}variance")) for i, (mean, variance) in enumerate(whole)]
    first = tables.first_tables(
        parts, labels, FEATURES[:3], tokens=layers[0].shape[1], parameters=1234, seed=0, resamples=RESAMPLES
    )
    counts = [
        tables.LayerCounts(mapped(slow_histogram(z, labels, own.own), f"histogram{i}"), kurtosis(z))
        for i, (z, own) in enumerate(zip(layers, first.own, strict=True))
    ]
    for name, table in tables.build_tables(first, counts, EDGES).items():
        pd.testing.assert_frame_equal(table, made[name], rtol=1e-9)


@pytest.fixture(scope="module")
def planted_model() -> tuple[tables.Tables, np.ndarray]:
    """Layer 0: twelve neurons for each of five features; layer 1: as many that answer to three features each."""
    one, labels = planted([(f,) for f in range(5)] * 12)
    three, _ = planted([(f, (f + 1) % 5, (f + 2) % 5) for f in range(5)] * 12, seed=1)
    return analysed([one, three], labels, 5), labels


def test_planted_neurons(planted_model):
    """Probing finds only neurons built for one feature, the right ones; own features are right; FKR near 0, and high
    where neurons answer to three; scores of the found are significantly above those of random neurons."""
    made, _ = planted_model
    for feature, rows in made["probes"].groupby("feature"):
        assert set(rows["layer"]) == {0} and set(rows["neuron"] % 5) == {FEATURES.index(feature)}
        assert set(rows["direction"]) == {1}
        assert np.all(rows["score_inside_low"] > rows["score_outside_high"])
    neurons = made["neurons"]
    right = neurons[neurons["layer"] == 0]
    assert right["own_feature"].tolist() == list(FEATURES) * 12
    fkr = made["fkr"][made["fkr"]["share"] <= 0.02]
    assert fkr[fkr["layer"] == 0]["fkr_high"].max() < 0.01
    assert fkr[fkr["layer"] == 1]["fkr_low"].min() > 0.4
    assert made["significance"]["p_adjusted"].max() < 1e-4 and made["significance"]["ratio_low"].min() > 1.5
    layers = made["layers"]
    assert layers["own_score_low"][0] > layers["own_score_high"][1]


def test_two_features_in_one_layer():
    z, labels = activations(5, (4, 6), neurons=3)
    made = analysed([z], labels, 2)
    assert made["layers"]["depth"].tolist() == [0.0]
    features = made["neuron_features"].set_index(["neuron", "feature"])
    for neuron in range(3):
        one, other = (features.loc[(neuron, name)] for name in FEATURES[:2])
        assert one["score_inside"] == pytest.approx(other["score_outside"], rel=1e-12)
    # three neurons are all probed: none is left to compare with
    assert made["significance"]["random"].tolist() == [0, 0] and made["significance"]["p_adjusted"].isna().all()
    assert made["probes"].groupby("feature")["place"].max().tolist() == [3, 3]


def test_a_dead_layer():
    """Its means over live neurons are NaN, all else is there."""
    z, labels = activations(6, (6, 6, 6), neurons=15)
    made = analysed([z, np.zeros_like(z)], labels, 3)
    row = made["layers"].iloc[1]
    assert row["dead_share"] == 1 and row["mean_s"] == 0
    assert row[["kurtosis", "own_score", "own_score_low", "suggested_share", "suggested_fkr"]].isna().all()
    assert set(made["probes"]["layer"]) == {0}
    assert made["fkr"].set_index("layer").loc[-1, "fkr"].notna().all()


def test_dead_neurons_only():
    z, labels = activations(7)
    with pytest.raises(ConfigError, match="no neuron of any layer varies"):
        tables.first_tables(
            [collected(np.ones_like(z))], labels, FEATURES[:3], tokens=7, parameters=1, seed=0, resamples=5
        )


def test_layer_change(example):
    """Differences of the tables' figures, and intervals of the differences of paired resamples."""
    layers, labels, before = example
    after_layers = [layers[0] * 0.5, layers[1] ** 3 / 10, layers[2]]
    after_layers = [z.astype(np.float32).astype(np.float64) for z in after_layers]
    after = analysed(after_layers, labels, 3)
    change = tables.layer_change(before, after)
    assert change["layer"].tolist() == [0, 1, 2]
    for name in ("kurtosis", "dead_share", "own_score", "mean_s", "suggested_share"):
        np.testing.assert_allclose(change[name], after["layers"][name] - before["layers"][name])
    for layer in range(3):
        fkr_before, fkr_after = (
            made["fkr"].set_index(["layer", "share"]).loc[(layer, 0.02), "fkr"] for made in (before, after)
        )
        assert change["fkr"][layer] == pytest.approx(fkr_after - fkr_before)
        for name in ("own_score", "mean_s", "suggested_share", "fkr"):
            old, new = (
                made["resamples"].loc[made["resamples"]["layer"] == layer, name].to_numpy() for made in (before, after)
            )
            low, high = ends(new - old)
            assert [change[f"{name}_low"][layer], change[f"{name}_high"][layer]] == pytest.approx([low, high])
        old, new = (slow_own(zs[layer], labels, 3) for zs in (layers, after_layers))
        both = (old >= 0) & (new >= 0)
        assert change["own_changed"][layer] == pytest.approx((old != new)[both].mean())
        old, new = (slow_scores(zs[layer], labels, 3)[0].max(axis=0)[both] for zs in (layers, after_layers))
        assert change["own_correlation"][layer] == pytest.approx(np.corrcoef(old, new)[0, 1], rel=1e-3)
    # halved activations: S is halved, no score moves; an unchanged layer changes in nothing, interval and all
    assert change["mean_s"][0] == pytest.approx(-before["layers"]["mean_s"][0] / 2, rel=1e-6)
    assert change["own_score"][0] == pytest.approx(0, abs=1e-6) and change["own_changed"][0] == 0
    unchanged = change.iloc[2].drop(["layer", "own_correlation"])
    assert np.all(unchanged == 0) and change["own_correlation"][2] == pytest.approx(1)
