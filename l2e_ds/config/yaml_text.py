"""Read and write YAML by the core schema of version 1.2, without repeated keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from l2e_ds.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Reads the core schema of YAML 1.2 (`0100` is 100, `no`, `24:00:00` and dates are text), with merge keys and with
    `_` between digits. A key given twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


_TAG = "tag:yaml.org,2002:"
_DIGITS = "[0-9]+(?:_[0-9]+)*"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", f"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:\.{_DIGITS}|{_DIGITS}(?:\.(?:{_DIGITS})?)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = str(loader.construct_scalar(node))
    return int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    return loader.construct_mapping(node, deep=True)


# None stands for any other tag, which is an error
_CORE = (None, *(_TAG + name for name in ("null", "bool", "float", "str", "seq")))
_Loader.yaml_constructors = {
    **{tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in _CORE},
    _TAG + "int": _integer,
    _TAG + "map": _mapping,
    _TAG + "merge": yaml.SafeLoader.construct_yaml_str,  # a `<<` that is not a merge key
}


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text. Raises ConfigError; `where` begins its line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if problem.startswith("but "):  # the second half of a sentence
            problem = f"{getattr(error, 'context', None)}, {problem}"
        raise ConfigError(f"{where}{line}: {problem}") from None
    except (ValueError, KeyError, RecursionError) as error:  # `!!int x`, `!!bool x`, a thousand brackets
        raise ConfigError(f"{where}: cannot be read as YAML ({error})") from None


def dump_yaml(value: Any) -> str:
    """Return a value as YAML, which `read_yaml` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file. Raises ConfigError, naming the file and the line of a mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{path}: {reason or error}") from None
    return parse_yaml(text, str(path))
