"""Generation against transformers, token for token, and what must not change a row: padding, neighbours, chunks."""

import dataclasses
import functools
import tempfile

import jax
import numpy as np
import pytest
import torch
import transformers

import jaxlm
from jaxlm.decode import batch, loop
from jaxlm.decode.generation import chunks, sample
from jaxlm.decode.sampling import Choice
from jaxlm.nn.config import ModelConfig, RopeConfig
from jaxlm.nn.kernels.attention import AttentionMask, choose

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 83, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "initializer_range": 0.6,
}  # fmt: skip
PEERS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, eos_token_id=[5, 7]),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE, eos_token_id=5, sliding_window=6, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=None
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=83, n_embd=16, n_layer=2, n_head=2, n_positions=96, eos_token_id=5, bos_token_id=1,
        initializer_range=0.6,
    ),
}  # fmt: skip
PROMPTS = [np.random.default_rng(n).integers(8, 83, n).tolist() for n in (1, 9, 14)]


@functools.cache
def pair(name: str):
    """A random checkpoint of a family in transformers and here."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(PEERS[name]()).eval()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        cfg, variables = jaxlm.load(directory)
    return model, cfg, loop.prepare(cfg, variables)


def expected(model, prompts, **settings) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)[:, width:].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in out]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_equals_transformers(name, penalty):
    model, cfg, variables = pair(name)
    want = expected(model, PROMPTS, max_new_tokens=24, repetition_penalty=penalty)
    got = jaxlm.generate(cfg, variables, PROMPTS, max_new_tokens=24, repetition_penalty=penalty)
    assert got == want
    assert len({tuple(row) for row in got}) == 3


def test_a_row_ends_with_its_end_token():
    _, cfg, variables = pair("llama")
    plain = jaxlm.generate(dataclasses.replace(cfg, eos_token_id=None), variables, PROMPTS, max_new_tokens=24)
    assert [len(row) for row in plain] == [24] * 3
    end = plain[1][3]
    first = plain[1].index(end)
    ended = jaxlm.generate(dataclasses.replace(cfg, eos_token_id=(81, end)), variables, PROMPTS, max_new_tokens=24)
    assert ended[1] == plain[1][: first + 1]
    for row, whole in zip(ended, plain, strict=True):
        assert row == whole[: len(row)]


def test_stops_of_one_and_of_several_tokens():
    _, cfg, variables = pair("llama")
    cfg = dataclasses.replace(cfg, eos_token_id=None)
    plain = jaxlm.generate(cfg, variables, PROMPTS[:1], max_new_tokens=24)[0]
    pair_of = plain[10:12]
    where = next(i for i in range(23) if plain[i : i + 2] == pair_of)
    assert jaxlm.generate(cfg, variables, PROMPTS[:1], max_new_tokens=24, stop=[pair_of])[0] == plain[: where + 2]
    assert jaxlm.generate(cfg, variables, PROMPTS[:1], max_new_tokens=24, stop=[plain[0]])[0] == plain[:1]


CHOICE = Choice(temperature=1.2, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=4)


def test_rows_keep_their_tokens_beside_others_and_in_chunks():
    _, cfg, variables = pair("llama")
    together = sample(cfg, variables, PROMPTS, 20, CHOICE)
    alone = sample(cfg, variables, PROMPTS[:1], 20, CHOICE)
    n = alone.lengths[0]
    assert together.lengths[0] == n
    np.testing.assert_array_equal(together.ids[0, :n], alone.ids[0, :n])
    *parts, whole = chunks(cfg, variables, PROMPTS, 20, CHOICE, size=4)
    np.testing.assert_array_equal(whole.ids[:, : together.ids.shape[1]], together.ids)
    assert [part.ids.shape[1] for part in parts][:3] == [1, 5, 9]


def test_equal_prompts_are_independent_draws_of_a_seed():
    _, cfg, variables = pair("llama")
    run = functools.partial(jaxlm.generate, cfg, variables, [PROMPTS[1]] * 3, max_new_tokens=20, temperature=1.3)
    first = run(seed=1)
    assert first == run(seed=1)
    assert len({tuple(row) for row in first}) == 3
    assert first != run(seed=2)


def test_log_probabilities_are_those_of_the_model():
    _, cfg, variables = pair("llama")
    found = sample(cfg, variables, PROMPTS, 12, CHOICE)
    for row, prompt in enumerate(PROMPTS):
        n = int(found.lengths[row])
        text = prompt + found.ids[row, :n].tolist()
        tokens = np.array([text + [0] * (32 - len(text))], np.int32)
        scores = jaxlm.logits(cfg, variables, tokens)[0] / CHOICE.temperature
        places = np.arange(len(prompt) - 1, len(text) - 1)
        want = np.asarray(jax.nn.log_softmax(scores, axis=1))[places, text[len(prompt) :]]
        np.testing.assert_allclose(found.log_probs[row, :n], want, atol=1e-4)
        assert not found.log_probs[row, n:].any()


def test_programs_are_no_more_than_buckets():
    cfg = ModelConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=17, d_ff=8)
    variables = loop.prepare(cfg, jaxlm.init(cfg, jax.random.key(0)))
    rng = np.random.default_rng(0)
    before, prompts, caches = loop.extend._cache_size(), set(), set()
    reads = loop.prefill._cache_size()
    for i in range(200):
        prompt, new = rng.integers(0, 17, rng.integers(1, 60)).tolist(), int(rng.integers(1, 8))
        width = batch.pad([prompt]).tokens.shape[1]
        prompts.add(width)
        caches.add(batch.cache_bucket(width + new - 1))
        settings = {"temperature": float(i % 3), "top_k": i % 5, "seed": i, "stop": list(range(i % 4))}
        jaxlm.generate(cfg, variables, [prompt], max_new_tokens=new, **settings)
    assert loop.prefill._cache_size() - reads == len(prompts) <= 3
    assert loop.extend._cache_size() - before == len(caches) <= 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_tables_that_depend_on_the_length_go_on_beyond_the_trained_one(kind):
    rope = RopeConfig(kind=kind, factor=2.0, original_length=16, short_factor=(1.0, 1.0), long_factor=(2.0, 3.0))
    cfg = ModelConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=17, d_ff=8, rope=rope, max_length=16)
    variables = jaxlm.init(cfg, jax.random.key(0))
    short = jaxlm.generate(cfg, variables, [[3, 4, 5]], max_new_tokens=10)[0]
    assert jaxlm.generate(cfg, variables, [[3, 4, 5]], max_new_tokens=30)[0][:10] == short


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [([[1, 2], [3, 99]], 4, r"prompts\[1\]\[1\]: token id 99"), ([[-1]], 4, r"prompts\[0\]\[0\]"), ([[]], 4, "empty"),
     ([1, 2], 4, "no list"), ([[1]], -1, "max_new_tokens"), ([[1] * 90], 10, "90 tokens and 10 new ones")],
)  # fmt: skip
def test_prompts_that_cannot_be_are_named(prompts, new, message):
    _, cfg, variables = pair("gpt2")
    with pytest.raises(ValueError, match=message):
        jaxlm.generate(cfg, variables, prompts, max_new_tokens=new)


def test_nothing_asked_for_is_nothing():
    _, cfg, variables = pair("llama")
    assert jaxlm.generate(cfg, variables, []) == []
    assert jaxlm.generate(cfg, variables, PROMPTS, max_new_tokens=0) == [[], [], []]


def test_a_single_query_takes_the_plain_products():
    q, k = jax.ShapeDtypeStruct((2, 1, 4, 8), "float32"), jax.ShapeDtypeStruct((2, 64, 2, 8), "float32")
    assert choose(q, k, mask=AttentionMask()) == "reference"
