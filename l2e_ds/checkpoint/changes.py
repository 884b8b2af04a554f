"""Compare a run file with that of a checkpoint, and decide which differences would make it another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2e_ds.config.reading import checked, with_absolute_paths
from l2e_ds.config.sections import DECIDES_NO_RESULT, RunConfig, flat
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import CheckpointError

# A resumed run may also become longer, where its schedule stays, and compute the same in another way.
MAY_CHANGE = (
    *DECIDES_NO_RESULT,
    *("training.steps", "optimizer.schedule_steps"),
    *("model.activation_checkpointing", "model.attention", "model.compile", "inhibition.fused"),
    "training.deterministic",
)
SCHEDULE = ("schedule", "warmup", "decay", "schedule_steps", "final_ratio")
"""Keys of `optimizer` that may change where the steps before the checkpoint keep their learning rates."""
MAY_BE_GONE = ("data.path", "data.tokenizer", "model.config", "model.pretrained")


def saved_config(saved: dict[str, dict[str, Any]], where: Path) -> RunConfig:
    """Return the run file in a checkpoint's state.json, without keys that this version lacks. Raises ConfigError."""
    sections: dict[str, Any] = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    known = {
        name: {key: value for key, value in saved[name].items() if key in section.model_fields}
        for name, section in sections.items()
        if name in saved
    }
    return checked(RunConfig, known, str(where))


class Changes:
    """Holds the changes from a checkpoint's run file to that of the run which resumes after `applied` steps."""

    def __init__(self, old: RunConfig, new: RunConfig, applied: int) -> None:
        self.old, self.new, self.applied = with_absolute_paths(old), with_absolute_paths(new), applied
        before, now = flat(self.old), flat(self.new)
        changed = [key for key in now if before[key] != now[key] and key != "training.allow_changes"]
        self._texts = {key: f"{key}: {_difference(before[key], now[key])}" for key in changed}
        steps, new_steps = _inhibition_steps(self.old), _inhibition_steps(self.new)
        self._has_other_steps = steps != new_steps
        # The schedule of inhibition is compared in steps. `_same`: keys that mean the same step in both run files,
        # however they are written. `_shifted`: keys that are written alike but mean another step now, with both steps.
        self._same = {f"inhibition.{key}" for key, step in steps.items() if step == new_steps.get(key)}
        shifted = [key for key in steps if f"inhibition.{key}" not in self._same | self._texts.keys()]
        self._shifted = {f"inhibition.{key}": (steps[key], new_steps.get(key)) for key in shifted}

    def lines(self) -> list[str]:
        """Return each changed key as `section.key: old -> new`, what shifts with the run's length, and other rates."""
        section, key = self.new.inhibition, "training.micro_batch"
        texts = dict(self._texts)
        is_projected = section.loss == "projected" and section.retrieval_and_mechanism[1] == "regulariser"
        if key in texts and section.method != "none" and (is_projected or section.reduce == "forward"):
            texts[key] += " (results change a little with ranks x micro-batch: docs/method.md, 5.2 and 8)"
        shifted = [f"{key}: {old} -> {new} steps" for key, (old, new) in self._shifted.items()]
        return [*texts.values(), *shifted, *self._rates()]

    def refused(self) -> list[str]:
        """Return the changes of keys that decide the results and are not in `training.allow_changes`, with advice."""
        may_change = self._same | {key for key in self._texts if key in MAY_BE_GONE and self._is_gone(key)}
        found = {
            key: text for key, text in self._texts.items() if not key.startswith(MAY_CHANGE) and key not in may_change
        }
        length = schedule_of(self.old).steps
        if self._has_other_past():
            if schedule_of(self.new).steps != length:
                key = "optimizer.schedule_steps" if "optimizer.schedule_steps" in self._texts else "training.steps"
                note = "; ".join([*self._rates(), f"optimizer.schedule_steps={length} keeps the schedule"])
                found[key] = f"{self._texts[key]} ({note})"
        else:
            for key in SCHEDULE:
                found.pop(f"optimizer.{key}", None)
        if self._shifted and "training.steps" in self._texts:
            kept = " ".join(f"{key}={old}" for key, (old, _) in self._shifted.items())
            note = f"inhibition's schedule moves with it; {kept} keeps it"
            found["training.steps"] = f"{found.get('training.steps', self._texts['training.steps'])} ({note})"
        return [text for key, text in found.items() if key not in self.new.training.allow_changes]

    def refuse(self, checkpoint: Path) -> None:
        """Raise CheckpointError if a change is refused."""
        refused = self.refused()
        if refused:
            more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
            raise CheckpointError(
                f"{checkpoint}: was trained with other values: {', '.join(refused[:3])}{more}; give those again, give"
                " another training.run_directory, or name the keys in training.allow_changes"
            )

    def other_inhibition(self) -> bool:
        """Return whether inhibition differs in more than how its schedule is written."""
        changed = self._texts.keys() - self._same
        return self._has_other_steps or any(
            key.startswith("inhibition.") and not key.startswith(MAY_CHANGE) for key in changed
        )

    def _is_gone(self, key: str) -> bool:
        """Return whether nothing is left where the checkpoint's run read this; the data's fingerprint is checked."""
        old = flat(self.old)[key]
        paths = [old] if isinstance(old, str) else old or []
        return bool(paths) and all(Path(path).is_absolute() and not Path(path).exists() for path in paths)

    def _has_other_past(self) -> bool:
        """Return whether the new schedule would have given a step before the checkpoint another learning rate."""
        old, new = schedule_of(self.old), schedule_of(self.new)
        return old != new and any(old.rate(step) != new.rate(step) for step in range(self.applied))

    def _rates(self) -> list[str]:
        old, new = (schedule_of(config).rate(self.applied) for config in (self.old, self.new))
        return [f"learning rate of the next step: {old:.4g} -> {new:.4g}"] if old != new else []


def _inhibition_steps(config: RunConfig) -> dict[str, int | None]:
    """Return the keys of inhibition's schedule in steps; `end` is there if a decay leads to it."""
    section, steps = config.inhibition, config.training.steps
    if section.method == "none":
        return {}
    found = {key: section.steps_of(key, steps) for key in ("start", "warmup", "decay", "end")}
    return found | ({"end": steps} if found["decay"] and found["end"] is None else {})


def _difference(old: Any, new: Any) -> str:
    """Return the old and the new value; of `data.sets` of equal length only what differs, with `position.key`."""
    are_lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and bool(new)
    if not are_lists or not isinstance(new[0], dict):
        return " -> ".join(value if isinstance(value, str) else json.dumps(value) for value in (old, new))
    pairs = enumerate(zip(old, new, strict=True))
    found = [(f"{i}.{key}", before[key], now[key]) for i, (before, now) in pairs for key in now]
    return ", ".join(f"{key}: {_difference(before, now)}" for key, before, now in found if before != now)
