"""`python -m benchmarks data`: how fast text becomes tokens and tokens become batches.

Each measurement has its own table: tokens/s of `l2e-ds tokenize` against `datasets.map` with a plain writer (and
GPT-NeoX's tool, given a checkout), alternately on the same text, tokenizer and number of processes; peak memory against
the size of the text; sequences/s of random access; seconds to open and to seek in up to 300 B tokens; the share of a
step of pythia-70m that waits for data.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.about import Option, heading, median_and_spread, new_folder, say
from l2e_ds.config.sections import DataConfig
from l2e_ds.console import markdown
from l2e_ds.data.dataset import token_dataset
from l2e_ds.data.indexed import IndexedTokens, write_index
from l2e_ds.data.sampler import SequenceOrder
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.data.workers import default_workers
from l2e_ds.distributed.launch import Launch
from l2e_ds.errors import ConfigError, L2EError
from l2e_ds.run_directory.metrics import read_metrics
from l2e_ds.system.files import REPOSITORY, fsync_path
from l2e_ds.system.installed import is_installed

OUTPUT = Path("runs/bench-data")
PACKAGES = ("torch", "tokenizers", "datasets", "numpy", "megatron-core")
OPTIONS = {
    "processes": Option(default_workers(), "of each tool", 1),
    "rounds": Option(3, "alternations", 1),
    "repeat": Option(1, "tokenize the text so many times over", 1),
}
PARTS = ("tokenize", "memory", "reader", "open", "wait")
WIDTH = 2049
"""Tokens of a stored sequence, as of Pythia's data."""
SIZES = (10**6, 10**8, 10**10, 3 * 10**11)
"""Tokens of the sets that are opened; the largest has an index of 2.9 GB and a sparse .bin."""
SEEK = 100_000
"""The step to seek."""
READ = 1 << 28
"""Tokens of the set that is read at random."""
STEPS = 10
SKIPPED = 2
"""Steps that are not counted: their batches are read before anything is computed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE.jsonl", help="with the key text")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="TOKENIZER.json")
    parser.add_argument("--gpt-neox", type=Path, metavar="DIR", help="a checkout, its requirements installed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))


def measure(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return what each part measured.

    Raises ConfigError, and L2EError if a tool fails or tools do not give the same tokens.
    """
    for path in (*arguments.text, arguments.tokenizer):
        if not path.is_file():
            raise ConfigError(f"no such file: {path}")
    if arguments.gpt_neox is not None and not _neox_tool(arguments.gpt_neox).is_file():
        raise ConfigError(f"--gpt-neox: {arguments.gpt_neox} has no tools/datasets/preprocess_data.py")
    output = new_folder(arguments.output)
    results: dict[str, Any] = {}
    measurements = (measure_tokenize, measure_memory, measure_reader, measure_open, measure_wait)
    for name, measure_part in zip(PARTS, measurements, strict=True):
        if name in arguments.only:
            say(f"measuring: {name}")
            folder = output / name
            folder.mkdir()
            results[name] = measure_part(arguments, folder)
            shutil.rmtree(folder)  # gigabytes
    return results


# --- tokenize ----------------------------------------------------------------------------------------------------


