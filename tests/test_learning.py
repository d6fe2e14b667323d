"""The losses and the update against plain NumPy float64, Theorem D.2, and environments whose values are known."""

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import probe_envs  # noqa: F401 (registers the environments)
import pytest
from helpers import SCRIPTS

import gempo_neg as gempo  # where one script stands for all: they are equal outside the reweighting (test_scripts.py)

every_script = pytest.mark.parametrize("name", SCRIPTS)
FLAGS = dict(hidden_dim=32, num_particles=16, diffusion_steps=4, td_best_of=3, reward_scale=0.5, gamma=0.9, target_kl=1)
FLAGS |= dict(tau=0.1, old_policy_interval=3, policy_lr=1e-3, q_lr=2e-3, temperature_lr=3e-3, additive_noise=0.3)


def make_batch():
    rng = np.random.default_rng(0)
    obs, next_obs, actions = rng.normal(size=(8, 3)), rng.normal(size=(8, 3)), rng.uniform(-1, 1, (8, 2))
    fields = (obs, actions, rng.normal(size=8), next_obs, np.arange(8) % 3 == 0)
    return gempo.Transition(*(np.float32(field) for field in fields))


def make_agent(name):
    agent = helpers.create_agent(name, **FLAGS)
    params = {part: helpers.perturb(agent.params[part], seed) for seed, part in enumerate(("actor", "critic"))}
    slow_params = helpers.perturb(params, seed=5)
    copied = jax.tree.map(jnp.asarray, (params | {"log_lambda": jnp.float32(-0.5)}, slow_params))
    return agent.replace(params=copied[0], slow_params=copied[1])


def adam_steps(agent, updated):
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), updated.params, agent.params)


@every_script
def test_update_computes_the_losses_of_a_plain_float64_version(name):
    script, agent, batch, key = SCRIPTS[name], make_agent(name), make_batch(), jax.random.key(7)
    args = script.Args(**FLAGS)
    updated, metrics = jax.jit(partial(script.update, args=args))(agent, batch, key)

    next_key, particle_key, noise_key, loss_key = jax.random.split(key, 4)
    sample = jax.jit(script.sample_actions, static_argnums=(0, 4, 5))
    next_actions = sample(agent.actor, agent.params["actor"], batch.next_obs, next_key, 3, 4)
    pi_old = agent.actor.clone(dot=script.bfloat16_dot)
    particles = sample(pi_old, agent.slow_params["actor"], batch.obs, particle_key, 16, 4)
    particles = np.float64(particles) + 0.3 * np.float64(jax.random.normal(noise_key, particles.shape))
    targets = []
    for i in range(8):  # the best of three by the smaller target critic; nothing after a termination
        next_q = helpers.critics(agent.slow_params["critic"], batch.next_obs[i], np.float64(next_actions[i]))
        targets.append(0.5 * batch.rewards[i] + (0 if batch.terminations[i] else 0.9 * next_q.min(axis=0).max()))
    q_loss = np.mean((helpers.critics(agent.params["critic"], batch.obs, batch.actions) - np.array(targets)) ** 2)
    q_values = helpers.critics(agent.params["critic"], batch.obs[:, None], particles).mean(axis=0)
    ell = {"ell": args.ell} if name == "neg" else {}
    weights = np.stack([helpers.root_finder_weights(name, q, np.exp(-0.5), **ell)[0] for q in q_values])
    _, t, eps = script.add_noise(loss_key, jnp.float32(particles))
    alpha, sigma = helpers.schedule(t)
    eps_hat = helpers.actor(agent.params["actor"], alpha * particles + sigma * eps, t, batch.obs[:, None])
    pi_loss = np.mean(16 * weights[..., None] * np.minimum((eps_hat - np.float64(eps)) ** 2, 5))
    kl = helpers.kl_to_uniform(weights).mean()

    expected = {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": pi_loss,
        "losses/temperature_loss": np.exp(-0.5) * (1 - kl),
        "losses/q_values": q_values.mean(),
        "charts/temperature": np.exp(-0.5),
        "charts/kl": kl,
        "charts/weights_min": 16 * weights.min(),
        "charts/weights_negative_share": np.mean(weights < 0),
        "charts/particles_std": particles.std(axis=1).mean(),
        "charts/params_norm": np.sqrt(
            sum((leaf**2).sum() for leaf in jax.tree.leaves(helpers.float64(updated.params)))
        ),
    }
    assert metrics.keys() == expected.keys()
    for tag, value in expected.items():  # float32 through networks of gain sqrt(2): about 1e-5
        assert float(metrics[tag]) == pytest.approx(value, rel=1e-3, abs=1e-4), tag


