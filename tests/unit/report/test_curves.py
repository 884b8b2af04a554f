"""What the charts show, and that they can stand in one page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from l2e_ds.report import curves, runs
from l2e_ds.report.drawing import Axis, Line, Look, draw, five_digits, readings
from tests.unit.report.making import add_results, paired_study, write_run

ALL = ["training-loss", "held-out-loss", "observed-share", "tau", "selected-score", "training-mean-s", "top-score",
       "mean-s", "kurtosis", "gradient-norm", "speed"]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def charts_of(*folders):
    return {chart.name: chart for chart in curves.all_charts(runs.read(folders))}


def coloured(chart):
    """Colours of its lines, in the order of drawing; not of grid, frame and marks."""
    return [c.lower() for c in re.findall(r"stroke: (#\w+|var\(--ink\)); stroke-width: (?:1\.4|0\.9)", chart.svg)]


def words(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_one_run(tmp_path):
    found = charts_of(write_run(tmp_path / "l2e"))
    assert list(found) == ALL
    assert len(coloured(found["tau"])) == 2  # a line for each layer
    assert found["tau"].about == "Threshold tau, MS, over steps: layer 2 4.98 to 4; layer 3 4.98 to 4"
    assert found["observed-share"].about.endswith("layer 2 2 to 2; layer 3 2 to 2")  # per cent
    assert found["training-loss"].about.endswith("l2e 7.94 to 5")


def test_layer_gradients(tmp_path):
    """A line for each layer of a single run, in the layers' order, and one for the other parameters behind them."""
    run = write_run(tmp_path / "l2e", logging__layer_gradients=True)
    chart = charts_of(run)["layer-gradients"]
    names = ["other parameters", *(f"layer {layer}" for layer in range(12))]
    assert re.findall(r"[:;] (\D+\d*) \S+ to", chart.about) == names[:12]
    colours = coloured(chart)
    assert len(set(colours)) == len(names) and (colours[1], colours[-1]) == ("#0072b2", "#d55e00")
    assert "layer-gradients" not in charts_of(run, write_run(tmp_path / "other", logging__layer_gradients=True))


def test_baseline_has_no_threshold(tmp_path):
    found = charts_of(write_run(tmp_path / "none", "none"))
    assert [name for name in ALL if name not in found] == ["observed-share", "tau", "selected-score", "training-mean-s"]


def test_top_k_selects_without_a_threshold(tmp_path):
    found = charts_of(write_run(tmp_path / "memel", "memel"), write_run(tmp_path / "l2e"))
    assert len(coloured(found["tau"])) == 1
    assert len(coloured(found["selected-score"])) == 2


def test_study(tmp_path):
    page = runs.read([paired_study(tmp_path / "study", ("70m", "410m"))])
    looks = curves.looks(page.variants)
    assert [variant.name for variant in page.variants] == ["70m none", "70m l2e", "410m none", "410m l2e"]
    assert [look.colour for look in looks[:2]] == [look.colour for look in looks[2:]]
    assert looks[0].colour != looks[1].colour
    assert len({look.dash for look in looks[:2]}) == len({look.dash for look in looks[2:]}) == 1
    assert looks[0].dash != looks[2].dash
    found = {chart.name: chart for chart in curves.all_charts(page)}
    assert list(found) == [*ALL[:2], "loss-difference", *ALL[2:]]
    assert len(coloured(found["held-out-loss"])) == 8
    assert len(coloured(found["loss-difference"])) == 4
    assert "70m-l2e-seed1235 -0.2 to -0.2" in found["loss-difference"].about
    assert found["mean-s"].note.endswith("Mean over layers.")


def test_many_variants_are_told_apart(tmp_path):
    page = runs.read([write_run(tmp_path / f"run{i}", inhibition__target_share=0.01 * (i + 1)) for i in range(11)])
    assert len(set(curves.looks(page.variants))) == 11


def test_mixture(tmp_path):
    sets = [{"name": name, "weight": 1.0, "source": "stdlib"} for name in ("prose", "code")]
    data = {"data__sets": sets, "data__source": None, "data__train_tokenizer": None, "data__tokenizer": "t.json"}
    found = charts_of(write_run(tmp_path / "l2e", **data))
    assert [found[name].title for name in ("set-0", "set-1")] == [
        "LM loss, held-out text of prose",
        "LM loss, held-out text of code",
    ]
    assert found["set-0"].about.endswith("l2e 13 to 10")


