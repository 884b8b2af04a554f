"""Shared by all tests: starting real ranks, and finding out what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(accelerator: str = "cpu") -> dict[str, str]:
    """For child processes: this repository importable, one thread a rank, and no device but the one asked for."""
    scripts = str(Path(sys.executable).parent)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if accelerator == "cpu" else {}
    return {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")},
        "PYTHONPATH": str(REPOSITORY),
        "PATH": scripts + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        **hidden,
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Commands that join ranks within the test's process leave a launcher's variables behind."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def without_hub(monkeypatch, tmp_path) -> None:
    """`datasets` asks no network, and keeps its files in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """run_ranks(ranks, script, *arguments): so many processes with a launcher's variables; the first that fails ends
    the others, and the test with what was said last. The launchers, of which the deepspeed one takes ten seconds to
    start, have their tests in tests/integration."""

    def run(ranks: int, script: Path, *arguments: object, timeout: float = 500, accelerator: str = "cpu") -> None:
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-u", str(script), *map(str, arguments)]
        with tempfile.TemporaryFile("w+") as said:
            processes = []
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment = {**rank_environment(accelerator), **common, **own}
                processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
            deadline = time.monotonic() + timeout
            try:
                while any(process.poll() is None for process in processes):
                    if any(process.poll() for process in processes) or time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
            finally:
                codes = [process.poll() for process in processes]
                for process in processes:
                    process.kill()
                    process.wait()
            if any(codes) or None in codes:
                said.seek(0)
                pytest.fail(f"{script.name} on {ranks} ranks: exit codes {codes}: {said.read()[-8000:]}")

    return run


@pytest.fixture(scope="session")
def train_cases(run_ranks, tmp_path_factory) -> Callable[[int, dict], Path]:
    """train_cases(ranks, {name: case}): runs them one after another in one launch; returns the folder of their runs.

    A case: {section: {key: value}, ...} over the tiny base run, and optionally "options" (see workers/train_cases.py).
    """

    def train(ranks: int, cases: dict) -> Path:
        output = tmp_path_factory.mktemp(f"ranks{ranks}")
        (output / "cases.json").write_text(json.dumps(cases))
        run_ranks(ranks, REPOSITORY / "tests/distributed/workers/train_cases.py", output)
        return output

    return train


@pytest.fixture(scope="session")
def metric_lines() -> Callable[[Path, str], list[dict]]:
    def read(run: Path, kind: str = "train") -> list[dict]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = [line for line in lines if line["kind"] == kind]
        assert found, f"{run} has no lines of kind {kind}"
        return found

    return read
