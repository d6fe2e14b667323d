"""Losses and update against float64, Theorem D.2, the loop's parts, environments of known values."""

from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import probe_envs
import pytest
from helpers import SCRIPTS, make_batch, perturbed_agent

# Where one script stands for all: they are equal outside the reweighting (test_scripts.py).
import gempo_neg as gempo

every_script = pytest.mark.parametrize("name", SCRIPTS)
FLAGS = dict(hidden_dim=32, num_particles=16, diffusion_steps=4, td_best_of=3, target_kl=1)
FLAGS |= dict(tau=0.1, old_policy_interval=3, policy_lr=1e-3, q_lr=2e-3, temperature_lr=3e-3)
FLAGS |= dict(additive_noise=0.3, reward_scale=0.5, gamma=0.9, loss_clip=0.8)
jitted_update = {name: jax.jit(script.update) for name, script in SCRIPTS.items()}


def make_agent(name="neg"):
    return perturbed_agent(name, **FLAGS)


# -------------------------------------------- losses and update --------------------------------------------
def float64_targets(agent, batch, key):
    """TD targets (B,): the online critics choose among three actions, the target critics value."""
    sample = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5))
    actions = sample(agent.actor, agent.params["actor"], batch.next_obs, key, 3, 4)
    targets = []
    for i in range(8):
        inputs = batch.next_obs[i], np.float64(actions[i])
        best = helpers.critics(agent.params["critic"], *inputs).min(axis=0).argmax()
        value = helpers.critics(agent.slow_params["critic"], *inputs).min(axis=0)[best]
        future = 0 if batch.terminations[i] else 0.9 * value
        targets.append(0.5 * batch.rewards[i] + future)
    return np.array(targets)


def float64_particles(agent, obs, key, noise_key):
    sample = jax.jit(gempo.sample_actions, static_argnums=(0, 4, 5))
    dot = gempo.bfloat16_dot if gempo.has_fast_bfloat16() else jax.lax.dot_general
    pi_old = agent.actor.clone(dot=dot)
    particles = sample(pi_old, agent.slow_params["actor"], obs, key, 16, 4)
    return np.float64(particles) + 0.3 * np.float64(jax.random.normal(noise_key, particles.shape))


@every_script
def test_update_computes_the_losses_of_a_plain_float64_version(name):
    agent, batch, key = make_agent(name), make_batch(), jax.random.key(7)
    params = agent.params
    updated, metrics = jitted_update[name](agent, batch, key)

    next_key, particle_key, noise_key, loss_key = jax.random.split(key, 4)
    targets = float64_targets(agent, batch, next_key)
    q_errors = helpers.critics(params["critic"], batch.obs, batch.actions) - targets
    particles = float64_particles(agent, batch.obs, particle_key, noise_key)
    q_values = helpers.critics(params["critic"], batch.obs[:, None], particles).mean(axis=0)
    ell = {"ell": SCRIPTS[name].Args().ell} if name == "neg" else {}
    solve = partial(helpers.root_finder_weights, name, temp=np.exp(-0.5), **ell)
    weights = np.stack([solve(q)[0] for q in q_values])
    _, t, eps = gempo.add_noise(loss_key, jnp.float32(particles))
    alpha, sigma = helpers.schedule(t)
    x_t = alpha * particles + sigma * eps
    eps_hat = helpers.actor(params["actor"], x_t, t, batch.obs[:, None])
    errors = (eps_hat - np.float64(eps)) ** 2
    kl = helpers.kl_to_uniform(weights).mean()
    leaves = jax.tree.leaves(helpers.float64(updated.params))

    expected = {
        "losses/critic_loss": np.mean(q_errors**2),
        "losses/actor_loss": np.mean(16 * weights[..., None] * np.minimum(errors, 0.8)),
        "losses/temperature_loss": np.exp(-0.5) * (1 - kl),
        "losses/q_values": q_values.mean(),
        "charts/temperature": np.exp(-0.5),
        "charts/kl": kl,
        "charts/weights_min": 16 * weights.min(),
        "charts/weights_negative_share": np.mean(weights < 0),
        "charts/particles_std": particles.std(axis=1).mean(),
        "charts/params_norm": np.sqrt(sum((leaf**2).sum() for leaf in leaves)),
    }
    assert 0.1 < np.mean(errors < 0.8) < 0.9
    assert metrics.keys() == expected.keys()
    for tag, value in expected.items():  # float32 through networks of gain sqrt(2): about 1e-5
        assert float(metrics[tag]) == pytest.approx(value, rel=1e-3, abs=1e-4), tag


