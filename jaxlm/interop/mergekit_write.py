"""Merging model directories tensor by tensor: what each tensor of the result is made of, making it, writing it.

Tensors are known by the names in their files alone, so models of every family can be merged. At any time one tensor of
each model is in memory.
"""

import contextlib
import functools
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.interop import safetensors
from jaxlm.interop.directory import refuse_occupied, replacement, write_json
from jaxlm.interop.mergekit import Recipe, Slice, value
from jaxlm.interop.mergekit_models import Parent, Stored, layer_count, open_parent, split
from jaxlm.interop.mergekit_tokens import Vocabulary, vocabulary
from jaxlm.interop.safetensors import Tensor
from jaxlm.interop.save import SHARD_SIZE, TOKENIZER_FILES
from jaxlm.params import merge as methods

HEADS = ("lm_head.weight",)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Endings of names of the input embedding; a model without a head of its own has it for its head too."""
VOCABULARY = (*EMBEDDINGS, *HEADS, "lm_head.bias", "embed_out.weight")
"""Endings of names of tensors with a row for each token."""

COMPARED = 1 << 20
"""Entries at a time, where tensors are compared."""

_BEFORE = re.compile(r"(^|\.)(embed\w*(?<!embed_out)|wte|wpe|word_embeddings\w*|tok_embeddings)(\.|$)")

Progress = Callable[[int, int, str], None]
"""Told how many tensors are done, of how many, and which one is next."""


class Input(NamedTuple):
    """A tensor of one model that goes into a tensor of the result: the source's place in its slice, name, tensor."""

    source: int
    name: str
    tensor: Stored


class Output(NamedTuple):
    """A tensor of the result.

    Attributes:
      name: in the result. layer: in the result; None outside of layers.
      part: the slice that it belongs to. inputs: what it is made of.
      t: place in the slice, from 0 to 1, which gradients are read at.
    """

    name: str
    layer: int | None
    part: Slice
    inputs: tuple[Input, ...]
    t: float


def merge(recipe: Recipe, out: str | Path, *, seed: int = 0, progress: Progress | None = None) -> "Distances":
    """Merge the models of a recipe into a model directory.

    The result has the tokenizer and the configuration of the base model (without one, of the first model), with the
    number of layers, dtype and vocabulary that it has got. Nothing is written before all inputs are found to fit.

    Args:
      recipe: see `mergekit.read_recipe`.
      out: the directory to make; a model directory there is replaced.
      seed: of the random methods.
      progress: told about every tensor.

    Returns:
      How far the models are from each other and from the result, by layer.

    Raises:
      FileNotFoundError, ValueError: naming the model and the tensor or field at fault.
    """
    out = Path(out)
    refuse_occupied(out)
    names = dict.fromkeys((*recipe.models, recipe.donor))
    parents = {name: open_parent(name) for name in names}
    if any(parent.is_adapter for parent in parents.values()):
        from jaxlm.interop.mergekit_adapters import merge_adapters

        return merge_adapters(recipe, parents, out, seed, progress)
    _check_kind(parents)
    words = vocabulary(recipe, parents)
    outputs = plan(recipe, parents)
    if words is not None:
        outputs = [_in_order(one, words, recipe) for one in outputs]
    for one in outputs:
        _check_fit(one, words is not None)
    distances = Distances(recipe)
    key = jax.random.key(seed)
    made = functools.partial(make, recipe, key, distances)
    tensors = _tensors(recipe, outputs, made, progress)
    donor = parents[recipe.donor]
    with replacement(out) as temporary, _wide_enough(recipe, outputs):
        config = _config(recipe, parents, outputs, tensors)
        write_json(temporary / "config.json", config | ({"vocab_size": words.size} if words else {}))
        _copy_files(donor.directory, temporary)
        if words is not None:
            words.write(temporary)
        _set_chat_template(recipe, parents, temporary)
        safetensors.write_directory(temporary, tensors, SHARD_SIZE)
    return distances


