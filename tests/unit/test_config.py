"""The run file: what is refused and how the one line reads, what is accepted, overrides, and the dump."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from l2e_ds.config.batch import batch_arithmetic
from l2e_ds.config.reading import checked, find_file, load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.errors import ConfigError

VALID = {
    "model": {"name": "pythia-14m"},
    "data": {"source": "stdlib", "train_tokenizer": 512},
    "training": {"steps": 10, "global_batch": 8},
}


def changed(**sections) -> dict:
    """Return the valid file with some keys changed; `...` removes a key."""
    raw = copy.deepcopy(VALID)
    for section, values in sections.items():
        if not isinstance(values, dict):
            raw[section] = values
            continue
        raw.setdefault(section, {}).update(values)
        raw[section] = {key: value for key, value in raw[section].items() if value is not ...}
    return raw


def write(tmp_path: Path, content: dict | str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def message_of(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# what is wrong, the dotted key, what else the line must say (given and allowed)
REFUSED = {
    "unknown key": (changed(training={"step": 3}), "training.step: ", ["unknown key", "did you mean 'steps'?"]),
    "far from any key": (
        changed(checkpoint={"zzz": 3}),
        "checkpoint.zzz: ",
        ["unknown key", "every, early, keep_last"],
    ),
    "unknown section": (changed(trainning={}), "trainning: ", ["unknown key", "did you mean 'training'?"]),
    "no mapping": (changed(optimizer=3), "optimizer: ", ["3"]),
    "text for a number": (changed(training={"steps": "ten"}), "training.steps: ", ["'ten'", "integer"]),
    "float for an integer": (changed(training={"steps": 10.5}), "training.steps: ", ["10.5", "integer"]),
    "whole float": (changed(training={"steps": 10.0}), "training.steps: ", ["10.0", "integer"]),
    "truth for a number": (changed(training={"steps": True}), "training.steps: ", ["True", "integer"]),
    "number for text": (changed(data={"text_key": 3}), "data.text_key: ", ["3", "string"]),
    "number for truth": (changed(checkpoint={"early": 1}), "checkpoint.early: ", ["1", "bool"]),
    "null": (changed(training={"steps": None}), "training.steps: ", ["None", "integer"]),
    "zero steps": (changed(training={"steps": 0}), "training.steps: ", ["0", "greater than 0"]),
    "share": (changed(inhibition={"target_share": 1.0}), "inhibition.target_share: ", ["1.0", "less than 1"]),
    "negative": (
        changed(inhibition={"coefficient": -0.1}),
        "inhibition.coefficient: ",
        ["-0.1", "greater than or equal"],
    ),
    "nan": (changed(inhibition={"target_share": float("nan")}), "inhibition.target_share: ", ["nan"]),
    "both weights": (
        changed(inhibition={"coefficient": 0.1, "strength": 0.2}),
        "inhibition.strength: ",
        ["0.2", "inhibition.coefficient 0.1", "one of the two"],
    ),
    "neither weight": (changed(inhibition={"strength": None}), "inhibition.strength: ", ["null", "one of the two"]),
    "strength of a deactivation": (
        changed(inhibition={"method": "memel", "strength": 0.2}),
        "inhibition.strength: ",
        ["0.2", "reverse-deactivation"],
    ),
    "negative strength": (changed(inhibition={"strength": -1.0}), "inhibition.strength: ", ["-1", "greater than or"]),
    "power": (changed(inhibition={"power": 3}), "inhibition.power: ", ["3", "0, 1 or 2"]),
    "negative start": (
        changed(inhibition={"start": -1}),
        "inhibition.start: ",
        ["-1", "whole number of steps", "share"],
    ),
    "share of more than the run": (
        changed(inhibition={"warmup": 1.5}),
        "inhibition.warmup: ",
        ["1.5", "share of the run"],
    ),
    "schedule longer than the run": (
        changed(training={"steps": 10}, inhibition={"start": 5, "warmup": 4, "decay": 2}),
        "inhibition.start: ",
        ["5 steps", "warmup of 4", "decay of 2", "11", "up to training.steps, which is 10"],
    ),
    "schedule longer than its end": (
        changed(training={"steps": 10}, inhibition={"start": 0.5, "decay": 0.3, "end": 6}),
        "inhibition.start: ",
        ["5 steps", "decay of 3", "up to inhibition.end, which is 6"],
    ),
    "end after the run": (
        changed(training={"steps": 10}, inhibition={"end": 11}),
        "inhibition.end: ",
        ["11", "1 to training.steps, which is 10"],
    ),
    "end at the beginning": (changed(training={"steps": 10}, inhibition={"end": 0.05}), "inhibition.end: ", ["step 0"]),
    "start at the end": (
        changed(training={"steps": 10}, inhibition={"start": 10}),
        "inhibition.start: ",
        ["step 10", "below training.steps, which is 10"],
    ),
    "nan coefficient": (changed(inhibition={"coefficient": float("nan")}), "inhibition.coefficient: ", ["nan"]),
    "infinite": (changed(inhibition={"coefficient": float("inf")}), "inhibition.coefficient: ", ["inf"]),
    "choice": (changed(training={"precision": "fp8"}), "training.precision: ", ["'fp8'", "'bf16'", "'fp16'"]),
    "layer choice": (changed(inhibition={"layers": "mid-3"}), "inhibition.layers: ", ["'mid-3'", "'mid-2'", "'all'"]),
    "layer type": (changed(inhibition={"layers": [1, "x"]}), "inhibition.layers", ["x"]),
    "window": (
        changed(inhibition={"statistics_window": 0}),
        "inhibition.statistics_window: ",
        ["0", "equal to 1", "cumulative"],
    ),
    "window text": (
        changed(inhibition={"statistics_window": "all"}),
        "inhibition.statistics_window: ",
        ["'all'", "cumul"],
    ),
    "profile from the first step": (
        changed(logging={"profile": [1, 3]}),
        "logging.profile: ",
        ["[1, 3]", "from 2 on"],
    ),
    "profile that ends before it begins": (
        changed(logging={"profile": [4, 3]}),
        "logging.profile: ",
        ["[4, 3]", "not before it"],
    ),
    "profile after the end": (
        changed(logging={"profile": [9, 11]}),
        "logging.profile: ",
        ["[9, 11]", "up to training.steps, which is 10"],
    ),
    "profile of one number": (changed(logging={"profile": [9]}), "logging.profile: ", ["[9]", "2 items"]),
    "profile of a step": (changed(logging={"profile": 9}), "logging.profile: ", ["9", "list"]),
    "no deviation": (changed(training={"spike_deviations": 0}), "training.spike_deviations: ", ["0", "greater than 0"]),
    "window of one step": (changed(training={"spike_window": 1}), "training.spike_window: ", ["1", "or equal to 2"]),
    "optimizer": (changed(optimizer={"name": "adam"}), "optimizer.name: ", ["'adam'", "'adamw', 'muon' or"]),
    "Muon's rate without Muon": (
        changed(optimizer={"muon_learning_rate": 0.01}),
        "optimizer.muon_learning_rate: got 0.01, but optimizer.name is adamw; allowed with muon",
        [],
    ),
    "Muon's momentum": (
        changed(optimizer={"name": "muon", "muon_momentum": 1.0}),
        "optimizer.muon_momentum: ",
        ["1.0", "less than 1"],
    ),
    "beta": (changed(optimizer={"betas": [0.9, 1.0]}), "optimizer.betas: ", ["1.0", "less than 1"]),
    "one beta": (changed(optimizer={"betas": [0.9]}), "optimizer.betas: ", ["[0.9]", "2"]),
    "beta type": (changed(optimizer={"betas": [0.9, "x"]}), "optimizer.betas", ["'x'", "number"]),
    "missing key": (changed(training={"steps": ...}), "training.steps: ", ["required"]),
    "missing source": (changed(data={"source": ...}), "data.source: ", ["required"]),
    "two origins": (changed(model={"pretrained": "x"}), "model.name", ["model.pretrained", "exactly one"]),
    "no origin": (changed(model={"name": ...}), "model.name", ["model.pretrained", "exactly one"]),
    "revision": (changed(model={"revision": "step1"}), "model.revision", ["model.pretrained"]),
    "resized pretrained": (
        changed(model={"name": ..., "pretrained": "x", "num_layers": 2}),
        "model.num_layers",
        ["pretrained", "remove"],
    ),
    "two tokenizers": (changed(data={"tokenizer": "x"}), "data.tokenizer", ["data.train_tokenizer", "exactly one"]),
    "no tokenizer": (changed(data={"train_tokenizer": ...}), "data.tokenizer", ["data.train_tokenizer", "exactly one"]),
    "tokenizer of tokens": (changed(data={"source": "indexed", "path": "x"}), "data.train_tokenizer", ["indexed"]),
    "path with stdlib": (changed(data={"path": "x"}), "data.path", ["data.source: stdlib", "remove"]),
    "no path": (changed(data={"source": "text"}), "data.path", ["required", "data.source: text"]),
    "many hub sets": (
        changed(data={"source": "hub", "path": ["a", "b"]}),
        "data.path",
        ["one string", "data.source: hub"],
    ),
    "no indexed set": (
        changed(data={"source": "indexed", "path": [], "train_tokenizer": ...}),
        "data.path",
        ["[]", "prefix"],
    ),
    "hub key": (changed(data={"subset": "x"}), "data.subset", ["data.source: hub", "remove"]),
    "split of files": (
        changed(data={"source": "jsonl", "path": "x", "split": "test"}),
        "data.split",
        ["data.source: hub", "remove"],
    ),
    "stream with an own tokenizer": (changed(data={"streaming": True}), "data.train_tokenizer", ["l2e-ds tokenizer"]),
    "stream with an end": (
        changed(data={"streaming": True, "max_tokens": 9, "train_tokenizer": ..., "tokenizer": "x"}),
        "data.max_tokens",
        ["data.streaming", "remove"],
    ),
    "streamed tokens": (
        changed(data={"source": "indexed", "path": "x", "train_tokenizer": ..., "streaming": True}),
        "data.streaming",
        ["indexed", "tokens"],
    ),
    "buffer of no stream": (changed(data={"shuffle_buffer": 5}), "data.shuffle_buffer", ["data.streaming", "remove"]),
    "plain with parts": (
        changed(inhibition={"method": "none", "mechanism": "regulariser"}),
        "inhibition.mechanism",
        ["inhibition.method: none", "remove"],
    ),
}


def sets(*parts: dict, **common) -> dict:
    """Return the valid file with `data.sets` in place of a source."""
    return {**VALID, "data": {"tokenizer": "x", "sets": list(parts), **common}}


ONE = {"name": "one", "weight": 1, "source": "stdlib"}
REFUSED |= {
    "no set": (sets(), "data.sets: ", ["[]", "at least 1"]),
    "sets and a source": (sets(ONE, source="stdlib"), "data.source ", ["data.sets", "each set"]),
    "sets and a limit": (sets(ONE, max_tokens=3), "data.max_tokens ", ["data.sets", "each set"]),
    "set without a name": (sets({"weight": 1, "source": "stdlib"}), "data.sets.0.name: ", ["required"]),
    "set without a source": (sets(ONE, {"name": "b", "weight": 1}), "data.sets.1.source: ", ["required"]),
    "guard": (changed(inhibition={"guard": "halt"}), "inhibition.guard: ", ["'halt'", "'warn'", "'stop'", "'off'"]),
    "set without a path": (sets({**ONE, "source": "jsonl"}), "data.sets.0.path ", ["data.sets.0.source: jsonl"]),
    "set's path type": (sets({**ONE, "path": 3}), "data.sets.0.path: ", ["3", "string"]),
    "set's name": (sets({**ONE, "name": "a b"}), "data.sets.0.name: ", ["'a b'", "[A-Za-z0-9_-]"]),
    "set's name twice": (sets(ONE, {**ONE}), "data.sets.1.name: ", ["'one'", "data.sets.0"]),
    "set's weight": (sets(ONE, {**ONE, "name": "b", "weight": 0}), "data.sets.1.weight: ", ["0", "greater than 0"]),
    "set's tiny weight": (sets(ONE, {**ONE, "name": "b", "weight": 1e-7}), "data.sets.1.weight: ", ["1e-07", "1e-06"]),
    "set's unknown key": (sets({**ONE, "wieght": 2}), "data.sets.0.wieght: ", ["unknown key", "'weight'"]),
    "set no mapping": (sets("stdlib"), "data.sets.0: ", ["'stdlib'"]),
    "sets of text without a tokenizer": (sets(ONE, tokenizer=None), "data.tokenizer ", ["data.sets.0.source: stdlib"]),
    "sets train a tokenizer": (
        sets(ONE, tokenizer=None, train_tokenizer=512),
        "data.train_tokenizer ",
        ["l2e-ds tokenizer train", "data.tokenizer"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    """An error is one line: the file, the dotted key, what was given and what is allowed."""
    raw, key, parts = REFUSED[case]
    path = write(tmp_path, raw)
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    rest = message.removeprefix(f"{path}: ")
    assert key in rest
    assert "more)" not in rest, "one mistake is counted as several"
    for part in parts:
        assert part in rest, message


def test_several_errors_are_counted(tmp_path):
    """Several mistakes are still one line, which says that there are more."""
    message = message_of(write(tmp_path, changed(training={"steps": 0, "seed": -1, "resum": "x"})))
    assert message.endswith("(and 2 more)")


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_missing_section(section, tmp_path):
    """A section that has no defaults is required by name."""
    raw = {key: value for key, value in VALID.items() if key != section}
    path = write(tmp_path, raw)
    assert message_of(path) == f"{path}: {section}: is required"


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("model:\n  name: a\n  name: b\n", 3, "key 'name' is given twice"),
        ("model: {name: a}\ndata: {}\nmodel: {}\n", 3, "key 'model' is given twice"),
        ("model:\n  name: [a\ndata: 1\n", 3, "expected ',' or ']'"),
        ("model:\n\tname: a\n", 2, "cannot start any token"),
        ("model: a: b\n", 1, "mapping values are not allowed"),
        ("model: !!python/object/apply:os.system [x]\n", 1, "could not determine a constructor"),
        ("model: !!timestamp x\n", 1, "could not determine a constructor"),
        ("model: {<<: 3}\n", 1, "expected a mapping"),
        ("model:\n  <<: *common\n", 2, "undefined alias 'common'"),
        ("model: {<<: &a {name: a, name: b}}\n", 1, "key 'name' is given twice"),
        ("model: &a\n  b: *a\n", 1, "recursive"),
        ("? [a]\n: b\n", 1, "unhashable key"),
        ("model: {}\n---\ndata: {}\n", 2, "expected a single document in the stream, but found another document"),
    ],
)
def test_yaml_errors_name_file_and_line(text, line, part, tmp_path):
    """Syntax errors, repeated keys and tags that would run code are refused with file:line and the reason."""
    path = write(tmp_path, text)
    message = message_of(path)
    assert message.startswith(f"{path}:{line}: ") and part in message


def test_a_section_must_be_one(tmp_path):
    path = write(tmp_path, VALID | {"optimizer": None})
    assert message_of(path) == f"{path}: optimizer: got None; must be a section of keys"


@pytest.mark.parametrize("text", ["a: \0\n", "a: !!int x\n", "a: !!bool x\n", "[" * 1000, "a: " + "9" * 5000])
def test_other_yaml_errors_are_one_line_too(text, tmp_path):
    path = write(tmp_path, text)
    assert message_of(path).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n", "3\n"])
def test_not_a_mapping(text, tmp_path):
    """For an empty file, or one that holds no mapping, the error says what a run file is."""
    path = write(tmp_path, text)
    message = message_of(path)
    assert message.startswith(f"{path}: ") and "model, data" in message


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a folder, and bytes that are no text are refused."""
    assert message_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: No such file or directory"
    assert message_of(tmp_path) == f"{tmp_path}: Is a directory"
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff\xfe")
    assert message_of(tmp_path / "latin.yaml") == f"{tmp_path / 'latin.yaml'}: is not UTF-8 text"


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "training.=3", ".steps=3", "a.b.c=1", "", "="])
def test_override_syntax(override, tmp_path):
    """The error for an override that is not section.key=value repeats it, and says how to write one."""
    message = message_of(write(tmp_path, VALID), (override,))
    assert repr(override) in message and "section.key=value" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps=[1", ["override 'training.steps=[1'"]),
        ("training.steps=ten", ["training.steps: ", "'ten'", "integer"]),
        ("training.stepz=10", ["training.stepz: unknown key", "'steps'"]),
        ("nowhere.steps=10", ["nowhere: unknown key"]),
        ("training.steps=", ["training.steps: ", "None"]),
    ],
)
def test_override_values_are_checked_like_the_file(override, parts, tmp_path):
    """Overrides pass through the same checks and the same errors."""
    message = message_of(write(tmp_path, VALID), (override,))
    for part in parts:
        assert part in message


