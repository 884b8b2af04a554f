"""Figures of made-up but lifelike tables: what is drawn, what is written, and that it can be read."""

import numpy as np
import pandas as pd

SHARES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
LANGUAGES = [
    "Bulgarian",
    "Czech",
    "Danish",
    "Dutch",
    "English",
    "Finnish",
    "French",
    "German",
    "Greek",
    "Hungarian",
    "Italian",
    "Polish",
]
PYTHIA = {
    "pythia-70m": (70_426_624, 6),
    "pythia-410m": (405_334_016, 24),
    "pythia-1.4b": (1_414_647_808, 24),
    "pythia-6.9b": (6_857_302_016, 32),
}
ABOUT = {"name": "Natural language (Europarl)", "features": 12, "texts": 2400, "tokens": 307_200}


def with_interval(table, column, width=0.08):
    low, high = table[column] * (1 - width), table[column] * (1 + width)
    return table.assign(**{f"{column}_low": low, f"{column}_high": high})


def tables_of(seed, parameters=70_426_624, layers=6, features=LANGUAGES, neurons=64):
    """As the analysis writes them."""
    random = np.random.default_rng(seed)
    depth = np.arange(layers) / max(layers - 1, 1)
    shrink = 1 / np.log10(parameters)
    of_neuron = pd.DataFrame(
        {"layer": np.repeat(np.arange(layers), neurons), "neuron": np.tile(np.arange(neurons), layers)}
    ).assign(mean=0.05, s=0.2, kurtosis=9.0, alive=True, own_feature=features[0])
    of_neuron["own_score"] = random.gamma(2, 1, len(of_neuron)) + 1
    pairs = of_neuron[["layer", "neuron"]].merge(pd.DataFrame({"feature": features}), how="cross")
    pairs["score_inside"] = random.gamma(2, 0.6, len(pairs))
    probes, significance, distributions = [], [], []
    for number, feature in enumerate(features):
        for place in range(1, 11):
            score = random.gamma(4, 2) + 1
            probes.append(
                {
                    "feature": feature,
                    "place": place,
                    "layer": (number + place) % layers,
                    "neuron": number % neurons,
                    "direction": 1,
                    "f1_train": 0.99 - 0.03 * place - 0.001 * number,
                    "score_inside": score,
                }
            )
        mean = float(np.mean([one["score_inside"] for one in probes[-10:]]))
        significance.append(
            {
                "feature": feature,
                "monosemantic_score": mean,
                "random_score": 1 + 0.1 * random.random(),
                "ratio": mean / 1.05,
                "ratio_low": mean / 1.3,
                "ratio_high": mean,
                "u": 1.0,
                "p_value": 1e-6,
                "p_adjusted": [1e-5, 0.02, 0.3][number % 3 if number > 8 else 0],
                "monosemantic": 10,
                "random": 1000,
            }
        )
        edges = np.linspace(-0.2, 4 + number % 3, 61)
        for other, name in enumerate(features):
            samples = np.concatenate([random.normal(0, 0.1, 4000), random.exponential(0.3, 800)])
            if name == feature:
                samples = np.concatenate([samples, random.normal(2.2, 0.6, 3000)])
            elif other == (number + 1) % len(features):
                samples = np.concatenate([samples, random.normal(1.2, 0.5, 600)])
            count, _ = np.histogram(samples, edges)
            distributions.append(
                pd.DataFrame(
                    {
                        "probe_feature": feature,
                        "layer": (number + 1) % layers,
                        "neuron": number % neurons,
                        "feature": name,
                        "left": edges[:-1],
                        "right": edges[1:],
                        "count": count,
                    }
                )
            )
            of_this = (pairs["layer"] == (number + 1) % layers) & (pairs["neuron"] == number % neurons)
            pairs.loc[of_this & (pairs["feature"] == name), "score_inside"] = np.mean((samples - 0.2) ** 2) / 0.25
    share = np.array(SHARES)
    rates = [
        pd.DataFrame(
            {
                "layer": layer,
                "share": share,
                "tau": 8.0,
                "share_counted": share,
                "fkr": 0.2
                + 0.3 * (1 - shrink) * height
                + 0.05 * np.log(share / 0.02) ** 2 / 4
                + 0.01 * random.random(),
            }
        )
        for layer, height in [(-1, 0.5), *enumerate(np.sin(np.pi * (0.1 + 0.8 * depth)))]
    ]
    by_layer = pd.DataFrame(
        {
            "layer": np.arange(layers),
            "depth": depth,
            "neurons": neurons,
            "dead_share": 0.01 * depth,
            "kurtosis": 6 + 8 * depth,
            "mean_s": 0.3 - 0.2 * depth,
            "own_score": 1.5 + 20 * shrink * np.exp(-((depth - 0.2) ** 2)),
            "suggested_share": 0.02,
            "suggested_share_low": 0.01,
            "suggested_share_high": 0.03,
            "suggested_fkr": 0.2,
        }
    )
    scale = pd.DataFrame([{"parameters": parameters, "neurons": 1000, "ks": 4 * shrink, "own_score": 2 + 10 * shrink}])
    return {
        "neurons": of_neuron,
        "neuron_features": pairs,
        "probes": with_interval(pd.DataFrame(probes), "score_inside"),
        "significance": pd.DataFrame(significance),
        "scale": with_interval(with_interval(scale, "ks"), "own_score"),
        "layers": with_interval(by_layer, "own_score"),
        "fkr": with_interval(pd.concat(rates), "fkr"),
        "distributions": pd.concat(distributions),
    }


def models(count=4):
    return {label: tables_of(seed, *size) for seed, (label, size) in enumerate(list(PYTHIA.items())[:count])}


def a_run(layers=6):
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 14001, 1000)]
    run = []
    for step in steps:
        tables = tables_of(step, layers=layers, features=LANGUAGES[:2])
        for number, column in enumerate(("own_score", "mean_s", "kurtosis", "dead_share")):
            tables["layers"][column] *= 1 + (-1) ** number * 0.08 * np.log1p(step)
        run.append((step, tables))
    return run
