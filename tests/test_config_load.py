"""Reading a configuration: what is refused and in which words, overrides, and the way back to text."""

import dataclasses
import pathlib
import subprocess
import sys
import types
import typing
from typing import Literal

import hypothesis
import hypothesis.strategies as st
import msgspec
import pytest

from jaxlm.config import CHOICES, RunConfig, build, dump, given_fields, load, read
from jaxlm.config.convert import convert, field_names
from jaxlm.config.text import parse
from jaxlm.objectives.config import NextTokenConfig, ObjectiveConfig
from jaxlm.training.config import TrainConfig

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("merge_*.yaml")))


@pytest.fixture
def write(tmp_path):
    def at(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return at


def test_defaults_are_a_valid_run():
    RunConfig().validate()
    assert build({}) == RunConfig()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_validate_and_write_to_a_directory_of_their_name(path):
    config = load(path)
    assert config.run.dir == f"runs/{path.stem}"
    assert path.read_text().startswith("#")


def test_there_are_recipes():
    assert {"quickstart", "pretrain_small", "pretrain_125m", "pretrain_1b_fsdp"} <= {path.stem for path in RECIPES}


# What is wrong, and what the message must say: where it is, and the remedy.
REFUSED = {
    "near": ("train: {evalevery: 1}", "train.evalevery: unknown field; did you mean eval_every?"),
    "near with a hyphen": ("train: {batch-size: 1}", "train.batch-size: unknown field; did you mean batch_size?"),
    "near section": ("trian: {}", "trian: unknown field; did you mean train?"),
    "near, deep": ("model: {moe: {topk: 2}}", "model.moe.topk: unknown field; did you mean top_k?"),
    "elsewhere": ("learning_rate: 1", "learning_rate: unknown field; did you mean optimizer.learning_rate?"),
    "elsewhere, in a section": ("train: {rho: 1}", "train.rho: unknown field; did you mean optimizer.sam.rho?"),
    "of another kind": (
        "objective: {kind: ppo, group_size: 2}",
        "objective.group_size: unknown field; objective.kind is ppo, and it goes with grpo; leave it out",
    ),
    "nowhere": ("run: {zzz: 1}", "run.zzz: unknown field; run has dir, seed"),
    "unknown section": ("zzz: 1", "zzz: unknown field; the sections are run, model, data, objective, train"),
    "text for a number": (
        "train: {steps: many}",
        "train.steps: expected a whole number at least 1, got the text 'many'",
    ),
    "quoted number": ("train: {steps: '5'}", "train.steps: expected a whole number"),
    "fraction": ("train: {steps: 1.5}", "train.steps: expected a whole number"),
    "truth for a number": ("train: {steps: true}", "train.steps: expected a whole number at least 1, got true"),
    "number for text": ("run: {dir: 5}", "run.dir: expected text, got 5"),
    "word for a truth": ("model: {gated: yes}", "model.gated: expected true or false, got the text 'yes'"),
    "null": ("train: {steps: null}", "train.steps: expected a whole number at least 1, got null; the default is 1000"),
    "mapping for a number": (
        "train: {steps: {a: 1}}",
        "train.steps: expected a whole number at least 1, got a mapping",
    ),
    "number for a section": ("train: 5", "train: expected a mapping of fields, got 5; its fields are steps,"),
    "list for a section": ("lora: [1]", "lora: expected a mapping of fields, got a list; its fields are r,"),
    "item of a list": ("train: {prompts: [a, 1]}", "train.prompts[1]: expected text, got 1"),
    "choice in a list": (
        "train: {trackers: [wand]}",
        "train.trackers[0]: unknown value wand; use tensorboard, wandb or",
    ),
    "choice": ("quantize: nf5", "quantize: unknown value nf5; use nf4, nf4-double, int8 or null"),
    "choice or a list": ("lora: {targets: q_proj}", "lora.targets: unknown value q_proj; use all-linear or a list"),
    "kind": ("objective: {kind: dbo}", "objective.kind: unknown value dbo; use next_token"),
    "field of no kind": ("objective: {zzz: 1}", "objective.zzz: unknown field; objective has kind, z_loss"),
    "zero": ("train: {batch_size: 0}", "train.batch_size: expected a whole number at least 1, got 0"),
    "too large": ("train: {dropout: 1}", "train.dropout: expected a number at least 0 and below 1, got 1"),
    "infinite": ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate: expected a finite number, got inf"),
    "no number": ("optimizer: {b1: .nan}", "optimizer.b1: expected a finite number, got nan"),
    "accumulation": (
        "train: {batch_size: 6, accumulation: 4}",
        "train.batch_size: 6 is not a multiple of train.accumulation 4",
    ),
    "heads": ("model: {n_heads: 3}", "model.d_model: 256 is not a multiple of model.n_heads 3"),
    "key/value heads": ("model: {n_kv_heads: 3}", "model.n_heads: 4 is not a multiple of model.n_kv_heads 3"),
    "base": ("mup: {base: {d_model: 30}}", "mup.base.d_model: 30 is not a multiple of mup.base.n_heads 4"),
    "experts per token": ("model: {moe: {experts: 2, top_k: 3}}", "model.moe.top_k: 3 is not in 1..2"),
    "wavelengths": ("model: {rope: {theta: -1}}", "model.rope.theta: expected a number above 0, got -1"),
    "nothing to train": ("quantize: nf4", "quantize: nf4 freezes the model, and lora is null"),
    "context": ("mesh: {context: 3}", "data.sequence_length: 256 is not a multiple of mesh.context 3"),
    "a key twice": ("run:\n  seed: 1\n  seed: 2", "run.yaml:3: not valid YAML, seed stands here twice"),
    "a number as key": ("run: {}\n1: 2", "run.yaml:2: not valid YAML, the key 1 is not text"),
    "open bracket": ("run: {}\ntrain: {steps: 1\n", "run.yaml:2: not valid YAML"),
    "tag": ("run: !!python/object:os.system x", "run.yaml:1: not valid YAML"),
    "alias": ("run: &a {dir: *a}", "run.yaml:1: not valid YAML"),
    "list": ("- run", "run.yaml: holds a list instead of sections"),
    "empty": ("", "run.yaml: holds nothing instead of sections"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_place_and_remedy(case, write):
    text, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        load(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).count("; ") >= 1


def test_values_set_in_python_are_checked_too():
    with pytest.raises(ValueError, match=r"train\.steps: expected a whole number at least 1, got 0"):
        RunConfig(train=TrainConfig(steps=0)).validate()


def test_bytes_that_are_no_text_and_paths_that_are_no_file(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"run: {dir: \xff}")
    with pytest.raises(ValueError, match=r"run\.yaml: not UTF-8 text \(byte 11\)"):
        load(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="not a file"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml: no such file; "):
        load(tmp_path / "missing.yaml")


def test_json_is_read_and_its_mistakes_have_lines(write):
    assert load(write('{"train":\n\t{"steps": 7}}', "run.json")).train.steps == 7
    with pytest.raises(ValueError, match=r"run\.json:2: not valid JSON"):
        load(write('{"train":\n{"steps": 7,}}', "run.json"))
    with pytest.raises(ValueError, match=r"run\.json: steps stands twice"):
        load(write('{"train": {"steps": 7, "steps": 8}}', "run.json"))


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("3E2", 300.0), ("1", 1.0), ("1_0.5", 10.5)])
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert load(RECIPES[0], [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == value


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "1:30", "0x", "1e", "e3", "._", "+"])
def test_what_only_old_yaml_reads_as_something_else_stays_text(text):
    assert load(RECIPES[0], [f"run.dir={text}"]).run.dir == text


def test_overrides_replace_make_sections_and_come_last(write):
    path = write("train: {steps: 1}\nlora: {r: 4}")
    overrides = [
        "train.steps=2",
        "train.steps=3",
        "mup.base.d_model=64",
        "lora.targets=[q_proj,v_proj]",
        "model.moe={}",
    ]
    config = load(path, [*overrides, "data.path=a=b", "train.ema=", "run.dir='1'"])
    assert config.train.steps == 3 and config.mup.base.d_model == 64 and config.model.moe.experts == 8
    assert config.lora.r == 4 and config.lora.targets == ("q_proj", "v_proj")
    assert config.data.path == "a=b" and config.train.ema is None and config.run.dir == "1"
    assert load(path, ["lora=null"]).lora is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps", "train.steps: not an override; write path.to.field=VALUE"),
        ("train..steps=1", "train..steps=1: not an override"),
        ("data.path=*.txt", "data.path: *.txt is not a YAML value; put text with special characters in quotes"),
        ("train.stepz=1", "train.stepz: unknown field; did you mean steps?"),
        ("quantize.kind=1", "quantize: expected nf4, nf4-double, int8 or null, got a mapping"),
    ],
)
def test_overrides_are_refused_in_the_same_words(override, message, write):
    with pytest.raises(ValueError) as error:
        load(write("{}"), [override])
    assert message in str(error.value)


