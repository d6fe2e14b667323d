"""The schedule, the sampler and the networks, against float64 formulas and known distributions."""

import math

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gempo_neg as gempo  # the siblings are equal outside the reweighting: test_scripts.py

EDGES = [1e-6, 1e-4, gempo.T_MIN, gempo.T_MAX]
TIMES = np.concatenate([np.linspace(0, 1, 1001), EDGES]).astype(np.float32)


def test_schedule_is_the_cosine_formula_in_float64():
    alpha, sigma = map(np.float64, gempo.noise_schedule(jnp.asarray(TIMES)))
    expected_alpha, expected_sigma = helpers.schedule(TIMES)
    np.testing.assert_allclose(alpha, expected_alpha, atol=2e-7)  # float32 rounds to 6e-8
    # Relative, so also near zero: no cancellation.
    np.testing.assert_allclose(sigma, expected_sigma, rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=4e-7)


def test_schedule_falls_from_all_signal_to_all_noise():
    alpha, sigma = map(np.asarray, gempo.noise_schedule(jnp.linspace(0, 1, 500)))
    assert alpha[0] == pytest.approx(1, abs=1e-7) and sigma[0] == 0
    assert alpha[-1] == pytest.approx(0, abs=1e-6) and sigma[-1] == pytest.approx(1, abs=1e-6)
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) >= 0).all()
    # Some signal is left where the sampler starts.
    assert gempo.noise_schedule(jnp.float32(gempo.T_MAX))[0] > 0.005


def test_add_noise_is_the_forward_process_with_uniform_times_and_normal_noise():
    actions = jax.random.uniform(jax.random.key(1), (50, 400, 2), minval=-1)
    x_t, t, eps = map(np.float64, gempo.add_noise(jax.random.key(0), actions))
    assert t.shape == (50, 400, 1) and x_t.shape == eps.shape == (50, 400, 2)
    alpha, sigma = helpers.schedule(t)
    np.testing.assert_allclose(x_t, alpha * np.float64(actions) + sigma * eps, atol=1e-5)
    # Kolmogorov-Smirnov on 20,000 times and 40,000 noises; the keys are fixed: no flicker.
    expected = stats.uniform(gempo.T_MIN, gempo.T_MAX - gempo.T_MIN)
    assert stats.kstest(t.ravel(), expected.cdf).pvalue > 0.01
    assert stats.kstest(eps.ravel(), stats.norm.cdf).pvalue > 0.01
    # Independent: within 4 standard errors.
    columns = [t.ravel(), eps[..., 0].ravel(), eps[..., 1].ravel(), actions[..., 0].ravel()]
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 4 / math.sqrt(20_000)
    # In the order of drawing too, in which one key for both would show.
    correlation = np.corrcoef(t.ravel(), eps.ravel()[: t.size])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(20_000)


def test_times_of_training_are_those_of_the_released_code_and_reach_both_ends():
    _, t, _ = gempo.add_noise(jax.random.key(0), jnp.zeros((100, 200, 2)))
    t = np.float64(t)
    assert 0.001 <= t.min() < 0.001 + 5e-4 and 0.9946 - 5e-4 < t.max() <= 0.9946 + 1e-7
    assert (gempo.T_MIN, gempo.T_MAX) == (0.001, 0.9946)


def make_actor():
    agent = helpers.create_agent("neg")
    return agent.actor, helpers.perturb(agent.params["actor"])


def test_actor_is_the_plain_network_on_concatenated_inputs():
    actor, params = make_actor()
    rng = np.random.default_rng(0)
    x, t, obs = rng.normal(size=(5, 7, 2)), rng.uniform(size=(5, 7, 1)), rng.normal(size=(5, 1, 3))
    ours = actor.apply(params, *map(jnp.float32, (x, t, obs)))
    np.testing.assert_allclose(ours, helpers.actor(params, x, t, obs), atol=1e-4, rtol=1e-4)


