"""`python -m benchmarks throughput`: tokens/s, MFU and peak memory, against the alternatives.

l2e-ds, the Hugging Face Trainer and a hand-written minimal DeepSpeed loop train the same network from the same weights
with the same DeepSpeed JSON on the same batches. They alternate, each with processes of its own in every round, and the
ratios are taken round by round. Contenders that do not compute the same losses are not compared. Runs alone, and under
any launcher (`deepspeed --module benchmarks throughput ...`, torchrun, srun, mpirun); rank 0 prints and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.about import Option, heading, median_and_spread, say
from benchmarks.contenders import CONTENDERS, LOG_EVERY, LOST_CONTACT, OURS, PLAIN, SEED, WARMUP
from l2e_ds.config.reading import checked, find_file, split_override
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import markdown
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch, free_port
from l2e_ds.engine.configuration import resolve
from l2e_ds.errors import ConfigError, L2EError
from l2e_ds.models.pythia import PYTHIA, check_sizes, network_config
from l2e_ds.system.installed import is_installed
from l2e_ds.system.process import prepare_libraries

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")
OPTIONS = {
    "models": Option(["pythia-14m", "pythia-70m"], "Pythia sizes"),
    "sequence_length": Option(512, "tokens a sequence", 2),
    "micro_batch": Option(4, "sequences a rank takes at once", 1),
    "accumulation": Option(1, "micro-batches a rank and step", 1),
    "steps": Option(10, "counted steps of a round; two more come before them", 1),
    "rounds": Option(5, "alternations", 1),
    "deepspeed": Option("ds_configs/zero1.json", "DeepSpeed JSON of all contenders"),
    "precision": Option("auto", "auto, fp32, bf16, fp16"),
    "method": Option("l2e", "of l2e-ds: l2e, memel, none"),
}
SECTIONS = ("model", "optimizer", "inhibition", "logging")
"""Sections of a run file whose keys may be overridden."""
FIRST_LOSS = {"fp32": 5e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Nats by which the losses of the first step may differ."""
LAST_LOSS = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
"""Share by which the losses after training may differ: rounding errors grow from step to step."""
POLL = 0.5  # seconds
GRACE = 10.0  # seconds between the first failing rank and the end of the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"of a run file's sections {', '.join(SECTIONS)}"
    )


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return every measurement of every model.

    Raises ConfigError for options; L2EError if a contender fails or computes something else.
    """
    given = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"  # for this process: the GPU's memory is for those that are measured
    prepare_libraries()
    contents = {name: run_file(arguments, name, launch.size) for name in arguments.models}
    check(arguments, contents, launch.size)
    if not is_installed("accelerate"):
        raise ConfigError("bench: the Hugging Face Trainer needs the package accelerate: pip install 'l2e-ds[bench]'")
    process_group.join(launch, 10)
    environment = child_environment(launch.launcher, launch.local_rank, given)
    hosts = collectives.all_gather_objects(socket.gethostname())
    results: dict[str, Any] = {
        "ranks": launch.size,
        "hosts": len(set(hosts)),
        "launcher": launch.launcher,
        "models": {},
    }
    with tempfile.TemporaryDirectory(prefix="l2e-bench-") as folder:
        for name, content in contents.items():
            results["models"][name] = measure_model(name, content, arguments.rounds, environment, Path(folder))
    process_group.leave()
    return results


# --- options -----------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace, contents: dict[str, dict], ranks: int) -> None:
    """Check all options that can be checked without the device. Raises ConfigError."""
    check_sizes("--models", contents)
    if not contents:
        raise ConfigError(f"--models: got none, allowed: {', '.join(PYTHIA)}")
    if find_file(arguments.deepspeed) is None:
        raise ConfigError(f"--deepspeed: no such file: {arguments.deepspeed}")
    for content in contents.values():
        config, *_ = resolve(checked(RunConfig, content, "bench"), ranks, has_bf16=False)
        network_config(config.model, arguments.sequence_length)


def run_file(arguments: argparse.Namespace, model: str, ranks: int) -> dict[str, dict]:
    """Return the content of the run file that all contenders follow. Raises ConfigError."""
    content: dict[str, dict] = {
        "model": {"name": model},
        "data": {
            "source": "indexed",
            "path": "none",
            "sequence_length": arguments.sequence_length,
            "order": "stored",
        },
        "optimizer": {"warmup": 0.0, "final_ratio": 1.0},  # a constant rate
        "training": {
            "steps": WARMUP + arguments.steps,
            "global_batch": arguments.micro_batch * arguments.accumulation * ranks,
            "micro_batch": arguments.micro_batch,
            "precision": arguments.precision,
            "seed": SEED,
            "resume": "never",
            "evaluate_every": 0,
        },
        "inhibition": {"method": arguments.method},
        "deepspeed": {"config": str(find_file(arguments.deepspeed) or arguments.deepspeed)},
        "checkpoint": {"every": 0},
        "logging": {"every": LOG_EVERY, "progress": False},
    }
    for override in arguments.overrides:
        section, key, value = split_override(override)
        if section not in SECTIONS:
            raise ConfigError(f"override {override!r}: allowed: section.key=value of {', '.join(SECTIONS)}")
        content[section][key] = value
    return content


# --- measuring ---------------------------------------------------------------------------------------------------


def child_environment(launcher: str, local_rank: int, accelerator: str | None) -> dict[str, str]:
    """Return the environment of a contender's process on this rank, without the port. Collective."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    if accelerator is not None:
        environment["DS_ACCELERATOR"] = accelerator
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own rendezvous has another port
    place = {"RANK": collectives.rank(), "WORLD_SIZE": collectives.size(), "LOCAL_RANK": local_rank}
    for name, number in place.items():
        environment[name] = str(number)
    if launcher == "srun":  # there `join` finds the variables itself, and sets more
        environment = {name: value for name, value in environment.items() if name not in place}
    environment["OMP_NUM_THREADS"] = str(threads_of_rank())  # some launchers set 1
    return environment


