"""Learning rates against their closed forms at every step, and against transformers' schedules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxlm.optim import schedules
from jaxlm.optim.config import OptimizerConfig

STEPS, WARMUP, PEAK, END = 100, 10, 0.02, 0.1
CONFIG = OptimizerConfig(learning_rate=PEAK, warmup=WARMUP / STEPS, end=END, decay=0.3, cycles=3)


def closed_form(name: str, i: int) -> float:
    """The formulas written down once more, in plain Python."""
    low, i = END * PEAK, min(i, STEPS)
    if i < WARMUP:
        return PEAK * i / WARMUP
    p = (i - WARMUP) / (STEPS - WARMUP)
    q = max(0.0, (i - 70) / 30)
    cycle = 1.0 if i == STEPS else ((i - WARMUP) * 3 % 90) / 90
    return {
        "warmup_cosine": low + (PEAK - low) * 0.5 * (1 + math.cos(math.pi * p)),
        "linear": PEAK + (low - PEAK) * p,
        "constant": PEAK,
        "wsd": PEAK + (low - PEAK) * q,
        "wsd_sqrt": low + (PEAK - low) * (1 - math.sqrt(q)),
        "rsqrt": max(low, PEAK * math.sqrt(WARMUP / max(i, WARMUP))),
        "restarts": low + (PEAK - low) * 0.5 * (1 + math.cos(math.pi * cycle)),
    }[name]


@pytest.mark.parametrize("name", schedules.SHAPES)
def test_equals_its_closed_form_at_every_step_and_stays_after_the_end(name):
    config = dataclasses.replace(CONFIG, schedule=name)
    counts = range(STEPS + 20)
    expected = np.array([closed_form(name, i) for i in counts])
    single = jax.jit(schedules.make(config, STEPS))(jnp.array(counts, jnp.int32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=2e-6)
    with jax.enable_x64(True):
        schedule = schedules.make(config, STEPS)
        double = np.array(schedule(jnp.array(counts, jnp.int32)))
    np.testing.assert_allclose(double, expected, rtol=1e-12)
    assert len(set(double[STEPS:])) == 1


def test_values_of_the_cosine():
    schedule = schedules.make(OptimizerConfig(learning_rate=1.0, warmup=0.1), 100)
    known = {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 11: 0.99969541, 25: 0.93301270, 50: 0.58682409, 55: 0.5}
    known |= {75: 0.17860620, 99: 0.00030459, 100: 0.0, 101: 0.0}
    for step, value in known.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6, abs=5e-9)


@pytest.mark.parametrize("name", schedules.SHAPES)
def test_without_warmup_the_first_step_has_the_peak(name):
    schedule = schedules.make(dataclasses.replace(CONFIG, schedule=name, warmup=0.0), STEPS)
    assert float(schedule(0)) == pytest.approx(PEAK, rel=1e-7)


def peers(optimizer):
    """transformers' schedules with the same numbers, none of them with an end value."""
    cycles = {"num_warmup_steps": WARMUP, "num_training_steps": STEPS}
    return {
        "warmup_cosine": transformers.get_cosine_schedule_with_warmup(optimizer, **cycles),
        "linear": transformers.get_linear_schedule_with_warmup(optimizer, **cycles),
        "constant": transformers.get_constant_schedule_with_warmup(optimizer, WARMUP),
        "wsd": transformers.get_wsd_schedule(
            optimizer, WARMUP, 30, num_stable_steps=60, decay_type="linear", min_lr_ratio=0.0
        ),
        "rsqrt": transformers.get_inverse_sqrt_schedule(optimizer, WARMUP),
        "restarts": transformers.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, **cycles, num_cycles=3),
    }


@pytest.mark.parametrize("name", ["warmup_cosine", "linear", "constant", "wsd", "rsqrt", "restarts"])
def test_equals_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = peers(optimizer)[name].lr_lambdas[0]
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIG, schedule=name, learning_rate=1.0, end=0.0)
        ours = np.array(schedules.make(config, STEPS)(jnp.arange(STEPS + 1)))
    theirs = [peer(i) for i in range(STEPS + 1)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_whole_run_of_warmup_and_no_steps_at_all():
    schedule = schedules.make(OptimizerConfig(learning_rate=1.0, warmup=1.0), 4)
    assert [float(schedule(i)) for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match=r"train\.steps: 0 is not positive"):
        schedules.make(OptimizerConfig(), 0)
