"""Configuration as text: YAML or JSON into plain mappings, overrides into them, and plain mappings back into YAML."""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

Raw = dict[str, Any]
"""Nested mappings, lists and scalars, as read."""

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (1e-3 is a number; yes, on and dates are text); no key twice in one mapping, no aliases."""

    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node).replace("_", ""), 0 if "x" in node.value else 10)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a name with * stands for another part", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key} stands here twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists on one line; text that any YAML version could take for something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _tag, _pattern, _first in (
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_representer(list, lambda d, x: d.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True))
_Dumper.add_representer(str, _represent_text)


def read(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Raw:
    """A YAML or JSON file as nested mappings, with `path.to.field=VALUE` overrides put in.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming `file:line` for text that is no YAML or JSON, a key twice, or no mapping at the top.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the path of a YAML or JSON configuration")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give the path of a YAML or JSON configuration")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    raw = _parse_json(text, str(path)) if path.suffix == ".json" else parse(text, str(path))
    if not isinstance(raw, dict):
        held = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ValueError(f"{path}: holds {held} instead of sections; write e.g. run: {{dir: runs/name}}")
    return override(raw, overrides)


def override(raw: Raw, overrides: Iterable[str]) -> Raw:
    """`raw` with each `path.to.field=VALUE` put in, VALUE read as YAML; sections on the way are made.

    {"train": {"steps": 5}}, ["train.steps=7", "mup.base.d_model=64"]
    ->  {"train": {"steps": 7}, "mup": {"base": {"d_model": 64}}}
    """
    result = _copy(raw)
    for item in overrides:
        field, equals, value = item.partition("=")
        keys = field.strip().split(".")
        if not equals or not all(keys):
            raise ValueError(f"{item}: not an override; write path.to.field=VALUE, e.g. train.steps=100")
        target = result
        for key in keys[:-1]:
            if not isinstance(target.get(key), dict):
                target[key] = {}
            target = target[key]
        target[keys[-1]] = _parse_override(field, value)
    return result


def write(raw: Raw) -> str:
    """Nested mappings as YAML in block style, one field a line; `read` gives the same values back exactly."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def leaf_names(raw: Raw, prefix: str = "") -> frozenset[str]:
    """The dotted names that are given a value: {"train": {"steps": 5}, "mup": null} -> train.steps, mup."""
    names: set[str] = set()
    for key, value in raw.items():
        names |= leaf_names(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key}
    return frozenset(names)


def _copy(raw: Any) -> Any:
    return {key: _copy(value) for key, value in raw.items()} if isinstance(raw, dict) else raw


def parse(text: str, where: str) -> Any:
    """YAML as plain values; ValueError names `where:line`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark if "stream end" in str(error.problem) else error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML, {error.problem}; mend the line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{where}: not valid YAML, {what}; mend the text") from None


def _parse_json(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"{where}: {twice[0]} stands twice in one object; keep one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}:{error.lineno}: not valid JSON, {error.msg}; mend the line") from None


def _parse_override(field: str, value: str) -> Any:
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"{field}: {value} is not a YAML value; put text with special characters in quotes") from None
