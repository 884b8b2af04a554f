"""`l2e-ds VERB`: one thin sub-command a verb."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import l2e_ds
from l2e_ds import benchmarks
from l2e_ds.console import READER_IS_GONE, CommandParser, flush_streams, open_streams, reader_is_gone, say
from l2e_ds.errors import ConfigError, Interrupted, L2EError


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):
        del words[0]  # the deepspeed launcher puts it before the verb
    if words[:1] == ["doctor"]:  # before anything else is imported: it must run where that fails
        from l2e_ds import doctor

        return doctor.main(words[1:])
    parser = CommandParser(prog="l2e-ds", description=l2e_ds.__doc__)
    parser.add_argument("--version", action="version", version=l2e_ds.__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    from l2e_ds import train

    training = verbs.add_parser("train", help="pretrain as a run file says", description=train.__doc__)
    train.add_arguments(training)
    training.set_defaults(action=train.run)

    planning = verbs.add_parser("plan", help="memory, time and traffic of a run on GPUs one does not have")
    if words[:1] == ["plan"]:  # no other verb waits for its imports
        from l2e_ds import planning as plan

        _fill(planning, plan)

    evaluation = verbs.add_parser("evaluate", help="figures on tasks of lm-evaluation-harness")
    if words[:1] == ["evaluate"]:
        from l2e_ds.evaluation import evaluate

        _fill(evaluation, evaluate)

    export = verbs.add_parser("export", help="write a model that transformers loads")
    export.add_argument("source", type=Path, metavar="RUN|CHECKPOINT")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    export.add_argument("--step", type=int, help="of a run: this checkpoint instead of the newest")
    export.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's own")
    export.add_argument("--license", metavar="ID", help="for the model card, e.g. apache-2.0 (default: it names none)")
    export.add_argument("--push", metavar="REPO", help="then upload the folder to the Hugging Face Hub")
    export.add_argument("--private", action="store_true", help="with --push: a new repository that others do not see")
    export.set_defaults(action=_export)

    analysis = verbs.add_parser("analyze", help="how monosemantic a model's neurons are: tables and figures")
    neuron = verbs.add_parser("neuron", help="what one neuron answers to: a page")
    if words[:1] in (["analyze"], ["neuron"]):
        from l2e_ds.analysis import analyze
        from l2e_ds.analysis import neuron as one_neuron

        _fill(analysis, analyze)
        _fill(neuron, one_neuron)

    reporting = verbs.add_parser("report", help="one page of runs and studies: curves, tables, warnings")
    if words[:1] == ["report"]:
        from l2e_ds.report import command as report_command

        _fill(reporting, report_command)

    summary = verbs.add_parser("summary", help="print a run's first and last figures")
    summary.add_argument("run", type=Path, metavar="RUN")
    summary.add_argument("--baseline", type=Path, metavar="RUN", help="a run without inhibition, to be told beside")
    summary.set_defaults(action=_summary)

    from l2e_ds.data import commands

    tokenize = verbs.add_parser("tokenize", help="text to token files (.bin/.idx)", description=commands.TOKENIZE)
    commands.add_arguments(tokenize)
    tokenize.set_defaults(action=commands.run)
    commands.add_tokenizer_verbs(verbs.add_parser("tokenizer", help="train a tokenizer"))

    checkpoint = verbs.add_parser("checkpoint", help="list, verify or remove a run's checkpoints")
    _add_checkpoint_verbs(checkpoint)
    data = verbs.add_parser("data", help="verify token files, show what a model sees at a step")
    _add_data_verbs(data)
    bench = verbs.add_parser("bench", help="measure on this machine what the documentation says")
    if words[:1] == ["bench"]:  # no other verb waits for their imports
        _add_benchmarks(bench)
    verbs.add_parser("doctor", help="what this machine and launcher offer a run, and what mends the rest")

    from l2e_ds import submit, supervise

    _fill(verbs.add_parser("submit", help="give a run to SLURM"), submit)

    study = verbs.add_parser("study", help="a grid of runs: run, resume, collect")
    if words[:1] == ["study"]:
        from l2e_ds.study import command as studies

        _fill(study, studies)

    submits = words[:1] in (["submit"], ["study"])
    words, for_sbatch = supervise.split_at_dashes(words) if submits else (words, [])
    arguments = train.parse(parser, words)
    arguments.for_sbatch = for_sbatch
    try:
        return arguments.action(arguments)
    except L2EError as error:
        print(f"l2e-ds: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        return READER_IS_GONE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        say(f"l2e-ds: error: {error.filename}: {error.strerror}")
        return ConfigError.exit_code
    except KeyboardInterrupt:  # `train` says more of it, by itself
        say("l2e-ds: interrupted")
        return 130


def _fill(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    """Description, options and action of a command that is a module of its own."""
    parser.description = command.__doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_arguments(parser)
    parser.set_defaults(action=command.run)


def _add_checkpoint_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="list|verify|prune")
    listing = verbs.add_parser("list", help="steps, sizes, ranks and what is wrong with them by name and size")
    listing.add_argument("run", type=Path, metavar="RUN")
    verifying = verbs.add_parser("verify", help="read every byte and compare with the manifest")
    verifying.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    verifying.add_argument("--step", type=int, help="of a run: only this checkpoint")
    pruning = verbs.add_parser("prune", help="remove old checkpoints")
    pruning.add_argument("run", type=Path, metavar="RUN")
    pruning.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep the newest N good ones")
    pruning.add_argument("--keep-every", type=int, metavar="K", help="also keep those whose step is a multiple of K")
    pruning.add_argument("--dry-run", action="store_true", help="print what would be removed, and stop")
    parser.set_defaults(action=_checkpoint)


def _add_data_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="check|show")
    about = (
        "Reads everything in a .bin/.idx set, in flat memory: every entry of the index, sizes, every token id. Prints"
    )
    about += " statistics, or one line for the first defect (exit code 2)."
    checking = verbs.add_parser("check", help="verify .bin/.idx sets, print their statistics", description=about)
    checking.add_argument("prefixes", nargs="+", metavar="PREFIX", help="of PREFIX.idx and PREFIX.bin, or its parts")
    checking.add_argument("--vocab-size", type=int, metavar="N", help="ids from N on are a defect")
    checking.add_argument("--tokenizer", metavar="NAME|FILE", help="takes vocabulary and end-of-text from there")
    checking.add_argument("--end-of-text", type=int, metavar="ID", help="count this id")

    about = "Prints global batch K: a list of its sequences, or one of them in full with token ids, text and documents."
    about += " The first batch is step 0, as for Pythia's batch_viewer.py: step K is the first batch that a model"
    about += " resumed from its checkpoint of step K sees, and metrics of step K+1 are the first with it."
    showing = verbs.add_parser("show", help="what a model sees at a step", description=about)
    showing.add_argument(
        "source",
        metavar="PREFIX|RUN.yaml",
        help="a .bin/.idx set, or a run file, which then decides all options below but --sequence; text that was not"
        " tokenised for that run yet is tokenised now",
    )
    showing.add_argument("--step", type=int, required=True, metavar="K", help="counted from 0")
    showing.add_argument("--sequence", type=int, metavar="I", help="sequence I of the batch, counted from 0, in full")
    showing.add_argument("--global-batch", type=int, metavar="G", help="sequences a batch (default: 1024)")
    showing.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="default: of documents of one length, that length less one; else 2048",
    )
    showing.add_argument("--order", choices=("stored", "shuffled"), help="default: stored")
    showing.add_argument("--seed", type=int, help="of the shuffled order (default: 1234)")
    showing.add_argument("--tokenizer", metavar="NAME|FILE", help="default: the one in PREFIX.json, if there")
    parser.set_defaults(action=_data)


def _add_benchmarks(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, purpose in benchmarks.NAMES.items():
        benchmark = import_module(f"l2e_ds.benchmarks.{name}")
        one = names.add_parser(name, help=purpose, description=benchmark.__doc__)
        benchmark.add_arguments(one)
        one.set_defaults(action=benchmark.run)


def _checkpoint(arguments: argparse.Namespace) -> int:
    from l2e_ds.checkpoints import list_checkpoints, prune_checkpoints, verify_checkpoints

    if arguments.checkpoint_verb == "list":
        return list_checkpoints(arguments.run)
    if arguments.checkpoint_verb == "verify":
        return verify_checkpoints(arguments.run, arguments.step)
    return prune_checkpoints(arguments.run, arguments.keep_last, arguments.keep_every, arguments.dry_run)


def _data(arguments: argparse.Namespace) -> int:
    from l2e_ds.data import inspect

    if arguments.data_verb == "check":
        return inspect.check(arguments.prefixes, arguments.vocab_size, arguments.tokenizer, arguments.end_of_text)
    names = ("global_batch", "sequence_length", "order", "seed", "tokenizer")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.source.endswith((".yaml", ".yml")):
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ConfigError(f"--{option}: the run file {arguments.source} decides this; leave it out")
        view = inspect.view_of_run(arguments.source)
    else:
        view = inspect.view_of_set(arguments.source, **given)
    return inspect.show(view, arguments.step, arguments.sequence)


def _export(arguments: argparse.Namespace) -> int:
    from l2e_ds.evaluation.export import export
    from l2e_ds.evaluation.push import check_push, push
    from l2e_ds.train import quiet_libraries

    repository = arguments.push
    if arguments.private and repository is None:
        raise ConfigError("--private: goes with --push")
    quiet_libraries()
    if repository is not None:
        check_push(repository)  # before the work, not after it
    options = (arguments.step, arguments.precision, arguments.license, repository)
    done = export(arguments.source, arguments.output, *options)
    print(
        f"exported step {done['step']} ({done['parameters']:,} parameters, {done['precision']},"
        f" {'with' if done['tokenizer'] else 'without a'} tokenizer) to {arguments.output}"
    )
    if repository is not None:
        print(f"pushed to {push(arguments.output, repository, arguments.private)}")
    return 0


def _summary(arguments: argparse.Namespace) -> int:
    from l2e_ds.evaluation.summary import summarise

    print(summarise(arguments.run, arguments.baseline))
    return 0


def command() -> NoReturn:
    """The console script `l2e-ds`."""
    leave(main())


def leave(code: int) -> NoReturn:
    """End this process (train.py: leave_process), also where that cannot be imported."""
    flush_streams()
    if code not in (0, Interrupted.exit_code):
        sys.exit(code)
    from l2e_ds.train import leave_process

    leave_process(code)


if __name__ == "__main__":
    command()
