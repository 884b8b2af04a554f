"""Tokenize with `datasets.map` and a plain writer of .bin, which `l2e-ds tokenize` is compared with.

usage: python -m benchmarks.datasets_map TOKENIZER.json PROCESSES OUTPUT.bin CACHE FILE.jsonl...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(tokenizer_file: str, processes: str, output: str, cache: str, *files: str) -> None:
    """Tokenize JSON Lines files with so many processes, and write their tokens (uint16) to `output`."""
    from datasets import load_dataset

    from l2e_ds.data.tokenizer import end_of_text_id, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_file)
    end = end_of_text_id(tokenizer)
    data = load_dataset("json", data_files=list(files), split="train", cache_dir=cache).select_columns(["text"])
    tokenized = data.map(
        lambda batch: {"ids": tokenizer(batch["text"], return_attention_mask=False)["input_ids"]},
        batched=True,
        num_proc=int(processes),
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    with Path(output).open("wb") as file:
        for rows in tokenized.with_format("numpy").iter(1000):
            parts = [part for ids in rows["ids"] for part in (ids, [end])]
            np.concatenate(parts).astype(np.uint16).tofile(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
