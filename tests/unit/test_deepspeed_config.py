"""DeepSpeed JSON and run file: completed by each other, or refused with both named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig

from l2e_ds.config.reading import checked
from l2e_ds.config.sections import RunConfig
from l2e_ds.engine.configuration import (
    ADAM_PARAMETERS,
    BLOCK_KEYS,
    FIXED_VALUES,
    REFUSED,
    TOP_LEVEL_KEYS,
    check_device,
    memory_remedies,
    resolve,
    update_rule,
    with_micro_batch,
    zero_stage,
)
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import REPOSITORY

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
ON_CPU = get_accelerator().device_name() == "cpu"


def run(path: Path | str, **sections):
    """A run configuration with the given DeepSpeed JSON; sections may change or add keys."""
    raw = {
        "model": {"name": "pythia-14m"},
        "data": {"source": "stdlib", "train_tokenizer": 512},
        "training": {"steps": 10, "precision": "fp32"},
        "deepspeed": {"config": str(path)},
    }
    for section, values in sections.items():
        raw.setdefault(section, {}).update(values)
    raw["training"] = {key: value for key, value in raw["training"].items() if value is not ...}
    return checked(RunConfig, raw, "here")


def write(tmp_path: Path, content: dict | str) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def message_of(config, ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config, ranks)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


class Recording(dict):
    """A dict that notes which keys it was asked for."""

    asked: ClassVar[set[str]] = set()

    def __init__(self, content=(), asked=None, **entries):
        super().__init__(content, **entries)
        if asked is not None:
            self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        recording = self

        class Keys(set):
            def __contains__(self, key):
                recording.asked.add(key)
                return super().__contains__(key)

        return Keys(super().keys())


def test_top_level_keys_are_those_of_the_installed_version():
    """What DeepSpeed asks its configuration for is what we let pass: it ignores all else without a word."""
    Recording.asked = set()
    DeepSpeedConfig(Recording(train_batch_size=2))
    asked = {key for key in Recording.asked if isinstance(key, str)}
    known = TOP_LEVEL_KEYS.keys()
    assert asked == known, f"not in our list: {sorted(asked - known)}; never asked for: {sorted(known - asked)}"


def test_keys_of_blocks_are_those_of_the_installed_version():
    """The same for the blocks of which DeepSpeed ignores unknown keys."""
    blocks = {name: Recording(asked=set()) for name in BLOCK_KEYS}
    blocks["optimizer"] = Recording({"type": "AdamW", "params": {}}, asked=set())
    DeepSpeedConfig(Recording({"train_batch_size": 2, **blocks}))
    for name, block in blocks.items():
        assert {key for key in block.asked if isinstance(key, str)} == BLOCK_KEYS[name].keys(), name


# --- the shipped files -------------------------------------------------------------------------------------------


def test_files_are_there():
    """The stages that the documentation promises."""
    assert {path.stem for path in FILES} >= {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_resolves(path, precision):
    """Each file of ds_configs/ makes a complete configuration in each precision; fp16 without ZeRO is refused."""
    config = run(path, training={"precision": precision, "global_batch": 16, "micro_batch": 2})
    if precision == "fp16" and "zero0" in path.stem:
        message = message_of(config, 4)
        assert "training.precision: got fp16" in message and path.name in message and "stage 0" in message
        return
    resolved, ds, batch = resolve(config, 4)
    assert "auto" not in json.dumps(ds)
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        16,
        2,
        2,
    )
    assert batch.accumulation == 2 and resolved.training.precision == precision
    assert ds["gradient_clipping"] == 1.0
    assert zero_stage(ds) == int(path.stem.removeprefix("zero")[0])
    enabled = [name for name in ("bf16", "fp16") if ds.get(name, {}).get("enabled")]
    assert enabled == ([] if precision == "fp32" else [precision])
    assert ds["checkpoint"]["tag_validation"] == "Fail"
    understood = DeepSpeedConfig(copy.deepcopy(ds) | {"train_batch_size": 4})
    assert understood.zero_config.stage == zero_stage(ds) and understood.gradient_clipping == 1.0


def test_auto_precision_is_resolved():
    """`auto` becomes what the device has; on a CPU fp32."""
    resolved, _, _ = resolve(run(REPOSITORY / "ds_configs/zero1.json", training={"precision": "auto"}), 1)
    assert resolved.training.precision == "fp32" if ON_CPU else resolved.training.precision in ("fp32", "bf16")


# --- one value, two places ---------------------------------------------------------------------------------------

SHARED = [
    # section, key, the run's value, where the JSON has it, its value
    ("training", "global_batch", 16, ("train_batch_size",), 32),
    ("training", "micro_batch", 2, ("train_micro_batch_size_per_gpu",), 4),
    ("optimizer", "gradient_clipping", 1.0, ("gradient_clipping",), 0.5),
    ("optimizer", "peak_learning_rate", 1e-3, ("optimizer", "params", "lr"), 1e-4),
    ("optimizer", "betas", [0.9, 0.95], ("optimizer", "params", "betas"), [0.9, 0.999]),
    ("optimizer", "eps", 1e-8, ("optimizer", "params", "eps"), 1e-6),
    ("optimizer", "weight_decay", 0.1, ("optimizer", "params", "weight_decay"), 0.01),
]


def nested(path: tuple[str, ...], value) -> dict:
    for key in reversed(path):
        value = {key: value}
    if isinstance(value.get("optimizer"), dict):
        value["optimizer"].setdefault("type", "AdamW")
    return value


@pytest.mark.parametrize(("section", "key", "own", "path", "other"), SHARED)
def test_conflicts_name_both(section, key, own, path, other, tmp_path):
    """Two different values for one thing: the run file's key and value, the JSON's key and value."""
    message = message_of(run(write(tmp_path, nested(path, other)), **{section: {key: own}}))
    for part in (f"{section}.{key}: got {own}", "ds.json", f"{'.'.join(path)}: {other}"):
        assert part in message, message


@pytest.mark.parametrize(("section", "key", "own", "path", "other"), SHARED)
def test_equal_values_are_no_conflict(section, key, own, path, other, tmp_path):
    """Saying the same twice is allowed."""
    resolved, ds, _ = resolve(run(write(tmp_path, nested(path, own)), **{section: {key: own}}), 1)
    assert getattr(getattr(resolved, section), key) == own
    for part in path:
        ds = ds[part]
    assert ds == own


@pytest.mark.parametrize(("section", "key", "own", "path", "other"), SHARED)
def test_values_of_the_json_alone_become_the_run_s(section, key, own, path, other, tmp_path):
    """What only the JSON says holds for the run, in its dump and for DeepSpeed alike."""
    resolved, ds, _ = resolve(run(write(tmp_path, nested(path, other))), 1)
    assert getattr(getattr(resolved, section), key) == other
    for part in path:
        ds = ds[part]
    assert ds == other


@pytest.mark.parametrize(("section", "key", "own", "path", "other"), SHARED)
def test_auto_is_filled(section, key, own, path, other, tmp_path):
    """`"auto"` in the JSON takes the run's value."""
    _, ds, _ = resolve(run(write(tmp_path, nested(path, "auto")), **{section: {key: own}}), 1)
    for part in path:
        ds = ds[part]
    assert ds == own


