"""Make the text of the evidence studies: one jsonl file for each source, and a tokenizer of 4,096 tokens.

    python launch/studies/evidence/prepare.py FOLDER [--output studies/evidence/text]

FOLDER holds jsonl files of {"text": ..., "meta": {"source": ...}}; every document goes to SOURCE.jsonl, in the order of
the files' names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from l2e_ds.data.tokenizer import train_tokenizer

VOCABULARY = 4096


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (source, text) of every document."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)
                yield document["meta"]["source"], document["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("studies/evidence/text"))
    arguments = parser.parse_args()
    if not any(arguments.folder.glob("*.jsonl")):
        sys.exit(f"{arguments.folder}: no *.jsonl there")
    if arguments.output.exists():
        sys.exit(f"{arguments.output}: is there already; remove it to make it anew")
    arguments.output.mkdir(parents=True)
    sizes: dict[str, int] = {}
    files = {}
    for source, text in documents(arguments.folder):
        if source not in files:
            files[source] = (arguments.output / f"{source}.jsonl").open("w", encoding="utf-8")
        files[source].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        sizes[source] = sizes.get(source, 0) + len(text.encode())
    for file in files.values():
        file.close()
    train_tokenizer((text for _, text in documents(arguments.folder)), VOCABULARY).save_pretrained(
        arguments.output / "tokenizer"
    )
    for source, size in sorted(sizes.items()):
        print(f"{source:16} {size / 1e6:6.2f} MB")


if __name__ == "__main__":
    main()
