"""The model section: a new architecture, or the shape of a directory."""

import dataclasses
import json

import pytest

from jaxlm.config import ModelSection, RunConfig, adopt, build, dump, load
from jaxlm.config.model import RopeSection
from jaxlm.nn.config import ModelConfig, MoEConfig, RopeConfig

DIRECTORY = ModelConfig(
    d_model=768, n_layers=2, n_heads=12, n_kv_heads=4, d_ff=1000, vocab_size=500, norm="layernorm", rope=RopeConfig(5e5)
)


def test_a_section_means_the_same_in_the_architecture():
    section = ModelSection(
        d_model=96, n_heads=None, head_dim=32, norm="layernorm", rope=RopeSection(5e5), moe=MoEConfig()
    )
    cfg = section.architecture(max_length=64, dropout=0.1)
    assert (cfg.H, cfg.G, cfg.K, cfg.F) == (3, 3, 32, 256)
    assert (cfg.rope.theta, cfg.max_length, cfg.dropout, cfg.moe) == (5e5, 64, 0.1, MoEConfig())
    own = {field.name for field in dataclasses.fields(ModelSection)} - {"path", "rope"}
    assert all(getattr(cfg, name) == getattr(section, name) for name in own)


def test_an_open_vocabulary_is_filled_and_a_given_one_kept():
    assert RunConfig().architecture(1000).V == 1000
    assert build({"model": {"vocab_size": 7}}).architecture(1000).V == 7


def test_the_base_is_the_model_with_fields_replaced_and_nulls_resolved_after():
    base = build({"model": {"d_model": 512, "n_heads": 8}, "mup": {"base": {"d_model": 128, "n_heads": 2}}}).mup_base(
        10
    )
    assert (base.D, base.H, base.G, base.K, base.F) == (128, 2, 2, 64, 384)
    assert RunConfig().mup_base() is None


def test_a_directory_fills_what_is_not_given():
    section = adopt(ModelSection(path="there", n_heads=12), frozenset({"model.path", "model.n_heads"}), DIRECTORY)
    assert (section.d_model, section.n_kv_heads, section.head_dim, section.rope) == (768, 4, None, RopeSection(5e5))
    assert section.architecture(max_length=DIRECTORY.max_length) == DIRECTORY


@pytest.mark.parametrize("field, value, theirs", [("d_model", 256, 768), ("n_kv_heads", 12, 4)])
def test_a_given_field_that_contradicts_the_directory_is_named(field, value, theirs):
    section = ModelSection(path="there", **{field: value})
    with pytest.raises(ValueError, match=rf"^model\.{field}: {value} contradicts {theirs} in there; remove"):
        adopt(section, frozenset({f"model.{field}"}), DIRECTORY)


def test_a_given_mixture_replaces_the_directorys_field_by_field():
    sparse = dataclasses.replace(DIRECTORY, moe=MoEConfig(experts=16, top_k=4))
    section = ModelSection(path="there", moe=MoEConfig(top_k=1))
    assert adopt(section, frozenset({"model.moe.top_k"}), sparse).moe == MoEConfig(experts=16, top_k=1)
    assert adopt(ModelSection(path="there"), frozenset(), sparse).moe == sparse.moe
    assert adopt(section, frozenset({"model.moe.top_k"}), DIRECTORY).moe == section.moe
    with pytest.raises(ValueError, match=r"^model\.moe\.experts: 8 contradicts 16 in there; remove the field"):
        adopt(section, frozenset({"model.moe.experts"}), sparse)


def test_a_factor_stretches_the_context_of_a_directory():
    section = ModelSection(path="there", rope=RopeSection(factor=4.0))
    rope = adopt(section, frozenset({"model.rope.factor"}), DIRECTORY).rope
    assert rope == RopeSection(theta=5e5, kind="yarn", factor=4.0, original_length=DIRECTORY.max_length)
    section = ModelSection(path="there", rope=RopeSection(kind="linear", factor=2.0))
    assert adopt(section, frozenset({"model.rope.factor", "model.rope.kind"}), DIRECTORY).rope.kind == "linear"


@pytest.fixture
def directory(tmp_path):
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 1000,
        "vocab_size": 500,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return tmp_path


def test_load_takes_the_shape_of_an_existing_directory(directory, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{path: {directory}, n_heads: 12}}\nmup: {{base: {{d_model: 384, n_heads: 6, n_kv_heads: 2}}}}"
    )
    config = load(path)
    assert (config.model.d_model, config.model.vocab_size, config.mup_base().K) == (768, 500, 64)
    path.write_text(dump(config))
    assert load(path) == config
    with pytest.raises(ValueError, match=r"model\.n_layers: 4 contradicts 2 in "):
        load(path, ["model.n_layers=4"])


def test_where_the_directory_is_missing_the_other_fields_hold():
    assert build({"model": {"path": "nowhere", "d_model": 64}}).architecture(10).D == 64