@pytest.mark.parametrize(
    ("path", "wrong"),
    [(("train_batch_size",), -4), (("gradient_clipping",), -1), (("optimizer", "params", "eps"), 0)],
)
def test_json_values_are_checked_like_the_run_s(path, wrong, tmp_path):
    """A value of the JSON out of range names the JSON's key."""
    message = message_of(run(write(tmp_path, nested(path, wrong))))
    assert "ds.json" in message and ".".join(path) in message and repr(wrong) in message


def test_accumulation(tmp_path):
    """The JSON's accumulation steps alone make the global batch; with a global batch they must agree."""
    path = write(tmp_path, {"gradient_accumulation_steps": 3})
    resolved, ds, batch = resolve(run(path, training={"micro_batch": 2}), 4)
    assert resolved.training.global_batch == batch.global_batch == ds["train_batch_size"] == 24
    message = message_of(run(path, training={"micro_batch": 2, "global_batch": 16}), 4)
    assert "training.global_batch: 16" in message and "gradient_accumulation_steps: 3" in message


def test_the_number_that_auto_finds_is_as_good_as_given(tmp_path):
    """Put in place later, it makes the very configuration, JSON and batches that the run file's own number makes."""
    path = write(tmp_path, {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"})
    config, ds, batch = resolve(run(path, training={"micro_batch": "auto", "global_batch": 24}), 2)
    assert (config.training.micro_batch, batch.micro_batch, batch.accumulation) == ("auto", 1, 12)
    given = resolve(run(path, training={"micro_batch": 4, "global_batch": 24}), 2)
    assert with_micro_batch(config, ds, 4, 2) == given
    assert ds["train_micro_batch_size_per_gpu"] == 1  # not changed in place


def test_a_number_of_the_json_leaves_auto_nothing_to_find(tmp_path):
    config, ds, batch = resolve(
        run(write(tmp_path, {"train_micro_batch_size_per_gpu": 4}), training={"micro_batch": "auto"}), 2
    )
    assert config.training.micro_batch == batch.micro_batch == ds["train_micro_batch_size_per_gpu"] == 4


def test_auto_beside_accumulation_steps_is_refused(tmp_path):
    path = write(tmp_path, {"gradient_accumulation_steps": 3})
    for training in ({}, {"global_batch": 24}):
        message = message_of(run(path, training={"micro_batch": "auto", **training}), 4)
        for part in ("training.micro_batch: got auto", "ds.json", "gradient_accumulation_steps: 3"):
            assert part in message, message


def test_impossible_batch_product(tmp_path):
    """A global batch that no number of accumulation steps gives is refused here too."""
    message = message_of(run(write(tmp_path, {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4})))
    assert "training.global_batch: 10" in message and "training.micro_batch 4" in message


@pytest.mark.parametrize(
    ("content", "precision"),
    [
        ({"bf16": {"enabled": True}}, "fp32"),
        ({"bf16": {"enabled": False}}, "bf16"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "bf16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "bf16"),
    ],
)
def test_precision_conflicts(content, precision, tmp_path):
    """Precision said twice, differently: both are named."""
    message = message_of(run(write(tmp_path, content), training={"precision": precision}))
    assert f"training.precision: got {precision}" in message and "ds.json" in message


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_precision_of_the_json_alone(name, tmp_path):
    """With `auto` in the run file the JSON decides."""
    path = write(tmp_path, {name: {"enabled": True}, "zero_optimization": {"stage": 1}})
    resolved, ds, _ = resolve(run(path, training={"precision": "auto"}), 1)
    assert resolved.training.precision == name and ds[name]["enabled"] is True


def test_both_precisions(tmp_path):
    """bf16 and fp16 at once is refused."""
    message = message_of(run(write(tmp_path, {"bf16": {"enabled": True}, "fp16": {"enabled": True}})))
    assert "bf16 and fp16 are both enabled" in message


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {"stage": 1}}, ["unknown key 'zero_optimisation'", "did you mean 'zero_optimization'?"]),
        ({"zzzzzz": 1}, ["unknown key 'zzzzzz'"]),
        ({"zero_optimization": {"stag": 1}}, ["stag"]),
        ({"zero_optimization": {"stage": 7}}, ["stage", "7"]),
        ({"bf16": {"enable": True}}, ["enable"]),
        ({"fp16": {"loss_scal": 0}}, ["loss_scal"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "remove it", "optimizer.schedule"]),
        ({"tensor_parallel": {}}, ["tensor_parallel", "not supported"]),
        ({"activation_checkpointing": {"number_checkpoints": 2}}, ["remove it; set model.activation_checkpointing"]),
        ({"pipeline": {"stages": 2}}, ["pipeline", "not supported"]),
        ({"elasticity": {"enabled": True}}, ["lasticity"]),
    ],
)
def test_refused_keys(content, parts, tmp_path):
    """Misspelt keys, top-level or nested, and sections that would change the loop: the file and the key."""
    message = message_of(run(write(tmp_path, content)))
    for part in ["ds.json", *parts]:
        assert part in message, message


