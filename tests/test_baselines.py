"""The baselines: siblings of gempo_linear.py, each against NumPy float64 and its closed forms."""

import ast
import importlib
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import cache
from operator import itemgetter
from types import SimpleNamespace

import gymnasium as gym
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from conftest import ROOT
from scipy import integrate, special, stats

import gempo_linear

NAMES = ["td3", "sac", "qsm", "qvpo", "rfm", "dacer", "dipo"]
SCRIPTS = {name: importlib.import_module(f"baselines.{name}") for name in NAMES}
every_script = pytest.mark.parametrize("name", NAMES)


# -------------------------------------------- the files --------------------------------------------
BANNER = re.compile(r"^# =+ ([A-Z ]+) =+$", re.MULTILINE)
SOURCES = {name: (ROOT / "baselines" / f"{name}.py").read_text() for name in NAMES}
LINEAR = (ROOT / "gempo_linear.py").read_text()
SHARED = ["ENVIRONMENT", "EVALUATION", "TRAINING", "RUN FOLDER"]
ALSO_SHARED = {  # beyond these, by script
    "td3": ["REPLAY BUFFER"],
    "sac": ["REPLAY BUFFER"],
    "qsm": ["NETWORKS", "DIFFUSION", "REPLAY BUFFER"],
    "qvpo": ["NETWORKS", "DIFFUSION", "REPLAY BUFFER"],
    "rfm": ["REPLAY BUFFER"],
    "dacer": ["DIFFUSION", "REPLAY BUFFER"],
    "dipo": ["NETWORKS"],
}


def sections(source):
    """Text by section: "" is what comes before the first banner."""
    parts = BANNER.split(source)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


def without_docstring(text):
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    return text.replace(f'"""{docstring}"""', "")


def without_own_flags(text):
    """ARGUMENTS without the fields of Hyperparameters, exp_name, and what only some flags need."""
    text = re.sub(r"\nclass Hyperparameters:.*?\n\n\n", "\n", text, flags=re.DOTALL)
    text = re.sub(r"\n    exp_name: .*", "", text)
    text = re.sub(r"\n(COUNTS \+?=|POSITIVES =) .*", "", text)
    text = re.sub(r"\ndef learning_part.*", "", text, flags=re.DOTALL)
    start = text.index('    for flag in ("gamma", "tau"):')
    rules_start = text.index("\n", text.index("from 0 to 1", start))
    rules_end = text.index('    below = f"below --total-timesteps')
    return text[:rules_start] + text[rules_end:]


@every_script
def test_shared_sections_are_those_of_the_gempo_scripts(name):
    ours, linear = sections(SOURCES[name]), sections(LINEAR)
    assert without_docstring(ours[""]) == without_docstring(linear[""])
    assert without_own_flags(ours["ARGUMENTS"]) == without_own_flags(linear["ARGUMENTS"])
    for section in SHARED + ALSO_SHARED[name]:
        assert ours[section] == linear[section], section


@every_script
def test_flags_that_are_not_the_methods_have_the_defaults_of_the_gempo_scripts(name):
    script, learning = SCRIPTS[name], fields(gempo_linear.Hyperparameters)
    for field in fields(gempo_linear.Args):
        if field not in learning and field.name != "exp_name":
            assert getattr(script.Args(), field.name) == field.default
    ours, theirs = script.Args(), gempo_linear.Args()
    for flag in ("gamma", "tau", "batch_size", "updates_per_step", "hidden_dim"):
        assert getattr(ours, flag) == getattr(theirs, flag), flag
    assert ours.exp_name == name


@every_script
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(SCRIPTS[name].Args, args=["--help"])
    text = re.sub(r"[^\w.-]+", " ", capsys.readouterr().out)  # without frame and line breaks
    for field in fields(SCRIPTS[name].Args):
        comment = re.search(rf"^    {field.name}: [^#]*# (.*)$", SOURCES[name], re.MULTILINE)[1]
        first_words = re.sub(r"[^\w.-]+", " ", comment).split()[:4]
        assert f"--{field.name.replace('_', '-')} " in text
        assert " ".join(first_words) in text, field.name


@every_script
def test_a_baseline_imports_nothing_of_this_repository(name):
    nodes = list(ast.walk(ast.parse(SOURCES[name])))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not {module.split(".")[0] for module in modules} & local


# ------------------------------------- one run of each, shared -------------------------------------
OBS_DIM, ACTION_DIM, CAPACITY = 5, 2, 1500
FLAGS = dict(hidden_dim=32, batch_size=64, policy_lr=3e-3, q_lr=3e-3, tau=0.05, gamma=0.5)
RUN = dict(env_id="AllProbes-v0", buffer_size=CAPACITY, learning_starts=500, eval_frequency=0)
RUN |= dict(total_timesteps=1300, checkpoint_frequency=0, save_model=True)
OWN_FLAGS = {
    "td3": {},
    "sac": dict(alpha_lr=1e-2),
    "qsm": dict(diffusion_steps=5, eval_best_of=4),
    "qvpo": dict(diffusion_steps=5, num_particles=8, num_uniform=3, eval_best_of=8),
    "rfm": dict(flow_steps=10, num_particles=8, num_proposals=100, temperature=0.05),
    "dacer": dict(diffusion_steps=5, policy_lr=5e-4, reward_scale=1.0),
    "dipo": dict(diffusion_steps=5),
}


def make_args(name, **flags):
    return SCRIPTS[name].Args(**FLAGS | RUN | OWN_FLAGS[name] | flags)


