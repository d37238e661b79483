"""Plain mappings into frozen dataclasses: names, types, choices and ranges checked, each error with its dotted path."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import msgspec

T = TypeVar("T")
Kinds = Mapping[type, Mapping[str, Any]]
"""For a base class, its dataclasses by the name that the field `kind` gives."""

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def convert(section: type[T], raw: Any, where: str = "", *, kinds: Kinds | None = None, root: type | None = None) -> T:
    """A dataclass from nested mappings; what is not given keeps its default.

    Args:
      section: a dataclass; fields that are dataclasses (or one of them or null) are converted in turn.
      raw: mappings, lists and scalars, as read.
      where: dotted path of `raw`, for messages.
      kinds: which dataclass stands for a base class, by `kind`.
      root: the dataclass whose other sections are searched for a misplaced name.

    Raises:
      ValueError: `path.to.field: what; what to do`.
    """
    kinds, root = kinds or {}, root or section
    if not isinstance(raw, dict):
        raise ValueError(
            f"{where or 'configuration'}: expected a mapping of fields, got {_shown(raw)}; {_todo(section)}"
        )
    chosen: Any = _of_kind(section, raw, where, kinds)
    hints = typing.get_type_hints(chosen, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(chosen)}
    for key in raw:
        if key not in fields:
            advice = _of_other_kinds(key, where, raw, kinds.get(section, {}))
            advice = advice or _advice(key, where, list(fields), root, kinds)
            raise ValueError(f"{_join(where, key)}: unknown field; {advice}")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        path, inner = _join(where, key), _dataclass_in(hints[key])
        if inner is not None and not (value is None and _optional(hints[key])):
            values[key] = convert(inner, value, path, kinds=kinds, root=root)
        else:
            values[key] = _leaf(hints[key], value, path, fields[key].default)
    return chosen(**values)


def field_names(section: Any, kinds: Kinds | None = None, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields below a dataclass, sections included, in order; a name may come twice."""
    kinds = kinds or {}
    for kind in kinds.get(section, {"": section}).values():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield prefix + field.name
            inner = _dataclass_in(hints[field.name])
            if inner is not None:
                yield from field_names(inner, kinds, f"{prefix}{field.name}.")


def _of_kind(section: type, raw: dict, where: str, kinds: Kinds) -> type:
    """The dataclass itself, or the one that the field `kind` names where there is a choice."""
    if section not in kinds:
        return section
    table = kinds[section]
    kind = raw.get("kind", next(iter(table)))
    if not isinstance(kind, str) or kind not in table:
        raise ValueError(f"{_join(where, 'kind')}: unknown value {kind}; use {_or(table)}")
    return table[kind]


def _leaf(hint: Any, value: Any, where: str, default: Any) -> Any:
    """A value that is no section, converted by msgspec; its complaints in our words."""
    unfit = _not_finite(value)
    try:
        if unfit:
            raise msgspec.ValidationError("not finite")
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        at = re.search(r"`\$([^`]*)`", str(error))
        steps = at.group(1) if at else ""
        for index in re.findall(r"\[(\d+)\]", steps):
            value, hint = value[int(index)], typing.get_args(_without_null(hint))[0]
        if _choices(hint) and isinstance(value, str):
            raise ValueError(f"{where}{steps}: unknown value {value}; use {_or(_words(hint))}") from None
        expected = "a finite number" if unfit else _or(_words(hint))
        todo = "give one" if default is dataclasses.MISSING else f"the default is {_plain(default)}"
        raise ValueError(f"{where}{steps}: expected {expected}, got {_shown(value)}; {todo}") from None


def _of_other_kinds(key: str, where: str, raw: dict, table: Mapping[str, Any]) -> str:
    """What to do about a field that only other kinds of the section have; nothing where they have not."""
    having = [name for name, kind in table.items() if key in [field.name for field in dataclasses.fields(kind)]]
    if not having:
        return ""
    kind = raw.get("kind", next(iter(table)))
    return f"{_join(where, 'kind')} is {kind}, and it goes with {_or(having)}; leave it out or change the kind"


def _advice(key: str, where: str, known: list[str], root: type, kinds: Kinds) -> str:
    """The nearest known name here, else where else the name exists, else all known names."""
    plain = {name.replace("_", ""): name for name in known}
    near = difflib.get_close_matches(re.sub(r"[-_ ]", "", str(key)).lower(), plain, n=1, cutoff=0.6)
    if near:
        return f"did you mean {plain[near[0]]}?"
    elsewhere = [name for name in field_names(root, kinds) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"{where} has {', '.join(known)}" if where else f"the sections are {', '.join(known)}"


def _dataclass_in(hint: Any) -> type | None:
    found = [
        part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)
    ]
    return found[0] if found else None


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _without_null(hint: Any) -> Any:
    """`X | None` -> X; other unions keep their list, which is the only part with items."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        lists = [part for part in parts if typing.get_origin(part) in (tuple, list)]
        return lists[0] if lists else parts[0]
    return hint


def _choices(hint: Any) -> bool:
    """Whether a type, or a part of a union, lists values."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return any(typing.get_origin(part) is Literal for part in (typing.get_args(hint) if union else (hint,)))


def _words(hint: Any) -> list[str]:
    """A type as alternatives in words: `int | None` -> [a whole number, null]."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(value) for value in args]
    if origin in (typing.Union, types.UnionType):
        return [word for part in args for word in _words(part)]
    if origin is typing.Annotated:
        limits = "".join(_range(meta) for meta in args[1:] if isinstance(meta, msgspec.Meta))
        return [_or(_words(args[0])) + limits]
    if origin in (tuple, list):
        return [f"a list (each {_or(_words(args[0]))})"]
    return [_NAMES.get(hint, getattr(hint, "__name__", str(hint)))]


def _range(meta: msgspec.Meta) -> str:
    """The limits of a number in words."""
    words = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
    parts = [f"{word} {getattr(meta, name)}" for name, word in words if getattr(meta, name) is not None]
    return " " + " and ".join(parts) if parts else ""


def _not_finite(value: Any) -> bool:
    if isinstance(value, list):
        return any(_not_finite(item) for item in value)
    return isinstance(value, float) and not math.isfinite(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"the text {value!r}" if isinstance(value, str) else _plain(value)


def _plain(value: Any) -> str:
    """A value as it stands in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return str(value)


def _todo(section: Any) -> str:
    return f"its fields are {', '.join(field.name for field in dataclasses.fields(section))}"


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _or(words: Any) -> str:
    *first, last = list(words)
    return f"{', '.join(first)} or {last}" if first else last