# one value of each type; of numbers as JSON's, where 5e8 and 1.0 are whole ones
VALUES = {bool: True, int: 1, float: 0.5, str: "text", list: [1], dict: {}}
TAKEN = {kind: {kind} for kind in VALUES} | {float: {int, float}}
KEYS = {
    **{(key,): kind for key, kind in TOP_LEVEL_KEYS.items() if key not in REFUSED},
    **{(name, key): kind for name, keys in BLOCK_KEYS.items() for key, kind in keys.items()},
    **{("optimizer", "params", key): kind for key, kind in ADAM_PARAMETERS.items()},
    # of the blocks that DeepSpeed has models of, some of each type
    ("bf16", "enabled"): bool,
    ("fp16", "enabled"): bool,
    ("fp16", "loss_scale"): float,
    ("fp16", "hysteresis"): int,
    ("zero_optimization", "stage"): int,
    ("zero_optimization", "overlap_comm"): bool,
    ("zero_optimization", "stage3_prefetch_bucket_size"): int,
    ("zero_optimization", "prefetch_bucket_size"): int,
    ("zero_optimization", "offload_optimizer"): dict,
    ("zero_optimization", "offload_optimizer", "pin_memory"): bool,
    ("zero_optimization", "offload_optimizer", "ratio"): float,
    ("comms_logger", "enabled"): bool,
    ("compile", "deepcompile"): bool,
}


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_values_of_another_type_are_refused(path, tmp_path):
    """Numbers and booleans as text, numbers for booleans, ...: DeepSpeed takes some of them for something else."""
    wrong = [value for kind, value in VALUES.items() if kind not in TAKEN[KEYS[path]]]
    wrong += ["false", "1"] if KEYS[path] is not str else []
    for value in wrong:
        message = message_of(run(write(tmp_path, nested(path, value))))
        assert f"{path[-1]}: got {json.dumps(value)}, must be " in message, message