def plan(recipe: Recipe, parents: Mapping[str, Parent]) -> list[Output]:
    """Every tensor of the result, in order.

    What precedes the layers comes from the first slice's models, what follows them from the last one's.

    Raises:
      ValueError: a model has too few layers, or lacks a tensor.
    """
    first, last = recipe.slices[0], recipe.slices[-1]
    outputs = _outside(recipe, first, parents, before=True)
    offset = 0
    for part in recipe.slices:
        ranges = [_range(source.layers, parents[source.model]) for source in part.sources]
        lengths = {stop - start for start, stop in ranges}
        if len(lengths) > 1:
            counts = ", ".join(
                f"{s.model} {stop - start}" for s, (start, stop) in zip(part.sources, ranges, strict=True)
            )
            raise ValueError(f"models: numbers of layers differ ({counts}); give slices with equal layer_range")
        length = lengths.pop()
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            layers = [start + i for start, _ in ranges]
            outputs += _layer(part, parents, layers, offset + i, t)
        offset += length
    return outputs + _outside(recipe, last, parents, before=False)


class Distances:
    """Squared distances, summed over the tensors of each layer.

    `sums[layer][a, b]` is `|a - b|^2`, where a and b are models of the recipe or RESULT, and `sums[layer][a, a]` is
    `|a|^2`; `layer` is an index, or BEFORE or AFTER.
    """

    RESULT, BEFORE, AFTER = "result", "embeddings", "head"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sums: dict[int | str, dict[tuple[str, str], float]] = {}

    def add(self, one: Output, tensors: Sequence[np.ndarray], result: np.ndarray) -> None:
        """Take in a tensor: what it was made of, and what it became."""
        layer = one.layer if one.layer is not None else self.BEFORE if _is_before(one.name) else self.AFTER
        sums = self.sums.setdefault(layer, {})
        models = [one.part.sources[i.source].model for i in one.inputs]
        base = one.part.base or self.recipe.base
        first = models.index(base) if base in models else 0
        flat = [x.reshape(-1) for x in (*tensors, result)]
        for start in range(0, flat[0].size, COMPARED):
            *parts, merged = (x[start : start + COMPARED].astype(np.float32) for x in flat)
            pairs = {(self.RESULT, self.RESULT): merged}
            for model, part in zip(models, parts, strict=True):
                pairs |= {(model, self.RESULT): part - merged, (model, model): part}
                if model != models[first]:
                    pairs[model, models[first]] = part - parts[first]
            for pair, difference in pairs.items():
                sums[pair] = sums.get(pair, 0.0) + float(np.dot(difference, difference))


def _check_kind(parents: Mapping[str, Parent]) -> None:
    kinds = {name: str(parent.config.get("model_type")) for name, parent in parents.items()}
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ValueError(f"models: model_type differs ({named}); only models of one family can be merged")


def _is_before(name: str) -> bool:
    return _BEFORE.search(name) is not None


def _outside(recipe: Recipe, part: Slice, parents: Mapping[str, Parent], before: bool) -> list[Output]:
    """Tensors outside of layers: embeddings (`before`), or what follows the layers."""
    names = [
        name
        for source in part.sources
        for name in parents[source.model].tensors
        if split(name)[1] is None and _is_before(name) == before
    ]
    ordered = dict.fromkeys(names)
    return [
        Output(name, None, part, tuple(_find(i, name, name, part, parents) for i in range(len(part.sources))), 0.0)
        for name in ordered
    ]


def _layer(part: Slice, parents: Mapping[str, Parent], layers: Sequence[int], place: int, t: float) -> list[Output]:
    """One layer of the result, from layer `layers[i]` of the slice's source i."""
    tables = [_by_layer(parents[source.model]) for source in part.sources]
    templates = dict.fromkeys(
        name for table, layer in zip(tables, layers, strict=True) for name in table.get(layer, ())
    )
    outputs = []
    for template in templates:
        name = template.format(place)
        inputs = [_find(i, template.format(layer), name, part, parents) for i, layer in enumerate(layers)]
        outputs.append(Output(name, place, part, tuple(inputs), t))
    return outputs