class AllProbes(gym.Env):
    """Five small environments in one, drawn at each reset; the observation says which.

    Their values are known: with a discount of 1/2, a reward of 1 at an end is 1, a sign that is
    shown is that sign, a reward of 1 one step away is 1/2, and 1 in all eternity is 2.
    """

    observation_space = gym.spaces.Box(-1, 1, (OBS_DIM,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

    def show(self):
        obs = np.zeros(OBS_DIM, np.float32)
        if self.kind == "delayed":
            obs[2:4] = 1, self.steps
        elif self.kind == "truncated":
            obs[3] = 1
        else:
            place = {"constant": 0, "sign": 1, "action": 4}[self.kind]
            obs[place] = self.sign
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        kinds = ["constant", "sign", "delayed", "truncated", "action"]
        self.kind = self.np_random.choice(kinds, p=[0.1, 0.1, 0.15, 0.15, 0.5])
        self.sign = 1 if self.kind == "constant" else self.np_random.choice([-1, 1])
        self.steps = 0
        return self.show(), {}

    def step(self, action):
        rewards = {"constant": 1, "sign": self.sign, "delayed": self.steps, "truncated": 1}
        rewards["action"] = -np.mean((action - 0.5 * self.sign) ** 2)
        self.steps += 1
        ends = self.steps == (2 if self.kind in ("delayed", "truncated") else 1)
        truncated = ends and self.kind == "truncated"
        return self.show(), float(rewards[self.kind]), ends and not truncated, truncated, {}


KNOWN_VALUES = [  # observation, value
    ([1, 0, 0, 0, 0], 1),
    ([0, 1, 0, 0, 0], 1),
    ([0, -1, 0, 0, 0], -1),
    ([0, 0, 1, 0, 0], 0.5),
    ([0, 0, 1, 1, 0], 1),
    ([0, 0, 0, 1, 0], 2),
]
# What the policy must reach after 800 updates, where a uniform one has -0.58 and the border on the
# right side -0.25. QSM and RFM are to be broad; DACER saturates first (x_0 is clipped, which has no
# gradient) and comes back slowly.
PROBE_REWARDS = dict(td3=-0.05, sac=-0.05, qsm=-0.25, qvpo=-0.05, rfm=-0.15, dacer=-0.3, dipo=-0.05)
gym.register("AllProbes-v0", AllProbes, disable_env_checker=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function of name and flags: folder and agent of a run; run once."""
    done = {}

    def run(name, **flags):
        key = name, *flags.items()
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                done[key] = folder, SCRIPTS[name].main(make_args(name, **flags))
        return done[key]

    return run


@cache
def new_agent(name):
    args = make_args(name)
    return SCRIPTS[name].create_agent(args, OBS_DIM, ACTION_DIM, jax.random.key(0))


def perturbed_agent(name, seed=0):
    """An agent that has learned nothing, but whose biases and slow copies all differ."""
    agent = new_agent(name)
    params = helpers.perturb(agent.params, seed)
    slow_params = helpers.perturb(agent.slow_params, seed + 5)
    return agent.replace(
        params=helpers.as_jax(params),
        slow_params=helpers.as_jax(slow_params),
        opt_state=jax.tree.map(jnp.copy, agent.opt_state),
        num_updates=jnp.int32(2),  # the delayed actors are due, DACER's temperature is not
    )


def make_pool():
    """As many random transitions as the buffer of the runs holds; some end an episode."""
    rng = np.random.default_rng(0)
    pool = gempo_linear.Transition(
        obs=rng.normal(size=(CAPACITY, OBS_DIM)),
        actions=rng.uniform(-1, 1, (CAPACITY, ACTION_DIM)),
        rewards=rng.normal(size=CAPACITY),
        next_obs=rng.normal(size=(CAPACITY, OBS_DIM)),
        terminations=rng.uniform(size=CAPACITY) < 0.3,
    )
    return jax.tree.map(np.float32, pool)


def one_update(name, agent, pool, seed=0):
    """One update on the pool by `train_step`, which the runs have compiled.

    Returns the agent before it, the agent after it, the metrics, the batch and the update's key.
    """
    script = SCRIPTS[name]
    before = jax.tree.map(jnp.copy, agent)
    last = script.Transition(*(np.asarray(rows[-1:]) for rows in pool))
    all_but_last = script.Transition(*(np.asarray(rows[:-1]) for rows in pool))
    buffer = script.create_buffer(CAPACITY, OBS_DIM, ACTION_DIM)
    buffer = script.add_transitions(buffer, all_but_last)
    key = jax.random.key(seed)
    agent, buffer, metrics = script.train_step(agent, buffer, last, key, 3)
    (key,) = jax.random.split(jax.random.fold_in(key, 3), 1)
    batch_key, *rows_key, update_key = jax.random.split(key, 3 if name == "dipo" else 2)
    done = SimpleNamespace(before=before, after=agent, metrics=metrics, buffer=buffer)
    done.key = update_key
    done.batch = script.sample_batch(buffer, batch_key, 64)
    if rows_key:
        done.rows = np.asarray(jax.random.randint(rows_key[0], (64,), 0, CAPACITY))
    return done


def distance(tree, other):
    """The largest difference of two trees of arrays."""
    differences = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), tree, other
    )
    return max(jax.tree.leaves(differences))


@every_script
def test_values_and_policy_of_the_probes_are_found(name, trained):
    script, (_, agent) = SCRIPTS[name], trained(name)
    for obs, value in KNOWN_VALUES:
        actions = np.float32([[-0.4, 0.4], [0, 0], [0.5, 0.3]])
        params = agent.params["critic"]
        q_values = agent.critic.apply(params, np.float32([obs]), actions)
        if name == "dacer":
            q_values, _ = q_values
        np.testing.assert_allclose(q_values, value, atol=0.3, err_msg=str(obs))
    obs = np.repeat(np.float32([[0, 0, 0, 0, -1], [0, 0, 0, 0, 1]]), 50, axis=0)
    actions = np.asarray(script.act(agent, obs, jax.random.key(0), 0, training=False))
    mean_reward = -np.mean((actions - 0.5 * obs[:, 4:]) ** 2)
    assert mean_reward > PROBE_REWARDS[name]


@every_script
def test_a_seed_repeats_a_run_exactly_and_another_seed_does_not(name, trained):
    _, first = trained(name, total_timesteps=520)
    _, same = trained(name, total_timesteps=520, exp_name="same")
    _, other = trained(name, total_timesteps=520, seed=2)
    assert distance(first.params, same.params) == 0 < distance(first.params, other.params)


@every_script
def test_a_saved_model_is_the_agent_that_was_trained(name, trained):
    script, (folder, agent) = SCRIPTS[name], trained(name)
    (model,) = folder.glob(f"runs/*/{name}.model")
    args, loaded = script.load_agent(model)
    assert args == make_args(name) and distance(agent, loaded) == 0
    assert loaded.args == agent.args


@every_script
def test_update_computes_the_losses_of_a_plain_float64_version(name):
    done = one_update(name, perturbed_agent(name), make_pool())
    expected = REFERENCES[name](done.before, done.batch, done)
    norms = [np.sum(x**2) for x in jax.tree.leaves(helpers.float64(done.after.params))]
    expected["charts/params_norm"] = math.sqrt(sum(norms))
    assert done.metrics.keys() == expected.keys()
    for tag, value in expected.items():  # float32 through networks of gain sqrt(2)
        assert float(done.metrics[tag]) == pytest.approx(value, rel=1e-3, abs=1e-4), tag


@every_script
def test_nothing_is_learned_from_what_follows_a_termination(name):
    pool = make_pool()
    for ends in (True, False):
        pool = pool._replace(terminations=np.full(CAPACITY, ends, np.float32))
        other = pool._replace(next_obs=pool.next_obs + 1)
        losses = [
            float(one_update(name, perturbed_agent(name), rows).metrics["losses/critic_loss"])
            for rows in (pool, other)
        ]
        assert (losses[0] == losses[1]) == ends


@every_script
def test_critics_learn_nothing_from_the_actors_loss(name):
    """Where all episodes end, the actor is in no target: any actor leaves the same critics."""
    pool = make_pool()._replace(terminations=np.ones(CAPACITY, np.float32))
    agent, other = perturbed_agent(name), perturbed_agent(name)
    actor = helpers.perturb(agent.params["actor"], 9)
    other = other.replace(params=other.params | {"actor": helpers.as_jax(actor)})
    critics = [one_update(name, a, pool).after.params["critic"] for a in (agent, other)]
    assert distance(*critics) == 0


@every_script
def test_targets_follow_by_tau_and_by_nothing_else(name):
    done = one_update(name, perturbed_agent(name), make_pool())
    for part, new in done.after.params.items():
        if part in TARGETS[name]:
            old = done.before.slow_params[part]
            expected = jax.tree.map(lambda x, y: 0.95 * x + 0.05 * y, old, new)
            assert distance(done.after.slow_params[part], expected) < 1e-6
            assert distance(old, expected) > 1e-3
    assert done.after.num_updates == done.before.num_updates + 1


@every_script
def test_actions_stay_in_the_box_whatever_the_networks_say(name):
    script, agent = SCRIPTS[name], perturbed_agent(name)
    large = jax.tree.map(lambda x: 5 * x, agent.params)
    agent = agent.replace(params=large)
    obs = np.random.default_rng(0).normal(size=(100, OBS_DIM)).astype(np.float32)
    for training in (True, False):
        actions = np.asarray(script.act(agent, obs, jax.random.key(0), 0, training))
        assert actions.shape == (100, ACTION_DIM)
        assert np.abs(actions).max() == pytest.approx(1, abs=1e-3)
        assert np.abs(actions).max() <= 1


@every_script
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_flags_of_its_own_are_checked(name, value):
    script = SCRIPTS[name]
    own = {field.name for field in fields(script.Hyperparameters)}
    own -= {"gamma", "tau"}
    for flag in own - CAN_BE_ZERO if value == 0 else own:
        default = getattr(script.Args(), flag)
        is_whole = isinstance(default, int) or flag in WHOLE_OR_NONE
        if is_whole and not math.isfinite(value):
            continue
        with pytest.raises(SystemExit) as stop:
            script.check_args(script.Args(**{flag: int(value) if is_whole else value}))
        message = str(stop.value)
        assert message.startswith(f"--{flag.replace('_', '-')} must be ") and "\n" not in message


CAN_BE_ZERO = {"target_noise", "target_noise_clip", "exploration_noise", "entropy_weight"}
WHOLE_OR_NONE = {"td_best_of", "improvement_steps", "slow_actor_interval"}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("qvpo", {"num_particles": 1}, "--num-particles must be a whole number, at least 2, got 1"),
        ("rfm", {"num_proposals": 1}, "--num-proposals must be a whole number, at least 2, got 1"),
        (
            "qsm",
            {"gradient_scale": 5.0, "temperature": 0.2},
            "--temperature must be left out with --gradient-scale, got 0.2",
        ),
    ],
)
def test_flags_with_which_nothing_is_learned_or_that_do_nothing_are_refused(name, flags, message):
    script = SCRIPTS[name]
    with pytest.raises(SystemExit) as stop:
        script.check_args(script.Args(**flags))
    assert str(stop.value) == message


def test_a_copy_in_an_empty_folder_runs(tmp_path):
    shutil.copy(ROOT / "baselines" / "sac.py", tmp_path)
    flags = "--env-id InvertedPendulum-v5 --total-timesteps 60 --learning-starts 40 --seed 3"
    flags += " --hidden-dim 8 --batch-size 4 --buffer-size 100 --eval-frequency 50"
    command = [sys.executable, "sac.py", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "InvertedPendulum-v5 on" in done.stdout and "evaluation" in done.stdout
    assert list(tmp_path.glob("runs/InvertedPendulum-v5__sac__3__*/checkpoints/60"))


# ----------------------------------------- plain references -----------------------------------------
def mlp(params, obs):
    """Output of an actor of two hidden ReLU layers, in float64."""
    p = helpers.float64(params)["params"]
    h = np.maximum(helpers.dense(p["Dense_0"], np.float64(obs)), 0)
    h = np.maximum(helpers.dense(p["Dense_1"], h), 0)
    return helpers.dense(p["Dense_2"], h)


def normal(key, shape):
    return np.float64(jax.random.normal(key, shape))


def td_error(agent, batch, next_values):
    """The mean squared error of both critics, and their mean; next_values (B,)."""
    batch = helpers.float64(batch)
    assert next_values.shape == batch.rewards.shape
    targets = batch.rewards + 0.5 * (1 - batch.terminations) * next_values
    q_values = helpers.critics(agent.params["critic"], batch.obs, batch.actions)
    return np.mean((q_values - targets) ** 2), q_values.mean()


def td3_reference(agent, batch, done):
    noise = np.clip(0.2 * normal(done.key, (64, ACTION_DIM)), -0.5, 0.5)
    next_actions = np.tanh(mlp(agent.slow_params["actor"], batch.next_obs)) + noise
    next_actions = np.clip(next_actions, -1, 1)
    next_q = helpers.critics(agent.slow_params["critic"], batch.next_obs, next_actions)
    q_loss, q_values = td_error(agent, batch, next_q.min(axis=0))
    actions = np.tanh(mlp(agent.params["actor"], batch.obs))
    pi_loss = -helpers.critics(agent.params["critic"], batch.obs, actions).mean()
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": pi_loss,
        "losses/q_values": q_values,
    }


def squashed_gaussian(params, obs, key):
    """Actions (B, d) and log pi (B,): the normal density over the slope of tanh, 1 - tanh(u)^2."""
    mean, log_std = np.split(mlp(params, obs), 2, axis=-1)
    log_std = np.clip(log_std, -20, 2)
    u = mean + np.exp(log_std) * normal(key, mean.shape)
    log_slope = math.log(4) - 2 * np.logaddexp(u, -u)
    return np.tanh(u), np.sum(stats.norm.logpdf(u, mean, np.exp(log_std)) - log_slope, axis=-1)


def sac_reference(agent, batch, done):
    next_key, action_key = jax.random.split(done.key)
    params, alpha = agent.params, np.exp(np.float64(agent.params["log_alpha"]))
    next_actions, log_probs = squashed_gaussian(params["actor"], batch.next_obs, next_key)
    next_q = helpers.critics(agent.slow_params["critic"], batch.next_obs, next_actions)
    q_loss, q_values = td_error(agent, batch, next_q.min(axis=0) - alpha * log_probs)
    actions, log_probs = squashed_gaussian(params["actor"], batch.obs, action_key)
    action_q = helpers.critics(params["critic"], batch.obs, actions).min(axis=0)
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": np.mean(alpha * log_probs - action_q),
        "losses/temperature_loss": -np.log(alpha) * (log_probs.mean() - ACTION_DIM),
        "losses/q_values": q_values,
        "charts/alpha": alpha,
        "charts/entropy": -log_probs.mean(),
    }


sample_denoised = jax.jit(gempo_linear.sample_actions, static_argnums=(0, 4, 5))
DENOISER = gempo_linear.Actor(ACTION_DIM, FLAGS["hidden_dim"])


def sample_policy(params, obs, key, num_samples=1):
    """Samples (B, num_samples, d) by the sampler of gempo_linear.py, which has tests of its own."""
    return np.float64(sample_denoised(DENOISER, params, obs, key, num_samples, 5))


def gradient(function, x, h=1e-6):
    """The gradient (..., d) at x (..., d) of a function with values (...), by differences."""
    columns = []
    for k in range(x.shape[-1]):
        step = h * np.eye(x.shape[-1])[k]
        columns.append((function(x + step) - function(x - step)) / (2 * h))
    return np.stack(columns, axis=-1)


def qsm_reference(agent, batch, done):
    next_key, noise_key = jax.random.split(done.key)
    next_actions = sample_policy(agent.params["actor"], batch.next_obs, next_key)[:, 0]
    target = agent.slow_params["critic"]
    next_q = helpers.critics(target, batch.next_obs, next_actions).min(axis=0)
    q_loss, q_values = td_error(agent, batch, next_q)
    _, t, eps = gempo_linear.add_noise(noise_key, batch.actions)
    alpha, sigma = helpers.schedule(t)
    x_t = alpha * np.float64(batch.actions) + sigma * np.float64(eps)
    slope = gradient(lambda x: helpers.critics(target, batch.obs, x).mean(axis=0), x_t)
    scores = -sigma * slope / (0.1 * np.abs(slope).mean())
    eps_hat = helpers.actor(agent.params["actor"], x_t, t, batch.obs)
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": np.mean((eps_hat - scores) ** 2),
        "losses/q_values": q_values,
        "charts/gradient_mean": np.abs(slope).mean(),
        "charts/target_max": np.abs(scores).max(),
    }


def qvpo_reference(agent, batch, done):
    next_key, particle_key, uniform_key, loss_key = jax.random.split(done.key, 4)
    slow, everyone = agent.slow_params, np.arange(64)
    candidates = sample_policy(slow["actor"], batch.next_obs, next_key, 2)
    next_q = helpers.critics(slow["critic"], batch.next_obs[:, None], candidates).min(axis=0)
    q_loss, _ = td_error(agent, batch, next_q.max(axis=1))
    obs = np.asarray(batch.obs)[:, None]
    particles = sample_policy(agent.params["actor"], batch.obs, particle_key, 8)
    q_values = helpers.critics(agent.params["critic"], obs, particles).mean(axis=0)
    advantages = q_values.max(axis=1) - q_values.mean(axis=1)
    best = particles[everyone, q_values.argmax(axis=1)]
    uniform = jax.random.uniform(uniform_key, (64, 3, ACTION_DIM), minval=-1, maxval=1)
    actions = np.concatenate([best[:, None], np.float64(uniform)], axis=1)
    _, t, eps = gempo_linear.add_noise(loss_key, jnp.float32(actions))
    alpha, sigma = helpers.schedule(t)
    x_t = alpha * actions + sigma * np.float64(eps)
    errors = (helpers.actor(agent.params["actor"], x_t, t, obs) - np.float64(eps)) ** 2
    rows = np.outer(advantages, [1, 0.01, 0.01, 0.01])[..., None] * errors
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": rows.sum() / (64 * 4 * ACTION_DIM),
        "losses/q_values": q_values.mean(),
        "charts/advantage": advantages.mean(),
        "charts/particles_std": particles.std(axis=1).mean(),
    }


def draw_latent(agent, obs, key):
    """One of 8 latents (B, d) of 10 Euler steps, drawn with probabilities softmax(Q / 0.05)."""
    sample_key, choice_key = jax.random.split(key)
    obs = np.asarray(obs)[:, None]
    y = normal(sample_key, (64, 8, ACTION_DIM))
    for i in range(10):
        t = np.full((1, 1, 1), 0.01 + 0.098 * i)
        y = y + 0.098 * helpers.actor(agent.params["actor"], y, t, obs)
    q_values = helpers.critics(agent.params["critic"], obs, np.tanh(y)).min(axis=0)
    choice = jax.random.categorical(choice_key, jnp.float32(q_values / 0.05))
    return y[np.arange(64), np.asarray(choice)]


def rfm_reference(agent, batch, done):
    next_key, latent_key, time_key, noise_key, posterior_key = jax.random.split(done.key, 5)
    next_actions = np.tanh(draw_latent(agent, batch.next_obs, next_key))
    next_q = helpers.critics(agent.slow_params["critic"], batch.next_obs, next_actions)
    q_loss, q_values = td_error(agent, batch, next_q.min(axis=0))
    t = np.float64(jax.random.uniform(time_key, (64, 1), minval=0.01, maxval=0.99))
    noise = normal(noise_key, (64, ACTION_DIM))
    y_t = t * draw_latent(agent, batch.obs, latent_key) + (1 - t) * noise
    y_0 = normal(posterior_key, (64, 100, ACTION_DIM))
    a, b = t[:, None], 1 - t[:, None]
    y_1 = (y_t[:, None] - b * y_0) / a

    def log_density(y):
        obs = np.asarray(batch.obs)[:, None]
        q = helpers.critics(agent.params["critic"], obs, np.tanh(y)).min(axis=0)
        return q / 0.05 + np.sum(-2 * np.log(np.cosh(y)), axis=-1)

    w = special.softmax(log_density(y_1), axis=1)[..., None]
    score = a / b * y_0 + gradient(log_density, y_1)
    mean, mean_score = np.sum(w * y_1, axis=1), np.sum(w * score, axis=1)
    errors, score_errors = y_1 - mean[:, None], score - mean_score[:, None]
    covariance = np.sum(w**2 * errors * score_errors, axis=1)
    variance = np.sum(w**2 * score_errors**2, axis=1)
    control = np.clip(-covariance / (variance + 1e-4), -2, 2)
    y_1_mean = mean + control * mean_score
    velocities = y_1_mean - (y_t - t * y_1_mean) / (1 - t)
    errors = helpers.actor(agent.params["actor"], y_t, t, batch.obs) - velocities
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": np.mean(errors**2),
        "losses/q_values": q_values,
        "charts/ess": np.mean(1 / np.sum(w**2, axis=(1, 2))),
        "charts/cv_weight": np.abs(control).mean(),
        "charts/velocity_max": np.abs(velocities).max(),
    }


def return_distributions(params, obs, actions):
    """DACER's critics: means and standard deviations (2, ...)."""
    values = []
    for j in range(2):
        p = jax.tree.map(itemgetter(j), helpers.float64(params)["params"])
        inputs = helpers.concatenate([np.asarray(obs), actions])
        h = np.maximum(inputs @ p["first_kernel"] + p["first_bias"], 0)
        h = np.maximum(helpers.dense(p["Dense_0"], h), 0)
        values.append(helpers.dense(p["Dense_1"], h))
    values = np.stack(values)
    return values[..., 0], np.logaddexp(0, values[..., 1])


def huber(errors):
    size = np.abs(errors)
    return np.where(size < 50, size**2 / 2, 50 * (size - 25))


def dacer_reference(agent, batch, done):
    target_key, actor_key, _ = jax.random.split(done.key, 3)
    action_key, return_key = jax.random.split(target_key)
    sample_key, noise_key = jax.random.split(action_key)
    params, slow, everyone = agent.params, agent.slow_params, np.arange(64)
    alpha, om = np.exp(np.float64(params["log_alpha"])), np.float64(slow["std"])
    next_actions = sample_policy(params["actor"], batch.next_obs, sample_key)
    next_actions = next_actions + 0.1 * alpha * normal(noise_key, next_actions.shape)
    next_actions = np.clip(next_actions[:, 0], -1, 1)
    mean, std = return_distributions(slow["critic"], batch.next_obs, next_actions)
    draws = mean + std * np.clip(normal(return_key, mean.shape), -3, 3)
    j, rows = mean.argmin(axis=0), helpers.float64(batch)
    discounts = 0.5 * (1 - rows.terminations)
    y = rows.rewards + discounts * mean[j, everyone]
    y_draw = rows.rewards + discounts * draws[j, everyone]
    mean, std = return_distributions(params["critic"], batch.obs, rows.actions)
    errors = np.clip(y_draw - mean, -3 * om, 3 * om)
    rho = np.clip(om**2 / (std**2 + 0.1), 0.1, 10)
    terms = huber(mean - y) + std * (std**2 - huber(errors)) / (std + 0.1)
    actions = sample_policy(params["actor"], batch.obs, actor_key)[:, 0]
    action_values, _ = return_distributions(params["critic"], batch.obs, actions)
    return {
        "losses/critic_loss": np.mean(rho * terms, axis=1).sum(),
        "losses/actor_loss": -action_values.min(axis=0).mean(),
        "losses/q_values": mean.mean(),
        "charts/q_std": std.mean(),
        "charts/alpha": alpha,
        "charts/clipped_share": np.mean(np.abs(actions) > 0.999),
        "charts/entropy": float(slow["log_alpha_metrics"]["charts/entropy"]),
    }


def dipo_reference(agent, batch, done):
    next_key, loss_key = jax.random.split(done.key)
    slow = agent.slow_params
    next_actions = sample_policy(slow["actor"], batch.next_obs, next_key)[:, 0]
    next_q = helpers.critics(slow["critic"], batch.next_obs, next_actions).min(axis=0)
    q_loss, q_values = td_error(agent, batch, next_q)
    obs = np.asarray(done.buffer.storage.obs)[done.rows]
    start = b = np.float64(done.buffer.storage.actions)[done.rows]
    first, second = np.zeros_like(b), np.zeros_like(b)
    for i in range(1, 21):
        g = -gradient(lambda x: helpers.critics(agent.params["critic"], obs, x).min(axis=0), b)
        g *= min(1, 0.1 * ACTION_DIM / np.linalg.norm(g))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        size = np.sqrt(second / (1 - 0.999**i)) + 1e-5
        b = np.clip(b - 0.03 * first / (1 - 0.9**i) / size, -1, 1)
    _, t, eps = gempo_linear.add_noise(loss_key, jnp.float32(b))
    alpha, sigma = helpers.schedule(t)
    b_t = alpha * b + sigma * np.float64(eps)
    errors = helpers.actor(agent.params["actor"], b_t, t, obs) - np.float64(eps)
    return {
        "losses/critic_loss": q_loss,
        "losses/actor_loss": np.mean(errors**2),
        "losses/q_values": q_values,
        "charts/action_shift": np.abs(b - start).mean(),
    }


REFERENCES = {name: globals()[f"{name}_reference"] for name in NAMES}
TARGETS = {  # the parts of slow_params that follow by tau
    "td3": ("actor", "critic"),
    "sac": ("critic",),
    "qsm": ("critic",),
    "qvpo": ("actor", "critic"),
    "rfm": ("critic",),
    "dacer": ("critic",),
    "dipo": ("actor", "critic"),
}


# ---------------------------------------------- critics ----------------------------------------------
class Quadratic:
    """Both critics are -|a - m|^2, m a number; stands for TwinCritic."""

    def __init__(self, m):
        self.m = m

    def apply(self, params, obs, actions):
        q_values = -jnp.sum((actions - self.m) ** 2, axis=-1)
        return jnp.stack([q_values, q_values])


def fake_agent(name, critic, params=None, slow_params=None, **flags):
    """What the functions of a script read of an agent, with networks of our choice."""
    script = SCRIPTS[name]
    agent = new_agent(name)
    args = script.learning_part(make_args(name, **flags))
    return SimpleNamespace(
        args=args,
        actor=agent.actor,
        critic=critic,
        params=agent.params | (params or {}),
        slow_params=agent.slow_params | (slow_params or {}),
        action_dim=ACTION_DIM,
    )


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


# ------------------------------------------------ TD3 ------------------------------------------------
def test_td3_noise_of_the_target_has_the_variance_of_a_clipped_normal():
    """Q' = -|a|^2 and mu' = 0: the mean of y is r - gamma d .039102, the clipped variance."""
    td3, rows = SCRIPTS["td3"], 100_000
    actor = zeros_like(new_agent("td3").params["actor"])
    agent = fake_agent("td3", Quadratic(0.0), slow_params={"actor": actor})
    batch = td3.Transition(
        obs=None,
        actions=None,
        rewards=jnp.full(rows, 3.0),
        next_obs=jnp.zeros((rows, OBS_DIM)),
        terminations=jnp.zeros(rows),
    )
    targets = np.asarray(td3.td_targets(agent, batch, jax.random.key(0)))
    assert targets.shape == (rows,)
    standard_error = targets.std() / math.sqrt(rows)
    assert abs(targets.mean() - (3 - 0.5 * ACTION_DIM * 0.039102)) < 4 * standard_error


def test_td3_steps_the_actor_and_the_targets_at_every_second_update():
    agent, pool = perturbed_agent("td3"), make_pool()
    for i in range(5):
        done = one_update("td3", agent, pool, seed=i)
        agent = done.after
        moves = distance(done.before.params["actor"], agent.params["actor"]) > 0
        follows = distance(done.before.slow_params, agent.slow_params) > 0
        assert moves == follows == (i % 2 == 0)
        assert distance(done.before.params["critic"], agent.params["critic"]) > 0
    counts = {part: int(state[0].count) for part, state in agent.opt_state.items()}
    assert counts == {"actor": 3, "critic": 5}


@pytest.mark.parametrize(("m", "best"), [(0.4, 0.4), (3.0, 1.0)])
def test_td3_actor_climbs_to_the_optimum_or_the_border(m, best):
    td3, obs = SCRIPTS["td3"], np.random.default_rng(0).normal(size=(16, OBS_DIM))
    agent = fake_agent("td3", Quadratic(m))
    params, optimizer = agent.params["actor"], optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(td3.actor_loss)(params, agent, jnp.float32(obs))
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=400)
    actions = agent.actor.apply(params, jnp.float32(obs))
    np.testing.assert_allclose(actions, best, atol=0.03)


# ------------------------------------------------ SAC ------------------------------------------------
@pytest.mark.parametrize("std", [0.1, 0.8, 2.0])
def test_sac_density_integrates_to_one_and_has_the_moments_of_the_samples(std):
    sac, mean = SCRIPTS["sac"], 0.5

    def density(a):
        u = np.arctanh(a)
        xi = (u - mean) / std
        return np.exp(sac.log_prob(u[..., None], xi[..., None], np.float64([np.log(std)])))

    a = np.tanh(np.linspace(-9, 9, 20_001))  # dense at the borders, where the density may be steep
    with jax.enable_x64(True):
        p = np.asarray(density(a))
    xi = np.random.default_rng(0).normal(size=100_000)
    samples = np.tanh(mean + std * xi)
    assert integrate.trapezoid(p, a) == pytest.approx(1, abs=1e-3)
    for power in (1, 2):
        standard_error = (samples**power).std() / math.sqrt(len(samples))
        moment = integrate.trapezoid(p * a**power, a)
        assert abs(np.mean(samples**power) - moment) < 4 * standard_error + 1e-4


def test_sac_density_is_exact_in_float32_where_tanh_has_rounded_to_one():
    sac, std = SCRIPTS["sac"], np.array([0.1, 0.8, 2.0])
    u = np.linspace(-50, 50, 101)[:, None] * np.ones(3)
    mean = np.broadcast_to([0.5, -1.0, 0.0], u.shape)
    xi = (u - mean) / std
    log_slope = math.log(4) - 2 * np.logaddexp(u, -u)
    each = stats.norm.logpdf(u, mean, std) - log_slope  # (101, 3)
    ours = sac.log_prob(*(jnp.float32(v) for v in (u, xi, np.log(std))))
    np.testing.assert_allclose(ours, each.sum(axis=-1), rtol=1e-5, atol=1e-4)
    singles = [
        sac.log_prob(*(jnp.float32(v[..., [k]]) for v in (u, xi, np.log(std)))) for k in range(3)
    ]
    np.testing.assert_allclose(ours, sum(singles), rtol=1e-5)


@pytest.mark.parametrize("excess", [-0.5, 0.0, 0.5])
def test_sac_temperature_falls_where_the_policy_is_broad_and_rises_where_it_is_narrow(excess):
    log_probs = jnp.float32([1.5, 2.5]) - excess  # an entropy of -2 + excess
    gradient = jax.grad(SCRIPTS["sac"].temperature_loss)(0.7, log_probs, -2.0)
    assert gradient == pytest.approx(excess)  # Adam steps against it


def test_sac_without_temperature_and_noise_has_the_targets_of_td3():
    sac, td3, batch = SCRIPTS["sac"], SCRIPTS["td3"], make_pool()
    mean = perturbed_agent("td3").params["actor"]
    critics = {"critic": perturbed_agent("sac").slow_params["critic"]}
    last = mean["params"]["Dense_2"]
    no_noise = {  # two outputs more, which say: a log standard deviation of -20
        "kernel": jnp.concatenate([last["kernel"], jnp.zeros_like(last["kernel"])], axis=1),
        "bias": jnp.concatenate([last["bias"], jnp.full(ACTION_DIM, -20.0)]),
    }
    actor = {"params": mean["params"] | {"Dense_2": no_noise}}
    params = {"actor": actor, "log_alpha": jnp.float32(-jnp.inf)}
    critic = new_agent("sac").critic
    soft = fake_agent("sac", critic, params, critics)
    hard = fake_agent("td3", critic, {}, critics | {"actor": mean}, target_noise=0.0)
    key = jax.random.key(0)
    targets = [np.asarray(td3.td_targets(hard, batch, key)), sac.td_targets(soft, batch, key)]
    np.testing.assert_allclose(*targets, atol=1e-5)


class ConstantGaussian:
    """The actor whose parameters are mean and log standard deviation, in every state."""

    @staticmethod
    def apply(params, obs):
        return tuple(jnp.broadcast_to(value, (len(obs), 1)) for value in params)


def test_sac_gradient_of_the_actor_is_that_of_the_expected_loss():
    """Q(a) = -(a - m)^2 in one dimension; E[alpha log pi - Q] by quadrature, differentiated."""
    sac, alpha, m, rows = SCRIPTS["sac"], 0.3, 0.4, 100_000
    agent = fake_agent("sac", Quadratic(m), {"log_alpha": jnp.log(alpha)})
    agent.actor = ConstantGaussian
    mean, log_std, obs = 0.2, -0.7, jnp.zeros((rows, 1))

    def expected_loss(mean, log_std):
        xi = np.linspace(-9, 9, 4001)
        u = mean + np.exp(log_std) * xi
        log_pi = stats.norm.logpdf(xi) - log_std - (math.log(4) - 2 * np.logaddexp(u, -u))
        losses = alpha * log_pi + (np.tanh(u) - m) ** 2
        return integrate.trapezoid(losses * stats.norm.pdf(xi), xi)

    h = 1e-4
    expected = [
        (expected_loss(mean + h, log_std) - expected_loss(mean - h, log_std)) / (2 * h),
        (expected_loss(mean, log_std + h) - expected_loss(mean, log_std - h)) / (2 * h),
    ]
    params = jnp.float32(mean), jnp.float32(log_std)
    gradient, _ = jax.grad(sac.actor_loss, has_aux=True)(params, agent, obs, jax.random.key(0))
    np.testing.assert_allclose(gradient, expected, atol=0.01)  # 4 standard errors


@pytest.mark.parametrize(
    ("env_id", "lowest", "highest"), [("HalfCheetah-v5", 0.65, 1), ("Humanoid-v5", 0.4, 0.6)]
)
def test_share_of_sacs_log_stds_that_start_inside_their_limits(env_id, lowest, highest):
    """Outside they have no gradient of their own. Humanoid-v5 has the widest observations."""
    sac, env = SCRIPTS["sac"], gym.make(env_id)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    visited = [obs]
    for _ in range(100):
        obs, _, terminated, _, _ = env.step(env.action_space.sample())
        if terminated:
            obs, _ = env.reset()
        visited.append(obs)
    obs = np.float32(visited)
    actor = sac.Actor(env.action_space.shape[0])
    _, log_std = actor.apply(actor.init(jax.random.key(0), obs), obs)
    inside = (log_std > sac.LOG_STD_MIN) & (log_std < sac.LOG_STD_MAX)
    assert lowest < inside.mean() < highest


# ------------------------------------------------ QSM ------------------------------------------------
class Bowl:
    """Both critics are scale * -|a - m|^2 / 2 + shift."""

    def __init__(self, scale, m=0.3, shift=0.0):
        self.scale, self.m, self.shift = scale, m, shift

    def apply(self, params, obs, actions):
        q_values = self.shift - self.scale * jnp.sum((actions - self.m) ** 2, axis=-1) / 2
        return jnp.stack([q_values, q_values])


def qsm_targets(critic, x_t, sigma, **flags):
    qsm, agent = SCRIPTS["qsm"], fake_agent("qsm", critic, **flags)
    gradients = qsm.action_gradients(agent, jnp.zeros((len(x_t), OBS_DIM)), jnp.float32(x_t))
    return np.asarray(qsm.noise_targets(gradients, jnp.float32(sigma), agent.args))


def test_qsm_targets_of_a_quadratic_q():
    rng = np.random.default_rng(0)
    x_t, sigma = 2 * rng.normal(size=(9, 2)), rng.uniform(0.1, 1, (9, 1))
    expected = sigma * (x_t - 0.3) / (0.2 * np.abs(x_t - 0.3).mean())
    for critic in (Bowl(1.0), Bowl(500.0), Bowl(3.0, shift=70.0)):  # whatever the scale of Q
        targets = qsm_targets(critic, x_t, sigma, temperature=0.2)
        np.testing.assert_allclose(targets, expected, rtol=1e-4)
    for scale in (1.0, 7.0):  # the authors' target is linear in it
        targets = qsm_targets(Bowl(scale), x_t, sigma, gradient_scale=50.0)
        np.testing.assert_allclose(targets, 50 * scale * (x_t - 0.3), rtol=1e-4)
    assert (qsm_targets(Bowl(0.0), x_t, sigma) == 0).all()  # a constant Q


class BoltzmannDenoiser:
    """eps_hat = sigma_t (x - m) / c, QSM's perfect fit to Q = -|a - m|^2 / 2c."""

    def __init__(self, m, c):
        self.m, self.c = m, c
        self.action_dim = len(m)

    def apply(self, params, *inputs, method):
        if method == "denoise":
            x, t, _ = inputs
            return gempo_linear.noise_schedule(t)[1] * (x - self.m) / self.c
        return inputs[0] if method == "embed_time" else jnp.zeros(())


def test_qsm_samples_of_the_perfect_fit_are_narrower_than_the_boltzmann_policy():
    m, c = (v.ravel() for v in np.meshgrid([0, 0.3, 0.5, 0.8], [0.02, 0.07, 0.2]))
    denoiser, obs = BoltzmannDenoiser(m, c), jnp.zeros((1, 1))
    sample = SCRIPTS["qsm"].sample_actions
    actions = np.asarray(sample(denoiser, None, obs, jax.random.key(0), 20_000, 20))[0]
    np.testing.assert_allclose(actions.mean(axis=0), m, atol=0.05)
    ratios = actions.std(axis=0) / np.sqrt(c)
    assert ratios.min() > 0.53 and ratios.max() < 0.77


# ------------------------------------------------ QVPO -----------------------------------------------
gempos_loss = jax.jit(gempo_linear.actor_loss, static_argnums=1)


def test_qvpo_without_random_actions_has_gempos_loss_of_the_best_particle():
    qvpo, agent = SCRIPTS["qvpo"], perturbed_agent("qvpo")
    rng, key = np.random.default_rng(0), jax.random.key(0)
    particles, q_values = rng.uniform(-1, 1, (16, 8, 2)), rng.normal(size=(16, 8))
    actions, advantages = qvpo.select_best(jnp.float32(particles), jnp.float32(q_values))
    obs, params = jnp.float32(rng.normal(size=(16, OBS_DIM))), agent.params["actor"]
    rows = params, agent.actor, obs, actions, advantages, key
    ours = jax.jit(qvpo.actor_loss, static_argnums=1)(*rows)
    gempos = gempos_loss(*rows, math.inf)
    assert ours == pytest.approx(float(gempos), rel=1e-5)
    # GeMPO-Linear's weights at a low temperature choose the same particle.
    weights = np.asarray(gempo_linear.reweight(jnp.float32(q_values), jnp.float32(1e-6)))
    np.testing.assert_allclose(weights.max(axis=1), 1, atol=1e-6)
    chosen = particles[np.arange(16), weights.argmax(axis=1)]
    np.testing.assert_array_equal(actions[:, 0], np.float32(chosen))


def test_qvpo_weights_are_advantages_which_a_shift_of_q_does_not_change():
    qvpo, rng = SCRIPTS["qvpo"], np.random.default_rng(0)
    particles, q_values = jnp.float32(rng.normal(size=(6, 8, 2))), rng.normal(size=(6, 8))
    best, advantages = qvpo.select_best(particles, jnp.float32(q_values))
    expected = q_values.max(axis=1) - q_values.mean(axis=1)
    np.testing.assert_allclose(advantages[:, 0], expected, rtol=1e-5)
    for scale, shift in ((1, 5.0), (3, 0.0)):
        same, other = qvpo.select_best(particles, jnp.float32(scale * q_values + shift))
        np.testing.assert_array_equal(best, same)
        np.testing.assert_allclose(other, scale * advantages, rtol=1e-4)
    _, zero = qvpo.select_best(particles, jnp.ones((6, 8)))
    actions, weights = qvpo.add_uniform(best, zero, jax.random.key(0), make_args("qvpo"))
    assert actions.shape == (6, 4, 2) and (np.asarray(weights) == 0).all()


def test_qvpo_random_actions_are_uniform_on_the_whole_box():
    qvpo, args = SCRIPTS["qvpo"], make_args("qvpo", num_uniform=2000)
    best, advantages = jnp.zeros((30, 1, 2)), jnp.full((30, 1), 4.0)
    actions, weights = qvpo.add_uniform(best, advantages, jax.random.key(0), args)
    assert (np.asarray(actions[:, 0]) == 0).all() and (np.asarray(weights[:, 0]) == 4).all()
    np.testing.assert_allclose(weights[:, 1:], 0.04, rtol=1e-6)
    uniform = np.asarray(actions[:, 1:]).reshape(-1, 2)
    assert np.abs(uniform.mean(axis=0)).max() < 4 * math.sqrt(1 / 3 / len(uniform))
    np.testing.assert_allclose(uniform.var(axis=0), 1 / 3, atol=0.006)


def test_qvpo_number_of_samples_of_a_target_is_that_of_the_task():
    qvpo = SCRIPTS["qvpo"]
    for env_id, count in (("HalfCheetah-v5", 4), ("Hopper-v5", 1), ("Ant-v5", 2)):
        assert qvpo.learning_part(qvpo.Args(env_id=env_id)).td_best_of == count
    assert qvpo.learning_part(qvpo.Args(td_best_of=7)).td_best_of == 7
    actions = jnp.ones((3, 1, 2))
    np.testing.assert_array_equal(qvpo.choose_best(None, None, None, actions), actions[:, 0])


# ------------------------------------------------ RFM ------------------------------------------------
M, S, Y_T = np.array([0.3, -0.8]), np.array([0.5, 0.7]), np.array([0.4, -0.2])
POSTERIORS = {  # t: mean, variance, and root mean squared errors at K = 100 of three controls
    0.3: ([0.34537, -0.78899], [0.23902, 0.44954], [0.107, 0.169], [2.4, 1.8]),
    0.5: ([0.40000, -0.66846], [0.20000, 0.32886], [0.049, 0.073], [0.22, 0.14]),
    0.8: ([0.46000, -0.31222], [0.05000, 0.05543], [0.020, 0.025], [0.005, 0.003]),
}
WORST_OF_OPTIMAL = {0.3: 0.0011, 0.5: 0.0006, 0.8: 4e-5}


def gaussian(y):
    return -jnp.sum((y - M) ** 2 / (2 * S**2), axis=-1)


estimate_posterior = jax.jit(SCRIPTS["rfm"].estimate_posterior, static_argnums=(0, 4))


def estimate(t, num_proposals, rows, control=None, log_density=gaussian):
    """RFM's posteriors at `rows` copies of Y_T, in float64."""
    y_t, t = np.tile(Y_T, (rows, 1)), np.full((rows, 1), t)
    key = jax.random.key(0)
    posterior = estimate_posterior(log_density, y_t, t, key, num_proposals, control)
    return jax.tree.map(np.asarray, posterior)


@pytest.mark.parametrize("t", POSTERIORS)
def test_rfm_posterior_of_a_gaussian_and_the_error_of_each_control(t):
    mean, variance, error_of_none, error_of_gradient = POSTERIORS[t]
    with jax.enable_x64(True):
        exact = estimate(t, 2, 3, control=1 / (1 / S**2 + (t / (1 - t)) ** 2))
        np.testing.assert_allclose(exact.mean, np.tile(mean, (3, 1)), atol=1e-5)
        np.testing.assert_allclose(exact.control, variance, atol=1e-5)
        spread = np.ptp(
            np.asarray(exact.mean), axis=0
        )  # with this control every draw gives the mean
        assert spread.max() < 1e-9
        errors = {}
        gradient_control = np.full(2, ((1 - t) / t) ** 2)
        for name, control in (("none", np.zeros(2)), ("gradient", gradient_control), ("", None)):
            estimates = estimate(t, 100, 200, control)
            errors[name] = estimates.mean - mean
    rms = {name: np.sqrt(np.mean(e**2, axis=0)) for name, e in errors.items()}
    np.testing.assert_allclose(rms["none"], error_of_none, rtol=0.25)
    np.testing.assert_allclose(rms["gradient"], error_of_gradient, rtol=0.6)
    assert np.abs(errors[""]).max() < 2 * WORST_OF_OPTIMAL[t] + 1e-5
    np.testing.assert_allclose(estimates.control.mean(axis=0), variance, atol=0.01)


def test_rfm_controls_of_zero_and_of_the_gradient_are_the_two_expectations():
    t, shape = 0.4, (200, 100, 2)
    odds = ((1 - t) / t) ** 2
    with jax.enable_x64(True):
        y_0 = np.asarray(jax.random.normal(jax.random.key(0), shape))
        y_1 = (Y_T - (1 - t) * y_0) / t
        log_weights = np.asarray(gaussian(y_1))
        by_noise = estimate(t, 100, 200, np.zeros(2))
        by_gradient = estimate(t, 100, 200, np.full(2, odds))
        collapsed = estimate(0.05, 100, 200)  # one latent has all the weight
        few, many = (estimate(0.5, k, 200, np.zeros(2)).mean for k in (100, 1600))
    w = special.softmax(log_weights, axis=1)[..., None]
    np.testing.assert_allclose(by_noise.mean, np.sum(w * y_1, axis=1))
    expected = Y_T / t - odds * np.sum(w * (y_1 - M) / S**2, axis=1)
    np.testing.assert_allclose(by_gradient.mean, expected)
    np.testing.assert_allclose(by_noise.sample_size, 1 / np.sum(w**2, axis=(1, 2)))
    assert np.isfinite(collapsed.mean).all() and collapsed.sample_size.min() < 1.1
    rms = [np.sqrt(np.mean((means - POSTERIORS[0.5][0]) ** 2)) for means in (few, many)]
    assert rms[0] / rms[1] == pytest.approx(4, rel=0.25)  # the error of Monte Carlo


def test_rfm_estimate_does_not_change_with_a_constant_added_to_q():
    with jax.enable_x64(True):
        plain = estimate(0.4, 100, 200)
        shifted = estimate(0.4, 100, 200, log_density=lambda y: gaussian(y) + 1e4)
    np.testing.assert_allclose(shifted.mean, plain.mean, atol=1e-9)


def test_rfm_posterior_under_a_constant_q_is_that_of_uniform_actions():
    """E is log sech^2 alone; the mean by quadrature. tanh of a latent is then uniform."""
    rfm, t = SCRIPTS["rfm"], 0.5
    y = np.linspace(-9, 9, 20_001)
    assert np.isfinite(np.asarray(rfm.log_slope(jnp.float32([-50, 0, 50])))).all()
    density = 1 / np.cosh(y) ** 2 * np.exp(-((Y_T[:, None] - t * y) ** 2) / (2 * (1 - t) ** 2))
    means = integrate.trapezoid(density * y, y) / integrate.trapezoid(density, y)
    with jax.enable_x64(True):
        estimates = estimate(t, 2000, 20, log_density=lambda y: rfm.log_slope(y).sum(axis=-1))
    np.testing.assert_allclose(np.mean(estimates.mean, axis=0), means, atol=0.01)
    actions = np.tanh(np.random.default_rng(0).logistic(scale=0.5, size=10_000))
    assert stats.kstest(actions, "uniform", (-1, 2)).pvalue > 0.01
    slopes = np.gradient(np.asarray(rfm.log_slope(jnp.float32(y))), y)
    np.testing.assert_allclose(slopes, -2 * np.tanh(y), atol=5e-3)


class GaussianFlow:
    """The velocity of the flow from N(0, 1) to N(m, s^2), exact."""

    m, s, action_dim = 0.7, 0.4, 1

    def apply(self, params, *inputs, method):
        if method == "denoise":
            y, t, _ = inputs
            variance = (t * self.s) ** 2 + (1 - t) ** 2
            y_1 = self.m + t * self.s**2 / variance * (y - t * self.m)
            y_0 = (1 - t) / variance * (y - t * self.m)
            return y_1 - y_0
        return inputs[0] if method == "embed_time" else jnp.zeros(())


def test_rfm_euler_steps_along_the_exact_velocity_reach_the_gaussian():
    sample, flow = SCRIPTS["rfm"].sample_latents, GaussianFlow()
    y = np.asarray(sample(flow, None, jnp.zeros((1, 1)), jax.random.key(0), 20_000, 200))
    assert y.mean() == pytest.approx(0.7, abs=0.02)
    assert y.std() == pytest.approx(0.4, abs=0.02)


# ----------------------------------------------- DACER -----------------------------------------------
class Returns:
    """Critics whose means are `slopes` (2,) times the first action, and whose std is 0.5."""

    def __init__(self, slopes):
        self.slopes = jnp.float32(slopes)

    def apply(self, params, obs, actions):
        mean = self.slopes[:, None] * actions[..., 0]
        return mean, jnp.full_like(mean, 0.5)


class Known:
    """The denoiser of a policy that plays the first two observations."""

    action_dim = ACTION_DIM

    @staticmethod
    def apply(params, *inputs, method):
        if method == "denoise":
            x, t, obs = inputs
            alpha, sigma = gempo_linear.noise_schedule(t)
            return (x - alpha * obs[..., :2]) / sigma
        return inputs[0]


def test_dacer_targets_take_the_smaller_critic_row_by_row():
    """Means of a and -a: the smaller is -|a|. The draws are at most 3 std from it."""
    dacer, batch = SCRIPTS["dacer"], jax.tree.map(jnp.asarray, make_pool())
    agent = fake_agent("dacer", Returns([1.0, -1.0]), reward_scale=0.2)
    agent.actor, agent.params["log_alpha"] = Known, jnp.float32(-jnp.inf)
    targets = dacer.td_targets(agent, batch, jax.random.key(0))
    assert targets.mean.shape == targets.draw.shape == (CAPACITY,)
    actions = np.clip(np.asarray(batch.next_obs)[:, 0], -1, 1)
    discounts = 0.5 * (1 - np.asarray(batch.terminations))
    expected = 0.2 * np.asarray(batch.rewards) - discounts * np.abs(actions)
    np.testing.assert_allclose(targets.mean, expected, atol=2e-3)
    errors = np.asarray(targets.draw - targets.mean)[discounts > 0] / (0.5 * 0.5)
    assert np.abs(errors).max() < 3.001 and errors.std() == pytest.approx(1, abs=0.1)


class ConstantReturns:
    """Critics whose parameters are mean and raw std, (2, 1) each, at all states and actions."""

    @staticmethod
    def apply(params, obs, actions):
        mean, raw_std = params
        shape = (2, len(actions))
        return jnp.broadcast_to(mean, shape), jnp.broadcast_to(jax.nn.softplus(raw_std), shape)


def test_dacer_critic_settles_at_the_mean_and_at_the_std_that_its_loss_has():
    """Draws of N(2, 1): std^2 = E[e^2] / 2 with e clipped at 3 std, which is 0.68."""
    dacer, size = SCRIPTS["dacer"], 512
    batch = SimpleNamespace(obs=None, actions=jnp.zeros((size, 1)))
    params = jnp.zeros((2, 1)), jnp.zeros((2, 1))

    def step(params, inputs):
        key, rate = inputs
        draws = 2 + jax.random.normal(key, (size,))
        targets = dacer.Targets(mean=draws, draw=draws)
        om = jax.nn.softplus(params[1]).mean()
        grads, _ = jax.grad(dacer.critic_loss, has_aux=True)(
            params, ConstantReturns, batch, targets, om
        )
        return jax.tree.map(lambda x, g: x - rate * g, params, grads), None

    keys, rates = jax.random.split(jax.random.key(0), 3000), jnp.linspace(0.1, 0.01, 3000)
    params, _ = jax.lax.scan(step, params, (keys, rates))
    mean, std = ConstantReturns.apply(params, None, jnp.zeros((1, 1)))
    np.testing.assert_allclose(mean, 2, atol=0.03)
    np.testing.assert_allclose(std, 0.68, atol=0.03)


def test_dacer_gradient_through_the_chain_is_that_of_differences():
    dacer = SCRIPTS["dacer"]
    with jax.enable_x64(True):
        agent = fake_agent("dacer", Returns([1.0, 1.2]), diffusion_steps=3)
        params = jax.tree.map(lambda x: np.float64(0.3 * x), agent.params["actor"])
        obs = np.random.default_rng(0).normal(size=(64, OBS_DIM))
        loss_and_gradient = jax.jit(
            jax.value_and_grad(lambda params: dacer.actor_loss(params, agent, obs, key)[0])
        )
        key = jax.random.key(1)
        _, grads = loss_and_gradient(params)
        values = []
        for h in (1e-6, -1e-6):
            moved = jax.tree.map(lambda x, h=h: x + h, params)
            value, _ = loss_and_gradient(moved)
            values.append(float(value))
        slope = float(sum(g.sum() for g in jax.tree.leaves(grads)))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 1e-3


def test_dacer_has_no_gradient_where_its_actions_are_clipped():
    dacer = SCRIPTS["dacer"]
    agent = fake_agent("dacer", Returns([1.0, 1.2]), diffusion_steps=3)
    obs = jnp.zeros((4, OBS_DIM))
    output = agent.params["actor"]["params"]["output"]
    bias = jnp.full_like(output["bias"], -1e4)  # far beyond the border at every step
    params = {"params": agent.params["actor"]["params"] | {"output": output | {"bias": bias}}}
    grads, clipped_share = jax.grad(dacer.actor_loss, has_aux=True)(
        params, agent, obs, jax.random.key(0)
    )
    assert float(clipped_share) == 1
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_dacer_entropy_of_three_modes_and_of_a_constant_sample():
    dacer, std = SCRIPTS["dacer"], 0.02
    rng = np.random.default_rng(0)
    modes = np.array([[-0.4, 0.0], [0.0, 0.0], [0.0, 0.4]])  # 20 std apart
    samples = modes[rng.integers(0, 3, (8, 200))] + std * rng.normal(size=(8, 200, 2))
    samples = np.concatenate([samples, np.full((1, 200, 2), 0.7)])
    mixtures, log_likelihoods = jax.vmap(dacer.fit_mixture)(jnp.float32(samples))
    entropies = np.asarray(jax.vmap(dacer.entropy_bound)(mixtures))
    expected = math.log(3) + 2 * (math.log(std) + 0.5 * math.log(2 * math.pi * math.e))
    np.testing.assert_allclose(entropies[:8], expected, atol=0.3)  # 200 samples
    assert entropies[:8].mean() == pytest.approx(expected, abs=0.1)
    assert np.isfinite(entropies[8]) and entropies[8] < -8
    assert np.diff(log_likelihoods[:8], axis=1).min() > -1e-3  # EM never makes the fit worse
    np.testing.assert_allclose(np.sum(mixtures.weights, axis=1), 1, atol=1e-5)


def test_dacer_alpha_moves_at_its_interval_alone_and_toward_the_target_entropy():
    agent, pool = perturbed_agent("dacer"), make_pool()
    for num_updates, is_due in ((0, True), (2, False), (10_000, True)):
        agent = agent.replace(num_updates=jnp.int32(num_updates))
        done = one_update("dacer", agent, pool)
        agent = done.after
        change = float(agent.params["log_alpha"] - done.before.params["log_alpha"])
        assert (change != 0) == is_due
        if is_due:
            excess = float(done.metrics["charts/entropy"]) + 0.9 * ACTION_DIM
            assert change * excess < 0
            last = agent.slow_params["log_alpha_metrics"]["charts/entropy"]
            assert float(last) == float(done.metrics["charts/entropy"])


def test_dacer_evaluation_is_acting_without_the_added_noise():
    dacer, agent = SCRIPTS["dacer"], perturbed_agent("dacer")
    obs = np.random.default_rng(0).normal(size=(100, OBS_DIM)).astype(np.float32)
    key = jax.random.key(0)
    silent = agent.replace(params=agent.params | {"log_alpha": jnp.float32(-jnp.inf)})
    played = [np.asarray(dacer.act(silent, obs, key, 0, training)) for training in (True, False)]
    np.testing.assert_allclose(*played, atol=1e-6)
    assert np.abs(played[1] - dacer.act(agent, obs, key, 0, True)).max() > 0.1


# ------------------------------------------------ DIPO -----------------------------------------------
def improve(actions, critic, steps, ratio=1e9):
    """DIPO's improved actions (B,), from actions (B,) of one dimension."""
    dipo = SCRIPTS["dipo"]
    agent = fake_agent("dipo", critic, improvement_steps=steps, gradient_ratio=ratio)
    agent.action_dim = 1
    actions = jnp.float32(actions)[:, None]
    return np.asarray(dipo.improve_actions(agent, jnp.zeros((len(actions), 1)), actions))[:, 0]


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"),
    [(1, 1e9, -0.870), (20, 1e9, -0.314), (40, 1e9, 0.188), (20, 0.1, -0.300)],
)
def test_dipo_steps_up_a_quadratic_q(steps, ratio, expected):
    improved = improve([-0.9], Bowl(1.0, m=0.9), steps, ratio)
    assert improved[0] == pytest.approx(expected, abs=0.005)


def test_dipo_improved_actions_reach_the_optimum_or_the_border_and_never_get_worse():
    assert improve([0.45], Bowl(1.0, m=0.5), 20)[0] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(improve([0.8, 0.95, 1.0], Bowl(1.0, m=1.5), 20), 1)
    starts = np.linspace(-1, 1, 41)
    far = np.abs(starts - 0.5) > 0.1
    improved = improve(starts, Bowl(1.0, m=0.5), 20)
    assert (np.abs(improved - 0.5) <= np.abs(starts - 0.5))[far].all()
    np.testing.assert_array_equal(improve(starts, Bowl(0.0), 20), np.float32(starts))


def test_dipo_actors_loss_is_gempos_with_equal_weights_and_no_clip():
    dipo, agent, pool = SCRIPTS["dipo"], perturbed_agent("dipo"), make_pool()
    obs, actions, key = pool.obs[:16], pool.actions[:16], jax.random.key(0)
    params = agent.params["actor"]
    one_particle = actions[:, None], np.ones((16, 1), np.float32)
    gempos = gempos_loss(params, agent.actor, obs, *one_particle, key, math.inf)
    ours = jax.jit(dipo.actor_loss, static_argnums=1)(params, agent.actor, obs, actions, key)
    assert ours == pytest.approx(float(gempos), rel=1e-5)


def test_dipo_slow_actor_follows_at_every_second_update_on_halfcheetah():
    dipo, pool = SCRIPTS["dipo"], make_pool()
    intervals = [dipo.learning_part(dipo.Args(env_id=f"{x}-v5")) for x in ("Hopper", "HalfCheetah")]
    assert [args.slow_actor_interval for args in intervals] == [1, 2]
    agent = perturbed_agent("dipo")
    agent = agent.replace(args=replace(agent.args, slow_actor_interval=2))
    first = one_update("dipo", agent, pool)
    second = one_update("dipo", jax.tree.map(jnp.copy, first.after), pool)
    for done, part, tau in (
        (first, "actor", 0.0),
        (first, "critic", 0.05),
        (second, "actor", 0.05),
    ):
        old, new = done.before.slow_params[part], done.after.params[part]
        expected = jax.tree.map(lambda x, y, tau=tau: x + tau * (y - x), old, new)
        assert distance(done.after.slow_params[part], expected) < 1e-6


def limited(grads, limit):
    """Gradients scaled to a norm of at most `limit`, in float64."""
    grads = helpers.float64(grads)
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda leaf: leaf * min(1.0, limit / norm), grads)


