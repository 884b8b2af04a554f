"""Tokenize text into Megatron's .bin/.idx, one sequence for each document.

Writes PREFIX.bin, PREFIX.idx and, last, PREFIX.json, which says what they were made from; with --held-out also
PREFIX_held_out.*. Unfinished files are in PREFIX.partial: after a kill, a full disk or Ctrl-C the same command resumes
from there. The result does not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import l2e_ds
from l2e_ds.config.sections import DataConfig, SourceConfig
from l2e_ds.console import at_least, say
from l2e_ds.data.indexed import best_dtype, pair
from l2e_ds.data.sources import PATTERNS, kinds_of, looks_local, source_files, unread_files
from l2e_ds.data.token_files import JOURNAL, Exclusive, TokenFiles, read_journal
from l2e_ds.data.tokenize import OPTIONS, tokenize
from l2e_ds.data.tokenizer import end_of_text_id, find_end_of_text, load_tokenizer, tokenizer_digest, vocabulary_size
from l2e_ds.data.workers import default_workers
from l2e_ds.errors import DataError, Interrupted, renaming
from l2e_ds.system.files import file_stamp, fsync_path, write_whole

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerFast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument(
        "--output", type=_prefix_of_files, required=True, metavar="PREFIX", help="new files PREFIX.bin, .idx, .json"
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="NAME|FILE", help="a hub name, a folder or a tokenizer.json"
    )
    parser.add_argument("--append-eod", action="store_true", help="put the tokenizer's end-of-text after each document")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of documents to write to PREFIX_held_out, chosen by a hash of their content (default: none)",
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="keep only the first of documents with the same text, by 64-bit hashes: of 200 million different documents"
        " one would be dropped by mistake with a probability of 0.1%%; takes 8 to 16 bytes of memory for each document",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after the document that reaches N")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenize (default: one for each core; 0: this one)"
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", nargs="+", metavar="INPUT", help="files, folders, glob patterns, or the name of a hub data set"
    )
    parser.add_argument(
        "--format",
        choices=(*PATTERNS, "hub"),
        help="format of INPUT (default: by the names); text: each file is a document; jsonl also as .gz, .bz2, .xz,"
        " .zst; hub: a data set of the Hugging Face hub or in a local folder, streamed",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field that holds the text (default: text)")
    parser.add_argument("--subset", metavar="NAME", help="configuration of a hub data set")
    parser.add_argument("--split", metavar="NAME", help="split of a hub data set (default: train)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub data set")
    parser.add_argument("--max-documents", type=int, metavar="N", help="take only the first N documents")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="count and leave out records that are no JSON, hold no text under the key or are not UTF-8",
    )


def _prefix_of_files(word: str) -> str:
    if not pair(word)[0].name.removesuffix(".bin") or word.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"got {word!r}, must end in a name: files NAME.bin, NAME.idx and NAME.json")
    return word


# --- tokenize -----------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by which a scheduler asks to stop, as Ctrl-C does
    try:
        with renaming(OPTIONS):
            _tokenize(arguments)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command resumes from here") from None
    except OSError as error:
        folder = _partial(arguments.output)
        kept = f"; {folder} keeps what is done, and the same command resumes when this is fixed"
        raise DataError(
            f"{error.filename or _prefix(arguments.output)}: {error.strerror or error}"
            f"{kept if (folder / JOURNAL).exists() else ''}"
        ) from None
    return 0


def _tokenize(arguments: argparse.Namespace) -> None:
    begun = time.monotonic()
    config = _config(arguments)
    parts = {"train": _prefix(arguments.output)}
    if config.held_out:
        parts["held_out"] = f"{parts['train']}_held_out"
    with Exclusive(_partial(arguments.output)) as own:
        # An earlier process may have been killed after its files were renamed, but before the folder was removed.
        is_renamed = _final_files(parts["train"])[-1].exists() and (own.folder / JOURNAL).exists()
        is_renamed &= not (own.folder / "train.bin").exists()
        is_complete = is_renamed or (own.folder / "train.json").exists()
        for prefix in () if is_complete else parts.values():
            for path in _final_files(prefix):
                if path.exists():
                    raise DataError(f"{path} exists already; give another --output, or remove it")
        tokenizer = load_tokenizer(arguments.tokenizer)
        asked = _asked(arguments, config, tokenizer)
        if is_complete:
            read_journal(own.folder, asked)  # raises an error for other work
            say(f"{own.folder}: all was done before; its files get their last names, and the folder is removed")
        else:
            _fill(arguments, config, own.folder, tokenizer, list(parts), asked)
        for part in reversed(parts):  # `train` is renamed last, and of each part the .json
            for path in _final_files(parts[part]):
                if (source := own.folder / f"{part}{path.suffix}").exists():
                    source.replace(path)
        fsync_path(own.folder.parent)
        own.remove()
        fsync_path(own.folder.parent)
    print(_summary(parts, time.monotonic() - begun))


def _fill(
    arguments: argparse.Namespace,
    config: DataConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    parts: list[str],
    asked: dict[str, Any],
) -> None:
    """Write all files, complete, into the folder, train.json last."""
    vocabulary, name = vocabulary_size(tokenizer), arguments.tokenizer
    dtype = np.dtype(best_dtype(vocabulary)).newbyteorder("<")
    if unread := unread_files(config):
        say(unread)
    with TokenFiles(folder, parts, dtype, asked) as files:
        if files.resumes:
            before = files.notes["counts"]
            say(f"resuming from {folder}: {sum(before['tokens'].values()):,} tokens are done")
        counts = tokenize(
            config,
            tokenizer.backend_tokenizer.to_str(),
            end_of_text_id(tokenizer) if arguments.append_eod else None,
            files,
            deduplicate=arguments.deduplicate,
            skip_bad=arguments.skip_bad,
            workers=default_workers() if arguments.workers is None else arguments.workers,
        )
        files.finish()
    for part in reversed(parts):
        record = {
            "tokenizer": str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name,
            "tokenizer_digest": asked["--tokenizer"],
            "vocabulary": vocabulary,
            "end_of_text": find_end_of_text(tokenizer),
            "append_eod": arguments.append_eod,
            "dtype": dtype.name,
            "documents": counts.documents[part],
            "tokens": counts.tokens[part],
            "part": part,
            "held_out": arguments.held_out,
            "left_out": {"duplicates": counts.duplicates, "bad": counts.bad, "empty": counts.empty},
            "first_bad": counts.first_bad,
            "input": asked["INPUT"],
            "options": {key: value for key, value in asked.items() if key.startswith("--")},
            "version": l2e_ds.__version__,
            "passed_over": unread,
        }
        write_whole(folder / f"{part}.json", json.dumps(record, indent=2) + "\n")


def source_of(arguments: argparse.Namespace) -> SourceConfig:
    """Return the source that the options of `add_input_arguments` describe. Raises ConfigError, DataError."""
    source = arguments.format or _guess_format(arguments.input)
    if source == "hub" and len(arguments.input) > 1:
        raise DataError(f"got {len(arguments.input)} names, a hub data set is one")
    for option in ("subset", "split", "revision"):
        if source != "hub" and getattr(arguments, option) is not None:
            raise DataError(f"--{option} is for --format hub; the input is {source}")
    return SourceConfig(
        source=source,
        path=arguments.input[0] if source == "hub" else arguments.input,
        subset=arguments.subset,
        split=arguments.split or "train",
        revision=arguments.revision,
        text_key=arguments.text_key,
        max_documents=at_least("--max-documents", arguments.max_documents, 1),
    )


def _config(arguments: argparse.Namespace) -> DataConfig:
    source = source_of(arguments)
    at_least("--workers", arguments.workers, 0)
    if not 0 <= arguments.held_out < 1:
        raise DataError(f"--held-out: got {arguments.held_out}, must be at least 0 and below 1")
    return DataConfig(
        **source.model_dump(exclude={"max_tokens"}),
        max_tokens=at_least("--max-tokens", arguments.max_tokens, 1),
        held_out=arguments.held_out,
        tokenizer=arguments.tokenizer,
    )


def _guess_format(names: list[str]) -> Any:
    """Return the one format that all names have. Raises DataError."""
    found = {_format_of(name) for name in names}
    if len(found) > 1 or None in found:
        raise DataError(
            f"the names do not say one format; give --format text, jsonl, parquet or hub: {', '.join(names[:3])}"
        )
    return found.pop()


def _format_of(name: str) -> str | None:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return "hub"
        kinds = kinds_of(path)
        return kinds[0] if len(kinds) == 1 else None
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not path.exists() and not looks_local(name)
    return next(iter(kinds_of(path)), "hub" if is_hub_name else None)


def _asked(arguments: argparse.Namespace, config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return all that decides the result.

    --skip-bad is not among it: a command may resume with it, which does not change what was written before.
    """
    options = ("append_eod", "deduplicate", "held_out", "max_documents", "max_tokens", "text_key")
    return {
        "INPUT": [file_stamp(path) for path in source_files(config)] or config.path,
        "--format": config.source,
        "--tokenizer": tokenizer_digest(tokenizer),
        **{f"--{name.replace('_', '-')}": getattr(arguments, name) for name in options},
        **{f"--{name}": getattr(config, name) for name in ("subset", "split", "revision")},
        "format": 1,  # increase it when the same command must give other files
    }


def _prefix(output: str) -> str:
    return str(pair(output)[0])[: -len(".bin")]


def _partial(output: str) -> Path:
    return Path(f"{_prefix(output)}.partial")


def _final_files(prefix: str) -> list[Path]:
    return [Path(prefix + suffix) for suffix in (".bin", ".idx", ".json")]


def _summary(parts: dict[str, str], seconds: float) -> str:
    """Return lines that say what was written.

    PREFIX.json counts what interrupted commands wrote, too; `seconds` are those of this command alone.
    """
    lines = []
    for part, prefix in parts.items():
        record = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        what = "tokenized" if part == "train" else "held out"
        lines.append(f"{what:<10} {record['documents']:,} documents, {record['tokens']:,} tokens -> {prefix}.bin, .idx")
    if left_out := [f"{count:,} {what}" for what, count in record["left_out"].items() if count]:
        lines.append("left out   " + ", ".join(left_out))
    if record["passed_over"]:
        lines.append(f"files      {record['passed_over']}")
    if record["first_bad"]:
        lines.append(f"first bad  {record['first_bad']}")
    lines.append(f"took       {seconds:.1f} s")
    return "\n".join(lines)