def test_overrides_apply_in_order(tmp_path):
    """The last override of a key counts; sections that the file lacks may be set."""
    config = load_run_config(
        write(tmp_path, VALID),
        [
            "training.steps=20",
            "training.steps=30",
            "inhibition.layers=[1, 3]",
            "inhibition.coefficient=1e-2",
            "model.name=pythia-70m",
            "logging.wandb_project=a=b",
            "checkpoint.early=true",
        ],
    )
    assert config.training.steps == 30 and config.inhibition.layers == [1, 3]
    assert config.inhibition.coefficient == 0.01 and config.model.name == "pythia-70m"
    assert config.logging.wandb_project == "a=b" and config.checkpoint.early is True


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "1.e-3", ".001", "1_0e-4", "0.1e-2", "0.001"])
def test_numbers_as_people_write_them(text, tmp_path):
    """`1e-3` is a number in a run file, which plain YAML 1.1 reads as text."""
    content = yaml.safe_dump(VALID) + f"optimizer: {{peak_learning_rate: {text}, weight_decay: 1e0}}\n"
    config = load_run_config(write(tmp_path, content))
    assert config.optimizer.peak_learning_rate == pytest.approx(1e-3, rel=1e-12)
    assert config.optimizer.weight_decay == 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("e3", "1e", "1e-3x", "pythia-1e3", "0x1e-3", "0b11", "1__0", "_1"),
        *("yes", "No", "on", "OFF", "2026-11-28", "2026-11-28 10:00:00", "24:00:00", "1:30", "<<", "="),
    ],
)
def test_what_yaml_1_2_reads_as_text_stays_text(text, tmp_path):
    """Dates, times, yes and no are text in a run file, and nothing is a number that only looks like one."""
    content = yaml.safe_dump(changed(data={"text_key": ...})).replace("data:", f"data:\n  text_key: {text}")
    assert load_run_config(write(tmp_path, content)).data.text_key == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("0100", 100), ("0777", 777), ("08", 8), ("0o17", 15), ("0x1F", 31), ("+7", 7), ("20_000", 20_000), ("1_0", 10)],
)
def test_integers_are_those_of_yaml_1_2(text, number, tmp_path):
    """A number with a leading zero is decimal, in a file and in an override."""
    path = write(tmp_path, yaml.safe_dump(VALID).replace("steps: 10", f"steps: {text}"))
    assert load_run_config(path, [f"training.seed={text}"]).training.steps == number
    assert load_run_config(path, [f"training.seed={text}"]).training.seed == number


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("0.5", 0.5), ("'90'", 90), ("90:30", 90.5), ("24:00:00", 1440), ("00:00:30", 0.5)),
        *(("1-12", 2160), ("1-1:1", 1501), ("2-00:00:30", 2880.5), ("null", None)),
    ],
)
def test_times_are_minutes_or_as_slurm_takes_them(text, minutes, tmp_path):
    path = write(tmp_path, yaml.safe_dump(VALID) + f"  time_limit: {text}\n")  # `training` is the last section
    config = load_run_config(path)
    assert config.training.time_limit == minutes
    assert load_run_config(path, [f"training.time_limit={text}"]) == config
    if minutes is not None:
        assert load_run_config(path, [f"training.timeout={text}"]).training.timeout == minutes


