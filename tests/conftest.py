"""Shared by all tests: starting real ranks, and finding out what they wrote."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from l2e_ds.run_directory.metric_table import find
from tests.distributed.training_case import TrainingCase, is_zero3
from tests.processes import REPOSITORY, begin_ranks, environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few long tests first: beside each other, so that none of them is left over at the end."""

    def last(item: pytest.Item) -> bool:
        return "unit" in item.path.relative_to(REPOSITORY / "tests").parts

    items.sort(key=last)


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


@pytest.fixture
def no_fp16(monkeypatch) -> None:
    """The device answers that it does not compute fp16, as most CPUs do: some do."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)


@pytest.fixture(scope="session")
def is_full(pytestconfig) -> bool:
    """Whether tests marked `full` run too: what they need is trained for them alone."""
    return "not full" not in pytestconfig.option.markexpr


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory) -> Callable[..., None]:
    """run_ranks(ranks, *words): `python WORDS` so many times with a launcher's variables; the first that fails ends the
    others, and the test with what was said last."""

    def run(ranks: int, *words: object, timeout: float = 900, accelerator: str = "cpu") -> None:
        log = tmp_path_factory.mktemp("ranks") / "log"
        processes = begin_ranks(ranks, words, environment(accelerator), log)
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
            pytest.fail(f"{words[0]} on {ranks} ranks: exit codes {codes}: {log.read_text()[-8000:]}")

    return run


@pytest.fixture(scope="session")
def train_cases(run_ranks, tmp_path_factory) -> Callable[[int, dict[str, TrainingCase]], Path]:
    """train_cases(ranks, {name: case}): trains them one after another in one launch; returns the folder of their runs.

    Under ZeRO-3 DeepSpeed replaces torch's linear for the rest of the process: such cases are trained last.
    """

    def train(ranks: int, cases: dict[str, TrainingCase]) -> Path:
        output = tmp_path_factory.mktemp(f"ranks{ranks}")
        last = {name for name, case in cases.items() if is_zero3(case)}
        order = sorted(cases, key=lambda name: name in last)
        (output / "cases.json").write_text(json.dumps({name: asdict(cases[name]) for name in order}))
        run_ranks(ranks, REPOSITORY / "tests/distributed/workers/train_cases.py", output)
        return output

    return train


@pytest.fixture(scope="session")
def metric_lines() -> Callable[[Path, str], list[dict]]:
    def read(run: Path, kind: str = "train") -> list[dict]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            unknown = [key for key in line if key != "kind" and find(line["kind"], key) is None]
            assert not unknown, f"{run}, kind {line['kind']}: {unknown} are not in the table of metrics"
        found = [line for line in lines if line["kind"] == kind]
        assert found, f"{run} has no lines of kind {kind}"
        return found

    return read
