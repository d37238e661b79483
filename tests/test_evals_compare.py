"""Paired comparison: exact tests against scipy, the bootstrap against resampling, files against their faults."""

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.cli import main
from jaxlm.evals import compare

counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 400))


@given(counts)
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial_test(case):
    gained, lost, _ = case
    n = gained + lost
    expected = scipy.stats.binomtest(gained, n).pvalue if n else 1.0
    assert compare.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert compare.mcnemar(gained, lost) == compare.mcnemar(lost, gained)


def test_mcnemar_holds_with_many_items():
    assert compare.mcnemar(50_400, 49_600) == pytest.approx(scipy.stats.binomtest(50_400, 100_000).pvalue, rel=1e-7)
    assert compare.mcnemar(3000, 0) == 0.0


@pytest.mark.parametrize(("gained", "lost", "items"), [(46, 33, 500), (9, 1, 40), (0, 12, 100), (150, 117, 2376)])
def test_the_interval_is_that_of_resampling(gained, lost, items):
    """To half a step of 1/items, on which resampled differences stand, and a step for percentiles between two."""
    generator = np.random.default_rng(0)
    shares = [gained / items, lost / items, 1 - (gained + lost) / items]
    draws = generator.multinomial(items, shares, 200_000)
    expected = np.percentile((draws[:, 0] - draws[:, 1]) / items, [2.5, 97.5])
    found = np.array(compare.bootstrap_interval(gained, lost, items))
    assert np.all(np.abs(found - expected) <= 1.001 / items)
    low, high = compare.bootstrap_interval(lost, gained, items)
    np.testing.assert_allclose(found, [-high, -low], atol=1e-9)


@given(counts)
@settings(max_examples=60, deadline=None)
def test_the_interval_holds_the_difference_and_narrows(case):
    gained, lost, rest = case
    items = gained + lost + rest
    low, high = compare.bootstrap_interval(gained, lost, items)
    assert -1 <= low <= (gained - lost) / items <= high <= 1
    inner = compare.bootstrap_interval(gained, lost, items, level=0.8)
    assert low <= inner[0] <= inner[1] <= high


@pytest.mark.parametrize(("gained", "lost", "items", "end"), [(0, 0, 7, 0.0), (7, 0, 7, 1.0), (0, 7, 7, -1.0)])
def test_without_variation_the_interval_is_a_point(gained, lost, items, end):
    assert compare.bootstrap_interval(gained, lost, items) == (end, end)


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.9, 0.6]) == [1.0, 1.0]
    assert compare.holm([0.2]) == [0.2]


def line(doc_id, right, **changes):
    return {
        "doc_id": doc_id,
        "doc": {"question": f"{doc_id}?"},
        "filter": "none",
        "metrics": ["acc"],
        "acc": right,
    } | changes


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return str(path)


def outcomes(gained, lost, both, neither):
    """Two runs with these counts of items."""
    a = [0] * gained + [1] * lost + [1] * both + [0] * neither
    b = [1] * gained + [0] * lost + [1] * both + [0] * neither
    return [line(i, x) for i, x in enumerate(a)], [line(i, x) for i, x in enumerate(b)]