def test_critics_are_two_plain_networks_on_concatenated_inputs():
    agent = helpers.create_agent("neg")
    critic, params = agent.critic, helpers.perturb(agent.params["critic"])
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(5, 1, 3)), rng.normal(size=(5, 7, 2))
    ours = critic.apply(params, jnp.float32(obs), jnp.float32(actions))
    np.testing.assert_allclose(ours, helpers.critics(params, obs, actions), atol=1e-4, rtol=1e-4)
    assert np.abs(ours[0] - ours[1]).max() > 0.1  # two critics, not one twice


def test_bfloat16_dot_rounds_its_inputs_and_sums_in_float32():
    rng = np.random.default_rng(0)
    x, w = (rng.uniform(1, 2, shape).astype(np.float32) for shape in ((5, 1000), (1000, 3)))
    rounded = [np.float64(v.astype(jnp.bfloat16)) for v in (x, w)]
    ours = gempo.bfloat16_dot(jnp.asarray(x), jnp.asarray(w), (((1,), (0,)), ((), ())))
    assert ours.dtype == np.float32
    # A bfloat16 sum would be off by up to 4e-3.
    np.testing.assert_allclose(ours, rounded[0] @ rounded[1], rtol=1e-5)


def test_for_a_gpu_the_sampler_is_unrolled_and_draws_the_same(monkeypatch):
    actor, params = make_actor()
    inputs = actor, params, jnp.ones((2, 3)), jax.random.key(0), 3, 4
    on_cpu = gempo.sample_actions(*inputs)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    trace = jax.make_jaxpr(gempo.sample_actions, static_argnums=(0, 4, 5))
    assert "unroll=4" in str(trace(*inputs))
    np.testing.assert_allclose(gempo.sample_actions(*inputs), on_cpu, atol=1e-5)


def test_for_a_gpu_the_result_of_bfloat16_dot_is_rounded_too(monkeypatch):
    x, w, dims = jnp.array([[1.0, 2**-9]]), jnp.ones((2, 1)), (((1,), (0,)), ((), ()))
    assert gempo.bfloat16_dot(x, w, dims) == 1 + 2**-9  # 10 bits
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rounded = gempo.bfloat16_dot(x, w, dims)
    assert rounded.dtype == jnp.bfloat16 and rounded == 1


def test_sampler_is_the_textbook_one_with_a_whole_network_at_every_step():
    """Ancestral DDPM by the posterior mean in beta_i and alpha-bar_i; the same noise."""
    actor, params = make_actor()
    key, num_samples, num_steps = jax.random.key(3), 6, 20
    obs = jax.random.normal(jax.random.key(2), (4, 3))
    grid = np.linspace(gempo.T_MIN, gempo.T_MAX, num_steps + 1)
    alpha_bar = helpers.schedule(grid)[0] ** 2
    eps = np.float64(jax.random.normal(key, (num_steps + 1, 4, num_samples, 2)))
    x = eps[0]
    repeated_obs = jnp.repeat(obs[:, None], num_samples, axis=1)
    apply = jax.jit(actor.apply)
    for i in range(num_steps, 0, -1):
        a_i = alpha_bar[i] / alpha_bar[i - 1]
        t = jnp.full((4, num_samples, 1), grid[i], jnp.float32)
        eps_hat = np.float64(apply(params, jnp.float32(x), t, repeated_obs))
        x_0 = (x - np.sqrt(1 - alpha_bar[i]) * eps_hat) / np.sqrt(alpha_bar[i])
        x_0 = np.clip(x_0, -1, 1)
        x = np.sqrt(alpha_bar[i - 1]) * (1 - a_i) * x_0 + np.sqrt(a_i) * (1 - alpha_bar[i - 1]) * x
        x /= 1 - alpha_bar[i]
        if i > 1:
            x = x + np.sqrt(1 - a_i) * eps[i]
    ours = np.asarray(gempo.sample_actions(actor, params, obs, key, num_samples, num_steps))
    # In float32, through 20 steps of a random network.
    np.testing.assert_allclose(ours, np.clip(x, -1, 1), atol=2e-4)
    assert (np.abs(ours) <= 1).all() and ours.std() > 0.1