def first_step_of_adam(grads, learning_rate, eps):
    return jax.tree.map(lambda g: -learning_rate * g / (np.abs(g) + eps), grads)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_dipo_limits_the_norm_of_both_critics_together_and_of_the_actor_alone(scale):
    """With a large eps the step of Adam shows the size of the gradient."""
    dipo, agent = SCRIPTS["dipo"], perturbed_agent("dipo")
    limit = agent.args.max_grad_norm
    grads = jax.tree.map(lambda leaf: scale * leaf, agent.params)
    optimizer = dipo.make_optimizer(agent.args)
    changes, _ = optimizer.update(grads, optimizer.init(agent.params))
    for part, rate in (("actor", agent.args.policy_lr), ("critic", agent.args.q_lr)):
        expected = first_step_of_adam(limited(grads[part], limit), rate, dipo.ADAM_EPS)
        assert distance(changes[part], expected) < 1e-4 * rate


def test_rfm_limits_the_norm_of_each_critic_by_itself():
    rfm, agent = SCRIPTS["rfm"], perturbed_agent("rfm")
    grads = jax.tree.map(
        lambda leaf: leaf * np.float32([0.01, 50]).reshape(2, *[1] * (leaf.ndim - 1)),
        agent.params["critic"],
    )
    clipped = rfm.clip_each_critic(grads)
    for critic in (0, 1):
        alone = jax.tree.map(lambda leaf, i=critic: leaf[i], grads)
        ours = jax.tree.map(lambda leaf, i=critic: leaf[i], clipped)
        expected = limited(alone, rfm.MAX_GRAD_NORM)
        assert distance(ours, expected) < 1e-5
        assert (distance(ours, alone) > 1e-2) == (critic == 1)  # only the second one was too long