@every_script
def test_the_first_update_moves_every_leaf_by_the_rate_of_its_part(name):
    """Adam's first step is the rate wherever a gradient is."""
    agent = make_agent(name)
    updated, metrics = jitted_update[name](agent, make_batch(), jax.random.key(0))
    steps = jax.tree.map(np.subtract, jax.device_get(updated.params), jax.device_get(agent.params))
    for part, rate in (("actor", 1e-3), ("critic", 2e-3)):
        leaves = jax.tree.leaves_with_path(steps[part])
        for path, leaf in leaves:
            largest = np.abs(leaf).max()
            assert largest == pytest.approx(rate, rel=0.01), jax.tree_util.keystr(path)
        sizes = np.concatenate([np.abs(leaf).ravel() for _, leaf in leaves])
        assert np.median(sizes) == pytest.approx(rate, rel=0.01)
    # The temperature falls where the weights are flatter than the budget, and rises if sharper.
    direction = np.sign(metrics["charts/kl"] - 1)
    assert steps["log_lambda"] == pytest.approx(3e-3 * direction, rel=1e-3)


def test_the_optimizer_is_adam_with_its_usual_decays_and_a_rate_for_each_part():
    """Two steps by Adam's closed form: decays 0.9 and 0.999, epsilon 1e-8."""
    rates = {"actor": 1e-3, "critic": 2e-3, "log_lambda": 3e-3}
    params = {part: jnp.zeros(3) for part in rates}
    optimizer = gempo.make_optimizer(gempo.Args(**FLAGS))
    state = optimizer.init(params)
    gradients = np.array([[1.0, -2.0, 1e-9], [-0.5, 3.0, 4e-9]])
    mean, square = np.zeros(3), np.zeros(3)
    for i, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update({part: jnp.float32(gradient) for part in rates}, state)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        step = mean / (1 - 0.9**i) / (np.sqrt(square / (1 - 0.999**i)) + 1e-8)
        for part, rate in rates.items():
            np.testing.assert_allclose(updates[part], -rate * step, rtol=1e-4)


def test_update_moves_the_target_critics_by_tau_and_copies_the_actor_at_its_interval():
    agent = make_agent()
    assert_close = partial(np.testing.assert_allclose, atol=1e-6)
    for i in range(1, 8):
        before = agent
        agent, _ = jitted_update["neg"](agent, make_batch(), jax.random.key(i))
        assert agent.num_updates == i
        source = agent.params if i % 3 == 0 else before.slow_params
        jax.tree.map(np.testing.assert_array_equal, agent.slow_params["actor"], source["actor"])
        old, new = helpers.float64((before.slow_params["critic"], agent.params["critic"]))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, old, new)
        jax.tree.map(assert_close, agent.slow_params["critic"], expected)


def test_update_learns_nothing_from_what_follows_a_termination():
    agent, key = make_agent(), jax.random.key(0)
    batch = make_batch()
    for terminations, matters in ((np.ones(8), False), (np.zeros(8), True)):
        batch = batch._replace(terminations=np.float32(terminations))
        _, metrics = jitted_update["neg"](agent, batch, key)
        other_future = batch._replace(next_obs=batch.next_obs + 1)
        _, other = jitted_update["neg"](agent, other_future, key)
        assert (metrics["losses/critic_loss"] != other["losses/critic_loss"]) == matters


