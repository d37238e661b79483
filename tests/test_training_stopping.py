"""Early stopping: patience, what counts as an improvement, and its state as JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.training.stopping import Stopping, from_json, should_stop, to_json, update


def run(values, **options):
    state = Stopping()
    for step, value in enumerate(values):
        state = update(state, step, value, **options)
    return state


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([], {}, Stopping()),
        ([3.0, 1.0, 2.0], {}, Stopping(1.0, 1, 1)),
        ([3.0, 1.0, 1.0, 1.0], {}, Stopping(1.0, 1, 2)),
        ([1.0, 3.0, 2.0], {"mode": "max"}, Stopping(3.0, 1, 1)),
        ([3.0, 2.95, 2.9], {"min_delta": 0.2}, Stopping(3.0, 0, 2)),
        ([3.0, 2.9, 2.7], {"min_delta": 0.2}, Stopping(2.7, 2, 0)),
        ([math.nan, 2.0, math.nan], {}, Stopping(2.0, 1, 1)),
        ([-math.inf, 2.0], {}, Stopping(2.0, 1, 0)),
        ([math.nan, math.inf], {"mode": "max"}, Stopping(None, None, 2)),
    ],
)
def test_the_best_and_the_bad_ones_are_counted(values, options, expected):
    assert run(values, **options) == expected


def test_patience_is_reached_after_that_many_bad_evaluations():
    stops = [should_stop(run([1.0] + [2.0] * bad), patience=3) for bad in range(5)]
    assert stops == [False, False, False, True, True]
    assert not should_stop(run([1.0] + [2.0] * 99), patience=None)


@given(st.lists(st.floats(), min_size=1), st.sampled_from(["min", "max"]))
def test_the_best_is_that_of_the_finite_values_and_json_keeps_every_bit(values, mode):
    state = run(values, mode=mode)
    finite = [value for value in values if math.isfinite(value)]
    assert state.best == ({"min": min, "max": max}[mode](finite) if finite else None)
    assert from_json(json.loads(json.dumps(to_json(state)))) == state


def test_stopping_goes_on_from_its_saved_state():
    values = [5.0, 4.0, 4.5, math.nan, 3.9, 6.0]
    half = from_json(json.loads(json.dumps(to_json(run(values[:3])))))
    for step, value in enumerate(values[3:], 3):
        half = update(half, step, value)
    assert half == run(values)
    assert from_json(None) == Stopping()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'down' is unknown; use min or max"):
        update(Stopping(), 0, 1.0, mode="down")