@pytest.mark.parametrize("text", ["24h", "1:2:3:4", "-5:00", "2026-11-28", "'1 day'", "0:00", "yes"])
def test_other_times_are_refused(text, tmp_path):
    message = message_of(write(tmp_path, VALID), (f"training.time_limit={text}",))
    assert "training.time_limit: got" in message and ("minutes, or a time" in message or "greater than 0" in message)


AS_THEY_STAND = [
    *(
        "runs/exp #2",
        "*x",
        "@x",
        "%x",
        "&x",
        "!x",
        "- x",
        "a: b",
        "[a",
        "{a: b}",
        "'x'",
        '"x"',
        "x ",
        "|",
        "yes",
        "1e3",
    ),
    *("0100", "2026-11-28", "24:00:00", "~", "true", "<<", "=", "1_0", "0o7", "ä", "[0]"),
]


@pytest.mark.parametrize("text", AS_THEY_STAND)
def test_text_of_an_override_is_taken_as_it_stands(text, tmp_path):
    """The dump of such text, in the run directory's config.yaml, is read back as the same text, also by YAML 1.1."""
    keys = ("data.text_key", "logging.wandb_project")
    config = load_run_config(write(tmp_path, VALID), [f"{key}={text}" for key in keys])
    assert {config.data.text_key, config.logging.wandb_project} == {text}
    assert load_run_config(write(tmp_path, config.dump(), "again.yaml")) == config
    assert yaml.safe_load(config.dump()) == config.model_dump(mode="json")


