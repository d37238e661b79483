"""The report of a run: `report.html`, one page that loads nothing else, made from the files of the run directory."""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxlm.training import curves, metrics, page, samples, units
from jaxlm.training.page import Figure, Section
from jaxlm.training.summary import Summary, read_summary, write_whole

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
TABLE_ROWS = 8
EARLIER_SAMPLES = 12
BITS = "Validation bits per byte"
NO_RESULTS = ("eval/loss", "eval/bits_per_byte", "eval/items")
SCORES = ("acc", "accuracy", "accuracies", "exact_match", "reward")
"""Last parts of the names of evaluations that come first among the results."""

Columns = curves.Columns


def write_report(run_dir: str | os.PathLike[str], sections: Sequence[Section] = ()) -> Path:
    """Write `report.html` from a run's `metrics.jsonl` and, where they exist, `timing.jsonl`, `config.yaml`,
    `samples.txt` and `summary.json`.

    Args:
      run_dir: a run directory; the run may still be going on.
      sections: further parts, shown before the samples.

    Returns:
      The path of the page, which is written whole or not at all.

    Raises:
      FileNotFoundError: no `metrics.jsonl`.
      ValueError: a broken line in one of the files, named.
    """
    run_dir = Path(run_dir)
    path = run_dir / REPORT_FILE
    write_whole(path, report_page(run_dir, sections))
    return path


def report_page(run_dir: Path, sections: Sequence[Section] = ()) -> str:
    """The page of `write_report` as text."""
    columns = metrics.columns(metrics.read(run_dir / metrics.METRICS_FILE))
    columns |= _timing(run_dir / metrics.TIMING_FILE)
    summary = read_summary(run_dir)
    others, constant = curves.other_charts(columns)
    baselines = {name: dict(values) for name, values in summary.baselines.items()}
    losses = {name: values["loss"] for name, values in baselines.items() if name == "bigram" and "loss" in values}
    per_token = "nats per token" if "eval/bits_per_byte" in columns else ""
    loss = curves.loss_chart(columns, losses, per_token)
    parts = [
        Section("Result", _alerts(columns) + _result(columns, summary)),
        Section("Loss", page.card(loss) if loss else ""),
        Section("Evaluations", _evaluations(columns, curves.evaluation_charts(columns, baselines))),
        Section("Course of training", page.grid(curves.course_charts(columns))),
        Section("Other metrics", page.grid(others) + _constants(constant)),
        *sections,
        Section("Samples", _samples(run_dir / samples.SAMPLES_FILE)),
        Section("Environment", page.facts({**summary.facts, **summary.environment})),
        Section("Configuration", _configuration(run_dir / CONFIG_FILE)),
    ]
    return page.page(summary.name or run_dir.resolve().name, _head(columns, summary), parts)


def _timing(path: Path) -> dict[str, dict[int, float]]:
    columns = metrics.columns(metrics.read(path)) if path.is_file() else {}
    return {name: values for name, values in columns.items() if name not in ("seconds", "eta")}


def _head(columns: Columns, summary: Summary) -> str:
    done = _last_step(columns)
    steps = f"{done:,} of {summary.steps:,} steps" if summary.steps else f"{done:,} steps"
    parts = [summary.objective, summary.status, steps]
    parts += [units.duration(summary.seconds)] if summary.seconds is not None else []
    parts += [summary.finished.replace("T", " ")]
    return f'<p class="soft">{escape(" · ".join(part for part in parts if part))}</p>\n'


def _alerts(columns: Columns) -> str:
    bad = [step for step, value in columns.get("loss", {}).items() if not math.isfinite(value)]
    if not bad:
        return ""
    named = ", ".join(f"{step:,}" for step in bad[:5]) + (", ..." if len(bad) > 5 else "")
    text = f"The loss was not finite at {len(bad):,} step{'s' if len(bad) > 1 else ''}: {named}."
    return f'<div class="card alert">{escape(text)}</div>\n'


def _result(columns: Columns, summary: Summary) -> str:
    figures = _figures(columns, summary)
    score = _last(columns.get("eval/bits_per_byte", {}))
    scores = {name: v["bits_per_byte"] for name, v in summary.baselines.items() if "bits_per_byte" in v}
    if score is None or not scores:
        return page.key_figures(figures)
    note = "Lower is better."
    if "bigram" in scores:
        gap = scores["bigram"] - score
        note = f"{abs(gap):.3f} bits per byte {'better' if gap > 0 else 'worse'} than the bigram model. {note}"
    chart = page.bars(BITS, {"this model": score, **scores}, "this model", note)
    return page.pair(page.card(chart), page.key_figures(one for one in figures if one.label != BITS))


def _figures(columns: Columns, summary: Summary) -> list[Figure]:
    """Key figures: those that the run has, results first."""
    figures = [*_results(columns), *_losses(columns)]
    tokens = _last(columns.get("tokens", {}))
    if tokens is not None:
        figures.append(Figure("Tokens seen", units.compact(tokens)))
    figures += _speed(columns, summary)
    if summary.parameters is not None:
        partial = summary.trainable is not None and summary.trainable != summary.parameters
        aside = f"{units.compact(summary.trainable or 0)} trained" if partial else ""
        figures.append(Figure("Parameters", units.compact(summary.parameters), aside=aside))
    memory = [v for v in columns.get("memory", {}).values() if math.isfinite(v)]
    if memory:
        value, unit = units.size(max(memory)).split(" ")
        figures.append(Figure("Memory", value, unit, "largest seen"))
    return figures


