"""How far a run is, and which changes of a study are refused."""

import json

import pytest
import yaml

from l2e_ds.config.sections import DECIDES_NO_RESULT, RunConfig
from l2e_ds.errors import ConfigError
from l2e_ds.study.checking import refuse_changes, resolve_runs
from l2e_ds.study.definition import Evaluation, read_study
from l2e_ds.study.state import state_of
from tests.unit.study.folders import BASE, begin_run, begun_study, checkpoint, evaluation, study_file, write_lines


def test_states(tmp_path):
    tasks = [Evaluation(tasks=["arc_easy"], num_fewshot=0), Evaluation(tasks=["arc_easy"], num_fewshot=5)]
    run = tmp_path / "run"
    assert str(state_of(run, 20, tasks)) == "not begun"
    run.mkdir()
    (run / "config.yaml").write_text("")
    assert str(state_of(run, 20, tasks)) == "begun"
    checkpoint(run, 10)
    assert str(state_of(run, 20, tasks)) == "at step 10"
    checkpoint(run, 20)
    assert str(state_of(run, 20, tasks)) == "not evaluated" and state_of(run, 20, tasks).missing == tuple(tasks)
    write_lines(run / "evaluations.jsonl", [evaluation(10, 0, {"arc_easy": 0.1}), evaluation(20, 5, {"arc_easy": 0.1})])
    assert state_of(run, 20, tasks).missing == (tasks[0],)
    assert state_of(run, 20, tasks[1:]).is_done and str(state_of(run, 20, [])) == "done"
    (run / "checkpoints/step00000020/state.json").unlink()
    assert not state_of(run, 20, tasks).trained


def test_a_run_is_not_trained_before_its_last_evaluation(tmp_path, monkeypatch):
    """Stopped in its last step, a run saves first, and leaves what it evaluates there to its next start."""
    monkeypatch.chdir(tmp_path)
    study, runs = begun_study(tmp_path)
    run = begin_run(study, runs, "l2e-seed1")
    checkpoint(run, 20)
    assert state_of(run, 20, []).is_done  # it evaluates nothing
    evaluated = [{"kind": "evaluation", "step": step, "held_out_loss": 5.0} for step in (0, 10, 20)]
    write_lines(run / "metrics.jsonl", evaluated[:2])
    assert str(state_of(run, 20, [])) == "at step 20"
    write_lines(run / "metrics.jsonl", evaluated)
    assert state_of(run, 20, []).is_done
    write_lines(run / "metrics.jsonl", [*evaluated, {"kind": "tasks", "step": 0}])
    assert state_of(run, 20, []).is_done  # the configuration, in the meantime, asks for no tasks


def test_which_figures_an_evaluation_stands_for(tmp_path):
    def done(asked: dict, *lines: dict) -> bool:
        write_lines(tmp_path / "evaluations.jsonl", list(lines))
        return not state_of(tmp_path, 20, [Evaluation.model_validate(asked)]).missing

    two = evaluation(20, 5, {"piqa": 0.5, "sciq": 0.5})
    assert done({"tasks": ["piqa"], "num_fewshot": 5}, two) and done({"tasks": ["sciq", "piqa"], "num_fewshot": 5}, two)
    assert not done({"tasks": ["piqa"], "num_fewshot": 0}, two) and not done({"tasks": ["piqa"]}, two)
    assert not done({"tasks": ["piqa"], "num_fewshot": 5, "limit": 10}, two)
    three = {"tasks": ["piqa", "arc_easy"], "num_fewshot": 5}
    assert not done(three, two) and not done(three, two, evaluation(20, 5, {"arc_easy": 0.5}))  # not one evaluation
    # groups and tags by the name that was asked for, whatever they stand for
    group = evaluation(20, 5, {"mmlu_law": 0.5}, asked=["mmlu"], mmlu_law="mmlu")
    assert done({"tasks": ["mmlu"], "num_fewshot": 5}, group)
    assert not done({"tasks": ["mmlu_law"], "num_fewshot": 5}, group)
    # tasks of other files may have the same name
    here = {"tasks": ["piqa"], "num_fewshot": 5, "include_path": ["/here"]}
    of = {where: two | {"asked": two["asked"] | {"include_path": [where]}} for where in ("/here", "/there")}
    assert done(here, of["/here"]) and not done(here, of["/there"]) and not done(here, two)
    assert not done({"tasks": ["piqa"], "num_fewshot": 5}, of["/here"])
    # what was evaluated while training, in the precision of that
    half = evaluation(20, 5, {"piqa": 0.5}, precision="bf16")
    assert not done({"tasks": ["piqa"], "num_fewshot": 5}, half)
    assert done({"tasks": ["piqa"], "num_fewshot": 5}, half, evaluation(20, 5, {"piqa": 0.5}))
    # a line that does not say what it was asked for
    nameless = {key: value for key, value in two.items() if key != "asked"}
    assert not done({"tasks": ["piqa"], "num_fewshot": 5}, nameless, nameless | {"asked": None})
    assert done({"tasks": ["piqa"], "num_fewshot": 5}, nameless, two)
    # a line that is being written
    (tmp_path / "evaluations.jsonl").write_text('{"step": 20, "limit"')
    assert state_of(tmp_path, 20, [Evaluation(tasks=["piqa"])]).missing