@pytest.mark.parametrize("key", ["training.run_directory", "data.cache", "data.path", "training.resume"])
def test_so_is_that_of_a_path(key, tmp_path):
    section, name = key.split(".")
    for text in ("exp #2", "*x", "0100", "a: b"):
        path = write(tmp_path, changed(data={"source": "text", "path": "x"}))
        config = load_run_config(path, [f"{key}={text}"])
        assert Path(getattr(getattr(config, section), name)).absolute() == Path.cwd() / text


def test_null_and_lists_in_overrides_of_text_keys(tmp_path):
    """`null` or nothing unsets an optional key; a key that takes a list takes it in brackets."""
    path = write(tmp_path, changed(data={"source": "text", "path": "x"}, logging={"wandb_project": "x"}))
    for value in ("null", ""):
        assert load_run_config(path, [f"logging.wandb_project={value}"]).logging.wandb_project is None
    assert load_run_config(path, ["data.text_key=null"]).data.text_key == "null"  # not optional
    here = Path.cwd()
    several = [str(here / "a b"), str(here / "c#d")]
    for value, found in {"[a b, 'c#d']": several, "[ab]*.txt": str(here / "[ab]*.txt")}.items():
        assert load_run_config(path, [f"data.path={value}"]).data.path == found


def test_merge_keys(tmp_path):
    """`<<` takes the keys of another mapping; the mapping's own keys win."""
    content = """
model: {name: pythia-14m}
data:
  tokenizer: x
  sets:
    - &common {name: a, weight: 1, source: jsonl, path: a, text_key: content}
    - {<<: *common, name: b, path: [b]}
    - {<<: [*common, {max_documents: 5}], name: c}
training: {steps: 10}
"""
    sets = load_run_config(write(tmp_path, content)).data.sets
    one, other = (str(Path.cwd() / name) for name in "ab")
    assert [(part.name, part.path, part.text_key) for part in sets] == [
        *(("a", one, "content"), ("b", [other], "content"), ("c", one, "content"))
    ]
    assert sets[2].max_documents == 5


