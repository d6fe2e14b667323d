"""bandit.py: weightings against float64, sampler, Theorem D.2, NCE, files and bad input."""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bandit  # noqa: E402
from bandit import Args, reweight  # noqa: E402

N = 16
reweight_jit = jax.jit(reweight, static_argnums=(2, 3, 4))


# --- reweighting


def reference_weights(q, lam, weighting, ell=0.0, alpha=2.0):
    """The definition in float64: one root of sum_i g((q_i - nu) / lam) = 1, found by brentq."""
    x = (np.asarray(q, np.float64) - np.max(np.asarray(q, np.float64))) / float(lam)
    power = {"square": 2.0, "power": 1 / (alpha - 1)}.get(weighting, 1.0)
    floor = ell / len(x) if weighting == "neg" else 0.0

    def g(nu):
        if weighting == "exp":
            return np.exp(x - nu)
        if weighting == "neg":
            return np.maximum(x - nu, floor)
        return np.maximum(x - nu, 0.0) ** power

    # in units of lam, nu is at least -1 - max floor and at most log N above the best particle
    low, high = -2.0 - abs(ell), math.log(len(x)) + 1.0
    nu = brentq(lambda nu: g(nu).sum() - 1.0, low, high, xtol=1e-15, rtol=1e-14, maxiter=500)
    return g(nu)


rewards = hnp.arrays(np.float32, N, elements=st.floats(-1, 1, width=32, allow_subnormal=False))
CASES = [("exp", 0.0, 2.0), ("linear", 0.0, 2.0), ("square", 0.0, 2.0)]
CASES += [("neg", ell, 2.0) for ell in (0.0, -0.1, -0.3, -1.0)]
CASES += [("power", 0.0, alpha) for alpha in (1.05, 1.25, 1.5, 2.0)]


@pytest.mark.parametrize("weighting, ell, alpha", CASES)
@settings(max_examples=60, deadline=None)
@given(q=rewards, size=st.sampled_from([0.0, 1e-3, 1.0, 1e5]), exponent=st.floats(-3, 3))
def test_weights_match_float64(weighting, ell, alpha, q, size, exponent):
    q, temp = q * np.float32(size), np.float32(10.0**exponent)
    w = np.asarray(reweight_jit(q, temp, weighting, ell, alpha), np.float64)
    assert abs(w.sum() - 1) < 1e-5
    np.testing.assert_allclose(w, reference_weights(q, temp, weighting, ell, alpha), atol=5e-5)


@pytest.mark.parametrize("weighting, ell, alpha", CASES)
def test_offset_of_1e5_and_many_particles(weighting, ell, alpha):
    rng = np.random.default_rng(0)
    for temp in (1e-3, 0.05, 1.0, 1e3):
        q = np.float32(1e5 + rng.normal(size=256) * temp)
        w = np.asarray(reweight_jit(q, np.float32(temp), weighting, ell, alpha), np.float64)
        assert abs(w.sum() - 1) < 1e-5
        np.testing.assert_allclose(w, reference_weights(q, np.float32(temp), weighting, ell, alpha), atol=5e-5)


@settings(max_examples=40, deadline=None)
@given(q=rewards, exponent=st.floats(-2, 2))
def test_power_above_two(q, exponent):
    """Past alpha = 2 the weight's slope is infinite at zero: float32 keeps the sum, not 5e-5."""
    temp = np.float32(10.0**exponent)
    w = np.asarray(reweight_jit(q, temp, "power", 0.0, 3.0), np.float64)
    assert abs(w.sum() - 1) < 2e-3
    np.testing.assert_allclose(w, reference_weights(q, temp, "power", 0.0, 3.0), atol=2e-3)