class ConstantDenoiser:
    """eps_hat is the parameter itself."""

    @staticmethod
    def apply(params, x, t, obs):
        return jnp.broadcast_to(params, x.shape)


def test_actor_loss_has_no_gradient_past_the_clip_and_a_signed_one_below():
    rng, clip, key = np.random.default_rng(0), 0.8, jax.random.key(0)
    particles = rng.normal(size=(4, 8, 2))
    weights = rng.dirichlet(np.ones(8), size=4) * 2 - 1 / 8
    eps = np.float64(gempo.add_noise(key, jnp.float32(particles))[2])
    eps_hat = rng.normal(size=eps.shape)
    inputs = jnp.zeros((4, 1)), jnp.float32(particles), jnp.float32(weights), key, clip
    gradient = jax.grad(gempo.actor_loss)(jnp.float32(eps_hat), ConstantDenoiser, *inputs)
    errors = eps_hat - eps
    expected = 8 * weights[..., None] * 2 * errors / eps.size * (errors**2 < clip)
    assert 0.2 < np.mean(errors**2 < clip) < 0.8 and (weights < 0).any()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert (np.asarray(gradient)[errors**2 > clip] == 0).all()


class TabularDenoiser:
    """A table over cells of (t, x_t), the same for every state."""

    t_edges = np.linspace(gempo.T_MIN, gempo.T_MAX, 9)
    x_edges = np.linspace(-2, 2, 17)

    @classmethod
    def apply(cls, table, x, t, obs):
        return table[jnp.digitize(t, cls.t_edges[1:-1]), jnp.digitize(x, cls.x_edges)]


def midpoints(edges):
    """Of 100 intervals in each cell."""
    fine = np.linspace(edges[0], edges[-1], 100 * (len(edges) - 1) + 1)
    return (fine[1:] + fine[:-1]) / 2


def sum_cells(values):
    """(800, 1600, N) -> (8, 16)."""
    return values.sum(axis=-1).reshape(8, 100, 16, 100).mean(axis=(1, 3))


def test_the_minimizer_with_negative_weights_is_that_of_theorem_d2():
    """E[w eps | x_t] / E[w | x_t] where E[w | x_t] > 0.

    The loss is quadratic in a table: two gradients give its minimum.
    """
    actions, weights, batch = np.array([-0.7, 0.0, 0.6]), np.array([0.7, -0.3, 0.6]), 20_000
    particles = jnp.tile(jnp.float32(actions), (batch, 1))[..., None]
    w = jnp.tile(jnp.float32(weights), (batch, 1))

    @jax.jit
    @jax.grad
    def gradient(table, key):
        inputs = jnp.zeros((batch, 1)), particles, w, key, 1e9
        return gempo.actor_loss(table, TabularDenoiser, *inputs)

    gradients = []
    for constant in (0.0, 1.0):
        table = jnp.full((8, 18), constant)  # the outermost columns are |x_t| > 2
        keys = jax.random.split(jax.random.key(0), 40)
        total = sum(np.float64(gradient(table, key)) for key in keys)
        gradients.append(total[:, 1:-1])
    at_zero, at_one = gradients
    with np.errstate(invalid="ignore"):  # 0 / 0 in cells that no draw reached
        minimizer = at_zero / (at_zero - at_one)

    times = midpoints(TabularDenoiser.t_edges)[:, None, None]
    alpha, sigma = helpers.schedule(times)
    eps = (midpoints(TabularDenoiser.x_edges)[:, None] - alpha * actions) / sigma
    density = weights * np.exp(-(eps**2) / 2) / sigma
    mass = sum_cells(density)
    closed_form = sum_cells(density * eps) / mass
    clear = mass > 0.1
    assert clear.mean() > 0.5 and (mass < 0).any()  # there are cells of E[w | x_t] < 0 too
    # Monte Carlo, 2.4 million draws.
    np.testing.assert_allclose(minimizer[clear], closed_form[clear], atol=0.05)
    unsigned = sum_cells(np.abs(density) * eps) / sum_cells(np.abs(density))
    # With the signs lost it is another field.
    assert np.abs(unsigned - closed_form)[clear].max() > 0.3


