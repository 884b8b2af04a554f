"""Whole runs on two ranks: the baseline, resuming, non-finite steps, export, monitors."""

import csv
import gzip
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2e_ds.checkpoint.changes import saved_config
from l2e_ds.checkpoint.manager import open_checkpoints, read_state
from l2e_ds.checkpoint.weights import checkpoint_weights
from l2e_ds.cli import main
from l2e_ds.export.export import export
from l2e_ds.run_directory.manifest import complete_checkpoints, verify
from l2e_ds.run_directory.metrics import keep_lines
from l2e_ds.run_directory.results import FILE, read_results
from l2e_ds.training.monitors import WANDB_ID
from l2e_ds.training.trainer import is_finished
from tests.distributed.training_case import LENGTH, STRENGTH, VOCABULARY, Interruption, TrainingCase, zero
from tests.distributed.workers.train_cases import texts
from tests.task_files import TASKS, write_tasks

STAGES = (0, 1, 2, 3)
SHORT_STAGES = (1, 3)
"""Gradients reduced into shards of the optimizer, and everything in shards."""


def in_short(short: Sequence, every: Sequence) -> list:
    """The parameters `every`, of which those that are not in `short` are left to the full tests."""
    return [one if one in short else pytest.param(one, marks=pytest.mark.full) for one in every]


stages = pytest.mark.parametrize("stage", in_short(SHORT_STAGES, STAGES))


# evaluations are due at 0, 5 and 10, checkpoints at 8 and 10
INTERRUPTIONS = [
    Interruption(1, "SIGTERM", "evaluation", 0),
    Interruption(1, "SIGUSR1", "step", 1),
    Interruption(0, "stop file", "step", 3),
    Interruption(0, "SIGTERM", "evaluation", 5),
    Interruption(0, "kill", "step", 5),  # after that evaluation, of which no checkpoint knows
    Interruption(1, "SIGUSR1", "step", 6),
    Interruption(0, "SIGUSR1", "saving", 8),
]

SPIKED = ("0", "1", "3", "0-bf16", "2-fp16", "3_offload")
"""ZeRO stage and precision of cases whose loss rises in the fourth and the fifth step: under every class of DeepSpeed
that wraps Adam, and under none (0)."""
SHORT_SPIKED = ("1", "3", "2-fp16")

PROMPTS = ["w3 w4", ""]

# tasks are due at 0, 4, 8 and 10
TASK_INTERRUPTIONS = [Interruption(1, "SIGTERM", "tasks", 4), Interruption(0, "SIGUSR1", "tasks", 8)]


