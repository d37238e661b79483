"""Merging of model directories: mergekit's numbers by mergekit's recipes, what is refused and how, what is written."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

from jaxlm.cli import main
from jaxlm.interop import safetensors as safetensors_io
from jaxlm.interop.load import load, load_config
from jaxlm.interop.mergekit import PARAMETERS, make_recipe, read_recipe, unused, value
from jaxlm.interop.mergekit_models import split
from jaxlm.interop.mergekit_write import merge
from jaxlm.params.merge import REQUIRED

ROOT = pathlib.Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "mergekit"
MADE = json.loads((FIXTURES / "results.json").read_text())
RECIPES = sorted(path.stem for path in FIXTURES.joinpath("recipes").glob("*.yaml"))
RANDOM = {"dare_linear"}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def among_fixtures(monkeypatch):
    """Recipes name their models from the folder of the fixtures."""
    monkeypatch.chdir(FIXTURES)


def weights(directory, name="model.safetensors"):
    return safetensors.numpy.load_file(pathlib.Path(directory, name))


def config(directory):
    return json.loads(pathlib.Path(directory, "config.json").read_text())


def recipe(method="linear", **more):
    """Equal parts of `left` and `right`, over `base` where the method has one."""
    raw = {"merge_method": method, "models": [{"model": "parents/left"}, {"model": "parents/right"}]}
    raw |= {"parameters": {"weight": 0.5, "density": 0.6, "t": 0.5}} if "parameters" not in more else {}
    return make_recipe(raw | more, "recipe.yaml")


@pytest.mark.parametrize("name", sorted(set(RECIPES) - RANDOM))
def test_results_are_those_of_mergekit(name, tmp_path):
    merge(read_recipe(f"recipes/{name}.yaml"), tmp_path / "m")
    made, wanted = weights(tmp_path / "m"), weights("results", f"{name}.safetensors")
    assert made.keys() == wanted.keys()
    for key, x in wanted.items():
        assert made[key].dtype == x.dtype, key
        np.testing.assert_allclose(made[key].astype("f8"), x.astype("f8"), rtol=0, atol=1e-6, err_msg=key)
    said = MADE["config"][name] | {"dtype": str(wanted["model.norm.weight"].dtype)}
    assert {field: config(tmp_path / "m").get(field) for field in said} == said


def test_every_recipe_was_made_by_mergekit():
    assert not MADE["refused"] and set(MADE["config"]) == set(RECIPES)


def scales(made, base, other):
    """Of each tensor: what its kept differences were multiplied by, and where they were kept."""
    for name, x in made.items():
        delta, moved = other[name] - base[name], x - base[name]
        kept = np.abs(moved) > 1e-7
        yield name, delta, moved[kept] / delta[kept], kept


@pytest.mark.parametrize("whose", ["mergekit's", "ours"])
def test_dare_rescales_to_the_sum_of_magnitudes(whose, tmp_path):
    merge(read_recipe("recipes/dare_linear.yaml"), tmp_path / "m")
    made = weights(tmp_path / "m") if whose == "ours" else weights("results", "dare_linear.safetensors")
    held = total = 0
    for name, delta, factors, kept in scales(made, weights("parents/base"), weights("parents/left")):
        if kept.any():
            wanted = np.abs(delta).sum() / np.abs(delta[kept]).sum()
            np.testing.assert_allclose(factors, wanted, rtol=1e-2, err_msg=name)
            assert np.median(factors) == pytest.approx(wanted, rel=1e-4)
        held, total = held + kept.sum(), total + kept.size
    assert abs(held / total - 0.6) < 3 * np.sqrt(0.24 / total)


def test_draws_are_fixed_unless_a_seed_is_given(tmp_path):
    dare = read_recipe("recipes/dare_linear.yaml")
    for name, seed in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        merge(dare, tmp_path / name, **seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)
    kept = [
        (a[f"model.layers.{i}.mlp.up_proj.weight"] != weights("parents/base")[UP.replace("0", str(i))]) for i in (0, 1)
    ]
    assert not np.array_equal(*kept), "tensors of one shape have draws of their own"


def test_stacked_layers_keep_every_bit(tmp_path):
    raw = weights("parents/half")
    raw["model.layers.1.mlp.up_proj.weight"].view(np.uint16)[0, :3] = [0x7FC1, 0x0001, 0x8000]
    copy_with(tmp_path / "odd", "parents/half", raw)
    sources = [(str(tmp_path / "odd"), 0, 3), ("parents/half", 1, 3), (str(tmp_path / "odd"), 1, 2)]
    parts = [{"sources": [{"model": m, "layer_range": [a, b]}]} for m, a, b in sources]
    merge(make_recipe({"merge_method": "passthrough", "slices": parts}, "r"), tmp_path / "m")
    made = weights(tmp_path / "m")
    origin = [(m, i) for m, a, b in sources for i in range(a, b)]
    for place, (model, layer) in enumerate(origin):
        theirs = {k: x for k, x in weights(model).items() if f".layers.{layer}." in k}
        assert len(theirs) == 9
        for name, x in theirs.items():
            mine = made[name.replace(f".layers.{layer}.", f".layers.{place}.")]
            assert mine.dtype == ml_dtypes.bfloat16 and mine.tobytes() == x.tobytes()
    assert config(tmp_path / "m")["num_hidden_layers"] == 6
    cfg, _ = load(tmp_path / "m", "auto")
    assert cfg.n_layers == 6


def copy_with(out, parent, tensors=None, **fields):
    shutil.copytree(parent, out)
    if tensors is not None:
        safetensors.numpy.save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config(parent) | fields))
    return out


def test_shards_make_no_difference(tmp_path):
    tensors = weights("parents/left")
    shutil.copytree("parents/left", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    parts = [safetensors_io.Tensor(name, x.dtype, x.shape, x.copy) for name, x in tensors.items()]
    safetensors_io.write_directory(tmp_path / "cut", parts, 2000)
    assert len(list((tmp_path / "cut").glob("model-*"))) == 4
    for model in ("parents/left", str(tmp_path / "cut")):
        merge(recipe(models=[{"model": model}, {"model": "parents/right"}]), tmp_path / pathlib.Path(model).name / "m")
    whole, cut = weights(tmp_path / "left" / "m"), weights(tmp_path / "cut" / "m")
    assert all(np.array_equal(cut[name], x) for name, x in whole.items())


# A setting, the tensor, its place, and the value.
SETTINGS = [
    (0.3, "a.mlp.b", 0.5, 0.3),
    (2, "a.mlp.b", 0.5, 2.0),
    ("1e-1", "a.mlp.b", 0.5, 0.1),
    ([0, 1], "a.mlp.b", 0.25, 0.25),
    ([0, 1, 4], "a.mlp.b", 0.75, 2.5),
    ([5], "a.mlp.b", 0.75, 5.0),
    ([0, 1, 4], "a.mlp.b", 1.0, 4.0),
    ([{"filter": "attn", "value": 1}, {"filter": "mlp", "value": [2, 3]}, {"value": 9}], "a.mlp.b", 0.5, 2.5),
    ([{"filter": "mlp", "value": 1}, {"filter": "mlp.b", "value": 2}], "a.mlp.b", 0.5, 1.0),
    ([{"filter": "*", "value": 7}], "a.mlp.b", 0.5, 7.0),
    ({"filter": "mlp", "value": 7}, "a.mlp.b", 0.5, 7.0),
    ([{"filter": "attn", "value": 1}], "a.mlp.b", 0.5, 0.25),
    ([], "a.mlp.b", 0.5, 0.25),
]


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_a_setting_has_one_value_for_each_tensor(case):
    setting, name, t, wanted = SETTINGS[case]
    assert value(REQUIRED, [{}, {"weight": setting}, {"weight": 0.25}], "weight", name, t) == pytest.approx(wanted)


def test_truths_step_along_a_list():
    scope = [{"normalize": [True, False, "yes"]}]
    assert [value(False, scope, "normalize", "x", t) for t in (0, 0.49, 0.5, 1)] == [True, True, False, True]


def test_names_have_one_layer():
    assert split("model.layers.12.mlp.experts.3.w1.weight") == ("model.layers.{}.mlp.experts.3.w1.weight", 12)
    assert split("h.0.attn.c_attn.bias") == ("h.{}.attn.c_attn.bias", 0)
    assert split("model.embed_tokens.weight") == ("model.embed_tokens.weight", None)


TWO = "models: [{model: parents/left}, {model: parents/right}]\n"
REFUSED = {
    "near key": ("merge_methd: linear\n" + TWO, "merge_methd: unknown key; did you mean merge_method?"),
    "near key, deep": (
        "merge_method: linear\nmodels: [{modle: parents/left}]\n",
        r"models\[0\]: modle: unknown key; did you mean model?",
    ),
    "far key": ("merge_method: linear\nzzz: 1\n" + TWO, "zzz: unknown key; the keys are merge_method, base_model"),
    "near method": ("merge_method: tias\n" + TWO, "'tias' is unknown; did you mean ties?"),
    "other method": (
        "merge_method: model_stock\n" + TWO,
        "model_stock is not done here; the methods are linear, slerp",
    ),
    "no method": (TWO, "merge_method: missing; the methods are linear"),
    "near parameter": (
        "merge_method: ties\nbase_model: parents/base\nparameters: {densty: 0.5}\n" + TWO,
        "parameters: densty: unknown key; did you mean density?",
    ),
    "text for a number": (
        "merge_method: linear\nparameters: {weight: much}\n" + TWO,
        "parameters.weight: 'much' is not a number",
    ),
    "number for a truth": ("merge_method: linear\nparameters: {normalize: 3}\n" + TWO, "3 is neither true nor false"),
    "no value": (
        "merge_method: linear\nparameters: {weight: [{filter: mlp}]}\n" + TWO,
        "parameters.weight: .* is no condition",
    ),
    "base missing": ("merge_method: ties\n" + TWO, "base_model: missing; ties needs one"),
    "three for slerp": (
        "merge_method: slerp\nbase_model: parents/base\n" + TWO,
        "3 models .*; slerp takes exactly 2",
    ),
    "two for passthrough": ("merge_method: passthrough\n" + TWO, "passthrough takes exactly 1"),
    "models and slices": ("merge_method: linear\nslices: [{sources: []}]\n" + TWO, "exactly one of models, slices"),
    "neither": ("merge_method: linear\n", "exactly one of models, slices and modules is needed, got 0"),
    "range": (
        "merge_method: passthrough\nslices: [{sources: [{model: parents/left, layer_range: [2, 1]}]}]\n",
        r"layer_range: \[2, 1\] is no range",
    ),
    "range too long": (
        "merge_method: passthrough\nslices: [{sources: [{model: parents/left, layer_range: [0, 4]}]}]\n",
        r"parents/left: layer_range: \[0, 4\] exceeds its 3 layers",
    ),
    "unequal ranges": (
        "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: parents/left, layer_range: [0, 1]},"
        " {model: parents/right, layer_range: [0, 2]}]}]\n",
        "sources have different numbers of layers",
    ),
    "base not in a slice": (
        "merge_method: ties\nbase_model: parents/base\n"
        "slices: [{sources: [{model: parents/left, layer_range: [0, 3]}]}]\n",
        "base_model: parents/base is not among the sources",
    ),
    "twice": (
        "merge_method: linear\nmodels: [{model: parents/left}, {model: parents/left}]\n",
        "parents/left stands here twice",
    ),
    "key twice": (
        "merge_method: linear\nmerge_method: ties\n" + TWO,
        "recipe.yaml:2: .*merge_method stands here twice",
    ),
    "no YAML": ("merge_method: [\n", r"recipe.yaml:2: not valid YAML"),
    "weight missing": ("merge_method: linear\n" + TWO, "parents/left: weight: missing for model.embed_tokens.weight"),
    "dtype": (
        "merge_method: linear\ndtype: float23\n" + TWO,
        "dtype: 'float23' is unknown; the known ones are float32",
    ),
    "tokens": (
        "merge_method: linear\ntokenizer: {source: base, tokens: {a: {source: parents/left}}}\n" + TWO,
        "tokenizer.tokens",
    ),
    "two tokenizers": (
        "merge_method: linear\ntokenizer_source: base\ntokenizer: {source: base}\n" + TWO,
        "tokenizer_source and tokenizer: both",
    ),
    "modules": ("merge_method: linear\nmodules: {vision: {}}\n", "modules: only one, named default"),
    "no model": ("merge_method: linear\nmodels: [{model: parents/none}]\n", "parents/none: no such directory"),
    "template": (
        "merge_method: linear\nparameters: {weight: 1}\nchat_template: chatml\n" + TWO,
        "chat_template: 'chatml'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(name, tmp_path):
    text, said = REFUSED[name]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        merge(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], "nothing is left behind"


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path):
    held = weights("parents/right")
    short = copy_with(tmp_path / "short", "parents/right", {k: x for k, x in held.items() if k != UP})
    narrow = copy_with(tmp_path / "narrow", "parents/right", held | {UP: held[UP][:5].copy()})
    for model, said in ((short, f"short: {UP}: no such tensor"), (narrow, rf"{UP}: shapes differ .*\[5, 8\]")):
        models = [{"model": "parents/left"}, {"model": str(model)}]
        for order in (models, models[::-1]):
            with pytest.raises(ValueError, match=said):
                merge(recipe(models=order), tmp_path / "m")
    embedding = "model.embed_tokens.weight"
    few = copy_with(tmp_path / "few", "parents/right", held | {embedding: held[embedding][:20].copy()})
    with pytest.raises(ValueError, match=rf"{embedding}: shapes differ .*few: \[20, 8\].*set tokenizer_source"):
        merge(recipe(models=[{"model": "parents/left"}, {"model": str(few)}]), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_models_that_cannot_go_together_are_refused(tmp_path):
    deep = copy_with(tmp_path / "deep", "parents/right", num_hidden_layers=4)
    other = copy_with(tmp_path / "kind", "parents/right", model_type="mistral")
    small = copy_with(tmp_path / "small", "parents/right", quantization_config={"quant_method": "bitsandbytes"})
    for model, said in (
        (deep, "deep: 3 layers of weights, but config.json says num_hidden_layers 4"),
        (other, "model_type differs .*mistral"),
        (small, "quantization_config: quantised models cannot be merged"),
    ):
        with pytest.raises(ValueError, match=said):
            merge(recipe(models=[{"model": "parents/left"}, {"model": str(model)}]), tmp_path / "m")
    fewer = {k: x for k, x in weights("parents/right").items() if ".layers.2." not in k}
    shallow = copy_with(tmp_path / "shallow", "parents/right", fewer, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"numbers of layers differ \(parents/left 3, .*shallow 2\)"):
        merge(recipe(models=[{"model": "parents/left"}, {"model": str(shallow)}]), tmp_path / "m")


def test_lists_with_an_entry_a_layer_go_along_with_the_layers(tmp_path):
    kinds = ["sliding_attention", "full_attention", "chunked_attention"]
    model = copy_with(tmp_path / "a", "parents/left", layer_types=kinds)
    parts = [{"sources": [{"model": str(model), "layer_range": list(r)}]} for r in ((0, 2), (1, 3))]
    merge(make_recipe({"merge_method": "passthrough", "slices": parts}, "r"), tmp_path / "m")
    assert config(tmp_path / "m")["layer_types"] == [kinds[i] for i in (0, 1, 1, 2)]


def test_a_head_that_one_model_ties_and_another_does_not_is_written(tmp_path):
    merge(recipe(models=[{"model": "parents/tied"}, {"model": "parents/left"}]), tmp_path / "m")
    made, tied, left = (weights(d) for d in (tmp_path / "m", "parents/tied", "parents/left"))
    wanted = 0.5 * (tied["model.embed_tokens.weight"] + left["lm_head.weight"])
    np.testing.assert_allclose(made["lm_head.weight"], wanted, atol=1e-6)
    assert not config(tmp_path / "m")["tie_word_embeddings"]
    merge(recipe(models=[{"model": "parents/tied"}]), tmp_path / "t")
    assert "lm_head.weight" not in weights(tmp_path / "t") and load_config(tmp_path / "t").tie_embeddings


def test_numbers_in_double_precision_keep_it(tmp_path):
    merge(recipe("ties", base_model="parents/base", dtype="float64"), tmp_path / "m")
    made = weights(tmp_path / "m")
    assert made[UP].dtype == np.float64 and np.any(made[UP] != made[UP].astype("f4"))


def test_vocabularies_are_put_in_one_order(tmp_path):
    merge(read_recipe("recipes/vocabulary_union.yaml"), tmp_path / "u")
    assert config(tmp_path / "u")["vocab_size"] == 32
    words = json.loads((tmp_path / "u" / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in words["added_tokens"]}
    assert added["u"] == 22 and added["v"] == 23
    merge(recipe(models=[{"model": "parents/other"}, {"model": "parents/left"}], tokenizer_source="parents/left"),
          tmp_path / "l")  # fmt: skip
    assert (tmp_path / "l" / "tokenizer.json").read_bytes() == pathlib.Path("parents/left/tokenizer.json").read_bytes()
    assert config(tmp_path / "l")["vocab_size"] == 22


def test_the_tokenizer_and_its_template_come_from_the_base_model(tmp_path):
    for name in "ab":
        copy_with(tmp_path / name, "parents/left")
        (tmp_path / name / "chat_template.jinja").write_text(f"{{{{ {name} }}}}")
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    merge(recipe(models=models, base_model=str(tmp_path / "b")), tmp_path / "m")
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "{{ b }}"
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == pathlib.Path("parents/left/tokenizer.json").read_bytes()
    merge(recipe(models=models, chat_template="{{ c }}"), tmp_path / "c")
    assert json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["chat_template"] == "{{ c }}"
    assert not (tmp_path / "c" / "chat_template.jinja").exists()


def adapter(folder, seed, rank=2, alpha=4, modules=("self_attn.q_proj", "mlp.up_proj"), **fields):
    """A PEFT directory for `parents/base`, and what it adds to each weight."""
    rng, base = np.random.default_rng(seed), weights("parents/base")
    tensors, effects = {}, {}
    for i in range(3):
        for module in modules:
            name = f"model.layers.{i}.{module}"
            wide, high = base[f"{name}.weight"].shape
            a, b = rng.standard_normal((rank, high), "float32"), rng.standard_normal((wide, rank), "float32")
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            scale = alpha / (rank**0.5 if fields.get("use_rslora") else rank)
            effects[f"{name}.weight"] = scale * (b @ a)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [m.split(".")[1] for m in modules],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
    return effects


def effects_of(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = weights(folder, "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = module.removeprefix("base_model.model.")
            rank = settings["rank_pattern"].get(weight.replace(".", r"\."), settings["r"])
            assert (
                a.shape[0] == rank == settings["alpha_pattern"].get(weight.replace(".", r"\."), settings["lora_alpha"])
            )
            found[f"{weight}.weight"] = tensors[f"{module}.lora_B.weight"] @ a
    return found


def test_a_model_with_an_adapter_is_a_model(tmp_path):
    effects = adapter(tmp_path / "one", 0, use_rslora=True)
    merge(recipe(models=[{"model": f"parents/base+{tmp_path / 'one'}"}, {"model": "parents/left"}]), tmp_path / "m")
    made, base, left = (weights(d) for d in (tmp_path / "m", "parents/base", "parents/left"))
    for name, x in made.items():
        np.testing.assert_allclose(x, 0.5 * (base[name] + effects.get(name, 0) + left[name]), atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("method", "more", "parts"),
    [
        ("linear", {}, (0.5, 0.5)),
        ("linear", {"parameters": {"weight": 0.4, "normalize": False}}, (0.4, 0.4)),
        ("task_arithmetic", {"base_model": "parents/base"}, (0.5, 0.5)),
        ("task_arithmetic", {"base_model": "one", "parameters": {"weight": 0.3, "lambda": 2}}, (0.4, 0.6)),
    ],
    ids=["mean", "sum", "over the model", "over an adapter"],
)
def test_sums_of_adapters_are_adapters(method, more, parts, tmp_path, monkeypatch):
    one = adapter(tmp_path / "one", 0)
    two = adapter(tmp_path / "two", 1, rank=3, modules=("mlp.up_proj", "mlp.down_proj"))
    (tmp_path / "parents").symlink_to(FIXTURES / "parents")
    monkeypatch.chdir(tmp_path)
    merge(recipe(method, models=[{"model": "one"}, {"model": "two"}], **more), tmp_path / "m")
    made = effects_of(tmp_path / "m")
    assert made.keys() == one.keys() | two.keys()
    for name, x in made.items():
        wanted = parts[0] * one.get(name, 0) + parts[1] * two.get(name, 0)
        np.testing.assert_allclose(x, wanted, atol=1e-5, err_msg=name)


def test_other_merges_of_adapters_are_the_nearest_adapter(tmp_path):
    one, two = adapter(tmp_path / "one", 0), adapter(tmp_path / "two", 1)
    models = [{"model": str(tmp_path / name)} for name in ("one", "two")]
    merge(recipe("ties", models=models, base_model="parents/base"), tmp_path / "m")
    whole = [{"model": f"parents/base+{tmp_path / name}"} for name in ("one", "two")]
    merge(recipe("ties", models=whole, base_model="parents/base"), tmp_path / "w")
    base, merged = weights("parents/base"), weights(tmp_path / "w")
    for name, x in effects_of(tmp_path / "m").items():
        exact = merged[name] - base[name]
        left_out = np.linalg.svd(exact, compute_uv=False)[4:]
        assert np.linalg.norm(x - exact) == pytest.approx(np.linalg.norm(left_out), rel=1e-3, abs=1e-5)
    assert one.keys() == two.keys() == effects_of(tmp_path / "m").keys()


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    adapter(tmp_path / "plain", 0)
    adapter(tmp_path / "dora", 1, use_dora=True)
    plain, dora = str(tmp_path / "plain"), str(tmp_path / "dora")
    for models, said in (
        ([plain, dora], "dora/adapter_config.json: use_dora"),
        ([plain, "parents/left"], r"parents/left is a model, .*plain an adapter; write the adapter as BASE\+.*plain"),
        ([f"parents/base+{dora}"], "use_dora"),
        (["parents/base+parents/left"], r"expected model\+adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            merge(recipe(models=[{"model": model} for model in models]), tmp_path / "m")


def test_distances_are_those_of_the_weights(tmp_path):
    found = merge(recipe("linear"), tmp_path / "m").sums
    made, left, right = (weights(d) for d in (tmp_path / "m", "parents/left", "parents/right"))
    assert set(found) == {"embeddings", 0, 1, 2, "head"}
    names = [name for name in made if ".layers.1." in name]

    def squared(a, b):
        return sum(np.sum(np.square(a[name] - b[name])) for name in names)

    wanted = {
        ("parents/left", "result"): squared(left, made),
        ("parents/right", "result"): squared(right, made),
        ("parents/right", "parents/left"): squared(right, left),
        ("result", "result"): sum(np.sum(np.square(made[name])) for name in names),
    }
    for pair, distance in wanted.items():
        assert found[1][pair] == pytest.approx(distance, rel=1e-4)


def test_the_command_writes_model_and_report(tmp_path, capsys):
    assert main(["merge", "recipes/ties.yaml", str(tmp_path / "m")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'm'}\n" and "merging 0/30" in said.err
    assert (tmp_path / "m" / "mergekit_config.yml").read_text() == pathlib.Path("recipes/ties.yaml").read_text()
    page = (tmp_path / "m" / "merge_report.html").read_text()
    assert "http" not in page and "<script" not in page and "parents/right to result" in page
    numbers = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert [one["layer"] for one in numbers["layers"]] == ["embeddings", 0, 1, 2, "head"]
    assert all(0 < d["relative"] < 3 for one in numbers["layers"] for d in one["distances"])
    assert load(tmp_path / "m")[0].n_layers == 3
    assert main(["merge", "recipes/ties.yaml", str(tmp_path / "m")]) == 0, "a model directory is replaced"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["merge", "recipes/ties.yaml", str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_parameters_of_other_methods_are_passed_over_with_a_word(tmp_path, capsys):
    text = "merge_method: linear\nparameters: {weight: 1, density: 0.5}\n" + TWO
    (tmp_path / "r.yaml").write_text(text)
    assert unused(read_recipe(tmp_path / "r.yaml")) == ["density"]
    assert main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "m")]) == 0
    assert "parameters.density: linear has no such parameter" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.joinpath("configs").glob("merge_*.yaml")), ids=lambda p: p.stem)
def test_our_recipes_start_from_runs_and_name_the_one_that_is_missing(path, tmp_path, capsys, monkeypatch):
    made = read_recipe(path)
    names = {one for model in (*made.models, made.donor) for one in model.split("+")}
    assert all(name.startswith("runs/") for name in names)
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(path), f"runs/{path.stem}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("jaxlm: error: runs/quickstart: no such directory")
    assert path.read_text().startswith("#") and f"jaxlm merge configs/{path.name} runs/{path.stem}" in path.read_text()
    assert not list(tmp_path.iterdir())


def test_anchors_and_references_of_yaml_are_read(tmp_path):
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: &p {weight: 1e-1}}\n- {model: b, parameters: *p}\n"
    (tmp_path / "r.yaml").write_text(text)
    read = read_recipe(tmp_path / "r.yaml")
    assert value(REQUIRED, [read.slices[0].sources[1].parameters], "weight", "x", 0) == 0.1
    assert set(PARAMETERS) >= {"weight", "density", "normalize", "lambda", "t", "int8_mask"}
    assert yaml.safe_load(text)["models"][1]["parameters"] == {"weight": "1e-1"}