def test_texts(tmp_path):
    found = charts_of(write_run(tmp_path / "l2e", evaluation__texts=[{"name": "own", "source": "stdlib"}]))
    assert found["text-0"].title == "LM loss, own" and found["text-0"].about.endswith("l2e 9 to 6")


def test_tasks_that_were_evaluated_on_the_way(tmp_path):
    run = write_run(tmp_path / "l2e")
    add_results(run, 50, {("mmlu", 0): (0.21, 0.01)})
    add_results(run, 100, {("mmlu", 0): (0.22, 0.01), ("piqa", 0): (0.5, 0.01)})
    found = charts_of(run)
    assert [chart.title for name, chart in found.items() if name.startswith("task")] == ["MMLU, 0-shot"]
    assert found["task-0"].about.endswith("l2e 0.21 to 0.22")


def test_a_line_is_of_equally_many_documents(tmp_path):
    """Earlier results are of the first 20 documents, the last is of all."""
    run = write_run(tmp_path / "l2e")
    for step, accuracy in ((50, 0.21), (100, 0.22)):
        add_results(run, step, {("mmlu", 0): (accuracy, 0.01)}, limit=20)
    add_results(run, 100, {("mmlu", 0): (0.4, 0.01)})
    chart = charts_of(run)["task-0"]
    assert chart.about.endswith("l2e 0.21 to 0.22")
    assert chart.note == "Evaluation task, its first 20 documents."


def test_neurons_that_die(tmp_path):
    assert "dead-share" in charts_of(write_run(tmp_path / "l2e", dead=0.1))


def test_steps_of_two_sizes_are_compared_over_tokens(tmp_path):
    page = runs.read([write_run(tmp_path / "a"), write_run(tmp_path / "b", training__global_batch=32)])
    assert curves.axis_of(page.runs) == Axis("tokens", 100 * 32 * 256)
    chart = curves.all_charts(page)[0]
    assert "over tokens" in chart.about
    assert "tokens" in words(chart.svg)


# --- drawings ----------------------------------------------------------------------------------------------------


def test_drawings_stand_in_one_page(tmp_path):
    """Well-formed, without a size of their own, and no id twice; nothing refers to an id that is not there."""
    charts = curves.all_charts(runs.read([paired_study(tmp_path / "study")]))
    ids = []
    for chart in charts:
        root = ElementTree.fromstring(chart.svg)
        own = [element.get("id") for element in root.iter() if element.get("id")]
        assert all(name.startswith(f"{chart.name}-") for name in own)
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', chart.svg)) <= set(own)
        assert root.get("viewBox") == "0 0 259.2 165.6"
        assert root.get("width") is None
        assert not list(root.iter(f"{SVG}style"))
        ids += own
    assert len(ids) == len(set(ids))


def ticks(svg):
    return [float(text.replace("−", "-")) for text in words(svg) if re.fullmatch(r"−?[\d.]+", text)]


@pytest.mark.parametrize("low, high", [(0.24, 0.36), (0.1, 0.4), (2.0, 20.0), (1e-4, 3.0)])
def test_logarithmic_heights_have_ticks(low, high):
    line = Line("a", Look("#000000"), np.array([0.0, 1000.0]), np.array([low, high]))
    heights = [tick for tick in ticks(draw("x", "MS", [line], Axis("step", 1000), log=True)) if tick < 100]
    assert len([tick for tick in heights if 0.9 * low < tick < 1.1 * high]) >= 3


def test_zero_has_no_logarithm():
    line = Line("a", Look("#000000"), np.array([0.0, 10.0]), np.array([0.0, 1.0]))
    assert {0.0, 0.25, 0.75} <= set(ticks(draw("x", "MS", [line], Axis("step", 10), log=True)))


def test_long_lines_are_thinned():
    """100,000 points: the drawing is small."""
    y = np.random.default_rng(0).normal(5.0, 1.0, 100_000)
    line = Line("a", Look("#123456"), np.arange(100_000.0), y)
    svg = draw("x", "MS", [line], Axis("step", 100_000))
    assert len(svg) < 80_000


