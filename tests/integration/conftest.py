"""A tiny corpus of real sentences, and a run file over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.running import Launch, Ranks

SENTENCES = """The old pilot counted the lights along the coast. Rain came in from the west before noon.
She wrote the numbers twice and crossed out the second. Nobody at the station knew where the train had gone.
A function returns what its body says, and nothing else. The river froze early that year.
def mean(values): return sum(values) / len(values)
Bread, salt, two lemons and a map of the harbour lay on the table. Le chat dort sur la table.""".splitlines()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Write forty text files with different words in different orders."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        lines = [SENTENCES[(index * 3 + line) % 5] + f" {index * line}" for line in range(8)]
        (folder / f"{index:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run_file(tmp_path, corpus) -> Path:
    content = {
        "model": {"name": "pythia-14m", "vocab_size": 320, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
        "data": {
            "source": "text",
            "path": str(corpus),
            "train_tokenizer": 320,
            "sequence_length": 16,
            "held_out": 0.1,
            "cache": str(tmp_path / "cache"),
        },
        "optimizer": {"peak_learning_rate": 3e-3, "schedule_steps": 12},
        "training": {
            "run_directory": str(tmp_path / "run"),
            "steps": 6,
            "global_batch": 8,
            "micro_batch": 2,
            "precision": "fp32",
            "evaluate_every": 3,
            "evaluation_sequences": 10,
        },
        "inhibition": {"coefficient": 0.01},
        "logging": {"every": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., Launch]]:
    """launch(*command, **environment): starts a command in the background; none of its processes outlives the test."""
    started: list[Launch] = []

    def start(*command: object, **environment: str) -> Launch:
        started.append(Launch(tmp_path / f"launch{len(started)}.log", *command, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.find()  # children that would outlive it
        for process in [one.process, *one.seen.values()]:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()


@pytest.fixture
def launch_ranks(tmp_path) -> Iterator[Callable[..., Ranks]]:
    """launch_ranks(count, *words): starts `python WORDS` on so many ranks in the background; none outlives the test."""
    started: list[Ranks] = []

    def start(count: int, *words: object, **variables: str) -> Ranks:
        started.append(Ranks(tmp_path / f"ranks{len(started)}.log", count, *words, **variables))
        return started[-1]

    yield start
    for one in started:
        for process in one.processes:
            process.kill()
            process.wait()