def cases(tasks: str, is_full: bool) -> dict[str, TrainingCase]:
    found = {}
    evaluation = {"every": 4, "tasks": TASKS, "num_fewshot": [0, 2], "include_path": [tasks], "batch_size": 3}
    for stage in STAGES if is_full else SHORT_STAGES:
        five = {"training": {"steps": 5}}
        found[f"none{stage}"] = TrainingCase(zero(stage, inhibition={"method": "none"}, **five))
        found[f"zero-coefficient{stage}"] = TrainingCase(zero(stage, inhibition={"coefficient": 0}, **five))
        found[f"straight{stage}"] = TrainingCase(zero(stage), save_logits=True)
        found[f"resumed{stage}"] = TrainingCase(zero(stage), stop_after=4)
        if stage in SHORT_STAGES:
            samples = {"samples": PROMPTS, "sample_tokens": 9, "include_path": [tasks]}
            found[f"texts{stage}"] = TrainingCase(zero(stage, evaluation=samples), texts=True)
            profiled = {"logging": {"profile": [3, 5]}}
            found[f"tasks{stage}"] = TrainingCase(zero(stage, evaluation=evaluation, **profiled))
            every_8 = zero(stage, checkpoint={"every": 8}, logging={"profile": [4, 9]})
            found[f"interrupted{stage}"] = TrainingCase(every_8, interruptions=INTERRUPTIONS)
    at_the_end = [Interruption(0, "SIGTERM", "evaluation", 10)]
    found["stopped-at-the-end"] = TrainingCase(zero(1), interruptions=at_the_end)
    # a network with dropout: the only numbers that are drawn while it trains
    network = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": VOCABULARY}
    (Path(tasks) / "gpt2.json").write_text(json.dumps(network))
    dropout = {"model": {"config": str(Path(tasks) / "gpt2.json")}}
    found["straight-dropout"] = TrainingCase(dropout)
    found["resumed-dropout"] = TrainingCase(dropout, stop_after=4)
    for precision in ("bf16", "fp16") if is_full else ("fp16",):
        training = {"precision": precision}
        found[f"straight-{precision}"] = TrainingCase(zero(1, training=training), save_logits=True)
        found[f"resumed-{precision}"] = TrainingCase(zero(1, training=training), stop_after=4)
        sections = zero(2, training=training, logging={"layer_gradients": True})
        found[f"nan-{precision}"] = TrainingCase(sections, non_finite_loss=(1, [3, 4]))
    warming_up = {**STRENGTH, "start": 1, "warmup": 3, "decay": 0, "end": None}  # stopped when that is over
    found["straight-strength"] = TrainingCase(zero(3, inhibition=warming_up), save_logits=True)
    found["resumed-strength"] = TrainingCase(zero(3, inhibition=warming_up), stop_after=4)
    found["straight-stream"] = TrainingCase({"checkpoint": {"every": 3}}, stream="read while training")
    found["resumed-stream"] = TrainingCase(stream="read while training", stop_after=4)
    found["twin-of-stream"] = TrainingCase(stream="stored beforehand")
    for name in SPIKED if is_full else SHORT_SPIKED:
        sections = spiked(name)
        found[f"spike{name}"] = TrainingCase(sections, loss_spikes=[3, 4])
        if name in SHORT_SPIKED:
            found[f"resumed-spike{name}"] = TrainingCase(sections, loss_spikes=[3, 4], stop_after=4)
        if not name.endswith("fp16"):
            sections = sections | {"logging": {"layer_gradients": True}}
            found[f"nan{name}"] = TrainingCase(sections, non_finite_loss=(1, [3, 4]))
    found["branch"] = TrainingCase({"training": {"steps": 12, "evaluate_every": 4}}, begins_from="straight1")
    found["hopeless-spikes"] = TrainingCase(
        zero(1, training={"max_skipped_steps": 3, **spiked("1")["training"]}),
        loss_spikes=list(range(3, 10)),
        fails_with="TrainingError",
    )
    found["hopeless"] = TrainingCase(
        {"training": {"max_skipped_steps": 3}}, non_finite_loss=(0, list(range(10))), fails_with="TrainingError"
    )
    for name, training in (("other-batch", {"global_batch": 4}), ("never", {"resume": "never"})):
        found[name] = TrainingCase({"training": training}, in_directory_of="straight1", fails_with="CheckpointError")
    monitors = {"csv": True, "tensorboard": True, "wandb_project": "project"}
    found["monitored"] = TrainingCase({"logging": monitors}, stop_after=4)
    return found | (more_cases(evaluation) if is_full else {})


def spiked(name: str) -> dict:
    """Return the sections of a case of SPIKED."""
    stage, _, precision = name.partition("-")
    return zero(stage, training={"precision": precision or "fp32", "spike_deviations": 10, "spike_window": 3})


