"""Section 3 of the paper: each weighting maximizes the objective that it is derived from.

On N candidates of pi_old, a policy is a vector of weights w that sum to one, pi_old is 1/N, and the
objective (6) is sum_i w_i q_i - lambda D_f(w, 1/N), with D_f = (1/N) sum_i f(N w_i). The weights
of Proposition 3.1 are N w_i = g_f((q_i - nu) / lambda); our `temp` absorbs lambda, N and constants.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import xlogy

import bandit


def power_generator(alpha):
    """Of the alpha-divergence (table 1), continued to negative x as a convex function."""

    def f(x):
        return (jnp.abs(x) ** alpha - x) / (alpha * (alpha - 1))

    return f


def chi_squared_generator(x):
    return x**2 - 1


def kl_generator(x):
    return jax.scipy.special.xlogy(x, x)


class Case(NamedTuple):
    """A weighting, the generator it belongs to, lambda over temp for N candidates, and its floor.

    lambda follows from f'(N w_i) = (q_i - nu) / lambda: f' is log x + 1, 2 x and, but for a
    constant, x^(alpha-1) / (alpha - 1).
    """

    reweight: callable
    generator: callable
    lambda_over_temp: callable
    ell: float = 0.0  # weights are at least ell / N


def power_case(reweight, alpha):
    return Case(reweight, power_generator(alpha), lambda n: (alpha - 1) / n ** (alpha - 1))


def neg_case(ell):
    def reweight(q, temp):
        return bandit.reweight_neg(q, temp, ell)

    return Case(reweight, chi_squared_generator, lambda n: 1 / (2 * n), ell)


def bandit_power(alpha):
    def reweight(q, temp):
        return bandit.reweight_power(q, temp, alpha)

    return reweight


CASES = {
    "exp": Case(bandit.reweight_exp, kl_generator, lambda n: 1.0),
    "linear": Case(bandit.reweight_linear, chi_squared_generator, lambda n: 1 / (2 * n)),
    "square": power_case(bandit.reweight_square, 1.5),
    "power 1.25": power_case(bandit_power(1.25), 1.25),
    "power 2": power_case(bandit_power(2.0), 2.0),
    "power 3": power_case(bandit_power(3.0), 3.0),
    "neg(-0.3)": neg_case(-0.3),
    "neg(-1)": neg_case(-1.0),
}


def divergence(f, p, q):
    """D_f of a signed measure p from a probability measure q (appendix B)."""
    return jnp.sum(q * f(p / q))


def suboptimality(case, q, temp, weights):
    """An upper bound on how far `weights` are from the maximum of the objective.

    The objective is concave, so the gain from w to any w' is at most grad (w' - w), which is
    largest where w' has one candidate above the floor and all others at it (the Frank-Wolfe gap).
    """
    n = len(q)
    uniform = jnp.full(n, 1 / n)
    regularization = case.lambda_over_temp(n) * temp

    def objective(w):
        return w @ q - regularization * divergence(case.generator, w, uniform)

    grad = jax.grad(objective)(weights)
    floor = case.ell / n
    best_gain = (1 - n * floor) * grad.max() + floor * grad.sum()
    return best_gain - grad @ weights


@cache
def jitted(name):
    """q (N,), temp -> weights (N,) and their suboptimality, in float64."""

    @jax.jit
    def weigh(q, temp):
        weights = CASES[name].reweight(q, temp)
        return weights, suboptimality(CASES[name], q, temp, weights)

    return weigh


# Q-values of 12 candidates, with ties, and a temperature from sharp to flat.
q_values = st.lists(st.integers(-20, 20), min_size=12, max_size=12)
temperatures = st.floats(-1, 2).map(lambda exponent: 10.0**exponent)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


every_case = pytest.mark.parametrize("name", CASES)


@every_case
@given(tenths=q_values, temp=temperatures)
def test_weights_maximize_their_objective_and_improve(name, tenths, temp):
    """Propositions 3.1 and 3.2, and Theorem 3.3: sum_i w_i q_i is no less than the mean of q."""
    q = np.array(tenths) / 10
    with jax.enable_x64(True):
        weights, gap = jax.device_get(jitted(name)(q, temp))
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert weights.min() >= CASES[name].ell / len(q)
    # On the scale of the objective; bisection leaves `power` 1e-9 from its normalizer.
    assert gap < 1e-6 * (np.ptp(q) + temp)
    assert weights @ q >= q.mean() - 1e-6


@pytest.mark.usefixtures("x64")
def test_the_other_weightings_do_not_maximize_the_objective_of_linear():
    """So the test above can fail."""
    q = jnp.array([1.0, 0.6, 0.5, -0.3])
    for name in ("exp", "linear", "square", "power 1.25"):
        weights = CASES[name].reweight(q, 0.5)
        gap = suboptimality(CASES["linear"], q, 0.5, weights)
        assert (gap < 1e-6) == (name == "linear"), name


@pytest.mark.usefixtures("x64")
def test_by_hand():
    """Two candidates, q = (1, 0), linear: w maximizes w - lambda (2 w^2 + 2 (1 - w)^2 - 1).

    The derivative 1 - lambda (8 w - 4) vanishes at w = 1/2 + 1/(8 lambda), lambda = temp / 4.
    """
    for temp, expected in ((2.0, 0.75), (1.0, 1.0), (0.5, 1.0)):
        weights = CASES["linear"].reweight(jnp.array([1.0, 0.0]), temp)
        np.testing.assert_allclose(weights, [expected, 1 - expected], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_low_floor_gives_the_solution_on_signed_measures():
    """Proposition 3.2 with the chi-squared divergence: w_i = 1/N + (q_i - mean(q)) / temp."""
    q = jnp.array([1.0, 0.2, -0.5, -3.0])
    weights = bandit.reweight_neg(q, 2.0, -100.0)
    np.testing.assert_allclose(weights, 0.25 + (q - q.mean()) / 2.0, atol=1e-12)
    assert float(weights.min()) < 0
    positive = bandit.reweight_linear(q, 2.0)
    lam = CASES["linear"].lambda_over_temp(4) * 2.0

    def objective(w):
        return float(w @ q - lam * divergence(chi_squared_generator, w, jnp.full(4, 0.25)))

    assert objective(weights) > objective(positive) + 0.1  # more room, a higher maximum


# --------------------------------- divergence of signed measures ---------------------------------
CONVEX = {
    "chi-squared": chi_squared_generator,
    "alpha = 1.25": power_generator(1.25),
    "alpha = 1.5": power_generator(1.5),
    "alpha = 3": power_generator(3.0),
}


@cache
def jitted_divergence(generator):
    return jax.jit(partial(divergence, CONVEX[generator]))


@st.composite
def signed_and_probability_measure(draw):
    """p (N,), of either sign, and q (N,) > 0, both of sum one."""
    n = draw(st.sampled_from([2, 30]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q = rng.dirichlet(np.ones(n)) * 0.9 + 0.1 / n
    step = rng.normal(size=n)
    p = q + 10.0 ** draw(st.floats(-3, 1)) * (step - step.mean())
    return p, q


@pytest.mark.parametrize("generator", CONVEX)
@given(measures=signed_and_probability_measure())
def test_the_signed_divergence_is_positive(generator, measures):
    """Appendix B: f convex on all reals with f(1) = 0 gives D_f(p, q) >= 0, and 0 only at p = q."""
    p, q = measures
    with jax.enable_x64(True):
        assert float(jitted_divergence(generator)(p, q)) > 0
        assert float(jitted_divergence(generator)(q, q)) == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ell", [-0.3, -1.0, -5.0])
def test_the_divergence_of_negative_weights_is_positive(ell):
    q = np.random.default_rng(0).normal(size=64)
    weights = bandit.reweight_neg(jnp.asarray(q), 8.0, ell)
    assert float(weights.min()) == pytest.approx(ell / 64)
    assert float(divergence(chi_squared_generator, weights, jnp.full(64, 1 / 64))) > 0.1


def test_a_generator_that_is_not_convex_on_the_negative_axis_is_not_enough():
    """x log |x| continues the KL divergence, but a signed measure can be at a negative distance."""
    ratio = np.array([-10.0] + 110 * [1.1])  # dP / dQ for a uniform Q
    assert ratio.mean() == pytest.approx(1)
    assert xlogy(ratio, np.abs(ratio)).mean() == pytest.approx(-0.1035, abs=1e-3)
