"""`l2e-ds report` in a real browser, as wide as a phone and as a laptop. Fails where there is no Chromium."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from l2e_ds.cli import main
from tests.integration.running import Launch
from tests.unit.report.making import add_results, paired_study, write_analysis, write_run

WIDTHS = (390, 1440)
SMALLEST = 9.0  # px, of letters in charts


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

    def __init__(self, browser: Browser, path: Path, width: int) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
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
        for box in self.page.locator("figure.chart svg").all():
            size = box.bounding_box()
            assert size is not None
            assert size["width"] >= 250
            assert size["height"] >= 150


# letters as they are drawn: the size in the drawing's own units times how much it is stretched
_LETTERS = """() => [...document.querySelectorAll('figure.chart svg text')].map(
    text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"""
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


@pytest.mark.parametrize("width", WIDTHS)
def test_study(browser, study, width):
    opened = Opened(browser, study, width)
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
    """All of a page is on paper; nothing is cut off by a box that scrolls."""
    page = Opened(browser, study, 1440).page
    page.emulate_media(media="print")
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
