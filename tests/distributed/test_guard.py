"""The guard on two ranks: what it says of a loss that shrinks its layers, when it stops, when it is silent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2e_ds.checkpoint.weights import checkpoint_weights
from l2e_ds.errors import TrainingError
from l2e_ds.run_directory.metrics import read_metrics
from l2e_ds.supervise.supervisor import FINAL
from tests.distributed.training_case import Interruption, TrainingCase

STEPS, EVERY = 24, 4
# before it begins to speak and afterwards
INTERRUPTIONS = [Interruption(1, "SIGUSR1", "step", 6), Interruption(0, "SIGTERM", "step", 22)]
SHRINKING = {"loss": "published", "coefficient": 1.0, "start": 4, "statistics_window": 5}


def case(inhibition: dict, **fields) -> TrainingCase:
    training = {"steps": STEPS, "evaluate_every": EVERY}
    optimizer = {"peak_learning_rate": 1e-2, "schedule_steps": STEPS}
    return TrainingCase({"training": training, "optimizer": optimizer, "inhibition": inhibition}, **fields)


CASES = {
    "straight": case(SHRINKING),
    "interrupted": case(SHRINKING, interruptions=INTERRUPTIONS),
    "off": case(SHRINKING | {"guard": "off"}),
    "begun without": case(SHRINKING, stop_after=6, before_stopping={"inhibition": SHRINKING | {"guard": "off"}}),
    "stopped": case(SHRINKING | {"guard": "stop"}, fails_with="TrainingError"),
    "stopped-again": case(SHRINKING | {"guard": "stop"}, in_directory_of="stopped", fails_with="TrainingError"),
    "projected": case({"coefficient": None, "strength": 0.05, "start": 4}),
    "plain": case({"method": "none", "coefficient": None}),
    "gone-on": case(SHRINKING | {"guard": "stop"}, fails_with="TrainingError"),
    "gone-on with warnings": case(SHRINKING, in_directory_of="gone-on"),
}


@pytest.fixture(scope="module")
def runs(train_cases):
    return train_cases(2, CASES)


def guard_lines(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl", "guard")


def _shrunk(lines: list[dict]) -> list[tuple[int, str]]:
    return [(line["step"], key) for line in lines for key in line if key.endswith("/shrank")]


def test_a_layer_that_shrinks_is_said_once(runs, metric_lines):
    lines = guard_lines(runs / "straight")
    said = _shrunk(lines)
    assert sorted(key for _, key in said) == ["layer1/shrank", "layer2/shrank"]
    evaluations = {line["step"]: line for line in metric_lines(runs / "straight", "evaluation")}
    for (step, key), line in zip(said, (line for line in lines if _shrunk([line])), strict=True):
        layer, first, now = key.partition("/")[0], evaluations[4], evaluations[step]
        assert line["reference_step"] == 4 < step < STEPS
        assert line[key] == now[f"{layer}/mean_s"] / first[f"{layer}/mean_s"] < 0.5
        before, after = (sum(e[f"comparison_layer{i}/mean_s"] for i in (0, 3)) for e in (first, now))
        assert line["comparison"] == pytest.approx(after / before)
        assert line[key] < 0.5 * line["comparison"]
        assert line["text"].startswith(f"layer {layer[-1]} shrank to {line[key]:.0%} of its mean S at step 4 ")
        assert line["advice"].startswith("lower inhibition.coefficient (1), ")


@pytest.mark.parametrize("name", ["interrupted", "gone-on"])
def test_resumed_it_says_the_same(runs, metric_lines, name):
    """Stopped before or after it has spoken, by the guard itself, too."""
    for kind in ("guard", "evaluation"):
        assert metric_lines(runs / name, kind) == metric_lines(runs / "straight", kind)


def test_a_checkpoint_that_knows_of_no_guard_is_gone_on_with(runs, metric_lines):
    """The first evaluation after resuming is the reference."""
    lines = guard_lines(runs / "begun without")
    assert lines and {line["reference_step"] for line in lines} == {8}
    assert [line["step"] for line in metric_lines(runs / "begun without")] == list(range(1, STEPS + 1))


def test_it_changes_nothing_but_what_is_said(runs, metric_lines):
    """Evaluations, weights and moments are those of the run without it."""
    assert guard_lines(runs / "off") == []
    assert metric_lines(runs / "straight", "evaluation") == metric_lines(runs / "off", "evaluation")
    for name in ("off", "gone-on"):
        first, second = (runs / f"{run}/checkpoints/step{STEPS:08d}" for run in ("straight", name))
        weights, others = checkpoint_weights(first, "fp32"), checkpoint_weights(second, "fp32")
        assert all(torch.equal(weights[key], others[key]) for key in weights)
        moments, others = (load_file(path / "inhibition.safetensors") for path in (first, second))
        assert all(torch.equal(moments[key], others[key]) for key in moments)


def test_stop_saves_and_ends_the_run_for_good(runs, metric_lines):
    """Said alike on every rank, again when the same command is given again, which trains no further step."""
    step = _shrunk(guard_lines(runs / "straight"))[0][0]
    assert [line["step"] for line in metric_lines(runs / "stopped")] == list(range(1, step + 1))
    assert [path.name for path in (runs / "stopped/checkpoints").glob("step*")] == [f"step{step:08d}"]
    state = json.loads((runs / f"stopped/checkpoints/step{step:08d}/state.json").read_text())
    assert state["train"]["guard"]["step"] == 4
    told = {(runs / f"{name}-rank{rank}.txt").read_text() for name in ("stopped", "stopped-again") for rank in (0, 1)}
    (message,) = told
    assert message.startswith("inhibition.guard: layer ") and "\n" not in message
    assert f"; step {step} is saved (inhibition.guard=warn resumes from there); lower " in message
    assert FINAL[TrainingError.exit_code] == "the run cannot continue"


@pytest.mark.parametrize("name", ["projected", "plain"])
def test_it_is_silent_where_layers_keep_their_scale(runs, metric_lines, name):
    """The layers for comparison are measured in every run, also in one without inhibition."""
    assert guard_lines(runs / name) == []
    assert "comparison_layer0/mean_s" in metric_lines(runs / name, "evaluation")[0]
