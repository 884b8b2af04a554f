"""`l2e-ds report RUN_OR_STUDY ... --output report.html`: one page, and a folder with every table as CSV and Markdown.

A run that is not finished is shown as far as it is. The same command replaces the page.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from l2e_ds.errors import ConfigError
from l2e_ds.report import GENERATOR, PACKAGES, analyses, runs, tables, warnings
from l2e_ds.report.table import Table
from l2e_ds.system.files import write_whole
from l2e_ds.system.installed import check_extra

_INDEX = "index.md"
_MARK = f"<!-- {GENERATOR} -->"  # the first line of the index, by which a report's folder is recognised


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="RUN_OR_STUDY", help="folder of a run or of a study")
    add("--output", type=Path, required=True, metavar="FILE.html", help="a new file, or a report to replace")
    add(
        "--analysis",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="show the figures of `l2e-ds analyze`, too (RUN/analysis is found by itself)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Raises ConfigError, DataError."""
    check_extra("report", "report", PACKAGES)
    from l2e_ds.report import page  # imports matplotlib, an optional dependency

    output = arguments.output
    folder = output.with_name(f"{output.stem}-tables")
    _check_output(output, folder)
    for given in arguments.analysis:
        if not analyses.is_analysis(given):
            raise ConfigError(f"--analysis: {given} has no analysis.json; allowed: a folder that l2e-ds analyze wrote")
    collection = runs.read(arguments.paths)
    own = (run.directory / "analysis" for run in collection.runs)
    analysis_folders = [*arguments.analysis, *filter(analyses.is_analysis, own)]
    all_tables = [*tables.all_tables(collection), *analyses.all_tables(analysis_folders)]
    notices = warnings.all_warnings(collection)
    text = page.render(collection, all_tables, notices, analysis_folders, output, folder.name)
    try:
        _write({**_files(all_tables, folder), output: text}, folder)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from None
    print(f"report: {output} (runs: {len(collection.runs)}, warnings: {len(notices)})")
    print(f"tables: {folder}")
    return 0


def _check_output(output: Path, folder: Path) -> None:
    """Raise ConfigError if something else than a report would be overwritten."""
    allowed = "allowed: a new file, or a report to be replaced"
    if output.suffix != ".html":
        raise ConfigError(f"--output: got {output}, allowed: a file name that ends in .html")
    if output.exists() and (not output.is_file() or f'content="{GENERATOR}"' not in _beginning(output)):
        raise ConfigError(f"--output: {output} exists and is no report; {allowed}")
    index = folder / _INDEX
    if folder.exists() and not (index.is_file() and _beginning(index).startswith(_MARK)):
        raise ConfigError(f"--output: its tables would be written to {folder}, which exists and is not a report's")


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1000).decode("utf-8", errors="replace")


def _files(all_tables: Sequence[Table], folder: Path) -> dict[Path, str]:
    """Return the content of each file in the folder of tables."""
    files: dict[Path, str] = {}
    lines = [_MARK, "# Tables", ""]
    for table in all_tables:
        csv, md = f"{table.name}.csv", f"{table.name}.md"
        lines.append(f"- {table.title}: [{md}]({md}), [{csv}]({csv})")
        files |= {folder / csv: table.csv(), folder / md: table.markdown()}
    return {folder / _INDEX: "\n".join([*lines, ""]), **files}


def _write(files: Mapping[Path, str], folder: Path) -> None:
    """Write all files or none, and remove those of the report before. folder: that of the tables. Raises OSError."""
    index = folder / _INDEX
    old = set(re.findall(r"\]\((\w+\.(?:csv|md))\)", index.read_text(encoding="utf-8"))) if index.is_file() else set()
    for path in files:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        for path, text in files.items():
            write_whole(Path(temporary) / path.name, text)
        folder.mkdir(exist_ok=True)
        for path in files:
            (Path(temporary) / path.name).replace(path)
    for name in old - {path.name for path in files}:
        (folder / name).unlink(missing_ok=True)
