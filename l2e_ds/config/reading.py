"""Read run files and overrides. Unknown keys and wrong values are refused with their dotted path."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError

from l2e_ds.config.sections import Checked, RunConfig, Section, SourceConfig
from l2e_ds.config.yaml_text import parse_yaml, read_yaml
from l2e_ds.console import did_you_mean
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import PACKAGE, REPOSITORY

RECIPES = "launch/recipes"


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, or a recipe by its name (`pythia-70m`), and apply overrides. Raises ConfigError."""
    path = Path(path)
    if not path.is_file() and len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        path = find_recipe(str(path))
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a run file is a mapping with the sections {', '.join(RunConfig.model_fields)}")
    for override in overrides:
        name, key, value = split_override(override)
        if not isinstance(raw.setdefault(name, {}), dict):
            raise ConfigError(f"{name}: got {raw[name]!r}, must be a mapping")
        raw[name][key] = value
    config = checked(RunConfig, raw, str(path), overrides)
    given = any(override.partition("=")[0].strip() == "training.run_directory" for override in overrides)
    is_frozen = (path.parent / "deepspeed.json").is_file() or any(path.parent.glob("checkpoints/step????????"))
    if not given and path.name == "config.yaml" and is_frozen:  # that of a run directory, not a user's run file
        config = config.replace("training", run_directory=str(path.parent.absolute()))
    elif not config.training.run_directory:
        name = path.parent.name if path.stem == "config" else path.stem
        config = config.replace("training", run_directory=f"runs/{name}")
    return with_absolute_paths(config, path)


def find_recipe(name: str) -> Path:
    """Return the recipe of this name. Raises ConfigError if there is none."""
    recipe = find_file(f"{RECIPES}/{name}.yaml")
    if recipe is None:
        known = sorted(file.stem for root in (REPOSITORY, PACKAGE) for file in (root / RECIPES).glob("*.yaml"))
        raise ConfigError(f"{name}: no such file, and no recipe of this name; recipes: {', '.join(known)}")
    return recipe


def with_absolute_paths(config: RunConfig, run_file: Path | None = None) -> RunConfig:
    """Return the configuration with absolute paths to what the run reads, so that two runs that read other files
    differ. Names of the hub and of files of this repository stay, and so does the run directory."""
    data, model, evaluation, resume = config.data, config.model, config.evaluation, config.training.resume
    config = config.replace(
        "data",
        path=_absolute_source(data),
        sets=data.sets and [part.model_copy(update={"path": _absolute_source(part)}) for part in data.sets],
        tokenizer=_absolute_if_there(data.tokenizer),
        cache=data.cache and str(Path(data.cache).absolute()),
    )
    if resume not in ("auto", "never"):
        config = config.replace("training", resume=str(Path(resume).absolute()))
    network = model.config and find_model_config(model.config, run_file)
    config = config.replace(
        "model", pretrained=_absolute_if_there(model.pretrained), config=portable(network) if network else model.config
    )
    deepspeed = find_file(config.deepspeed.config, run_file)
    config = config.replace("deepspeed", config=portable(deepspeed) if deepspeed else config.deepspeed.config)
    texts = evaluation.texts and [text.model_copy(update={"path": _absolute_source(text)}) for text in evaluation.texts]
    folders = [str(Path(folder).absolute()) for folder in evaluation.include_path]
    return config.replace("evaluation", include_path=folders, texts=texts)


def _absolute_source(part: SourceConfig) -> str | list[str] | None:
    if isinstance(part.path, list):
        return [str(Path(path).absolute()) for path in part.path]
    if part.path is None or part.source == "hub":
        return _absolute_if_there(part.path)
    return str(Path(part.path).absolute())


def _absolute_if_there(name: str | None) -> str | None:
    """Return the absolute path of a file or folder that exists, and any other name, as of the hub, unchanged."""
    return str(Path(name).absolute()) if name is not None and os.path.exists(name) else name