@every_script
def test_update_takes_adam_steps_at_the_rate_of_each_part(name):
    script, agent, args = SCRIPTS[name], make_agent(name), SCRIPTS[name].Args(**FLAGS)
    updated, metrics = jax.jit(partial(script.update, args=args))(agent, make_batch(), jax.random.key(0))
    steps = adam_steps(agent, updated)
    for part, rate in (("actor", 1e-3), ("critic", 2e-3)):  # Adam's first step is the rate wherever a gradient is
        sizes = np.concatenate([np.abs(leaf).ravel() for leaf in jax.tree.leaves(steps[part])])
        assert sizes.max() == pytest.approx(rate, rel=1e-3) and np.median(sizes) == pytest.approx(rate, rel=0.01)
    # The temperature falls where the weights are flatter than the budget, and rises where they are sharper.
    assert steps["log_lambda"] == pytest.approx(3e-3 * np.sign(metrics["charts/kl"] - args.target_kl), rel=1e-3)


def test_update_moves_the_target_critics_by_tau_and_copies_the_actor_at_its_interval():
    agent, args = make_agent("neg"), gempo.Args(**FLAGS)
    update = jax.jit(partial(gempo.update, args=args))
    for i in range(1, 8):
        before, (agent, _) = agent, update(agent, make_batch(), jax.random.key(i))
        assert agent.num_updates == i
        source = agent.params if i % 3 == 0 else before.slow_params
        jax.tree.map(np.testing.assert_array_equal, agent.slow_params["actor"], source["actor"])
        old, new = (helpers.float64(params["critic"]) for params in (before.slow_params, agent.params))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, old, new)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), agent.slow_params["critic"], expected)


def test_update_learns_nothing_from_what_follows_a_termination():
    agent, args, key = make_agent("neg"), gempo.Args(**FLAGS), jax.random.key(0)
    update = jax.jit(partial(gempo.update, args=args))
    batch = make_batch()
    for terminations, matters in ((np.ones(8), False), (np.zeros(8), True)):
        batch = batch._replace(terminations=np.float32(terminations))
        _, metrics = update(agent, batch, key)
        _, other = update(agent, batch._replace(next_obs=batch.next_obs + 1), key)
        assert (metrics["losses/critic_loss"] != other["losses/critic_loss"]) == matters


class ConstantDenoiser:
    """eps_hat is the parameter itself."""

    @staticmethod
    def apply(params, x, t, obs):
        return jnp.broadcast_to(params, x.shape)


def test_actor_loss_has_no_gradient_past_the_clip_and_a_signed_one_below():
    rng, clip, key = np.random.default_rng(0), 0.8, jax.random.key(0)
    particles, weights = rng.normal(size=(4, 8, 2)), rng.dirichlet(np.ones(8), size=4) * 2 - 1 / 8
    eps = np.float64(gempo.add_noise(key, jnp.float32(particles))[2])
    eps_hat = rng.normal(size=eps.shape)
    inputs = ConstantDenoiser, jnp.zeros((4, 1)), jnp.float32(particles), jnp.float32(weights), key, clip
    gradient = jax.grad(gempo.actor_loss)(jnp.float32(eps_hat), *inputs)
    errors = eps_hat - eps
    expected = 8 * weights[..., None] * 2 * errors / eps.size * (errors**2 < clip)
    assert 0.2 < np.mean(errors**2 < clip) < 0.8 and (weights < 0).any()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert (np.asarray(gradient)[errors**2 > clip] == 0).all()