def more_cases(evaluation: dict) -> dict[str, TrainingCase]:
    found = {}
    for precision in ("bf16", "fp16"):
        training = {"precision": precision}
        found[f"straight3-{precision}"] = TrainingCase(zero(3, training=training), save_logits=True)
    failing = zero(1, evaluation=evaluation | {"tasks": ["too_long"], "num_fewshot": 0})
    found["tasks-fail-at-once"] = TrainingCase(failing, fails_with="DataError")
    before = {"evaluation": {"every": 0}}
    found["tasks-fail-later"] = TrainingCase(failing, stop_after=4, before_stopping=before)
    on_tasks = zero(3, evaluation=evaluation, checkpoint={"every": 8})
    found["interrupted-tasks"] = TrainingCase(on_tasks, interruptions=TASK_INTERRUPTIONS)
    decaying = {"schedule": "warmup-stable-decay", "warmup": 2, "decay": 5, "schedule_steps": 10}
    found["straight-decay"] = TrainingCase({"optimizer": decaying})
    stable = {"optimizer": decaying | {"schedule_steps": 1000}}  # a long run, from whose checkpoint another decays
    found["resumed-decay"] = TrainingCase({"optimizer": decaying}, stop_after=4, before_stopping=stable)
    found["straight-mixture"] = TrainingCase(mixture=(3, 2, 1))
    found["resumed-mixture"] = TrainingCase(mixture=(3, 2, 1), stop_after=4)
    for name, training in (("other-weights", {}), ("other-weights-allowed", {"allow_changes": ["data.sets"]})):
        found[name] = TrainingCase(
            {"training": training},
            mixture=(3, 2, 2),
            in_directory_of="straight-mixture",
            fails_with="CheckpointError",
        )
    found["broken-data"] = TrainingCase(
        {"training": {"evaluate_every": 0}}, token_outside_vocabulary_at=4, fails_with="DataError"
    )
    found["pythia-checkpoints"] = TrainingCase({"checkpoint": {"early": True, "every": 5, "keep_last": 4}})
    warming_up = {"coefficient": 0.1, "warmup": 4}
    found["warming-up"] = TrainingCase({"inhibition": warming_up, "logging": {"every": 5}})
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def runs(train_cases, tasks, is_full):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return train_cases(2, cases(str(tasks), is_full))


def timeless(lines: list[dict]) -> list[dict]:
    clock = ("tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_gib", "mfu")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@stages
def test_coefficient_zero_is_the_baseline_to_the_bit(runs, metric_lines, stage):
    """Hooks on with coefficient 0, hooks off: the same losses, gradients and held-out losses over 5 steps."""
    plain, hooked = (metric_lines(runs / f"{name}{stage}") for name in ("none", "zero-coefficient"))
    assert len(plain) == 5
    for key in ("lm_loss", "gradient_norm"):
        assert [line[key] for line in plain] == [line[key] for line in hooked]
    assert all("observed_share" in line for line in hooked)
    assert not any("observed_share" in line for line in plain)
    plain, hooked = (metric_lines(runs / f"{name}{stage}", "evaluation") for name in ("none", "zero-coefficient"))
    assert plain == hooked


@pytest.mark.parametrize("stage", SHORT_STAGES)
def test_interrupted_is_bit_identical(runs, metric_lines, stage):
    """Asked to stop again and again, in training, evaluation and saving, by either rank: all ranks save and stop at the
    same step, and in the end every number is that of the run itself."""
    straight, interrupted = runs / f"straight{stage}", runs / f"interrupted{stage}"
    told = (interrupted / "interrupted-rank0.txt").read_text()
    assert told == (interrupted / "interrupted-rank1.txt").read_text()
    expected = [
        "SIGTERM at rank 1; nothing was done yet",
        "SIGUSR1 at rank 1; step 2 is saved",
        f"{interrupted / 'stop'} was written; step 4 is saved",
        "SIGTERM at rank 0; step 5 is saved",
        "SIGUSR1 at rank 1; step 7 is saved",
        "SIGUSR1 at rank 0; step 8 is saved",
    ]
    assert told.splitlines() == expected
    assert not (interrupted / "stop").exists()
    for kind in ("train", "evaluation"):
        assert timeless(metric_lines(interrupted, kind)) == timeless(metric_lines(straight, kind))
    _same_checkpoint(straight, interrupted)


