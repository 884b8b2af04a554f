"""The page as text. (In a browser: tests/integration/test_report_in_a_browser.py.)"""

import re
import resource
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from l2e_ds.cli import main
from tests.unit.report.making import add_results, paired_study, write_analysis, write_run

NASTY = "<script>alert(1)</script>&'\"><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all that were opened were closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(tmp_path, *words):
    output = tmp_path / "report.html"
    assert main(["report", *map(str, words), "--output", str(output)]) == 0
    return output.read_text()


def test_page_is_whole(tmp_path):
    text = report(tmp_path, paired_study(tmp_path / "study"), write_run(tmp_path / "alone"))
    tags = Tags(text)
    assert tags.open == []
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in tags.found].count("h1") == 1


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    write_analysis(tmp_path / "analysis")
    text = report(tmp_path, write_run(tmp_path / "l2e"), "--analysis", tmp_path / "analysis")
    tags = Tags(text)
    policy = next(at["content"] for tag, at in tags.found if at.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in tags.found}
    references = [
        at[name] for tag, at in tags.found for name in ("src", "href", "xlink:href") if name in at and tag != "a"
    ]
    assert all(reference.startswith(("#", "data:image/svg+xml;base64,")) for reference in references)
    links = [at["href"] for tag, at in tags.found if tag == "a"]
    assert links and not [link for link in links if re.match(r"[\w+.-]+:|/", link)]  # to files only
    assert not re.search(r"url\((?!#)|@import", text)


def test_whatever_a_file_says_is_text(tmp_path):
    """Names of runs, a title, a task, a model, a set, a host."""
    folder = tmp_path / "study"
    study = paired_study(folder, seeds=(1234,))
    index = (study / "study.json").read_text()
    nasty = NASTY.replace("/", "\\/").replace('"', '\\"')
    index = index.replace("Main comparison", nasty).replace('"name": "70m-l2e', f'"name": "{nasty}70m-l2e')
    (study / "study.json").write_text(index.replace('"method": "l2e"', f'"method": "{nasty}"'))
    run = study / "runs/70m-l2e-seed1234"
    add_results(run, 100, {(NASTY, 0): (0.5, 0.1), ("mmlu", 0): (0.5, 0.1)})
    add_results(run, 50, {(NASTY, 0): (0.5, 0.1)})
    (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl")
        .read_text()
        .replace('"node1"', f'"{nasty}"')
        .replace('"held_out_loss"', f'"held_out_loss/{nasty}": 1.0, "held_out_loss"')
    )
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"text_key: \w+", 'text_key: "' + NASTY.replace('"', '\\"') + '"', config))
    tags = Tags(report(tmp_path, study))
    assert not {"script", "img"} & {tag for tag, _ in tags.found}
    assert not [at for _, at in tags.found if any(name.startswith("on") for name in at)]
    assert tags.open == []
    written = "".join(path.read_text() for path in (tmp_path / "report-tables").glob("*.md"))
    assert "alert(1)" in written
    assert "<script>" not in written


def test_warnings_stand_before_the_curves(tmp_path):
    text = report(tmp_path, write_run(tmp_path / "l2e", shrink=0.1))
    assert text.index("layer 3 shrank to 10% of its mean S at step 0") < text.index("<h2>Curves</h2>")


def test_without_warnings_there_is_no_box(tmp_path):
    assert "<h2>Warnings</h2>" not in report(tmp_path, write_run(tmp_path / "l2e"))


def test_many_warnings_are_folded(tmp_path):
    text = report(tmp_path, *(write_run(tmp_path / f"run{i}", shrink=0.1) for i in range(6)))
    assert "<summary>4 more</summary>" in text  # of twelve


def test_head_of_one_run(tmp_path):
    text = report(tmp_path, write_run(tmp_path / "l2e", share=0.021, until=50))
    for words in ("<title>l2e</title>", "8.000 → 6.500", "2.10% (target 2.00%)", "50 of 100", "204,800"):
        assert words in text


def test_head_of_a_study(tmp_path):
    text = report(tmp_path, paired_study(tmp_path / "study"))
    for words in (
        "<title>Main comparison</title>",
        "4 of 4",
        "<dt>lowest held-out loss at step 100, mean over 2 seeds: 70m l2e</dt><dd>4.8750 ± 0.0250 (n = 2)</dd>",
        "<dt>held-out loss, 70m l2e − 70m none</dt><dd>−0.1500 ± 0.0500 (n = 2)</dd>",
        '</dl>\n<p class="quiet">±: standard error over n seeds, of a difference over n pairs. With n = 2 it is half',
    ):
        assert words in text


