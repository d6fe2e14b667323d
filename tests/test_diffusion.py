"""The schedule, the sampler and the networks, against plain formulas in float64 and against distributions known."""

import math

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gempo_neg as gempo  # the siblings are equal outside the reweighting: test_scripts.py

TIMES = np.concatenate([np.linspace(0, 1, 1001), [1e-6, 1e-4, gempo.T_MIN, gempo.T_MAX]]).astype(np.float32)


def test_schedule_is_the_cosine_formula_in_float64():
    alpha, sigma = map(np.float64, gempo.noise_schedule(jnp.asarray(TIMES)))
    expected_alpha, expected_sigma = helpers.schedule(TIMES)
    np.testing.assert_allclose(alpha, expected_alpha, atol=2e-7)  # float32 rounds to 6e-8
    np.testing.assert_allclose(sigma, expected_sigma, rtol=2e-6, atol=1e-9)  # also near zero: no cancellation
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=4e-7)


def test_schedule_falls_from_all_signal_to_all_noise():
    alpha, sigma = map(np.asarray, gempo.noise_schedule(jnp.linspace(0, 1, 500)))
    assert alpha[0] == pytest.approx(1, abs=1e-7) and sigma[0] == 0
    assert alpha[-1] == pytest.approx(0, abs=1e-6) and sigma[-1] == pytest.approx(1, abs=1e-6)
    assert (np.diff(alpha) < 0).all() and (np.diff(sigma) >= 0).all()
    assert gempo.noise_schedule(jnp.float32(gempo.T_MAX))[0] > 0.005  # some signal is left where the sampler starts


def test_add_noise_is_the_forward_process_with_uniform_times_and_normal_noise():
    actions = jax.random.uniform(jax.random.key(1), (50, 400, 2), minval=-1)
    x_t, t, eps = map(np.float64, gempo.add_noise(jax.random.key(0), actions))
    assert t.shape == (50, 400, 1) and x_t.shape == eps.shape == (50, 400, 2)
    alpha, sigma = helpers.schedule(t)
    np.testing.assert_allclose(x_t, alpha * np.float64(actions) + sigma * eps, atol=1e-5)
    # Kolmogorov-Smirnov on 20,000 times and 40,000 noises; the keys are fixed, so this does not flicker.
    assert stats.kstest(t.ravel(), stats.uniform(gempo.T_MIN, gempo.T_MAX - gempo.T_MIN).cdf).pvalue > 0.01
    assert stats.kstest(eps.ravel(), stats.norm.cdf).pvalue > 0.01
    correlations = np.corrcoef(
        [t.ravel(), eps[..., 0].ravel(), eps[..., 1].ravel(), np.asarray(actions[..., 0]).ravel()]
    )
    assert np.abs(correlations - np.eye(4)).max() < 4 / math.sqrt(20_000)  # independent: within 4 standard errors


def make_actor():
    agent = helpers.create_agent("neg")
    return agent.actor, helpers.perturb(agent.params["actor"])


def test_actor_is_the_plain_network_on_concatenated_inputs():
    actor, params = make_actor()
    rng = np.random.default_rng(0)
    x, t, obs = rng.normal(size=(5, 7, 2)), rng.uniform(size=(5, 7, 1)), rng.normal(size=(5, 1, 3))
    ours = actor.apply(params, *(jnp.float32(v) for v in (x, t, obs)))
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
    np.testing.assert_allclose(ours, rounded[0] @ rounded[1], rtol=1e-5)  # a bfloat16 sum is off by up to 4e-3


def test_sampler_is_the_textbook_one_that_calls_the_network_for_every_particle_at_every_step():
    """Ancestral DDPM with the posterior mean in terms of beta_i and alpha-bar_i, the noises drawn by the same keys."""
    actor, params = make_actor()
    obs, key, num_samples, num_steps = jax.random.normal(jax.random.key(2), (4, 3)), jax.random.key(3), 6, 20
    grid = np.linspace(gempo.T_MIN, gempo.T_MAX, num_steps + 1)
    alpha_bar = helpers.schedule(grid)[0] ** 2
    keys = jax.random.split(key, num_steps + 1)
    x = np.float64(jax.random.normal(keys[0], (4, num_samples, 2)))
    apply = jax.jit(actor.apply)
    for i in range(num_steps, 0, -1):
        a_i = alpha_bar[i] / alpha_bar[i - 1]
        t = jnp.full((4, num_samples, 1), grid[i], jnp.float32)
        eps_hat = np.float64(apply(params, jnp.float32(x), t, jnp.repeat(obs[:, None], num_samples, axis=1)))
        x_0 = np.clip((x - np.sqrt(1 - alpha_bar[i]) * eps_hat) / np.sqrt(alpha_bar[i]), -1, 1)
        x = np.sqrt(alpha_bar[i - 1]) * (1 - a_i) * x_0 + np.sqrt(a_i) * (1 - alpha_bar[i - 1]) * x
        x /= 1 - alpha_bar[i]
        if i > 1:
            x += np.sqrt(1 - a_i) * np.float64(jax.random.normal(keys[i], x.shape))
    ours = np.asarray(gempo.sample_actions(actor, params, obs, key, num_samples, num_steps))
    np.testing.assert_allclose(ours, np.clip(x, -1, 1), atol=2e-4)  # float32, through 20 steps of a random network
    assert (np.abs(ours) <= 1).all() and ours.std() > 0.1


