"""Figures of made-up but lifelike tables: what is drawn, what is written, and that it can be read."""

import struct
import subprocess
import sys
import warnings
from functools import cache
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest

from l2e_ds.analysis import drawing, figures
from l2e_ds.analysis.figures import write_figures
from tests.processes import REPOSITORY

SHARES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2]
LANGUAGES = (
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
)
PYTHIA = {
    "pythia-70m": (70_426_624, 6),
    "pythia-410m": (405_334_016, 24),
    "pythia-1.4b": (1_414_647_808, 24),
    "pythia-6.9b": (6_857_302_016, 32),
}
TRENDS = {"own_score": 1, "mean_s": -1, "kurtosis": 1, "dead_share": -1}
ABOUT = {"name": "Natural language (Europarl)", "features": 12, "texts": [2400, 2376], "tokens": [307_200, 304_128]}


def with_interval(table, column, width=0.08):
    low, high = table[column] * (1 - width), table[column] * (1 + width)
    return table.assign(**{f"{column}_low": low, f"{column}_high": high})


@cache
def tables_of(seed, parameters=70_426_624, layers=6, features=LANGUAGES, neurons=64):
    """Return tables as the analysis writes them."""
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
        tables = dict(tables_of(step % 3, layers=layers, features=LANGUAGES[:2]))
        trend = {column: 1 + sign * 0.08 * np.log1p(step) for column, sign in TRENDS.items()}
        tables["layers"] = tables["layers"].assign(**{name: tables["layers"][name] * of for name, of in trend.items()})
        run.append((step, tables))
    return run


@pytest.fixture(autouse=True)
def no_warning():
    """No missing glyph, no layout that does not fit, no log of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def words_of(path):
    """All text of an SVG, in one line."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    return " ".join(" ".join(texts).split())


def lines_of(axes):
    """{label: [x, y]}, without those that stand for something only in a legend."""
    return {line.get_label(): line.get_xydata().T for line in axes.get_lines() if len(line.get_xdata())}


def texts_of(figure):
    """All that is drawn, and the places in pixels [texts, 4]: left, bottom, right, top."""
    figure.canvas.draw()
    hidden = set()  # of ticks outside the limits nothing is drawn
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            hidden.update(() if axes.axison else [axis.label])
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not axes.axison or not min(limits) <= tick.get_loc() <= max(limits):
                    hidden.update((tick.label1, tick.label2))
    found = [one for one in figure.findobj(matplotlib.text.Text) if one.get_text().strip() and one.get_visible()]
    found = [one for one in found if one not in hidden]
    return [one.get_text() for one in found], np.array([one.get_window_extent().extents for one in found])


# --- what is written --------------------------------------------------------------------------------------------


def test_files_of_one_model(tmp_path):
    results = {"pythia-70m": tables_of(0, features=LANGUAGES[:3])}
    about = ABOUT | {"features": 3}
    paths = write_figures(results, about, tmp_path / "figures", a_run()[::6])
    names = ["distributions", "monosemantic_vs_random", "ks_over_scale", "own_score_over_layers", "fkr_over_share"]
    names += ["fkr_over_layers", "over_time"]
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir())  # and nothing half-written
    for png, svg in zip(paths[::2], paths[1::2], strict=True):
        content = png.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
        size = ElementTree.parse(svg).getroot().attrib["viewBox"].split()[2:]  # points
        pixels = struct.unpack(">II", content[16:24])
        assert pixels == pytest.approx([float(one) / 72 * 150 for one in size], abs=1.5)
        assert min(pixels) > 500
        words = words_of(svg)
        assert "Natural language (Europarl), 3 features, n = 2,376 to 2,400 texts, 304,128 to 307,200 tokens" in words
        assert "neurons" in words
    words = {path.stem: words_of(path) for path in paths[1::2]}
    assert "What the best neuron for each feature responds to, pythia-70m" in words["distributions"]
    assert "Bulgarian, MS" in words["distributions"] and "1 more feature" in words["distributions"]
    assert "10 monosemantic and 1,000 random neurons" in words["monosemantic_vs_random"]
    assert "p < 0.001" in words["monosemantic_vs_random"]
    assert "Kolmogorov-Smirnov" in words["ks_over_scale"] and "1,000 sampled neurons" in words["ks_over_scale"]
    for name in names[1:6]:
        assert "pythia-70m" in words[name] and "95 % bootstrap intervals over texts" in words[name]
    assert "lowest at 2 %" in words["fkr_over_share"] and "would give about 66.7 %" in words["fkr_over_share"]
    assert "k = 1 %" in words["fkr_over_layers"] and "384 neurons" in words["fkr_over_layers"]
    assert "5 checkpoints, steps 0 to 14,000" in words["over_time"] and "layer 5" in words["over_time"]