# ----------------------------------------------- a new agent -----------------------------------------------
def test_a_new_agent_has_a_temperature_of_one_and_slow_copies_equal_to_its_networks():
    agent = helpers.create_agent("neg")
    assert agent.params["log_lambda"] == 0 and agent.num_updates == 0
    for part in ("actor", "critic"):
        ours, slow = agent.params[part], agent.slow_params[part]
        jax.tree.map(np.testing.assert_array_equal, ours, slow)


def test_the_papers_kl_budget_is_scaled_to_the_number_of_particles():
    for particles, kappa in ((64, 2.0), (16, 2 * np.log(16) / np.log(64)), (1, 0.0)):
        args = gempo.Args(num_particles=particles, hidden_dim=32)
        assert gempo.learning_part(args).target_kl == pytest.approx(kappa)
    agent = helpers.create_agent("neg", num_particles=16)
    assert agent.args.target_kl == pytest.approx(2 * np.log(16) / np.log(64))


def test_two_agents_go_through_one_tree_map_and_one_vmap():
    """The static parts of an agent are equal where its hyperparameters are."""
    args = [gempo.Args(hidden_dim=32, seed=seed) for seed in (1, 2)]
    agents = [gempo.create_agent(a, 3, 2, jax.random.key(a.seed)) for a in args]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *agents)
    obs = jnp.ones((2, 5, 3))
    actions = jax.vmap(lambda agent, obs: gempo.act(agent, obs, jax.random.key(0), 0, True))
    assert actions(both, obs).shape == (2, 5, 2)


TINY_LEARNING = dict(hidden_dim=16, num_particles=4, diffusion_steps=2, batch_size=8)


def fill_buffer(rows, script=gempo):
    buffer = script.create_buffer(100, 3, 2)
    return script.add_transitions(buffer, script.Transition(*make_batch(rows)))


@every_script
def test_an_agent_of_default_args_trains_without_a_run(name):
    """In shapes at the full size, in numbers at a small one."""
    script = SCRIPTS[name]
    key, transitions = jax.random.key(0), script.Transition(*make_batch(1))
    create = partial(script.create_agent, script.Args(), 3, 2)
    agent = jax.eval_shape(create, key)
    buffer = jax.eval_shape(partial(script.create_buffer, 100, 3, 2))
    jax.eval_shape(script.train_step, agent, buffer, transitions, key, 0)
    agent = script.create_agent(script.Args(**TINY_LEARNING), 3, 2, key)
    trained, _, metrics = script.train_step(agent, fill_buffer(9, script), transitions, key, 0)
    assert trained.num_updates == 1
    assert all(np.isfinite(metrics[tag]) for tag in metrics)
    assert trained.args.target_kl == pytest.approx(2 * np.log(4) / np.log(64))


# ------------------------------------------- train_step and learn ------------------------------------------
@pytest.mark.parametrize("rows", [1, 3])
def test_updates_are_counted_by_the_rows_that_come_in(rows):
    agent = helpers.create_agent("neg", **TINY_LEARNING, updates_per_step=2)
    buffer = fill_buffer(9)
    agent, buffer, _ = gempo.train_step(agent, buffer, make_batch(rows), jax.random.key(0), 0)
    assert agent.num_updates == 2 * rows and buffer.count == 9 + rows


@pytest.fixture
def updates(monkeypatch):
    """A function that makes a train_step and returns the (key, batch) of each of its updates."""

    def record(agent, batch, key):
        recorded.append((tuple(np.asarray(jax.random.key_data(key))), batch))
        return agent, {}

    def run(step, seed=0, **flags):
        agent = helpers.create_agent("neg", **TINY_LEARNING | flags)
        with jax.disable_jit():
            inputs = fill_buffer(30), make_batch(1), jax.random.key(seed), step
            gempo.train_step(agent, *inputs)
        done = recorded.copy()
        recorded.clear()
        return done

    recorded = []
    monkeypatch.setattr(gempo, "update", record)
    return run


