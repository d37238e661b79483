"""Models with a score head: the same scores as transformers, there and back, whatever the padding."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm.interop.load import load, load_config
from jaxlm.interop.save import save
from jaxlm.nn import transformer
from jaxlm.nn.compute import Compute
from jaxlm.objectives.reward import fresh_score, score_head, scores
from jaxlm.params import axes

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"vocab_size": 41, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
FAMILIES = {"Llama": SHAPE, "Qwen2": SHAPE, "GPT2": GPT2}
SIZES = [9, 3, 6]
TOKENS = [np.random.default_rng(i).integers(1, 41, size).tolist() for i, size in enumerate(SIZES)]


@functools.cache
def peer(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], num_labels=1)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


def their_scores(model):
    longest = max(SIZES)
    ids = torch.tensor([x + [0] * (longest - len(x)) for x in TOKENS])
    mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in TOKENS])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].numpy()


def our_scores(cfg, variables, left=0, right=0):
    length = max(SIZES) + left + right
    rows = np.zeros((2, len(TOKENS), length), np.int32)
    positions = np.zeros((len(TOKENS), length), np.int32)
    for i, ids in enumerate(TOKENS):
        # Padding between the rows' ends differs from row to row, and its ids are those of words.
        place = slice(left, left + len(ids))
        rows[:, i] = 7
        rows[1, i] = 0
        rows[0, i, place], rows[1, i, place] = ids, 1
        positions[i, place] = np.arange(len(ids))
    inputs = {"positions": jnp.asarray(positions), "segments": jnp.asarray(rows[1])}
    output = transformer.apply(cfg, variables, jnp.asarray(rows[0]), compute=Compute(scan=False), **inputs)
    return np.asarray(scores(output, score_head(variables)["kernel"], inputs["segments"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_in_both_directions(family, tmp_path):
    peer(family).save_pretrained(tmp_path / "theirs")
    cfg, variables = load(tmp_path / "theirs")
    wanted = their_scores(peer(family))
    assert variables["params"]["score"]["kernel"].shape == (16, 1) and "unembed" not in variables["params"]
    assert load_config(tmp_path / "theirs") == cfg
    np.testing.assert_allclose(our_scores(cfg, variables), wanted, atol=1e-5)
    save(tmp_path / "ours", cfg, variables)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert back.config.num_labels == 1
    np.testing.assert_allclose(their_scores(back), wanted, atol=1e-6)


@pytest.mark.parametrize("left, right", [(0, 4), (3, 0), (2, 5)])
def test_a_score_does_not_depend_on_padding(left, right, tmp_path):
    peer("Llama").save_pretrained(tmp_path)
    cfg, variables = load(tmp_path)
    np.testing.assert_allclose(our_scores(cfg, variables, left, right), our_scores(cfg, variables), atol=1e-6)


def test_a_language_model_with_a_head_added_is_written_without_its_own(tmp_path):
    torch.manual_seed(1)
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, eos_token_id=0))
    language.save_pretrained(tmp_path / "base")
    cfg, variables = load(tmp_path / "base")
    assert not cfg.tie_embeddings
    params = {**variables["params"], "score": fresh_score(cfg.D, jax.random.key(0))}
    save(tmp_path / "scored", cfg, {"params": params})
    written = json.loads((tmp_path / "scored" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    # transformers finds the last token by the padding's id, which must not be the end of the text.
    assert written["pad_token_id"] not in (None, written["eos_token_id"])
    again, loaded = load(tmp_path / "scored")
    kept = {**params, "unembed": None}
    del kept["unembed"]
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], kept)
    np.testing.assert_allclose(our_scores(again, loaded), our_scores(cfg, {"params": params}), atol=1e-6)


def test_a_model_without_a_head_is_named(tmp_path):
    with pytest.raises(ValueError, match="score/kernel"):
        score_head({"params": {"embed": {}}})
    peer("Llama").save_pretrained(tmp_path)
    _, variables = load(tmp_path)
    assert axes.roles(variables["params"])["score/kernel"].kind == "output"
