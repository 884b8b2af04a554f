"""Paths in a run file: `~` and variables, other working directories, a run directory that was moved."""

import shutil

import pytest
import yaml

from l2e_ds.config.reading import load_run_config
from l2e_ds.errors import ConfigError
from l2e_ds.study.definition import read_study

RUN = {
    "model": {"name": "pythia-14m"},
    "data": {"source": "text", "path": "corpus", "tokenizer": "words.json"},
    "training": {"steps": 20},
}
PATHS = [
    *("model.pretrained", "data.path", "data.tokenizer", "data.cache", "training.run_directory", "training.resume"),
    *("deepspeed.config", "evaluation.include_path"),
]
SEVERAL = ("data.path", "evaluation.include_path")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Make a home, a folder of run files that is the working directory, and $SCRATCH."""
    for folder in ("home", "work/corpus", "scratch"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "work/words.json").touch()
    (tmp_path / "work/run.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def load(key: str, value: str) -> object:
    overrides = [f"{key}={value}"]
    if key == "model.pretrained":
        overrides.append("model.name=null")
    section, name = key.split(".")
    return getattr(getattr(load_run_config("run.yaml", overrides), section), name)


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables(home, key):
    given = {"~/x y": home / "home/x y", "$SCRATCH/x": home / "scratch/x", "${SCRATCH}_2/x": home / "scratch_2/x"}
    for value, path in given.items():
        assert load(key, value if key != "evaluation.include_path" else f"['{value}']") in (str(path), [str(path)])
        if key in SEVERAL:
            assert load(key, f"['a', '{value}']") == [str(home / "work/a"), str(path)]
    for value, said in {
        "$NOT_SET/x": "the environment variable NOT_SET is not set",
        "~nobody-here/x": "no such user",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(key, value if key != "evaluation.include_path" else f"['{value}']")
        assert f": {key}: got " in str(caught.value) and str(caught.value).endswith(said), caught.value
        assert value in str(caught.value)


def test_what_only_looks_like_them_stays(home):
    assert load("training.run_directory", "array 0 $(touch x) a~b") == "array 0 $(touch x) a~b"
    assert load("data.tokenizer", "EleutherAI/pythia-70m") == "EleutherAI/pythia-70m"
    assert load("training.resume", "never") == "never"
    with pytest.raises(ConfigError, match=r"training\.run_directory: got 'null'; must be a path; \./null is"):
        load("training.run_directory", "null")
    assert load("deepspeed.config", "ds_configs/zero2.json") == "ds_configs/zero2.json"


def test_the_same_files_from_any_working_directory(home, monkeypatch):
    """The resolved configuration means the same elsewhere."""
    for name in ("own.json", "weights"):
        (home / "work" / name).touch()
    words = [
        "data.cache=cache",
        "deepspeed.config=own.json",
        "evaluation.include_path=[tasks]",
        "training.resume=../old",
    ]
    asked = load_run_config("run.yaml", words)
    (home / "work/resolved.yaml").write_text(asked.dump())
    monkeypatch.chdir("/")
    assert load_run_config(home / "work/resolved.yaml") == asked
    found = (asked.data.path, asked.data.tokenizer, asked.data.cache, asked.deepspeed.config)
    assert found == tuple(str(home / "work" / name) for name in ("corpus", "words.json", "cache", "own.json"))
    assert asked.evaluation.include_path == [str(home / "work/tasks")]
    assert asked.training.resume == str(home / "work/../old")


def test_sets_of_a_mixture_and_names_of_the_hub(home):
    sets = [
        {"name": "text", "weight": 1, "source": "jsonl", "path": ["a/*.jsonl", "$SCRATCH/b.jsonl"]},
        {"name": "hub", "weight": 1, "source": "hub", "path": "monology/pile"},
        {"name": "saved", "weight": 1, "source": "hub", "path": "./corpus"},  # by datasets' save_to_disk
    ]
    raw = {**RUN, "data": {"sets": sets, "tokenizer": "EleutherAI/pythia-70m"}}
    (home / "work/run.yaml").write_text(yaml.safe_dump(raw))
    data = load_run_config("run.yaml").data
    assert data.sets[0].path == [str(home / "work/a/*.jsonl"), str(home / "scratch/b.jsonl")]
    assert data.sets[2].path == str(home / "work/corpus")
    assert (data.sets[1].path, data.tokenizer) == ("monology/pile", "EleutherAI/pythia-70m")


@pytest.mark.parametrize("there", ["checkpoints/step00000010", "deepspeed.json"])
def test_the_configuration_in_a_run_directory_belongs_to_it(home, monkeypatch, there):
    """A moved run directory is the one that is meant, from any working directory; another config.yaml is a run file."""
    run = home / "work/runs/a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(load_run_config("run.yaml", ["training.run_directory=runs/a"]).dump())
    shutil.copytree(run, home / "copy")
    assert load_run_config(home / "copy/config.yaml").training.run_directory == "runs/a"  # nothing was run there
    (home / "copy/checkpoints").mkdir()  # of something else
    (home / "copy/metrics.jsonl").touch()
    assert load_run_config(home / "copy/config.yaml").training.run_directory == "runs/a"
    (run / there).parent.mkdir(exist_ok=True)
    (run / there).touch()
    shutil.move(run, home / "moved")

    def directory(path: object, *words: str) -> str:
        return load_run_config(path, words).training.run_directory

    assert directory(home / "moved/config.yaml") == str(home / "moved")
    monkeypatch.chdir(home / "scratch")
    assert directory("../moved/config.yaml", "training.steps=30") == str(home / "scratch/../moved")
    monkeypatch.chdir(home / "moved")
    assert directory("config.yaml") == str(home / "moved")
    # another place is what the user says
    assert directory("config.yaml", "training.run_directory=runs/b") == "runs/b"
    (home / "moved/other.yaml").write_text((home / "moved/config.yaml").read_text())
    assert directory("other.yaml") == "runs/a"


def test_paths_of_a_study_file(home):
    shutil.copy("run.yaml", home / "scratch/base.yaml")
    study = {"base": "$SCRATCH/base.yaml", "directory": "~/study", "factors": {"training.steps": [1, 2]}}
    study["evaluate"] = [{"tasks": ["piqa"], "include_path": ["${SCRATCH}"]}]
    (home / "work/study.yaml").write_text(yaml.safe_dump(study))
    found = read_study(home / "work/study.yaml")
    assert found.directory == home / "home/study"
    assert found.file.base == str(home / "scratch/base.yaml")
    assert found.file.evaluate[0].include_path == [str(home / "scratch")]