def checked(kind: type[Checked], raw: dict, where: str, overrides: Sequence[str] = ()) -> Checked:
    """Return a nested mapping as a section of this kind. Raises ConfigError, about `where` or the override that set the
    key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems: dict[str, list[Any]] = {}
        # a misspelt key comes first: it is often why another one is missing
        for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
            problems.setdefault(_dotted_key(kind, problem["loc"]), []).append(problem)
        key, alike = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        given = [one for one in overrides if f"{one.partition('=')[0].strip()}.".startswith(f"{key}.")]
        where = f"override {given[-1]!r}" if given else where
        raise ConfigError(f"{_describe(kind, key, alike)}{more}", where=where) from None


def split_override(override: str) -> tuple[str, str, Any]:
    """Return section, key and value of `section.key=value`. Raises ConfigError.

    The value of a key that takes text is taken literally, except that `null` or nothing unsets an optional key, and
    brackets make a list where the key takes one. The value of any other key is read as YAML.
    """
    key, separator, value = override.partition("=")
    path = key.strip().split(".")
    if not separator or len(path) != 2 or not all(path):
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. training.steps=100")
    kinds = _kinds_of(*path)
    if str not in kinds or (list[str] in kinds and value.startswith("[") and value.endswith("]")):
        return path[0], path[1], parse_yaml(value, f"override {override!r}")
    return path[0], path[1], None if value in ("", "null") and NoneType in kinds else value


def takes_text(key: str) -> bool:
    """Return whether `section.key` of a run file may be any text."""
    return str in _kinds_of(*key.split("."))


def _kinds_of(section: str, key: str) -> tuple[Any, ...]:
    """Return the types that a key takes, those of a union one by one; none for an unknown key."""
    kind = _section_of(RunConfig, section)
    if kind is None or key not in kind.model_fields:
        return ()
    annotation = get_type_hints(kind)[key]  # without validators, as in LocalPath
    return annotation, *get_args(annotation)


def _dotted_key(kind: type[Section], location: Sequence[int | str]) -> str:
    """Return the `section.key` of a pydantic location, without names of union branches or positions in a list of
    values. The key of one of several sections contains its position (`data.sets.I.key`)."""
    parts: list[str] = []
    section: type[Section] | None = kind
    for part in location:
        if section is None:
            break
        parts.append(str(part))
        if not isinstance(part, int):
            section = _section_of(section, part)
    return ".".join(parts)


def _section_of(kind: type[Section], key: str) -> type[Section] | None:
    """Return the kind of section, or of several sections, that a key holds, or None if it holds plain values."""
    waiting = [kind.model_fields[key].annotation] if key in kind.model_fields else []
    while waiting:
        found: Any = waiting.pop()
        if isinstance(found, type) and issubclass(found, Section):
            return found
        waiting += get_args(found)
    return None


def _describe(kind: type[Section], key: str, problems: Sequence[Any]) -> str:
    """Return one line on what is wrong with one key: what was given, what is allowed (in a union: any branch)."""
    problems = [problem for problem in problems if problem["type"] == "path"] or problems
    first = problems[0]
    if first["type"] == "extra_forbidden":
        *sections, name = key.split(".")
        for section in sections:
            kind = (None if section.isdigit() else _section_of(kind, section)) or kind
        allowed = list(kind.model_fields)
        hint = did_you_mean(name, allowed, f"allowed: {', '.join(allowed)}")
        return f"{key}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{key}: is required"
    if first["type"] == "model_type":
        return f"{key}: got {first['input']!r}; must be a section of keys"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    messages = [
        problem["msg"]
        .removeprefix("Input should be ")
        .replace("List should", "it should")
        .replace(" after validation", "")
        for problem in problems
    ]
    be = "must be " if first["msg"].startswith("Input should be ") else ""
    # the input of a problem that does not lie deeper than the key
    given = min(problems, key=lambda problem: sum(isinstance(part, int) for part in problem["loc"]))["input"]
    return f"{key}: got {given!r}; {be}{' or '.join(dict.fromkeys(messages))}"


def find_file(name: str, beside: str | Path | None = None) -> Path | None:
    """Return the file that a run file names: as given, beside that file, or in this repository (`ds_configs/...`)."""
    candidates = [Path(os.path.expandvars(name)).expanduser()]
    if not candidates[0].is_absolute():
        candidates += [Path(beside).parent / name] if beside else []
        candidates += [REPOSITORY / name, PACKAGE / name]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the content of the file of `deepspeed.config`. Raises ConfigError."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        content = dict[str, Any]()
        for key, value in pairs:
            if key in content:
                raise ConfigError(f"deepspeed.config: {path}: key {key!r} is given twice")
            content[key] = value
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed.config: {path}:{error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"deepspeed.config: {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"deepspeed.config: {path}: must hold a JSON object")
    return content


def find_model_config(name: str, beside: str | Path | None = None) -> Path | None:
    """Return the file of `model.config`, which names it or its folder."""
    return find_file(name, beside) or find_file(f"{name}/config.json", beside)


def portable(path: Path) -> str:
    """Return a name that `find_file` finds from anywhere, for a path in this repository; else the path itself."""
    for root in (PACKAGE, REPOSITORY):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)
