"""mergekit's recipes: which models, by which method, and the value of each parameter for each tensor.

The format, its defaults and its precedences are those of mergekit 0.1.5. What is unknown is refused, with the nearest
known name; what mergekit knows and this package does not is refused by name.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlm.params.merge import METHODS, REQUIRED

ELSEWHERE = (
    "arcee_fusion",
    "della",
    "della_linear",
    "karcher",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "ram",
    "ramplus_tl",
    "sce",
)
"""Methods of mergekit that are not done here."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

PARAMETERS = {name: default for one in METHODS.values() for name, default in {**one.shared, **one.each}.items()}
"""Parameters of any method, with their defaults."""

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)

Settings = Mapping[str, Any]
"""Parameters as they stand in a recipe: scalars, gradients, or lists of conditions."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that goes into a part of the result.

    Attributes:
      model: a directory, or `directory+adapter`.
      layers: first layer, and the one after the last; None: all.
      parameters: its own settings.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result: the models that they are made of, the base model, settings."""

    sources: tuple[Source, ...]
    base: str | None = None
    parameters: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The vocabulary of the result: `base`, `union` or a model's; rows of embeddings are put in its order."""

    source: str
    multiple: int | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole merge.

    Attributes:
      method: a name of `params.merge.METHODS`.
      slices: in the order of the layers.
      base: the base model, where one is named.
      settings: of the module and of the whole merge, the narrower first.
      dtype: that inputs are converted to; None: the one that all of them fit in.
      out_dtype: of the result; None: as it comes out.
      tokens: None: every model has the same vocabulary.
      chat_template: text of a template, or `auto`; None: as the base model's.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    settings: tuple[Settings, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokens: Tokens | None = None
    chat_template: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, in the order of the recipe."""
        named = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys(named))

    @property
    def donor(self) -> str:
        """The model that configuration and tokenizer are taken from: the base, else the first."""
        return self.base or self.models[0]


class _Reader(yaml.SafeLoader):
    """PyYAML's rules, as in mergekit, but no key twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
      FileNotFoundError, ValueError: `file:line` for what is no YAML, else `file: key`, what is wrong and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a merge recipe")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML, {error.problem}; mend the line") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML, {' '.join(str(error).split())}; mend the text") from None
    return make_recipe(raw, str(path))


def make_recipe(raw: Any, where: str) -> Recipe:
    """The recipe in plain mappings and lists; `where` begins the messages."""
    _known(raw, TOP, where)
    method = _method(raw.get("merge_method"), f"{where}: merge_method")
    forms = [form for form in ("models", "slices", "modules") if raw.get(form)]
    if len(forms) != 1:
        raise ValueError(f"{where}: exactly one of models, slices and modules is needed, got {len(forms)}")
    module, scopes = raw, [_parameters(raw, where)]
    if forms == ["modules"]:
        where, module = f"{where}: modules.default", _only_module(raw["modules"], where)
        scopes.insert(0, _parameters(module, where))
    base = _model(raw["base_model"], f"{where}: base_model") if raw.get("base_model") else None
    if module.get("slices"):
        slices = tuple(_slice(one, f"{where}: slices[{i}]") for i, one in enumerate(_items(module, "slices", where)))
    else:
        slices = (_whole(_items(module, "models", where), base, where),)
    recipe = Recipe(
        method,
        slices,
        base,
        tuple(scopes),
        _dtype(raw, "dtype", where),
        _dtype(raw, "out_dtype", where),
        _tokens(raw, where),
        _text(raw, "chat_template", where),
    )
    for i, part in enumerate(slices):
        _check_inputs(recipe, part, f"{where}: slices[{i}]" if module.get("slices") else f"{where}: models")
    return recipe


def unused(recipe: Recipe) -> list[str]:
    """Parameters that a recipe gives and its method does not have; they are passed over, as in mergekit."""
    scopes = [*recipe.settings, *(part.parameters for part in recipe.slices)]
    scopes += [source.parameters for part in recipe.slices for source in part.sources]
    method = METHODS[recipe.method]
    return sorted({name for scope in scopes for name in scope} - {*method.shared, *method.each})


