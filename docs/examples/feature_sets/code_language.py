"""Writes code_language.jsonl: files of programming languages, from GitHub Code on the hub (docs/feature-sets.md)."""

import json
from collections import Counter

from datasets import load_dataset

TEXTS, CHARACTERS = 1000, 4000
LANGUAGES = {"C", "C#", "C++", "GO", "HTML", "Java", "JavaScript", "PHP", "Python", "Ruby", "Rust", "TypeScript"}
FILES = "hf://datasets/codeparrot/github-code-clean/data/train-*.parquet"
written = Counter()
with open("code_language.jsonl", "w", encoding="utf-8") as output:
    for row in load_dataset("parquet", data_files=FILES, split="train", streaming=True):
        feature, code = row["language"], row["code"]
        start = code.find("\n", len(code) // 10) + 1
        text = code[start : start + CHARACTERS]
        if feature in LANGUAGES and written[feature] < TEXTS and len(text) == CHARACTERS:
            output.write(json.dumps({"text": text, "feature": feature}, ensure_ascii=False) + "\n")
            written[feature] += 1
            if sum(written.values()) == TEXTS * len(LANGUAGES):
                break
