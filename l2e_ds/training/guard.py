"""The guard: whether inhibition does to its layers what it must not, judged after each held-out evaluation.

It should make neurons less monosemantic and leave the scale of their layer alone. A layer's figures are taken relative
to what they were when inhibition began, and beside those of the comparison layers, which are not inhibited: scale and
MS also move by themselves while a network learns. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l2e_ds.config.sections import InhibitionConfig
from l2e_ds.run_directory.metrics import comparison_key, first_and_last, layer_key, layers_of

SHRUNK, GROWN = 0.5, 2.0
"""Of a layer's mean S when inhibition began, and of what it would be if it had moved as the comparison layers' did."""
MARGIN = 1.1
"""By which a layer's MS rises more than that of the comparison layers. Layers of a plain run differ, too."""
LONG = 3
"""Evaluations in a row for which MS must be too high; without comparison layers mean S must be off as long, too: a
plain run of 14m was seen to shrink its last layers to 40 % by step 20."""
_USED = ("mean_s", "top_share_score")


@dataclass(frozen=True)
class Finding:
    """Something seen in a layer for the first time. name: shrank, grew or rose.

    ratio: of the figure to what it was when inhibition began, at `reference_step`; comparison: the same of the
    comparison layers; None where there are none.
    """

    layer: int
    name: str
    seen: str
    ratio: float
    comparison: float | None
    reference_step: int

    def values(self) -> dict[str, Any]:
        """Return the line `kind: guard` of metrics.jsonl, but for `advice`."""
        compared = {} if self.comparison is None else {"comparison": self.comparison}
        ratio = {layer_key(self.layer, self.name): self.ratio}
        return {**ratio, **compared, "reference_step": self.reference_step, "text": self.seen}


def comparison_layers(inhibited: Sequence[int], layers: int) -> list[int]:
    """Of `layers` in all: as many that are not inhibited as are, the nearest to them; fewer where there are not so
    many."""
    others = sorted(set(range(layers)) - set(inhibited), key=lambda i: min(abs(i - one) for one in inhibited))
    return sorted(others[: len(inhibited)])


def judged(
    memory: Mapping[str, Any],
    step: int,
    values: Mapping[str, float],
    inhibited: Sequence[int],
    comparison: Sequence[int],
    has_begun: bool,
) -> tuple[dict[str, Any], list[Finding]]:
    """Return what to remember after an evaluation, and what was found for the first time.

    memory: what was remembered after the one before it, or nothing; JSON. values: of the line `kind: evaluation`.
    has_begun: whether a step before this evaluation was inhibited. The reference is the newest evaluation at which it
    was not, or else, where that is not known, the first one.
    """
    now = {str(layer): {name: values[layer_key(layer, name)] for name in _USED} for layer in inhibited}
    if comparison:
        now["comparison"] = {
            name: sum(values[comparison_key(layer, name)] for layer in comparison) / len(comparison) for name in _USED
        }
    reference = memory.get("reference", {})
    if not has_begun or reference.keys() != now.keys():
        return {"step": step, "reference": now, "in_a_row": {}, "found": {}}, []
    ratios_of = {
        part: {name: _ratio(figures[name], reference[part][name]) for name in _USED} for part, figures in now.items()
    }
    common = ratios_of.get("comparison", {})
    in_a_row: dict[str, int] = {}
    findings = []
    for layer in map(str, inhibited):
        ratios = ratios_of[layer]
        scale, usual_scale = ratios["mean_s"], common.get("mean_s", 1.0)
        holds = {
            "shrank": scale < SHRUNK * min(1.0, usual_scale),
            "grew": scale > GROWN * max(1.0, usual_scale),
            # MS rises while a network learns: alone it says nothing
            "rose": bool(comparison) and ratios["top_share_score"] > MARGIN * common["top_share_score"],
        }
        for name in holds:
            place = f"{layer}/{name}"
            in_a_row[place] = memory["in_a_row"].get(place, 0) + 1 if holds[name] else 0
            needed = 1 if comparison and name != "rose" else LONG
            if in_a_row[place] < needed or place in memory["found"]:
                continue
            key = "top_share_score" if name == "rose" else "mean_s"
            seen = change(name, int(layer), memory["step"], reference[layer][key], step, now[layer][key])
            seen += f", {_named(comparison)} without inhibition to {common[key]:.0%}" if comparison else ""
            seen += f", {LONG} evaluations in a row" if needed > 1 else ""
            seen += "" if comparison else "; there is no layer without inhibition to compare with"
            findings.append(Finding(int(layer), name, seen, ratios[key], common.get(key), memory["step"]))
    found = {f"{finding.layer}/{finding.name}": finding.seen for finding in findings}
    return {**memory, "in_a_row": in_a_row, "found": {**memory["found"], **found}}, findings


_WORDS = {
    "shrank": "shrank to {ratio} of its mean S",
    "grew": "grew to {ratio} of its mean S",
    "rose": "is more monosemantic than without inhibition: the MS of its top share went to {ratio} of that",
}


def change(name: str, layer: int, first_step: int, first: float, step: int, last: float) -> str:
    """In words, for the progress line, the report and the summary alike. name: as in Finding."""
    what = _WORDS[name].format(ratio=f"{last / first:.0%}")
    return f"layer {layer} {what} at step {first_step:,} ({first:.3g} to {last:.3g} at step {step:,})"


def seen_in(
    starts: Sequence[Mapping[str, Any]], evaluations: Sequence[dict], findings: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Of a run by its lines of these kinds (`kind: guard` are its findings): name, what was seen, advice.

    Of a run that goes on without a guard also those of its layers that shrank from its first evaluation on.
    """
    found = [
        (name, line["text"], line["advice"])
        for line in findings
        for name in _WORDS
        if any(key.endswith(f"/{name}") for key in line)
    ]
    if not evaluations or (starts and "guard" in starts[-1]):
        return found
    steps = [line["step"] for line in (evaluations[0], evaluations[-1])]
    for layer in layers_of(evaluations[-1:]):
        first, last = first_and_last(evaluations, layer_key(layer, "mean_s"))
        said = any(layer_key(layer, "shrank") in line for line in findings)
        if first and last is not None and last / first < SHRUNK and not said:
            found.append(("shrank", change("shrank", layer, steps[0], first, steps[1], last), ""))
    return found


def advice(section: InhibitionConfig) -> str:
    """Return what to do about a finding."""
    if section.parts[1] != "regulariser":
        weaker, other = "lower inhibition.target_share", ""
    else:
        name = "strength" if section.coefficient is None else "coefficient"
        weaker = f"lower inhibition.{name} ({getattr(section, name):g})"
        other = "" if section.loss == "projected" else " or take inhibition.loss: projected"
    return f"{weaker}{',' if other else ' or'} begin later (inhibition.start){other}; docs/faq.md"


def _named(layers: Sequence[int]) -> str:
    *first, last = map(str, layers)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def _ratio(number: float, of: float) -> float:
    """1 where there was nothing: a dead layer says nothing."""
    return number / of if of > 0 else 1.0