def test_a_run_that_was_stopped_at_its_last_step_is_finished_once_it_is_evaluated(runs, metric_lines, tmp_path):
    """Its checkpoint does not know of that evaluation: the next start makes it, and those after it do nothing."""
    straight, stopped = runs / "straight1", tmp_path / "run"
    shutil.copytree(runs / "stopped-at-the-end", stopped)
    assert "step 10 is saved" in (stopped / "interrupted-rank0.txt").read_text()
    assert timeless(metric_lines(stopped, "evaluation")) == timeless(metric_lines(straight, "evaluation"))
    last = stopped / "checkpoints/step00000010"
    assert read_state(last)["train"]["evaluated"] == 5
    config = saved_config(read_state(last)["config"], last).replace("training", run_directory=str(stopped))
    assert is_finished(config, open_checkpoints(config))
    keep_lines(stopped / "metrics.jsonl", lambda kind, step: kind != "evaluation" or step < 10)
    assert not is_finished(config, open_checkpoints(config))


@pytest.mark.parametrize("stage", SHORT_STAGES)
def test_evaluation_on_tasks_leaves_a_run_as_it_is(runs, metric_lines, stage):
    """Metrics, weights, optimizer, random states, moments and tau are those of a run without it, to the bit; and
    without a profile."""
    plain, evaluated = runs / f"straight{stage}", runs / f"tasks{stage}"
    assert [line["step"] for line in metric_lines(evaluated, "tasks")] == [0, 4, 8, 10]
    for kind in ("train", "evaluation"):
        assert timeless(metric_lines(evaluated, kind)) == timeless(metric_lines(plain, kind))
    _same_checkpoint(plain, evaluated)


@pytest.mark.parametrize("stage", SHORT_STAGES)
def test_a_profile_holds_the_steps_that_were_asked_for(runs, stage):
    """Of rank 0: from the third to the fifth step, and with an evaluation after the fourth, none of it in a step."""
    (path,) = (runs / f"tasks{stage}/profile").iterdir()
    assert path.name == "step00000003-rank0.json.gz"
    assert traced_steps(path) == [3, 4, 5]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"aten::_fused_adamw_", "aten::addmm" if stage == 1 else "LinearFunctionForZeroStage3"} <= names


def test_a_profile_of_an_interrupted_run_is_written_in_parts(runs):
    """Each process warms the profiler up in its first step: 3, 5, 6 and 8 of a trace of 4 to 9."""
    paths = sorted((runs / "interrupted1/profile").iterdir())
    assert [path.name for path in paths] == ["step00000004-rank0.json.gz", "step00000007-rank0.json.gz"]
    assert [traced_steps(path) for path in paths] == [[4], [7]]