def measure_tokenize(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return the seconds of whole processes, in changing order. Raises L2EError if they do not give the same tokens."""
    text = [path.absolute() for path in arguments.text] * arguments.repeat
    joined = folder / "text.jsonl"
    with joined.open("wb") as file:
        for path in text:
            file.write(path.read_bytes())
    tools = {"l2e-ds tokenize": _ours, "datasets.map and a writer": _datasets_map}
    if arguments.gpt_neox is not None:
        tools["GPT-NeoX preprocess_data.py"] = _neox
    names = list(tools)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    expected: bytes | None = None
    for number in range(arguments.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            work = folder / "work"
            work.mkdir()
            command, bin_file = tools[name](arguments, joined, work)
            begin = time.perf_counter()
            _call(command, work)
            seconds[name].append(time.perf_counter() - begin)
            found = bin_file.read_bytes()
            if expected is not None and found != expected:
                raise L2EError(f"bench: {name} gave other tokens than {names[0]}")
            expected = found
            say(f"{name}: {len(found) // 2 / seconds[name][-1]:,.0f} tokens/s")
            shutil.rmtree(work)
    assert expected is not None
    size = joined.stat().st_size
    return {"tokens": len(expected) // 2, "bytes": size, "repeat": arguments.repeat, "seconds": seconds}


def _ours(arguments: argparse.Namespace, text: Path, work: Path) -> tuple[list[str], Path]:
    command = [sys.executable, "-m", "l2e_ds.cli", "tokenize", str(text), "--output", str(work / "ours")]
    command += ["--tokenizer", str(arguments.tokenizer.absolute()), "--append-eod"]
    return [*command, "--workers", str(arguments.processes)], work / "ours.bin"


def _datasets_map(arguments: argparse.Namespace, text: Path, work: Path) -> tuple[list[str], Path]:
    command = [sys.executable, "-m", "benchmarks.datasets_map", str(arguments.tokenizer.absolute())]
    command += [str(arguments.processes), str(work / "map.bin"), str(work / "cache"), str(text)]
    return command, work / "map.bin"


def _neox_tool(checkout: Path) -> Path:
    return checkout.absolute() / "tools/datasets/preprocess_data.py"


def _neox(arguments: argparse.Namespace, text: Path, work: Path) -> tuple[list[str], Path]:
    command = [sys.executable, str(_neox_tool(arguments.gpt_neox)), "--input", str(text), "--append-eod"]
    command += ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(arguments.tokenizer.absolute())]
    command += ["--workers", str(arguments.processes), "--output-prefix", str(work / "neox")]
    return command, work / "neox_text_document.bin"


def _call(command: list[str], folder: Path, watched: bool = False) -> int:
    """Run a command; return the peak of its processes' resident bytes if they are `watched`. Raises L2EError."""
    peak = 0
    with (folder / "log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # benchmarks/ is in the checkout only
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while watched and process.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))
            time.sleep(0.1)
    if process.wait() != 0:
        raise L2EError(f"bench: {' '.join(command[:4])} ... failed:\n{(folder / 'log').read_text()[-2000:]}")
    return peak


# --- memory ------------------------------------------------------------------------------------------------------


