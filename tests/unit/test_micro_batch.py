"""Which sizes are tried and chosen, what is remembered, and what a rank may use."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

from l2e_ds.config.batch import divisors
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.engine.configuration import resolve
from l2e_ds.models.pythia import network_config
from l2e_ds.system.memory import cgroup_room
from l2e_ds.training import micro_batch
from l2e_ds.training.micro_batch import choose, circumstances, next_size, none_fits_message, remembered
from l2e_ds.training.micro_batch_trial import Measured
from l2e_ds.training.preflight import describe, preflight, resolve_run

RUN = {
    "model": {"name": "pythia-14m"},
    "data": {"source": "stdlib", "train_tokenizer": 512, "sequence_length": 128},
    "training": {"steps": 10, "global_batch": 48, "micro_batch": "auto", "precision": "fp32"},
}


def search(candidates, limit, truth, by_speed=False):
    """Tried sizes, in order, and the choice; truth(size): what would be measured, or None out of memory."""
    known, tried = {}, []
    while (size := next_size(candidates, known, limit, by_speed)) is not None:
        assert size not in tried
        tried.append(size)
        measured = truth(size)
        if measured is None:
            candidates = [smaller for smaller in candidates if smaller < size]
        else:
            known[size] = measured
    return tried, choose(known, limit, by_speed)


def linear(base, each, step=0.0, speed=lambda size: 1.0):
    return lambda size: Measured(base, base + each * size, step, size / speed(size))


@pytest.mark.parametrize("limit", [10.9, 11, 12, 13, 35, 58, 59, 500])
@pytest.mark.parametrize("share", [1, 7, 48, 1024])
@pytest.mark.parametrize("step", [0.0, 10.5, 30.0])
def test_the_largest_that_fits_is_found_in_few_tries(limit, share, step):
    truth = linear(10, 1, step)
    tried, found = search(divisors(share), limit, truth)
    fitting = [size for size in divisors(share) if truth(size).peak <= limit]
    assert found == max(fitting, default=None)
    assert len(tried) <= 4
    assert all(size in fitting for size in tried[2:])  # only the second may be more than fits


@pytest.mark.parametrize("limit", [40, 100, 300])
def test_the_largest_is_found_where_growth_begins_late(limit):
    """Small micro-batches need what something else needs; a line through them would promise too much."""
    tried, found = search(divisors(1024), limit, lambda size: Measured(10, max(30, 12 + size), 0, 1))
    assert found == max(size for size in divisors(1024) if 12 + size <= limit)
    assert len(tried) <= 8


def test_running_out_of_memory_steps_down():
    """Whatever was foreseen: a child that died at a size leaves those below it."""
    for most in (1, 2, 16, 100):
        _, found = search(divisors(512), 1e9, lambda size, m=most: linear(10, 1)(size) if size <= m else None)
        assert found == max(size for size in divisors(512) if size <= most)
    assert search(divisors(512), 1e9, lambda size: None) == ([1], None)


def test_by_speed_sizes_double_until_nothing_is_gained():
    tried, found = search(divisors(48), 1e9, linear(10, 1, speed=lambda size: min(size, 4)), by_speed=True)
    assert (tried, found) == ([1, 2, 4, 8], 4)
    tried, found = search(divisors(48), 15, linear(10, 1, speed=lambda size: size), by_speed=True)
    assert (tried, found) == ([1, 2, 4], 4)
    tried, found = search([1, 7, 49], 1e9, linear(10, 1, speed=lambda size: size), by_speed=True)
    assert (tried, found) == ([1, 7, 49], 49)


# --- remembering ----------------------------------------------------------------------------------------------------


def about(**sections):
    raw = {section: {**values, **sections.get(section, {})} for section, values in RUN.items()}
    raw |= {section: values for section, values in sections.items() if section not in RUN}
    config, ds, _ = resolve(checked(RunConfig, raw, "here"), 2)
    return circumstances(config, ds, 2) | {"devices": ["cpu"]}


def keep(path, number=8, **changes):
    path.write_text(json.dumps({"micro_batch": number, "circumstances": about() | changes}))


def test_remembered_under_the_same_circumstances(tmp_path):
    path = tmp_path / "micro_batch.json"
    assert remembered(path, about(), divisors(24)) == (None, None)
    keep(path)
    assert remembered(path, about(), divisors(24)) == (8, None)
    for other in ({"training": {"steps": 99, "seed": 3}}, {"logging": {"every": 3}}, {"checkpoint": {"every": 7}}):
        assert remembered(path, about(**other), divisors(24)) == (8, None)
    without = {key: value for key, value in about().items() if key != "devices"}
    assert remembered(path, without, divisors(24)) == (8, None)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"activation_checkpointing": True}}, "model"),
        ({"model": {"num_layers": 3}}, "model"),
        ({"data": {"sequence_length": 64}}, "sequence_length"),
        ({"training": {"precision": "bf16"}}, "precision"),
        ({"inhibition": {"method": "none"}}, "inhibition"),
        ({"deepspeed": {"config": "ds_configs/zero2.json"}}, "deepspeed"),
    ],
)
def test_forgotten_under_others(tmp_path, sections, key):
    path = tmp_path / "micro_batch.json"
    keep(path)
    number, problem = remembered(path, about(**sections), divisors(24))
    assert number is None and problem.startswith("was found under other circumstances (") and key in problem


def test_forgotten_on_other_devices(tmp_path):
    path = tmp_path / "micro_batch.json"
    keep(path, devices=["NVIDIA H100, 79 GiB"])
    assert remembered(path, about(), divisors(24)) == (None, "was found under other circumstances (devices)")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"micro_batch": 8}', '{"micro_batch": 8, "circumstances": 3}', b"\xff\xfe"],
)
def test_a_damaged_file_is_named_so(tmp_path, content):
    path = tmp_path / "micro_batch.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert remembered(path, about(), divisors(24)) == (None, "is damaged")


@pytest.mark.parametrize("number", [0, 5, 8.0, "8", True, None])
def test_a_number_that_cannot_be_is_damage(tmp_path, number):
    path = tmp_path / "micro_batch.json"
    keep(path, number)
    assert remembered(path, about(), divisors(24)) == (None, "is damaged")


def test_dry_run_says_what_will_be(tmp_path):
    """Found at the start, or the number that the run directory holds, if it holds for this run."""
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**RUN, "training": {**RUN["training"], "run_directory": str(tmp_path / "r")}}))

    def line(ranks=2):
        text = describe(preflight(run_file, [], ranks))
        return next(line for line in text.splitlines() if line.startswith("batch"))

    assert "micro-batch auto: found at the start (" in line()
    run = resolve_run(run_file, [], 2)
    path = tmp_path / "r/micro_batch.json"
    path.parent.mkdir()
    kept = circumstances(run.config, run.ds, 2) | {"devices": ["cpu"]}
    path.write_text(json.dumps({"micro_batch": 12, "circumstances": kept}))
    assert f"micro-batch auto: 12, if the devices are those of {path}" in line()
    assert f"found at the start, because {path} was found under other circumstances (ranks" in line(4)
    path.write_text("{")
    assert f"found at the start, because {path} is damaged" in line()


# --- limits ---------------------------------------------------------------------------------------------------------


def test_one_sequence_a_rank_leaves_nothing_to_measure(tmp_path):
    config, ds, _ = resolve(checked(RunConfig, {**RUN, "training": {**RUN["training"], "global_batch": 1}}, "here"), 1)
    assert micro_batch.find(config, ds, network_config(config.model, 128), torch.device("cpu")) == (1, None)


def test_room_of_nested_cgroups(tmp_path):
    """The tightest limit on the way up; cached files count as free."""
    own, folder = tmp_path / "cgroup", tmp_path / "fs/job/step"
    folder.mkdir(parents=True)
    own.write_text("0::/job/step\n")

    def write(where, most, now, cached):
        for name, value in (("max", most), ("current", now), ("stat", f"anon 5\ninactive_file {cached}")):
            (where / f"memory.{name}").write_text(f"{value}\n")

    assert cgroup_room(own, tmp_path / "fs") == math.inf
    write(folder, "max", 100, 0)
    assert cgroup_room(own, tmp_path / "fs") == math.inf
    write(folder.parent, 1000, 700, 50)
    assert cgroup_room(own, tmp_path / "fs") == 350
    write(folder, 900, 600, 0)
    assert cgroup_room(own, tmp_path / "fs") == 300
    assert cgroup_room(tmp_path / "none", tmp_path / "fs") == math.inf


@pytest.mark.parametrize(
    ("known", "needed"), [({1: Measured(2**30, 3 * 2**30, 0, 1)}, "3.00 GiB"), ({}, "more than there is")]
)
def test_not_even_one_is_said_in_one_line(known, needed):
    assert choose(known, 2**31, False) is None
    message = none_fits_message(known, 2**31, "more ranks")
    start = "training.micro_batch: got auto, but not even 1 fits: it needs "
    assert message == f"{start}{needed}, and 2.00 GiB per rank are usable; try more ranks"