FULL = changed(
    model={"num_layers": 3, "activation_checkpointing": True},
    data={"source": "text", "path": ["a b", "c: d"], "held_out": 0.25, "max_tokens": 10},
    optimizer={"peak_learning_rate": 1e-3, "eps": 1e-8, "betas": [0.9, 0.999]},
    training={"precision": "bf16", "run_directory": "some: where", "resume": "never"},
    inhibition={"method": "memel", "layers": [0, 2], "statistics_window": "cumulative", "retrieval": "threshold"},
    logging={"wandb_project": "yes", "peak_tflops": 1e3},
)


MIXED = sets(
    ONE,
    {"name": "b", "weight": 0.5, "source": "indexed", "path": "x", "held_out": 0.0, "max_documents": 3},
    held_out=0.1,
)


def test_sets_become_configurations_of_one_source():
    config = checked(RunConfig, MIXED, "run").data
    parts = config.all_sets()
    assert [(name, weight) for name, weight, _ in parts] == [("one", 1.0), ("b", 0.5)]
    first, second = (part for _, _, part in parts)
    assert (first.source, first.path, first.held_out, first.tokenizer) == ("stdlib", None, 0.1, "x")
    assert (second.source, second.path, second.held_out, second.max_documents) == ("indexed", "x", 0.0, 3)
    assert first.sets is None and first.all_sets() == [("", 1.0, first)]