def test_bfloat16_changes_the_particles_by_far_less_than_the_noise_that_is_added_to_them():
    actor, params = make_actor()
    obs, key = jax.random.normal(jax.random.key(2), (64, 3)), jax.random.key(3)
    exact = np.asarray(gempo.sample_actions(actor, params, obs, key, 8, 20))
    rounded = np.asarray(gempo.sample_actions(actor.clone(dot=gempo.bfloat16_dot), params, obs, key, 8, 20))
    change = np.abs(rounded - exact)
    assert 0 < change.mean() < 0.02 * exact.std()  # inputs rounded by up to 0.4%, through 20 steps
    assert np.quantile(change, 0.99) < gempo.Args().additive_noise / 2  # a random network may amplify the odd one


class MixtureDenoiser(nn.Module):
    """The exact eps_hat of the mixture sum_k p_k N(sign(obs) mu_k, s_k^2 I): -sigma times the score of x_t."""

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
        offsets = x[..., None, :] - alpha[..., None] * sign[..., None] * jnp.array(self.means)  # (B, N, K, d)
        variances = alpha**2 * jnp.array(self.stds) ** 2 + sigma**2  # (K,)
        logits = jnp.log(jnp.array(self.proportions)) - self.action_dim / 2 * jnp.log(variances)
        responsibilities = nn.softmax(logits - (offsets**2).sum(-1) / (2 * variances))
        return sigma * (responsibilities[..., None] * offsets / variances[..., None]).sum(-2)


MIXTURES = {
    "1-D": MixtureDenoiser((0.3, 0.7), ((-0.5,), (0.3,)), (0.05, 0.1), 1),
    "2-D": MixtureDenoiser((0.5, 0.2, 0.3), ((-0.4, -0.4), (0.5, -0.2), (0.1, 0.6)), (0.06, 0.06, 0.08), 2),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sampler_with_an_exact_denoiser_draws_from_its_mixture_given_the_observation(mixture, sign):
    n = 10_000
    obs = jnp.array([[sign], [-sign]], jnp.float32)
    sampler = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5))
    x = sign * np.float64(sampler(mixture, {}, obs, jax.random.key(0), n, 200))[0]  # (n, d), the mean's sign undone
    means = np.array(mixture.means)
    nearest = np.linalg.norm(x[:, None] - means, axis=-1).argmin(axis=1)
    for k, (proportion, std) in enumerate(zip(mixture.proportions, mixture.stds, strict=True)):
        members = x[nearest == k]
        # 4 standard errors of the sample, and 0.01 for the steps being 200 and not infinitely many.
        assert abs(len(members) / n - proportion) < 4 * math.sqrt(proportion * (1 - proportion) / n) + 0.01
        assert np.abs(members.mean(axis=0) - means[k]).max() < 4 * std / math.sqrt(len(members)) + 0.002
        assert np.abs(members.std(axis=0) / std - 1).max() < 4 / math.sqrt(2 * len(members)) + 0.03


def test_sampler_gives_each_state_and_each_key_its_own_actions():
    sampler, obs = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5)), jnp.ones((2, 1))
    x, other = (sampler(MIXTURES["1-D"], {}, obs, jax.random.key(seed), 3, 10) for seed in (0, 1))
    assert x.shape == (2, 3, 1) and len(np.unique(np.concatenate([x, other]))) == 12


def test_mish_and_its_gradient_are_the_definition_at_any_size():
    x = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -1e3, -104, -88, -44, 44, 88, 104, 1e3, 1e4]])
    np.testing.assert_allclose(gempo.mish(jnp.float32(x)), helpers.mish(x), rtol=1e-5, atol=2e-6)
    with np.errstate(over="ignore"):
        tanh_softplus, sigmoid = np.tanh(np.logaddexp(0, x)), 1 / (1 + np.exp(-x))
    gradient = tanh_softplus + x * (1 - tanh_softplus**2) * sigmoid
    np.testing.assert_allclose(jax.vmap(jax.grad(gempo.mish))(jnp.float32(x)), gradient, atol=2e-6)


def test_every_layer_starts_orthogonal_with_gain_sqrt_2_and_zero_bias():
    agent = helpers.create_agent("neg", 17, 6, hidden_dim=256)
    kernels, biases = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path({k: agent.params[k] for k in ("actor", "critic")}):
        name, is_critic, leaf = path[-1].key, path[0].key == "critic", np.float64(leaf)
        if name == "frequencies":
            assert leaf.shape == (32,) and leaf.std() == pytest.approx(0.2, abs=0.1)  # 4 standard errors of 32 draws
        else:
            (kernels if "kernel" in name else biases).extend(leaf if is_critic else [leaf])
    assert len(kernels) == 10 + 2 * 4 and len(biases) == 8 + 2 * 3  # first layers are sums, with one bias
    assert all((bias == 0).all() for bias in biases)
    for kernel in kernels:
        gram = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
        np.testing.assert_allclose(gram, 2 * np.eye(len(gram)), atol=1e-5)
    shapes = {kernel.shape for kernel in kernels}
    hidden = {(256, 256), (256, 6), (64, 64), (17, 128), (128, 128), (256, 1)}
    assert shapes == hidden | {(6, 256), (64, 256), (128, 256), (17, 256)}
