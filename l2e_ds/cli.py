"""`l2e-ds VERB`: the table of commands, and how their errors become exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import l2e_ds
from l2e_ds.console import CommandParser, exit_code_of, open_streams, parse, split_at_dashes, words_of_command
from l2e_ds.system.process import leave_process

# The module that has a command's `add_arguments` and `run`, and one line of help.
VERBS = {
    "init": ("l2e_ds.training.init", "write a run file to begin with"),
    "train": ("l2e_ds.train", "pretrain as a run file says"),
    "plan": ("l2e_ds.planning.command", "memory, time and traffic of a run on GPUs one does not have"),
    "evaluate": ("l2e_ds.evaluation.evaluate", "results on tasks of lm-evaluation-harness"),
    "generate": ("l2e_ds.evaluation.generate", "how a model continues texts"),
    "export": ("l2e_ds.export.export", "write a model that transformers loads"),
    "analyze": ("l2e_ds.analysis.analyze", "how monosemantic a model's neurons are: tables and figures"),
    "neuron": ("l2e_ds.analysis.neuron", "what one neuron responds to: a page"),
    "report": ("l2e_ds.report.command", "one page of runs and studies: curves, tables, warnings"),
    "summary": ("l2e_ds.report.summary", "print a run's first and last metrics"),
    "tokenize": ("l2e_ds.data.tokenize_command", "text to token files (.bin/.idx)"),
    "tokenizer": ("l2e_ds.data.tokenizer_command", "train a tokenizer"),
    "checkpoint": ("l2e_ds.checkpoint.commands", "list, verify or remove a run's checkpoints"),
    "data": ("l2e_ds.data.inspect", "verify token files, show what a model sees at a step"),
    "doctor": ("l2e_ds.doctor.command", "what this machine and launcher offer a run, and what fixes the rest"),
    "accept": ("l2e_ds.acceptance.command", "whether this machine computes the right numbers, and how fast"),
    "submit": ("l2e_ds.slurm.submit", "submit a run to SLURM"),
    "study": ("l2e_ds.study.command", "a grid of runs: run, resume, collect"),
}
# Words after `--` are options of sbatch, which `run` finds in `arguments.for_sbatch`.
TAKE_SBATCH_OPTIONS = ("submit", "study")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    open_streams()
    words = words_of_command(argv)
    parser = CommandParser(prog="l2e-ds", description=l2e_ds.__doc__)
    parser.add_argument("--version", action="version", version=l2e_ds.__version__)
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (path, about) in VERBS.items():
        own = parsers.add_parser(name, help=about)
        if words[:1] == [name]:  # no verb waits for the imports of another, and doctor must run where those fail
            module = import_module(path)
            own.description = module.__doc__
            own.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(own)
            own.set_defaults(action=module.run)
    for_sbatch: list[str] = []
    if words and words[0] in TAKE_SBATCH_OPTIONS:
        words, for_sbatch = split_at_dashes(words)
    arguments = parse(parser, words)
    arguments.for_sbatch = for_sbatch
    return exit_code_of(lambda: arguments.action(arguments))


def command() -> NoReturn:
    """Run the console script `l2e-ds`."""
    leave_process(main())


if __name__ == "__main__":
    command()