@pytest.mark.parametrize("raw", [VALID, FULL, MIXED], ids=["defaults", "full", "mixture"])
def test_dump_reads_back_equal(raw, tmp_path):
    """The dump of a configuration, read again, is an equal configuration, and so is its own dump."""
    config = load_run_config(write(tmp_path, raw))
    again = load_run_config(write(tmp_path, config.dump(), "again.yaml"))
    assert again == config
    assert again.dump() == config.dump()


def test_run_directory_default(tmp_path):
    """The default is `runs/` and the file's name; for a run directory's own config.yaml the directory's name."""
    assert load_run_config(write(tmp_path, VALID, "study.yaml")).training.run_directory == "runs/study"
    (tmp_path / "old").mkdir()
    assert load_run_config(write(tmp_path / "old", VALID, "config.yaml")).training.run_directory == "runs/old"


def test_configuration_is_frozen():
    """A checked configuration cannot be changed in place; `replace` makes a copy."""
    config = checked(RunConfig, VALID, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3
    other = config.replace("training", steps=3)
    assert (config.training.steps, other.training.steps, type(other)) == (10, 3, RunConfig)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_batch_arithmetic(ranks, micro):
    """The global batch is micro-batch * ranks * accumulation, or the error names both keys."""
    config = checked(RunConfig, changed(training={"micro_batch": micro}, data={"sequence_length": 128}), "here")
    if micro * ranks > 8:
        with pytest.raises(
            ConfigError, match=r"training\.global_batch: 8 .* training\.micro_batch 2 x 8 ranks; .*: 1$"
        ):
            batch_arithmetic(config, ranks)
        return
    batch = batch_arithmetic(config, ranks)
    assert batch.micro_batch * batch.ranks * batch.accumulation == batch.global_batch == 8
    assert batch.tokens_per_step == 8 * 128


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "allowed"),
    [
        (12, 5, 2, "allowed micro-batches: 1, 2, 3, 6"),
        (7, 1, 2, "make it a multiple of 2"),
        (3, 1, 4, "make it a multiple of 4"),
        (16, 4, 64, "make it a multiple of 256"),
        (720, 11, 1, "allowed micro-batches: 1, 2, 3, 4, ..., 240, 360, 720"),
    ],
)
def test_impossible_batches(batch, micro, ranks, allowed):
    """The error is one line: the key, what was given, and the micro-batches that are allowed."""
    config = checked(RunConfig, changed(training={"global_batch": batch, "micro_batch": micro}), "here")
    with pytest.raises(ConfigError) as caught:
        batch_arithmetic(config, ranks)
    assert str(caught.value) == (
        f"training.global_batch: {batch} is not a multiple of training.micro_batch {micro} x {ranks} ranks; {allowed}"
    )


