"""Ranks, and the few collectives that this project calls itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from l2e_ds.distributed.heartbeat import beat
from l2e_ds.errors import L2EError

_patience = timedelta(minutes=30)  # timeout of the collectives; set by `open_control_group`
_control: Any = None  # gloo group of all ranks, for decisions that wait for no GPU and mix with no gradient


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def size(group: Any = None) -> int:
    """Return the number of ranks of a group (default: all); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes what is written once."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor, group: Any = None) -> Tensor:
    """Sum a tensor over the ranks of `group` (default: all), in place, and return it.

    It may have any shape and dtype that the backend takes. Collective.
    """
    if size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def begin_all_reduce_sum(tensor: Tensor, group: Any = None) -> Callable[[], Any]:
    """Begin an `all_reduce_sum` that proceeds while this rank computes, and return a function that waits for it.

    On a GPU only the device waits, not the host. Until then nothing may read or write the tensor. Collective.
    """
    if size(group) == 1:
        return lambda: None
    return dist.all_reduce(tensor, group=group, async_op=True).wait


def begin_any(*flags: bool) -> Callable[[], list[bool]]:
    """Begin to find out which flags are true on any rank, and return a function that waits for the answer. Collective.

    The hosts communicate while the GPUs compute: at a thousand ranks the answer takes longer than a step may lose.
    """
    box = torch.tensor(flags, dtype=torch.int32)
    work = dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_control, async_op=True) if size() > 1 else None

    def answer() -> list[bool]:
        if work is not None:
            work.wait()
        return [bool(flag) for flag in box]

    return answer


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank. Collective."""
    return begin_any(flag)()[0]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value (picklable, small) on every rank. Collective."""
    box = [value]
    if size() > 1:
        dist.broadcast_object_list(box, src=0, group=_control)
    beat()
    return box[0]


def run_on_main(action: Callable[[], Any], tick: Callable[[], None] = lambda: None) -> Any:
    """Run `action` on rank 0 while the others wait, and return its result on rank 0 and None elsewhere. Collective.

    It may take any time: the ranks meet in a small collective every second, so that no timeout ends a long action.
    tick: called each second on every rank; it may raise, on all ranks alike, which abandons the action.
    An L2EError of the action is raised on every rank. Any other exception is raised on rank 0 alone, and the launcher
    has to end the others.
    """
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = action()
        except BaseException as error:
            outcome["error"] = error

    worker = threading.Thread(target=work, daemon=True)
    if is_main():
        worker.start()
    while not broadcast_object(is_main() and not worker.is_alive()):
        beat()
        tick()
        worker.join(1.0) if is_main() else time.sleep(1.0)
    error = outcome.get("error")
    if error is not None and not isinstance(error, L2EError):
        raise error  # the launcher ends the others
    raise_on_all(error)
    return outcome.get("result")


def raise_on_all(error: L2EError | None) -> None:
    """Raise on every rank if any rank brings an error, so that all end together with its message. Collective."""
    errors = all_gather_objects(error)
    first: L2EError | None = error or next((e for e in errors if e is not None), None)
    if first is not None:
        first.on_every_rank = True
        raise first


def run_on_all(action: Callable[[], Any]) -> Any:
    """Run `action` on every rank and return this rank's result.

    If one raises an L2EError, all do. Collective.
    """
    result, error = None, None
    try:
        result = action()
    except L2EError as raised:
        error = raised
    raise_on_all(error)
    return result


def open_control_group(patience: timedelta) -> None:
    """Make the group that the ranks decide in. patience: timeout of its collectives. Collective."""
    global _control, _patience
    _patience = patience
    _control = new_group()


def forget_control_group() -> None:
    """Drop the group that the ranks decide in; called before the process groups are destroyed."""
    global _control
    _control = None


def new_group() -> Any:
    """Return a group of all ranks on CPUs (gloo), for collectives of one thread that others must not mix with.

    Collective.
    """
    return dist.new_group(backend="gloo", timeout=_patience) if size() > 1 else None


def broadcast_array(array: np.ndarray | L2EError | None, shape: tuple[int, ...], group: Any) -> np.ndarray:
    """Return rank 0's array (int32 of this shape) on every rank of a `new_group`, or raise rank 0's error on all.

    array: None on the other ranks. Collective over the group.
    """
    error = [array if isinstance(array, L2EError) else None]
    if group is not None:
        dist.broadcast_object_list(error, src=0, group=group)
    if error[0] is not None:
        error[0].on_every_rank = True
        raise error[0]
    assert not isinstance(array, L2EError)
    tensor = torch.empty(shape, dtype=torch.int32) if array is None else torch.from_numpy(array)
    if group is not None:
        dist.broadcast(tensor, src=0, group=group)
    return tensor.numpy()


def all_gather_objects(value: Any) -> list[Any]:
    """Return every rank's value (picklable, small), in the order of ranks. Collective."""
    values: list[Any] = [value]
    if size() > 1:
        values = [None] * size()
        dist.all_gather_object(values, value, group=_control)
    return values