def change(tmp_path, *overrides: str, **changes: object) -> None:
    study = read_study(study_file(tmp_path, **changes), overrides)
    refuse_changes(study, resolve_runs(study, 1, this_machine=False))


def test_a_begun_run_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study, runs = begun_study(tmp_path)
    checkpoint(begin_run(study, runs, "l2e-seed1"), 15)
    change(tmp_path)
    # where and how safely it is computed may change
    how = ["training.timeout=5", "checkpoint.every=3", "training.micro_batch=4", "data.workers=1"]
    how += ["training.evaluate_every=7", "training.max_skipped_steps=9", "training.resume=never"]
    how += ["deepspeed.config=ds_configs/zero2.json", "model.compile=true", "training.deterministic=true"]
    change(tmp_path, *how)
    refused = r"^out: the run l2e-seed1 has begun, and its configuration has changed since: {}; .*out/study.yaml"
    with pytest.raises(ConfigError, match=refused.format("optimizer.eps: 1e-08 -> 1e-06")):
        change(tmp_path, "optimizer.eps=1e-6")
    with pytest.raises(ConfigError, match=refused.format("training.evaluation_sequences: 64 -> 9")):
        change(tmp_path, "training.evaluation_sequences=9")
    # where it began, and what a DeepSpeed JSON says of the optimizer
    with pytest.raises(ConfigError, match=refused.format(f"training.resume: auto -> {tmp_path}")):
        change(tmp_path, f"training.resume={tmp_path}")
    own = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    with pytest.raises(ConfigError, match=refused.format("optimizer.eps: 1e-08 -> 1e-06")):
        change(tmp_path, "deepspeed.config=own.json")
    for steps in (19, 30):  # the schedule would be another one
        with pytest.raises(ConfigError, match=rf"training\.steps: 20 -> {steps} \(.*=20 keeps the schedule"):
            change(tmp_path, f"training.steps={steps}")
    factors = {"method": {"none": {"inhibition.method": "none"}, "l2e": {"inhibition.method": "memel"}}}
    with pytest.raises(ConfigError, match=refused.format(r"inhibition.method: l2e -> memel \(and 1 more\)")):
        change(tmp_path, factors=factors)
    # also by way of the base
    path = study_file(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE | {"optimizer": {"warmup": 0.2}}))
    study = read_study(path)
    with pytest.raises(ConfigError, match=refused.format("optimizer.warmup: 0.01 -> 0.2")):
        refuse_changes(study, resolve_runs(study, 1, this_machine=False))


def test_what_has_not_begun_may_change_and_a_schedule_of_its_own_may_be_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study, runs = begun_study(tmp_path, set={"optimizer.schedule_steps": 100})
    checkpoint(begin_run(study, runs, "none-seed1"), 15)
    for steps in (15, 30):
        change(tmp_path, f"training.steps={steps}", set={"optimizer.schedule_steps": 100})
    with pytest.raises(ConfigError, match=r"training\.steps: 20 -> 10, but step 15 is done"):
        change(tmp_path, "training.steps=10", set={"optimizer.schedule_steps": 100})
    factors = {"method": {"none": {"inhibition.method": "none"}, "memel": {"inhibition.method": "memel"}}}
    change(tmp_path, factors=factors, set={"optimizer.schedule_steps": 100})


def test_the_keys_that_decide_no_figure_are_keys():
    sections = RunConfig.model_fields
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section.annotation.model_fields]
    assert all(any(key.startswith(part) for key in keys) for part in DECIDES_NO_RESULT)
    exact = [part for part in DECIDES_NO_RESULT if not part.endswith(".")]
    assert set(exact) <= set(keys)  # so that none takes another with it
    assert [key for key in keys if key.startswith(tuple(exact))] == [key for key in keys if key in exact]


def test_two_runs_that_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    factors = {"method": {"a": {"inhibition.method": "none"}, "b": {"inhibition.method": "none"}}}
    with pytest.raises(ConfigError, match="factors: a-seed1 and b-seed1 would be the same run"):
        change(tmp_path, factors=factors, baseline=None)
