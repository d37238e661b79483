"""What makes two starts of a run the same run: every setting that matters is refused by name, the others are free."""

import copy
import dataclasses

import pytest

from jaxlm.config import RunConfig
from jaxlm.training.meta import compare_meta, versions


def description(**hashes):
    config = dataclasses.asdict(RunConfig())
    return {"config": config, "tokenizer": "t0", "data": {"sha": "d0", "rows": 10}, "base": None, **hashes}


def changed(field, value):
    current = description()
    *parents, name = field.split(".")
    section = current["config"]
    for parent in parents:
        section = section[parent]
    section[name] = value
    return current


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.d_model", 128),
        ("model.path", "elsewhere"),
        ("data.path", "other.txt"),
        ("data.sequence_length", 64),
        ("run.seed", 1),
        ("train.batch_size", 4),
        ("objective.kind", "dpo"),
        ("optimizer.name", "lion"),
        ("lora", {"r": 8}),
        ("quantize", "nf4"),
    ],
)
def test_a_setting_that_the_state_depends_on_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: .* in the checkpoint, .* now; go back") as error:
        compare_meta(description(), changed(field, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.steps", 7),
        ("train.eval_every", 7),
        ("train.checkpoint_every", 7),
        ("optimizer.learning_rate", 0.5),
        ("mesh.fsdp", 8),
        ("run.dir", "runs/moved"),
    ],
)
def test_other_settings_may_change(field, value):
    compare_meta(description(), changed(field, value))


@pytest.mark.parametrize(
    ("hashes", "words"),
    [
        ({"tokenizer": "t1"}, '^tokenizer: "t0" in the checkpoint, "t1" now'),
        ({"data": {"sha": "d1", "rows": 10}}, r'^data content \(sha\): "d0" in the checkpoint, "d1" now'),
        ({"data": "d1"}, r"^data content: {.*} in the checkpoint"),
        ({"base": "b1"}, '^base model: null in the checkpoint, "b1" now'),
        ({"base": {"teacher": "b1"}}, r'^base model \(objective.teacher\): "b0" in the checkpoint, "b1" now'),
    ],
)
def test_other_contents_are_refused_by_name(hashes, words):
    before = {"teacher": "b0"} if isinstance(hashes.get("base"), dict) else None
    with pytest.raises(ValueError, match=words):
        compare_meta(description(base=before), description(**hashes))


def test_both_values_of_the_first_field_and_the_names_of_the_others_are_shown():
    current = changed("model.d_model", 512)
    current["config"]["run"]["seed"] = 5
    current["base"] = "b1"
    before = description()["config"]["model"]["d_model"]
    with pytest.raises(ValueError) as error:
        compare_meta(description(), current)
    assert str(error.value).startswith(
        f"model.d_model: {before} in the checkpoint, 512 now (also changed: base model, run.seed); "
    )


def test_a_field_that_the_checkpoint_does_not_know_is_not_compared():
    saved = copy.deepcopy(description())
    del saved["config"]["model"]["norm"]
    compare_meta(saved, description())


def test_tuples_and_lists_are_the_same_after_json():
    saved, current = description(), description()
    saved["config"]["data"]["extra"], current["config"]["data"]["extra"] = ["a", "b"], ("a", "b")
    compare_meta(saved, current)


def test_versions_name_what_is_installed():
    import jax

    assert versions()["jax"] == jax.__version__