@pytest.mark.full
def test_files_of_several_models_and_of_empty_tables(tmp_path):
    small = tables_of(0, features=LANGUAGES[:2])
    empty = small | {name: small[name].iloc[:0] for name in ("distributions", "significance", "probes")}
    paths = write_figures({"hub/a@step 1": small, "hub/a@step-1": small, "b": empty}, ABOUT, tmp_path)
    assert [path.name for path in paths[::2]] == [
        "distributions_1_hub-a-step-1.png",
        "distributions_2_hub-a-step-1.png",
        "monosemantic_vs_random.png",
        "ks_over_scale.png",
        "own_score_over_layers.png",
        "fkr_over_share.png",
        "fkr_over_layers.png",
    ]
    assert "b" not in words_of(tmp_path / "monosemantic_vs_random.svg").split()
    words = words_of(tmp_path / "ks_over_scale.svg")
    assert "hub/a@step 1" in words and "hub/a@step-1" in words


def test_the_same_tables_give_the_same_bytes(tmp_path):
    once, again = (
        drawing.save(figures.ks_over_scale({"m": tables_of(0)}, ABOUT), tmp_path / name) for name in ("a", "b")
    )
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


@pytest.mark.full
def test_leaves_the_process_as_it_was(tmp_path):
    """No pyplot, no settings of its own left behind, none of the user's taken over."""
    (tmp_path / "matplotlibrc").write_text("backend: TkAgg\nfigure.facecolor: red\ntext.usetex: True\n")
    script = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams.copy())\n"
        "from l2e_ds.analysis.drawing import svg_of; import pandas as pd\n"
        "from l2e_ds.analysis.figures import neuron_distribution\n"
        "table = pd.DataFrame({'feature': ['a', 'b'], 'left': 0.0, 'right': 1.0, 'count': [2, 3]})\n"
        "figure = neuron_distribution(table, 'a', {'a': 2.0, 'b': 1.0}); text = svg_of(figure)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and dict(matplotlib.rcParams.copy()) == before\n"
        "assert figure.get_facecolor() == (1, 1, 1, 1) and 'a, MS 2' in text"
    )
    environment = {"MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "DISPLAY": "", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what is drawn ----------------------------------------------------------------------------------------------


def test_distributions_are_densities_of_the_table():
    tables = tables_of(1, features=LANGUAGES[:4])
    figure = figures.feature_distributions("m", tables, ABOUT)
    table = tables["distributions"]
    for panel, feature in zip(figure.axes, LANGUAGES[:4], strict=False):  # in order of F1, as tables_of has it
        lines = lines_of(panel)
        scores = tables["neuron_features"].merge(table.query("probe_feature == @feature").iloc[:1][["layer", "neuron"]])
        scores = scores.set_index("feature")["score_inside"]
        runner_up = scores.drop(feature).idxmax()
        assert panel.get_lines()[0].get_label() == f"{feature}, MS {scores[feature]:.3g}"
        assert panel.get_lines()[1].get_label() == f"{runner_up}, MS {scores[runner_up]:.3g}"
        assert len(lines) == 4
        assert panel.get_legend().get_title().get_text() == f"layer {LANGUAGES.index(feature) + 1}, " + (
            f"neuron {LANGUAGES.index(feature)}"
        )
        x, y = lines[f"{feature}, MS {scores[feature]:.3g}"]
        bins = table.query("probe_feature == @feature and feature == @feature")
        np.testing.assert_allclose(x, (bins["left"] + bins["right"]) / 2)
        counts = bins["count"].to_numpy()
        assert np.isnan(y[counts == 0]).all()
        np.testing.assert_allclose(
            y[counts > 0], counts[counts > 0] / counts.sum() / (bins["right"] - bins["left"])[counts > 0]
        )
        assert np.nansum(y * (bins["right"] - bins["left"])) == pytest.approx(1)


def test_monosemantic_and_random_scores_are_those_of_the_table():
    results = {"a": tables_of(1), "b": tables_of(2)}
    figure = figures.monosemantic_vs_random(results, ABOUT)
    for panel, tables in zip(figure.axes, results.values(), strict=True):
        rows = tables["significance"]
        by_label = {}
        for line in panel.get_lines():
            by_label.setdefault(line.get_label(), []).append(line)
        np.testing.assert_array_equal([one.get_xdata()[0] for one in by_label["_probed"]], rows["monosemantic_score"])
        hollow = [one.get_markerfacecolor() == "white" for one in by_label["_probed"]]
        assert hollow == list(rows["p_adjusted"] >= 0.05) and 0 < sum(hollow) < 12
        np.testing.assert_array_equal(by_label["_random"][0].get_xdata(), rows["random_score"])
        for line, feature in zip(by_label["_each"], LANGUAGES, strict=True):
            each = tables["probes"].loc[tables["probes"]["feature"] == feature, "score_inside"]
            np.testing.assert_array_equal(line.get_xdata(), each)
        assert [one.get_text() for one in panel.get_yticklabels()] == list(LANGUAGES)
        first = rows.iloc[0]
        assert panel.texts[0].get_text() == (
            f"{first['ratio']:.3g}x ({first['ratio_low']:.3g} to {first['ratio_high']:.3g}), p < 0.001"
        )
        spans = np.concatenate([one.get_segments() for one in panel.collections])[:, :, 0]
        np.testing.assert_array_equal(spans, tables["probes"][["score_inside_low", "score_inside_high"]])


@pytest.mark.parametrize("count", [1, 4])
def test_points_and_intervals_over_scale(count):
    results = models(count)
    panels = [
        (figures.ks_over_scale(results, ABOUT).axes[0], "scale", "ks"),
        (figures.own_score_over_layers(results, ABOUT).axes[1], "scale", "own_score"),
        (figures.fkr_over_share(results, ABOUT).axes[1], "fkr", "fkr"),
    ]
    for panel, table, column in panels:
        lines = lines_of(panel)
        segments = [one.get_segments()[0] for one in panel.collections]
        for (label, tables), ((x, low), (_, high)) in zip(results.items(), segments, strict=True):
            row = tables[table].iloc[0]
            if table == "fkr":
                row = tables["fkr"].query("layer == -1 and share == 0.02").iloc[0]
            assert lines[label].ravel().tolist() == [tables["scale"]["parameters"].iloc[0], row[column]]
            assert (x, low, high) == (lines[label][0, 0], row[f"{column}_low"], row[f"{column}_high"])
        # one family: joined by a line, from two models on
        assert ("_family" in lines) == (count > 1)
        left, right = panel.get_xlim()
        assert left < min(PYTHIA.values())[0] < right / 2 and panel.get_xscale() == "log"


def test_models_of_one_size():
    sizes = {"runs/base": 7e7, "runs/l2e": 7e7, "gpt2": 1.2e8, "pythia-1b": 1e9, "pythia-70m": 7e7}
    results = {label: tables_of(0, int(size), features=LANGUAGES[:2]) for label, size in sizes.items()}
    panel = figures.ks_over_scale(results, ABOUT).axes[0]
    lines = lines_of(panel)
    assert [lines[label][0, 0] for label in sizes] == list(sizes.values())
    # those of one size side by side around their place, the others at it
    drawn = {line.get_label(): line for line in panel.get_lines()}
    true = panel.transData.transform([(size, 0) for size in sizes.values()])[:, 0]
    aside = [drawn[label].get_transform().transform((size, 0))[0] for label, size in sizes.items()] - true
    assert aside[0] < aside[1] < aside[4] and aside[[0, 1, 4]].sum() == pytest.approx(0, abs=1e-6)
    assert aside[[2, 3]].tolist() == pytest.approx([0, 0], abs=1e-6)
    spans = [
        one.get_transform().transform((size, 0))[0] for one, size in zip(panel.collections, sizes.values(), strict=True)
    ]
    np.testing.assert_allclose(spans, true + aside)
    assert "side by side" in panel.get_xlabel()


def test_lines_over_layers_and_share():
    results = models(2)
    own, fkr, layers = (
        figures.own_score_over_layers(results, ABOUT).axes[0],
        figures.fkr_over_share(results, ABOUT).axes[0],
        figures.fkr_over_layers(results, ABOUT).axes,
    )
    for place, (label, tables) in enumerate(results.items()):
        np.testing.assert_array_equal(lines_of(own)[label], tables["layers"][["depth", "own_score"]].T)
        together = tables["fkr"].query("layer == -1")
        np.testing.assert_array_equal(lines_of(fkr)[label], together[["share", "fkr"]].T)
        stars = [line for line in fkr.get_lines() if line.get_marker() == "*"]
        least = together["fkr"].argmin()
        assert stars[place].get_xydata().tolist() == [together[["share", "fkr"]].iloc[least].tolist()]
        band = own.collections[place].get_paths()[0].get_extents()
        assert band.ymin == tables["layers"]["own_score_low"].min()
        assert band.ymax == tables["layers"]["own_score_high"].max()
        for panel, share in zip(layers, (0.01, 0.02, 0.05), strict=True):
            rates = tables["fkr"]
            expected = rates.loc[(rates["layer"] >= 0) & (rates["share"] == share), "fkr"]
            np.testing.assert_array_equal(lines_of(panel)[label], [tables["layers"]["depth"], expected])
    assert fkr.get_xscale() == "log"


def test_lines_over_time():
    run = a_run()
    panels = figures.over_time(run[::-1], ABOUT).axes  # sorted by step
    for panel, column in zip(panels, ("own_score", None, "mean_s", "kurtosis", "dead_share"), strict=False):
        lines = lines_of(panel)
        assert panel.get_xscale() == "symlog" and len(lines) == 6
        for layer in range(6):
            x, y = lines[f"layer {layer}"]
            assert x.tolist() == [step for step, _ in run]
            if column is None:
                rates = [tables["fkr"][tables["fkr"]["share"] == 0.02] for _, tables in run]
                expected = [at_two.loc[at_two["layer"] == layer, "fkr"].item() for at_two in rates]
            else:
                expected = [tables["layers"][column][layer] for _, tables in run]
            np.testing.assert_array_equal(y, expected)
    assert figures.over_time(run[12:15], ABOUT).axes[0].get_xscale() == "linear"
    many = figures.over_time(a_run(layers=36)[::8], ABOUT)
    assert len(lines_of(many.axes[0])) == 36
    legend = [one.get_text() for one in many.axes[5].get_legend().get_texts()]
    assert len(legend) == 10 and legend[0] == "layer 0" and legend[-1] == "layer 35"


@pytest.mark.full
def test_dead_layers():
    tables = tables_of(0, features=LANGUAGES[:2])
    for name in ("layers", "fkr", "scale"):
        columns = [one for one in tables[name] if one.startswith(("own_score", "fkr", "ks", "kurtosis", "suggested"))]
        tables[name] = tables[name].assign(**dict.fromkeys(columns, np.nan))
    for draw in (figures.ks_over_scale, figures.own_score_over_layers, figures.fkr_over_share, figures.fkr_over_layers):
        draw({"died": tables}, ABOUT).canvas.draw()
    figures.over_time([(5, tables)], ABOUT).canvas.draw()


# --- whether it can be read -------------------------------------------------------------------------------------

NAMES = ("$x_{}$ Pile: Stack Exchange questions and answers of all sites", "\u4e2d\u6587", "\u202eevil", *LANGUAGES[:9])
LABELS = {f"EleutherAI/pythia-{size}m-deduped@step143000": size for size in (14, 31, 70, 160, 410, 1000)}
LABELS |= {
    "gpt2": 124,
    "runs/baseline of a very long name that goes on": 70,
    "runs/l2e": 70,
    "Qwen/Qwen2.5-14B": 14_000,
}


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize(
    "draw",
    [
        "monosemantic_vs_random",
        "ks_over_scale",
        "own_score_over_layers",
        "fkr_over_share",
        "fkr_over_layers",
        "over_time",
    ],
)
def test_no_text_is_clipped_or_overlaps(draw, count):
    if draw == "over_time":
        figure = figures.over_time(a_run(36 if count > 1 else 1)[: count + 5], ABOUT)
    else:
        chosen = list(LABELS.items())[:count]
        features = NAMES[: 12 // count + 2] if draw == "monosemantic_vs_random" else LANGUAGES[:2]
        results = {label: tables_of(size, size * 10**6, 6, features, 16) for label, size in chosen}
        figure = getattr(figures, draw)(results, ABOUT)
    assert_readable(figure)


@pytest.mark.full
def test_no_text_of_distributions_is_clipped_or_overlaps():
    assert_readable(figures.feature_distributions(next(iter(LABELS)), tables_of(0, features=NAMES), ABOUT))


def assert_readable(figure):
    texts, places = texts_of(figure)
    assert len(texts) > 10
    assert places[:, :2].min() >= 0 and (places[:, 2:] <= figure.bbox.size).all()
    low = np.maximum(places[:, None, :2], places[None, :, :2])
    high = np.minimum(places[:, None, 2:], places[None, :, 2:])
    overlapping = np.triu((high - low > [1, 1.5]).all(-1), k=1)  # a pixel or so is no touch
    assert not overlapping.any(), [(texts[i], texts[j]) for i, j in np.argwhere(overlapping)]