@pytest.mark.parametrize("value", [5e8, 500_000_000, "auto"])
def test_whole_numbers_in_any_notation(value, tmp_path):
    """5e8 is how DeepSpeed's own documentation writes bucket sizes."""
    resolve(run(write(tmp_path, {"zero_optimization": {"stage": 1, "reduce_bucket_size": value}})), 1)


WRONG = {
    ("gradient_allreduce_op",): "SUM",
    ("data_types", "buffer_dtype"): "bf16",
    ("zero_optimization", "offload_optimizer", "ratio"): 0.5,
}


@pytest.mark.parametrize("path", FIXED_VALUES, ids=".".join)
def test_values_that_break_a_promise_are_refused(path, tmp_path):
    """The one value that holds it passes, any other is refused with the reason."""
    allowed, why = FIXED_VALUES[path]
    wrong = WRONG.get(path, not allowed if isinstance(allowed, bool) else {})
    message = message_of(run(write(tmp_path, nested(path, wrong)), training={"precision": "fp32"}), 2)
    assert f"{'.'.join(path)}: got {json.dumps(wrong)}, " in message and why in message
    if allowed is not None:
        resolve(run(write(tmp_path, nested(path, allowed))), 2)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("content", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2}])
def test_scaling_before_the_reduction(content, stage, tmp_path):
    """Stages 2 and 3 fail on it, or (stage 3 without reduce_scatter, with a factor of the number of ranks) forget to
    scale back; stages 0 and 1 only round otherwise."""
    config = run(write(tmp_path, content | {"zero_optimization": {"stage": stage, "reduce_scatter": False}}))
    if stage < 2:
        resolve(config, 2)
    else:
        assert f"{next(iter(content))}: got " in message_of(config, 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"gradient_clipping": 1,\n "gradient_clipping": 2}', ["'gradient_clipping' is given twice"]),
        ('{"bf16": {"enabled": true, "enabled": false}}', ["'enabled' is given twice"]),
        ('{"bf16":\n {"enabled": true,}\n}', ["ds.json:2: "]),
        ("", ["ds.json:1: "]),
        ("[1, 2]", ["must hold a JSON object"]),
        ('"text"', ["must hold a JSON object"]),
    ],
)
def test_broken_json(text, parts, tmp_path):
    """Keys given twice, syntax errors (with the line) and files that hold no object."""
    path = write(tmp_path, text)
    message = message_of(run(path))
    for part in ["deepspeed.config: ", str(path), *parts]:
        assert part in message


def test_missing_json():
    """A file that is not there is named as it was given."""
    assert message_of(run("ds_configs/zero9.json")) == "deepspeed.config: no such file: ds_configs/zero9.json"


