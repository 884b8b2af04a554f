"""Every study file of this repository: each of its runs is checked as before a start, and pairs with its baseline."""

from pathlib import Path

import numpy as np
import pytest

from l2e_ds.config.reading import find_file
from l2e_ds.data.indexed import write_pair
from l2e_ds.study.checking import resolve_runs
from l2e_ds.study.definition import read_study
from l2e_ds.system.process import prepare_libraries
from tests.processes import REPOSITORY

FILES = sorted((REPOSITORY / "launch/studies").rglob("*.yaml"))
# these need text that is made for them: tests/integration/test_evidence.py
FILES = [path for path in FILES if path.parent.name != "evidence"]
RUNS = {"main": 9, "ablation": 15, "level": 18, "layers": 15, "time": 27, "claim": 9}
SMALL_RUNS = {"main": 12, "ablation": 15, "level": 18, "layers": 15, "time": 18}


def test_there_is_one_for_every_table_and_for_the_claim():
    names = [str(path.relative_to(REPOSITORY / "launch/studies")) for path in FILES]
    assert sorted(names) == sorted([f"{name}.yaml" for name in RUNS] + [f"small/{name}.yaml" for name in SMALL_RUNS])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Write a set of documents of 2,049 tokens, in place of the preshuffled Pile."""
    prefix = tmp_path_factory.mktemp("pile") / "pile"
    write_pair(prefix, np.random.default_rng(0).integers(0, 50_000, (64, 2049), dtype=np.uint16), np.uint16)
    return prefix


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_could_start(path, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_libraries()
    is_small = path.parent.name == "small"
    pile = [] if is_small else [f"data.path={tokens}", "data.tokenizer=null", "data.held_out=0.1"]
    study = read_study(path, pile)
    runs = resolve_runs(study, 2 if is_small else 64, this_machine=False)
    assert len(runs) == (SMALL_RUNS if is_small else RUNS)[path.stem]
    assert str(study.directory) == f"studies/{'small/' if is_small else ''}{path.stem}"
    methods = {"main": {"none", "memel", "l2e"}, "time": {"none", "memel", "l2e"}}.get(path.stem, {"none", "l2e"})
    assert {run.config.inhibition.method for run in runs.values()} == methods
    for run in study.runs:
        config = runs[run.name].config
        assert (run.baseline is None) == (config.inhibition.method == "none"), run.name
        assert config.training.seed == run.seed
        assert config.training.run_directory == f"{study.directory}/runs/{run.name}"
        assert config.data.cache == f"{study.directory}/data"
        assert find_file(config.deepspeed.config) is not None
        section = config.inhibition
        as_recipe = path.stem == "time" or run.levels.get("method") == "projected"
        if section.method == "l2e" and section.retrieval_and_mechanism[1] == "regulariser":
            weights = (section.loss, section.strength, section.coefficient)
            assert weights == (("projected", 0.05, None) if as_recipe else ("published", None, 1e-3)), run.name
        if section.method != "none" and run.levels.get("method") != "projected":
            assert (section.start, section.decay, section.end) == (0, 0, None), run.name
        if run.baseline is not None:
            other = runs[run.baseline].config
            assert other.model == config.model and other.optimizer == config.optimizer and other.data == config.data
            assert other.training.seed == config.training.seed
        if not is_small and path.stem != "time":
            assert (config.training.steps, config.optimizer.schedule_steps) == (14300, 143000)
            assert [part.tasks for part in study.file.evaluate] == [["paper"], ["paper"]]
            assert [part.num_fewshot for part in study.file.evaluate] == [0, 5]
        if is_small or path.stem == "time":
            assert not study.file.evaluate  # small ones need no hub
    assert not any(tmp_path.iterdir())


def test_what_the_paper_crosses(tokens):
    def parts(name: str) -> set[tuple]:
        study = read_study(REPOSITORY / f"launch/studies/{name}.yaml", [f"data.path={tokens}", "data.tokenizer=null"])
        runs = resolve_runs(study, 64, this_machine=False)
        sections = [(run.config.model.name, run.config.inhibition) for run in runs.values()]
        return {
            (size, part.method, part.retrieval_and_mechanism, part.layers, part.target_share) for size, part in sections
        }

    prepare_libraries()
    best = {"pythia-70m": 0.01, "pythia-410m": 0.02, "pythia-2.8b": 0.03}
    plain = {(size, "none", ("threshold", "regulariser"), "mid-2", share) for size, share in best.items()}
    pairs = [(way, what) for way in ("top-k", "threshold") for what in ("reverse-deactivation", "regulariser")]
    assert parts("ablation") == plain | {(size, "l2e", pair, "mid-2", best[size]) for size in best for pair in pairs}
    memel = {(size, "memel", pairs[0], "mid-2", share) for size, share in best.items()}
    assert parts("main") == plain | memel | {(size, "l2e", pairs[3], "mid-2", share) for size, share in best.items()}
    choices = ("mid-2", "mid-third", "top-bottom", "all")
    assert parts("layers") == plain | {
        (size, "l2e", pairs[3], layers, best[size]) for size in best for layers in choices
    }
    shares = (0.01, 0.02, 0.03, 0.04, 0.05)
    levels = {(size, "l2e", pairs[3], "mid-2", share) for size in best for share in shares}
    assert parts("level") == levels | {(size, "none", pairs[3], "mid-2", 0.01) for size in best}
