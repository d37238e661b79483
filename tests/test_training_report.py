"""The report page: whole, self-contained, escaped, and the same for a run that was interrupted."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.training import curves, metrics, page, samples
from jaxlm.training.report import report_page, write_report
from jaxlm.training.samples import Sample
from jaxlm.training.summary import Summary, environment, read_summary, write_summary

VOID = {"meta", "input", "br"}
BASELINES = {
    "unigram": {"loss": 6.6, "bits_per_byte": 3.11},
    "bigram": {"loss": 4.9, "bits_per_byte": 2.31},
    "zlib": {"bits_per_byte": 2.02},
}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what a page holds."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.ids, self.links, self.names = [], "", [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]
        assert len({name for name, _ in attrs}) == len(attrs)
        assert not any(name.startswith("on") or name in ("src", "srcset", "xlink:href", "data") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "title") else ""


def rows(steps=120, every=40, **extra):
    for step in range(steps + 1):
        if step % every == 0:
            yield {"step": step, "eval/loss": 3 + 5 / (step + 1), "eval/bits_per_byte": 1.5 + 2.5 / (step + 1)}
        if step < steps:
            training = {"loss": 3 + 6 / (step + 1), "learning_rate": 1e-3, "grad_norm": 1.0 + step % 5}
            yield {"step": step + 1, **training, "tokens": 256 * (step + 1), **extra}


def run(directory, lines):
    with metrics.MetricsFile(directory / "metrics.jsonl") as file:
        for line in lines:
            file.write(line)
    return directory


@pytest.fixture
def full(tmp_path):
    """A run with every file."""
    run(tmp_path, rows())
    with metrics.MetricsFile(tmp_path / "timing.jsonl") as file:
        for step in range(1, 121):
            timing = {"seconds": 0.1 * step, "tokens_per_second": 2560.0 + step, "memory": 3.2e9, "eta": 1.0}
            file.write({"step": step, **timing, "peak_fraction": 0.314})
    (tmp_path / "config.yaml").write_text("run:\n  dir: runs/<x>\ntrain:\n  steps: 120\n")
    for step in (0, 120):
        samples.append(tmp_path / "samples.txt", step, [Sample("The <b>", f" end & {step}\n  again")])
    write_summary(
        tmp_path,
        Summary(
            name="a <run>",
            objective="next_token",
            status="done",
            steps=120,
            parameters=4_213_248,
            trainable=1_000_000,
            seconds=171.2,
            baselines=BASELINES,
            facts={"Tokenizer": "<bpe>"},
            environment=environment(),
        ),
    )
    return tmp_path


def test_the_page_is_whole_and_loads_nothing(full):
    path = write_report(full)
    text = path.read_text()
    shown = Page(text)
    assert path == full / "report.html" and text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<img|<iframe", text)
    assert len(shown.ids) == len(set(shown.ids))
    assert {link.removeprefix("#") for link in shown.links} <= set(shown.ids) and shown.links
    assert sorted(p.name for p in full.iterdir() if p.suffix == ".tmp") == []


def test_the_page_fits_every_width_and_both_colour_schemes(full):
    text = report_page(full)
    assert 'name="viewport" content="width=device-width,initial-scale=1"' in text
    assert "prefers-color-scheme:dark" in text and 'name="color-scheme" content="light dark"' in text
    for svg in re.findall(r"<svg[^>]*>", text):
        assert 'width="100%"' in svg or 'viewBox="0 0 22 10"' in svg, svg
    assert "overflow-x:auto" in text and "max-width:100%" in text
    fixed = [int(width) for width in re.findall(r"[^-]width:(\d+)px", text)]
    assert all(width <= 30 for width in fixed)


def test_the_page_says_what_the_run_came_to(full):
    shown = Page(report_page(full)).text
    for part in (
        "a <run>",
        "next_token · done · 120 of 120 steps · 2 min 51 s",
        "this model1.521",  # the last evaluation: 1.5 + 2.5 / 121
        "zlib2.020bigram2.310unigram3.110",
        "0.789 bits per byte better than the bigram model",
        "bigram model 4.900",
        "Parameters4.2M1.0M trained",
        "Throughput2.6k tokens/smedian; 31.4 % of peak FLOPs",
        "Time2 min 51 s",
        "Tokens seen30.7k",
        "The <b> end & 120\n  again",
        "Step 0The <b> end & 0",
        "dir: runs/<x>",
        "Tokenizer<bpe>",
    ):
        assert part in shown, part
    for title in (
        "Loss",
        "Validation bits per byte",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Memory",
        "Tokens",
    ):
        assert f">{title}" in report_page(full)


def test_a_resumed_run_and_a_torn_line_give_the_same_page(full):
    whole = report_page(full)
    path = full / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:90], *lines[60:]]))
    assert report_page(full) == whole
    path.write_text("".join(lines) + '{"step": 121, "lo')
    assert report_page(full) == whole


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_run_that_has_just_begun_has_a_page(tmp_path, steps):
    shown = Page(report_page(run(tmp_path, rows(steps, every=2))))
    assert "nan" not in shown.text and (steps == 0 or "Training loss" in shown.text)


def test_without_metrics_the_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    Page(write_report(tmp_path).read_text())


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
numbers = st.floats(allow_subnormal=False) | st.just(0.0) | st.integers(-(2**40), 2**40)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, st.lists(numbers, min_size=1, max_size=5), max_size=4))
def test_any_metric_of_any_name_appears_whatever_its_values(tmp_path_factory, columns):
    directory = tmp_path_factory.mktemp("run")
    lines = [
        {"step": i, **{name: values[i] for name, values in columns.items() if i < len(values) and name != "step"}}
        for i in range(5)
    ]
    text = report_page(run(directory, lines))
    shown = Page(text).text
    for name in columns:
        if name not in ("step", "loss", *curves.COURSE):
            assert name.removeprefix("eval/") in shown
    for path in re.findall(r' d="([^"]*)"', text):
        assert not re.search(r"nan|inf|e[+-]?\d", path)


FAMILY = ("loss/value_avg", "rewards/chosen", "rewards/rejected", "moe/load_max/0", "moe/load_max/10", "moe/load_max/2")


def test_columns_that_belong_together_share_a_chart(tmp_path):
    extra = dict.fromkeys(FAMILY, 1.0) | {"accuracy": 0.5, "skipped": 0}
    lines = [*rows(**extra), {"step": 120, "eval/accuracy": 0.7}, {"step": 60, **dict.fromkeys(FAMILY, 2.0)}]
    text = report_page(run(tmp_path, lines))
    titles = [title.strip() for title in re.findall(r"<figcaption>([^<]*)", text)]
    assert titles.count("moe/load_max") == 1 and "moe/load_max/10" not in titles
    assert re.search(r"moe/load_max.*?>0</text>.*?>2</text>.*?>10</text>", text, re.S)
    assert "rewards of pairs" in titles and "rewards/chosen" not in titles
    assert titles.count("accuracy") == 1 and "eval/accuracy <b>0.7000</b>" in text
    assert "loss/value_avg" in titles
    assert re.search(r"Metrics that never changed.*skipped", text, re.S) and "skipped" not in titles


def test_losses_that_are_not_finite_are_said_and_marked(tmp_path):
    lines = [*rows(), {"step": 7, "loss": math.nan}, {"step": 9, "loss": math.inf}]
    text = report_page(run(tmp_path, lines))
    assert "The loss was not finite at 2 steps: 7, 9." in text
    assert "2 values not finite" in text and 'class="bad"' in text


def test_a_long_run_keeps_its_peaks_and_stays_small(tmp_path):
    lines = list(rows(20_000, every=500))
    peak = next(line for line in lines if line["step"] == 12_345 and "loss" in line)
    peak["grad_norm"] = 1234.5
    text = report_page(run(tmp_path, lines))
    assert len(text) < 200_000
    norms = text.partition(">Gradient norm")[2].partition("</figure>")[0]
    assert ">1000<" in norms and ">1<" in norms
    (curve,) = re.findall(r' faint" d="([^"]*)"', norms)
    heights = [float(point.split()[1]) for point in re.split("[ML]", curve)[1:]]
    assert len(heights) <= 600 and min(heights) < 60 and sorted(heights)[1] > 500


def test_the_loss_starts_where_the_rest_can_be_seen(tmp_path):
    text = report_page(run(tmp_path, rows(1000, every=100)))
    near, whole = re.findall(r'<div class="plot".*?</div>', text, re.S)[:2]
    highest = [max(float(label) for label in re.findall(r'class="up"[^>]*>([\d.]+)<', part)) for part in (near, whole)]
    assert highest[0] < 5 < highest[1]
    assert "The start, from 9, lies above" in text and "Logarithm of steps" in text


def test_further_sections_stand_before_the_samples(full):
    extra = page.Section("Merge distances", page.card(page.table(["layer", "distance"], [["a<b", 1.5]])))
    text = report_page(full, [extra])
    assert "a&lt;b" in text and text.index("Merge distances</h2>") < text.index("Samples</h2>")
    assert "merge-distances" in Page(text).ids
    twice = page.page("t", "", [extra, extra, page.Section("Empty", "")])
    assert len(set(Page(twice).ids)) == 2 and "Empty" not in twice


def test_the_summary_comes_back_and_tolerates_the_unknown(tmp_path):
    assert read_summary(tmp_path) == Summary()
    summary = Summary(name="x", steps=3, baselines=BASELINES, environment=environment())
    path = write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    path.write_text(json.dumps({"name": "y", "of_a_later_version": 1}))
    assert read_summary(tmp_path) == Summary(name="y")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_the_environment_names_versions_and_devices():
    import jax

    found = environment(jax.devices())
    assert found["jax"] == jax.__version__ and found["devices"] == f"{jax.device_count()} x cpu"
    assert {"python", "platform", "command", "flax", "optax"} <= set(found)


texts = st.text(max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 10**6), st.lists(st.tuples(texts, texts), min_size=1, max_size=3), max_size=4))
def test_samples_come_back_whatever_they_say(tmp_path_factory, taken):
    path = tmp_path_factory.mktemp("run") / "samples.txt"
    for step, several in taken.items():
        samples.append(path, step, [Sample(*one) for one in several])

    def plain(text):
        return text.replace("\r\n", "\n").replace("\r", "\n").encode(errors="backslashreplace").decode()

    back = samples.read(path)
    assert sorted(back) == list(back) == sorted(taken)
    for step, several in taken.items():
        assert [plain(p + c) for p, c in several] == [plain(p) + c for p, c in back[step]]


def test_samples_of_a_repeated_step_are_the_last_and_foreign_text_is_shown(tmp_path):
    for text in ("one", "two"):
        samples.append(tmp_path / "samples.txt", 5, [Sample("p", text)])
    assert samples.read(tmp_path / "samples.txt") == {5: [Sample("p", "two")]}
    (tmp_path / "samples.txt").write_text("just <text>")
    assert "just &lt;text&gt;" in report_page(run(tmp_path, rows(3)))