@pytest.mark.parametrize("is_fast", [True, False])
def test_particles_are_drawn_in_bfloat16_where_that_is_fast(monkeypatch, is_fast):
    monkeypatch.setattr(gempo, "has_fast_bfloat16", lambda: is_fast)
    agent = helpers.create_agent("neg", additive_noise=0.0)
    agent = agent.replace(slow_params=helpers.as_jax(helpers.perturb(agent.slow_params)))
    obs, key = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.key(2)
    ours = gempo.draw_particles(agent, obs, key, jax.random.key(3))
    dot = gempo.bfloat16_dot if is_fast else jax.lax.dot_general
    sizes = agent.args.num_particles, agent.args.diffusion_steps
    inputs = agent.slow_params["actor"], obs, key, *sizes
    expected = gempo.sample_actions(agent.actor.clone(dot=dot), *inputs)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    other = jax.lax.dot_general if is_fast else gempo.bfloat16_dot
    rounded_otherwise = gempo.sample_actions(agent.actor.clone(dot=other), *inputs)
    assert np.abs(ours - rounded_otherwise).max() > 1e-4


@pytest.mark.parametrize(
    ("backend", "cpu_info", "is_fast"),
    [
        ("gpu", "flags : sse2", True),
        ("cpu", "flags : sse2 avx512f avx512_bf16", True),  # AMD Zen 4
        ("cpu", "flags : sse2 avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("cpu", "flags : sse2 avx512f", False),
        ("cpu", None, False),
    ],
)
def test_where_bfloat16_is_fast(monkeypatch, tmp_path, backend, cpu_info, is_fast):
    file = tmp_path / "cpuinfo"
    if cpu_info is not None:
        file.write_text(cpu_info)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(gempo.pathlib, "Path", lambda path: file)
    assert gempo.has_fast_bfloat16() == is_fast


def test_bfloat16_changes_the_particles_far_less_than_the_noise_added_to_them():
    actor, params = make_actor()
    rounding = actor.clone(dot=gempo.bfloat16_dot)
    inputs = params, jax.random.normal(jax.random.key(2), (64, 3)), jax.random.key(3), 8, 20
    exact = np.asarray(gempo.sample_actions(actor, *inputs))
    change = np.abs(np.asarray(gempo.sample_actions(rounding, *inputs)) - exact)
    assert 0 < change.mean() < 0.02 * exact.std()  # inputs rounded by up to 0.4%, in 20 steps
    # A random network may amplify the odd one.
    assert np.quantile(change, 0.99) < gempo.Args().additive_noise / 2


class MixtureDenoiser(nn.Module):
    """The exact eps_hat, -sigma times the score of x_t, of sum_k p_k N(sign(obs) mu_k, s_k^2 I)."""

    proportions: tuple
    means: tuple  # (K, d)
    stds: tuple
    action_dim: int

    def embed_time(self, t):
        return t

    def embed_obs(self, obs):
        return jnp.sign(obs)

    def denoise(self, x, t, sign):
        alpha, sigma = gempo.noise_schedule(t)
        means = alpha[..., None] * sign[..., None] * jnp.array(self.means)
        offsets = x[..., None, :] - means  # (B, N, K, d)
        variances = alpha**2 * jnp.array(self.stds) ** 2 + sigma**2  # (K,)
        logits = jnp.log(jnp.array(self.proportions)) - self.action_dim / 2 * jnp.log(variances)
        logits -= (offsets**2).sum(-1) / (2 * variances)
        shares = nn.softmax(logits)[..., None]
        return sigma * (shares * offsets / variances[..., None]).sum(-2)


MEANS_2 = (-0.4, -0.4), (0.5, -0.2), (0.1, 0.6)
MIXTURES = {
    "1-D": MixtureDenoiser((0.3, 0.7), ((-0.5,), (0.3,)), (0.05, 0.1), 1),
    "2-D": MixtureDenoiser((0.5, 0.2, 0.3), MEANS_2, (0.06, 0.06, 0.08), 2),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sampler_with_an_exact_denoiser_draws_from_its_mixture_given_the_observation(mixture, sign):
    n = 10_000
    obs = jnp.array([[sign], [-sign]], jnp.float32)
    sampler = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5))
    x = np.float64(sampler(mixture, {}, obs, jax.random.key(0), n, 200))[0]
    x = sign * x  # (n, d), the sign of the means undone
    means = np.array(mixture.means)
    nearest = np.linalg.norm(x[:, None] - means, axis=-1).argmin(axis=1)
    for k, (proportion, std) in enumerate(zip(mixture.proportions, mixture.stds, strict=True)):
        members = x[nearest == k]
        # 4 standard errors, and a little for the steps being 200 and not infinitely many.
        share_error = 4 * math.sqrt(proportion * (1 - proportion) / n)
        mean_error, std_error = 4 * std / math.sqrt(len(members)), 4 / math.sqrt(2 * len(members))
        assert abs(len(members) / n - proportion) < share_error + 0.01
        assert np.abs(members.mean(axis=0) - means[k]).max() < mean_error + 0.002
        assert np.abs(members.std(axis=0) / std - 1).max() < std_error + 0.03


