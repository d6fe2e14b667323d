"""The weights against a float64 root finder, by properties and by hand; and their temperature."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS, kl_to_uniform, root_finder_weights
from hypothesis import given, strategies as st

ELLS = (0.0, -0.05, -0.3, -1.0, -5.0)
VARIANTS = [("exp",), ("linear",), ("square",), *(("neg", ell) for ell in ELLS)]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "".join(map(str, v)))


@cache
def jitted(name, function):
    return jax.jit(getattr(SCRIPTS[name], function))


def reweight(variant, q, temp):
    name, *ell = variant
    return np.asarray(jitted(name, "reweight")(jnp.asarray(q), temp, *ell))


def solve_normalizer(variant, q, temp):
    name, *ell = variant
    return np.asarray(jitted(name, "solve_normalizer")(jnp.asarray(q), temp, *ell))


def shifted(q):
    """As `reweight` shifts q before it solves for nu."""
    return q - q.max(axis=-1, keepdims=True)


@st.composite
def q_and_temp(draw, sizes=(1, 2, 3, 7, 64, 200)):
    """float32 |q| <= 1e5 at all scales and offsets, some tied; a temperature in [1e-3, 1e3]."""
    n = draw(st.sampled_from(sizes))
    offset = draw(st.sampled_from([0.0, 1.0, -500.0, 1e4, -9e4]))
    scale = 10.0 ** draw(st.floats(-3, 4))
    levels = draw(st.sampled_from([0, 1, 2, 5]))  # 0: no ties
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "uniform", "heavy-tailed"]))
    draws = {"normal": rng.normal, "uniform": rng.uniform, "heavy-tailed": rng.standard_cauchy}
    values = draws[kind](size=n) if levels == 0 else rng.integers(levels, size=n)
    temp = np.float32(10.0 ** draw(st.floats(-3, 3)))
    return np.clip(offset + scale * values, -1e5, 1e5).astype(np.float32), temp


def check_against_root_finder(variant, q, temp):
    name, *ell = variant
    weights, _ = root_finder_weights(name, q, float(temp), *ell)
    ours = reweight(variant, q, temp)
    np.testing.assert_allclose(ours, weights, atol=1e-5)
    assert abs(ours.astype(np.float64).sum() - 1) < 1e-6 * max(len(q), 10)
    _, nu = root_finder_weights(name, shifted(q), float(temp), *ell)
    assert abs(solve_normalizer(variant, shifted(q), temp)[0] - nu) < 1e-5 * max(temp, abs(nu))


@every_variant
@given(q_and_temp())
def test_weights_and_nu_are_those_of_a_float64_root_finder(variant, drawn):
    check_against_root_finder(variant, *drawn)


@every_variant
@pytest.mark.parametrize("n", [1000, 4096])
@pytest.mark.parametrize("temp", [1e-3, 1.0, 1e3])
def test_weights_of_thousands_of_particles_are_those_of_a_float64_root_finder(variant, n, temp):
    rng = np.random.default_rng(n)
    values = [rng.normal(size=n), 1e5 * rng.uniform(-1, 1, n)]
    values += [rng.integers(3, size=n), 1e3 + 1e-3 * rng.normal(size=n)]
    for q in values:
        check_against_root_finder(variant, np.float32(q), np.float32(temp))


@given(q_and_temp(), st.sampled_from(ELLS))
def test_neg_is_the_closed_form_on_prefix_sums(drawn, ell):
    q, temp = drawn[0].astype(np.float64), float(drawn[1])
    n, b, x = len(q), ell / len(q), np.sort(q - q.max())[::-1]
    prefix, count = np.cumsum(x), np.arange(1, n + 1)
    k = (prefix - count * x <= temp * (1 - n * b)).sum()
    nu = (prefix[k - 1] - temp * (1 - (n - k) * b)) / k
    expected = np.maximum((q - q.max() - nu) / temp, b)
    np.testing.assert_allclose(reweight(("neg", ell), *drawn), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "q", "temp", "weights"),
    [
        (("exp",), [0, 3 * math.log(2), 3 * math.log(5)], 3, [1 / 8, 2 / 8, 5 / 8]),
        (("linear",), [3, 0, 2, 1], 2, [0.75, 0, 0.25, 0]),  # nu = 1.5
        (("square",), [-1, 3, 4], 5, [0, 9 / 25, 16 / 25]),  # nu = 0
        (("neg", -0.4), [0, 1, 2, 3], 2, [-0.1, -0.1, 0.35, 0.85]),  # nu = 1.3, floor -0.4 / 4
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_examples_computed_by_hand(variant, q, temp, weights):
    np.testing.assert_allclose(reweight(variant, np.float32(q), temp), weights, atol=1e-6)


@every_variant
@given(q_and_temp())
def test_a_higher_q_never_weighs_less_and_equal_ones_weigh_the_same(variant, drawn):
    q, temp = drawn
    ours, order = reweight(variant, q, temp), np.argsort(q)
    assert (np.diff(ours[order]) >= 0).all()
    assert (np.diff(ours[order])[np.diff(q[order]) == 0] == 0).all()


@every_variant
@given(q_and_temp())
def test_the_policy_improves(variant, drawn):
    """Theorem 3.3: sum_i w_i q_i >= mean_i q_i, up to the error of w times the range of q."""
    q, temp = drawn[0].astype(np.float64), drawn[1]
    gain = np.sum(reweight(variant, *drawn) * (q - q.mean()))
    assert gain >= -1e-5 * np.ptp(q)
    if temp < np.ptp(q):
        assert gain > 1e-4 * np.ptp(q) / len(q)  # not by giving every particle the same weight


@every_variant
@given(st.integers(0, 1000))
def test_shifting_q_or_scaling_q_and_temperature_changes_nothing(variant, seed):
    """Bit for bit where both are exact in float32: whole numbers and powers of two."""
    q = np.random.default_rng(seed).integers(-50, 50, size=64).astype(np.float32)
    expected = reweight(variant, q, np.float32(20))
    np.testing.assert_array_equal(reweight(variant, q + 2.0**16, np.float32(20)), expected)
    np.testing.assert_array_equal(reweight(variant, q * 2.0**10, np.float32(20 * 2**10)), expected)
    np.testing.assert_array_equal(
        reweight(variant, q * 2.0**-12, np.float32(20 * 2**-12)), expected
    )


@given(q_and_temp())
def test_neg_with_a_floor_of_zero_is_linear_bit_for_bit(drawn):
    np.testing.assert_array_equal(reweight(("neg", 0.0), *drawn), reweight(("linear",), *drawn))


@every_variant
def test_a_high_temperature_gives_uniform_weights(variant):
    q = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    np.testing.assert_allclose(reweight(variant, q, np.float32(1e7)), 1 / 64, rtol=1e-4)


@every_variant
def test_a_low_temperature_shares_the_weight_among_the_best(variant):
    q = np.array([5, 1, 5, 4, -3, 0, 2, 3], np.float32)  # two best of eight
    floor = variant[1] / 8 if variant[0] == "neg" else 0
    expected = np.where(q == 5, (1 - 6 * floor) / 2, floor)
    np.testing.assert_allclose(reweight(variant, q, np.float32(1e-3)), expected, atol=1e-6)


@pytest.mark.parametrize("ell", ELLS)
@given(q_and_temp())
def test_neg_never_goes_below_its_floor(ell, drawn):
    q, temp = drawn
    scaled = len(q) * reweight(("neg", ell), q, temp)
    assert scaled.min() >= ell * (1 + 1e-6) - 1e-6


@pytest.mark.parametrize("ell", [ell for ell in ELLS if ell < 0])
def test_neg_reaches_its_floor_in_multiples_of_the_mean_weight(ell):
    q = np.linspace(-100, 0, 64, dtype=np.float32)
    assert 64 * reweight(("neg", ell), q, np.float32(1)).min() == pytest.approx(ell, rel=1e-6)


@every_variant
@pytest.mark.parametrize("temp", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "q", [[3.0], [1.0, 1.0, 1.0], [0, 1, 1, 2, 2, -1], [1e5, -1e5, 1e5, 0]], ids=str
)
def test_gradients_are_finite_with_ties_and_for_one_particle(variant, q, temp):
    name, *ell = variant

    def sum_of_squares(q, temp):
        return jnp.sum(SCRIPTS[name].reweight(q, temp, *ell) ** 2)

    gradients = jax.grad(sum_of_squares, (0, 1))(jnp.float32(q), jnp.float32(temp))
    assert all(np.isfinite(g).all() for g in gradients)


@every_variant
def test_leading_axes_are_separate_states(variant):
    q = np.random.default_rng(0).normal(size=(3, 2, 16)).astype(np.float32)
    temp = np.float32(0.5)
    weights, nu = reweight(variant, q, temp), solve_normalizer(variant, q, temp)
    assert weights.shape == (3, 2, 16) and nu.shape == (3, 2, 1)
    rows = [[reweight(variant, q[i, j], temp) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(weights, rows, atol=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_compute_weights_is_reweight_with_the_flags_of_the_script(name):
    q = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    flags = {"ell": -0.7} if name == "neg" else {}
    ours = SCRIPTS[name].compute_weights(q, 0.3, SCRIPTS[name].Args(**flags))
    np.testing.assert_allclose(
        ours, reweight((name, *flags.values()), q, np.float32(0.3)), atol=1e-6
    )


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_temperature_loss_and_its_gradient_are_those_of_the_paper(script):
    """lambda (kappa - KL): its gradient by log lambda is itself, the weights being constants."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(64, 0.3), size=5) * 1.2 - 0.2 / 64  # some below zero
    assert (weights < 0).any()
    log_lambda, kappa = 0.7, 1.3
    kl = kl_to_uniform(weights).mean()
    inputs = jnp.float32(log_lambda), jnp.float32(weights), kappa
    loss, ours_kl = script.temperature_loss(*inputs)
    assert float(ours_kl) == pytest.approx(kl, abs=1e-5)
    assert float(loss) == pytest.approx(math.exp(log_lambda) * (kappa - kl), abs=1e-4)
    gradient, _ = jax.grad(script.temperature_loss, has_aux=True)(*inputs)
    assert float(gradient) == pytest.approx(float(loss), rel=1e-6)