class TabularDenoiser:
    """A table over cells of (t, x_t), the same for every state."""

    t_edges, x_edges = np.linspace(gempo.T_MIN, gempo.T_MAX, 9), np.linspace(-2, 2, 17)

    @classmethod
    def apply(cls, table, x, t, obs):
        return table[jnp.digitize(t, cls.t_edges[1:-1]), jnp.digitize(x, cls.x_edges)]


def test_the_minimizer_with_negative_weights_is_that_of_theorem_d2():
    """E[w eps | x_t] / E[w | x_t] where E[w | x_t] > 0. The loss is quadratic in a table: two gradients give it."""
    actions, weights, batch = np.array([-0.7, 0.0, 0.6]), np.array([0.7, -0.3, 0.6]), 20_000
    particles, w = (jnp.tile(jnp.float32(v), (batch, 1)) for v in (actions, weights))

    @jax.jit
    @jax.grad
    def gradient(table, key):
        return gempo.actor_loss(table, TabularDenoiser, jnp.zeros((batch, 1)), particles[..., None], w, key, 1e9)

    keys = jax.random.split(jax.random.key(0), 40)
    tables = (jnp.full((8, 18), c) for c in (0.0, 1.0))  # the outermost columns are |x_t| > 2
    at_zero, at_one = (sum(np.float64(gradient(table, key)) for key in keys) for table in tables)
    at_zero, at_one = at_zero[:, 1:-1], at_one[:, 1:-1]
    with np.errstate(invalid="ignore"):  # 0 / 0 in cells that no draw reached
        minimizer = at_zero / (at_zero - at_one)

    def midpoints(edges):  # of 100 intervals in each cell
        fine = np.linspace(edges[0], edges[-1], 100 * (len(edges) - 1) + 1)
        return (fine[1:] + fine[:-1]) / 2

    def sum_cells(values):  # (800, 1600, N) -> (8, 16)
        return values.sum(axis=-1).reshape(8, 100, 16, 100).mean(axis=(1, 3))

    alpha, sigma = (v[:, None, None] for v in helpers.schedule(midpoints(TabularDenoiser.t_edges)))
    eps = (midpoints(TabularDenoiser.x_edges)[:, None] - alpha * actions) / sigma
    density = weights * np.exp(-(eps**2) / 2) / sigma
    mass, closed_form = sum_cells(density), sum_cells(density * eps) / sum_cells(density)
    clear = mass > 0.1
    assert clear.mean() > 0.5 and (mass < 0).any()  # there are cells of E[w | x_t] < 0 too
    np.testing.assert_allclose(minimizer[clear], closed_form[clear], atol=0.05)  # Monte Carlo, 2.4 million draws
    unsigned = sum_cells(np.abs(density) * eps) / sum_cells(np.abs(density))
    assert np.abs(unsigned - closed_form)[clear].max() > 0.3  # with the signs lost it is another field