def _results(columns: Columns) -> list[Figure]:
    """The last evaluation, else the reward."""
    names = [name for name in columns if name.startswith("eval/") and name not in NO_RESULTS]
    names.sort(key=lambda name: name.rsplit("/", 1)[-1] not in SCORES)  # stable: others keep their order
    names = names[:4] or [name for name in ("reward", "objective/scores") if name in columns]
    figures = []
    if score := _last(columns.get("eval/bits_per_byte", {})):
        figures.append(Figure(BITS, f"{score:.3f}", aside=_best("eval/bits_per_byte", columns)))
    for name in names:
        values = [v for v in columns[name].values() if math.isfinite(v)]
        if values:
            aside = f"{units.significant(values[0])} at the start" if len(values) > 1 else ""
            figures.append(Figure(name, units.significant(values[-1]), aside=aside))
    return figures


def _losses(columns: Columns) -> list[Figure]:
    figures = []
    if (held := _last(columns.get("eval/loss", {}))) is not None:
        figures.append(Figure("Validation loss", f"{held:.4f}", aside=_best("eval/loss", columns)))
    losses = list(columns.get("loss", {}).values())
    tail = [v for v in losses[-curves.averaged(len(losses)) :] if math.isfinite(v)]
    if tail:
        aside = f"mean of the last {len(tail):,} steps" if len(tail) > 1 else "last step"
        figures.append(Figure("Training loss", f"{sum(tail) / len(tail):.4f}", aside=aside))
    return figures


def _speed(columns: Columns, summary: Summary) -> list[Figure]:
    figures = []
    rates = sorted(v for v in columns.get("tokens_per_second", {}).values() if math.isfinite(v))
    if rates:
        shares = sorted(v for v in columns.get("peak_fraction", {}).values() if math.isfinite(v))
        aside = f"median; {100 * shares[len(shares) // 2]:.1f} % of peak FLOPs" if shares else "median of the run"
        figures.append(Figure("Throughput", units.compact(rates[len(rates) // 2]), "tokens/s", aside))
    if summary.seconds is not None:
        figures.append(Figure("Time", units.duration(summary.seconds)))
    return figures


def _best(name: str, columns: Columns) -> str:
    values = {step: value for step, value in columns[name].items() if math.isfinite(value)}
    if len(values) < 2:
        return ""
    step = min(values, key=lambda at: values[at])
    return "best of the run" if step == max(values) else f"best {values[step]:.4f} at step {step:,}"


def _evaluations(columns: Columns, drawn: Sequence[str]) -> str:
    held = {name: values for name, values in columns.items() if name.startswith("eval/")}
    steps = sorted({step for values in held.values() for step in values})
    if not steps:
        return ""
    losses = {step: v for step, v in held.get("eval/loss", {}).items() if math.isfinite(v)}
    best = min(losses, key=lambda at: losses[at]) if len(losses) > 1 else None
    kept = _spread(steps, TABLE_ROWS, keep=best)
    headers = ["step", *(name.removeprefix("eval/") for name in held)]
    rows: list[list[Any]] = [[step, *(values.get(step) for values in held.values())] for step in steps]
    short = [row for row in rows if row[0] in kept]
    row, note = (kept.index(best), "Marked: the lowest validation loss.") if best is not None else (None, "")
    table = page.table(headers, short, row, note)
    shown = page.grid([*drawn, table]) if len(headers) <= 3 else page.grid(drawn) + page.card(table)
    if len(short) == len(rows):
        return shown
    return shown + page.fold("All evaluations", page.table(headers, rows), f"{len(rows):,}")


def _constants(values: Mapping[str, float]) -> str:
    if not values:
        return ""
    rows = page.table(["metric", "value"], list(values.items()))
    return page.fold("Metrics that never changed", rows, f"{len(values):,}")


def _samples(path: Path) -> str:
    found = samples.read(path)
    if not found:
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        return page.card(page.verbatim(text)) if text else ""
    blocks = {step: "".join(page.prose(*one) for one in several) for step, several in found.items()}
    *earlier, last = blocks
    kept = _spread(earlier, EARLIER_SAMPLES)
    older = "".join(f"<h3>Step {step:,}</h3>{blocks[step]}" for step in reversed(kept))
    more = page.fold("Earlier samples", older, f"after {len(kept):,} steps from {kept[0]:,} on") if older else ""
    return f'<p class="soft">After step {last:,}; the prompt is in colour.</p>{page.card(blocks[last])}{more}'


def _configuration(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return page.fold(CONFIG_FILE, page.verbatim(text), "every field with its value; enough to run it again", True)


def _spread(steps: Sequence[int], limit: int, keep: int | None = None) -> list[int]:
    """About `limit` of the steps at most, at equal distances back from the last, with the first and `keep`."""
    if len(steps) <= limit:
        return list(steps)
    stride = math.ceil((len(steps) - 1) / (limit - 1))
    return sorted({*steps[::-1][::stride], steps[0], *([keep] if keep is not None else [])})


def _last(column: Mapping[int, float]) -> float | None:
    return list(column.values())[-1] if column else None


def _last_step(columns: Columns) -> int:
    return max((step for values in columns.values() for step in values), default=0)