@every_variant
@pytest.mark.parametrize("q_scale", [0.01, 1000.0])
def test_the_learned_temperature_holds_the_kl_budget_at_any_scale_of_q(variant, q_scale):
    name, *ell = variant
    script, kappa = SCRIPTS[name], 1.5
    q = q_scale * jax.random.normal(jax.random.key(0), (32, 64))

    @jax.jit
    def descend(log_lambda):
        def step(log_lambda, rate):
            weights = script.reweight(q, jnp.exp(log_lambda), *ell)
            gradient, kl = jax.grad(script.temperature_loss, has_aux=True)(
                log_lambda, weights, kappa
            )
            return log_lambda - rate * jnp.sign(gradient), kl

        rates = 0.1 * 0.99 ** jnp.arange(1500)  # can move log lambda by up to 10
        return jax.lax.scan(step, log_lambda, rates)[1]

    kls = descend(jnp.zeros(()))
    assert abs(kls[0] - kappa) > 0.1 and abs(kls[-1] - kappa) < 0.01  # from away to the budget


@every_variant
def test_an_offset_of_q_far_above_its_spread_costs_no_precision(variant):
    """Without the shift, prefix sums of 64 values near 1e5 would be rounded by 0.5."""
    q = np.random.default_rng(0).integers(-50, 50, size=64) / np.float32(128)
    far = np.float32(q + 1e5)
    np.testing.assert_array_equal(far - np.float32(1e5), q)  # exact in float32
    expected = reweight(variant, q, np.float32(0.2))
    np.testing.assert_allclose(reweight(variant, far, np.float32(0.2)), expected, atol=1e-6)
