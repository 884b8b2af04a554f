"""`l2e-ds VERB`: the table of commands, and how their errors become exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

import l2e_ds
from l2e_ds.console import CommandParser, exit_code_of, open_streams, parse, split_at_dashes
from l2e_ds.system.process import leave_process


@dataclass(frozen=True)
class Verb:
    """Holds one command: the module that has its `add_arguments` and `run`, and one line of help.

    takes_sbatch_options: whether words after `--` are options of sbatch, which `run` finds in `arguments.for_sbatch`.
    """

    module: str
    help: str
    takes_sbatch_options: bool = False


VERBS = {
    "init": Verb("l2e_ds.training.init", "write a run file to begin with"),
    "train": Verb("l2e_ds.train", "pretrain as a run file says"),
    "plan": Verb("l2e_ds.planning.command", "memory, time and traffic of a run on GPUs one does not have"),
    "evaluate": Verb("l2e_ds.evaluation.evaluate", "results on tasks of lm-evaluation-harness"),
    "generate": Verb("l2e_ds.evaluation.generate", "how a model continues texts"),
    "export": Verb("l2e_ds.export.export", "write a model that transformers loads"),
    "analyze": Verb("l2e_ds.analysis.analyze", "how monosemantic a model's neurons are: tables and figures"),
    "neuron": Verb("l2e_ds.analysis.neuron", "what one neuron responds to: a page"),
    "report": Verb("l2e_ds.report.command", "one page of runs and studies: curves, tables, warnings"),
    "summary": Verb("l2e_ds.report.summary", "print a run's first and last metrics"),
    "tokenize": Verb("l2e_ds.data.commands", "text to token files (.bin/.idx)"),
    "tokenizer": Verb("l2e_ds.data.tokenizer_command", "train a tokenizer"),
    "checkpoint": Verb("l2e_ds.checkpoint.commands", "list, verify or remove a run's checkpoints"),
    "data": Verb("l2e_ds.data.inspect", "verify token files, show what a model sees at a step"),
    "doctor": Verb("l2e_ds.doctor.command", "what this machine and launcher offer a run, and what fixes the rest"),
    "accept": Verb("l2e_ds.acceptance.command", "whether this machine computes the right numbers, and how fast"),
    "submit": Verb("l2e_ds.slurm.submit", "submit a run to SLURM", takes_sbatch_options=True),
    "study": Verb("l2e_ds.study.command", "a grid of runs: run, resume, collect", takes_sbatch_options=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):
        del words[0]  # the deepspeed launcher puts it before the verb
    parser = CommandParser(prog="l2e-ds", description=l2e_ds.__doc__)
    parser.add_argument("--version", action="version", version=l2e_ds.__version__)
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        own = parsers.add_parser(name, help=verb.help)
        if words[:1] == [name]:  # no verb waits for the imports of another, and doctor must run where those fail
            module = import_module(verb.module)
            own.description = module.__doc__
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(own)
            own.set_defaults(action=module.run)
    for_sbatch: list[str] = []
    if words and words[0] in VERBS and VERBS[words[0]].takes_sbatch_options:
        words, for_sbatch = split_at_dashes(words)
    arguments = parse(parser, words)
    arguments.for_sbatch = for_sbatch
    return exit_code_of(lambda: arguments.action(arguments))


def command() -> NoReturn:
    """Run the console script `l2e-ds`."""
    leave_process(main())


if __name__ == "__main__":
    command()
