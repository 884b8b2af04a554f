"""Read the records of a chunk of raw input, hash and tokenize them.

Worker processes import this module, so it must import neither torch nor transformers. n: documents of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from l2e_ds.data.sources import Chunk
from l2e_ds.data.tokenizer import without_offsets
from l2e_ds.errors import DataError

_BATCH_CHARACTERS = 1 << 20  # tokenized at once: the library needs some hundred bytes of memory for each token
_PIECE_CHARACTERS = 1 << 18  # a longer document is tokenized in pieces
_CUT = re.compile(r"(?<=[^\W_])[ \n]")
# Split between a letter or digit and an ASCII character that is neither of them nor an apostrophe. All _PATTERNS split
# there, whatever stands around it, and NFC does not combine the two sides, as it changes no such ASCII character.
_WORDS = re.compile(r"(?<=[^\W_])(?=[\t\n\r !-&(-/:-@\[-`{-~])").split
# How GPT-2 (and Pythia), Llama 3 and Qwen 2 split texts into words before the bytes of a word are merged.
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
]
_MEMO_ENTRIES = 1 << 18  # words whose token ids are kept: about 50 MB in each process
_MEMO_CHARACTERS = 32
_PROBE = (
    "Some words, and 12.5 + 1,000,000; f(x[0])={'a': b_1}\tdon't we'll\r\n\r\nHe said: \"so\"...\n\n\n    return -x"
    "  # été 中文 and 한국어, e\u0301 x\u0301-y 3rd/4th <|a|> http://a.b/c?d=e&f#g CamelCase SCREAMING_CASE x\n"
)


def digest(text: str) -> int:
    """Return a 64-bit hash of a document's content."""
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk, up to the first bad record unless bad records are skipped."""

    tokens: np.ndarray
    """The tokens of all documents, one after the other, flat."""
    lengths: np.ndarray
    """The number of tokens of each document, int64 [n]."""
    digests: np.ndarray
    """The hash of each document's text, uint64 [n]."""
    empty: int
    """The number of records without text. They are not counted as documents."""
    bad: int
    """The number of bad records that were skipped."""
    error: DataError | None
    """What is wrong with the first bad record."""


