"""How a run file may differ from the checkpoint that a run resumes from."""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from l2e_ds.checkpoint.changes import Changes, saved_config
from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig, SetConfig
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import CheckpointError, ConfigError

RUN = {
    "model": {"name": "pythia-14m"},
    "data": {"source": "text", "path": "corpus", "tokenizer": "words.json"},
    "optimizer": {"peak_learning_rate": 1e-3},
    "training": {"steps": 20},
    "inhibition": {"loss": "published", "coefficient": 1e-3},
}
STEP = 20
CHECKPOINT = Path("run/checkpoints/step00000020")
FREE = {
    *("model.attention", "model.activation_checkpointing", "model.compile", "data.cache", "data.workers"),
    *("training.run_directory", "training.micro_batch", "training.resume", "training.allow_changes"),
    *("training.evaluate_every", "training.max_skipped_steps", "training.time_limit", "training.timeout"),
    *("training.deterministic", "optimizer.decay"),  # the schedule here does not read a decay
    *("inhibition.fused", "inhibition.guard"),
}


@pytest.fixture(autouse=True)
def corpus(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()


def config(**keys: object) -> RunConfig:
    """Return RUN with other values, by `section__key`."""
    raw = {section: dict(values) for section, values in RUN.items()}
    for name, value in keys.items():
        section, _, key = name.partition("__")
        raw[section] = {**raw.get(section, {}), key: value} if key else value
    return checked(RunConfig, raw, "test")


def refusal(new: RunConfig, old: RunConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        Changes(old or config(), new, STEP).refuse(CHECKPOINT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(annotation: object) -> list[object]:
    """Return some values that a key of this type may have."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return [values(get_args(annotation)[0])[:2]]
    if annotation is SetConfig:
        return [SetConfig(name="a", weight=1, source="stdlib")]
    known = {int: [7, 11], float: [0.25, 0.5], str: ["this", "that"], bool: [False, True], type(None): []}
    return known[annotation] if annotation in known else [v for part in get_args(annotation)[:2] for v in values(part)]


def keys() -> list[str]:
    return [
        f"{section}.{key}" for section, field in RunConfig.model_fields.items() for key in field.annotation.model_fields
    ]


@pytest.mark.parametrize("key", keys())
def test_a_key_decides_figures_or_may_change(key):
    """The test covers every key, so that a new key must be classified."""
    section, name = key.split(".")
    part = getattr(config(), section)
    value = next(v for v in values(type(part).model_fields[name].annotation) if v != getattr(part, name))
    new = config().replace(section, **{name: value})
    if section in ("deepspeed", "checkpoint", "logging", "evaluation") or key in FREE:
        Changes(config(), new, STEP).refuse(CHECKPOINT)
    else:
        assert refusal(new).startswith(f"{CHECKPOINT}: was trained with other values: {key}: ")
        Changes(config(), new.replace("training", allow_changes=[key]), STEP).refuse(CHECKPOINT)


def test_both_values_are_named_and_what_is_allowed_is_not_refused():
    new = config(inhibition__coefficient=0.5, optimizer__peak_learning_rate=0.01, checkpoint__every=3)
    assert refusal(new) == (
        f"{CHECKPOINT}: was trained with other values: optimizer.peak_learning_rate: 0.001 -> 0.01,"
        " inhibition.coefficient: 0.001 -> 0.5; give those again, give another training.run_directory, or name the keys"
        " in training.allow_changes"
    )
    new = new.replace("training", allow_changes=["inhibition.coefficient"])
    said = refusal(new)
    assert "optimizer.peak_learning_rate: 0.001 -> 0.01;" in said and "inhibition.coefficient: " not in said
    new = new.replace("training", allow_changes=["inhibition.coefficient", "optimizer.peak_learning_rate"])
    Changes(config(), new, STEP).refuse(CHECKPOINT)
    assert Changes(config(), new, STEP).lines() == [
        "optimizer.peak_learning_rate: 0.001 -> 0.01",
        "inhibition.coefficient: 0.001 -> 0.5",
        "checkpoint.every: 1000 -> 3",
        "learning rate of the next step: 0.0001 -> 0.001",
    ]


def test_of_sets_only_what_differs_is_named():
    sets = [{"name": name, "weight": 1, "source": "jsonl", "path": f"{name}.jsonl"} for name in ("a", "b")]

    def mixture(*weights: float) -> RunConfig:
        data = {
            "tokenizer": "words.json",
            "sets": [part | {"weight": w} for part, w in zip(sets, weights, strict=True)],
        }
        return checked(RunConfig, RUN | {"data": data}, "test")

    assert ": data.sets: 1.weight: 2.0 -> 3.0; give" in refusal(mixture(1, 3), mixture(1, 2))
    allowed = mixture(1, 3).replace("training", allow_changes=["data.sets"])
    Changes(mixture(1, 2), allowed, STEP).refuse(CHECKPOINT)


def test_a_longer_run_keeps_its_schedule_or_says_both_rates():
    longer = config(training__steps=40)
    old, new = (schedule_of(run).rate(STEP) for run in (config(), longer))
    assert new > 5 * old
    said = f"training.steps: 20 -> 40 (learning rate of the next step: {old:.4g} -> {new:.4g}; optimizer.schedule_steps"
    assert said + "=20 keeps the schedule)" in refusal(longer)
    allowed = longer.replace("training", allow_changes=["training.steps"])
    Changes(config(), allowed, STEP).refuse(CHECKPOINT)
    assert Changes(config(), allowed, STEP).lines()[-1] == f"learning rate of the next step: {old:.4g} -> {new:.4g}"
    # the same schedule, given or not
    kept = config(training__steps=40, optimizer__schedule_steps=20)
    explicit = config(optimizer__schedule_steps=20)
    for before, now in ((config(), kept), (explicit, kept), (kept, explicit), (kept, config())):
        Changes(before, now, STEP).refuse(CHECKPOINT)
    assert "optimizer.schedule_steps: 20 -> 30 (" in refusal(config(optimizer__schedule_steps=30), explicit)
    assert "training.steps: 20 -> 10 (" in refusal(config(training__steps=10))


def test_a_schedule_may_change_where_it_keeps_the_past():
    """From any checkpoint of the stable part a run may decay, or get longer; the rates of what is done must stay."""
    stable = {"optimizer__schedule": "warmup-stable-decay", "optimizer__warmup": 2, "optimizer__decay": 5}
    stable["training__steps"] = 5 * STEP
    old = config(**stable)
    for now in (
        config(**stable | {"optimizer__decay": 12, "training__steps": STEP + 12}),  # decays at once
        config(**stable | {"training__steps": 1000}),
        config(**stable | {"optimizer__schedule": "constant"}),
        config(**stable | {"optimizer__final_ratio": 0.0}),
    ):
        Changes(old, now, STEP).refuse(CHECKPOINT)
    for now, key in (
        (config(**stable | {"optimizer__warmup": 3}), "optimizer.warmup: 2 -> 3"),
        (config(**stable | {"optimizer__decay": 85}), "optimizer.decay: 5 -> 85"),  # it would have begun
        (config(**stable | {"optimizer__schedule": "cosine"}), "optimizer.schedule: warmup-stable-decay -> cosine"),
    ):
        assert key in refusal(now, old)


def test_a_longer_run_must_not_move_its_inhibition_unsaid():
    """A schedule in shares of the run, and a decay before its end, move with the run's length."""
    schedule = {"inhibition__start": 0.3, "inhibition__decay": 2, "optimizer__schedule_steps": 20}
    old, new = config(**schedule), config(training__steps=40, **schedule)
    assert (
        "training.steps: 20 -> 40 (inhibition's schedule moves with it; inhibition.start=6 inhibition.end=20"
        " keeps it);" in refusal(new, old)
    )
    Changes(old, new.replace("training", allow_changes=["training.steps"]), STEP).refuse(CHECKPOINT)
    kept = {"inhibition__start": 6, "inhibition__decay": 2, "inhibition__end": 20, "optimizer__schedule_steps": 20}
    Changes(old, config(training__steps=40, **kept), STEP).refuse(CHECKPOINT)
    in_steps = {"inhibition__start": 6, "optimizer__schedule_steps": 20}
    Changes(config(**in_steps), config(training__steps=40, **in_steps), STEP).refuse(CHECKPOINT)


def test_inhibition_that_moves_with_the_run_s_length_is_said():
    """Another run that begins at this checkpoint is not refused, but what its shares mean has changed."""
    shares = {"inhibition__start": 0.3, "inhibition__warmup": 0.2, "training__steps": 100}
    lines = Changes(config(**shares), config(**shares | {"training__steps": 40}), STEP).lines()
    assert lines[1:3] == ["inhibition.start: 30 -> 12 steps", "inhibition.warmup: 20 -> 8 steps"]
    in_steps = {"inhibition__start": 30, "inhibition__warmup": 5}
    old, new = config(**in_steps, training__steps=100), config(**in_steps, training__steps=40)
    assert not any(line.startswith("inhibition") for line in Changes(old, new, STEP).lines())


def test_text_that_was_moved_is_looked_at_again(tmp_path):
    """Data may have moved if nothing is left at the old place: its fingerprint shows whether it is the same."""
    old, new = config(), config(data__path="moved")
    assert "data.path: " in refusal(new, old)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    Changes(old, new, STEP).refuse(CHECKPOINT)
    assert Changes(old, new, STEP).lines() == [f"data.path: {tmp_path}/corpus -> {tmp_path}/moved"]
    assert "data.text_key: " in refusal(config(data__path="moved", data__text_key="body"), old)


def test_the_same_folder_by_another_name_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    Changes(config(data__path=str(tmp_path / "corpus")), config(), STEP).refuse(CHECKPOINT)
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = refusal(config(), config(data__path=str(tmp_path / "corpus")))
    assert f"data.path: {tmp_path}/corpus -> {tmp_path}/elsewhere/corpus" in said


def test_checkpoints_of_other_versions_are_read():
    """Keys that old configurations lack have their defaults; keys that no longer exist are ignored."""
    saved = config().model_dump(mode="json")
    del saved["training"]["allow_changes"], saved["evaluation"]
    saved["training"]["of_old"], saved["of_old"] = 1, {"key": 2}
    assert saved_config(saved, CHECKPOINT / "state.json") == config()
    saved["training"]["steps"] = "twenty"
    with pytest.raises(ConfigError, match=re.escape(f"{CHECKPOINT}/state.json: training.steps: got 'twenty'")):
        saved_config(saved, CHECKPOINT / "state.json")


def test_what_is_allowed_must_be_a_key():
    with pytest.raises(ConfigError, match=r"training\.allow_changes: got 'optimizer\.lr', allowed: keys of a run file"):
        config(training__allow_changes=["inhibition.coefficient", "optimizer.lr"])