def traced_steps(path: Path) -> list[int]:
    """Return the steps that a trace has whole, in the order of time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("ProfilerStep#")]
    steps.sort(key=lambda event: event["ts"])
    return [int(event["name"].partition("#")[2]) for event in steps]


@pytest.mark.parametrize("stage", SHORT_STAGES)
def test_samples_are_those_of_generate(runs, tasks, capsys, stage):
    """At every evaluation; by both ranks, as one process continues the prompts from the checkpoint."""
    run = runs / f"texts{stage}"
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == list(itertools.product((0, 5, 10), PROMPTS))
    assert [line["tokens"] for line in lines[::2]] == [0, 5 * 128, 10 * 128]
    options = ["--tokenizer", str(tasks / "words.json"), "--tokens", "9"]
    assert main(["generate", str(run), "--prompt", *PROMPTS, *options]) == 0
    found = [block.splitlines()[2] for block in capsys.readouterr().out.split("\n\n")]
    assert found == [line["text"] for line in lines[-2:]] and lines[0]["text"] != lines[-2]["text"]


@pytest.mark.parametrize("stage", SHORT_STAGES)
def test_evaluated_texts_and_samples_leave_a_run_as_it_is(runs, metric_lines, tmp_path, stage):
    """To the bit. Their losses are those of the exported model: all sequences, and nothing of the rest."""
    from transformers import AutoModelForCausalLM

    plain, evaluated = runs / f"straight{stage}", runs / f"texts{stage}"
    assert timeless(metric_lines(evaluated)) == timeless(metric_lines(plain))
    lines = metric_lines(evaluated, "evaluation")
    without = [{key: value for key, value in line.items() if not key.startswith("text_")} for line in lines]
    assert without == metric_lines(plain, "evaluation")
    _same_checkpoint(plain, evaluated)

    export(evaluated, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for text, count in zip(texts(), (11, 1), strict=True):
        tokens = torch.from_numpy(text.dataset.tokens.astype("int64"))
        losses = []
        for index in range(count):
            row = tokens[index * LENGTH : (index + 1) * LENGTH + 1]
            with torch.no_grad():
                chances = model(row[None, :-1]).logits[0].log_softmax(-1)
            losses += chances.gather(1, row[1:, None]).neg().flatten().tolist()
        loss = sum(losses) / len(losses)
        assert lines[-1][f"text_loss/{text.name}"] == pytest.approx(loss, rel=1e-5)
        assert lines[-1][f"text_bits_per_byte/{text.name}"] == pytest.approx(loss * math.log2(math.e) / 3, rel=1e-5)
        assert lines[0][f"text_loss/{text.name}"] > lines[-1][f"text_loss/{text.name}"] or text.name == "single"


@pytest.mark.full
def test_evaluation_on_tasks_can_be_interrupted(runs, metric_lines):
    """By either rank, at ZeRO-3, where all must go on together: saved, and the same figures in the end."""
    run = runs / "interrupted-tasks"
    assert (run / "interrupted-rank0.txt").read_text().splitlines() == [
        "SIGTERM at rank 1; step 4 is saved",
        "SIGUSR1 at rank 0; step 8 is saved",
    ]
    assert timeless(metric_lines(run, "tasks")) == timeless(metric_lines(runs / "tasks3", "tasks"))
    assert read_results(run) == read_results(runs / "tasks3")
    _same_checkpoint(runs / "straight3", run)


@pytest.mark.full
def test_tasks_that_fail_end_a_run_at_its_start_only(runs, metric_lines):
    """To generate more than fits the context: said on both ranks before the first step, and later a warning."""
    told = "evaluation.tasks: rank 0: AssertionError: Invalid configuration: requested max tokens to generate (9999)"
    for rank in (0, 1):
        assert (runs / f"tasks-fail-at-once-rank{rank}.txt").read_text().startswith(told)
    later = runs / "tasks-fail-later"
    lines = metric_lines(later, "tasks")
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert all(line["error"].startswith(told) for line in lines)
    _same_checkpoint(runs / "straight1", later)


def test_figures_on_two_ranks_are_those_of_evaluate_on_one(runs, tasks, tmp_path):
    """Of the last step, as it was trained by two ranks, and of its checkpoint, as one process reads it."""
    run = runs / "tasks1"
    command = ["evaluate", str(run), "--tasks", *TASKS, "--include-path", str(tasks), "--num-fewshot", "0", "2"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks had: more would add up in another order
    command += ["--batch-size", "3", "--tokenizer", str(tasks / "words.json"), "--output", str(tmp_path / "one.jsonl")]
    try:
        assert main(command) == 0
    finally:
        torch.set_num_threads(threads)
    written = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    trained = [line for line in map(json.loads, (run / FILE).read_text().splitlines()) if line["step"] == 10]
    assert [line["ranks"] for line in trained] == [2, 2] and [line["ranks"] for line in written] == [1, 1]
    assert [line["tasks"] for line in written] == [line["tasks"] for line in trained]


@pytest.mark.parametrize(
    "name",
    in_short(
        ["1", "3", "-dropout", "-fp16", "-stream", "-strength"],
        [*map(str, STAGES), "-bf16", "-decay", "-dropout", "-fp16", "-mixture", "-stream", "-strength"],
    ),
)
def test_resumed_is_bit_identical(runs, metric_lines, name):
    """Stopped after step 4 and resumed in a new engine: metrics, weights, moments and tau as if never stopped."""
    straight, resumed = runs / f"straight{name}", runs / f"resumed{name}"
    assert timeless(metric_lines(resumed)) == timeless(metric_lines(straight))
    _same_checkpoint(straight, resumed)


def test_a_run_that_begins_from_another_is_its_own(runs, metric_lines):
    """It evaluates at its start, to what the other had there, and nothing is left of an attempt that saved nothing."""
    evaluations = metric_lines(runs / "branch", "evaluation")
    assert [line["step"] for line in evaluations] == [10, 12]
    assert evaluations[0] == metric_lines(runs / "straight1", "evaluation")[-1]
    assert [line["step"] for line in metric_lines(runs / "branch")] == [11, 12]


def test_a_stream_is_trained_on_as_if_it_were_stored(runs, metric_lines):
    """Mixed with a set of token files, on both ranks, through the end of its text."""
    stream, twin = (timeless(metric_lines(runs / name)) for name in ("straight-stream", "twin-of-stream"))
    epochs = [line.pop("epochs/words") for line in stream]
    assert epochs == sorted(epochs) and epochs[0] == 0 and epochs[-1] >= 1
    assert all(line.pop("epochs/words") < 1 for line in twin)
    assert stream == twin
    assert stream[-1]["tokens/words"] + stream[-1]["tokens/stored"] == 10 * 8 * 16


def _same_checkpoint(straight, resumed, precision="fp32"):
    first, second = (run / "checkpoints/step00000010" for run in (straight, resumed))
    # float32: the master weights, where the stage keeps them
    weights, others = (checkpoint_weights(path, precision) for path in (first, second))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    for file in ("inhibition", "rng-rank00000", "rng-rank00001"):
        ours, theirs = (load_file(path / f"{file}.safetensors") for path in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "name", in_short(["1", "3", "-fp16"], ["0", "1", "3", "-bf16", "-fp16"])
)  # in half precision under ZeRO-2
def test_non_finite_steps_are_skipped_by_all(runs, metric_lines, name):
    """Rank 1's loss is not a number in two steps: no rank moves weights, schedule, moments or tau."""
    lines = metric_lines(runs / f"nan{name}")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert lines[-1]["applied_steps"] == 8
    assert lines[3]["lm_loss"] is None
    for part in ("layer0", "layer3", "rest"):
        assert [line[f"gradient_norm/{part}"] is None for line in lines] == [step in (3, 4) for step in range(10)]
    assert lines[5]["learning_rate"] > lines[2]["learning_rate"]
    assert all(math.isfinite(line["lm_loss"]) for line in lines[5:])
    state = load_file(runs / f"nan{name}/checkpoints/step00000010/inhibition.safetensors")
    assert int(state["steps"]) == 8
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    weights = checkpoint_weights(runs / f"nan{name}/checkpoints/step00000010", "fp32")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("name", in_short(SHORT_SPIKED, SPIKED))
def test_spikes_are_skipped_as_non_finite_steps_are(runs, metric_lines, name):
    """Two steps with a gradient norm far above that of the three before them: in the end weights, optimizer, moments
    and tau are, to the bit, those of a run in which these steps were not finite, and the layers' gradients were
    measured."""
    run = runs / f"spike{name}"
    lines = metric_lines(run)
    for key in ("skipped_steps", "spikes"):
        assert [line[key] for line in lines] == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    norms = [line["gradient_norm"] for line in lines]
    assert min(norms[3:5]) > 10 * max(norms[:3] + norms[5:])
    assert lines[-1]["applied_steps"] == 8
    kept = read_state(run / "checkpoints/step00000010")["train"]["gradient_norms"]
    assert kept == norms[-3:]
    if name.endswith("fp16"):
        assert len({line["loss_scale"] for line in lines}) == 1  # such a step says nothing against it
    else:
        for line, other in zip(timeless(lines), timeless(metric_lines(runs / f"nan{name}")), strict=True):
            if line["step"] not in (4, 5):
                assert line == {key: value for key, value in other.items() if not key.startswith("gradient_norm/")}
        _same_checkpoint(run, runs / f"nan{name}", kept_precision(name))