def test_lowest_loss_is_that_of_a_common_step(tmp_path):
    """The other run is ahead, but was behind at step 50."""
    ahead = write_run(tmp_path / "ahead", loss=5.0, inhibition__target_share=0.01)
    behind = write_run(tmp_path / "behind", loss=4.9, until=50)
    text = report(tmp_path, ahead, behind)
    assert "<dt>lowest held-out loss at step 50, seed 1234: behind</dt><dd>6.4000</dd>" in text
    assert "±" not in text  # one seed has no standard error


def test_lowest_loss_is_not_that_of_a_luckier_seed(tmp_path):
    """The plain run of seed 2 has the lowest loss of all; with seed 1, which both have, l2e has the lower one."""
    none = [write_run(tmp_path / f"none{seed}", "none", seed, loss=loss) for seed, loss in ((1, 5.0), (2, 4.0))]
    text = report(tmp_path, *none, write_run(tmp_path / "l2e", seed=1, loss=4.9))
    assert "<dt>lowest held-out loss at step 100, seed 1: l2e" in text
    assert "<dd>4.9000</dd>" in text


@pytest.mark.parametrize("seeds", [(1, 2), (3,)])
def test_no_lowest_loss_without_a_common_seed(tmp_path, seeds):
    """Two seeds of one variant do not compare with each other either."""
    none = [write_run(tmp_path / f"none{seed}", "none", seed, loss=4.0 + seed) for seed in (1, 2)]
    l2e = [write_run(tmp_path / "l2e", seed=3)] if seeds == (3,) else []
    assert "lowest held-out loss" not in report(tmp_path, *none, *l2e)


def test_every_link_leads_to_a_file(tmp_path):
    """Of tables, their index, configurations, an analysis and the documentation; also with odd names."""
    folder = tmp_path / "it's 100% <new>: a&b #1?"
    run = write_run(folder / "l2e", shrink=0.1)
    write_analysis(run / "analysis")
    (run / "analysis/summary.md").write_text("# Summary")
    write_run(folder / "none", "none")
    output = folder / "pages/1:2 report #2?.html"
    assert main(["report", str(run), str(folder / "none"), "--output", str(output)]) == 0
    links = [at["href"] for tag, at in Tags(output.read_text()).found if tag == "a"]
    found = {(output.parent / unquote(link)).resolve() for link in links}
    assert all(path.exists() for path in found), found
    tables = output.parent / "1:2 report #2?-tables"
    docs = Path(__file__).resolve().parents[3] / "docs"
    assert {path for path in tables.iterdir() if path.suffix == ".csv"} <= found
    assert {tables / "index.md", run / "config.yaml", run / "analysis/summary.md", docs / "looking-inside.md"} <= found
    assert not [link for link in links if re.search(r"[#?:&<]", link)]


def test_an_installed_copy_has_no_documentation(tmp_path, monkeypatch):
    monkeypatch.setattr("l2e_ds.report.page.REPOSITORY", tmp_path)
    text = report(tmp_path, write_run(tmp_path / "l2e", shrink=0.1))
    assert "(docs/looking-inside.md)" in text
    assert not re.search('href="[^"]*docs/', text)


def test_readings(tmp_path):
    """Of each run, with its name escaped, in its colour."""
    study = paired_study(tmp_path / "study", seeds=(1234,))
    index = study / "study.json"
    index.write_text(index.read_text().replace('"name": "70m-l2e', '"name": "<b>70m-l2e'))
    text = report(tmp_path, study)
    chart = text[text.index('id="held-out-loss"') :].partition("</figure>")[0]
    first = re.search(r'<div class="at" style="[^"]*"><div>(step 0.*?)</div></div>', chart)[1]
    assert first == (
        'step 0<span><i style="color: var(--ink)">●</i> 70m-none-seed1234 8</span>'
        '<span><i style="color: #0072B2">●</i> &lt;b&gt;70m-l2e-seed1234 7.9</span>'
    )
    assert chart.count('<div class="at') == 11


def test_figures_of_an_analysis(tmp_path):
    """Given by --analysis, and found beside a run."""
    write_analysis(write_run(tmp_path / "l2e") / "analysis")
    write_analysis(tmp_path / "other")
    text = report(tmp_path, tmp_path / "l2e", "--analysis", tmp_path / "other")
    images = [attributes for tag, attributes in Tags(text).found if tag == "img"]
    assert [image["alt"] for image in images] == ["ks over scale"] * 2
    assert str(tmp_path / "other") in text
    assert text.index("<h2>What neurons respond to</h2>") < text.index("false_killing.csv")
    assert (tmp_path / "report-tables/false_killing.md").is_file()


