"""`l2e-ds report` and the page of `l2e-ds neuron` in a real browser, as wide as a phone and as a laptop.

Fails where there is no Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from l2e_ds.analysis.neuron import write_neuron_page
from l2e_ds.cli import main
from l2e_ds.data.tokenizer import train_tokenizer
from tests.integration.running import Launch
from tests.unit.report.making import add_results, paired_study, write_analysis, write_run

WIDTHS = (390, 1440)
SMALLEST = 9.0  # px, of letters in charts
LEAST_CONTRAST = 4.5  # of letters and what is behind them, as in WCAG 2 (AA)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found is not None, "no Chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page, and everything that it asked for or complained of."""

    def __init__(self, browser: Browser, path: Path, width: int, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def check(self, path: Path) -> None:
        """What holds for every page."""
        assert self.complaints == []
        assert [url for url in self.requests if url != path.as_uri() and not url.startswith("data:")] == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert self.page.evaluate(_OUTSIDE) == []
        sizes = self.page.evaluate(_LETTERS)
        assert sizes
        assert min(sizes) >= SMALLEST
        assert [words for contrast, words in self.page.evaluate(_CONTRASTS) if contrast < LEAST_CONTRAST] == []
        for box in self.page.locator("figure.chart svg").all():
            size = box.bounding_box()
            assert size is not None
            assert size["width"] >= 250
            assert size["height"] >= 150


# letters as they are drawn: the size in the drawing's own units times how much it is stretched
_LETTERS = """() => [...document.querySelectorAll('figure.chart svg text')].map(
    text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"""
# of everything that has words of its own: contrast with the nearest background, and the words
_CONTRASTS = """() => {
    const colour = words => words.match(/[\\d.]+/g).map(Number);
    const light = words => colour(words).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0.05);
    const style = element => getComputedStyle(element);
    const behind = element => {
        const own = style(element).backgroundColor;
        return colour(own)[3] === 0 ? behind(element.parentElement) : own; };
    return [...document.querySelectorAll('body *:not(.at i)')]
        .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
        .map(element => {
            const [low, high] = [light(behind(element)),
                light(element.ownerSVGElement ? style(element).fill : style(element).color)].sort((a, b) => a - b);
            return [high / low, element.textContent]; }); }"""
# words of a chart that stick out of the window, or lie on each other
_OUTSIDE = """() => [...document.querySelectorAll('figure.chart svg')].flatMap(svg => {
    const all = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    const out = all.filter(([_, box]) => box.left < 0 || box.right > window.innerWidth);
    const meet = (a, b) =>
        a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    const over = all.filter(([_, a], i) => all.some(([_, b], j) => i < j && meet(a, b)));
    return [...out, ...over].map(([words]) => words); })"""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A study of two sizes and seeds, one run of which goes on and shrinks, with benchmarks and an analysis."""
    folder = tmp_path_factory.mktemp("study")
    paired_study(folder / "main", ("70m", "410m"))
    going = folder / "main/runs/410m-l2e-seed1235"
    shutil.rmtree(going)
    write_run(going, "l2e", 1235, "410m", until=80, shrink=0.1, share=0.01)
    for place, run in enumerate(sorted((folder / "main/runs").iterdir())):
        for step in (50, 100):
            tasks = ("mmlu", "bigbench_lite", "arc_challenge", "arc_easy", "lambada_openai")
            figures = {(task, shots): (0.2 + 0.01 * place, 0.005) for task in tasks for shots in (0, 5)}
            add_results(run, step, figures)
    write_analysis(folder / "analysis")
    output = folder / "report.html"
    words = ["report", folder / "main", "--analysis", folder / "analysis", "--output", output]
    assert main(list(map(str, words))) == 0
    return output


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")])
def test_study(browser, study, width, scheme):
    opened = Opened(browser, study, width, scheme)
    opened.check(study)
    page = opened.page
    assert page.locator("figure.chart").count() == 12 + 10  # metrics and tasks
    assert page.locator("h1").inner_text() == "Main comparison"
    for words in ("410m-l2e-seed1235: layer 2 shrank to", "410m-l2e-seed1235: at step 80 of 100"):
        assert page.get_by_text(words).first.is_visible()
    warnings, curves = page.locator("section.warnings"), page.locator("div.charts")
    assert warnings.bounding_box()["y"] < curves.bounding_box()["y"]
    columns = page.evaluate("getComputedStyle(document.querySelector('.charts')).gridTemplateColumns.split(' ').length")
    assert columns == {390: 1, 1440: 4}[width]
    assert page.locator(".image img").evaluate("image => image.complete && image.naturalWidth > 0")
    table = page.get_by_role("region", name="Evaluation tasks")
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")  # it scrolls by itself
    assert page.locator("ul.legend li").count() == 4
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 20, 22)"}[scheme]
    assert is_shaded(table)
    table.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert not is_shaded(table)


def is_shaded(table: Locator) -> bool:
    """Return whether the right edge of a table is of another colour than the page."""
    pixels = np.array(Image.open(io.BytesIO(table.screenshot())).convert("RGB")).astype(int)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    paper = colours[counts.argmax()]
    edge = np.abs(pixels[4:-4, -4] - paper).sum(axis=1) > 30
    assert edge.mean() < 0.5 or edge.all()
    return bool(edge.all())


@pytest.mark.parametrize("width", WIDTHS)
def test_values_where_the_pointer_is(browser, study, width):
    """At 30 % and at 90 % of the axis, which is from -2 to 102."""
    page = Opened(browser, study, width).page
    chart = page.locator("#held-out-loss .readings")
    shown = page.locator(".at div:visible")
    assert shown.count() == 0
    for x, first in ((32, "step 30"), (92, "step 90")):
        box = chart.bounding_box()
        chart.hover(position={"x": box["width"] * x / 104, "y": box["height"] / 2})
        lines = shown.inner_text().splitlines()
        assert lines[0] == first
        assert f"● 70m-none-seed1234 {8 - 3 * int(first[5:]) / 100:.5g}" in lines
        assert len(lines) == 1 + (8 if first == "step 30" else 7)  # one run is at step 80
        place = shown.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= width
    page.locator("h1").hover()
    assert shown.count() == 0


@pytest.mark.full
@pytest.mark.parametrize("width", WIDTHS)
def test_lines_have_the_colours_of_the_legend(browser, study, width):
    page = Opened(browser, study, width).page
    legend = page.locator("ul.legend path").evaluate_all("all => all.map(path => getComputedStyle(path).stroke)")
    drawn = page.locator("#training-loss svg path").evaluate_all(
        "all => all.map(path => getComputedStyle(path).stroke)"
    )
    assert len(legend) == 4
    assert set(legend) <= set(drawn)


@pytest.mark.full
def test_printed(browser, study):
    """All of a page is on paper, also from a dark screen; nothing is cut off by a box that scrolls."""
    page = Opened(browser, study, 1440, "dark").page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".scroll").first.evaluate("box => getComputedStyle(box).overflowX") == "visible"


def test_real_run(browser, run_file, tmp_path):
    """Trained just now: what training writes is what the page reads."""
    launch = Launch(tmp_path / "train.log", sys.executable, "-m", "l2e_ds.train", run_file)
    assert launch.end() == 0, launch.said()[-3000:]
    output = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--output", str(output)]) == 0
    for width in WIDTHS:
        opened = Opened(browser, output, width)
        opened.check(output)
        assert opened.page.locator("figure.chart").count() == 11
        assert opened.page.locator("ul.legend li").all_inner_texts() == ["layer 1", "layer 2"]
        assert opened.page.get_by_text("6 of 6", exact=True).is_visible()
        opened.page.locator("details summary").last.click()
        assert opened.page.get_by_text("hidden_size: 32").is_visible()
    assert (tmp_path / "report-tables/runs.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_neuron_page_on_a_phone(browser, tmp_path, scheme):
    """The title takes one line; a long path does not widen the page; a wide table shows that it scrolls."""
    tokenizer = train_tokenizer(iter(["the cat sat on the mat and so on\n" * 5]), 270)
    tokens = np.array([tokenizer.backend_tokenizer.encode("the cat sat on the mat and so on" * 9).ids[:32]] * 4)
    activations = np.random.default_rng(0).normal(size=tokens.shape).astype(np.float32)
    about = {"model": "/somewhere" * 12, "layer": 23, "neuron": 12345, "name": "natural-language"}
    path = tmp_path / "neuron.html"
    write_neuron_page(path, activations, tokens, np.array([0, 0, 1, 1]), ["Danish", "French"], tokenizer, about)
    opened = Opened(browser, path, 390, scheme)
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    title = opened.page.locator("h1")
    assert title.inner_text() == "Layer 23, neuron 12345"
    assert title.bounding_box()["height"] < 40
    table = opened.page.locator(".scroll")
    assert is_shaded(table)
    table.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert not is_shaded(table)
