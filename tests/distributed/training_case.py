"""One training run of the tests: a tiny network on random tokens, and what happens to it on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.processes import REPOSITORY

VOCABULARY, LENGTH = 64, 16
SPIKE = 30

TINY_RUN: dict[str, dict[str, Any]] = {
    "model": {"name": "pythia-14m", "vocab_size": VOCABULARY, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
    "data": {"source": "stdlib", "train_tokenizer": 300, "sequence_length": LENGTH},
    "optimizer": {"peak_learning_rate": 3e-3, "warmup": 0.2, "schedule_steps": 20},
    "training": {"steps": 10, "global_batch": 8, "precision": "fp32", "evaluate_every": 5, "evaluation_sequences": 7},
    "inhibition": {"loss": "published", "coefficient": 1e-2, "statistics_window": 5},
    "deepspeed": {"config": "ds_configs/zero1.json"},
    "checkpoint": {"every": 0},
    "logging": {"every": 1, "progress": False},
}
"""The run file over which a case's sections are laid; the micro-batch is a rank's whole share unless a case says so."""


STRENGTH = {
    "loss": "projected",
    "coefficient": None,
    "strength": 0.5,
    "start": 0.2,
    "warmup": 2,
    "decay": 0.3,
    "end": 9,
}
"""A section `inhibition` of relative strength, with every part of a schedule of ten steps."""


class Interruption(NamedTuple):
    """Rank `rank` is asked to stop at a place of a step, by a real signal to its process or by the stop file; or all
    ranks end there without saving, as if they were killed."""

    rank: int
    how: str
    """"SIGTERM", "SIGUSR1", "stop file", or "kill"."""
    where: str
    """"step", "evaluation", "tasks" or "saving"."""
    step: int


@dataclass
class TrainingCase:
    """What `train_cases` trains, in the order of the fields below."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the run file, over those of TINY_RUN; a section `model` that names a pretrained model or a config.json
    replaces its."""
    mixture: tuple[float, ...] | None = None
    """Train on three sets mixed with these weights, of which the last holds nothing out, instead of on one."""
    stream: str | None = None
    """Train on a stream of text and a set: "read while training", or the same text "stored beforehand"."""

    texts: bool = False
    """Evaluate two texts beside the held-out one."""

    in_directory_of: str | None = None
    """The earlier case whose run directory this one trains in."""
    copy_of: str | None = None
    """The run directory of which this one begins as a copy."""
    begins_from: str | None = None
    """The earlier case from whose checkpoint this one begins, where an attempt that saved nothing has left metrics."""
    stop_after: int | None = None
    """Train so many steps, close everything, and go on in a second trainer."""
    before_stopping: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the first of the two trainers in place of the case's."""
    interruptions: list[Interruption] = field(default_factory=list)
    """So many trainers, each of which is interrupted; another one then goes on to the end."""

    non_finite_loss: tuple[int, list[int]] | None = None
    """The loss of this rank is not a number in these steps."""
    loss_spikes: list[int] = field(default_factory=list)
    """In these steps every rank's loss is SPIKE times what it is."""
    token_outside_vocabulary_at: int | None = None
    """The step whose batch holds a token id that the network has no row for."""
    fails_with: str | None = None
    """The name of the exception that training must raise; each rank's message is kept in NAME-rankR.txt."""
    loads_wrongly: bool = False
    """An elastic load gives the engine a master weight that the shards do not hold."""
    save_engine_state: bool = False
    """Keep what the engine holds before it trains, in engine_state.safetensors."""
    save_logits: bool = False
    """Keep the engine's logits at the end, in logits.safetensors."""

    def __post_init__(self) -> None:
        self.interruptions = [Interruption(*interruption) for interruption in self.interruptions]


def zero(stage: int, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a run under this ZeRO stage."""
    return {"deepspeed": {"config": f"ds_configs/zero{stage}.json"}, **sections}


def is_zero3(case: TrainingCase) -> bool:
    path = REPOSITORY / case.sections.get("deepspeed", TINY_RUN["deepspeed"])["config"]
    return json.loads(path.read_text())["zero_optimization"]["stage"] == 3