def test_beginning_of_a_long_loss_is_cut():
    x = np.arange(1000.0)
    line = Line("a", Look("#123456"), x, 3 + 8 * np.exp(-x / 10))
    full = draw("x", "nats/token", [line], Axis("step", 1000))
    cut = draw("x", "nats/token", [line], Axis("step", 1000), crop=True)
    assert max(tick for tick in ticks(full) if tick < 200) >= 10
    assert max(tick for tick in ticks(cut) if tick < 200) < 4


# --- on a dark screen --------------------------------------------------------------------------------------------


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_can_be_seen_on_white_and_on_black(tmp_path):
    """A drawing has no colour but those that stand out on either, and those that the page chooses."""
    folders = [write_run(tmp_path / f"run{i}", inhibition__target_share=0.01 * (i + 1)) for i in range(8)]
    drawn = set()
    for chart in curves.all_charts(runs.read([*folders, write_run(tmp_path / "none", "none")])):
        drawn |= set(re.findall(r"(?:stroke|fill): ([^;\"]+)", chart.svg))
    fixed = {colour for colour in drawn if colour.startswith("#")}
    assert drawn - fixed == {"none", "var(--ink)", "var(--quiet)", "var(--line)"}
    assert len(fixed) == 9  # eight treatments, and the frame
    for colour in fixed:
        assert (luminance("#ffffff") + 0.05) / (luminance(colour) + 0.05) > 2, colour
        assert (luminance(colour) + 0.05) / (luminance("#141416") + 0.05) > 3, colour


# --- where the pointer is ----------------------------------------------------------------------------------------


def a_line(name, x, y):
    return Line(name, Look("#123456"), np.array(x, dtype=float), np.array(y, dtype=float))


def test_readings_are_the_values_at_each_step():
    lines = [a_line("a", [0, 10, 20], [3.0, 2.0, 1.0]), a_line("b", [10, 20], [5.0, 4.0])]
    found = readings(lines, Axis("step", 20))
    assert [one.x for one in found] == [0, 10, 20]
    assert [[(line.name, x, y) for line, x, y in one.values] for one in found] == [
        [("a", 0, 3.0)],
        [("a", 10, 2.0), ("b", 10, 5.0)],
        [("a", 20, 1.0), ("b", 20, 4.0)],
    ]
    assert (found[0].left, found[-1].right) == (0, pytest.approx(100))
    assert [one.right for one in found[:-1]] == [one.left for one in found[1:]]
    # the axis is from -0.4 to 20.4: step 10 lies in the middle, and its strip ends half way to the next
    assert found[1].at == pytest.approx(50)
    assert (found[1].left, found[1].right) == (pytest.approx(100 * 5.4 / 20.8), pytest.approx(100 * 15.4 / 20.8))


def test_readings_of_long_lines_are_their_own_values():
    """Not means of neighbours, as the drawing shows; few enough for a page; a step of another line is named."""
    x = np.arange(10_000.0)
    lines = [a_line("a", x[::2], np.sin(x[::2])), a_line("b", x[1::7], np.cos(x[1::7]))]
    found = readings(lines, Axis("step", 9999))
    assert len(found) == 50
    assert {len(one.values) for one in found[1:-1]} == {2}
    for one in found:
        for line, at, value in one.values:
            assert value == (np.sin if line.name == "a" else np.cos)(at)
            assert abs(at - one.x) == np.abs(line.x - one.x).min()


def test_readings_of_many_lines_stay_few():
    many = [a_line(f"run{i}", range(1000), range(1000)) for i in range(40)]
    assert sum(len(one.values) for one in readings(many, Axis("step", 999))) == 15 * 40


def test_reading_of_one_point():
    (one,) = readings([a_line("a", [0], [3.0])], Axis("step", 0))
    assert (one.left, one.at, one.right) == (0, 0, pytest.approx(100))


@pytest.mark.parametrize(
    "value, text",
    [
        (5.12345678, "5.1235"),
        (-0.25, "−0.25"),
        (123456.7, "123,457"),
        (9999.96, "10000"),
        (1.5e-7, "1.5e−07"),
        (0, "0"),
    ],
)
def test_five_digits(value, text):
    assert five_digits(value) == text
