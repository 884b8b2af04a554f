"""Writes data_subset.jsonl: texts by part of the Pile, from its cleaned copy on the hub (docs/feature-sets.md)."""

import json
from collections import Counter

from datasets import load_dataset

TEXTS, CHARACTERS = 1000, 4000
SUBSETS = {
    "ArXiv",
    "Enron Emails",
    "FreeLaw",
    "Github",
    "HackerNews",
    "PubMed Abstracts",
    "StackExchange",
    "USPTO Backgrounds",
    "Wikipedia (en)",
}
FILE = "hf://datasets/monology/pile-uncopyrighted/val.jsonl.zst"
written = Counter()
with open("data_subset.jsonl", "w", encoding="utf-8") as output:
    for row in load_dataset("json", data_files=FILE, split="train", streaming=True):
        feature, text = row["meta"]["pile_set_name"], row["text"][:CHARACTERS]
        if feature in SUBSETS and written[feature] < TEXTS and len(text) >= CHARACTERS // 4:
            output.write(json.dumps({"text": text, "feature": feature}, ensure_ascii=False) + "\n")
            written[feature] += 1
            if sum(written.values()) == TEXTS * len(SUBSETS):
                break