@pytest.mark.parametrize("name", SHORT_SPIKED)
def test_spikes_are_skipped_after_resuming_as_before(runs, metric_lines, name):
    """Stopped between the two: the second is found by the norms that the checkpoint holds."""
    first, resumed = runs / f"spike{name}", runs / f"resumed-spike{name}"
    assert timeless(metric_lines(resumed)) == timeless(metric_lines(first))
    _same_checkpoint(first, resumed, kept_precision(name))


def kept_precision(name: str) -> str:
    """Return the precision of the weights in a checkpoint of a case of SPIKED."""
    return "bf16" if name == "0-bf16" else "fp32"


def test_too_many_spikes_end_the_run_on_every_rank(runs):
    for rank in (0, 1):
        message = (runs / f"hopeless-spikes-rank{rank}.txt").read_text()
        said = "3 steps in a row changed no weight; the last one, step 6, was skipped for its gradient norm ("
        assert said in message
        assert message.endswith("with null, and name that key in training.allow_changes")


def test_too_many_skipped_steps_end_the_run_on_every_rank(runs):
    for rank in (0, 1):
        message = (runs / f"hopeless-rank{rank}.txt").read_text()
        assert "3 steps in a row" in message
        assert "training.max_skipped_steps" in message


@pytest.mark.full
def test_data_that_cannot_be_read_ends_the_run_at_its_step(runs, metric_lines):
    """Read two steps ahead in a thread, the error comes where the step needs it, as it was raised."""
    assert [line["step"] for line in metric_lines(runs / "broken-data")] == [1, 2, 3, 4]
    for rank in (0, 1):
        message = (runs / f"broken-data-rank{rank}.txt").read_text()
        assert message.startswith("train: token id 64 at position ")


