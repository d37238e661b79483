"""A model directory -> the same model with quantised weights, in bitsandbytes' form."""

from collections.abc import Callable
from pathlib import Path

from jaxlm.interop import peft
from jaxlm.interop.load import load, load_config, model_directory
from jaxlm.interop.save import save
from jaxlm.nn.qtensor import check_kind
from jaxlm.params.lora import merge, merged_config
from jaxlm.params.quantize import quantize


def quantize_directory(
    model: str | Path, out: str | Path, kind: str, dtype: str, report: Callable[[str], None]
) -> None:
    """Write a model with its layers' projections quantised, and its tokenizer.

    Tensors are read and quantised one by one, so memory holds the quantised model. Only an adapter needs the whole
    float model: it is merged before.

    Args:
      model: a Hugging Face directory, or a run directory.
      out: where to write; an existing model directory is replaced.
      kind: `nf4`, `nf4-double`, `int8`.
      dtype: of what is not quantised, and what the values of what is are rounded to; as in `load`.
      report: told the sizes.

    Raises:
      ValueError, FileNotFoundError: `where: what; what to do`.
    """
    check_kind(kind, "--kind")
    if load_config(model).lora is None:
        cfg, variables = load(model, dtype, quantize=kind)
    else:
        cfg, variables = load(model, dtype)
        merged = merge(cfg, variables["params"], variables["lora"])
        cfg, variables = merged_config(cfg, merged), {"params": quantize(merged, kind)}
        report(f"{model}: the adapter was merged into its base before")
    folders = (Path(model), Path(model) / "hf")
    folder = next((f for f in folders if (f / "tokenizer.json").is_file()), None)
    save(out, cfg, variables, tokenizer=folder, own_form=True)
    before, after = _size(model_directory(peft.locate(model, None)[0])), _size(Path(out))
    report(f"{after:.3g} MB of weights, {before:.3g} MB before")


def _size(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6
