"""`l2e-ds init`: write a short run file with comments, to begin one's own with; it trains as it is.

l2e-ds init --model pythia-70m --data corpus > run.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from l2e_ds.config.reading import checked, find_recipe, load_run_config, parse_yaml
from l2e_ds.config.sections import RunConfig
from l2e_ds.data.sources import PATTERNS, kinds_of
from l2e_ds.errors import ConfigError
from l2e_ds.models.pythia import PYTHIA, check_sizes

KINDS = PATTERNS | {"indexed": ("*.bin", "*.idx")}
"""`data.source` by the names of files."""
VOCABULARY = 16384
SOME_HELD_OUT = "0.01  # share of the documents that are evaluated, and not trained on"
NONE_HELD_OUT = "0  # a text file is one document; give several, or jsonl, and a share of them is evaluated"
TEMPLATE = """\
# {name} with L2E. All keys: docs/run-files.md; any of them can be given on the command line as section.key=value.
#
#   l2e-ds train run.yaml --dry-run              what would be run
#   l2e-ds train run.yaml                        one process; launch/deepspeed.sh run.yaml takes all GPUs
#   l2e-ds summary runs/run                      what came out; the same command resumes a run that was stopped
model:
  name: {name}  # or pretrained: NAME, to start from the weights of a model of the hub{rows}
data:
  source: {source}  # stdlib, text, jsonl, parquet, hub or indexed (Megatron's .bin/.idx)
{path}{tokenizer}
  sequence_length: 512  # Pythia: 2048
  held_out: {held_out}
training:
  steps: 1000
  global_batch: 64  # sequences a step, over all ranks; Pythia: 1024
  micro_batch: auto  # the largest that fits, found at the first start
  evaluate_every: 100
inhibition:
  method: l2e  # none: the baseline to compare with
  start: 0.3  # share of the steps before inhibition begins
  warmup: 0.2  # share over which it rises to its strength
deepspeed:
  config: {deepspeed}
checkpoint:
  every: 100
  keep_last: 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = f"{', '.join(PYTHIA)} (default: the first)"
    parser.add_argument("--model", default="pythia-14m", metavar="NAME", help=sizes)
    text = "text, jsonl, parquet or .bin/.idx, or folders (default: the text of Python's own library)"
    parser.add_argument("--data", nargs="+", metavar="PATH", help=text)
    parser.add_argument("--tokenizer", metavar="NAME", help="a name of the hub or a tokenizer.json; default: train one")


def run(arguments: argparse.Namespace) -> int:
    """Print the run file. Raises ConfigError for a model, file or tokenizer that a run could not have."""
    check_sizes("--model", [arguments.model])
    text = run_file(arguments.model, arguments.data or [], arguments.tokenizer)
    checked(RunConfig, parse_yaml(text, "init"), "init")
    print(text, end="")
    return 0


def run_file(name: str, data: Sequence[str], tokenizer: str | None) -> str:
    """Return the run file of a Pythia size for these files. Raises ConfigError."""
    source = _source_of(data)
    if source == "indexed" and tokenizer is None:
        raise ConfigError("--tokenizer: is required with token files: the one that made them")
    paths = sorted({str(Path(file).with_suffix("")) for file in data}) if source == "indexed" else list(data)
    path = f"  path: {json.dumps(paths[0] if len(paths) == 1 else paths)}\n" if paths else ""
    is_one_document = source == "text" and len(data) == 1 and Path(data[0]).is_file()
    trained = f"  train_tokenizer: {VOCABULARY}  # trained on this text; or tokenizer: NAME or tokenizer.json"
    return TEMPLATE.format(
        name=name,
        rows="" if tokenizer else f"\n  vocab_size: {VOCABULARY}  # that of the tokenizer below",
        source=source,
        path=path,
        held_out=NONE_HELD_OUT if is_one_document else SOME_HELD_OUT,
        tokenizer=f"  tokenizer: {json.dumps(tokenizer)}" if tokenizer else trained,
        deepspeed=load_run_config(find_recipe(name)).deepspeed.config,
    )


def _source_of(data: Sequence[str]) -> str:
    """Return `data.source` for these files and folders, by the names of files. Raises ConfigError."""
    if not data:
        return "stdlib"
    found: dict[str, str] = {}
    for name in data:
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"--data: no such file or folder: {name}")
        kinds = kinds_of(path, PATTERNS if path.is_dir() else KINDS)
        if not kinds:
            allowed = ", ".join(pattern for patterns in KINDS.values() for pattern in patterns)
            raise ConfigError(f"--data: got {name}, allowed: {allowed}, or a folder with text files directly in it")
        found |= dict.fromkeys(kinds, name)
    if len(found) > 1:
        kinds = [f"{kind} in {name}" for kind, name in found.items()]
        raise ConfigError(f"--data: got {' and '.join(kinds)}, allowed: one kind (several: data.sets in the run file)")
    return next(iter(found))