def measure_memory(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return the peak resident memory of all processes of `l2e-ds tokenize`, sampled, for 1, 2, 4 and 8 times the
    text."""
    rows = []
    text = folder / "text.jsonl"
    for times in (1, 2, 4, 8):
        with text.open("wb") as file:
            for path in arguments.text * times:
                file.write(path.read_bytes())
        work = folder / "work"
        work.mkdir()
        peak = _call(_ours(arguments, text, work)[0], work, watched=True)
        shutil.rmtree(work)
        rows.append({"bytes": text.stat().st_size, "peak_bytes": peak})
        say(f"{rows[-1]['bytes'] / 1e6:.0f} MB of text: peak {peak / 2**20:.0f} MiB")
    return {"rows": rows}


# --- reading -----------------------------------------------------------------------------------------------------


def write_set(prefix: Path, tokens: int, sparse: bool) -> None:
    """Write a set of sequences of WIDTH tokens (uint16): zeros in a sparse file, or random ids."""
    sequences = tokens // WIDTH
    with Path(f"{prefix}.bin").open("wb") as file:
        if sparse:
            file.truncate(sequences * WIDTH * 2)
        generator = np.random.default_rng(0)
        for first in range(0, 0 if sparse else sequences, 1 << 14):
            count = min(1 << 14, sequences - first)
            file.write(generator.integers(0, 50277, count * WIDTH, dtype=np.uint16).tobytes())
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), np.broadcast_to(np.int32(WIDTH), sequences))
    fsync_path(Path(f"{prefix}.idx"))


def forget(prefix: Path) -> None:
    """Drop a set from the page cache, so that opening it reads from disk."""
    for suffix in (".bin", ".idx"):
        descriptor = os.open(f"{prefix}{suffix}", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_reader(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return sequences/s of alternating readers, in batches of 1,024 at random places of a set in the page cache."""
    prefix = folder / "set"
    write_set(prefix, READ, sparse=False)
    dataset = token_dataset(IndexedTokens(prefix), WIDTH - 1, 50304)
    plain = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r").reshape(-1, WIDTH)
    readers: dict[str, Callable[[np.ndarray], Any]] = {
        "l2e-ds (ids and documents checked)": dataset.batch,
        "np.memmap, row by row (nothing checked)": lambda rows: [plain[row].astype(np.int64) for row in rows],
    }
    if is_installed("megatron.core"):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(str(prefix))
        readers["Megatron-core IndexedDataset"] = lambda rows: [theirs.get(row).astype(np.int64) for row in rows]
    generator = np.random.default_rng(1)
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(-1, 10 * arguments.rounds):
        rows = generator.integers(0, len(dataset), 1024)
        for name, read in readers.items():
            begin = time.perf_counter()
            read(rows)
            if number >= 0:
                speeds[name].append(len(rows) / (time.perf_counter() - begin))
    return {"tokens": READ, "sequences_per_second": speeds}


def open_and_seek(prefix: str) -> dict[str, float]:
    """Return seconds to open a set and to read the first and a late batch, and the memory added; in a new process."""
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    dataset = token_dataset(IndexedTokens(prefix), WIDTH - 1, 50304)
    opened = time.perf_counter() - begin
    order = SequenceOrder(len(dataset), seed=1234)
    seconds = {}
    for step in (0, SEEK):
        begin = time.perf_counter()
        dataset.batch(order.sequences(step * 1024 + np.arange(8)))
        seconds[f"step_{step}"] = time.perf_counter() - begin
    return {"open": opened, **seconds, "memory_bytes": psutil.Process().memory_info().rss - before}


def measure_open(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return the medians of `open_and_seek` for sets of several sizes that are not in the page cache."""
    rows = []
    for tokens in SIZES:
        prefix = folder / f"{tokens}"
        write_set(prefix, tokens, sparse=True)
        found = []
        for _ in range(arguments.rounds):
            forget(prefix)
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found.append(process.submit(open_and_seek, str(prefix)).result())
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append({"tokens": tokens, "index_bytes": Path(f"{prefix}.idx").stat().st_size, **row})
        say(f"{tokens:,} tokens: opened in {row['open']:.4f} s")
    return {"rows": rows}


# --- waiting for data --------------------------------------------------------------------------------------------


def measure_wait(arguments: argparse.Namespace, folder: Path) -> dict:
    """Return the share of pythia-70m's steps that waits for data, from token files and from a stream.

    Sequences have 2,048 tokens. Also return the tokens/s of a stream, since what was read ahead may suffice for so few
    steps.
    """
    text = folder / "text.jsonl"
    text.write_bytes(b"".join(path.read_bytes() for path in arguments.text))
    _call([*_ours(arguments, text, folder)[0]], folder)
    sources: dict[str, dict[str, Any]] = {
        "token files": {"source": "indexed", "path": str(folder / "ours"), "held_out": 0.0},
        "stream, tokenized on the fly": {"source": "jsonl", "path": str(text), "streaming": True, "held_out": 0.0},
    }
    rows: dict[str, dict[str, list[float]]] = {}
    for name, source in sources.items():
        directory = folder / f"run-{len(rows)}"
        training = {"steps": STEPS, "global_batch": 1, "micro_batch": 1, "evaluate_every": 0}
        content = {
            "model": {"name": "pythia-70m"},
            "data": {**source, "tokenizer": str(arguments.tokenizer.absolute()), "sequence_length": 2048, "workers": 1},
            "training": {**training, "run_directory": str(directory)},
            "checkpoint": {"every": 0},
            "logging": {"every": 1, "progress": False},
        }
        run_file = folder / "run.yaml"
        run_file.write_text(yaml.safe_dump(content), encoding="utf-8")
        _call([sys.executable, "-m", "l2e_ds.train", str(run_file)], folder)
        lines = read_metrics(directory / "metrics.jsonl", "train")[SKIPPED:]
        shares = [line["data_wait_seconds"] / line["step_seconds"] for line in lines]
        rows[name] = {"shares": shares, "step_seconds": [line["step_seconds"] for line in lines]}
        say(f"{name}: {statistics.median(shares):.3%} of a step")
    config = DataConfig(
        source="jsonl", path=str(text), streaming=True, tokenizer=str(arguments.tokenizer), held_out=0.0
    )
    stream = TokenStream(config, load_tokenizer(str(arguments.tokenizer)), 2048, seed=1, workers=1)
    stream.take(256)  # what was read ahead
    supply = []
    for _ in range(3 * arguments.rounds):
        begin = time.perf_counter()
        stream.take(256)
        supply.append(256 * 2048 / (time.perf_counter() - begin))
    stream.close()
    say(f"stream, one worker: {statistics.median(supply):,.0f} tokens/s")
    return {"rows": rows, "supply": supply}


# --- the page ----------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """Return the page: a table for each part that was measured."""
    return "\n".join([heading("Data", results), *_tables(results)])


def _tables(results: dict[str, Any]) -> Iterator[str]:
    if found := results.get("tokenize"):
        ours = found["seconds"]["l2e-ds tokenize"]
        rows = []
        for name, seconds in found["seconds"].items():
            speeds = [found["tokens"] / second / 1e6 for second in seconds]
            ratios = [other / mine for other, mine in zip(seconds, ours, strict=True)]
            rows.append([name, median_and_spread(speeds, 2), median_and_spread(ratios, 2)])
        heads = ["tool", "million tokens/s", "its time over ours, round by round"]
        text = f"{found['bytes'] / 1e6:.0f} MB of text, {found['tokens'] / 1e6:.1f} million tokens, the same from all;"
        if found["repeat"] > 1:
            text += f" (a smaller text, {found['repeat']} times over);"
        text += f" {results['options']['processes']} processes each; whole commands, start-up included.\n"
        yield f"## Tokenizing\n\n{text}\n{markdown(heads, rows)}"
    if found := results.get("memory"):
        rows = [[f"{row['bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / 2**20:.0f}"] for row in found["rows"]]
        heads = ["text, MB", "peak of all processes, MiB"]
        yield f"## Memory of tokenizing, {results['options']['processes']} workers\n\n{markdown(heads, rows)}"
    if found := results.get("reader"):
        rows = [[name, median_and_spread(speeds, 0)] for name, speeds in found["sequences_per_second"].items()]
        text = f"Batches of 1,024 sequences of {WIDTH:,} tokens at random places of {found['tokens'] / 1e6:.0f} million"
        text += " tokens in the page cache, as int64.\n"
        yield f"## Random access\n\n{text}\n{markdown(['reader', 'sequences/s'], rows)}"
    if found := results.get("open"):
        rows = [
            [
                f"{row['tokens']:,}",
                f"{row['index_bytes'] / 1e6:,.1f}",
                f"{row['open']:.4f}",
                f"{row['step_0']:.4f}",
                f"{row[f'step_{SEEK}']:.4f}",
                f"{row['memory_bytes'] / 2**20:.1f}",
            ]
            for row in found["rows"]
        ]
        heads = ["tokens", "index, MB", "opening, s", "step 0, s", f"step {SEEK:,}, s", "memory, MiB"]
        text = "Not in the page cache; a shuffled micro-batch of 8 sequences. The .bin is sparse, the .idx is real.\n"
        yield f"## Opening and seeking\n\n{text}\n{markdown(heads, rows)}"
    if found := results.get("wait"):
        rows = [
            [
                name,
                median_and_spread([100 * share for share in row["shares"]], 3),
                median_and_spread(row["step_seconds"], 2),
            ]
            for name, row in found["rows"].items()
        ]
        text = f"pythia-70m, one process, a sequence of 2,048 tokens a step, {STEPS - SKIPPED} steps counted.\n"
        heads = ["data", "share of the step that waits, %", "step, s"]
        supply = median_and_spread(found["supply"], 0)
        more = f"A stream gives {supply} tokens/s with one worker, measured behind what it reads ahead:"
        more += " as long as training takes fewer, a step waits only for the hand-over above.\n"
        yield f"## Waiting for data\n\n{text}\n{markdown(heads, rows)}\n{more}"
