"""Merging of tensors and trees: what each method promises. Parity with mergekit stands where its recipes are read."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree
from jaxlm.nn import transformer
from jaxlm.nn.config import ModelConfig, MoEConfig
from jaxlm.params import merge as methods
from jaxlm.params.merge import METHODS, largest, merge, merge_trees

RNG = np.random.default_rng(0)
BASE, LEFT, RIGHT = (jnp.asarray(RNG.standard_normal((24, 40)), jnp.float32) for _ in range(3))
DELTA = LEFT - BASE
NEEDS = {"weight": 0.5, "density": 0.5, "gamma": 0.05, "t": 0.3, "scale": None}
EXAMPLES = {name: [NEEDS] * (1 if name == "passthrough" else 2 if name == "slerp" else 3) for name in METHODS}


def run(name, tensors=(BASE, LEFT, RIGHT), base=0, key=0, **shared):
    each = EXAMPLES[name]
    shared = NEEDS | shared | {"key": jax.random.key(key)}
    return merge(name, tensors[: len(each)], base, shared, each)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shape_and_dtype_are_kept(name, dtype):
    made = run(name, [x.astype(dtype) for x in (BASE, LEFT, RIGHT)])
    assert made.shape == BASE.shape and made.dtype == dtype and bool(jnp.all(jnp.isfinite(made)))


@pytest.mark.parametrize("name", METHODS)
def test_equal_models_merge_into_themselves(name):
    made = run(name, (BASE, BASE, BASE))
    np.testing.assert_allclose(made, BASE, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_narrow_inputs_take_the_wider_dtype(name):
    assert run(name, (BASE.astype(jnp.bfloat16), LEFT, RIGHT)).dtype == (
        jnp.bfloat16 if name == "passthrough" else jnp.float32
    )


def test_linear_is_a_mean_or_a_sum():
    total = 0.2 * LEFT - 0.7 * RIGHT
    np.testing.assert_allclose(methods.linear([LEFT, RIGHT], [0.2, -0.7], normalize=False), total, atol=1e-6)
    with pytest.raises(ValueError, match="weight: adds up to 0"):
        methods.linear([LEFT, RIGHT], [0.5, -0.5])
    np.testing.assert_allclose(methods.linear([LEFT, RIGHT], [0.2, -0.7]), total / -0.5, atol=1e-5)
    np.testing.assert_allclose(methods.linear([LEFT, RIGHT], [1, 3]), methods.linear([RIGHT, LEFT], [6, 2]), atol=1e-6)


def test_slerp_goes_along_the_arc():
    np.testing.assert_allclose(methods.slerp(BASE, LEFT, 0.0), BASE, atol=1e-6)
    np.testing.assert_allclose(methods.slerp(BASE, LEFT, 1.0), LEFT, atol=1e-6)
    first, second = (x / jnp.linalg.norm(x) for x in (BASE, LEFT))
    angle = float(jnp.arccos(jnp.sum(first * second)))
    for t in (0.25, 0.8):
        between = methods.slerp(first, second, t)
        assert float(jnp.linalg.norm(between)) == pytest.approx(1, abs=1e-6)
        assert float(jnp.arccos(jnp.sum(first * between))) == pytest.approx(t * angle, abs=1e-4)


def test_slerp_mixes_the_tensors_themselves_not_their_directions():
    longer = 7 * LEFT
    angle = np.arccos(np.sum(BASE * LEFT) / np.linalg.norm(BASE) / np.linalg.norm(LEFT))
    wanted = (np.sin(0.6 * angle) * BASE + np.sin(0.4 * angle) * longer) / np.sin(angle)
    np.testing.assert_allclose(methods.slerp(BASE, longer, 0.4), wanted, atol=1e-5)


@pytest.mark.parametrize("other", [3 * BASE, -2 * BASE, 0 * BASE], ids=["parallel", "opposite", "zero"])
def test_slerp_is_a_line_between_parallels(other):
    made = methods.slerp(BASE, other, 0.25)
    if float(jnp.linalg.norm(other)):
        np.testing.assert_allclose(made, 0.75 * BASE + 0.25 * other, atol=1e-5)
    assert bool(jnp.all(jnp.isfinite(made)))


def test_ties_elects_the_sign_of_the_sum():
    base = jnp.zeros(5)
    one, two = jnp.array([3.0, -3.0, 1.0, 2.0, 0.0]), jnp.array([-1.0, 1.0, 1.0, -2.0, 4.0])
    made = methods.add_task_vectors(base, [one, two], [1.0, 0.5], elect=True, normalize=True, factor=1.0)
    # Of 3 and -0.5 the first; of -3 and 0.5 the first; of 1 and 0.5 both, over 1.5; of 2 and -1 the first; 4 alone,
    # over its own weight, as a zero agrees with nobody.
    np.testing.assert_allclose(made, [3.0, -3.0, 1.0, 2.0, 4.0], atol=1e-6)
    plain = methods.add_task_vectors(base, [one, two], [1.0, 0.5], elect=True, normalize=False, factor=2.0)
    np.testing.assert_allclose(plain, [6.0, -6.0, 3.0, 4.0, 4.0], atol=1e-6)


def test_a_sum_of_zero_counts_as_positive():
    base, one, two = jnp.zeros(1), jnp.array([2.0]), jnp.array([-2.0])
    made = methods.add_task_vectors(base, [two, one], [1.0, 1.0], elect=True, normalize=False, factor=1.0)
    assert float(made[0]) == 2.0


@hypothesis.given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-40, 5.0]), min_size=1, max_size=40),
    st.integers(0, 40),
    st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_a_stable_sort(values, count, last):
    # One shape, so that it is compiled once.
    x = np.zeros(40, np.float32)
    x[: len(values)] = values
    order = np.argsort(-np.abs(x[::-1] if last else x), kind="stable")[:count]
    wanted = np.zeros(40, bool)
    wanted[39 - order if last else order] = True
    np.testing.assert_array_equal(largest(jnp.asarray(x), count, last=last), wanted)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.999])
def test_so_many_of_the_largest_stay(density):
    kept = np.asarray(methods.keep_largest(DELTA, density))
    assert np.count_nonzero(kept) == max(1, int(density * DELTA.size))
    assert np.abs(kept[kept != 0]).min() >= np.abs(np.asarray(DELTA)[kept == 0]).max()
    np.testing.assert_array_equal(kept[kept != 0], np.asarray(DELTA)[kept != 0])


def test_densities_at_the_ends():
    for keep in (methods.keep_largest, lambda x, d: methods.keep_random(x, d, jax.random.key(0))):
        np.testing.assert_array_equal(keep(DELTA, 1.0), DELTA)
        np.testing.assert_array_equal(keep(DELTA, 0.0), 0 * DELTA)


def test_breadcrumbs_leave_out_the_largest_too():
    kept = np.asarray(methods.keep_middle(DELTA, 0.5, 0.1))
    order = np.sort(np.abs(np.asarray(DELTA)).reshape(-1))
    n = DELTA.size
    assert np.count_nonzero(kept) == n // 2
    assert np.abs(kept).max() == order[n - n // 10 - 1]
    # Where both cannot be, the density is kept and fewer of the largest go.
    assert np.count_nonzero(methods.keep_middle(DELTA, 0.9, 0.3)) == int(0.9 * n)


def test_rescaling_keeps_the_sum_of_magnitudes():
    for kept in (
        methods.keep_largest(DELTA, 0.4, rescale=True),
        methods.keep_random(DELTA, 0.4, jax.random.key(3)),
        methods.keep_middle(DELTA, 0.4, 0.1, rescale=True),
    ):
        assert float(jnp.sum(jnp.abs(kept))) == pytest.approx(float(jnp.sum(jnp.abs(DELTA))), rel=1e-5)


def test_dare_keeps_at_random():
    density, n = 0.6, DELTA.size
    kept = np.asarray(methods.keep_random(DELTA, density, jax.random.key(0)))
    stays = kept != 0
    assert abs(stays.mean() - density) < 3 * np.sqrt(density * (1 - density) / n)
    scales = kept[stays] / np.asarray(DELTA)[stays]
    assert np.ptp(scales) < 1e-5
    assert scales.mean() == pytest.approx(np.abs(DELTA).sum() / np.abs(np.asarray(DELTA)[stays]).sum(), rel=1e-5)
    plain = np.asarray(methods.keep_random(DELTA, density, jax.random.key(0), rescale=False))
    np.testing.assert_array_equal(plain, np.where(stays, DELTA, 0))
    sizes = np.abs(np.asarray(DELTA))
    assert abs(sizes[stays].mean() - sizes[~stays].mean()) < 4 * sizes.std() * np.sqrt(
        1 / stays.sum() + 1 / (~stays).sum()
    )


def test_dare_is_right_on_average():
    draw = jax.vmap(lambda k: jnp.where(jax.random.bernoulli(k, 0.6, DELTA.shape), DELTA, 0))
    keys = jax.random.split(jax.random.key(1), 400)
    kept = draw(keys)
    scale = jnp.sum(jnp.abs(DELTA)) / jnp.sum(jnp.abs(kept), axis=(1, 2))
    mean = np.asarray(jnp.mean(scale[:, None, None] * kept, axis=0))
    one = methods.keep_random(DELTA, 0.6, keys[0])
    np.testing.assert_allclose(one, scale[0] * kept[0], rtol=1e-5)
    noise = np.abs(np.asarray(DELTA)) * np.sqrt(0.4 / 0.6 / 400)
    assert np.abs(mean - np.asarray(DELTA)).mean() < 4 * noise.mean() / np.sqrt(np.pi / 2)
    assert (np.abs(mean - np.asarray(DELTA)) < 4.5 * noise + 1e-4).all()


def test_dare_leaves_what_did_not_change_and_depends_on_the_key():
    changed = LEFT.at[:5].set(BASE[:5])
    made = [run("dare_linear", (BASE, changed, BASE), key=key) for key in (0, 0, 1)]
    np.testing.assert_array_equal(made[0], made[1])
    assert bool(jnp.any(made[0] != made[2]))
    np.testing.assert_array_equal(made[0][:5], BASE[:5])
    both = run("dare_linear", (jnp.zeros(960), jnp.ones(960), 2 * jnp.ones(960)))
    assert len(np.unique(np.round(np.asarray(both), 3))) == 4, "each model has its own draw"


def tree_of(seed, moe=None):
    cfg = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_ff=8, vocab_size=11, moe=moe)
    return transformer.init(cfg, jax.random.key(seed))["params"]


@pytest.mark.parametrize("moe", [None, MoEConfig(experts=2, top_k=1)], ids=["dense", "experts"])
@pytest.mark.parametrize("name", ["slerp", "ties", "dare_ties"])
def test_layers_and_experts_of_a_tree_are_merged_each_by_itself(name, moe):
    trees = [tree_of(seed, moe) for seed in range(3)][: len(EXAMPLES[name])]
    made = merge_trees(name, trees, 0, NEEDS, EXAMPLES[name])
    assert jax.tree.structure(made) == jax.tree.structure(trees[0])
    if name == "dare_ties":
        return
    wanted = tree.leaves(made)["layers/mlp/up/kernel"]
    leaves = [tree.leaves(one)["layers/mlp/up/kernel"] for one in trees]
    for place in np.ndindex(*wanted.shape[:-2]):
        alone = merge(name, [x[place] for x in leaves], 0, NEEDS, EXAMPLES[name])
        np.testing.assert_array_equal(wanted[place], alone)


def test_trees_must_have_the_same_leaves():
    other = {name: leaf for name, leaf in tree_of(1).items() if name != "norm"}
    with pytest.raises(ValueError, match="norm/scale is not in all trees"):
        merge_trees("linear", [tree_of(0), other], None, {}, [NEEDS, NEEDS])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="merge_method: 'tias' is unknown; the known ones are linear, slerp"):
        merge("tias", [BASE], 0, {}, [{}])
    with pytest.raises(ValueError, match=r"\[24, 40\], \[40, 24\] differ"):
        merge("linear", [BASE, LEFT.T], None, {}, [NEEDS, NEEDS])
    with pytest.raises(ValueError, match="base: ties needs a base model"):
        merge("ties", [BASE, LEFT], None, {}, [NEEDS, NEEDS])
    with pytest.raises(ValueError, match="slerp: t is missing"):
        merge("slerp", [BASE, LEFT], 0, {}, [{}, {}])
    with pytest.raises(ValueError, match="linear: weight is missing"):
        merge("linear", [BASE, LEFT], None, {}, [NEEDS, {}])


def test_methods_do_not_share_defaults():
    assert METHODS["ties"].shared["normalize"] and not METHODS["dare_ties"].shared["normalize"]
    assert METHODS["dare_linear"].shared["rescale"] and not METHODS["breadcrumbs"].shared["rescale"]
