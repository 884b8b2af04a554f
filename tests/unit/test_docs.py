"""The pages made from docstrings are up to date, and what the docs name exists."""

import re
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ["run-files.md", "metrics.md"])
def test_generated_page(name):
    pages = runpy.run_path(str(REPOSITORY / "docs/generate.py"))["PAGES"]
    assert (REPOSITORY / "docs" / name).read_text() == pages[name](), "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"\b(?:launch|ds_configs|docs|tests)/[\w./-]*\w", text):
        if page.name == "README.md":
            assert (REPOSITORY / target).exists() or target.startswith("tests/"), target
