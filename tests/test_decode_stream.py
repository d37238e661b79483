"""Text as it comes: whole characters, stop texts cut, pieces that join to the whole; the terminal; samples of a run."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data.tokenizer import train_tokenizer
from jaxlm.decode import console, loop
from jaxlm.decode.generation import sample
from jaxlm.decode.sampling import Choice
from jaxlm.decode.streaming import Text, stream
from jaxlm.decode.together import sample_on
from jaxlm.dist import mesh as meshes
from jaxlm.dist import rules
from jaxlm.dist.mesh import MeshConfig
from jaxlm.nn.config import ModelConfig

TOKENIZER = train_tokenizer(["a b c. the end. " * 20], 300)
CFG = ModelConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=TOKENIZER.size, d_ff=16)
STACKED = jax.jit(lambda: jax.tree.map(lambda x: 3.0 * x, jaxlm.init(CFG, jax.random.key(0))))()
VARIABLES = loop.prepare(CFG, STACKED)
WRITTEN = "héé – 日本語 👩‍👩‍👧 end"


def pieces(text: str, stop: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    reader = Text(TOKENIZER, TOKENIZER.encode(prompt), stop)
    return [*map(reader.push, TOKENIZER.encode(text)), reader.close()]


@pytest.mark.parametrize("prompt", ["", "the end", "日"])
def test_pieces_are_whole_characters_and_join_to_the_text(prompt):
    found = pieces(WRITTEN, prompt=prompt)
    assert "".join(found) == WRITTEN
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) > 10


def test_bytes_that_never_become_a_character_are_not_kept_back_forever():
    broken = TOKENIZER.encode("日")[:1] * 30 + TOKENIZER.encode("ok")
    reader = Text(TOKENIZER)
    found = [reader.push(token) for token in broken]
    assert any(found[:20])
    assert "".join([*found, reader.close()]).endswith("ok")


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (("日本",), "héé – "),
        (("语", "end"), WRITTEN[:-3]),
        (("zzz",), WRITTEN),
        (("endless",), WRITTEN),
        (("é", "h"), ""),
    ],
)
def test_text_ends_before_the_first_stop(stop, want):
    assert "".join(pieces(WRITTEN, stop)) == want


def test_stops_that_cannot_be_are_refused():
    for stop in ("text", ("",)):
        with pytest.raises(ValueError, match="stop"):
            Text(TOKENIZER, stop=stop)


def test_stream_is_generate():
    for stop in ((), ((7, 8),)):
        want = jaxlm.generate(CFG, VARIABLES, [[4, 5]], max_new_tokens=21, temperature=0.9, seed=3, stop=stop)[0]
        assert list(stream(CFG, VARIABLES, [4, 5], 21, Choice(0.9, seed=3, stop=stop))) == want


def test_terminal_writes_the_text_alone():
    speaker, manner, out = console.Speaker(CFG, VARIABLES, TOKENIZER), console.Manner(21), []
    console.complete(speaker, "the", manner, out.append)
    want = jaxlm.generate(CFG, VARIABLES, [TOKENIZER.encode("the")], max_new_tokens=21)[0]
    assert "".join(out) == TOKENIZER.decode(want) + "\n"
    with pytest.raises(ValueError, match="--prompt: empty"):
        console.complete(speaker, "", manner, out.append)
    ended = speaker._replace(cfg=dataclasses.replace(CFG, eos_token_id=TOKENIZER.eos_id))
    console.complete(ended, "", manner, out.append)


def test_a_talk_holds_all_turns():
    seen, out = [], []

    def render(messages):
        seen.append([dict(m) for m in messages])
        return " ".join(m["content"] for m in messages)

    speaker = console.Speaker(CFG, VARIABLES, TOKENIZER)
    console.talk(speaker, render, console.Manner(4), iter(["the", " ", "end"]), out.append)
    assert [[m["role"] for m in messages] for messages in seen] == [["user"], ["user", "assistant", "user"]]
    assert "".join(out).count("\n") >= 2


def test_an_answer_ends_where_the_template_ends_a_turn():
    speaker = console.Speaker(dataclasses.replace(CFG, eos_token_id=3), VARIABLES, TOKENIZER)
    for ending, ends, stop in (
        ("", 3, ()),
        ("a", (3, TOKENIZER.encode("a")[0]), ()),
        ("<|im_end|>", 3, ("<|im_end|>",)),
    ):
        ended, manner = console.ending_at(speaker, console.Manner(4), ending)
        assert (ended.cfg.eos_token_id, manner.stop) == (ends, stop)


def test_a_spread_model_writes_what_a_whole_one_does():
    mesh = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(STACKED, {"params": rules.shardings(STACKED["params"], mesh)})
    prompts = [[4, 5, 6], [7], [8, 9]]
    want = sample(CFG, VARIABLES, prompts, 12)
    got = sample_on(mesh, CFG, spread, prompts, 12)
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.log_probs, want.log_probs, atol=1e-4)
