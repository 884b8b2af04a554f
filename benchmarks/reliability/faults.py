"""`python -m benchmarks faults`: whether a run survives faults, and is still the same run.

A small run is trained once without disturbance. Then it is trained again through the real launcher and supervisor while
one fault after another is injected, each at a random moment. After each the run resumes by itself; every line of its
metrics must be bit-identical to the undisturbed run's of the same step, and so must the weights and the state of the
optimizer at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._pytree import keystr, tree_flatten_with_path

from benchmarks.about import Option, new_folder, say
from benchmarks.reliability import virtual_slurm
from benchmarks.reliability.watched_run import RunEnded, RunLost, WatchedRun, read_reference
from l2e_ds.console import markdown
from l2e_ds.distributed.launch import Launch, free_port
from l2e_ds.errors import L2EError, SaveError
from l2e_ds.run_directory.manifest import verify
from l2e_ds.run_directory.metrics import read_metrics
from l2e_ds.run_directory.names import checkpoint_name
from l2e_ds.system.process import prepare_libraries

OUTPUT = Path("runs/faults")
PACKAGES = ("torch", "deepspeed", "transformers")
OPTIONS = {
    "faults": Option(100, "how many", 1),
    "seed": Option(1, "decides kinds, moments, ranks and files"),
    "ranks": Option(2, "of the run, on this machine", 2),
}
EVERY = 20
"""Steps between checkpoints."""
KEPT = 3
"""Checkpoints that are kept."""
TIMEOUT = 0.5
"""`training.timeout` in minutes."""
DISK_MEGABYTES = 24
GONE_WITHIN = 60.0
"""Seconds within which a killed process must be gone."""

KINDS: dict[str, tuple[int, str]] = {
    "step": (30, "SIGKILL in the middle of a step, of one rank or of all"),
    "save": (24, "SIGKILL while a checkpoint is being written, of one rank or of all"),
    "bit-flipped": (7, "all ranks killed, then one bit of the newest checkpoint flipped"),
    "truncated": (7, "all ranks killed, then a file of the newest checkpoint cut off"),
    "missing": (7, "all ranks killed, then a file of the newest checkpoint removed"),
    "zero-length": (7, "all ranks killed, then a file of the newest checkpoint emptied"),
    "disk, stop": (2, "full disk; `checkpoint.on_error: stop`"),
    "disk, continue": (2, "full disk; `checkpoint.on_error: continue`, then SIGKILL once there is room again"),
    "launch": (4, "SIGKILL of launcher and ranks together, as when a node loses power"),
    "resume": (6, "SIGKILL in the middle of a step, then of launcher and ranks while they resume"),
    "hang": (2, f"SIGSTOP of a rank: no sign of life for `training.timeout` ({TIMEOUT} minutes here)"),
    "node": (2, "SLURM: SIGKILL of a node's slurmd and of everything on it"),
}
"""For each kind of fault, how many of a hundred are of this kind, and what is done. With fewer faults than kinds, the
first kinds are injected."""
ON_DISK, NODE = ("disk, stop", "disk, continue"), "node"
STARTS_OF = {"resume": 2}
"""Restarts that belong to a fault, if not 1."""


@dataclass
class Fault:
    """Holds one injected fault, and what became of the run."""

    number: int
    kind: str
    detail: str = ""
    step: int = 0  # the last step before the fault
    at: float = 0.0
    resumed: int | None = None  # step of the checkpoint from which the run resumed
    redone: int | None = None  # steps that were computed again
    restart_seconds: float | None = None  # from the start of the launcher to the first new step
    outage_seconds: float | None = None  # from the fault to the first new step
    first_start: int = 0  # index of the run's first start after the fault
    starts: int = 0  # starts until it resumed
    compared: int = 0  # lines written after the resume and compared with the undisturbed run's
    wrong: list[str] = field(default_factory=list)  # where they differ
    lost: str | None = None  # why the run did not resume


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Inject the faults, and return what became of them. Raises ConfigError.

    They `passed` if every fault that this machine allows was injected, no run was lost and no resume was wrong.
    """
    prepare_libraries()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the runs, too
    benchmark = Benchmark(new_folder(arguments.output), arguments.faults, arguments.seed, arguments.ranks)
    benchmark.measure()
    return benchmark.record()


