"""Megatron-core's own reader and writer of .bin/.idx, in a process of its own: its import takes seconds and warns.

usage: python foreign_indexed.py FOLDER      FOLDER/documents.json: {file: [dtype, [documents: [sequences: [ids]]]]}

Writes FOLDER/foreign/FILE.{bin,idx}, and reads FOLDER/ours/*.idx into FOLDER/read.json:
{file: {"dtype": name, "sequences": [[ids]], "documents": document index}}.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

folder = Path(sys.argv[1])
for file, (dtype, documents) in json.loads((folder / "documents.json").read_text()).items():
    builder = IndexedDatasetBuilder(str(folder / "foreign" / f"{file}.bin"), dtype=getattr(np, dtype))
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(folder / "foreign" / f"{file}.idx"))

found = {}
for path in (folder / "ours").glob("*.idx"):
    read = IndexedDataset(str(path.with_suffix("")))
    found[path.stem] = {
        "dtype": np.dtype(read.index.dtype).name,
        "sequences": [read[i].tolist() for i in range(len(read))],
        "documents": read.document_indices.tolist(),
    }
(folder / "read.json").write_text(json.dumps(found))