@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0}}, {"zero_optimization": {}}])
def test_fp16_without_zero(zero, tmp_path):
    """fp16 with ZeRO-0 divides by a loss scale that it never multiplied by: refused, from either side."""
    for content, precision in ((zero, "fp16"), (zero | {"fp16": {"enabled": True}}, "auto")):
        message = message_of(run(write(tmp_path, content), training={"precision": precision}))
        assert "training.precision: got fp16" in message and "stage 0" in message


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "auto"])
def test_bf16_accumulation(stage, kind, tmp_path):
    """Stage 0 accumulates bf16 gradients in bf16 only; asked for fp32 it would raise after the model is built."""
    content = {"data_types": {"grad_accum_dtype": kind}, "zero_optimization": {"stage": stage}}
    config = run(write(tmp_path, content), training={"precision": "bf16"})
    if stage == 0 and kind == "fp32":
        message = message_of(config)
        assert "data_types.grad_accum_dtype: got fp32" in message and "stage 0" in message
    else:
        resolve(config, 1)


@pytest.mark.parametrize("key, value", [("betas", [0.8, 0.9]), ("eps", 1e-3), ("weight_decay", 0.2)])
def test_what_another_optimizer_does_not_get_is_refused(key, value, tmp_path):
    """Of the run file, only the learning rate is passed on to it; the JSON's own values are."""
    path = write(tmp_path, {"optimizer": {"type": "Lamb", "params": {"lr": "auto", key: "auto"}}})
    message = message_of(run(path, optimizer={key: value}))
    assert message.startswith(f"optimizer.{key}: got {value}, which optimizer.type Lamb of deepspeed.config: ds.json")
    path = write(tmp_path, {"optimizer": {"type": "Lamb", "params": {"lr": "auto", key: value}}})
    _, ds, _ = resolve(run(path, optimizer={key: value}), 1)
    assert ds["optimizer"]["params"][key] == value


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        (None, "adamw"),
        ({"type": "AdamW"}, "adamw"),
        ({"type": "AdamW", "params": {"lr": "auto", "eps": 1e-6, "adam_w_mode": False, "torch_adam": True}}, "adamw"),
        ({"type": "Adam", "params": {"adam_w_mode": True, "amsgrad": False}}, "adamw"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, 'adamw {"adam_w_mode": false}'),
        ({"type": "AdamW", "params": {"bias_correction": False}}, 'adamw {"bias_correction": false}'),
        ({"type": "SGD", "params": {"lr": "auto", "weight_decay": 0.1}}, "SGD"),
        ({"type": "SGD", "params": {"momentum": 0.9, "weight_decay": 0.1}}, 'SGD {"momentum": 0.9}'),
    ],
)
def test_the_rule_of_an_update(optimizer, rule, tmp_path):
    """What a checkpoint must not be resumed without, as the keys of `optimizer` do not say it."""
    path = write(tmp_path, {} if optimizer is None else {"optimizer": optimizer, "zero_allow_untested_optimizer": True})
    config, ds, _ = resolve(run(path), 1)
    assert update_rule(config, ds) == rule


@pytest.mark.parametrize("kind", ["Lamb", "Lion", "Adam", None])
def test_spikes_are_skipped_by_adam_only(kind, tmp_path):
    """Another optimizer of the JSON may have moved a part of its state before its step is skipped."""
    content = {"optimizer": {"type": kind}} if kind else {}
    config = run(write(tmp_path, content), training={"spike_deviations": 6})
    if kind in ("Adam", None):
        resolve(config, 1)
    else:
        message = message_of(config)
        assert "training.spike_deviations: got 6, but " in message and f"optimizer.type {kind}" in message
        assert message.endswith("allowed: null, or Adam or AdamW there")