def test_another_batch_or_a_fresh_start_is_refused_in_a_used_directory(runs):
    for rank in (0, 1):
        message = (runs / f"other-batch-rank{rank}.txt").read_text()
        assert "was trained with other values: training.global_batch: 8 -> 4; give those again" in message
        assert "training.resume: got never" in (runs / f"never-rank{rank}.txt").read_text()


@pytest.mark.full
def test_other_weights_are_refused(runs):
    """What the user allows must still be the same data."""
    for rank in (0, 1):
        assert "was trained with other values: data.sets: " in (runs / f"other-weights-rank{rank}.txt").read_text()
        message = (runs / f"other-weights-allowed-rank{rank}.txt").read_text()
        assert "mixed 3/2/1, this run has data short " in message
        assert "mixed 3/2/2, which no resume may change" in message


@pytest.mark.parametrize(
    "name", in_short(["1", "3", "-fp16"], [*map(str, STAGES), "-bf16", "-fp16", "3-bf16", "3-fp16"])
)
def test_exported_logits_equal_the_engine_s(runs, tmp_path, name):
    from transformers import AutoModelForCausalLM

    run = runs / f"straight{name}"
    done = export(run, tmp_path / "model")
    assert done.step == 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    precision = name.partition("-")[2] or "fp32"
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    expected = load_file(run / "logits.safetensors")["logits"]
    with torch.no_grad():
        logits = model(torch.arange(32).reshape(2, 16) % 64).logits
    if name.startswith("3"):
        # DeepSpeed's linear under ZeRO-3 rounds twice: after x W^T and after adding the bias, in each of eight
        eps = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11}[precision]
        assert float((logits - expected).abs().max()) < 8 * eps * float(expected.abs().max())
    else:
        assert torch.equal(logits, expected)