def test_auto_needs_a_multiple_of_the_ranks():
    config = checked(RunConfig, changed(training={"global_batch": 12, "micro_batch": "auto"}), "here")
    assert batch_arithmetic(config, 4).micro_batch == 1
    with pytest.raises(ConfigError, match=r"^training\.global_batch: 12 is not .* 8 ranks .*make it a multiple of 8$"):
        batch_arithmetic(config, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "got 0; must be greater than 0 or 'auto'"),
        ("largest", "got 'largest'; must be a valid integer or 'auto'"),
        (2.0, "got 2.0; must be a valid integer or 'auto'"),
    ],
)
def test_micro_batch_is_a_number_or_auto(given, said):
    with pytest.raises(ConfigError) as caught:
        checked(RunConfig, changed(training={"micro_batch": given}), "here")
    assert str(caught.value) == f"here: training.micro_batch: {said}"


def test_find_file(tmp_path):
    """A file is found as given, else beside the run file, else in the repository."""
    run_file = write(tmp_path, VALID)
    (tmp_path / "mine.json").write_text("{}", encoding="utf-8")
    assert find_file("mine.json", run_file) == (tmp_path / "mine.json").resolve()
    assert find_file(str(tmp_path / "mine.json")) == (tmp_path / "mine.json").resolve()
    assert find_file("ds_configs/zero1.json", run_file).name == "zero1.json"
    assert find_file("nowhere.json", run_file) is None and find_file("/nowhere.json", run_file) is None