def test_leading_axes_and_solve_normalizer():
    q = jax.random.normal(jax.random.key(0), (3, 5, N))
    for weighting, ell, alpha in (*CASES[:3], CASES[5], CASES[8]):
        w = reweight_jit(q, 0.7, weighting, ell, alpha)
        assert w.shape == q.shape
        np.testing.assert_allclose(w[1, 2], reweight_jit(q[1, 2], 0.7, weighting, ell, alpha), atol=1e-6)
        nu = bandit.solve_normalizer(q, 0.7, weighting, ell, alpha)
        assert nu.shape == (3, 5, 1)
        if weighting == "linear":
            np.testing.assert_allclose(jnp.maximum(q - nu, 0).sum(-1), 0.7, rtol=1e-5)
        if weighting == "exp":
            np.testing.assert_allclose(jnp.exp((q - nu) / 0.7), w, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(q=rewards, exponent=st.floats(-2, 2))
def test_identities_of_the_table(q, exponent):
    temp = np.float32(10.0**exponent)
    linear = reweight_jit(q, temp, "linear")
    np.testing.assert_allclose(reweight_jit(q, temp, "power", 0.0, 2.0), linear, atol=1e-5)
    square = reweight_jit(q, temp, "square")
    np.testing.assert_allclose(reweight_jit(q, temp, "power", 0.0, 1.5), square, atol=1e-5)
    np.testing.assert_array_equal(reweight_jit(q, temp, "neg", 0.0), linear)
    wd1 = reweight_jit(q, temp, "wd1")
    assert abs(float(wd1.sum())) < 1e-5
    # qvpo: N w_i = max(q_i - nu, 0), which is chi-squared with g(x) = x / 2 and lambda = 1/2
    lam = bandit.sum_one_temperature(temp, "qvpo", N)
    qvpo = np.asarray(reweight_jit(q, jnp.float32(lam), "qvpo"), np.float64)
    nu = brentq(lambda nu: np.maximum(q.astype(float) - nu, 0).mean() - 1, -3, 1, xtol=1e-14)
    np.testing.assert_allclose(N * qvpo, np.maximum(q - nu, 0), atol=1e-4)
    # and policy improvement (Theorem 3.3): weights rise with q
    for w in (linear, square, wd1, reweight_jit(q, temp, "neg", -0.3)):
        assert float(jnp.dot(w - w.mean(), q)) >= -1e-5


def test_temperature_means_the_same_for_every_n():
    """Mean-one weights do not move when every particle is doubled."""
    q = np.random.default_rng(1).normal(size=40).astype(np.float32)
    for weighting, ell, alpha in (*CASES[:3], CASES[5], CASES[8]):
        mean_one = []
        for x in (q, np.repeat(q, 2)):
            lam = bandit.sum_one_temperature(0.3, weighting, len(x), alpha)
            mean_one.append(len(x) * np.asarray(reweight_jit(x, lam, weighting, ell, alpha)))
        np.testing.assert_allclose(np.repeat(mean_one[0], 2), mean_one[1], atol=1e-3)


def test_wd1_by_hand():
    w = reweight(jnp.array([0.0, 1.0]), 1.0, "wd1")  # A = (-1, 1)
    expected = math.tanh(1.0)
    np.testing.assert_allclose(w, [-expected, expected], rtol=1e-5)


def test_kl_to_uniform():
    assert float(bandit.kl_to_uniform(jnp.full(8, 1 / 8))) == pytest.approx(0, abs=1e-6)
    one_hot = jnp.zeros(8).at[3].set(1.0)
    assert float(bandit.kl_to_uniform(one_hot)) == pytest.approx(math.log(8), abs=1e-3)
    assert np.isfinite(bandit.kl_to_uniform(jnp.array([-0.3, 0.8, 0.5])))


# --- sampler and Theorem D.2

PLAIN = bandit.SignedMixture((0.3, 0.7), (-0.6, 0.5), (0.1, 0.2), (1.0, 1.0))


def mixture_cdf(mix, x):
    parts = zip(mix.probs, mix.means, mix.stds, mix.weights, strict=True)
    return sum(p * w * stats.norm.cdf(x, m, s) for p, m, s, w in parts)


@pytest.mark.parametrize("mix", [PLAIN, bandit.HOLE], ids=["plain", "signed"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_do_not_depend_on_eta(mix, eta):
    """With the exact field every eta ends in the mixture, signed weights included."""
    x_1 = jax.random.normal(jax.random.key(1), (20_000,))
    sample = jax.jit(
        lambda x, key: bandit.sample_actions(lambda x, t: bandit.closed_form_velocity(mix, x, t), x, key, 200, eta)
    )
    x_0 = np.asarray(sample(x_1, jax.random.key(2)))
    # 1.63 / sqrt(n) = 0.0115 is the 1% point of KS; the rest is for 200 steps
    assert stats.kstest(x_0, lambda x: mixture_cdf(mix, x)).statistic < 0.02
    again = np.asarray(sample(x_1, jax.random.key(3)))
    moved = np.abs(again - x_0).mean()
    assert moved > 0.05 if eta else moved == 0  # the noise is really there


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_is_equation_4(eta):
    """Drift and diffusion of a short step against the printed SDE on alpha = 1 - t, sigma = t."""
    x, v, h = 0.8, 0.3, 1e-3
    z = jax.random.normal(jax.random.key(0), (1_000_000,))
    z = (z - z.mean()) / z.std()
    for t in (0.2, 0.5, 0.8):
        moved = np.asarray(bandit.sampler_step(x, v, z, t, t - h, eta), np.float64) - x
        ratio = -1 / (1 - t)  # alpha' / alpha
        assert moved.mean() / -h == pytest.approx((1 + eta**2) * v - eta**2 * ratio * x, rel=0.02)
        wanted = eta**2 * (2 * t - 2 * ratio * t**2)
        assert moved.var() / h == pytest.approx(wanted, rel=0.02, abs=1e-6)


def brute_force_field(mix, x_t, t, n=40_001):
    """E[w v | x_t] / E[w | x_t] by a sum over x_0, w as a function of x_0, all in float64."""
    x_0 = np.linspace(-6, 6, n)
    parts = [p * stats.norm.pdf(x_0, m, s) for p, m, s in zip(mix.probs, mix.means, mix.stds, strict=True)]
    density = sum(parts)
    w = sum(w * part for w, part in zip(mix.weights, parts, strict=True)) / np.maximum(density, 1e-300)
    posterior = density * np.exp(-(((x_t - (1 - t) * x_0) / t) ** 2) / 2)
    velocity = (x_t - x_0) / t  # eps - x_0 at this x_t
    return (posterior * w * velocity).sum() / (posterior * w).sum(), (posterior * w).sum() / posterior.sum()


@pytest.mark.parametrize("mix", [PLAIN, bandit.HOLE, bandit.GONE], ids=["plain", "hole", "gone"])
def test_theorem_d2_closed_form(mix):
    signs = set()
    for t in (0.1, 0.3, 0.6, 0.9):
        for x_t in (-1.1, -0.4, 0.05, 0.3, 0.9):
            field, weight = brute_force_field(mix, x_t, t)
            assert float(bandit.mean_weight(mix, x_t, t)) == pytest.approx(weight, abs=2e-4)
            if abs(weight) > 0.02:  # the field has a pole where E[w | x_t] = 0
                assert float(bandit.closed_form_velocity(mix, x_t, t)) == pytest.approx(field, abs=5e-3)
                signs.add(weight > 0)
    assert signs == ({True, False} if mix is bandit.GONE else {True})


def test_theorem_d2_is_where_the_gradient_vanishes():
    """The loss with signed weights is stationary at the closed form and not beside it."""
    x_0, w = bandit.draw_mixture(bandit.HOLE, jax.random.key(0), 400_000)
    assert float(w.min()) < 0
    assert float(w.sum()) == pytest.approx(1, abs=0.01)

    def loss(shift, key):
        def velocity(x, t):
            bump = shift[0] + shift[1] * x + shift[2] * jnp.sin(4 * x) * (1 - t)
            return bandit.closed_form_velocity(bandit.HOLE, x, t) + bump

        return bandit.flow_loss(bandit.matching_errors(velocity, key, x_0), w)

    grad = jax.jit(jax.grad(loss))
    at_zero = grad(jnp.zeros(3), jax.random.key(1))
    beside = grad(jnp.array([0.2, 0.0, 0.2]), jax.random.key(1))
    assert np.abs(at_zero).max() < 0.03
    assert beside[0] > 0.2 and beside[2] > 0.05


def test_learned_velocity_repels_from_case_two():
    args = Args(problem="velocity", pretrain_steps=200)
    params = bandit.learn_velocity(args, bandit.GONE, jax.random.key(0))

    def velocity(x, t):
        return bandit.VelocityNet(args.hidden).apply(params, x, t)

    x = jnp.array([-0.8, -0.6, 0.6, 0.8])
    np.testing.assert_allclose(velocity(x, 0.4), bandit.closed_form_velocity(bandit.GONE, x, 0.4), atol=0.35)
    x_1 = jax.random.normal(jax.random.key(1), (4000,))
    samples = bandit.sample_actions(velocity, x_1, jax.random.key(2), 100, 0.0)
    old, _ = bandit.draw_mixture(bandit.GONE, jax.random.key(3), 4000)
    share = [float(jnp.mean(bandit.mean_weight(bandit.GONE, x, 0.0) <= 0)) for x in (old, samples)]
    assert share[0] > 0.2 and share[1] < 0.05


# --- losses


def test_nce_gradient_is_the_numerical_one():
    """With respect to the network, in float64, in three random directions."""
    with jax.enable_x64(True):
        net = bandit.VelocityNet(8)
        x_0 = jnp.linspace(-1.0, 1.0, 12)
        weights = reweight(x_0, 2.0, "linear")
        params = net.init(jax.random.key(0), x_0, x_0)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

        @jax.jit
        def loss(params):
            errors = bandit.matching_errors(lambda x, t: net.apply(params, x, t), jax.random.key(1), x_0)
            return bandit.nce_loss(errors, weights, 0.7)

        grads = jax.grad(loss)(params)
        leaves, tree = jax.tree.flatten(params)
        for seed in range(3):
            keys = jax.random.split(jax.random.key(seed), len(leaves))
            way = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
            ends = [loss(tree.unflatten([p + h * d for p, d in zip(leaves, way, strict=True)])) for h in (1e-5, -1e-5)]
            slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), way, strict=True))
            assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)
            assert abs(float(slope)) > 1e-3