def test_every_update_has_a_key_and_a_batch_of_its_own(updates):
    made = updates(7, updates_per_step=2) + updates(8, updates_per_step=2) + updates(7, seed=1)
    assert len({key for key, _ in made}) == len(made) == 5
    assert len({tuple(batch.rewards.tolist()) for _, batch in made}) == 5
    (key, batch), _ = updates(7, updates_per_step=2)
    assert key == made[0][0]  # the same seed and step again
    np.testing.assert_array_equal(batch.rewards, made[0][1].rewards)


def test_batch_size_is_what_the_flag_says(updates):
    for size in (5, 8):
        ((_, batch),) = updates(0, batch_size=size)
        assert {len(field) for field in batch} == {size}


def test_an_update_sees_the_transitions_that_came_with_it(updates):
    """Nothing else is in the buffer, of which the new rows are a third."""
    ((_, batch),) = updates(0, batch_size=64)
    new = make_batch(1).rewards[0]
    assert new in batch.rewards


def test_several_updates_follow_each_other_and_their_metrics_are_the_mean():
    agent, buffer, key = make_agent(), fill_buffer(30), jax.random.key(5)
    agent = agent.replace(args=gempo.learning_part(gempo.Args(**FLAGS, batch_size=8)))
    by_hand, each = agent, []
    for one_key in jax.random.split(key, 3):
        batch_key, update_key = jax.random.split(one_key)
        batch = gempo.sample_batch(buffer, batch_key, 8)
        by_hand, metrics = jitted_update["neg"](by_hand, batch, update_key)
        each.append(metrics)
    expected = jax.tree.map(lambda *values: np.mean(values), *each)
    learned, metrics = gempo.learn(jax.tree.map(jnp.copy, agent), buffer, key, 3)
    assert each[0]["losses/critic_loss"] != each[2]["losses/critic_loss"]
    for tag, value in expected.items():
        assert float(metrics[tag]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), tag
    assert_close = partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(assert_close, learned.params, by_hand.params)
    assert learned.num_updates == 3


def test_train_step_gives_up_the_arrays_it_was_given():
    agent, buffer = helpers.create_agent("neg", **TINY_LEARNING), fill_buffer(9)
    gempo.train_step(agent, buffer, make_batch(1), jax.random.key(0), 0)
    kernel = agent.params["actor"]["params"]["first_kernel"]
    assert kernel.is_deleted() and buffer.storage.obs.is_deleted()


