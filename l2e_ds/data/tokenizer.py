"""Load a tokenizer, or train a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.data.sources import looks_local
from l2e_ds.errors import DataError
from l2e_ds.system.files import one_line

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_ENDS = (END_OF_TEXT, "</s>")  # tried in this order if a tokenizer names no eos_token


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a tokenizer.json, a local folder or a hub name (at a revision). Raises DataError."""
    path = Path(name).expanduser()
    if not path.exists() and (looks_local(name) or name.endswith(".json")):
        raise DataError(f"no such file or folder: {name}", where="data.tokenizer")
    try:
        if path.is_file():
            tokenizer: Any = _from_file(path)
        else:
            tokenizer = _from_pretrained(str(path) if path.is_dir() else name, revision)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot load {name!r}: {one_line(error)}", where="data.tokenizer") from None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{name!r} has no tokenizer.json; a fast tokenizer is needed", where="data.tokenizer")
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):  # what transformers makes of a folder without one
        raise DataError(f"{name!r} has no tokenizer.json, or one without a vocabulary", where="data.tokenizer")
    # Documents are packed, so they are neither truncated nor padded, even if the file says so.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    return _wrap(backend, special=backend.token_to_id(END_OF_TEXT) is not None)


def _from_pretrained(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    if cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False) is None:
        return AutoTokenizer.from_pretrained(name, revision=revision, use_fast=True)
    # AutoTokenizer would take the class that the folder names, which may replace the file's normalizer and
    # pre-tokenizer by its own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
    if tokenizer.eos_token is None:  # the class that the folder names would have a default
        added = tokenizer.get_added_vocab()
        tokenizer.eos_token = next((token for token in _ENDS if token in added), None)
    return tokenizer


def _wrap(backend: object, special: bool) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "unk_token") if special else ()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **dict.fromkeys(names, END_OF_TEXT)
    )


def name_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the tokenizer's `eos_token`, if it has none, to the token that ends its documents. Raises DataError."""
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_text_id(tokenizer))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `vocab_size` entries; <|endoftext|> is id 0, the 256 bytes are ids 1 to 256.

    The same texts in the same order give the same tokenizer. It has fewer entries if the texts hold too few repeated
    pairs. Raises DataError for a vocabulary that cannot hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise DataError(f"got {vocab_size}, must be at least {len(alphabet) + 1}", where="data.train_tokenizer")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend, special=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256, as 64 hex digits, of all that decides the token ids of a text.

    The decoder and the special tokens put around a text are not among that.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    # An empty prefix or suffix is the same as none.
    model = {key: None if value == "" else value for key, value in described["model"].items()}
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized")
    added = {token["id"]: [token[flag] for flag in flags] for token in described["added_tokens"]}
    parts = (described["normalizer"], without_offsets(described["pre_tokenizer"]), model, added)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def without_offsets(described: Any) -> Any:
    """Return a pre-tokenizer's description without the setting that only decides the offsets of tokens."""
    if isinstance(described, list):
        return [without_offsets(part) for part in described]
    if isinstance(described, dict):
        return {key: without_offsets(value) for key, value in described.items() if key != "trim_offsets"}
    return described


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the largest id + 1, added tokens included, which is the number of rows that an embedding needs."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def find_end_of_text(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id that ends a document, or None if the tokenizer has none."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[token] for token in _ENDS if token in vocabulary), None)


def end_of_text_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that is put after every document. Raises DataError if the tokenizer has none."""
    found = find_end_of_text(tokenizer)
    if found is not None:
        return found
    raise DataError(
        f"has neither an eos_token nor one of {', '.join(_ENDS)} to end a document with; give a folder whose"
        " tokenizer_config.json names an eos_token, or another tokenizer",
        where=("data.tokenizer", tokenizer.name_or_path),
    )


def take_special_tokens(hf_config: PretrainedConfig | GenerationConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give a network's configuration the tokenizer's tokens for the end, the beginning and the padding of text.

    The configuration of a pretrained network that already has this tokenizer's end, perhaps with others, is kept.
    """
    end, ends = find_end_of_text(tokenizer), hf_config.eos_token_id
    if end is None or end in (ends if isinstance(ends, list) else [ends]):
        return
    hf_config.eos_token_id, hf_config.bos_token_id = end, tokenizer.bos_token_id
    if getattr(hf_config, "model_type", None) == "gpt_neox":  # other families do not train the padding's embedding
        hf_config.pad_token_id = tokenizer.pad_token_id