TINY = dict(hidden_dim=32, num_particles=8, diffusion_steps=5, batch_size=64, learning_starts=64, eval_frequency=0)
TINY |= dict(q_lr=3e-3, policy_lr=3e-3, temperature_lr=1e-2, tau=0.05, old_policy_interval=50, buffer_size=5000)
TINY |= dict(total_timesteps=1000, gamma=0.5)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a script on a probe in a folder of its own: a function that returns (agent, args)."""
    monkeypatch.chdir(tmp_path)

    def run(name, probe, **flags):
        args = SCRIPTS[name].Args(env_id=f"{probe}-v0", **TINY | flags)
        return SCRIPTS[name].main(args), args

    return run


def q_values(agent, obs, actions):
    """The mean of both critics (len(obs), len(actions))."""
    obs, actions = np.float32(obs)[:, None, None], np.float32(actions)[None, :, None]
    return np.asarray(agent.critic.apply(agent.params["critic"], obs, actions)).mean(axis=0)


ACTIONS = np.linspace(-0.8, 0.8, 5)  # away from the borders of what the policy plays


@pytest.mark.parametrize(
    ("probe", "obs", "values"),
    [
        ("ConstantReward", [0], [1]),
        ("ObservedReward", [-1, 1], [-1, 1]),
        ("DelayedReward", [0, 1], [0.5, 1]),  # gamma, 1
        ("Truncated", [0], [2]),  # 1 / (1 - gamma): an episode that is cut off goes on; were it ended, 1.33
    ],
)
def test_critics_learn_the_values_that_are_known(train, probe, obs, values):
    agent, _ = train("neg", probe)
    np.testing.assert_allclose(q_values(agent, obs, ACTIONS), np.tile(values, (5, 1)).T, atol=0.15)


@every_script
def test_the_policy_finds_the_best_action_of_each_observation(train, name):
    """The reward is -(a - 0.5 s)^2 at the observation s = 1 or -1; a uniform policy's mean reward is -0.58."""
    agent, args = train(name, "ObservedAction", total_timesteps=1500, target_kl=0.7)
    obs = jnp.repeat(jnp.array([[-1.0], [1.0]]), 500, axis=0)
    actions = np.asarray(SCRIPTS[name].act(agent, obs, jax.random.key(0), 0, 1, args.diffusion_steps))[:, 0]
    assert -np.mean((actions - 0.5 * obs[:, 0]) ** 2) > -0.06
    assert abs(actions[:500].mean() + 0.5) < 0.15 and abs(actions[500:].mean() - 0.5) < 0.15


def test_several_environments_learn_the_same_values(train):
    agent, _ = train("neg", "Truncated", num_envs=4, total_timesteps=1000)
    np.testing.assert_allclose(q_values(agent, [0], ACTIONS), 2, atol=0.15)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("probe", ["Counting", "CountingTruncated"])
def test_a_transition_at_an_end_holds_the_true_last_observation(train, monkeypatch, probe, num_envs):
    """The observation counts the steps, so every transition raises it by one; none starts at the last one."""
    recorded = []

    def record(agent, buffer, transitions, key, step, args):
        recorded.append(jax.tree.map(np.array, transitions))
        return agent, buffer, {}

    monkeypatch.setattr(gempo, "train_step", record)
    train("neg", probe, num_envs=num_envs, learning_starts=num_envs, total_timesteps=num_envs * 20)
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *recorded)
    assert len(batch.rewards) == 19 * num_envs
    np.testing.assert_array_equal(batch.next_obs, batch.obs + 1)
    np.testing.assert_array_equal(batch.obs.reshape(19, num_envs), np.arange(19)[:, None] % 4 + np.zeros(num_envs))
    ended = (batch.next_obs[:, 0] == 4) & (probe == "Counting")
    np.testing.assert_array_equal(batch.terminations, ended)


def test_act_plays_the_best_of_its_samples_by_the_smaller_critic():
    agent = make_agent("neg")
    obs, key = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.key(2)
    played = gempo.act(agent, obs, key, 9, 6, 4)
    samples = gempo.sample_actions(agent.actor, agent.params["actor"], obs, jax.random.fold_in(key, 9), 6, 4)
    q_values = helpers.critics(agent.params["critic"], np.asarray(obs)[:, None], np.asarray(samples))
    best = q_values.min(axis=0).argmax(axis=1)
    np.testing.assert_allclose(played, np.asarray(samples)[np.arange(5), best], atol=1e-5)
    assert len(set(best)) > 1  # not always the same sample
