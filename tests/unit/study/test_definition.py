"""Study files: what they expand to, what is compared with what, and what is refused."""

from pathlib import Path

import pytest
import yaml

from l2e_ds.config.reading import load_run_config
from l2e_ds.errors import ConfigError
from l2e_ds.study.definition import FILE, INDEX, read_study, text_of

BASE = """
model: {name: pythia-14m, vocab_size: 300, num_layers: 4, hidden_size: 32, num_heads: 2}
data: {source: stdlib, train_tokenizer: 300, sequence_length: 16}
training: {steps: 4, global_batch: 8, micro_batch: 2}
"""
STUDY = {
    "title": "Shares",
    "base": "base.yaml",
    "seeds": [1, 2],
    "set": {"training.steps": 5},
    "factors": {
        "size": {"one": {}, "two": {"base": "other.yaml"}},
        "method": {"none": {"inhibition.method": "none"}, "l2e": {"inhibition.method": "l2e"}},
        "inhibition.target_share": [0.01, 0.02],
    },
    "exclude": [{"method": "none", "inhibition.target_share": 0.02}],
    "baseline": {"method": "none"},
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    for name in ("base.yaml", "other.yaml"):
        (tmp_path / name).write_text(BASE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(folder: Path, **changes: object) -> Path:
    path = folder / "shares.yaml"
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_every_combination_runs_with_every_seed(here):
    study = read_study(write(here), ["training.steps=7", "data.workers=1"])
    assert study.directory == Path("studies/shares")
    names = [
        f"{size}-{kind}-seed{n}"
        for n in (1, 2)
        for size in ("one", "two")
        for kind in ("none-0.01", "l2e-0.01", "l2e-0.02")
    ]
    assert [run.name for run in study.runs] == names
    runs = {run.name: run for run in study.runs}
    last = runs["two-l2e-0.02-seed2"]
    assert last.base == str(here / "other.yaml")
    assert last.overrides == [
        *("training.steps=7", "data.workers=1", "inhibition.method=l2e", "inhibition.target_share=0.02"),
        "training.seed=2",
    ]
    assert last.levels == {"size": "two", "method": "l2e", "inhibition.target_share": "0.02"}
    # the baseline was not run at 0.02, so that one is compared with it at 0.01; never with another size or seed
    assert {name: run.baseline for name, run in runs.items() if run.baseline is None or run.seed == 2} == {
        "one-none-0.01-seed1": None,
        "two-none-0.01-seed1": None,
        "one-none-0.01-seed2": None,
        "one-l2e-0.01-seed2": "one-none-0.01-seed2",
        "one-l2e-0.02-seed2": "one-none-0.01-seed2",
        "two-none-0.01-seed2": None,
        "two-l2e-0.01-seed2": "two-none-0.01-seed2",
        "two-l2e-0.02-seed2": "two-none-0.01-seed2",
    }
    index = study.index().model_dump()
    assert (index["title"], index["name"]) == ("Shares", "shares")
    assert index["factors"]["inhibition.target_share"] == ["0.01", "0.02"]
    assert index["runs"][-1]["directory"] == "runs/two-l2e-0.02-seed2"


def test_a_size_without_baseline_is_compared_with_no_other_size(here):
    study = read_study(write(here, exclude=[{"method": "none", "size": "two"}]))
    assert all(
        (run.baseline is None) == (run.levels["method"] == "none" or run.levels["size"] == "two") for run in study.runs
    )


def test_what_was_written_down_gives_the_same_runs_from_anywhere(here, tmp_path, monkeypatch):
    (here / "tasks").mkdir()
    evaluate = [{"tasks": ["paper"], "num_fewshot": 5, "include_path": ["tasks"]}]
    study = read_study(write(here, evaluate=evaluate), ["training.steps=7"])
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / FILE).write_text(study.dump())
    (folder / INDEX).write_text("{}")
    monkeypatch.chdir("/")
    again = read_study(folder / FILE)
    assert again.directory == folder
    assert again.file == study.file
    assert again.index().model_dump()["runs"] == study.index().model_dump()["runs"]
    assert again.file.evaluate[0].include_path == [str(here / "tasks")]


def test_recipes_are_named_as_every_checkout_finds_them(here):
    study = read_study(write(here, base="launch/recipes/pythia-70m.yaml"))
    assert {run.base for run in study.runs} == {"launch/recipes/pythia-70m.yaml", str(here / "other.yaml")}


@pytest.mark.parametrize("text", ["a: b", "x # y", "1", "yes", "true", "*x", '"x"', "~", "[0]", "two\nlines"])
def test_texts_reach_the_run_as_they_stand(here, text):
    """A key has the same value from `set`, from a factor, and after the study was written and read again."""
    study = read_study(
        write(here, set={"data.text_key": text}, factors={"logging.wandb_project": [text]}, exclude=[], baseline=None)
    )
    (here / FILE).write_text(study.dump())
    for run in (*study.runs, *read_study(here / FILE).runs):
        config = load_run_config(run.base, run.overrides)
        assert (config.data.text_key, config.logging.wandb_project) == (text, text)


def test_values_as_overrides_have_them():
    values = ["l2e", 0.02, 1e-5, 3, True, None, [1, 2], "1", "null", "a: b", "x # y", ""]
    assert [yaml.safe_load(text_of(value)) for value in values if value != 1e-5] == [v for v in values if v != 1e-5]
    assert (text_of("l2e"), text_of(0.02), text_of("1"), text_of(1e-5)) == ("l2e", "0.02", '"1"', "1e-05")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"titel": "x"}, "titel: unknown key; did you mean 'title'?"),
        ({"title": 3}, "title: got 3; must be a valid string"),
        ({"seeds": []}, "seeds: got []"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] names a seed twice"),
        ({"base": "no.yaml"}, "base: no such run file: no.yaml"),
        ({"base": None}, "base: is required; the run one-none-0.01-seed1 has none"),
        ({"evaluate": [{"tasks": ["a"], "limt": 3}]}, "evaluate.0.limt: unknown key; did you mean 'limit'?"),
        ({"evaluate": [{"tasks": []}]}, "evaluate.0.tasks: got []"),
        (
            {"evaluate": [{"tasks": ["a"], "include_path": ["nowhere"]}]},
            "evaluate.0.include_path: no such folder: nowhere",
        ),
        ({"set": {"training": {"steps": 3}}}, "set: got the key 'training', write section.key"),
        ({"set": {"training.seed": 3}}, "set: training.seed is decided by the study's seeds"),
        ({"factors": {"training.run_directory": ["a"]}}, "factors: training.run_directory is decided by"),
        ({"set": {"data.text_key": 100}}, "set: data.text_key: got 100; must be text (in quotes)"),
        ({"factors": {"data.cache": [1, 2]}}, "factors: data.cache: got 1; must be text (in quotes)"),
        ({"factors": {"cache": {"a": {"data.cache": True}}}}, "factors.cache.a: data.cache: got True; must be text"),
        ({"factors": {"method": "l2e"}}, "factors.method: got 'l2e'; write levels"),
        ({"factors": {"method": {}}}, "factors.method: got {}, give at least one level"),
        (
            {"factors": {"method": {True: 3}}},
            "factors.method: got the level True, allowed: letters, digits and _ . + -",
        ),
        (
            {"factors": {"method": {None: {}}}},
            "factors.method: got the level None, allowed: letters, digits and _ . + -",
        ),
        ({"factors": {"method": {"a/b": {}}}}, "factors.method: got the level 'a/b'"),
        ({"factors": {"method": {"a": 3}}}, "factors.method.a: got 3, must be a mapping"),
        ({"factors": {"seed": {"a": {}}}}, "factors.seed: is a column of the results already"),
        ({"factors": {"inhibition.layers": ["all", "all"]}}, "names a value twice"),
        (
            {"factors": {"one": {"a": {"inhibition.loss": "published"}}, "inhibition.loss": ["published"]}},
            "factors.inhibition.loss: sets inhibition.loss, as the factor one does",
        ),
        ({"factors": {"a": {"x": {}, "x-y": {}}, "b": {"y-z": {}, "z": {}}}}, "two runs would be called 'x-y-z-seed1'"),
        ({"exclude": [{"metod": "none"}]}, "exclude.0: there is no factor 'metod'"),
        ({"exclude": [{"method": "memel"}]}, "exclude.0.method: got 'memel'; allowed: none, l2e"),
        ({"exclude": [{"method": "none"}, {"method": "l2e"}]}, "exclude: leaves no run"),
        ({"baseline": {}}, "baseline: got {}"),
        (
            {
                "factors": STUDY["factors"] | {"inhibition.target_share": [0.01, 0.02, 0.03]},
            },
            "baseline: one, l2e, 0.02 could be compared with one, none, 0.01 and one, none, 0.03",
        ),
    ],
)
def test_refused_in_one_line(here, changes, said):
    if "factors" in changes and "exclude" not in changes and "could be" not in said:
        changes = {"exclude": [], "baseline": None, **changes}
    with pytest.raises(ConfigError) as refusal:
        read_study(write(here, **changes))
    assert str(refusal.value).startswith(str(here / "shares.yaml"))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=3", "override 'steps=3': write section.key=value"),
        ("inhibition.method=memel", "override inhibition.method: the factor method sets it"),
        ("training.seed=3", "^override 'training.seed=3': training.seed is decided by the study's seeds"),
    ],
)
def test_overrides_that_are_refused(here, override, said):
    with pytest.raises(ConfigError, match=said):
        read_study(write(here), [override])