def test_sampler_gives_each_state_and_each_key_its_own_actions():
    sampler = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5))
    keys = [jax.random.key(seed) for seed in (0, 1)]
    drawn = [sampler(MIXTURES["1-D"], {}, jnp.ones((2, 1)), key, 3, 10) for key in keys]
    assert drawn[0].shape == (2, 3, 1)
    assert len(np.unique(np.concatenate(drawn))) == 12


def test_mish_and_its_gradient_are_the_definition_at_any_size():
    large = [44, 88, 104, 1e3, 1e4]
    x = np.concatenate([np.linspace(-30, 30, 601), large, np.negative(large)])
    np.testing.assert_allclose(gempo.mish(jnp.float32(x)), helpers.mish(x), rtol=1e-5, atol=2e-6)
    with np.errstate(over="ignore"):
        tanh_softplus, sigmoid = np.tanh(np.logaddexp(0, x)), 1 / (1 + np.exp(-x))
    gradient = tanh_softplus + x * (1 - tanh_softplus**2) * sigmoid
    ours = jax.vmap(jax.grad(gempo.mish))(jnp.float32(x))
    np.testing.assert_allclose(ours, gradient, atol=2e-6)


def assert_orthogonal(kernel):
    """With gain sqrt(2): the rows or the columns, whichever are fewer."""
    gram = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
    np.testing.assert_allclose(gram, 2 * np.eye(len(gram)), atol=1e-5)


@pytest.mark.parametrize("width", [256, 32, 8])
def test_every_layer_starts_orthogonal_with_gain_sqrt_2_and_zero_bias(width):
    """First layers too, as one matrix on all their inputs: at 8 they are narrower than these."""
    agent = helpers.create_agent("neg", 17, 6, hidden_dim=width)
    networks = {part: agent.params[part] for part in ("actor", "critic")}
    kernels, biases = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(networks):
        name, is_critic, leaf = path[-1].key, path[0].key == "critic", np.float64(leaf)
        if name == "frequencies":
            assert leaf.shape == (32,)
            assert leaf.std() == pytest.approx(0.2, abs=0.1)  # 4 standard errors of 32 draws
            continue
        group = kernels if "kernel" in name else biases
        group += [*leaf] if is_critic else [leaf]
    assert len(kernels) == len(biases) == 8 + 2 * 3
    assert all((bias == 0).all() for bias in biases)
    for kernel in kernels:
        assert_orthogonal(kernel)
    actor = {(6 + 64 + 128, width), (width, width), (width, 6)}
    features = {(64, 64), (17, 128), (128, 128)}
    critic = {(17 + 6, width), (width, width), (width, 1)}
    assert {kernel.shape for kernel in kernels} == actor | features | critic


def test_both_critics_start_from_values_of_their_own():
    for kernel in jax.tree.leaves(helpers.create_agent("neg").params["critic"]):
        if kernel.any():
            assert not np.array_equal(kernel[0], kernel[1])


def test_the_time_features_do_not_lose_what_they_are_given():
    """Different times, different features: cos and sin of 2 pi t times each frequency."""
    actor, params = make_actor()
    t = jnp.linspace(0, 1, 50)[:, None]
    embedding = np.asarray(actor.apply(params, t, method="embed_time"))
    assert len(np.unique(embedding.round(5), axis=0)) == 50
