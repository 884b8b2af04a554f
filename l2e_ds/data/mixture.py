"""Mix several sets of sequences, each with a weight, into one series of global batches.

The set of a row of a global batch depends on (weights, seed, step, row) alone and is found without any state. The
positions step*G + row are cut into blocks of K. Before block b, set i has been taken

    C_i(b) = floor(W_i b K / W) - floor(W_{i-1} b K / W)

times, where W_i is the sum of the first i weights and W that of all. This is computed in exact integers and is never
further than one sequence from the set's share. Within a block the sets are shuffled. As K is at least
W / (smallest weight), no C_i ever decreases. So the sequences of each set are taken in the order of their running
numbers, and a set may be anything that can be read forwards.

G: global batch, K: positions a block, m: micro-batch, S: sets, T: tokens a sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from l2e_ds.config.sections import DataConfig, SourceConfig, TextConfig
from l2e_ds.console import say
from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.prepare import (
    PreparedData,
    PreparedText,
    check_data,
    check_tokenizers,
    prepare_data,
    prepare_stream,
    prepare_text,
)
from l2e_ds.data.sampler import SequenceOrder, rank_rows
from l2e_ds.data.sources import check_source, unread_files
from l2e_ds.data.tokenizer import end_of_text_id, load_tokenizer
from l2e_ds.errors import renaming

if TYPE_CHECKING:  # a part above this one, which hands in its streams (`open_stream`)
    from l2e_ds.training.streams import StreamedSequences

_SMALLEST_BLOCK = 1024
_KEYS = (*SourceConfig.model_fields, "held_out")


class MixtureOrder:
    """The set from which each position is taken. weights: one for each set, each > 0, of any sum."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = [Fraction(repr(weight)) for weight in weights]  # 0.1 is a tenth, as it was written
        scale = math.lcm(*(share.denominator for share in shares))
        integers = [int(share * scale) for share in shares]
        self._weights = [weight // math.gcd(*integers) for weight in integers]
        self._total = sum(self._weights)
        smallest_block = -(-self._total // min(self._weights))
        self.block = max(_SMALLEST_BLOCK, 1 << (smallest_block - 1).bit_length())
        self._slots = SequenceOrder(self.block, _seed_of(seed, "of the schedule"))  # a name that no set can have
        # Several blocks are kept, as the loader reads ahead of the trainer, which asks what was consumed.
        self._block_of = lru_cache(maxsize=4)(self._make_block)

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each position's set and its running number within that set, int64 of the shape of `positions`."""
        sets, numbers = np.empty_like(positions), np.empty_like(positions)
        blocks, places = np.divmod(positions, self.block)
        for block in np.unique(blocks):
            in_block = blocks == block
            block_sets, block_numbers = self._block_of(int(block))
            sets[in_block], numbers[in_block] = block_sets[places[in_block]], block_numbers[places[in_block]]
        return sets, numbers

    def consumed(self, position: int) -> np.ndarray:
        """Return how many positions before `position` are taken from each set, int64 [S]."""
        block, place = divmod(position, self.block)
        sets, _ = self._block_of(block)
        return self._before(block) + np.bincount(sets[:place], minlength=len(self._weights))

    def _before(self, block: int) -> np.ndarray:
        """Return C_i(block) of every set i, int64 [S]."""
        sums = accumulate(self._weights, initial=0)
        bounds = [weight_sum * block * self.block // self._total for weight_sum in sums]
        return np.diff(np.array(bounds, dtype=np.int64))

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sets and running numbers of all positions of a block, int64 [K] each."""
        first = self._before(block)
        counts = self._before(block + 1) - first
        slots = self._slots.sequences(block * self.block + np.arange(self.block, dtype=np.int64))
        sets = np.searchsorted(np.cumsum(counts), slots, side="right").astype(np.int64)
        numbers = np.empty_like(sets)
        begins = np.cumsum(counts) - counts  # where each set begins when the positions are sorted by set
        numbers[np.argsort(sets, kind="stable")] = np.arange(self.block) + np.repeat(first - begins, counts)
        return sets, numbers

    def __str__(self) -> str:
        return "/".join(map(str, self._weights))


class StoredSequences:
    """A tokenized set in the order in which its sequences are taken. Raises DataError if it has no sequence."""

    def __init__(self, dataset: TokenDataset, seed: int, order: Literal["shuffled", "stored"]) -> None:
        self.dataset, self.order = dataset, SequenceOrder(len(dataset), seed, order)

    def read(self, first: int, count: int, wanted: np.ndarray) -> np.ndarray:
        """Return the sequences at offsets `wanted` of the `count` from running number `first` on, int64 [n, T+1]."""
        return self.dataset.batch(self.order.sequences(first + wanted))

    def epochs(self, number: int) -> float:
        """Return how many epochs of the set come before that running number."""
        return number / len(self.dataset)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def close(self) -> None:
        """Do nothing: only memory maps are open."""


class TrainingSequences:
    """The global batches of a run, the same for any number of ranks."""

    def __init__(
        self,
        sets: Sequence[PreparedData],
        global_batch: int,
        seed: int,
        order: Literal["shuffled", "stored"],
        open_stream: Callable[[PreparedData, int], StreamedSequences] | None = None,
    ) -> None:
        """Open every set; open_stream(set, seed) opens those that are streams. Raises DataError for an empty set."""
        self.sets, self.global_batch = list(sets), global_batch
        self.mixture_order = MixtureOrder([data_set.weight for data_set in sets], seed)
        self._readers: list[StoredSequences | StreamedSequences] = []
        for data_set in sets:
            own_seed = _seed_of(seed, data_set.name)
            if data_set.train is not None:
                self._readers.append(StoredSequences(data_set.train, own_seed, order))
            else:
                assert open_stream is not None
                self._readers.append(open_stream(data_set, own_seed))

    def read(self, step: int, rank: int, ranks: int, micro_batch: int) -> np.ndarray:
        """Return the sequences that one rank takes in global batch `step`, int64 [accumulation, m, T+1].

        With a stream among the sets this is collective, and steps must be read one after the other. Raises DataError
        for what `TokenDataset.batch` refuses, and for a stream whose text is broken, has changed or is gone.
        """
        own_rows = rank_rows(self.global_batch, rank, ranks, micro_batch)
        sets, numbers = self.mixture_order.lookup(self._positions(step))
        result = None
        for index in np.unique(sets):
            in_set = sets == index
            first = int(numbers[in_set].min())
            is_own = in_set[own_rows]  # perhaps nowhere, but `read` of a stream is collective
            sequences = self._readers[index].read(first, int(in_set.sum()), numbers[own_rows][is_own] - first)
            if result is None:
                result = np.empty((*own_rows.shape, sequences.shape[1]), dtype=np.int64)
            result[is_own] = sequences
        assert result is not None
        return result

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each row's set, its epoch and sequence, for batch `step`, int64 [G] each. No set is a stream."""
        sets, numbers = self.mixture_order.lookup(self._positions(step))
        epochs, sequences = np.empty_like(numbers), np.empty_like(numbers)
        for index in np.unique(sets):
            in_set = sets == index
            reader = self._readers[index]
            assert isinstance(reader, StoredSequences), "the sequences of a stream can only be read in order"
            epochs[in_set] = numbers[in_set] // len(reader.dataset)
            sequences[in_set] = reader.order.sequences(numbers[in_set])
        return sets, epochs, sequences

    def _positions(self, step: int) -> np.ndarray:
        return step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)

    def consumed(self, step: int) -> dict[str, tuple[int, float]]:
        """Return, by the name of each named set, the sequences and epochs taken in the steps before `step`."""
        return {name: (count, reader.epochs(count)) for name, reader, count in self._counted(step) if name}

    def stream_states(self, step: int) -> dict[str, dict[str, Any]]:
        """Return, on rank 0, each stream's state before `step` by name; `step` must have been read just before."""
        counted = self._counted(step)
        return {name: reader.state(n) for name, reader, n in counted if not isinstance(reader, StoredSequences)}

    def _counted(self, step: int) -> Iterator[tuple[str, StoredSequences | StreamedSequences, int]]:
        """Yield each set's name, its reader and how many of its sequences are taken before `step`."""
        counts = self.mixture_order.consumed(step * self.global_batch).tolist()
        for data_set, reader, count in zip(self.sets, self._readers, counts, strict=True):
            yield data_set.name, reader, count

    def restore_streams(self, states: dict[str, dict[str, Any]]) -> None:
        """Resume the streams, before anything is read. Collective. Raises DataError for states of other streams."""
        for data_set, reader in zip(self.sets, self._readers, strict=True):
            if not isinstance(reader, StoredSequences):
                reader.restore(states[data_set.name])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def fingerprint(self) -> str:
        """Return what decides the sequences: the fingerprints of the sets and, for named sets, the weights."""
        fingerprints = [reader.fingerprint() for reader in self._readers]
        if not self.sets[0].name:
            return fingerprints[0]
        named = ", ".join(f"{data_set.name} {one}" for data_set, one in zip(self.sets, fingerprints, strict=True))
        return f"{named} mixed {self.mixture_order}"


def _seed_of(seed: int, name: str) -> int:
    """Return the seed of a set's own shuffle, which for a set without a name is the run's seed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") if name else seed


# --- preparing ---------------------------------------------------------------------------------------------------


def check_sets(config: DataConfig, vocab_size: int) -> None:
    """Check every set by `check_data`, and all by `check_tokenizers`. Raises DataError that names the set's key."""
    for index, (_, _, part) in enumerate(config.all_sets()):
        with _naming(_key_of(config, index)):
            check_data(part, vocab_size)
    check_tokenizers(config)


def prepare_sets(config: DataConfig, cache: Path, vocab_size: int, evaluated: int) -> list[PreparedData]:
    """Prepare every set by `prepare_data`, or a stream by `prepare_stream`, with text for `evaluated` sequences.

    Raises DataError that names the set's key.
    """
    prepared = []
    for index, (name, weight, part) in enumerate(config.all_sets()):
        with _naming(_key_of(config, index)):
            _say_unread_files(part)
            if part.streaming:
                data_set = prepare_stream(part, cache, vocab_size, evaluated)
            else:
                data_set = prepare_data(part, cache, vocab_size)
            prepared.append(replace(data_set, name=name, weight=weight))
    return prepared


def check_texts(texts: Sequence[TextConfig], data: DataConfig) -> None:
    """Raise DataError if a text is missing, unreadable at its beginning or empty, or cannot be tokenized."""
    for index, text in enumerate(texts):
        with _naming(f"evaluation.texts.{index}"):
            check_source(text)
    if texts and data.tokenizer is not None:
        end_of_text_id(load_tokenizer(data.tokenizer))


def prepare_texts(
    texts: Sequence[TextConfig], data: DataConfig, tokenizer: str, cache: Path, vocab_size: int
) -> list[PreparedText]:
    """Prepare every text by `prepare_text`, with the tokenizer, sequence length and workers of a run.

    tokenizer: what `load_tokenizer` takes. Raises DataError that names the text's key.
    """
    prepared = []
    for index, text in enumerate(texts):
        source = {key: getattr(text, key) for key in SourceConfig.model_fields}
        more = {"sets": None, "held_out": 0.0, "tokenizer": tokenizer, "train_tokenizer": None}
        config = data.model_copy(update=source | more)
        with _naming(f"evaluation.texts.{index}"):
            _say_unread_files(config)
            prepared.append(prepare_text(config, cache, vocab_size, text.name))
    return prepared


def _say_unread_files(config: DataConfig) -> None:
    """Print, on rank 0, which files of a source are not read. Raises DataError."""
    from l2e_ds.distributed import collectives  # imports torch, which processes that tokenize do without

    if collectives.is_main() and (unread := unread_files(config)):
        say(f"l2e-ds: {unread}")


def _key_of(config: DataConfig, index: int) -> str:
    return "data" if config.sets is None else f"data.sets.{index}"


def _naming(where: str) -> AbstractContextManager[None]:
    """Make errors name the key of a set or text: `data.sets.1.path` for `data.path`."""
    return renaming({f"data.{key}": f"{where}.{key}" for key in _KEYS})
