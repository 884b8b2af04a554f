"""Judge after each held-out evaluation whether inhibition does harm to its layers (`inhibition.guard`).

Inhibition should make neurons less monosemantic and leave the scale of their layer alone. A layer's mean S and MS are
taken relative to their values when inhibition began, and compared with those of the comparison layers, which are not
inhibited: both also change by themselves while a network learns. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l2e_ds.config.sections import InhibitionConfig
from l2e_ds.run_directory.metrics import comparison_key, first_and_last, layer_key, layers_of

SHRUNK, GROWN = 0.5, 2.0
"""A layer has shrunk or grown if its mean S is beyond this factor both of its value when inhibition began and of what
it would be if it had changed as in the comparison layers."""
MARGIN = 1.1
"""The factor by which a layer's MS must rise more than that of the comparison layers; layers of a plain run differ."""
LONG = 3
"""The number of evaluations in a row at which MS must be too high. Without comparison layers it holds for mean S, too:
a plain run of 14m shrank its last layers to 40 % by step 20."""
_USED = ("mean_s", "top_share_score")


@dataclass(frozen=True)
class Finding:
    """Holds something that was found in a layer for the first time.

    name: shrank, grew or rose. seen: what was found, in words. ratio: of mean S, or for `rose` of the MS of the top
    share, to its value at `reference_step`, when inhibition began. comparison: the same of the comparison layers; None
    if there are none.
    """

    layer: int
    name: str
    seen: str
    ratio: float
    comparison: float | None
    reference_step: int

    def values(self) -> dict[str, Any]:
        """Return the values of the line `kind: guard` of metrics.jsonl, except `advice`."""
        compared = {} if self.comparison is None else {"comparison": self.comparison}
        ratio = {layer_key(self.layer, self.name): self.ratio}
        return {**ratio, **compared, "reference_step": self.reference_step, "text": self.seen}


def judge_evaluation(
    memory: Mapping[str, Any],
    step: int,
    values: Mapping[str, float],
    inhibited: Sequence[int],
    comparison: Sequence[int],
    has_begun: bool,
) -> tuple[dict[str, Any], list[Finding]]:
    """Return what to remember after an evaluation, and what was found for the first time.

    memory: what was returned to remember after the evaluation before it, or nothing; it can be written as JSON. values:
    those of the line `kind: evaluation`. inhibited, comparison: numbers of the layers. has_begun: whether any step
    before this evaluation was inhibited. The reference is the newest evaluation for which none was, or if there is no
    such evaluation in memory, the first one.
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
        part: {name: _ratio(found[name], reference[part][name]) for name in _USED} for part, found in now.items()
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
            # MS rises while a network learns, so that without a comparison it says nothing; nor does one that was 0.
            "rose": bool(comparison)
            and reference[layer]["top_share_score"] > 0
            and ratios["top_share_score"] > MARGIN * common["top_share_score"],
        }
        for name in holds:
            place = f"{layer}/{name}"
            in_a_row[place] = memory["in_a_row"].get(place, 0) + 1 if holds[name] else 0
            needed = 1 if comparison and name != "rose" else LONG
            if in_a_row[place] < needed or place in memory["found"]:
                continue
            key = "top_share_score" if name == "rose" else "mean_s"
            seen = describe_change(name, int(layer), memory["step"], reference[layer][key], step, now[layer][key])
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


def describe_change(name: str, layer: int, first_step: int, first: float, step: int, last: float) -> str:
    """Return a change in words, for the progress line, the report and the summary. name: as in `Finding`.

    first, last: mean S, or for `rose` the MS of the top share, at first_step and at step.
    """
    what = _WORDS[name].format(ratio=f"{last / first:.0%}")
    return f"layer {layer} {what} at step {first_step:,} ({first:.3g} to {last:.3g} at step {step:,})"


def findings_of_run(
    starts: Sequence[Mapping[str, Any]], evaluations: Sequence[dict], findings: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Return what was found in a run: name, what was seen, and advice, for each finding.

    starts, evaluations, findings: the run's lines of the kinds start, evaluation and guard. If its newest start has no
    guard, layers that have shrunk since the first evaluation are added, without advice.
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
            found.append(("shrank", describe_change("shrank", layer, steps[0], first, steps[1], last), ""))
    return found


def advice(section: InhibitionConfig) -> str:
    """Return what to do about a finding."""
    if section.retrieval_and_mechanism[1] != "regulariser":
        weaker, other = "lower inhibition.target_share", ""
    else:
        name = "strength" if section.coefficient is None else "coefficient"
        weaker = f"lower inhibition.{name} ({getattr(section, name):g})"
        other = "" if section.loss == "projected" else " or take inhibition.loss: projected"
    return f"{weaker}{',' if other else ' or'} begin later (inhibition.start){other}; docs/looking-inside.md"


def _named(layers: Sequence[int]) -> str:
    *first, last = map(str, layers)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def _ratio(number: float, of: float) -> float:
    """Return number / of, or 1 if `of` is 0, as for a dead layer, of which nothing can be said."""
    return number / of if of > 0 else 1.0