def plan(faults: int, generator: random.Random) -> list[str]:
    """Return kinds in the order in which they are injected: in their shares, each at least once if there are enough."""
    chosen = list(KINDS)[:faults]
    while len(chosen) < faults:  # the kind that is furthest below its share
        chosen.append(min(KINDS, key=lambda kind: (chosen.count(kind) + 0.5) / KINDS[kind][0]))
    generator.shuffle(chosen)
    return chosen


class Benchmark:
    """Injects faults into small runs. output: the folder of all that is written; ranks: of every run."""

    def __init__(self, output: Path, faults: int, seed: int, ranks: int) -> None:
        self.output, self.ranks, self.seed = output, ranks, seed
        self.random = random.Random(seed)
        self.kinds = plan(faults, self.random)
        self.steps = 6 * EVERY + EVERY // 2 * len(self.kinds)  # most faults set the run back by some steps
        self.faults: list[Fault] = []
        self.impossible: dict[str, str] = {}  # why each kind cannot be injected here
        self.unasked: list[str] = []  # restarts that no fault explains
        self.ends_differ: str | None = "the run did not reach its end"
        self.reference: dict[int, dict] = {}
        self.save_seconds = self.step_seconds = 0.1
        self.began = time.time()

    def measure(self) -> None:
        """Make all runs, which takes 10 to 25 seconds a fault. Raises L2EError if the undisturbed run fails."""
        self.write_run_file()
        say(f"the undisturbed run: {self.steps} steps on {self.ranks} ranks")
        self.run_undisturbed()
        if on_disk := [kind for kind in self.kinds if kind in ON_DISK]:
            self.disturb_by_a_full_disk(on_disk)
        if NODE in self.kinds:
            self.disturb_under_slurm(self.kinds.count(NODE))
        if others := [kind for kind in self.kinds if kind not in (*ON_DISK, NODE)]:
            self.disturb(others)

    # --- the runs ------------------------------------------------------------------------------------------------

    def write_run_file(self) -> None:
        data = {"source": "stdlib", "train_tokenizer": 320, "max_documents": 40, "max_tokens": 100_000}
        training = {"steps": self.steps, "global_batch": 4 * self.ranks, "micro_batch": 2, "precision": "fp32"}
        content = {
            "model": {"name": "pythia-14m", "vocab_size": 320, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
            "data": {**data, "sequence_length": 16, "held_out": 0.1, "cache": str(self.output / "cache")},
            "optimizer": {"peak_learning_rate": 3e-3},
            "training": {**training, "evaluate_every": 0, "seed": self.seed},
            "inhibition": {"coefficient": 0.01},
            "checkpoint": {"every": EVERY, "keep_last": KEPT},
            "logging": {"every": 1},
        }
        (self.output / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def command(self, directory: Path, *words: str, restarts: int = 0) -> list[str]:
        """Return the command line of the supervisor with the deepspeed launcher."""
        supervisor = [sys.executable, "-m", "l2e_ds.supervise", "--restarts", str(restarts)]
        run = [str(self.output / "run.yaml"), f"training.run_directory={directory}", *words]
        launcher = ["deepspeed", "--num_accelerators", str(self.ranks), "--master_port", str(free_port())]
        return [*supervisor, *run, "--", *launcher, "--log_level", "error", "--module", "l2e_ds.train"]

    def run_undisturbed(self) -> None:
        """Train the undisturbed run, and take its metrics as the reference. Raises L2EError."""
        directory, log = self.output / "undisturbed", self.output / "undisturbed.log"
        run = WatchedRun(directory, log, {})
        try:
            run.start(self.command(directory))
            assert run.process is not None
            code = run.process.wait()
        finally:
            run.end()
        if code != 0:
            raise L2EError(f"the undisturbed run ended with exit code {code}; see {log}")
        self.reference, metrics = read_reference(directory, self.steps), directory / "metrics.jsonl"
        self.save_seconds = statistics.median(line["published_seconds"] for line in read_metrics(metrics, "checkpoint"))
        self.step_seconds = statistics.median(line["step_seconds"] for line in read_metrics(metrics, "train"))
        say(f"{1 / self.step_seconds:.1f} steps/s; a checkpoint is published after {self.save_seconds:.2f} s")

    @contextmanager
    def watched(self, name: str, directory: Path) -> Iterator[WatchedRun]:
        """Yield a run to disturb; no process of it outlives the block."""
        run, before = WatchedRun(directory, self.output / f"{name}.log", self.reference), len(self.faults)
        try:
            yield run
        except RunLost as lost:
            say(f"LOST: {lost}")
            if len(self.faults) == before or self.faults[-1].resumed is not None:
                self.faults.append(self.new_fault(run, "none"))
            self.faults[-1].lost = str(lost)
        finally:
            run.end()
        self.judge(run, self.faults[before:])

    def judge(self, run: WatchedRun, faults: Sequence[Fault]) -> None:
        """Note what each fault did: lines that were written between two faults belong to the resume after the first."""
        ends = [fault.first_start for fault in faults[1:]] + [len(run.starts)]
        for fault, end in zip(faults, ends, strict=True):
            starts = run.starts[fault.first_start : end]
            fault.compared = sum(start.compared for start in starts)
            fault.wrong = [problem for start in starts for problem in start.wrong]
            if fault.kind in ON_DISK:
                starts = starts[: fault.starts]  # the benchmark itself makes the next start
            asked = STARTS_OF.get(fault.kind, 1)
            if not fault.lost and fault.kind != NODE and len(starts) > asked:
                said = [line for start in starts[asked - 1 : -1] for line in start.said]
                self.unasked.append(f"after fault {fault.number}: {' / '.join(said)[-500:]}")

    def disturb(self, kinds: Sequence[str]) -> None:
        """Inject all faults that need only processes and files into one run, which then continues to its end."""
        actions: dict[str, Callable[[WatchedRun, Fault], None]] = {
            "step": self.kill_in_a_step,
            "save": self.kill_in_a_save,
            "launch": self.kill_the_launch,
            "resume": self.kill_while_resuming,
            "hang": self.stop_a_rank,
        }
        directory = self.output / "disturbed"
        with self.watched("disturbed", directory) as run:
            words = [f"training.timeout={TIMEOUT}"]
            run.start(self.command(directory, *words, restarts=100 * len(kinds)))
            try:
                for kind in kinds:
                    run.wait(run.goes_on, "for a first step")
                    fault = self.new_fault(run, kind)
                    self.wait_some_steps(run)
                    actions.get(kind, self.damage_the_newest)(run, fault)
                    self.see_it_resume(run, fault)
                run.wait(lambda: False, "for the end of the run", 600 + 10 * self.steps * self.step_seconds)
            except RunEnded:
                self.ends_differ = self.compare_ends(directory)

    def new_fault(self, run: WatchedRun, kind: str) -> Fault:
        """Return a fault that is about to be injected."""
        return Fault(len(self.faults) + 1, kind, step=run.step, first_start=len(run.starts))

    def see_it_resume(self, run: WatchedRun, fault: Fault) -> None:
        """Wait for the first new step after a fault, and note it. Raises RunLost."""
        self.faults.append(fault)
        before = run.starts[fault.first_start - 1]
        last = fault.first_start + STARTS_OF.get(fault.kind, 1)
        run.wait(lambda: len(run.starts) >= last and run.goes_on(), "for a new step")
        start = run.starts[-1]
        assert start.first_step_at is not None
        fault.step, fault.resumed = before.last_step, start.resumed
        fault.redone = fault.step - start.resumed
        fault.starts = len(run.starts) - fault.first_start
        fault.restart_seconds = round(start.first_step_at - start.at, 2)
        fault.outage_seconds = round(start.first_step_at - fault.at, 2)
        say(
            f"[{fault.number}/{len(self.kinds)}] {fault.kind}: {fault.detail}; at step {fault.step}, resumed from"
            f" {fault.resumed}, {fault.redone} redone, new step {fault.restart_seconds:.1f} s after the restart"
            + (f"; WRONG: {start.wrong[0]}" if start.wrong else "")
        )

    # --- faults of processes and files ---------------------------------------------------------------------------

    def wait_some_steps(self, run: WatchedRun) -> None:
        """Wait for a random number of steps after the newest resume."""
        steps = self.random.randint(0, EVERY * 5 // 4)
        run.wait(lambda: run.goes_on() and run.step >= run.starts[-1].resumed + 1 + steps, f"for {steps} steps")

    def compare_some_steps(self, run: WatchedRun) -> None:
        """Wait until some steps after the newest resume have been compared."""
        run.wait(lambda: run.goes_on() and run.step >= run.starts[-1].resumed + EVERY, f"for {EVERY} steps")

    def choose_victims(self, run: WatchedRun) -> tuple[str, list[psutil.Process]]:
        """Return the name and the processes of one rank, or of all."""
        ranks: dict[int, psutil.Process] = {}

        def all_found() -> bool:
            ranks.update(run.ranks())
            return len(ranks) == self.ranks

        run.wait(all_found, "for the processes of all ranks")
        if self.random.random() < 0.5:
            return "all ranks", list(ranks.values())
        chosen = self.random.randrange(self.ranks)
        return f"rank {chosen}", [ranks[chosen]]

    def kill_in_a_step(self, run: WatchedRun, fault: Fault) -> None:
        name, victims = self.choose_victims(run)
        time.sleep(self.random.uniform(0, 3 * self.step_seconds))
        fault.at, fault.detail = time.time(), f"SIGKILL to {name}"
        kill(victims)

    def kill_in_a_save(self, run: WatchedRun, fault: Fault) -> None:
        name, victims = self.choose_victims(run)
        while True:
            run.wait(run.is_saving, "for a checkpoint to be written")
            seen = time.time()
            time.sleep(self.random.uniform(0, self.save_seconds))
            if run.is_saving():  # else it was published before
                break
        fault.at = time.time()
        kill(victims)
        fault.detail = f"SIGKILL to {name} {fault.at - seen:.3f} s after the save was seen to begin"

    def damage_the_newest(self, run: WatchedRun, fault: Fault) -> None:
        """Kill all ranks, so that none publishes another checkpoint meanwhile, and damage the newest checkpoint."""
        run.wait(lambda: len(run.good()) >= 2, "for a second good checkpoint")
        victims = list(run.ranks().values())
        fault.at = time.time()
        kill(victims)
        checkpoint = run.good()[-1]
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        shards = [path for path in files if path.name.endswith("_states.pt")]
        file = self.random.choice(self.random.choice([shards, files]))
        what = damage(file, fault.kind, self.random)
        run.note_damage(checkpoint)
        fault.detail = f"SIGKILL to all ranks; {checkpoint.name}/{file.name}: {what}"

    def kill_the_launch(self, run: WatchedRun, fault: Fault) -> None:
        time.sleep(self.random.uniform(0, 3 * self.step_seconds))
        victims = run.processes()
        fault.at, fault.detail = time.time(), f"SIGKILL to launcher and ranks, {len(victims)} processes"
        kill(victims)

    def kill_while_resuming(self, run: WatchedRun, fault: Fault) -> None:
        """Kill a rank or all, then the launcher and all ranks while they resume."""
        self.kill_in_a_step(run, fault)
        run.wait(lambda: len(run.starts) > fault.first_start, "for a restart")
        known = [done.restart_seconds for done in self.faults if done.restart_seconds is not None]
        delay = self.random.uniform(0.5, statistics.median(known) if known else 8.0)
        time.sleep(delay)
        kill(run.processes())
        fault.detail += f"; SIGKILL to launcher and ranks {delay:.2f} s after the restart"

    def stop_a_rank(self, run: WatchedRun, fault: Fault) -> None:
        name, victims = self.choose_victims(run)
        fault.at, fault.detail = time.time(), f"SIGSTOP to {name}"
        for victim in victims:
            victim.send_signal(signal.SIGSTOP)

    # --- a full disk ---------------------------------------------------------------------------------------------

    def disturb_by_a_full_disk(self, kinds: Sequence[str]) -> None:
        """Inject full disks into a run on a small file system, which only root can mount."""
        disk = self.output / "small disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(disk)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True)
            problem = mounted.stderr.strip() if mounted.returncode else None
        except OSError as error:
            problem = f"mount: {error.strerror}"
        if problem:
            say(f"a full disk cannot be injected: {problem}")
            self.impossible |= dict.fromkeys(kinds, "needs a small file system, which only root can mount")
            return
        try:
            with self.watched("small disk", disk / "run") as run:
                for kind in kinds:
                    self.fill_the_disk(run, disk, kind)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    def fill_the_disk(self, run: WatchedRun, disk: Path, kind: str) -> None:
        """Start the run, fill its disk, and make room again."""
        words = [f"training.timeout={TIMEOUT}", f"checkpoint.on_error={kind.split(', ')[1]}"]
        command = self.command(disk / "run", *words, restarts=3)
        count = len(run.starts)
        run.start(command)
        run.wait(lambda: len(run.starts) > count and run.goes_on(), "for a first step")
        run.wait(run.newest_good, "for a first checkpoint")
        fault = self.new_fault(run, kind)
        self.wait_some_steps(run)
        fault.at = time.time()
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        if kind == "disk, stop":
            process = run.process
            assert process is not None
            run.wait(lambda: process.poll() is not None, "for its end")
            code = process.returncode
            if code != SaveError.exit_code:
                raise RunLost(f"exit code {code} instead of {SaveError.exit_code}: {' / '.join(run.tail())}")
            filler.unlink()
            fault.detail = f"ended with exit code {code}; room made, same command again"
            fault.at = time.time()
            run.start(command)
        else:
            warning = "(checkpoint.on_error)"
            warnings = run.said().count(warning)
            run.wait(lambda: run.said().count(warning) > warnings, "for a checkpoint that cannot be written")
            good, step = run.newest_good(), run.step
            filler.unlink()
            run.wait(lambda: run.newest_good() > good, "for a checkpoint after room was made")
            fault.detail = f"full until step {step}, newest checkpoint {good} until then; "
            self.wait_some_steps(run)
            name, victims = self.choose_victims(run)
            fault.at = time.time()
            fault.detail += f"then SIGKILL to {name}"
            kill(victims)
        self.see_it_resume(run, fault)
        self.compare_some_steps(run)
        run.end()

    # --- a node of SLURM -----------------------------------------------------------------------------------------

    def disturb_under_slurm(self, count: int) -> None:
        """Kill `count` nodes of a SLURM of two nodes, one after another, under a run."""
        problem = virtual_slurm.why_not()
        if problem is None and self.ranks % 2:
            problem = "needs an even number of ranks, for two nodes"
        if problem is not None:
            say(f"a node of SLURM cannot be killed: {problem}")
            self.impossible[NODE] = problem
            return
        directory = self.output / "slurm"
        with virtual_slurm.virtual_slurm() as environment:
            submit = [sys.executable, "-m", "l2e_ds.cli", "submit", str(self.output / "run.yaml")]
            submit += [f"training.run_directory={directory}", "--nodes", "2", "--gpus-per-node", "0"]
            submit += ["--tasks-per-node", str(self.ranks // 2), "--time", "4:00:00"]
            done = subprocess.run(submit, env=environment, capture_output=True, text=True)
            found = re.search(r"job +(\d+):", done.stdout + done.stderr)
            if done.returncode or not found:
                raise L2EError(f"l2e-ds submit: exit code {done.returncode}: {done.stdout}{done.stderr}")
            job = found[1]
            with self.watched("slurm", directory) as run:
                run.log = directory / "submit-1" / f"slurm-{job}.log"
                try:
                    for _ in range(count):
                        self.kill_a_node(run, job, environment)
                finally:
                    subprocess.run(["scancel", "--signal=KILL", "--full", job], env=environment, capture_output=True)
                    subprocess.run(["scancel", job], env=environment, capture_output=True)

    def kill_a_node(self, run: WatchedRun, job: str, environment: dict[str, str]) -> None:
        """Kill a node of the job, and bring it back once SLURM has requeued the job."""

        def shown(key: str) -> str:
            show = ["scontrol", "show", "job", job, "--oneliner"]
            answer = subprocess.run(show, env=environment, capture_output=True, text=True).stdout
            return dict(re.findall(r"(\w+)=(\S+)", answer)).get(key, "")

        run.wait(run.goes_on, "for a first step")
        fault, times = self.new_fault(run, NODE), int(shown("Restarts"))
        self.wait_some_steps(run)
        node = ("n2", "n1")[times % 2]
        fault.at = time.time()
        killed = virtual_slurm.kill_node(environment, node)
        fault.detail = f"SIGKILL to {len(killed)} processes of node {node}" + (
            ", where the batch script runs" if node == "n1" else ""
        )
        run.wait(lambda: int(shown("Restarts") or 0) > times, "for SLURM to requeue the job")
        run.wait(lambda: shown("JobState") == "PENDING", "for the job to be pending")
        virtual_slurm.bring_back_node(environment, node)
        run.wait(lambda: len(virtual_slurm.ready_nodes(environment)) == 2, "for both nodes to be ready")
        # SLURM delays a requeued job by two minutes; here it starts sooner, but not at once: with 22.05, a job that
        # starts in the second in which its node came back is given one node too few, and its srun waits for ever.
        time.sleep(5)
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(update, env=environment, check=True, capture_output=True)
        fault.detail += "; requeued by SLURM"
        count = len(run.starts)
        run.wait(lambda: len(run.starts) > count, "for the job to start again")
        self.see_it_resume(run, fault)
        self.compare_some_steps(run)

    # --- results -------------------------------------------------------------------------------------------------

    def compare_ends(self, directory: Path) -> str | None:
        """Return in what the last checkpoints or the metrics of both runs differ, or None."""
        try:
            if read_reference(directory, self.steps) != self.reference:
                return "the lines of metrics"
        except L2EError as error:
            return str(error)
        name = checkpoint_name(self.steps)
        here, there = (folder / "checkpoints" / name for folder in (directory, self.output / "undisturbed"))
        for checkpoint in (here, there):
            if problem := verify(checkpoint):
                return f"{checkpoint.name}: {problem}"
        loaders: dict[str, Callable[[Path], dict[str, Any]]] = {".pt": tensors_of_shard, ".safetensors": load_file}
        for file in sorted(there.iterdir()):
            load = loaders.get(file.suffix)
            if load is not None:
                ours, theirs = load(here / file.name), load(file)
                names = ours.keys() if ours.keys() == theirs.keys() else ()
                if not names or not all(torch.equal(ours[name], theirs[name]) for name in names):
                    return file.name
        return None

    def record(self) -> dict[str, Any]:
        """Return the results of all faults, for `page`."""
        expected = [kind for kind in self.kinds if kind not in self.impossible]
        missing = len(expected) - len([fault for fault in self.faults if fault.kind in KINDS])
        fine = not any(fault.lost or fault.wrong for fault in self.faults)
        return {
            "ranks": self.ranks,
            "steps": self.steps,
            "every": EVERY,
            "kept": KEPT,
            "passed": fine and not missing and self.ends_differ is None,
            "missing": missing,
            "ends_differ": self.ends_differ,
            "unasked": self.unasked,
            "not_injected": self.impossible,
            "seconds": round(time.time() - self.began),
            "step_seconds": self.step_seconds,
            "save_seconds": self.save_seconds,
            "faults": [asdict(fault) for fault in self.faults],
        }


def page(results: dict[str, Any]) -> str:
    """Return the page: a row for each kind of fault."""
    faults = results["faults"]
    heads = ["fault", "injected", "lost", "wrong", "lines compared", "most steps redone"]
    heads += ["restart to first new step: median", "max", "fault to first new step: median"]
    rows = [[what, *cells([fault for fault in faults if fault["kind"] == kind])] for kind, (_, what) in KINDS.items()]
    rows.append(["**all**", *(f"**{cell}**" if cell else "" for cell in cells(faults))])
    text = [markdown(heads, rows)]
    for kind, problem in results["not_injected"].items():
        text.append(f"**Not injected on this machine** ({KINDS[kind][1]}): {problem}.\n")
    if results["missing"]:
        text.append(f"**{results['missing']} more faults were planned, but not injected: the run ended before.**\n")
    end = "equal to the bit (weights, optimizer, moments, thresholds, random states, every line of metrics)"
    if results["ends_differ"] is not None:
        end = f"**different: {results['ends_differ']}**"
    text += [
        f"* End of the run that was disturbed, and of the one that was not, at step {results['steps']}: {end}.",
        f"* Restarts that no fault explains: {len(results['unasked'])}.",
        f"* Every run: {results['ranks']} ranks, a checkpoint every {EVERY} steps, the newest {KEPT} kept,"
        f" {1 / results['step_seconds']:.0f} steps/s undisturbed; a checkpoint is published"
        f" {results['save_seconds']:.2f} s after it was begun (medians).",
        f"* `{results['command']}` on {results['date']}, {results['seconds'] / 60:.0f} minutes; {results['machine']};"
        f" load average before it, from other work: {results['load_before']:.1f}.",
        "* " + ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    return "\n".join(text) + "\n"


def cells(faults: Sequence[dict[str, Any]]) -> list[str]:
    """Return a row of the table, without its first cell."""
    if not faults:
        return ["0", *[""] * 7]
    resumed = [fault for fault in faults if fault["resumed"] is not None]
    restarts, outages = ([fault[key] for fault in resumed] for key in ("restart_seconds", "outage_seconds"))
    return [
        str(len([fault for fault in faults if fault["kind"] in KINDS])),
        str(len([fault for fault in faults if fault["lost"]])),
        str(len([fault for fault in faults if fault["wrong"]])),
        str(sum(fault["compared"] for fault in faults)),
        str(max((fault["redone"] for fault in resumed), default="")),
        f"{statistics.median(restarts):.1f} s" if restarts else "",
        f"{max(restarts):.1f} s" if restarts else "",
        f"{statistics.median(outages):.1f} s" if outages else "",
    ]


def damage(file: Path, how: str, generator: random.Random) -> str:
    """Damage a file, and return what was done. how: a kind of `KINDS`."""
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return "removed"
    if how == "bit-flipped":
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        return f"bit {bit} of byte {place} of {len(content)} flipped"
    left = 0 if how == "zero-length" else generator.randrange(1, len(content))
    os.truncate(file, left)
    return f"{len(content)} bytes cut to {left}"


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill all processes at once, and wait until none of them can write any more. Raises RunLost."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + GONE_WITHIN
    for process in processes:
        with contextlib.suppress(psutil.Error):
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > deadline:
                    raise RunLost(f"process {process.pid} does not die of SIGKILL")
                time.sleep(0.001)


def tensors_of_shard(shard: Path) -> dict[str, Any]:
    """Return every tensor of one of DeepSpeed's files by its place in it."""
    leaves, _ = tree_flatten_with_path(torch.load(shard, map_location="cpu", weights_only=False))
    return {keystr(place): leaf for place, leaf in leaves if isinstance(leaf, torch.Tensor)}
