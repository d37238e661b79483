"""Model directories: what is read however it is cut and named, what is refused and how, what is written."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxlm import tree
from jaxlm.dist import mesh as meshes
from jaxlm.dist import rules
from jaxlm.interop import hf, names
from jaxlm.interop import load as loading
from jaxlm.interop import safetensors as ours
from jaxlm.interop.load import load, load_config
from jaxlm.interop.save import save
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.nn.config import ModelConfig, MoEConfig, RopeConfig

CFG = ModelConfig(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=31, eos_token_id=2)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)


def model(cfg, seed=0):
    """Parameters with every leaf random."""
    rng = np.random.default_rng(seed)
    leaves = {p: 0.3 * rng.standard_normal(leaf.shape, "float32") for p, leaf in names.abstract(cfg).items()}
    return {"params": names.nest({p: jnp.asarray(x + p.endswith("scale")) for p, x in leaves.items()})}


VARIABLES = model(CFG)


@pytest.fixture
def directory(tmp_path):
    """A model directory of CFG."""
    save(tmp_path / "m", CFG, VARIABLES)
    return tmp_path / "m"


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logits(cfg, variables):
    compute = Compute(attention="reference", scan=False)
    return np.asarray(jax.jit(lambda v: transformer.logits(cfg, v, TOKENS, compute=compute))(variables))


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- the format, against the safetensors package -----------------------------------------------------------------

ARRAYS = {
    "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
    "odd": np.arange(5, dtype=np.int8),
    "bf16": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "half": np.ones((1, 2, 3), np.float16),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "flag": np.array([True, False]),
}


def test_format_is_that_of_the_package(tmp_path):
    tensors = [ours.Tensor(n, a.dtype, a.shape, lambda a=a: a) for n, a in ARRAYS.items()]
    ours.write(tmp_path / "a.safetensors", tensors)
    theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    safetensors.numpy.save_file(ARRAYS, tmp_path / "b.safetensors")
    mine = {n: e.view() for n, e in ours.read_header(tmp_path / "b.safetensors").items()}
    for name, array in ARRAYS.items():
        for got in (theirs[name], mine[name]):
            assert got.dtype == array.dtype and got.shape == array.shape
            np.testing.assert_array_equal(got, array)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


HEADERS = {
    "not json": (b"{nope", "not a JSON object"),
    "not an object": (b"[1]", "not a JSON object"),
    "unknown dtype": ({"w": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}, "w: dtype 'F7'"),
    "wrong span": ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "w: offsets span 8"),
    "beyond the end": ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "w: ends 8 bytes after"),
    "negative shape": ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "w: header entry"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "w: header entry"),
    "gap": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "w: follows a gap"),
    "overlap": (
        {
            "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        "w: overlaps",
    ),
    "rest": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes after the last tensor"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_broken_header_is_refused_as_the_package_does(name, tmp_path):
    header, message = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        ours.read_header(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(file)


@pytest.mark.parametrize("length", [1 << 62, 200_000_000, 17])
def test_oversized_header_is_refused_before_it_is_read(length, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=f"header of {length} bytes"):
        ours.read_header(file)


# --- reading ------------------------------------------------------------------------------------------------------


def test_save_then_load_is_the_identity(directory):
    cfg, variables = load(directory)
    equal(variables, VARIABLES)
    assert hf.canonical(dataclasses.replace(CFG, family="llama")) == cfg
    assert tree.leaves(variables).keys() == tree.leaves(VARIABLES).keys()


def test_shards_hold_the_same_bits(directory):
    save(directory.parent / "s", CFG, VARIABLES, shard_size=3000)
    files = sorted(p.name for p in (directory.parent / "s").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((directory.parent / "s" / "model.safetensors.index.json").read_text())
    whole = tensors_of(directory)
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    assert all((directory.parent / "s" / name).stat().st_size < 6000 for name in files)
    equal(load(directory.parent / "s")[1], VARIABLES)


def test_backbone_names_and_buffers_are_understood(directory):
    tensors = {n.removeprefix("model."): a for n, a in tensors_of(directory).items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    rewrite(directory, tensors)
    equal(load(directory)[1], VARIABLES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_files(dtype, directory):
    """Widened exactly, or kept bit by bit; written back, the file is the same."""
    low = {n: a.astype(dtype) for n, a in tensors_of(directory).items()}
    rewrite(directory, low)
    cfg, wide = load(directory)
    assert {str(x.dtype) for x in jax.tree.leaves(wide)} == {"float32"}
    equal(wide, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype("float32"), VARIABLES))
    equal(load(directory, dtype="auto")[1], load(directory, dtype=dtype)[1])
    cfg, kept = load(directory, dtype=dtype)
    assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {dtype}
    save(directory.parent / "again", cfg, kept)
    equal(tensors_of(directory.parent / "again"), low)
    assert json.loads((directory.parent / "again" / "config.json").read_text())["dtype"] == dtype


def test_tied_file_with_a_head(directory):
    """An equal one is dropped; a different one is kept, apart, with a warning."""
    tensors = tensors_of(directory)
    rewrite(directory, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    cfg, variables = load(directory)
    assert cfg.tie_embeddings
    equal(variables, VARIABLES)
    head = tensors["model.embed_tokens.weight"] + 1
    rewrite(directory, tensors | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match=r"lm_head.weight: differs"):
        cfg, variables = load(directory)
    assert not cfg.tie_embeddings
    with pytest.warns(UserWarning):
        assert load_config(directory) == cfg
    np.testing.assert_array_equal(variables["params"]["unembed"]["kernel"], head.T)


def test_tied_file_with_the_name_of_the_head_alone(directory):
    tensors = tensors_of(directory)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    rewrite(directory, tensors)
    equal(load(directory)[1], VARIABLES)


def test_leaves_keep_the_widest_stored_dtype(directory):
    tensors = tensors_of(directory)
    tensors = {n: a if "norm" in n or ".1.mlp.up" in n else a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}
    rewrite(directory, tensors)
    wide = {p for p, x in tree.leaves(load(directory, dtype="auto")[1]["params"]).items() if x.dtype == np.float32}
    assert wide == {"layers/attn/norm/scale", "layers/mlp/norm/scale", "norm/scale", "layers/mlp/up/kernel"}


def test_ends_of_generation_config(directory):
    assert load_config(directory).eos_token_id == 2
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 2, 7]}')
    assert load_config(directory).eos_token_id == (2, 5, 7)
    (directory / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_config(directory).eos_token_id == 9


def test_run_directory_is_read_through_its_export(directory):
    run = directory.parent / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {}\n")
    with pytest.raises(FileNotFoundError, match="no exported model yet"):
        load(run)
    directory.rename(run / "hf")
    equal(load(run)[1], VARIABLES)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}, None])
def test_loading_onto_a_mesh(sizes, tmp_path, monkeypatch):
    """Every leaf lies as the rules say, whether it was put together on the host or piece by piece on its devices."""
    cfg = dataclasses.replace(
        CFG, vocab_size=32, moe=MoEConfig(experts=4, d_ff=16, dense_layers=(1,)), qk_norm="head", n_kv_heads=4
    )
    variables = model(cfg)
    save(tmp_path / "m", cfg, variables)
    mesh = meshes.make(meshes.MeshConfig(**{"data": 1} | sizes)) if sizes else None
    for small in (loading.SMALL, 0):
        monkeypatch.setattr(loading, "SMALL", small)
        _, got = load(tmp_path / "m", mesh=mesh)
        equal(got, variables)
        if mesh is not None:
            wanted = tree.leaves(rules.shardings(variables["params"], mesh))
            for path, leaf in tree.leaves(got["params"]).items():
                assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path


# --- refusing -----------------------------------------------------------------------------------------------------


def _drop(directory, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(directory, tensors)


def _add(directory, tensors):
    rewrite(directory, tensors | {"model.layers.1.mlp.extra.weight": np.ones(3, np.float32)})


def _transpose(directory, tensors):
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(directory, tensors | {name: np.ascontiguousarray(tensors[name].T)})


def _integers(directory, tensors):
    name = "model.layers.2.mlp.down_proj.weight"
    rewrite(directory, tensors | {name: tensors[name].astype(np.int8)})


def _truncate(directory, tensors):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _heads(directory, tensors):
    edit_config(directory, num_attention_heads=2)


def _json(directory, tensors):
    (directory / "config.json").write_text('{"model_type":\n "llama",')


def _unknown(directory, tensors):
    edit_config(directory, model_type="megalodon", architectures=["MegalodonForCausalLM"])


def _pickle(directory, tensors):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def _nothing(directory, tensors):
    (directory / "model.safetensors").unlink()


def _sharded(directory, change):
    save(directory, CFG, VARIABLES, shard_size=3000)
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(directory, index["weight_map"])
    file.write_text(json.dumps(index))


def _shard_missing(directory, tensors):
    _sharded(directory, lambda d, where: (d / sorted(set(where.values()))[1]).unlink())


def _shard_elsewhere(directory, tensors):
    _sharded(directory, lambda d, where: where.update({"model.norm.weight": "../../secret.safetensors"}))


def _shard_twice(directory, tensors):
    def change(d, where):
        first, last = sorted(set(where.values()))[0], sorted(set(where.values()))[-1]
        (d / last).write_bytes((d / first).read_bytes())

    _sharded(directory, change)


def _index_broken(directory, tensors):
    _sharded(directory, lambda d, where: None)
    (directory / "model.safetensors.index.json").write_text("{]")


def _index_empty(directory, tensors):
    _sharded(directory, lambda d, where: None)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def _generation(directory, tensors):
    (directory / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')


BROKEN = {
    _drop: (ValueError, "missing model.layers.1.mlp.up_proj.weight;"),
    _add: (ValueError, "unexpected model.layers.1.mlp.extra.weight;"),
    _transpose: (
        ValueError,
        r"model.safetensors: model.layers.2.mlp.down_proj.weight: shape \[24, 16\], but .*\[16, 24\]",
    ),
    _integers: (ValueError, "model.layers.2.mlp.down_proj.weight: dtype int8 is no float"),
    _truncate: (ValueError, r"model.safetensors: model\.\S+: ends 5 bytes after"),
    _heads: (ValueError, r"model.safetensors: model.layers.0.self_attn.q_proj.weight: shape \[16, 16\]"),
    _json: (ValueError, "config.json:2: not valid JSON"),
    _unknown: (ValueError, "config.json: model_type: 'megalodon' is unknown; the known ones are llama, mistral"),
    _pickle: (ValueError, "pytorch_model.bin: pickled weights"),
    _nothing: (FileNotFoundError, "model.safetensors: no such file"),
    _shard_missing: (FileNotFoundError, "model-00002-of-.*safetensors: no such file"),
    _shard_elsewhere: (ValueError, "weight_map: '../../secret.safetensors' is not a file name"),
    _shard_twice: (ValueError, r"model-\d+-of-\d+.safetensors: model.embed_tokens.weight: also in model-00001"),
    _index_broken: (ValueError, "index.json:1: not valid JSON"),
    _index_empty: (ValueError, "index.json: weight_map: not a table"),
    _generation: (ValueError, "generation_config.json: eos_token_id: "),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_malformed_directory_is_refused_in_one_line(damage, directory):
    damage(directory, tensors_of(directory))
    kind, message = BROKEN[damage]
    with pytest.raises(kind, match=message) as caught:
        load(directory)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_words_of_load_are_checked(directory):
    for arguments, word in (({"dtype": "int3"}, "int3"), ({"quantize": "nf3"}, "nf3")):
        with pytest.raises(ValueError, match=word):
            load(directory, **arguments)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(directory / "nowhere")


# --- writing ------------------------------------------------------------------------------------------------------


def test_directory_is_replaced_whole_or_not_at_all(directory, monkeypatch):
    (directory / "stale.txt").write_text("old")
    other = model(CFG, seed=1)
    monkeypatch.setattr(ours, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(directory, CFG, other)
    equal(load(directory)[1], VARIABLES)
    monkeypatch.undo()
    save(directory, CFG, other)
    equal(load(directory)[1], other)
    assert not (directory / "stale.txt").exists()
    assert [p.name for p in directory.parent.iterdir()] == [directory.name]
    (directory.parent / "home").mkdir()
    (directory.parent / "home" / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match="home: not empty and no model directory"):
        save(directory.parent / "home", CFG, other)


def test_tree_that_does_not_fit_is_refused(tmp_path):
    for cfg, word in (
        (dataclasses.replace(CFG, tie_embeddings=False), "unembed/kernel"),
        (dataclasses.replace(CFG, d_ff=32), "layers/mlp/gate/kernel: shape"),
    ):
        with pytest.raises(ValueError, match=word):
            save(tmp_path / "m", cfg, VARIABLES)
    assert not any(tmp_path.iterdir())


MOE = MoEConfig(experts=2, top_k=1, d_ff=8)
FITS = {
    "llama": {"tie_embeddings": False, "head_dim": 6, "norm_eps": 1e-3, "rope": RopeConfig(kind="yarn", factor=2.0)},
    "mistral": {"window": 3},
    "qwen2": {"qkv_bias": True, "window": 3, "layer_types": ("full", "sliding")},
    "qwen3": {"qk_norm": "head", "qkv_bias": True, "o_bias": True},
    "olmo2": {"qk_norm": "projection", "norm_placement": "post"},
    "phi3": {"rope": RopeConfig(partial=0.5)},
    "gpt2": {
        "n_kv_heads": 4, "norm": "layernorm", "positions": "learned", "gated": False, "activation": "gelu_tanh",
        "qkv_bias": True, "o_bias": True, "mlp_bias": True,
    },
    "stablelm": {"norm": "layernorm"},
    "gemma2": {
        "norm_placement": "both", "norm_offset": True, "embed_scale": 4.0, "window": 3, "attention_softcap": 9.0,
        "activation": "gelu_tanh", "layer_types": ("full", "sliding"),
    },
    "mixtral": {"moe": MOE},
    "qwen3_moe": {"moe": dataclasses.replace(MOE, dense_layers=(0,), renormalize=False), "qk_norm": "head"},
    "olmoe": {"moe": MOE, "qk_norm": "projection", "clip_qkv": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("family", FITS)
def test_new_models_find_a_family(family, tmp_path):
    """A model made here is written as the family that has its features, and comes back as it was."""
    cfg = dataclasses.replace(CFG, **FITS[family])
    variables = model(cfg)
    save(tmp_path / "m", cfg, variables)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == family
    again, got = load(tmp_path / "m")
    equal(got, variables)
    assert hf._differences(hf.canonical(again), hf.canonical(cfg)) == []


UNFIT = {
    "parallel_residual": True,
    "residual": False,
    "positions": "none",
    "norm_offset": True,
    "logit_softcap": 3.0,
    "gated": False,
    "moe": dataclasses.replace(MOE, renormalize=False),
}


@pytest.mark.parametrize("field", UNFIT)
def test_model_without_a_family_names_the_field(field):
    with pytest.raises(ValueError, match=rf"model\.{field}.*no Hugging Face family"):
        hf.choose(dataclasses.replace(CFG, **{field: UNFIT[field]}))


MUP = {"logits_multiplier": 0.5, "attention_multiplier": 0.3, "residual_multiplier": 0.7}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mixtral", "olmo2"])
def test_mup_scalars_are_multiplied_into_weights(family, tmp_path):
    """Biases, offset norms and normalised queries included: the export computes what the model did."""
    cfg = dataclasses.replace(CFG, **FITS[family], **MUP)
    variables = model(cfg)
    save(tmp_path / "m", cfg, variables)
    again, got = load(tmp_path / "m")
    assert again.logits_multiplier == again.attention_multiplier == again.residual_multiplier == 1
    np.testing.assert_allclose(logits(again, got), logits(cfg, variables), atol=2e-5)
    moved = [p for p, x in tree.leaves(got).items() if not np.array_equal(x, tree.leaves(variables)[p])]
    assert 3 <= len(moved) <= 10


def test_a_model_that_no_family_can_express_is_kept_in_our_own_form(tmp_path):
    shape = {"d_model": 16, "n_layers": 3, "n_heads": 2, "vocab_size": 33, "norm": "layernorm"}
    odd = ModelConfig(**shape, parallel_residual=True, logit_softcap=9.0, moe=MoEConfig(experts=4, dense_layers=(1,)))
    variables = model(odd)
    with pytest.raises(ValueError, match="no Hugging Face family"):
        save(tmp_path / "refused", odd, variables)
    save(tmp_path / "kept", odd, variables, own_form=True)
    cfg, again = load(tmp_path / "kept")
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    want = transformer.logits(odd, variables, TOKENS)
    np.testing.assert_array_equal(want, transformer.logits(cfg, again, TOKENS))