# ------------------------------------------------- the loop ------------------------------------------------
TINY = dict(hidden_dim=32, num_particles=8, diffusion_steps=5, batch_size=64, learning_starts=64)
TINY |= dict(q_lr=3e-3, policy_lr=3e-3, temperature_lr=1e-2, tau=0.05, old_policy_interval=50)
TINY |= dict(total_timesteps=1000, buffer_size=5000, gamma=0.5, eval_frequency=0)
TINY |= dict(checkpoint_frequency=0)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a script on a probe in a folder of its own: a function that returns the agent."""
    monkeypatch.chdir(tmp_path)

    def run(name, probe, **flags):
        args = SCRIPTS[name].Args(env_id=f"{probe}-v0", **TINY | flags)
        return SCRIPTS[name].main(args)

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
        # 1 / (1 - gamma): an episode that is cut off goes on; were it ended, 1.33.
        ("Truncated", [0], [2]),
    ],
)
def test_critics_learn_the_values_that_are_known(train, probe, obs, values):
    agent = train("neg", probe)
    expected = np.tile(values, (5, 1)).T
    np.testing.assert_allclose(q_values(agent, obs, ACTIONS), expected, atol=0.15)


@every_script
def test_the_policy_finds_the_best_action_of_each_observation(train, name):
    """The reward is -(a - 0.5 s)^2 at the observation s = 1 or -1; uniform actions get -0.58."""
    agent = train(name, "ObservedAction", total_timesteps=1500, target_kl=0.7)
    obs = jnp.repeat(jnp.array([[-1.0], [1.0]]), 500, axis=0)
    actions = SCRIPTS[name].act(agent, obs, jax.random.key(0), 0, training=True)
    actions = np.asarray(actions)[:, 0]
    assert -np.mean((actions - 0.5 * obs[:, 0]) ** 2) > -0.06
    assert abs(actions[:500].mean() + 0.5) < 0.15 and abs(actions[500:].mean() - 0.5) < 0.15


def test_several_environments_learn_the_same_values(train):
    agent = train("neg", "Truncated", num_envs=4, total_timesteps=1000)
    np.testing.assert_allclose(q_values(agent, [0], ACTIONS), 2, atol=0.15)


@pytest.fixture
def recorded_run(train, monkeypatch):
    """Run without learning: (the steps of acting, the steps of train_step, what it was given)."""

    def run(probe, num_envs=1, **flags):
        acts, steps, given = [], [], []
        keys = {"act": set(), "learn": set()}

        def record_act(agent, obs, key, step, training):
            assert training
            acts.append(step)
            keys["act"].add(tuple(jax.random.key_data(key).tolist()))
            return jnp.zeros((num_envs, 1))

        def record_train_step(agent, buffer, transitions, key, step):
            steps.append(step)
            keys["learn"].add(tuple(jax.random.key_data(key).tolist()))
            given.append(jax.tree.map(np.array, transitions))
            return agent, buffer, {}

        monkeypatch.setattr(gempo, "act", record_act)
        monkeypatch.setattr(gempo, "train_step", record_train_step)
        few = dict(learning_starts=num_envs, total_timesteps=num_envs * 21)
        train("neg", probe, num_envs=num_envs, **few | flags)
        assert len(keys["act"]) == len(keys["learn"]) == 1 and keys["act"] != keys["learn"]
        return acts, steps, gempo.Transition(*map(np.stack, zip(*given, strict=True)))

    return run


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    "probe", ["Counting", "CountingTruncated", "Staggered", "StaggeredTruncated"]
)
def test_a_transition_at_an_end_holds_the_true_last_observation(recorded_run, probe, num_envs):
    """Observations count the steps: every transition raises them by one, and none starts at an end.

    The horizons of Staggered differ, and each environment pays its number: none gets another's.
    """
    first = next(probe_envs.Probe.counter) + 1
    _, _, batch = recorded_run(probe, num_envs)
    assert batch.rewards.shape == (20, num_envs)
    np.testing.assert_array_equal(batch.next_obs, batch.obs + 1)
    for i in range(num_envs):
        horizon = 2 + (first + i) % 3 if "Staggered" in probe else 4
        np.testing.assert_array_equal(batch.rewards[:, i], first + i)
        np.testing.assert_array_equal(batch.obs[:, i, 0], np.arange(20) % horizon)
        ends = batch.next_obs[:, i, 0] == horizon
        terminates = not probe.endswith("Truncated")
        np.testing.assert_array_equal(batch.terminations[:, i], ends & terminates)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_learning_and_acting_start_together_after_the_random_steps(recorded_run, num_envs):
    flags = dict(learning_starts=6 * num_envs, total_timesteps=15 * num_envs)
    acts, steps, batch = recorded_run("ConstantReward", num_envs, **flags)
    assert acts == steps == list(range(6 * num_envs, 15 * num_envs, num_envs))
    random, played = batch.actions[0], batch.actions[1:]
    assert (random != 0).all() and (played == 0).all()  # the first row was made the step before


def test_rewards_are_stored_as_they_come_and_scaled_in_the_target(recorded_run):
    _, _, batch = recorded_run("ConstantReward", reward_scale=2.0)
    assert (batch.rewards == 1).all()


def test_random_steps_repeat_with_the_seed_and_differ_between_seeds(recorded_run):
    late = dict(learning_starts=1, total_timesteps=30)
    signs = [recorded_run("ObservedReward", seed=seed, **late)[2].rewards for seed in (5, 5, 6)]
    assert np.array_equal(signs[0], signs[1]) and not np.array_equal(signs[0], signs[2])
    actions = [recorded_run("ConstantReward", seed=seed)[2].actions[0] for seed in (5, 5, 6)]
    assert actions[0] == actions[1] != actions[2]


def test_the_environments_of_a_run_are_reset_with_seeds_drawn_from_its_own(monkeypatch):
    seeds, reset = [], probe_envs.Probe.reset

    def record(env, *, seed=None, options=None):
        seeds.append(seed)
        return reset(env, seed=seed)

    monkeypatch.setattr(probe_envs.Probe, "reset", record)
    flags = dict(seed=5, num_envs=3, hidden_dim=32, buffer_size=10)
    gempo.create_state(gempo.Args(env_id="ConstantReward-v0", **flags))
    assert seeds == gempo.episode_seeds(5, 3)


def test_agents_of_different_seeds_start_from_different_networks():
    flags = dict(env_id="ConstantReward-v0", hidden_dim=32, buffer_size=10)
    states = [gempo.create_state(gempo.Args(seed=seed, **flags)) for seed in (1, 1, 2)]
    kernels = [state.agent.params["actor"]["params"]["first_kernel"] for state in states]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])


def test_what_is_due_is_done_once_for_each_multiple_among_the_steps_made():
    """Also where several environments step over a multiple."""
    for num_envs in (1, 3, 8):
        rounds = range(0, 24 * 20, num_envs)
        due = [step for step in rounds if gempo.is_due(20, step, step + num_envs)]
        assert len(due) == 24
        assert all(0 <= 20 * (i + 1) - step - 1 < num_envs for i, step in enumerate(due))
    assert not gempo.is_due(0, 0, 1)


def test_another_seed_does_not_compile_again(train, monkeypatch):
    traces, td_targets = [], gempo.td_targets

    def count(*inputs):
        traces.append(inputs)
        return td_targets(*inputs)

    monkeypatch.setattr(gempo, "td_targets", count)
    flags = TINY_LEARNING | dict(total_timesteps=20, learning_starts=10, gamma=0.123)
    train("neg", "ConstantReward", seed=1, **flags)
    first = len(traces)
    train("neg", "ConstantReward", seed=2, exp_name="other", **flags)
    assert len(traces) == first > 0


# -------------------------------------------------- acting -------------------------------------------------
@pytest.mark.parametrize(("training", "best_of"), [(True, 6), (False, 4)])
def test_act_plays_the_best_of_its_samples_by_the_smaller_critic(training, best_of):
    flags = dict(act_best_of=6, eval_best_of=4, diffusion_steps=4)
    agent = perturbed_agent("neg", **flags)
    obs, key = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.key(2)
    played = gempo.act(agent, obs, key, 9, training=training)
    step_key = jax.random.fold_in(key, 9)
    samples = gempo.sample_actions(agent.actor, agent.params["actor"], obs, step_key, best_of, 4)
    values = helpers.critics(agent.params["critic"], np.asarray(obs)[:, None], np.asarray(samples))
    best = values.min(axis=0).argmax(axis=1)
    np.testing.assert_allclose(played, np.asarray(samples)[np.arange(5), best], atol=1e-5)
    assert len(set(best)) > 1  # not always the same sample


def test_act_draws_anew_at_each_step_and_by_each_key():
    agent, obs = perturbed_agent("neg", diffusion_steps=4), jnp.ones((2, 3))
    draws = [(0, 0), (0, 1), (1, 0), (0, 0)]
    actions = [gempo.act(agent, obs, jax.random.key(k), step, training=True) for k, step in draws]
    assert jnp.array_equal(actions[0], actions[3])
    assert len(np.unique(np.concatenate(actions[:3]), axis=0)) == 3 * 2  # and each row its own
