"""Read the optimizer states that the ranks of any ZeRO partition have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"  # Muon's


@dataclass(frozen=True)
class Piece:
    """Says that `count` elements of a parameter, from `start` on, lie in flat tensor `flat` from `offset` on."""

    start: int
    count: int
    flat: int
    offset: int


class Shards:
    """Reads any range of a parameter's master weights ("fp32") and moments from shards of any stage."""

    def __init__(self, checkpoint: Path, names: list[str]) -> None:
        """Map a checkpoint's shards. names: the parameters in the optimizer's order, which ZeRO-0 does not record."""
        self.shapes: dict[str, torch.Size] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.flats: list[dict[str, Tensor]] = []
        files = list(checkpoint.glob("*_optim_states.pt"))  # [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt
        files.sort(key=lambda file: int(file.name.partition("pp_rank_")[2].partition("_")[0]))
        states = [read_shard(file)["optimizer_state_dict"] for file in files]
        if not states:
            self._map_whole(read_shard(checkpoint / "mp_rank_00_model_states.pt"), names)
        elif "fp32_flat_groups" in states[0]:
            shapes = read_shard(checkpoint / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
            self._map_stage_3(states, shapes)
        else:
            shapes = read_shard(checkpoint / "mp_rank_00_model_states.pt")["param_shapes"]
            self._map_stages_1_and_2(states, shapes)

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of every parameter, without padding."""
        return {name: sum(piece.count for piece in pieces) for name, pieces in self.pieces.items()}

    def has(self, name: str, keys: Sequence[str]) -> bool:
        """Return whether these are there for all of a parameter."""
        return all(key in self.flats[piece.flat] for piece in self.pieces[name] for key in keys)

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Return `count` elements of a flattened parameter from element `start` on: [count] float32 on the CPU."""
        found = torch.empty(count)
        for piece in self.pieces[name]:
            low, high = max(start, piece.start), min(start + count, piece.start + piece.count)
            if low < high:
                source = self.flats[piece.flat][key].view(-1)
                found[low - start : high - start] = source.narrow(0, piece.offset + low - piece.start, high - low)
        return found

    def _add(self, master: Tensor, state: dict[str, Any]) -> int:
        self.flats.append({"fp32": master, **{key: state[key] for key in (*MOMENTS, MOMENTUM) if key in state}})
        return len(self.flats) - 1

    def _map_whole(self, model: dict[str, Any], names: list[str]) -> None:
        """Map ZeRO-0 in float32: every parameter is whole; the state's keys are places in the optimizer's order."""
        states = model["optimizer"]["state"]
        for place, name in enumerate(names):
            weights = model["module"][name]
            self.shapes[name] = weights.shape
            self.pieces[name] = [Piece(0, weights.numel(), self._add(weights, states.get(place, {})), 0)]

    def _map_stages_1_and_2(self, states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> None:
        """Map a group's parameters, which follow each other and are cut into one part a rank, the last padded."""
        for group, group_shapes in enumerate(shapes):
            self.shapes |= group_shapes
            parts = [state["single_partition_of_fp32_groups"][group] for state in states]
            first = len(self.flats)
            for part, state in zip(parts, states, strict=True):
                self._add(part, state["base_optimizer_state"]["state"].get(group, {}))
            paddings = states[0].get("param_alignment_paddings", [[]] * len(shapes))[group] or [0] * len(group_shapes)
            begin = 0
            for (name, shape), padding in zip(group_shapes.items(), paddings, strict=True):
                self.pieces[name] = list(_cut(begin, shape.numel(), parts[0].numel(), first))
                begin += shape.numel() + padding

    def _map_stage_3(self, states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> None:
        """Map parameters that are each cut into one part a rank, the last padded; a rank's parts follow each other."""
        for group_shapes in shapes:
            self.shapes |= group_shapes
        for rank, state in enumerate(states):
            moments = state["optimizer_state_dict"]["state"]
            for group, (flat, group_shapes) in enumerate(zip(state["fp32_flat_groups"], shapes, strict=True)):
                index, offset = self._add(flat, moments.get(group, {})), 0
                for name, shape in group_shapes.items():
                    part = -(-shape.numel() // len(states))
                    start, count = own_range(shape.numel(), part, rank)
                    self.pieces.setdefault(name, []).append(Piece(start, count, index, offset))
                    offset += part


def read_shard(shard: Path) -> dict[str, Any]:
    """Return the content of a shard, a pickle: verify its manifest first. Its tensors are mapped and read when used."""
    return torch.load(shard, map_location="cpu", weights_only=False, mmap=True)


def _cut(begin: int, numel: int, part: int, first: int) -> Iterator[Piece]:
    """Yield the pieces of elements [begin, begin + numel) of flats first, first + 1 ..., which hold `part` each."""
    start = 0
    while start < numel:
        flat, offset = divmod(begin + start, part)
        count = min(numel - start, part - offset)
        yield Piece(start, count, first + flat, offset)
        start += count


def own_range(numel: int, part: int, rank: int) -> tuple[int, int]:
    """Return start and count of a rank's part of a parameter under ZeRO-3; count is 0 where only padding is left."""
    start = min(rank * part, numel)
    return start, min(part, numel - start)