def value(default: Any, scopes: Iterable[Settings], name: str, tensor: str, t: float) -> Any:
    """The value of parameter `name` for one tensor: from the first scope that has one for it, else the default.

    A list of numbers is a gradient: `t` in [0, 1] walks along it, linearly between its points. A list of mappings
    holds conditions: the value of the first whose `filter` is part of the tensor's name, or which has none or `*`.

    Raises:
      ValueError: no scope has a value and there is no default; or a value is no number or no truth.
    """
    convert = _truth if isinstance(default, bool) else _number
    for scope in scopes:
        if name in scope and (found := _evaluate(scope[name], tensor, t, convert)) is not None:
            return found
    if default is REQUIRED:
        raise ValueError(f"{name}: missing for {tensor}; give it under parameters")
    return default


def _evaluate(setting: Any, tensor: str, t: float, convert: Callable[[Any], Any]) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return convert(setting)
    if not setting:
        return None
    if isinstance(setting[0], Mapping):
        fitting = (one for one in setting if one.get("filter") in (None, "*") or one["filter"] in tensor)
        chosen = next(fitting, None)
        return None if chosen is None else _evaluate(chosen["value"], tensor, t, convert)
    points = [convert(one) for one in setting]
    place = t * (len(points) - 1)
    low = int(place)
    if isinstance(points[0], bool):
        return points[low]
    share = place - low
    return (1 - share) * points[low] + share * points[min(len(points) - 1, low + 1)]