@stages
def test_generated_text_is_the_run_s(runs, tasks, tmp_path, capsys, stage):
    """From the shards of both ranks: the likeliest tokens by the exported model, each from the whole text before it."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    run, words = runs / f"straight{stage}", str(tasks / "words.json")
    options = ["--tokenizer", words, "--tokens", "9", "--temperature", "0"]
    assert main(["generate", str(run), "--prompt", "w3 w4", *options]) == 0
    said = capsys.readouterr().out
    export(run, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=words)
    ids = tokenizer("w3 w4")["input_ids"]
    with torch.no_grad():
        for _ in range(9):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert said.splitlines()[-1] == tokenizer.decode(ids).removeprefix("w3 w4")


@pytest.mark.parametrize("name", in_short(["-fp16"], ["-bf16", "-fp16", "3-bf16"]))
def test_exported_master_weights_round_to_the_engine_s(runs, name):
    """`--precision fp32` writes the float32 master weights; rounded, they are what the engine computed with."""
    checkpoint = runs / f"straight{name}/checkpoints/step00000010"
    precision = name.partition("-")[2]
    master, half = checkpoint_weights(checkpoint, "fp32"), checkpoint_weights(checkpoint, precision)
    assert master.keys() == half.keys()
    assert all(torch.equal(master[key].to(half[key].dtype), half[key]) for key in half)
    assert any(not torch.equal(master[key], half[key].float()) for key in half)


@pytest.mark.full
def test_checkpoints_at_pythias_steps(runs):
    kept = [path.name for path in complete_checkpoints(runs / "pythia-checkpoints")]
    assert kept == ["step00000004", "step00000005", "step00000008", "step00000010"]
    assert (runs / "pythia-checkpoints/checkpoints/latest").read_text().strip() == kept[-1]


def test_checkpoint_is_complete_and_ours_is_not_pickle(runs):
    path = runs / "straight3/checkpoints/step00000010"
    assert verify(path) is None
    names = {file.name for file in path.iterdir()}
    assert {"state.json", "inhibition.safetensors", "rng-rank00000.safetensors", "rng-rank00001.safetensors"} <= names
    assert all(name.endswith((".json", ".safetensors", "_states.pt")) for name in names)
    assert sum(name.endswith("optim_states.pt") for name in names) == 2


@pytest.mark.full
def test_coefficient_warms_up(runs, metric_lines):
    """The coefficient of the newest step, and the mean of each step's coefficient times its loss."""
    lines = metric_lines(runs / "warming-up")
    assert [line["coefficient"] for line in lines] == pytest.approx([0.1, 0.1])
    assert lines[1]["inhibition_loss_weighted"] == pytest.approx(0.1 * lines[1]["inhibition_loss"])
    assert lines[0]["inhibition_loss_weighted"] != pytest.approx(0.1 * lines[0]["inhibition_loss"])


def test_monitors_get_the_metrics(runs, metric_lines):
    """On rank 0 alone, under one heading, as one run, before and after the stop. (What exactly: test_monitors.py.)"""
    run = runs / "monitored"
    heading, *rows = csv.reader((run / "csv/train_lm_loss.csv").open())
    assert heading == ["step", "lm_loss"]
    assert [(int(row[0]), float(row[1])) for row in rows] == [
        (line["step"], line["lm_loss"]) for line in metric_lines(run)
    ]
    assert len(list((run / "tensorboard").iterdir())) == 2
    name = f"run-{(run / WANDB_ID).read_text().strip()}.wandb"
    assert [path.name for path in run.glob("wandb/offline-run-*/*.wandb")] == [name, name]
