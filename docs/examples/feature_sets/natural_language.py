"""Writes natural_language.jsonl: texts of EU languages, from Europarl on the hub (docs/feature-sets.md)."""

import json

from datasets import load_dataset

TEXTS, CHARACTERS = 1000, 4000
LANGUAGES = {
    "Dutch": ("en-nl", "nl"),
    "English": ("de-en", "en"),
    "French": ("en-fr", "fr"),
    "German": ("de-en", "de"),
    "Greek": ("el-en", "el"),
    "Italian": ("en-it", "it"),
    "Portuguese": ("en-pt", "pt"),
    "Spanish": ("en-es", "es"),
    "Swedish": ("en-sv", "sv"),
}
with open("natural_language.jsonl", "w", encoding="utf-8") as output:
    for feature, (pair, language) in LANGUAGES.items():
        text, written = "", 0
        for row in load_dataset("Helsinki-NLP/europarl", pair, split="train", streaming=True):
            text += row["translation"][language].strip() + "\n"
            if len(text) >= CHARACTERS:
                output.write(json.dumps({"text": text, "feature": feature}, ensure_ascii=False) + "\n")
                text, written = "", written + 1
                if written == TEXTS:
                    break
