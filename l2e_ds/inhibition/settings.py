"""Hold what the hooks do, how strongly, in which part of the run, and where the neurons are.

Shapes: B sequences per micro-batch, T tokens per sequence, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from l2e_ds.inhibition.losses import LossName, Power, Regulariser

DEFAULT_STRENGTH = 0.05


@dataclass(frozen=True)
class Settings:
    """Holds what the hooks do. The section `inhibition` of a run file has the same keys (docs/run-files.md).

    retrieval, mechanism: how activations are selected, and what becomes of the selected ones (docs/method.md, 4 to 6).
    loss, power: the inhibition loss, and q of the projected one. target_share: the share of (token, neuron) pairs to
    select, between 0 and 1.

    A regulariser has either a `strength`, relative to the gradient of the LM loss, or a `coefficient`, the weight of
    the inhibition loss itself; with neither, its strength is DEFAULT_STRENGTH. A deactivation has no strength and
    ignores a coefficient.

    start, warmup, decay, end: when inhibition begins, over how many steps it rises and falls, and from when nothing is
    inhibited (default: the end of the run). An int is a number of optimizer steps, a float between 0 and 1 a share of
    the run (`in_steps`).

    statistics_window: optimizer steps after which a sample weighs 1/e of what it did; None: samples never fade. reduce:
    whether statistics are summed over ranks once a step, or in every forward before selection (docs/method.md, 8).
    fused: whether to use one compiled pass (`fused.py`) where there is one; None: if that is faster.

    Raises ValueError for a value that is not allowed.
    """

    retrieval: Literal["threshold", "top-k"] = "threshold"
    mechanism: Literal["regulariser", "reverse-deactivation", "naive-deactivation"] = "regulariser"
    loss: LossName = "projected"
    power: Power = 1
    target_share: float = 0.02
    strength: float | None = None
    coefficient: float | None = None
    start: float = 0
    warmup: float = 0
    decay: float = 0
    end: float | None = None
    statistics_window: int | None = 50
    reduce: Literal["step", "forward"] = "step"
    fused: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._check(name, choices.__contains__, " or ".join(map(str, choices)))
        self._check("target_share", lambda share: 0 < share < 1, "between 0 and 1")
        for name in ("strength", "coefficient"):
            self._check(name, lambda value: value is None or 0 <= value < math.inf, "0 or more")
        if self.strength is not None and self.coefficient is not None:
            raise ValueError(
                f"Settings.strength: got {self.strength} with coefficient {self.coefficient}, allowed: one of the two"
            )
        if self.strength is not None and self.mechanism != "regulariser":
            raise ValueError(
                f"Settings.strength: got {self.strength} with mechanism {self.mechanism}, which has none, allowed: None"
            )
        for name in ("start", "warmup", "decay"):
            self._check(name, _is_duration, "whole steps, or a share between 0 and 1")
        self._check("end", _is_end, "1 step or more, a share between 0 and 1, or None")
        window = "1 step or more, or None: all steps"
        self._check("statistics_window", lambda steps: steps is None or steps >= 1, window)
        self._check("fused", lambda value: value is None or isinstance(value, bool), "True, False or None")
        way = self.retrieval, self.mechanism, self.reduce
        if self.fused and way != ("threshold", "regulariser", "step"):
            raise ValueError(
                f"Settings.fused: got True with {', '.join(way)}, allowed: with threshold, regulariser, step only"
            )

    def _check(self, name: str, holds: Callable[[Any], bool], allowed: str) -> None:
        require(f"Settings.{name}", getattr(self, name), holds, allowed)

    @property
    def regulariser(self) -> Regulariser:
        """The inhibition loss."""
        return Regulariser(self.loss, self.power)

    @property
    def relative_strength(self) -> float | None:
        """The `strength` or its default; None for a deactivation, or if `coefficient` is given."""
        if self.mechanism != "regulariser" or self.coefficient is not None:
            return None
        return DEFAULT_STRENGTH if self.strength is None else self.strength

    @property
    def is_regularising(self) -> bool:
        """Whether an inhibition loss is added at any time."""
        return self.mechanism == "regulariser" and (self.relative_strength or self.coefficient or 0.0) > 0

    @property
    def has_effect(self) -> bool:
        """Whether activations or gradients are changed at any time."""
        return self.mechanism != "regulariser" or self.is_regularising

    def in_steps(self, run_steps: int | None) -> Settings:
        """Return the same settings with the schedule in steps.

        run_steps: optimizer steps of the run, or None if its length is not known. Raises ValueError for a schedule that
        does not fit into the run, or that needs its length where it is not known.
        """
        is_length = run_steps is None or (isinstance(run_steps, Integral) and run_steps > 0)
        require("Inhibitor: run_steps", run_steps, lambda _: is_length, "1 step or more, or None")

        def steps(name: str) -> int:
            value = getattr(self, name)
            if isinstance(value, int):
                return value
            if run_steps is None:
                raise ValueError(
                    f"Settings.{name}: got {value}, a share of the run, whose length is not known; give whole steps, or"
                    " Inhibitor(..., run_steps=...)"
                )
            return steps_of_duration(value, run_steps)

        start, warmup, decay = steps("start"), steps("warmup"), steps("decay")
        end = run_steps if self.end is None else steps("end")
        if decay and end is None:
            raise ValueError(
                f"Settings.decay: got {self.decay}, but where the run ends is not known; give Settings.end, or"
                " Inhibitor(..., run_steps=...)"
            )
        if run_steps is not None and self.end is not None and end is not None and not 0 < end <= run_steps:
            raise ValueError(f"Settings.end: got {self.end}, which is step {end} of the run's {run_steps}")
        if end is not None and (start == end or start + warmup + decay > end):
            raise ValueError(
                f"Settings.start, warmup and decay: got {start} + {warmup} + {decay} steps, allowed: a start before"
                f" {end} and a sum up to {end}, where {'the run' if self.end is None else 'inhibition'} ends"
            )
        return replace(
            self, start=start, warmup=warmup, decay=decay, end=end if decay or self.end is not None else None
        )

    def schedule(self, step: int) -> float:
        """Return the share of the full strength, from 0 to 1, in the optimizer step that follows `step` others.

        The settings must be in steps already (`in_steps`).
        """
        rise = (step - self.start + 1) / self.warmup if self.warmup else 1.0
        fall = 1.0 if self.end is None else (self.end - step) / (self.decay or 1)
        return 0.0 if step < self.start else max(0.0, min(1.0, rise, fall))


_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Settings).items() if get_origin(kind) is Literal}


def steps_of_duration(value: float, run_steps: int) -> int:
    """Return a number of steps: an int as it is, a float as a share of the run, rounded down.

    Shares that add up to 1 therefore fit into the run.
    """
    return value if isinstance(value, int) else int(value * run_steps + 1e-6)


def _is_duration(value: Any) -> bool:
    """Return whether the value is a number of steps or a share of the run."""
    return not isinstance(value, bool) and (value >= 0 if isinstance(value, int) else 0 <= value < 1)


def _is_end(value: Any) -> bool:
    return value is None or (_is_duration(value) and value > 0)


def require(where: str, given: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Raise ValueError, with one line of where, given and allowed, unless `holds(given)`."""
    try:
        fine = holds(given)
    except TypeError:  # something that is not a number was compared with one
        fine = False
    if not fine:
        raise ValueError(f"{where}: got {given!r}, allowed: {allowed}")


@dataclass(frozen=True)
class NeuronSite:
    """Says where the neurons of one layer are, whose activations are [B, T, N].

    layer: the layer's number, by which its metrics and state are named. module, attribute: `module.attribute` is the
    child module that returns the activations (kind `activation`) or receives them as its first argument (kind
    `projection`). neurons: N. function: `gelu` if an activation computes the exact GELU, in whose own pass inhibition
    may then be computed (docs/speed.md).

    Raises ValueError for another kind.
    """

    layer: int
    module: nn.Module
    attribute: str
    kind: Literal["activation", "projection"]
    neurons: int
    function: Literal["gelu"] | None = None

    def __post_init__(self) -> None:
        kinds = get_args(get_type_hints(NeuronSite)["kind"])
        require("NeuronSite.kind", self.kind, kinds.__contains__, " or ".join(kinds))
