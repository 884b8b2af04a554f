"""`l2e-ds tokenizer train`: train a byte-level BPE tokenizer on text."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path

from l2e_ds.console import say
from l2e_ds.data.sources import documents, name_of, unread_files
from l2e_ds.data.tokenize import OPTIONS
from l2e_ds.data.tokenize_command import add_input_arguments, source_of
from l2e_ds.data.tokenizer import train_tokenizer, vocabulary_size
from l2e_ds.errors import DataError, renaming
from l2e_ds.system.files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="tokenizer_verb", required=True, metavar="train")
    training = verbs.add_parser("train", help="train a byte-level BPE on text")
    add_input_arguments(training)
    training.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="a new file")
    training.add_argument("--vocab-size", type=int, required=True, metavar="N", help="entries, at least 257")


def run(arguments: argparse.Namespace) -> int:
    """Train the tokenizer and return the exit code. Raises ConfigError and DataError."""
    output: Path = arguments.output
    if output.exists():
        raise DataError(f"{output} exists already; give another --output, or remove it")
    try:
        with renaming(OPTIONS):
            source = source_of(arguments)
            if unread := unread_files(source):
                say(unread)
            texts = documents(source, arguments.skip_bad)
            if (first := next(texts, None)) is None:
                raise DataError(f"{name_of(source)} holds no text", where="data.path")
            tokenizer = train_tokenizer(chain([first], texts), arguments.vocab_size)
        write_whole(output, tokenizer.backend_tokenizer.to_str(pretty=True))
    except OSError as error:
        raise DataError(f"{error.filename or output}: {error.strerror or error}") from None
    print(f"{vocabulary_size(tokenizer):,} entries -> {output}")
    return 0