def test_dipo_writes_the_drawn_rows_alone_and_of_equal_ones_the_last():
    dipo, rng = SCRIPTS["dipo"], np.random.default_rng(0)
    stored, rows = rng.normal(size=(30, 2)), rng.integers(0, 30, 25)
    values = rng.normal(size=(25, 2))
    assert len(set(rows)) < 25
    expected = np.float32(stored)
    for row, value in zip(rows, values, strict=True):
        expected[row] = value
    written = dipo.write_rows(jnp.float32(stored), jnp.asarray(rows), jnp.float32(values))
    np.testing.assert_array_equal(written, expected)


def test_dipo_changes_the_improved_actions_of_the_drawn_rows_and_nothing_else():
    pool = make_pool()
    done = one_update("dipo", perturbed_agent("dipo"), pool)
    storage = done.buffer.storage
    for ours, theirs in zip(storage[:5], pool, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    changed = (np.asarray(storage.improved) != pool.actions).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), np.unique(done.rows))


def test_dipo_checkpoints_hold_the_improved_actions(trained):
    dipo = SCRIPTS["dipo"]
    folder, agent = trained("dipo", total_timesteps=520, checkpoint_frequency=1000)
    (run,) = folder.glob("runs/*")
    _, state = dipo.load_state(dipo.Args(resume=str(run)))
    stored = state.buffer.storage
    changed = (np.asarray(stored.improved) != np.asarray(stored.actions)).any(axis=1)
    assert changed.any() and not changed[520:].any()
    assert distance(agent.params, state.agent.params) == 0


def test_dipo_sampler_without_noise_is_a_function_of_its_start():
    """eps_hat = 0: every step back is a known multiple of x, but for the clip of x_0."""
    dipo, key = SCRIPTS["dipo"], jax.random.key(0)

    class Zero(BoltzmannDenoiser):
        def apply(self, params, *inputs, method):
            return jnp.zeros_like(inputs[0])

    denoiser = Zero(np.zeros(2), np.ones(2))
    actions = dipo.sample_actions(denoiser, None, jnp.zeros((1, 1)), key, 50, 5, noise=0.0)
    alpha, sigma = helpers.schedule(np.linspace(dipo.T_MIN, dipo.T_MAX, 6))
    x = normal(key, (6, 1, 50, 2))[0]
    for i in range(5, 0, -1):
        a = alpha[i] / alpha[i - 1]
        x_0 = np.clip(x / alpha[i], -1, 1)
        x = (alpha[i - 1] * (1 - a**2) * x_0 + a * sigma[i - 1] ** 2 * x) / sigma[i] ** 2
    np.testing.assert_allclose(actions, np.clip(x, -1, 1), atol=1e-4)
