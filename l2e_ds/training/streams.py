"""Train on a stream as one of a run's sets: rank 0 reads and tokenizes it, and every rank gets what its step takes.

Shapes: n sequences, T tokens per sequence.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from l2e_ds.data import PreparedData
from l2e_ds.data.stream import TokenStream
from l2e_ds.data.workers import default_workers
from l2e_ds.distributed import collectives
from l2e_ds.errors import L2EError

_REMEMBERED = 8  # positions, of the newest calls of `read`; the loader is only a few steps ahead of a checkpoint


class StreamedSequences:
    """Reads the sequences of a stream by running number, each once. `read` may run in a thread, as its collectives have
    a process group of their own. All is collective, except `state`, `epochs`, `fingerprint` and `close`."""

    def __init__(self, part: PreparedData, seed: int, order: Literal["shuffled", "stored"]) -> None:
        """Open the stream on rank 0. order: `stored` reads without a shuffle buffer. Raises DataError on every rank."""
        config, tokenizer = part.stream, part.tokenizer
        assert config is not None and tokenizer is not None

        def opened() -> TokenStream:
            workers = config.workers or max(1, default_workers() // 2)
            buffer = 0 if order == "stored" else config.shuffle_buffer
            return TokenStream(config, tokenizer, config.sequence_length, seed, workers, buffer)

        self.width = config.sequence_length + 1
        self._stream: TokenStream | None = collectives.run_on_main(opened, lambda: None)
        described = None if self._stream is None else self._stream.fingerprint()
        self._fingerprint = collectives.all_gather_objects(described)[0]
        self._group = collectives.new_group()
        self._states: dict[int, dict[str, Any]] = {}  # on rank 0: running number -> position before it
        self._remember(0)

    def read(self, first: int, count: int, wanted: np.ndarray) -> np.ndarray:
        """Read `count` sequences from number `first`, and return those at offsets `wanted`, [n] int: [n, T+1] int64.

        Raises DataError on every rank for what is wrong with the text, and ValueError if the last call did not end
        there.
        """
        taken: np.ndarray | L2EError | None = None
        if self._stream is not None:
            if first != max(self._states):
                raise ValueError(f"stream: got sequence {first}, allowed: {max(self._states)}, the next one")
            try:
                taken = self._stream.take(count).astype(np.int32)
            except L2EError as error:
                taken = error
            else:
                self._remember(first + count)
        return collectives.broadcast_array(taken, (count, self.width), self._group)[wanted].astype(np.int64)

    def state(self, number: int) -> dict[str, Any]:
        """Return on rank 0 the position before a running number that was read lately, and elsewhere nothing."""
        return {} if self._stream is None else {"number": number, **self._states[number]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises DataError on every rank if it is another stream's."""

        def go_there() -> None:
            if self._stream is not None:
                position = dict(state)
                number = position.pop("number")
                self._stream.restore(position)
                self._states.clear()
                self._remember(number)

        collectives.run_on_all(go_there)

    def epochs(self, number: int) -> float:
        """Return on rank 0 how often the text was gone through before that running number, and elsewhere 0."""
        return float(self._states[number]["block"]["epoch"]) if self._stream is not None else 0.0

    def fingerprint(self) -> str:
        """Return what identifies the stream's sequences, the same on every rank."""
        return self._fingerprint

    def close(self) -> None:
        """End the worker processes."""
        if self._stream is not None:
            self._stream.close()

    def _remember(self, number: int) -> None:
        if self._stream is not None:
            self._states[number] = self._stream.state()
            while len(self._states) > _REMEMBERED:
                del self._states[min(self._states)]
