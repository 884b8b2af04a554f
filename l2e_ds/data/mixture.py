"""Several sets of sequences as one stream of global batches, each set with a weight.

Which set a row of a global batch comes from depends on (weights, seed, step, row) alone and is found without a state:
positions (step*G + row) are cut into blocks of K. Before block b, set i has been taken

    C_i(b) = floor(W_i b K / W) - floor(W_{i-1} b K / W)

times (W_i: sum of the first i weights, W: of all), in exact integers: never further than one sequence from its share.
Inside a block the sets are shuffled; with K at least W / (smallest weight), no C_i ever falls. So every set's
sequences are taken in the order of their running numbers, and a set may be anything that can be read forwards.

G: global batch, K: positions a block, m: micro-batch, S: sets, T: tokens a sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from l2e_ds.config.sections import DataConfig, SourceConfig
from l2e_ds.console import say
from l2e_ds.data.dataset import TokenDataset
from l2e_ds.data.prepare import (
    PreparedData,
    check_data,
    check_tokenizers,
    input_notes,
    prepare_data,
    prepare_stream,
)
from l2e_ds.data.sampler import SequenceOrder, rank_rows
from l2e_ds.errors import DataError

_SMALLEST_BLOCK = 1024
_KEYS = (*SourceConfig.model_fields, "held_out")


class Schedule:
    """Which set each position is taken from. `weights`: one a set, > 0, of any sum."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = [Fraction(repr(weight)) for weight in weights]  # 0.1 is a tenth, as it was written
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        self._weights = [weight // math.gcd(*whole) for weight in whole]
        self._total = sum(self._weights)
        needed = -(-self._total // min(self._weights))
        self.block = max(_SMALLEST_BLOCK, 1 << (needed - 1).bit_length())
        self._slots = SequenceOrder(self.block, _seed_of(seed, "of the schedule"))
        self._block_of = lru_cache(maxsize=4)(self._make_block)  # the loader reads ahead of who counts

    def lookup(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Set of each position, and the position's running number within that set; int64 of the shape given."""
        sets, numbers = np.empty_like(positions), np.empty_like(positions)
        blocks, places = np.divmod(positions, self.block)
        for block in np.unique(blocks):
            here = blocks == block
            block_sets, block_numbers = self._block_of(int(block))
            sets[here], numbers[here] = block_sets[places[here]], block_numbers[places[here]]
        return sets, numbers

    def consumed(self, position: int) -> np.ndarray:
        """Return how many of the positions before `position` each set has, int64 [S]."""
        block, place = divmod(position, self.block)
        sets, _ = self._block_of(block)
        return self._before(block) + np.bincount(sets[:place], minlength=len(self._weights))

    def _before(self, block: int) -> np.ndarray:
        bounds, running = [0], 0
        for weight in self._weights:
            running += weight
            bounds.append(running * block * self.block // self._total)
        return np.diff(np.array(bounds, dtype=np.int64))

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sets and running numbers of all positions of a block, int64 [K] each."""
        first = self._before(block)
        counts = self._before(block + 1) - first
        slots = self._slots.sequences(block * self.block + np.arange(self.block, dtype=np.int64))
        sets = np.searchsorted(np.cumsum(counts), slots, side="right").astype(np.int64)
        numbers = np.empty_like(sets)
        begins = np.cumsum(counts) - counts  # where each set begins once positions are sorted by set
        numbers[np.argsort(sets, kind="stable")] = np.arange(self.block) + np.repeat(first - begins, counts)
        return sets, numbers

    def __str__(self) -> str:
        return "/".join(map(str, self._weights))


class StoredSequences:
    """A tokenised set in the order in which its sequences are taken. Raises DataError where it has none.

    `TrainingSequences` asks no more of a set than `read`: on every rank, for every set that a step takes from, set by
    set and step by step, with each `first` where the last call ended (but after a resume). So it may be collective.
    """

    def __init__(self, dataset: TokenDataset, seed: int, order: Literal["shuffled", "stored"]) -> None:
        self.dataset, self.order = dataset, SequenceOrder(len(dataset), seed, order)

    def read(self, first: int, count: int, wanted: np.ndarray) -> np.ndarray:
        """Of the `count` sequences from running number `first` on, those at offsets `wanted`: int64 [n, T+1]."""
        return self.dataset.batch(self.order.sequences(first + wanted))

    def epochs(self, number: int) -> float:
        """Return how often the set was gone through before that running number."""
        return number / len(self.dataset)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def close(self) -> None:
        """Nothing is open but memory maps."""


class Stream(Protocol):
    """A set that can only be read forwards (l2e_ds.training.streams). n: sequences that a rank wants."""

    def read(self, first: int, count: int, wanted: np.ndarray) -> np.ndarray:
        """Of the next `count` sequences, which begin at running number `first`, those at offsets `wanted` (int64 [n]):
        int64 [n, T+1]. Collective. Raises DataError, on every rank, for what is wrong with the text."""

    def state(self, number: int) -> dict[str, Any]:
        """JSON-able, on rank 0: the position before running number `number`, which was read a moment ago."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Collective. Raises DataError, on every rank, where it is another stream's."""

    def epochs(self, number: int) -> float:
        """On rank 0: how often the text was gone through before that running number."""

    def fingerprint(self) -> str:
        """Return what decides the sequences, the same on every rank."""

    def close(self) -> None:
        """End the worker processes."""


class TrainingSequences:
    """The global batches of a run, for any number of ranks the same."""

    def __init__(
        self,
        sets: Sequence[PreparedData],
        global_batch: int,
        seed: int,
        order: Literal["shuffled", "stored"],
        open_stream: Callable[[PreparedData, int], Stream] | None = None,
    ) -> None:
        """open_stream(set, seed): for the sets that are streams. Raises DataError where a set has no sequence."""
        self.sets, self.global_batch = list(sets), global_batch
        self.schedule = Schedule([part.weight for part in sets], seed)
        self._readers: list[StoredSequences | Stream] = []
        for part in sets:
            own_seed = _seed_of(seed, part.name)
            if part.train is not None:
                self._readers.append(StoredSequences(part.train, own_seed, order))
            else:
                assert open_stream is not None
                self._readers.append(open_stream(part, own_seed))

    def read(self, step: int, rank: int, ranks: int, micro_batch: int) -> np.ndarray:
        """Return what one rank takes in global batch `step`: int64 [accumulation, m, T+1].

        Collective where a set is a stream; steps are then read one after the other. Raises DataError where a token id
        is outside the vocabulary, where a sequence that is stored apart is no document, or where the text of a stream
        is broken, has changed or vanished.
        """
        own = rank_rows(self.global_batch, rank, ranks, micro_batch)
        sets, numbers = self.schedule.lookup(self._positions(step))
        result = None
        for index in np.unique(sets):
            of_set = sets == index
            first = int(numbers[of_set].min())
            mine = of_set[own]
            rows = self._readers[index].read(first, int(of_set.sum()), numbers[own][mine] - first)
            if result is None:
                result = np.empty((*own.shape, rows.shape[1]), dtype=np.int64)
            result[mine] = rows
        assert result is not None
        return result

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each row of global batch `step` the set, its epoch and the sequence of its file, int64 [G] each.

        Raises DataError where a set is a stream.
        """
        sets, numbers = self.schedule.lookup(self._positions(step))
        epochs, sequences = np.empty_like(numbers), np.empty_like(numbers)
        for index in np.unique(sets):
            here = sets == index
            reader = self._readers[index]
            if not isinstance(reader, StoredSequences):
                raise DataError(
                    "the sequences of a stream cannot be looked up, only read in order", where="data.streaming"
                )
            epochs[here] = numbers[here] // len(reader.dataset)
            sequences[here] = reader.order.sequences(numbers[here])
        return sets, epochs, sequences

    def _positions(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step {step}")
        return step * self.global_batch + np.arange(self.global_batch, dtype=np.int64)

    def consumed(self, step: int) -> dict[str, tuple[int, float]]:
        """Of each named set the sequences and epochs taken in the steps before `step`."""
        counts = self.schedule.consumed(step * self.global_batch).tolist()
        return {
            part.name: (count, reader.epochs(count))
            for part, reader, count in zip(self.sets, self._readers, counts, strict=True)
            if part.name
        }

    def stream_states(self, step: int) -> dict[str, dict[str, Any]]:
        """By name, on rank 0: where each stream stands before `step`, which was read a moment ago."""
        counts = self.schedule.consumed(step * self.global_batch).tolist()
        return {
            part.name: reader.state(count)
            for part, reader, count in zip(self.sets, self._readers, counts, strict=True)
            if not isinstance(reader, StoredSequences)
        }

    def restore_streams(self, states: dict[str, dict[str, Any]]) -> None:
        """Before anything is read. Collective. Raises DataError where they are other streams'."""
        for part, reader in zip(self.sets, self._readers, strict=True):
            if not isinstance(reader, StoredSequences):
                reader.restore(states[part.name])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def fingerprint(self) -> str:
        """Return what decides the sequences: of one unnamed set its content, else also names and weights, readable."""
        found = [reader.fingerprint() for reader in self._readers]
        if not self.sets[0].name:
            return found[0]
        names = ", ".join(f"{part.name} {one}" for part, one in zip(self.sets, found, strict=True))
        return f"{names} mixed {self.schedule}"


def _seed_of(seed: int, name: str) -> int:
    """Return the seed of a set's own shuffle; that of a set without a name is the run's."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") if name else seed


# --- preparing ---------------------------------------------------------------------------------------------------


def check_sets(config: DataConfig, vocab_size: int) -> None:
    """`check_data` for every set, and `check_tokenizers`. Raises DataError that names the set's key."""
    for index, (_, _, part) in enumerate(config.parts()):
        with _naming(config, index):
            check_data(part, vocab_size)
    check_tokenizers(config)


def prepare_sets(config: DataConfig, cache: Path, vocab_size: int, evaluated: int) -> list[PreparedData]:
    """`prepare_data` for every set, one after the other; for a stream only held-out text for `evaluated` sequences.

    Raises DataError that names the set's key.
    """
    from l2e_ds.distributed import collectives  # imports torch, which processes that tokenise do without

    prepared = []
    for index, (name, weight, part) in enumerate(config.parts()):
        with _naming(config, index):
            for note in input_notes(part) if collectives.is_main() else ():
                say(f"l2e-ds: {note}")
            if part.streaming:
                one = prepare_stream(part, cache, vocab_size, evaluated)
            else:
                one = prepare_data(part, cache, vocab_size)
            prepared.append(replace(one, name=name, weight=weight))
    return prepared


@contextmanager
def _naming(config: DataConfig, index: int) -> Iterator[None]:
    """Errors about one of several sets name its own key: `data.sets.1.path` for `data.path`."""
    try:
        yield
    except DataError as error:
        if config.sets is not None:
            error.rename({f"data.{key}": f"data.sets.{index}.{key}" for key in _KEYS})
        raise