def test_nce_by_hand():
    """Its gradient is (w - softmax(-errors / gamma)) / gamma: it vanishes at the target."""
    errors, w, gamma = np.array([0.3, 1.2, 2.0]), np.array([0.5, 0.3, 0.2]), 0.5
    model = np.exp(-errors / gamma) / np.exp(-errors / gamma).sum()
    assert float(bandit.nce_loss(jnp.array(errors), jnp.array(w), gamma)) == pytest.approx(
        -(w * np.log(model)).sum(), rel=1e-5
    )
    grad = jax.grad(bandit.nce_loss)(jnp.array(errors), jnp.array(w), gamma)
    np.testing.assert_allclose(grad, (w - model) / gamma, atol=1e-5)
    at_target = jax.grad(bandit.nce_loss)(jnp.array(-gamma * np.log(w)), jnp.array(w), gamma)
    np.testing.assert_allclose(at_target, 0, atol=1e-6)


# --- the script


@pytest.fixture
def quick_compile():
    """For runs so small that the compiler's optimizations cost more than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


TINY = Args(
    num_seeds=2,
    seed=7,
    num_epochs=3,
    num_particles=16,
    gradient_steps=2,
    hidden=8,
    pretrain_steps=20,
)


@pytest.mark.usefixtures("quick_compile")
def test_files_of_a_run(tmp_path, capsys):
    everything = ("exp", "linear", "square", "neg", "power", "wd1", "qvpo")
    args = replace(TINY, problem="escape", methods=everything, ell=(0.0, -0.3), runs_dir=str(tmp_path))
    folder = bandit.main(args)
    assert folder.parent == tmp_path and folder.name.startswith("escape__bandit__7__")
    with (folder / "regret.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["method", "seed", "epoch", "regret"]
    names = ["exp", "linear", "square", "neg(0)", "neg(-0.3)", "power", "wd1", "qvpo"]
    wanted = [(m, s, e) for m in names for s in "78" for e in "0123"]
    assert [(r["method"], r["seed"], r["epoch"]) for r in rows] == wanted
    regret = {(r["method"], r["seed"], r["epoch"]): float(r["regret"]) for r in rows}
    assert all(0 <= value <= 1 for value in regret.values())
    for epoch in "0123":  # the same draws for all methods, so a floor of 0 IS linear
        assert regret["neg(0)", "7", epoch] == pytest.approx(regret["linear", "7", epoch], abs=1e-5)
    assert regret["exp", "7", "0"] == regret["wd1", "7", "0"]
    assert regret["exp", "7", "0"] != regret["exp", "8", "0"]
    for name in ("regret.png", "policy.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    events = b"".join(p.read_bytes() for p in folder.glob("events.out.tfevents.*"))
    for tag in (b"charts/regret/neg_-0.3", b"charts/temperature/exp", b"losses/actor/wd1"):
        assert tag in events
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names, "escaped", "+-"])


@pytest.mark.usefixtures("quick_compile")
def test_seeds_are_reproducible_and_independent_of_num_seeds():
    args = bandit.resolve(replace(TINY, methods=("linear",)))
    two = bandit.run_bandit(args, jnp.array([7, 8]))["regret"]
    one = bandit.run_bandit(args, jnp.array([8]))["regret"]
    np.testing.assert_allclose(two[0, 1], one[0, 0], atol=1e-4)
    assert two.shape == (1, 2, 4)


@pytest.mark.usefixtures("quick_compile")
def test_temperature_follows_the_kl_budget():
    """A budget above the KL lowers the temperature, one below it raises it."""
    last = []
    for target in (2.5, 0.01):
        args = replace(TINY, methods=("exp", "linear"), target_kl=target, num_epochs=5)
        last.append(np.asarray(bandit.run_bandit(bandit.resolve(args), jnp.array([1]))["temperature"]))
    assert (last[0][:, 0, -1] < 0.05).all() and (last[1][:, 0, -1] > 0.05).all()
    np.testing.assert_allclose(last[0][:, 0, 0], 0.05, rtol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_short_runs_learn_by_both_matchings():
    """Twelve epochs on broad: both ways of matching more than halve the regret."""
    for matching in ("flow", "nce"):
        args = Args(
            problem="broad",
            methods=("square",),
            matching=matching,
            num_epochs=12,
            eta=0.5,
            num_particles=64,
            pretrain_steps=300,
        )
        regret = np.asarray(bandit.run_bandit(bandit.resolve(args), jnp.arange(2))["regret"])
        assert (regret[..., -1] < 0.5 * regret[..., 0]).all()


@pytest.mark.usefixtures("quick_compile")
def test_divergence_is_reported(tmp_path, capsys):
    args = replace(TINY, methods=("exp",), learning_rate=1e30, num_epochs=4, runs_dir=str(tmp_path))
    folder = bandit.main(args)
    out, err = capsys.readouterr()
    assert "2/2" in out and "exp diverged on seeds [7, 8]" in err
    assert "nan" in (folder / "regret.csv").read_text()


def test_divergence_of_one_seed_leaves_the_others():
    args = bandit.resolve(replace(TINY, problem="escape", num_seeds=3))
    regret = np.full((2, 3, 4), 0.1)
    regret[1, 0, 2:] = np.nan
    rows = bandit.make_table(args, ["exp", "neg(-1)"], regret)
    assert rows[1][-2:] == ["3/3 [0.44, 1.00]", "0/3"]  # Wilson's interval of 3 of 3
    assert rows[2][-2:] == ["2/3 [0.21, 0.94]", "1/3"] and "nan" not in rows[2]


@pytest.mark.usefixtures("quick_compile")
def test_velocity_panel(tmp_path, capsys):
    folder = bandit.main(Args(problem="velocity", pretrain_steps=4, hidden=8, sampler_steps=3, runs_dir=str(tmp_path)))
    assert (folder / "velocity.png").read_bytes()[:4] == b"\x89PNG"
    assert "Case II: learned" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(ell=(0.3,)), ["--ell", "at most 0"]),
        (dict(ell=()), ["--ell"]),
        (dict(ell=(float("nan"),)), ["--ell", "at most 0"]),
        (dict(alpha=1.0), ["--alpha", "above 1"]),
        (dict(num_seeds=0), ["--num-seeds", "at least 1"]),
        (dict(seed=-1), ["--seed", "at least 0"]),
        (dict(temperature=-0.1), ["--temperature", "above 0"]),
        (dict(temperature=float("nan")), ["--temperature", "above 0"]),
        (dict(eta=-0.5), ["--eta", "at least 0"]),
        (dict(target_kl=0.0), ["--target-kl", "log N"]),
        (dict(loss_clip=0.0), ["--loss-clip", "above 0"]),
        (dict(num_epochs=0), ["--num-epochs", "at least 1"]),
        (dict(num_particles=1), ["--num-particles", "at least 2"]),
        (dict(methods=("exp", "exp")), ["--methods", "once"]),
        (dict(matching="nce", methods=("exp", "wd1")), ["--matching nce", "exp linear"]),
        (dict(matching="nce", methods=("neg",)), ["--matching nce", "--ell 0"]),
    ],
)
def test_bad_input_is_one_line(change, words, tmp_path):
    with pytest.raises(SystemExit) as error:
        bandit.main(replace(TINY, runs_dir=str(tmp_path / "runs"), **change))
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message
    assert not (tmp_path / "runs").exists()


def test_command_line(tmp_path):
    script = Path(bandit.__file__)
    command = [sys.executable, str(script), "--methods", "neg", "--ell", "-0.3", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.strip() == "bandit.py: --ell must be at most 0 and finite; got (-0.3, 0.1)"


@pytest.mark.slow
@pytest.mark.parametrize("problem, method", [("sharp", "linear"), ("broad", "square")])
def test_q3_on_held_out_seeds(problem, method):
    """Acceptance: at the defaults, better than exp by more than two paired standard errors."""
    args = bandit.resolve(Args(problem=problem, methods=("exp", method)))
    regret = np.asarray(bandit.run_bandit(args, jnp.arange(100, 120))["regret"], np.float64)
    gain = (regret[0] - regret[1])[:, 1:].mean(axis=-1)
    assert gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(20)


@pytest.mark.slow
def test_q2_on_held_out_seeds():
    """At the defaults of escape neg(-0.3) escapes in most of 20 seeds, the others in none."""
    args = bandit.resolve(Args(problem="escape"))
    regret = np.asarray(bandit.run_bandit(args, jnp.arange(100, 120))["regret"])
    assert (regret[:3, :, -1] > 0.45).all()
    assert np.mean(regret[3, :, -1] < 0.25) > 0.5