def threads_of_rank() -> int:
    """Return this rank's share of the cores that it may use. Collective."""
    mine = (socket.gethostname(), sorted(os.sched_getaffinity(0)))
    return max(1, len(mine[1]) // collectives.all_gather_objects(mine).count(mine))


def measure_model(
    model: str, content: dict[str, dict], rounds: int, environment: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Return every measurement of one model; the order of contenders changes from round to round. Collective.

    Raises L2EError if one fails, or if two do not compute the same.
    """
    is_plain = content["inhibition"]["method"] == "none"
    names = [name for name in CONTENDERS if not (name == PLAIN and is_plain)]
    tokens_per_step = content["training"]["global_batch"] * content["data"]["sequence_length"]
    counted = tokens_per_step * (content["training"]["steps"] - WARMUP)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            plain = {} if name == OURS else {"inhibition": {"method": "none"}}
            spec = {"contender": name, "run": content | plain}
            one = combine(measure_once(spec, environment, folder / "contender"), counted)
            found[name].append(one)
            if collectives.is_main():
                say(f"{model}, round {number + 1} of {rounds}, {name}: {one['tokens_per_second']:,.0f} tokens/s")
        same = [name for name in names if name != OURS or is_plain]
        refuse_differences(model, {name: found[name][-1] for name in same})
    ours = [name for name in (OURS, PLAIN) if name in found]
    ratios = {
        one: {
            other: [their["seconds"] / our["seconds"] for our, their in zip(found[one], found[other], strict=True)]
            for other in names
        }
        for one in ours
    }
    return {"tokens_per_step": tokens_per_step, "contenders": found, "ratios": ratios}


def measure_once(spec: dict, environment: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """Return what each rank's process measured. If one fails, all are ended. Collective. Raises L2EError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    run = spec["run"] | {"training": spec["run"]["training"] | {"run_directory": str(folder / "run")}}
    paths = [folder / name for name in ("spec.json", "result.json", "log")]
    paths[0].write_text(json.dumps(spec | {"run": run, "folder": str(folder)}), encoding="utf-8")
    port = collectives.broadcast_object(free_port() if collectives.is_main() else None)
    command = [sys.executable, "-m", "benchmarks.contenders", *map(str, paths[:2])]
    with paths[2].open("wb") as log:
        child = subprocess.Popen(
            command, env=environment | {"MASTER_PORT": str(port)}, stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        _wait_for_all(child)
    finally:
        was_running = child.poll() is None
        child.kill()
        child.wait()
        assert child.stdin is not None
        child.stdin.close()
    problem = None
    if child.returncode != 0:
        said = paths[2].read_text(encoding="utf-8", errors="replace").splitlines() or ["it printed nothing"]
        is_our_word = child.returncode == L2EError.exit_code
        how = f"signal {-child.returncode}" if child.returncode < 0 else "failed"  # 9: perhaps for want of memory
        words = said[-1] if is_our_word else "\n".join([f"{how}:", *said[-30:]])
        # first the error that a contender itself reports, last ranks that only lost another one, or were ended here
        order = 0 if is_our_word else 2 if was_running or child.returncode == LOST_CONTACT else 1
        problem = (order, f"bench: {spec['contender']}, rank {collectives.rank()}: {words}")
    result = None if problem else json.loads(paths[1].read_text(encoding="utf-8"))
    answers = collectives.all_gather_objects((problem, result))
    problems = [problem for problem, _ in answers if problem is not None]
    if problems:
        error = L2EError(min(problems)[1])
        error.on_every_rank = True
        raise error
    return [result for _, result in answers]


def _wait_for_all(child: subprocess.Popen) -> None:
    """Wait until every rank's process has ended, or some seconds after the first that failed. Collective."""
    failed_at: float | None = None
    while True:
        code = child.poll()
        running, failed, patience_is_over = collectives.begin_any(
            code is None, bool(code), failed_at is not None and time.monotonic() - failed_at > GRACE
        )()
        if not running or patience_is_over:
            return
        if failed and failed_at is None:
            failed_at = time.monotonic()
        time.sleep(POLL)


def combine(ranks: list[dict[str, Any]], counted_tokens: int) -> dict[str, Any]:
    """Return one measurement from those of its ranks: the time of the slowest, the memory of the largest."""
    slowest = max(ranks, key=lambda rank: rank["seconds"])
    largest = max(ranks, key=lambda rank: rank["peak_memory_bytes"])
    speed = counted_tokens / slowest["seconds"]
    one = slowest | {key: largest[key] for key in ("peak_memory_bytes", "before_building_bytes")}
    one["tokens_per_second"] = speed
    peaks = [rank["peak_tflops"] for rank in ranks]
    if None not in peaks:
        one["mfu"] = speed * slowest["flops_per_token"] / (sum(peaks) * 1e12)
    return one


def refuse_differences(model: str, found: dict[str, dict[str, Any]]) -> None:
    """Raise L2EError if the losses show that contenders did not compute the same."""
    (first, reference), *others = found.items()
    precision = reference["precision"]
    for name, one in others:
        for when, allowed in {
            "first": FIRST_LOSS[precision],
            "last": LAST_LOSS[precision] * reference["last_loss"],
        }.items():
            mine, theirs = reference[f"{when}_loss"], one[f"{when}_loss"]
            if not abs(mine - theirs) <= allowed:  # also if one is not a number
                error = L2EError(
                    f"bench: {model}: not the same is computed: {when} loss {mine:.5f} of {first}, {theirs:.5f} of"
                    f" {name}; in {precision} {allowed:.2g} may lie between them"
                )
                error.on_every_rank = True
                raise error


# --- the page ----------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """Return the page: a table for each model."""
    parts = [heading("Throughput", results), _explanation(results)]
    for model, found in results["models"].items():
        parts.append(f"## {model}\n\n{_table(found)}")
        same = [name for name in found["contenders"] if name != OURS or PLAIN not in found["contenders"]]
        first, last = ([found["contenders"][name][-1][f"{when}_loss"] for name in same] for when in ("first", "last"))
        parts.append(
            f"Losses of {', '.join(same)}: {min(first):.5f} to {max(first):.5f} in the first step,"
            f" {min(last):.5f} to {max(last):.5f} after the last.\n"
        )
    return "\n".join(parts)


def _explanation(results: dict[str, Any]) -> str:
    options = results["options"]
    one = next(iter(results["models"].values()))["contenders"][OURS][0]
    where = "allocated on the GPU" if one["device"] != "cpu" else "the process's resident set, libraries included"
    devices = (
        f"{results['ranks']} x {one['device']}" if one["device"] != "cpu" else f"{results['ranks']} rank(s) on CPUs"
    )
    return (
        f"{devices}, {one['threads']} threads each, {results['hosts']} host(s), launcher: {results['launcher']};"
        f" {Path(options['deepspeed']).name}, {one['precision']}; a step of a rank: {options['accumulation']} x"
        f" {options['micro_batch']} sequences of {options['sequence_length']:,} tokens. A round has {options['steps']}"
        f" steps after {WARMUP} that are not counted, of each contender in processes of its own; the order changes from"
        f" round to round. All train the same weights on the same batches at the same learning rate with AdamW; each"
        f' reports its loss every {LOG_EVERY} steps. l2e-ds runs with method {options["method"]}. "A over it": A\'s'
        f" tokens/s over the contender's, round by round. Peak memory: {where}, of the largest rank.\n"
    )


def _table(found: dict[str, Any]) -> str:
    ratios: dict[str, dict[str, list[float]]] = found["ratios"]
    with_mfu = "mfu" in found["contenders"][OURS][0]
    heads = ["contender", "tokens/s", *(["MFU, %"] if with_mfu else []), *(f"{one} over it" for one in ratios)]
    heads += ["peak memory, MiB", "of this before the network was built"]
    rows = []
    for name, rounds in found["contenders"].items():
        row = [name, median_and_spread([one["tokens_per_second"] for one in rounds], 0)]
        if with_mfu:
            row.append(median_and_spread([100 * one["mfu"] for one in rounds], 1))
        row += [median_and_spread(ratios[one][name]) for one in ratios]
        row.append(median_and_spread([one["peak_memory_bytes"] / 2**20 for one in rounds], 0))
        row.append(f"{statistics.median(one['before_building_bytes'] / 2**20 for one in rounds):,.0f}")
        rows.append(row)
    return markdown(heads, rows)
