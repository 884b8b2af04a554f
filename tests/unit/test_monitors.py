"""CSV, TensorBoard and Weights & Biases beside metrics.jsonl: the same figures, also where a run goes on."""

import csv
import json
import struct
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from l2e_ds.checkpoint.state import TrainState
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.training.metrics import MetricsWriter
from l2e_ds.training.monitors import WANDB_ID

RUN = {
    "model": {"name": "pythia-14m"},
    "data": {"source": "stdlib", "train_tokenizer": 512},
    "training": {"steps": 30},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def config_of(directory: Path, **logging) -> RunConfig:
    training = RUN["training"] | {"run_directory": str(directory)}
    return checked(RunConfig, RUN | {"training": training, "logging": {"progress": False, **logging}}, "here")


def writer(directory: Path, first_step: int, **logging) -> MetricsWriter:
    state = TrainState(first_step, evaluated=first_step, evaluated_on_tasks=first_step)
    return MetricsWriter(config_of(directory, **logging), state, main=True, is_new=first_step == 0)


def train(directory: Path, first_step: int, last_step: int, factor: float, **logging) -> None:
    """What a run writes between two steps, the line of a checkpoint when later ones are there already."""
    metrics = writer(directory, first_step, **logging)
    metrics.write("start", first_step, {"host": "here", "ranks": 1})
    if first_step == 0:
        metrics.write("evaluation", 0, {"tokens": 0, "held_out_loss": factor})
    for step in range(first_step + 1, last_step + 1):
        metrics.write("train", step, {"lm_loss": factor * step, "layer1/tau": step, "gradient_norm": None})
        if step % 5 == 3:
            metrics.write("checkpoint", step - 2, {"bytes": 1000 + step})
        if step % 5 == 0:
            metrics.write("evaluation", step, {"tokens": 10 * step, "held_out_loss": float("nan")})
    metrics.close()


def expected(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Of metrics.jsonl: the numbers of each key, in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        kind, step = line.pop("kind"), line.pop("step")
        for key, value in line.items():
            if kind != "start" and value is not None:
                found.setdefault(f"{kind}/{key}", []).append((step, value))
    return found


def read_csv(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for path in (directory / "csv").iterdir():
        heading, *rows = csv.reader(path.read_text().splitlines())
        assert path.suffix == ".csv" and heading[0] == "step" and path.stem.endswith(heading[1])
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found


def read_tensorboard(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_wandb(directory: Path) -> list[list[Record]]:
    """The records of each start: LevelDB's log format, blocks of 32 KiB, with a header of 7 bytes."""
    starts = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        content, place, record, records = path.read_bytes(), 7, b"", []
        while place + 7 <= len(content):
            left = 2**15 - place % 2**15
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", content[place : place + 7])
            record += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                records.append(Record.FromString(record))
                record = b""
        starts.append(records)
    return starts


def sent(records: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """The history that Weights & Biases was sent, at its x."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in items.items():
                if "/" in key:
                    found.setdefault(key, []).append((items["step"], value))
    return found


def test_an_evaluation_of_which_the_checkpoint_does_not_know_is_made_anew(tmp_path):
    """At the step from which a run goes on, other lines stay; of tasks and of held-out text each by itself."""
    train(tmp_path, 0, 10, 1.0, csv=True)
    first = writer(tmp_path, 10, csv=True)
    for kind in ("guard", "tasks"):
        first.write(kind, 10, {"value": 1.0})
    first.close()
    state = TrainState(10, evaluated=0, evaluated_on_tasks=10)
    MetricsWriter(config_of(tmp_path, csv=True), state, main=True).close()
    points = expected(tmp_path)
    assert points["evaluation/tokens"] == [(0, 0), (5, 50)]
    assert [points[name][-1] for name in ("train/lm_loss", "tasks/value")] == [(10, 10.0), (10, 1.0)]
    assert "guard/value" not in points
    left = {name.replace("/", "_"): found for name, found in points.items()}
    assert {name: found for name, found in read_csv(tmp_path).items() if found} == left


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_goes_on_is_one_run_everywhere(tmp_path, killed):
    """From step 10 after it had come to 17, or from the start for want of a checkpoint; with a row cut off by the kill:
    no step twice, no second heading, the figures of metrics.jsonl."""
    run = tmp_path / "a run"
    everything = {"csv": True, "tensorboard": True, "wandb_project": "project"}
    train(run, 0, 3, 1.0, **everything)
    train(run, 0, 17, 1.0, **everything)
    before = expected(run)
    if killed:
        with (run / "csv" / "train_lm_loss.csv").open("a") as file:
            file.write("1")
        (run / "csv" / "train_layer1_tau.csv").write_text("st")
    train(run, 10, 30, 2.0, **everything)
    after = expected(run)
    assert [step for step, _ in after["train/lm_loss"]] == list(range(1, 31))
    assert after["train/lm_loss"][9:11] == [(10, 10.0), (11, 22.0)]
    assert after["evaluation/held_out_loss"] == [(0, 1.0)]  # of the last attempt only

    table = {name.replace("/", "_"): points for name, points in after.items()}
    if killed:  # nothing was left of it
        table["train_layer1_tau"] = table["train_layer1_tau"][10:]
    assert read_csv(run) == table
    assert read_tensorboard(run) == after

    deadline = time.monotonic() + 120  # its service may write the last lines after `finish`
    while not any(record.HasField("exit") for record in read_wandb(run)[-1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    first, second, third = read_wandb(run)
    assert sent(first) == {name: points for name, points in expected_until(before, 3).items() if points}
    assert sent(second) == before
    assert sent(third) == {name: points for name, points in expected_from(after, 10).items() if points}
    runs = [record.run for records in (first, second, third) for record in records if record.HasField("run")]
    assert {one.run_id for one in runs} == {(run / WANDB_ID).read_text().strip()}
    assert {(one.project, one.display_name) for one in runs} == {("project", "a run")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["training"]["steps"] == 30 and config["logging"]["wandb_project"] == "project"
    axes = {(record.metric.glob_name, record.metric.step_metric) for record in first if record.HasField("metric")}
    assert ("*", "step") in axes
    assert not (Path.cwd() / "wandb").exists()


def expected_until(figures, step):
    return {name: [point for point in points if point[0] <= step] for name, points in figures.items()}


def expected_from(figures, step):
    return {name: [point for point in points if point[0] > step] for name, points in figures.items()}


def test_two_runs_are_two(tmp_path):
    for name in ("a", "b"):
        train(tmp_path / name, 0, 1, 1.0, wandb_project="project")
    assert (tmp_path / "a" / WANDB_ID).read_text() != (tmp_path / "b" / WANDB_ID).read_text()


def test_only_what_was_asked_for(tmp_path):
    train(tmp_path, 0, 5, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_key_costs_no_run(tmp_path, monkeypatch, capfd):
    """Weights & Biases without a login: one line, and the figures are in the run's own files."""
    wandb.teardown()  # it reads the environment once a process
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train(tmp_path / "run", 0, 5, 1.0, csv=True, wandb_project="project")
    wandb.teardown()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("l2e-ds: warning: logging.wandb_project: "), lines
    assert len(read_csv(tmp_path / "run")["train_lm_loss"]) == 5


@pytest.mark.parametrize("monitor", ["csv", "tensorboard", "wandb_project"])
def test_a_monitor_that_fails_costs_no_run(tmp_path, capsys, monitor):
    """At its start and on the way: the others go on, one line says it."""
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train_lm_loss.csv").mkdir()
    (tmp_path / "tensorboard").touch()
    (tmp_path / WANDB_ID).mkdir()
    logging = {monitor: "project" if monitor == "wandb_project" else True}
    train(tmp_path, 0, 5, 1.0, **logging)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("l2e-ds: ")]
    assert len(lines) == 1 and f"warning: logging.{monitor}: " in lines[0]
    assert len(expected(tmp_path)["train/lm_loss"]) == 5


def test_a_monitor_that_fails_on_the_way(tmp_path, capsys):
    metrics = writer(tmp_path, 0, csv=True, tensorboard=True)
    metrics.write("train", 1, {"lm_loss": 1.0})
    (tmp_path / "csv/train_lm_loss.csv").unlink()
    (tmp_path / "csv").rmdir()
    metrics.write("train", 2, {"lm_loss": 2.0})
    metrics.write("train", 3, {"lm_loss": 3.0})
    metrics.close()
    assert capsys.readouterr().err.count("l2e-ds: warning: logging.csv: ") == 1
    assert read_tensorboard(tmp_path) == expected(tmp_path) == {"train/lm_loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}