def test_reading_leaves_the_raw_mapping_of_the_file_alone(write):
    path = write("train: {steps: 1}")
    assert read(path, ["train.steps=2"]) == {"train": {"steps": 2}}
    assert given_fields(read(path, ["optimizer.learning_rate=1", "mup=null", "model.moe={}"])) == {
        "train.steps",
        "optimizer.learning_rate",
        "mup",
        "model.moe",
    }


def values(hint):
    """A strategy for any value that a field of this type may have."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in CHOICES:
        return st.one_of([values(kind) for kind in CHOICES[hint].values()])
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(part) for part in args])
    if origin is tuple:
        inner = args[:-1] if args[-1] is Ellipsis else args
        if args[-1] is Ellipsis:
            return st.lists(values(inner[0]), max_size=3).map(tuple)
        return st.tuples(*[values(part) for part in inner])
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=2)
    meta = args[1] if origin is typing.Annotated else msgspec.Meta()
    limits = (
        {"min_value": meta.ge, "max_value": meta.le} if meta.gt is None else {"min_value": meta.gt, "max_value": None}
    )
    base = args[0] if origin is typing.Annotated else hint
    if base is int:
        return st.integers(meta.ge, meta.le if meta.lt is None else meta.lt - 1)
    if base is float:
        top = meta.le if meta.lt is None else meta.lt
        return st.floats(
            limits["min_value"],
            top,
            exclude_min=meta.gt is not None,
            exclude_max=meta.lt is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    return {str: st.text(st.characters(codec="utf-8"), max_size=8), bool: st.booleans(), type(None): st.none()}[base]


@hypothesis.given(values(RunConfig))
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_is_written_reads_back_equal(config):
    text = dump(config)
    assert convert(RunConfig, parse(text, "dump"), kinds=CHOICES) == config


def leaf_values(tree):
    """Sections and fields, as many as lines are due."""
    return [
        item for key, value in tree.items() for item in [key, *(leaf_values(value) if isinstance(value, dict) else [])]
    ]


def test_every_field_is_written_on_a_line_of_its_own(write):
    config = build(
        {
            "model": {"moe": {}, "rope": {}},
            "data": {"mixture": {}},
            "optimizer": {"sam": {}},
            "mup": {},
            "lora": {},
            "train": {"prompts": ["a\nb"]},
        }
    )
    text = dump(config)
    lines = [line.partition(":")[0].strip() for line in text.splitlines()]
    kinds = {ObjectiveConfig: {"next_token": NextTokenConfig}}
    given = {name.rpartition(".")[2] for name in field_names(RunConfig, kinds) if "layer_lr." not in name}
    assert set(lines) == given
    assert len(lines) == len(leaf_values(dataclasses.asdict(config)))
    assert load(write(text)) == config


def test_under_150_fields():
    assert len(list(field_names(RunConfig))) < 150


def test_reading_a_configuration_does_not_import_jax():
    code = "import sys, jaxlm.config; print([m for m in ('jax', 'numpy', 'flax', 'optax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
