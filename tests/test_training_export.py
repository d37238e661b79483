"""A run's model leaves it whole: finished or not, in Hugging Face's form, with the average where one is kept."""

import shutil

import numpy as np
import pytest
import transformers

from jaxlm import config as configs
from jaxlm.cli import main
from jaxlm.training.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("one two three four five six seven eight nine ten\n" * 400)
        settings = {
            "run": {"dir": str(folder / "run")},
            "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 270, "tie_embeddings": False},
            "data": {"path": str(folder / "text.txt"), "sequence_length": 16},
            "train": {"steps": 4, "batch_size": 8, "ema": 0.5, "attention": "reference", "scan": False, "prompts": []},
            "mup": {"base": {"d_model": 8, "n_layers": 1}, "depth_alpha": 1.0},
        }
        assert train(configs.build(settings)) == 0
    return folder / "run"


def test_transformers_loads_the_export_with_equal_logits(run):
    """Multipliers of muP are folded into the weights, so that other programs need not know of them."""
    import torch

    from jaxlm.interop.load import load
    from jaxlm.nn import transformer
    from jaxlm.training.export import latest

    cfg, variables = latest(run, configs.load(run / "config.yaml"), print)
    assert cfg.residual_multiplier == 0.5
    tokens = np.arange(1, 25).reshape(2, 12)
    ours = transformer.logits(cfg, variables, tokens)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(transformer.logits(*load(run), tokens), theirs, atol=1e-4)


def test_a_finished_and_an_unfinished_run_export_the_same(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "a")]) == 0
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "hf")
    assert main(["export", str(unfinished), str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert both[0] == both[1]


def test_nothing_to_export_is_said(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err