@functools.lru_cache(maxsize=64)
def _layers_of(names: tuple[str, ...]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for template, layer in map(split, names):
        if layer is not None:
            found.setdefault(layer, []).append(template)
    return found


def _by_layer(parent: Parent) -> dict[int, list[str]]:
    """Names of a model's tensors by layer, with `{}` for it."""
    return _layers_of(tuple(parent.tensors))


def _find(source: int, name: str, made: str, part: Slice, parents: Mapping[str, Parent]) -> Input:
    parent = parents[part.sources[source].model]
    if name in parent.tensors:
        return Input(source, name, parent.tensors[name])
    if name.endswith(HEADS):
        shared = next((key for key in parent.tensors if key.endswith(EMBEDDINGS)), None)
        if shared is not None:
            return Input(source, name, parent.tensors[shared])
    raise ValueError(f"{parent.directory}: {name}: no such tensor, but another model has it; {made} cannot be made")


def _range(layers: tuple[int, int] | None, parent: Parent) -> tuple[int, int]:
    if layers is None:
        return 0, parent.layers
    if layers[1] > parent.layers:
        raise ValueError(f"{parent.name}: layer_range: {list(layers)} exceeds its {parent.layers} layers; shorten it")
    return layers


def _check_fit(one: Output, arranged: bool) -> None:
    shapes = {i.tensor.shape for i in one.inputs}
    models = [one.part.sources[i.source].model for i in one.inputs]
    if len(shapes) > 1:
        named = ", ".join(f"{m}: {list(i.tensor.shape)}" for m, i in zip(models, one.inputs, strict=True))
        rows = one.name.endswith(VOCABULARY) and not arranged and len({shape[1:] for shape in shapes}) == 1
        advice = "; set tokenizer_source (base or union) to put them in one order" if rows else "; they must be equal"
        raise ValueError(f"{one.inputs[0].name}: shapes differ ({named}){advice}")


def _in_order(one: Output, words: Vocabulary, recipe: Recipe) -> Output:
    """The output with the rows of all inputs in the order of the result's vocabulary."""
    if not one.name.endswith(VOCABULARY):
        return one
    models = [one.part.sources[i.source].model for i in one.inputs]
    base = one.part.base or recipe.base
    dtype = _dtype(recipe, one)
    arranged = words.arrange(models, [i.tensor for i in one.inputs], base, dtype)
    inputs = tuple(i._replace(tensor=tensor) for i, tensor in zip(one.inputs, arranged, strict=True))
    return one._replace(inputs=inputs)


def _dtype(recipe: Recipe, one: Output) -> np.dtype:
    """What the inputs are converted to: the recipe's dtype, else the one that all of them fit in."""
    found = functools.reduce(jnp.promote_types, [i.tensor.dtype for i in one.inputs])
    return np.dtype(jnp.dtype(recipe.dtype)) if recipe.dtype and _is_float(found) else np.dtype(found)


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


@contextlib.contextmanager
def _wide_enough(recipe: Recipe, outputs: Sequence[Output]) -> Iterator[None]:
    """JAX's 64-bit mode, where anything is float64."""
    if any(_dtype(recipe, one) == np.float64 for one in outputs):
        with jax.enable_x64(True):
            yield
    else:
        yield


def _tensors(
    recipe: Recipe, outputs: Sequence[Output], make: Callable[[Output], np.ndarray], progress: Progress | None
) -> list[Tensor]:
    done: list[str] = []

    def tell(one: Output) -> np.ndarray:
        if progress is not None:
            progress(len(done), len(outputs), one.name)
        done.append(one.name)
        return make(one)

    tensors = []
    for one in outputs:
        dtype = _dtype(recipe, one)
        if recipe.out_dtype and _is_float(dtype):
            dtype = np.dtype(jnp.dtype(recipe.out_dtype))
        tensors.append(Tensor(one.name, dtype, one.inputs[0].tensor.shape, functools.partial(tell, one)))
    return tensors


def make(recipe: Recipe, key: jax.Array, distances: Distances, one: Output) -> np.ndarray:
    """The tensor itself, in the dtype that it is written in."""
    dtype = _dtype(recipe, one)
    tensors = [i.tensor.view().astype(dtype, copy=False) for i in one.inputs]
    if not _is_float(dtype):
        if any(not np.array_equal(x, tensors[0]) for x in tensors[1:]):
            raise ValueError(f"{one.name}: whole numbers that differ between the models cannot be merged")
        return tensors[0]
    method = methods.METHODS[recipe.method]
    models = [one.part.sources[i.source].model for i in one.inputs]
    base = one.part.base or recipe.base
    shared, each = parameters(recipe, one, method)
    if recipe.method == "passthrough" and each[0]["scale"] is None:
        result = tensors[0]
    else:
        shared["key"] = jax.random.fold_in(key, zlib.crc32(one.name.encode()))
        place = models.index(base) if base in models else None
        arrays = [jnp.asarray(x) for x in tensors]
        result = np.asarray(methods.merge(recipe.method, arrays, place, shared, each))
    distances.add(one, tensors, result)
    return result.astype(np.dtype(jnp.dtype(recipe.out_dtype)), copy=False) if recipe.out_dtype else result


def parameters(recipe: Recipe, one: Output, method: methods.Method) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters of the merge and of each input, for one tensor."""
    wider = (one.part.parameters, *recipe.settings)
    shared = {name: value(default, wider, name, one.name, one.t) for name, default in method.shared.items()}
    base = (one.part.base or recipe.base) if method.base else None
    each = []
    for i in one.inputs:
        source = one.part.sources[i.source]
        scopes = (source.parameters, *wider)
        # Without parameters of its own the base needs no weight either.
        known = {} if source.model == base else method.each
        try:
            each.append({name: value(default, scopes, name, i.name, one.t) for name, default in known.items()})
        except ValueError as error:
            raise ValueError(f"{source.model}: {error}") from None
    return shared, each


def _config(
    recipe: Recipe, parents: Mapping[str, Parent], outputs: Sequence[Output], tensors: Sequence[Tensor]
) -> dict[str, Any]:
    """config.json of the result: the donor's, with what has changed."""
    donor = parents[recipe.donor]
    config = dict(donor.config)
    field, before = layer_count(config) or ("num_hidden_layers", donor.layers)
    sources = [(p.sources[0].model, *_range(p.sources[0].layers, parents[p.sources[0].model])) for p in recipe.slices]
    origin = [(model, i) for model, start, stop in sources for i in range(start, stop)]
    for name, given in config.items():
        # One entry a layer, as layer_types has.
        if isinstance(given, list) and len(given) == before and name != "architectures":
            lists = {model: parents[model].config.get(name) or [] for model, _ in origin}
            if all(i < len(lists[model]) for model, i in origin):
                config[name] = [lists[model][i] for model, i in origin]
    config[field] = len(origin)
    if config.get("tie_word_embeddings") and any(one.name.endswith(HEADS) for one in outputs):
        config["tie_word_embeddings"] = False
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.size
    dtype = max(sizes, key=lambda name: sizes[name])
    return config | {"dtype": dtype, "torch_dtype": dtype}


def _copy_files(source: Path, out: Path) -> None:
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _set_chat_template(recipe: Recipe, parents: Mapping[str, Parent], out: Path) -> None:
    if recipe.chat_template is None:
        return
    text = recipe.chat_template
    if text == "auto":
        found = [template for parent in parents.values() if (template := _chat_template(parent.directory))]
        if not found:
            return
        text = max(found, key=found.count)
    elif "{" not in text:
        raise ValueError(f"chat_template: {text!r} is no template; give its text, or auto for that of most models")
    file = out / "tokenizer_config.json"
    config = safetensors.read_json(file) if file.is_file() else {}
    file.write_text(json.dumps(config | {"chat_template": text}, indent=2) + "\n")
    (out / "chat_template.jinja").unlink(missing_ok=True)


def _chat_template(directory: Path) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8").strip()
    file = directory / "tokenizer_config.json"
    given = safetensors.read_json(file).get("chat_template") if file.is_file() else None
    return given.strip() if isinstance(given, str) else None