class Encoder:
    """A callable that makes an `Encoded` of a chunk.

    tokenizer: the content of a tokenizer.json. end_of_text: id to put after each document, or None. dtype: that of the
    tokens, which must hold every id of the vocabulary. skip_bad: count bad records instead of ending at the first.
    """

    def __init__(self, tokenizer: str, text_key: str, end_of_text: int | None, dtype: np.dtype, skip_bad: bool) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer)
        # Documents are packed, so they are neither truncated nor padded, even if the file says so.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._text_key, self._dtype, self._skip_bad = text_key, dtype, skip_bad
        self._end = np.array([] if end_of_text is None else [end_of_text], dtype)
        self._may_cut = may_cut(self._backend)
        added = self._backend.get_added_tokens_decoder().values()
        self._added = [token.content for token in added if len(_WORDS(token.content)) > 1]
        self._memo: dict[str, bytes] = {}  # word -> its token ids

    def __call__(self, chunk: Chunk) -> Encoded:
        texts: list[str] = []
        empty = bad = 0
        error = None
        for record in chunk(self._text_key):
            if isinstance(record, DataError):
                error = error or record
                if not self._skip_bad:
                    break
                bad += 1
            elif record.strip():
                texts.append(record)
            else:
                empty += 1
        digests = np.fromiter(map(digest, texts), np.uint64, len(texts))
        lengths = np.zeros(len(texts), np.int64)
        parts: list[np.ndarray] = []
        for number, ids, is_last in self._encode(texts):
            parts.append(ids)
            lengths[number] += len(ids)
            if is_last:
                parts.append(self._end)
                lengths[number] += len(self._end)
        tokens = np.concatenate(parts) if parts else self._end[:0]
        return Encoded(tokens, lengths, digests, empty, bad, error)

    def _encode(self, texts: list[str]) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Yield (number of the text, token ids of a piece of it, whether it is the last piece), in order."""
        batch: list[tuple[int, str, bool]] = []
        characters = 0
        for number, text in enumerate(texts):
            cut = list(pieces(text)) if self._may_cut else [text]
            for i, piece in enumerate(cut):
                batch.append((number, piece, i == len(cut) - 1))
                characters += len(piece)
                if characters >= _BATCH_CHARACTERS:
                    yield from self._encode_batch(batch)
                    batch, characters = [], 0
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[tuple[int, str, bool]]) -> Iterator[tuple[int, np.ndarray, bool]]:
        if not self._may_cut or any(self._holds_added_token(piece) for _, piece, _ in batch):
            yield from self._encode_whole(batch)
            return
        # Words repeat. Asking the library only for new ones saves most of the time.
        memo = self._memo
        words_of_pieces = [_WORDS(piece) for _, piece, _ in batch]
        new_words = list(set(chain.from_iterable(words_of_pieces)).difference(memo))
        if not all(map(_ends_in_one_letter, new_words)):
            yield from self._encode_whole(batch)
            return
        new_ids = (np.array(ids, self._dtype).tobytes() for ids in self._ids(new_words))
        memo.update(zip(new_words, new_ids, strict=True))
        for (number, _, is_last), words in zip(batch, words_of_pieces, strict=True):
            yield number, np.frombuffer(b"".join(map(memo.__getitem__, words)), self._dtype), is_last
        for word in new_words:
            if len(word) > _MEMO_CHARACTERS or len(memo) > _MEMO_ENTRIES:
                del memo[word]

    def _encode_whole(self, batch: list[tuple[int, str, bool]]) -> Iterator[tuple[int, np.ndarray, bool]]:
        for (number, _, is_last), ids in zip(batch, self._ids([text for _, text, _ in batch]), strict=True):
            yield number, np.array(ids, self._dtype), is_last

    def _holds_added_token(self, text: str) -> bool:
        """Return whether the text holds an added token that would be cut, such as <|endoftext|>."""
        starts = {token[:2] for token in self._added}  # few: the hundreds of added tokens of Llama begin alike
        return any(start in text for start in starts) and any(token in text for token in self._added)

    def _ids(self, texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False))


def pieces(text: str) -> Iterator[str]:
    """Cut a long text before blanks that follow a letter or digit, where `_WORDS` also cuts."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (cut := _CUT.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _ends_in_one_letter(word: str) -> bool:
    """Return whether the last character of a word, if it is a letter or digit, is one after NFC, too.

    NFC decomposes some letters of Indic and Hebrew script. The last character is then a mark, which the patterns join
    with what follows.
    """
    return word.isascii() or not word[-1].isalnum() or unicodedata.normalize("NFC", word[-1])[-1].isalnum()


def may_cut(backend: Any) -> bool:
    """Return whether tokenizing a text word by word gives the tokens of the whole text.

    That is so for byte-level BPE with the patterns above, without normalisation or with NFC. It is not so for
    tokenizers that mark the beginning of a text (SentencePiece), merge over blanks or are random (dropout). Other
    tokenizers are taken for such.
    """
    described = json.loads(backend.to_str())
    if described["model"].get("type") != "BPE" or described["model"].get("dropout"):
        return False
    if described["normalizer"] not in (None, {"type": "NFC"}) or not _is_known(described["pre_tokenizer"]):
        return False
    for token in described["added_tokens"]:
        if token["single_word"] or token["rstrip"] or _CUT.search(token["content"]):
            return False
        if token["normalized"] and len(_WORDS(token["content"])) > 1:  # the text may hold it in another form
            return False
    words = _WORDS(_PROBE)
    ends = {end for _, (_, end) in backend.pre_tokenizer.pre_tokenize_str(_PROBE)}
    whole = backend.encode(_PROBE, add_special_tokens=False).ids
    by_words = [id for word in words for id in backend.encode(word, add_special_tokens=False).ids]
    return ends.issuperset(accumulate(map(len, words))) and whole == by_words


def _is_known(pre_tokenizer: dict | None) -> bool:
    """Return whether a pre-tokenizer is GPT-2's, or splits by one of _PATTERNS and then into bytes."""
    splits = (
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in _PATTERNS
    )
    byte_level = _GPT_2 | {"use_regex": False}
    known = [_GPT_2, *({"type": "Sequence", "pretokenizers": [split, byte_level]} for split in splits)]
    return without_offsets(pre_tokenizer) in known