def test_run_that_goes_on(tmp_path):
    """The same command again replaces the page; a table that is no more goes."""
    folder = write_run(tmp_path / "l2e", until=50)
    assert "at step 50 of 100" in report(tmp_path, folder)
    none = write_run(tmp_path / "none", "none")
    report(tmp_path, folder, none)
    tables = tmp_path / "report-tables"
    assert (tables / "variants.csv").is_file()
    (tables / "mine.csv").write_text("mine")
    go_on(folder)
    assert "at step 50 of 100" not in report(tmp_path, folder)
    assert not (tables / "variants.csv").exists()
    assert (tables / "mine.csv").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))  # nothing half-written


def test_run_that_has_only_just_begun(tmp_path):
    """It has evaluated its first weights, and nothing else."""
    path = write_run(tmp_path / "l2e") / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    text = report(tmp_path, tmp_path / "l2e")
    assert "at step 0 of 100" in text
    assert text.count('<figure class="chart"') == 4  # loss, MS, mean S, kurtosis


def test_loss_that_is_not_finite(tmp_path):
    """Training writes null for it."""
    path = write_run(tmp_path / "l2e") / "metrics.jsonl"
    path.write_text(
        re.sub(r'"(lm_loss|gradient_norm|layer2/mean_s|held_out_loss)": [\d.e-]+', r'"\1": null', path.read_text())
    )
    text = report(tmp_path, tmp_path / "l2e", write_run(tmp_path / "none", "none"))
    assert "none 7.94 to 5" in text
    assert "l2e nan" not in text
    assert "l2e: held-out loss, in 11 of 11 lines, first at step 0" in text
    assert "not finite → not finite" in report(tmp_path, tmp_path / "l2e")


def test_every_table_is_a_file(tmp_path):
    report(tmp_path, paired_study(tmp_path / "study"))
    tables = tmp_path / "report-tables"
    named = re.findall(r"\]\(([\w-]+\.\w+)\)", (tables / "index.md").read_text())
    assert sorted([*named, "index.md"]) == sorted(path.name for path in tables.iterdir())
    assert {"variants.csv", "variants.md", "runs.csv", "layers.md", "machines.csv"} <= set(named)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nowhere", "--output", "report.html"], "nowhere: there is no such folder"),
        (["l2e/config.yaml", "--output", "report.html"], "l2e/config.yaml: is a file, not a folder"),
        (["l2e", "--output", "report.pdf"], "--output: got report.pdf, allowed: a file name that ends in .html"),
        (["l2e", "--output", "mine.html"], "--output: mine.html exists and is no report"),
        (["l2e", "--output", "folder.html"], "--output: folder.html exists and is no report"),
        (["l2e", "--output", "taken.html"], "--output: its tables would be written to taken-tables, which exists"),
        (["l2e", "--output", "l2e/config.yaml/x.html"], "--output: cannot write l2e/config.yaml/x.html"),
        (["l2e", "--output", "r.html", "--analysis", "l2e"], "--analysis: l2e has no analysis.json"),
    ],
)
def test_one_line(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "l2e")
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "taken-tables").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"l2e-ds: error: {expected}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_broken_line_of_metrics(tmp_path, capsys):
    path = write_run(tmp_path / "l2e") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:], ""]))
    assert main(["report", str(tmp_path / "l2e"), "--output", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err == f"l2e-ds: error: {path}:4: is no line of a run's metrics\n"


def test_folder_where_a_table_would_be_written(tmp_path, capsys):
    """The last table: nothing of the report before is changed."""
    run = write_run(tmp_path / "l2e", until=50)
    report(tmp_path, run)
    taken = tmp_path / "report-tables/machines.md"
    taken.unlink()
    taken.mkdir()
    go_on(run)
    before = contents(tmp_path)
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 2
    assert str(taken) in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["report", "new"])
def test_disk_that_is_full(tmp_path, capsys, name):
    """The tables can be written, the page cannot: neither a new report nor the one before is half-written."""
    run = write_run(tmp_path / "l2e", until=50)
    largest = len(report(tmp_path, run)) // 2
    assert all(path.stat().st_size < largest for path in (tmp_path / "report-tables").iterdir())
    go_on(run)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        code = main(["report", str(run), "--output", str(tmp_path / f"{name}.html")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert capsys.readouterr().err.startswith(f"l2e-ds: error: --output: cannot write {tmp_path / name}.html: ")
    assert contents(tmp_path) == before


def go_on(run):
    """Write the lines of a run up to its last step."""
    (write_run(run.parent / "later" / run.name) / "metrics.jsonl").replace(run / "metrics.jsonl")


def contents(folder):
    return {path: path.read_text() if path.is_file() else None for path in folder.rglob("*")}


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr("l2e_ds.report.command.PACKAGES", ("matplotlib", "no_such_package"))
    assert main(["report", "run", "--output", "r.html"]) == 2
    assert capsys.readouterr().err == ("l2e-ds: error: report: needs no_such_package: pip install 'l2e-ds[report]'\n")