def _number(given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        raise ValueError(f"{given!r} is not a number") from None


def _truth(given: Any) -> bool:
    text = str(int(given) if isinstance(given, float) and given.is_integer() else given).lower()
    if text not in TRUTHS:
        raise ValueError(f"{given!r} is neither true nor false")
    return TRUTHS[text]


def _method(given: Any, where: str) -> str:
    if given in METHODS:
        return str(given)
    if given in ELSEWHERE:
        raise ValueError(f"{where}: {given} is not done here; the methods are {', '.join(METHODS)}")
    if given is None:
        raise ValueError(f"{where}: missing; the methods are {', '.join(METHODS)}")
    near = difflib.get_close_matches(str(given), [*METHODS, *ELSEWHERE], n=1)
    advice = f"did you mean {near[0]}?" if near else f"the methods are {', '.join(METHODS)}"
    raise ValueError(f"{where}: {given!r} is unknown; {advice}")


def _only_module(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or list(raw) != ["default"]:
        raise ValueError(f"{where}: modules: only one, named default, can be merged; language models have no other")
    module = raw["default"]
    _known(module, ("models", "slices", "parameters"), f"{where}: modules.default")
    if bool(module.get("models")) == bool(module.get("slices")):
        raise ValueError(f"{where}: modules.default: exactly one of models and slices is needed")
    return module


def _whole(items: Sequence[Any], base: str | None, where: str) -> Slice:
    """All layers of all models, the base among them (last, where the recipe does not list it)."""
    sources = []
    for i, one in enumerate(items):
        here = f"{where}: models[{i}]"
        _known(one, ("model", "parameters"), here)
        sources.append(Source(_model(one.get("model"), f"{here}.model"), None, _parameters(one, here)))
    if base is not None and base not in [source.model for source in sources]:
        sources.append(Source(base))
    return Slice(tuple(sources), base)


def _slice(raw: Any, where: str) -> Slice:
    _known(raw, ("sources", "base_model", "parameters", "residual_weight"), where)
    if raw.get("residual_weight") is not None:
        raise ValueError(f"{where}.residual_weight: has no effect in mergekit either; remove it")
    sources = []
    for i, one in enumerate(_items(raw, "sources", where)):
        here = f"{where}.sources[{i}]"
        _known(one, ("model", "layer_range", "parameters"), here)
        layers = one.get("layer_range")
        numbers = isinstance(layers, list) and len(layers) == 2 and all(type(x) is int for x in layers)
        if not numbers or not 0 <= layers[0] < layers[1]:
            raise ValueError(f"{here}.layer_range: {layers!r} is no range; write [first, one after the last]")
        sources.append(Source(_model(one.get("model"), f"{here}.model"), tuple(layers), _parameters(one, here)))
    if len({source.layers[1] - source.layers[0] for source in sources if source.layers}) > 1:
        raise ValueError(f"{where}: layer_range: sources have different numbers of layers; they must be equal")
    base = _model(raw["base_model"], f"{where}.base_model") if raw.get("base_model") else None
    return Slice(tuple(sources), base, _parameters(raw, where))


def _check_inputs(recipe: Recipe, part: Slice, where: str) -> None:
    method, name = METHODS[recipe.method], recipe.method
    models = [source.model for source in part.sources]
    base = part.base or recipe.base
    if twice := [model for model in models if models.count(model) > 1]:
        raise ValueError(f"{where}: {twice[0]} stands here twice; a model can go into a slice once")
    if method.base and base is None:
        raise ValueError(f"{where}: base_model: missing; {name} needs one")
    if method.base and base not in models:
        raise ValueError(f"{where}: base_model: {base} is not among the sources; {name} needs it there")
    if not method.least <= len(models) <= (method.most or len(models)):
        wanted = f"exactly {method.most}" if method.least == method.most else f"at most {method.most}"
        raise ValueError(f"{where}: {len(models)} models ({', '.join(models)}); {name} takes {wanted}")


def _known(raw: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected a mapping with {', '.join(names)}, got {raw!r}")
    for name in raw:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}"
            raise ValueError(f"{where}: {name}: unknown key; {advice}")


def _items(raw: Mapping[str, Any], name: str, where: str) -> list[Any]:
    items = raw.get(name)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}.{name}: expected a list, got {items!r}; see the examples in configs/merge_*.yaml")
    return items


def _text(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    given = raw.get(name)
    if given is not None and (not isinstance(given, str) or not given):
        raise ValueError(f"{where}: {name}: expected text, got {given!r}")
    return given


def _model(given: Any, where: str) -> str:
    if isinstance(given, dict) and set(given) <= {"path", "model", "lora"}:
        name = given.get("path") or _model(given.get("model"), where)
        return f"{name}+{_model(given['lora'], where)}" if given.get("lora") else name
    if not isinstance(given, str) or not given:
        raise ValueError(f"{where}: expected the path of a model, got {given!r}")
    return given


def _dtype(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    given = _text(raw, name, where)
    plain = given.removeprefix("torch.") if given else None
    if plain is not None and plain not in DTYPES:
        raise ValueError(f"{where}: {name}: {given!r} is unknown; the known ones are {', '.join(DTYPES)}")
    return plain


def _tokens(raw: Mapping[str, Any], where: str) -> Tokens | None:
    source, table = raw.get("tokenizer_source"), raw.get("tokenizer")
    if source and table:
        raise ValueError(f"{where}: tokenizer_source and tokenizer: both are given; keep one")
    if source:
        return Tokens(_model(source, f"{where}: tokenizer_source"))
    if not table:
        return None
    _known(table, ("source", "tokens", "pad_to_multiple_of"), f"{where}: tokenizer")
    if table.get("tokens"):
        raise ValueError(f"{where}: tokenizer.tokens: choosing rows of single tokens is not done here; leave it out")
    multiple = table.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise ValueError(f"{where}: tokenizer.pad_to_multiple_of: {multiple!r} is no whole number from 1 up")
    return Tokens(_model(table.get("source") or "union", f"{where}: tokenizer.source"), multiple)


def _parameters(raw: Mapping[str, Any], where: str) -> Settings:
    given = raw.get("parameters") or {}
    _known(given, tuple(PARAMETERS), f"{where}: parameters")
    for name, setting in given.items():
        convert = _truth if isinstance(PARAMETERS[name], bool) else _number
        try:
            _check_setting(setting, convert)
        except ValueError as error:
            raise ValueError(f"{where}: parameters.{name}: {error}; see the examples in configs/merge_*.yaml") from None
    return given


def _check_setting(setting: Any, convert: Callable[[Any], Any]) -> None:
    conditions = [setting] if isinstance(setting, dict) else setting if isinstance(setting, list) else []
    if any(isinstance(one, dict) for one in conditions):
        for one in conditions:
            if not isinstance(one, dict) or "value" not in one or set(one) - {"value", "filter"}:
                raise ValueError(f"{one!r} is no condition; write {{filter: part of a name, value: ...}}")
            _check_setting_value(one["value"], convert)
    else:
        _check_setting_value(setting, convert)


def _check_setting_value(setting: Any, convert: Callable[[Any], Any]) -> None:
    for one in setting if isinstance(setting, list) else [setting]:
        if isinstance(one, dict):
            raise ValueError(f"{one!r} is neither a number nor a list of numbers")
        convert(one)
