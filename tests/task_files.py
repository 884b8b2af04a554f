"""Tasks of every kind that lm-evaluation-harness knows, over the words w1 to w63."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

TASKS = ["choices", "last_word", "goes_on", "whole_text"]
VOCABULARY, LENGTH = 64, 24  # tokens; of a context of `tiny_model`


def write_tasks(folder: Path) -> dict[str, list[dict]]:
    """Writes FOLDER/*.yaml, *.jsonl and words.json; returns each task's documents."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)

    def words(count: int) -> str:
        return " ".join(f"w{word}" for word in random.integers(1, VOCABULARY, count))

    documents: dict[str, list[dict]] = {
        "choices": [
            # of one and of several words; the last two documents share their context
            {"query": words(3), "choices": [words(1), words(1), words(1 + index % 3)], "gold": index % 3}
            for index in range(11)
        ],
        "last_word": [{"context": words(2 + index % 4), "last": words(1)} for index in range(9)],
        "goes_on": [{"context": words(2 + index % 3), "rest": words(2)} for index in range(7)],
        "whole_text": [{"text": words(5 + 9 * index)} for index in range(4)],
    }
    documents["too_long"] = documents["goes_on"]
    kinds = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "{{' ' + last}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc"},
            ],
        },
        "goes_on": {
            "output_type": "generate_until",
            "doc_to_text": "context",
            "doc_to_target": "rest",
            "generation_kwargs": {"max_gen_toks": 3, "until": ["w0"]},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "whole_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    longer = {"max_gen_toks": 9999, "until": ["w0"]}  # than any context
    kinds["too_long"] = kinds["goes_on"] | {"generation_kwargs": longer}
    for name, kind in kinds.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **kind,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    vocabulary = {"<|endoftext|>": 0} | {f"w{word}": word for word in range(1, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return documents


def tiny_model(rows: int = VOCABULARY) -> GPTNeoXForCausalLM:
    """Of so many tokens; the same at every call."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=rows,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,  # so that answers differ
    )
    return GPTNeoXForCausalLM(config)
