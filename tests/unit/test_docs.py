"""The pages made from docstrings are up to date, and what the docs name exists."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import transformers

from l2e_ds.checkpoint.disk import checkpoint_bytes, disk_space
from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.models.counts import parameter_counts
from l2e_ds.models.pythia import network_config
from tests.processes import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", ["run-files.md", "metrics.md"])
def test_generated_page(name):
    pages = runpy.run_path(str(REPOSITORY / "docs/generate.py"))["PAGES"]
    assert (REPOSITORY / "docs" / name).read_text() == pages[name](), "run: python docs/generate.py"


def files_named(page: Path) -> list[Path]:
    """Return the files that a page links to, and those of the repository whose paths it mentions."""
    text = page.read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    mentioned = re.findall(r"(?<![\w./-])(?:launch|ds_configs|docs|tests)/[\w./-]*\w(?!\w*\*)", text)
    return [page.parent / target for target in linked] + [REPOSITORY / target for target in mentioned]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    assert not [path for path in files_named(page) if not path.exists()]


def test_pages_name_files():
    counts = [len(files_named(page)) for page in PAGES]
    assert counts[0] > 10 and sum(counts) > 100


def test_table_of_recipes():
    """docs/recipes.md says of each recipe what the recipe says itself."""
    rows = dict(re.findall(r"^\| `([\w.-]+)\.yaml` \| (.*) \|$", (REPOSITORY / "docs/recipes.md").read_text(), re.M))
    recipes = sorted((REPOSITORY / "launch/recipes").glob("*.yaml"))
    assert sorted(rows) == [path.stem for path in recipes]
    for path in recipes:
        config = load_run_config(path)
        hf_config = network_config(config.model, config.data.sequence_length)
        gated = ", gated" if hf_config.model_type == "llama" else ""
        shape = f"{hf_config.num_hidden_layers} x {hf_config.hidden_size}{gated}"
        if config.model.vocab_size is not None:
            shape += f", vocabulary {config.model.vocab_size:,}"
        rate, exponent = f"{config.optimizer.peak_learning_rate:.1e}".split("e")
        stage = re.search(r"zero(\d)", config.deepspeed.config)[1]
        share = f"{config.inhibition.target_share:.0%}".replace("%", " %")
        parameters, _ = parameter_counts(hf_config)
        element = 2 if config.training.precision == "bf16" else 4
        one = checkpoint_bytes(parameters, 8 * parameters, int(stage), element, 2, hf_config.intermediate_size)
        kept, disk = re.match(r"(\d+) .*?kept, .* each: (.*?) on disk", disk_space(config, one)[0]).groups()
        every = "" if config.checkpoint.keep_last else "all "
        values = [shape, f"{rate}e{int(exponent)}", share, stage, f"{every}{kept}: {disk}"]
        assert rows[path.stem] == " | ".join(values), path.stem


def test_keys_of_from_other_trainers():
    """The page that maps other trainers' keys names keys that exist: ours, and those of the installed transformers."""
    text = (REPOSITORY / "docs/from-other-trainers.md").read_text()
    rows = re.findall(r"^\| (`.*) \| (`.*|none) \| .*\|$", text, re.M)
    assert len(rows) > 60
    for _, ours in rows:
        for key in re.findall(r"`([^`]+)`", ours):
            section, name = key.split(".")
            assert name in RunConfig.model_fields[section].annotation.model_fields, key
    trainer = text.split("\n## Hugging Face Trainer\n")[1].split("\n## ")[0]
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for theirs, _ in re.findall(r"^\| (`.*) \| (`.*|none) \| .*\|$", trainer, re.M):
        assert set(re.findall(r"`([^`]+)`", theirs)) <= fields, theirs