def test_layer_gradients_where_they_cannot_be_found(tmp_path):
    config = run(write(tmp_path, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    resolve(config, 1)
    message = message_of(config.replace("logging", layer_gradients=True))
    assert "logging.layer_gradients: got true, but " in message and "round_robin_gradients" in message


ONE_IN_BF16 = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("precision", "content"),
    [
        ("fp32", {}),
        ("bf16", {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}),
        ("bf16", ONE_IN_BF16),
        ("bf16", {**ONE_IN_BF16, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}),
    ],
)
def test_muon_where_deepspeed_clips_gradients(precision, content, tmp_path):
    resolve(run(write(tmp_path, content), training={"precision": precision}, optimizer={"name": "muon"}), 2)


@pytest.mark.parametrize(
    ("precision", "content", "said"),
    [
        ("fp32", ONE_IN_BF16, "muon in fp32 with ZeRO stage 1 ("),
        ("fp16", ONE_IN_BF16, "muon in fp16 with ZeRO stage 1 ("),
        ("bf16", {"zero_optimization": {"stage": 1}}, "muon in bf16 with ZeRO stage 1 ("),
        (
            "bf16",
            ONE_IN_BF16 | {"zero_optimization": {"stage": 2}},
            "muon in bf16 with ZeRO stage 2 (",
        ),
        ("fp32", {"zero_optimization": {"stage": 3}}, "muon in fp32 with ZeRO stage 3 ("),
        (
            "bf16",
            ONE_IN_BF16 | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "ZeRO stage 1 and offloading (",
        ),
    ],
)
def test_muon_where_deepspeed_clips_its_updates(precision, content, said, tmp_path):
    config = run(write(tmp_path, content), training={"precision": precision}, optimizer={"name": "muon"})
    message = message_of(config)
    assert message.startswith("optimizer.name: got muon in ") and said in message
    assert "allowed: stage 0, or bf16 with stage 1" in message


@pytest.mark.parametrize("name", ["muon", "adamw-8bit"])
def test_optimizers_of_a_run_file_alone(name, tmp_path):
    """None beside one of the JSON, no skipped spikes, no offloading; and DeepSpeed's Muon by this name only."""
    other = write(tmp_path, {"optimizer": {"type": "AdamW"}})
    message = message_of(run(other, optimizer={"name": name}))
    assert message.startswith(f"optimizer.name: got {name}, but deepspeed.config: ds.json has an optimizer of its own")
    message = message_of(run(write(tmp_path, {}), optimizer={"name": name}, training={"spike_deviations": 6}))
    assert message.startswith(f"training.spike_deviations: got 6, but optimizer.name is {name}, whose state may move")
    assert message.endswith("allowed: null, or optimizer.name: adamw")
    message = message_of(run(REPOSITORY / "ds_configs/zero2_offload.json", optimizer={"name": name}))
    assert message.startswith(f"optimizer.name: got {name}") and "offload" in message
    message = message_of(run(write(tmp_path, {"optimizer": {"type": "Muon"}})))
    assert message.endswith("ds.json: optimizer: got type Muon, remove it and set optimizer.name: muon in the run file")


def test_a_precision_that_the_device_lacks(no_fp16):
    """It is refused, with those that the device has."""
    config, _, _ = resolve(run(REPOSITORY / "ds_configs/zero1.json", training={"precision": "fp16"}), 1)
    with pytest.raises(ConfigError, match=r"^training\.precision: got fp16, .*CPU does not support; allowed: fp32"):
        check_device(config)


def test_fp32_is_everywhere():
    """fp32 passes on every device."""
    check_device(run(REPOSITORY / "ds_configs/zero1.json"))


@pytest.mark.parametrize(
    ("file", "checkpointing", "remedies"),
    [
        ("zero0", False, "more ranks, a higher ZeRO stage, offload or model.activation_checkpointing=true"),
        ("zero2_offload", False, "more ranks, a higher ZeRO stage or model.activation_checkpointing=true"),
        ("zero3", True, "more ranks or offload"),
        ("zero3_offload", True, "more ranks"),
    ],
)
def test_only_what_is_not_done_yet_is_advised(file, checkpointing, remedies):
    model = {"name": "pythia-14m", "activation_checkpointing": checkpointing}
    config, ds, _ = resolve(run(REPOSITORY / f"ds_configs/{file}.json", model=model), 1)
    assert memory_remedies(config, ds) == remedies


def test_no_stage_is_advised_that_muon_does_not_have():
    for stage, remedies in ((0, "more ranks, a higher ZeRO stage or"), (1, "more ranks or")):
        path = REPOSITORY / f"ds_configs/zero{stage}.json"
        config, ds, _ = resolve(run(path, optimizer={"name": "muon"}, training={"precision": "bf16"}), 1)
        assert memory_remedies(config, ds) == f"{remedies} model.activation_checkpointing=true"