def test_the_text_of_a_comparison(tmp_path, capsys):
    """The items of B stand in another order."""
    a, b = outcomes(46, 33, 177, 244)
    files = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b[::-1])]
    assert main(["compare", *files]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "items 500   A 0.4200   B 0.4460   gained 46   lost 33   McNemar p 0.1766 (exact)"
    assert second == "difference +0.0260, 95 % interval [-0.0087, +0.0609]: no evidence of a difference"


def test_33_more_of_2376_items_are_evidence_only_if_few_changed_sides(tmp_path):
    """The same two scores, 79.80 and 81.19: whether they differ depends on what two scores do not show."""
    for lost, evidence in ((0, True), (54, True), (117, True), (126, False), (221, False)):
        a, b = outcomes(lost + 33, lost, 1896 - lost, 2376 - 1929 - lost)
        text = compare.describe(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
        assert "A 0.7980   B 0.8119" in text
        assert text.endswith("evidence of a difference, B is better") == evidence
        assert text.endswith("no evidence of a difference") != evidence


def test_directories_are_judged_over_all_tasks(tmp_path):
    """p = 0.03 alone is evidence, one of two tasks is not."""
    for task, gained in (("arc", 17), ("boolq", 9)):
        a, b = outcomes(gained, 6, 50, 50)
        write(tmp_path / "a" / f"samples_{task}.jsonl", a)
        write(tmp_path / "b" / f"samples_{task}_2026-01-02T03-04-05.678.jsonl", b)
    lines = compare.describe(tmp_path / "a", tmp_path / "b").splitlines()
    assert lines[0] == "task arc" and lines[3] == "task boolq" and len(lines) == 6
    p = compare.mcnemar(17, 6)
    assert p < compare.LEVEL < 2 * p
    assert lines[2].endswith(f"no evidence of a difference (Holm p {2 * p:.4f} over 2 tasks)")
    write(tmp_path / "a" / "samples_more.jsonl", a)
    with pytest.raises(ValueError, match="no samples of more; compare runs over the same tasks"):
        compare.describe(tmp_path / "a", tmp_path / "b")


def test_of_several_filters_the_first_is_compared(tmp_path):
    a = [line(i, i % 2) for i in range(4)]
    b = [x | {"filter": f, "acc": 1} for f in ("none", "strict") for x in a]
    comparison = compare.compare_files(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b))
    assert comparison[:3] == (4, 2, 0)


GOOD = [line(0, 1.0), line(1, False), line("x", 0)]
FAULTS = {
    "broken line": ("{}\nnot json", "b.jsonl:2: broken JSON"),
    "no object": ("[1]", "b.jsonl:1: a JSON list, not an object"),
    "no item": ("", "b.jsonl: no item in it"),
    "no doc_id": ([line(0, 1), {"acc": 1}], "b.jsonl:2: no doc_id"),
    "no metrics": ([line(0, 1), line(1, 1, metrics=[])], "b.jsonl:2: no correctness field"),
    "no field": ([line(0, 1, metrics=["acc_norm"])], "b.jsonl:1: no correctness field"),
    "not right or wrong": ([line(0, 0.5)], "b.jsonl:1: acc is 0.5, not 0 or 1"),
    "nan": ([line(0, float("nan"))], "b.jsonl:1: acc is nan, not 0 or 1"),
    "twice": ([line(0, 1), line(0, 1)], "b.jsonl:2: doc_id 0 stands in the file twice"),
    "fewer": (GOOD[:2], "b.jsonl: doc_id 'x' is missing (1 in all)"),
    "more": ([*GOOD, line(7, 1)], "a.jsonl: doc_id 7 is missing (1 in all)"),
    "another document": ([*GOOD[1:], line(0, 1, doc={"question": "!"})], "b.jsonl: doc_id 0 is another document"),
    "another metric": ([x | {"metrics": ["em"], "em": 1} for x in GOOD], "b.jsonl: scored by em, but a.jsonl by acc"),
    "mixed metrics": (
        [GOOD[0], GOOD[1] | {"metrics": ["em"], "em": 1}],
        "b.jsonl:2: scored by em, but the lines before",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_files_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, capsys, case):
    contents, message = FAULTS[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", GOOD)
    text = contents if isinstance(contents, str) else "".join(json.dumps(x) + "\n" for x in contents)
    (tmp_path / "b.jsonl").write_text(text.replace("{}", json.dumps(GOOD[0]), 1))
    assert main(["compare", "a.jsonl", "b.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxlm: error: {message}") and error.count("\n") == 1


def test_columns_that_a_reader_adds_empty_make_no_other_document(tmp_path):
    other = [x | {"doc": x["doc"] | {"hint": None}} for x in GOOD]
    assert compare.compare_files(write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", other)).items == 3
