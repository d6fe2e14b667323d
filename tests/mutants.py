"""Mutants: small wrong changes of the scripts, each of which must make a test fail.

    python tests/mutants.py                          # all of them: 40 minutes on two slow cores
    python tests/mutants.py "neg:*" update_keys      # those of these names (shell patterns)
    python tests/mutants.py --workers 1 --list

Prints killed or survived for each, the score, and exits with 1 if one survived. First the tests
themselves are run without a change, since a test that always fails kills every mutant. It is not
part of pytest, but test_scripts.py checks that the list still fits the scripts: a text that is not
found exactly once is an error.

A shared text is changed in all four siblings at once, in a copy of the repository, since a change
in one file alone fails the comparison of siblings and says nothing about the other tests. That,
and a list of chosen changes, is what the libraries do not offer (looked at in 2026): mutmut 3
makes its own mutants of each function by fixed operators, and cosmic-ray's `init` plans one job
for every place that its operators find in one module. A list of texts is plain Python here.
"""

import argparse
import ast
import fnmatch
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIBLINGS = ("gempo_exp.py", "gempo_linear.py", "gempo_square.py", "gempo_neg.py")
COPIED = ("*.py", "pyproject.toml", "tests/*.py", "benchmark/*.py", "baselines/*.py")
TIMEOUT = 900  # seconds for the tests of a mutant; one that does not end counts as killed
BUFFER, CHECKPOINTS, DIFFUSION = "test_buffer", "test_checkpoints", "test_diffusion"
LEARNING, REWEIGHTING, SCRIPTS = "test_learning", "test_reweighting", "test_scripts"


class Mutant(NamedTuple):
    """Changes (text, replacement) of each of `files`, and the tests of which one must fail."""

    name: str
    files: tuple[str, ...]
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


MUTANTS: list[Mutant] = []


def shared(tests, name, text, replacement, *more):
    """Add a mutant of the text that all siblings share."""
    add(SIBLINGS, tests, name, text, replacement, *more)


def add(files, tests, name, text, replacement, *more):
    """Add a mutant; `more` are further texts and replacements. `tests`: "module name name ..."."""
    module, *functions = tests.split()
    selected = tuple(f"tests/{module}.py::{function}" for function in functions)
    changes = ((text, replacement), *zip(more[::2], more[1::2], strict=True))
    MUTANTS.append(Mutant(name, tuple(files), changes, selected))


# ----------------------------------------------- arguments -----------------------------------------------
budget = f"{LEARNING} test_the_papers_kl_budget_is_scaled_to_the_number_of_particles"
scaled = 'values["target_kl"] = kappa * math.log(args.num_particles) / math.log(64)'
shared(budget, "kl_budget_not_scaled", scaled, 'values["target_kl"] = kappa')
defaults = f"{SCRIPTS} test_defaults_are_those_of_the_paper[neg]"
shared(defaults, "hopper_budget", '"Hopper-v5": 2.5', '"Hopper-v5": 2.0')
shared(defaults, "noise_default", "additive_noise: float = 0.2", "additive_noise: float = 0.1")
bad_input = "test_bad_input_ends_in_one_line_that_names_the_flag_and_writes_nothing"
shared(
    f"{SCRIPTS} {bad_input}[gamma-1.1]",
    "gamma_above_one",
    "0 <= getattr(args, flag) <= 1",
    "0 <= getattr(args, flag)",
)
shared(
    f"{SCRIPTS} {bad_input}[num_envs-1001]",
    "more_environments_than_rows",
    "args.num_envs <= args.buffer_size",
    "True",
)

# ---------------------------------------------- environment ----------------------------------------------
flat = f"{SCRIPTS} test_observations_of_any_shape_are_flattened"
flatten = "        env = gym.wrappers.FlattenObservation(env)\n"
shared(flat, "observations_not_flattened", flatten, "")
rescale = "RescaleAction(env, np.float32(-1), np.float32(1))"
shared(
    f"{SCRIPTS} test_actions_are_scaled_to_one",
    "actions_in_other_units",
    rescale,
    rescale.replace("1", "3"),
)
ends = f"{LEARNING} test_a_transition_at_an_end_holds_the_true_last_observation"
shared(ends, "reset_in_the_next_step", "AutoresetMode.SAME_STEP", "AutoresetMode.NEXT_STEP")
episodes = f"{SCRIPTS} test_every_episode_of_every_environment_is_logged_at_its_step"
shared(episodes, "first_return_for_all", 'statistics["r"][index]', 'statistics["r"][0]')
own_charts = f"{SCRIPTS} test_scalars_of_the_environments_own_are_logged_beside_return_and_length"
reported = "if reported is not None and reported[index]:"
shared(own_charts, "charts_not_reported", reported, "if reported is not None:")
module = f"{SCRIPTS} test_an_environments_module_is_found_in_the_working_directory"
shared(module, "module_not_found", "sys.path.append(os.getcwd())", "pass")

# ----------------------------------------------- networks ------------------------------------------------
mish = f"{DIFFUSION} test_mish_and_its_gradient_are_the_definition_at_any_size"
shared(mish, "mish_formula", "(e * (e + 2.0) + 2.0)", "(e * (e + 2.0) + 1.0)")
shared(mish, "mish_overflows", "jnp.exp(jnp.minimum(x, 20.0))", "jnp.exp(x)")
rounding = f"{DIFFUSION} test_bfloat16_dot_rounds_its_inputs_and_sums_in_float32"
shared(rounding, "bfloat16_sums", "element_type=jnp.float32", "element_type=jnp.bfloat16")
drawn = f"{DIFFUSION} test_particles_are_drawn_in_bfloat16_where_that_is_fast"
shared(drawn, "bfloat16_everywhere", "if has_fast_bfloat16():", "if True:")
shared(drawn, "bfloat16_nowhere", "if has_fast_bfloat16():", "if False:")
fast = f"{DIFFUSION} test_where_bfloat16_is_fast"
shared(fast, "other_bfloat16_instructions", '"avx512_bf16" in', '"avx512f" in')
layers = f"{DIFFUSION} test_every_layer_starts_orthogonal_with_gain_sqrt_2_and_zero_bias"
shared(f"{layers}[32]", "gain_of_one", "orthogonal(math.sqrt(2))", "orthogonal(1.0)")
shared(f"{layers}[32]", "wide_frequencies", "normal(0.2)", "normal(1.0)")
joint = '"first_kernel", ORTHOGONAL, (inputs, width)'
parts = "jnp.concatenate([ORTHOGONAL(key, (n, width)) for n in (6, inputs - 6)])"
shared(
    f"{layers}[256]",
    "actor_parts_orthogonal_apart",
    joint,
    f'"first_kernel", lambda key, shape: {parts}, (inputs, width)',
)
joint = '"first_kernel", ORTHOGONAL, (inputs, self.hidden_dim)'
parts = "jnp.concatenate([ORTHOGONAL(key, (n, shape[1])) for n in (obs_dim, inputs - obs_dim)])"
shared(
    f"{layers}[8]",
    "critic_parts_orthogonal_apart",
    joint,
    f'"first_kernel", lambda key, shape: {parts}, (inputs, self.hidden_dim)',
)
shared(
    f"{layers}[32]",
    "critics_ignore_hidden_dim",
    "TwinCritic(self.args.hidden_dim)",
    "TwinCritic(256)",
    "TwinCritic(args.hidden_dim)",
    "TwinCritic(256)",
)
own_values = f"{DIFFUSION} test_both_critics_start_from_values_of_their_own"
shared(
    own_values, "one_critic_twice", 'split_rngs={"params": True}', 'split_rngs={"params": False}'
)
actor = f"{DIFFUSION} test_actor_is_the_plain_network_on_concatenated_inputs"
cos_and_sin = "[jnp.cos(angles), jnp.sin(angles)]"
shared(actor, "cosines_only", cos_and_sin, "[jnp.cos(angles), jnp.cos(angles)]")
shared(actor, "actor_without_a_layer", "h = mish(self.hidden_2(h))", "h = self.hidden_2(h)")
shared(actor, "actor_without_first_bias", "@ self.kernel_t + self.first_bias", "@ self.kernel_t")
critics = f"{DIFFUSION} test_critics_are_two_plain_networks_on_concatenated_inputs"
hidden = "h = nn.relu(Dense(self.hidden_dim)(h))"
shared(critics, "critic_without_a_relu", hidden, "h = Dense(self.hidden_dim)(h)")
moved = f"{LEARNING} test_the_first_update_moves_every_leaf_by_the_rate_of_its_part[neg]"
frozen = "t * jax.lax.stop_gradient(self.frequencies)"
shared(moved, "frequencies_do_not_learn", "t * self.frequencies", frozen)

# ----------------------------------------------- diffusion -----------------------------------------------
times = f"{DIFFUSION} test_times_of_training_are_those_of_the_released_code_and_reach_both_ends"
shared(times, "times_up_to_one", "maxval=T_MAX", "maxval=1.0")
shared(times, "times_from_zero", "minval=T_MIN", "minval=0.0")
shared(times, "another_last_time", "0.001, 0.9946  #", "0.001, 0.99  #")
process = f"{DIFFUSION} test_add_noise_is_the_forward_process_with_uniform_times_and_normal_noise"
shared(process, "one_key_for_t_and_eps", "normal(eps_key, actions", "normal(t_key, actions")
schedule = f"{DIFFUSION} test_schedule_is_the_cosine_formula_in_float64"
shared(schedule, "another_offset", "math.pi / 2 * 0.008 / 1.008", "math.pi / 2 * 0.08 / 1.008")
textbook = f"{DIFFUSION} test_sampler_is_the_textbook_one_with_a_whole_network_at_every_step"
predicted = "(x - step.sigma * eps_hat) / step.alpha"
shared(textbook, "x_0_not_clipped", f"jnp.clip({predicted}, -1.0, 1.0)", predicted)
shared(textbook, "noise_in_the_last_step", ".at[0].set(0.0)", "")
shared(textbook, "variance_for_deviation", "noise_std=jnp.sqrt(beta)", "noise_std=beta")
once = "noise=jnp.broadcast_to(eps[1], eps[1:].shape)"
shared(textbook, "one_noise_for_all_steps", "noise=eps[1:]", once)
shared(textbook, "noise_of_x_T_again", "noise=eps[1:]", "noise=eps[:-1]")
shared(textbook, "time_before_the_step", "(params, times[1:, None]", "(params, times[:-1, None]")
shared(textbook, "actions_not_clipped", "return jnp.clip(x, -1.0, 1.0)", "return x")

# ---------------------------------------------- reweighting ----------------------------------------------
oracle = "test_weights_and_nu_are_those_of_a_float64_root_finder"
by_hand = "test_examples_computed_by_hand"
offset = "test_an_offset_of_q_far_above_its_spread_costs_no_precision"
shift = "    q = q - q.max(axis=-1, keepdims=True)"


def reweighting(name, text, replacement, *, kind, tests=(by_hand, oracle)):
    """Add a mutant of one script's REWEIGHTING; `kind` is the script's name and the tests' case."""
    script = kind.rstrip("-.0123456789")
    selected = " ".join(f"{test}[{kind}]" for test in tests)
    selected = selected.replace(f"{by_hand}[{kind}]", by_hand)  # its cases are numbered otherwise
    add([f"gempo_{script}.py"], f"{REWEIGHTING} {selected}", f"{script}:{name}", text, replacement)


def reweighting_of_exp(name, text, replacement, **more):
    reweighting(name, text, replacement, kind="exp", **more)


def reweighting_of_linear(name, text, replacement, **more):
    reweighting(name, text, replacement, kind="linear", **more)


def reweighting_of_square(name, text, replacement, **more):
    reweighting(name, text, replacement, kind="square", **more)


def reweighting_of_neg(name, text, replacement, **more):
    reweighting(name, text, replacement, kind="neg-0.3", **more)


in_exp = "jnp.exp((q - nu) / temp)"
normalizer = "temp * jax.nn.logsumexp(q / temp, axis=-1, keepdims=True)"
mean_one = f"{normalizer} - temp * math.log(q.shape[-1])"
reweighting_of_exp("no_shift", shift, "    q = q", tests=[offset])
reweighting_of_exp("temperature_squared", in_exp, "jnp.exp((q - nu) / temp**2)")
reweighting_of_exp("no_temperature_in_the_sum", "logsumexp(q / temp, axis", "logsumexp(q, axis")
reweighting_of_exp("sum_in_other_units", f"return {normalizer}", f"return {normalizer} / temp")
reweighting_of_exp("weights_sum_to_n", f"return {normalizer}", f"return {mean_one}")
reweighting_of_exp("sign", in_exp, "jnp.exp((nu - q) / temp)")

linear_weights = "jnp.maximum((q - nu) / temp, 0.0)"
ranks = "jnp.arange(1, q.shape[-1] + 1) * x"
count = "k = jnp.sum(excess <= temp, axis=-1, keepdims=True)"
reweighting_of_linear("no_shift", shift, "    q = q", tests=[offset])
reweighting_of_linear("temperature_squared", linear_weights, "jnp.maximum((q - nu) / temp**2, 0.0)")
reweighting_of_linear("not_cut_at_zero", linear_weights, "(q - nu) / temp")
reweighting_of_linear("ascending", "descending=True", "descending=False")
reweighting_of_linear("k_too_large", count, f"{count} % q.shape[-1] + 1")
reweighting_of_linear("k_too_small", count, f"{count.replace('k = ', 'k = jnp.maximum(1, -1 + ')})")
reweighting_of_linear("ranks_from_zero", ranks, "jnp.arange(q.shape[-1]) * x")
reweighting_of_linear(
    "sum_of_other_rank", "prefix_sums, k - 1", "prefix_sums, jnp.maximum(k - 2, 0)"
)
reweighting_of_linear("no_temperature_in_nu", "(active_sum - temp) / k", "(active_sum - 1) / k")

count = "k = jnp.sum(excess <= 1, axis=-1, keepdims=True)"
root = "jnp.sqrt((1 - active_deviations) / k)"
reweighting_of_square("no_shift", shift, "    q = q", tests=[offset])
reweighting_of_square("not_squared", f"{linear_weights} ** 2", linear_weights)
squared_temperature = "jnp.maximum((q - nu) / temp**2, 0.0)"
reweighting_of_square("temperature_squared", linear_weights, squared_temperature)
reweighting_of_square("no_root", root, "(1 - active_deviations) / k")
reweighting_of_square("no_k", root, "jnp.sqrt(1 - active_deviations)")
reweighting_of_square("k_too_large", count, f"{count} % q.shape[-1] + 1")
reweighting_of_square("k_too_small", count, f"{count.replace('k = ', 'k = jnp.maximum(1, -1 + ')})")
reweighting_of_square("welford", " * ranks / jnp.maximum(ranks - 1, 1)", "")
reweighting_of_square("excess_of_the_mean", " + ranks * (means - z) ** 2", "")
reweighting_of_square("not_in_units", "descending=True) / temp", "descending=True)")
reweighting_of_square("nu_in_units", "return temp * (active_mean", "return (active_mean")

neg_weights = "jnp.maximum((q - nu) / temp, ell / q.shape[-1])"
count = "k = jnp.sum(excess <= temp * (1 - n * floor), axis=-1, keepdims=True)"
mass = "temp * (1 - (n - k) * floor)"
reweighting_of_neg("no_shift", shift, "    q = q", tests=[offset])
reweighting_of_neg("floor_without_n", "floor = ell / n", "floor = ell")
reweighting_of_neg("cut_without_n", neg_weights, neg_weights.replace("ell / q.shape[-1]", "ell"))
reweighting_of_neg("cut_at_zero", neg_weights, neg_weights.replace("ell / q.shape[-1]", "0.0"))
reweighting_of_neg("floor_outside_the_sum", mass, "temp")
reweighting_of_neg("floor_of_the_wrong_sign", mass, mass.replace("1 -", "1 +"))
reweighting_of_neg("floor_for_all", mass, "temp * (1 - n * floor)")
reweighting_of_neg("floor_not_in_the_count", "temp * (1 - n * floor), axis", "temp, axis")
reweighting_of_neg("k_too_large", count, f"{count} % n + 1")
reweighting_of_neg("k_too_small", count, f"{count.replace('k = ', 'k = jnp.maximum(1, -1 + ')})")
reweighting_of_neg("temperature_squared", neg_weights, neg_weights.replace("temp", "temp**2"))
add(
    ["gempo_neg.py"],
    f"{REWEIGHTING} test_compute_weights_is_reweight_with_the_flags_of_the_script[neg]",
    "neg:flag_ignored",
    "reweight(q, temp, args.ell)",
    "reweight(q, temp, -0.1)",
)

# --------------------------------------------- replay buffer ---------------------------------------------
ring = f"{BUFFER} test_buffer_keeps_what_a_deque_keeps_in_whole_rows"
samples = f"{BUFFER} test_samples_are_whole_transitions_that_were_written"
uniform = f"{BUFFER} test_samples_are_uniform_over_the_filled_rows_before_and_after_wrapping"
in_place = f"{BUFFER} test_add_transitions_writes_in_place_and_fast"
refused = f"{BUFFER} test_more_transitions_than_the_buffer_holds_are_refused"
filled = "jnp.minimum(buffer.count, len(buffer.storage.rewards))"
shared(ring, "count_by_calls", "buffer.count + rows)", "buffer.count + 1)")
shared(ring, "no_ring", " % capacity\n", "\n")
shared(samples, "empty_rows_drawn", filled, "len(buffer.storage.rewards)")
shared(uniform, "last_row_drawn_too_often", filled, "buffer.count")
shared(in_place, "rows_copied", '@partial(jax.jit, donate_argnames="buffer")\n', "@jax.jit\n")
shared(in_place, "rows_not_jitted", '@partial(jax.jit, donate_argnames="buffer")\n', "")
shared(refused, "too_many_rows", "    if rows > capacity:\n", "    if False:\n")
size = f"{LEARNING} test_batch_size_is_what_the_flag_says"
shared(size, "batch_size_ignored", "batch_key, agent.args.batch_size)", "batch_key, 256)")

# ----------------------------------------------- a new agent ---------------------------------------------
new_agent = "test_a_new_agent_has_a_temperature_of_one_and_slow_copies_equal_to_its_networks"
new_agent = f"{LEARNING} {new_agent}"
shared(new_agent, "lambda_starts_elsewhere", "jnp.zeros(())}\n", "jnp.ones(())}\n")
copies = "jax.tree.map(jnp.copy, networks)"
shared(new_agent, "slow_copies_of_zeros", copies, "jax.tree.map(jnp.zeros_like, networks)")
adam = f"{LEARNING} test_the_optimizer_is_adam_with_its_usual_decays_and_a_rate_for_each_part"
shared(adam, "first_decay", "optax.adam(args.policy_lr)", "optax.adam(args.policy_lr, b1=0.5)")
shared(adam, "second_decay", "optax.adam(args.q_lr)", "optax.adam(args.q_lr, b2=0.99)")
shared(adam, "rate_of_another_part", "optax.adam(args.temperature_lr)", "optax.adam(args.q_lr)")
one_map = f"{LEARNING} test_two_agents_go_through_one_tree_map_and_one_vmap"
shared(one_map, "seed_is_static", "return Hyperparameters(**values)", "return args")
defaults_train = f"{LEARNING} test_an_agent_of_default_args_trains_without_a_run[neg]"
shared(defaults_train, "no_default_budget", '        values["target_kl"] = kappa', "        kappa")

# ------------------------------------------------- update ------------------------------------------------
losses = f"{LEARNING} test_update_computes_the_losses_of_a_plain_float64_version[neg]"
terminated = f"{LEARNING} test_update_learns_nothing_from_what_follows_a_termination"
online = 'params, target_params = agent.params["actor"], agent.slow_params["critic"]'
target = "next_obs, next_actions).min(axis=0)"
choice = "choose_best(agent, batch.next_obs, next_actions)"
target_agent = 'agent.replace(params=agent.params | {"critic": target_params})'
particles = "particles + args.additive_noise * draw_normal(noise_key, particles.shape)"
clipped = "errors = jnp.minimum((eps_hat - eps) ** 2, loss_clip)"
weighted = "jnp.mean(weights.shape[-1] * weights[..., None] * errors)"
clip_last = "jnp.mean(jnp.minimum(weights.shape[-1] * weights[..., None] * errors, loss_clip))"
shared(losses, "loss_clip_hard_coded", clipped, clipped.replace("loss_clip", "5.0"))
shared(
    losses, "clip_after_the_weight", clipped, "errors = (eps_hat - eps) ** 2", weighted, clip_last
)
shared(losses, "weights_left_out", weighted, "jnp.mean(errors)")
shared(losses, "weights_sum_to_one", weighted, "jnp.mean(weights[..., None] * errors)")
shared(losses, "mean_target", target, target.replace("min", "mean"))
shared(losses, "online_target", online, online.replace("slow_params", "params"))
shared(
    losses, "old_policy_in_the_target", online, online.replace("agent.params", "agent.slow_params")
)
shared(losses, "target_critics_choose", choice, choice.replace("agent", target_agent, 1))
shared(
    losses, "td_best_of_ignored", "args.td_best_of, args.diffusion_steps", "1, args.diffusion_steps"
)
shared(losses, "reward_scale_ignored", "args.reward_scale * batch.rewards", "batch.rewards")
future = "args.gamma * (1 - batch.terminations) * next_q"
shared(terminated, "terminations_ignored", future, "args.gamma * next_q")
pi_old = 'pi_old = agent.slow_params["actor"]'
shared(losses, "new_policy_for_particles", pi_old, pi_old.replace("slow_params", "params"))
shared(losses, "no_additive_noise", f"return {particles}", "return particles")
shared(losses, "particles_clipped", f"return {particles}", f"return jnp.clip({particles}, -1, 1)")
pessimistic = "obs[:, None], particles).mean(axis=0)"
shared(losses, "minimum_for_weights", pessimistic, pessimistic.replace("mean", "min"))
shared(losses, "softplus_temperature", "temperature = jnp.exp(", "temperature = jax.nn.softplus(")
shared(losses, "keys_used_twice", "weights, loss_key, args", "weights, noise_key, args")
td_error = "jnp.mean((q_values - targets) ** 2)"
shared(losses, "one_critic_learns", td_error, td_error.replace("q_values", "q_values[0]"))
temperature = f"{REWEIGHTING} test_temperature_loss_and_its_gradient_are_those_of_the_paper[neg]"
cut = "jnp.maximum(weights, 1e-6)"
shared(temperature, "negative_weights_count", cut, "jnp.abs(weights)")
shared(temperature, "not_renormalized", "p = p / p.sum(axis=-1, keepdims=True)\n", "p = p\n")
shared(temperature, "temperature_sign", "(target_kl - kl), kl", "(kl - target_kl), kl")
shared(temperature, "no_log_n", "math.log(weights.shape[-1]) - entropy", "-entropy")
slow = (
    f"{LEARNING} test_update_moves_the_target_critics_by_tau_and_copies_the_actor_at_its_interval"
)
is_copied = "is_copied = num_updates % "
shared(slow, "tau_of_the_other", "target, agent.args.tau)", "target, 1 - agent.args.tau)")
shared(slow, "copied_an_update_late", is_copied, is_copied.replace("num", "agent.num"))
shared(slow, "target_an_update_late", 'update(params["critic"]', 'update(agent.params["critic"]')

# ----------------------------------------- learn, train_step, act ----------------------------------------
several = f"{LEARNING} test_several_updates_follow_each_other_and_their_metrics_are_the_mean"
shared(
    several,
    "last_metrics",
    "jax.tree.map(jnp.mean, metrics)",
    "jax.tree.map(lambda x: x[-1], metrics)",
)
own_keys = f"{LEARNING} test_every_update_has_a_key_and_a_batch_of_its_own"
split = "agent, jax.random.split(key, num_updates))"
shared(own_keys, "one_key_for_all", split, "agent, jnp.full(num_updates, key))")
folded = "jax.random.fold_in(key, step), num_updates)"
shared(own_keys, "update_keys_ignore_the_step", folded, "key, num_updates)")
rows = f"{LEARNING} test_updates_are_counted_by_the_rows_that_come_in"
counted = "len(transitions.rewards) * agent.args.updates_per_step"
shared(rows, "rows_not_counted", counted, "agent.args.updates_per_step")
shared(rows, "updates_per_step_ignored", counted, "len(transitions.rewards)")
insert = "    buffer = add_transitions(buffer, transitions)\n    num_updates"
shared(rows, "transitions_not_inserted", insert, "    num_updates")
given_up = f"{LEARNING} test_train_step_gives_up_the_arrays_it_was_given"
donated = 'donate_argnames=("agent", "buffer"))\n'
shared(given_up, "agent_not_donated", donated, 'donate_argnames="buffer")\n')
best_of = f"{LEARNING} test_act_plays_the_best_of_its_samples_by_the_smaller_critic"
number = "args.act_best_of if training else args.eval_best_of"
shared(best_of, "act_best_of_ignored", number, "1 if training else args.eval_best_of")
shared(best_of, "eval_best_of_one", number, "args.act_best_of if training else 1")
smaller = "obs[:, None], actions).min(axis=0)"
shared(best_of, "mean_critic_chooses", smaller, smaller.replace("min", "mean"))
shared(best_of, "worst_action", "q_values.argmax(axis=-1)", "q_values.argmin(axis=-1)")
current = 'params = agent.params["actor"]\n    actions'
shared(best_of, "old_policy_acts", current, current.replace("params[", "slow_params["))
anew = f"{LEARNING} test_act_draws_anew_at_each_step_and_by_each_key"
shared(anew, "same_noise_at_each_step", "    key = jax.random.fold_in(key, step)\n", "")

# ----------------------------------------------- evaluation ----------------------------------------------
whole = f"{SCRIPTS} test_evaluation_plays_whole_episodes_from_seeds_of_their_own"
noise = f"{SCRIPTS} test_evaluation_acts_outside_of_training_with_new_noise_at_each_step"
endless = f"{SCRIPTS} test_an_endless_episode_is_cut_and_counts_as_far_as_it_went"
stops = f"{SCRIPTS} test_a_signal_ends_an_evaluation_without_scores"
apart = f"{SCRIPTS} test_every_evaluation_of_a_run_and_every_run_has_seeds_of_its_own"
shared(whole, "reset_unseeded", "env.reset(seed=own_seed)", "env.reset()")
shared(whole, "truncations_do_not_end", "if terminated or truncated:", "if terminated:")
shared(whole, "last_reward_for_return", "returns[i] += reward", "returns[i] = reward")
shared(whole, "another_deviation", "returns.std(),", "returns.std(ddof=1),")
evaluated = "act(agent, obs, key, step, training=False)"
shared(noise, "evaluation_at_step_zero", evaluated, evaluated.replace("step", "0"))
shared(noise, "evaluation_as_in_training", evaluated, evaluated.replace("False", "True"))
shared(noise, "one_evaluation_key", "key = jax.random.key(seed)\n", "key = jax.random.key(0)\n")
shared(endless, "endless_evaluation", "in range(MAX_EVAL_STEPS)", "in range(10**9)")
shared(stops, "evaluation_ignores_signals", "if run is not None and run.stop_signal:", "if False:")
stride = "args.seed + EVAL_SEED_STRIDE * step"
shared(apart, "evaluations_from_one_seed", stride, "args.seed")
shared(apart, "runs_share_their_evaluations", stride, "EVAL_SEED_STRIDE * step")

# ------------------------------------------------ training -----------------------------------------------
together = f"{LEARNING} test_learning_and_acting_start_together_after_the_random_steps"
starts = "before >= args.learning_starts and"
shared(together, "learning_starts_twice", starts, "before >= 2 * args.learning_starts and")
trains = "act(agent, obs, act_key, before, training=True)"
shared(together, "acts_as_in_evaluation", trains, trains.replace("True", "False"))
shared(together, "acts_at_one_step", trains, trains.replace("before", "0"))
shared(
    together,
    "one_key_to_act_and_learn",
    "transitions, update_key, before",
    "transitions, act_key, before",
)
stored = f"{LEARNING} test_rewards_are_stored_as_they_come_and_scaled_in_the_target"
rewards = "np.float32(new_obs), np.float32(rewards)"
shared(stored, "rewards_scaled_twice", rewards, f"{rewards} * np.float32(args.reward_scale)")
shared(ends, "final_obs_of_the_first", 'infos["final_obs"][i]', 'infos["final_obs"][ended[0]]')
shared(ends, "next_episode_in_next_obs", 'next_obs[i] = infos["final_obs"][i]', "pass")
cut_off = "next_obs, np.float32(terminations))"
shared(ends, "truncation_ends", cut_off, "next_obs, np.float32(terminations | truncations))")
shared(ends, "obs_after_the_step", "Transition(obs, actions,", "Transition(new_obs, actions,")
shared(episodes, "episodes_logged_at_one_step", "run.log(before + i + 1,", "run.log(before + 1,")
repeats = f"{LEARNING} test_random_steps_repeat_with_the_seed_and_differ_between_seeds"
seeded = "    envs.action_space.seed(args.seed)\n"
shared(repeats, "random_actions_unseeded", seeded, "")
first_seeds = "test_the_environments_of_a_run_are_reset_with_seeds_drawn_from_its_own"
first_reset = "envs.reset(seed=episode_seeds(args.seed, args.num_envs))"
shared(f"{LEARNING} {first_seeds}", "run_unseeded", first_reset, "envs.reset()")
networks = f"{LEARNING} test_agents_of_different_seeds_start_from_different_networks"
init_key = "init_key, _, _ = run_keys(args.seed)"
shared(networks, "same_networks", init_key, init_key.replace("args.seed", "0"))
due = f"{LEARNING} test_what_is_due_is_done_once_for_each_multiple_among_the_steps_made"
multiple = "after // frequency > before // frequency"
shared(due, "due_at_multiples_only", multiple, "after % frequency == 0")
retraced = f"{LEARNING} test_another_seed_does_not_compile_again"
shared(
    retraced,
    "compiled_for_each_run",
    "return Hyperparameters(**values)",
    "return replace(args, **values)",
)

# ----------------------------------------------- run folder ----------------------------------------------
session = f"{CHECKPOINTS} test_a_resumed_run_starts_a_session_where_it_goes_on"
shared(session, "session_starts_a_step_early", "step=first_step + 1", "step=first_step")
shared(session, "no_session_start", "status=SessionLog.START", "status=SessionLog.STOP")
two = f"{CHECKPOINTS} test_only_the_last_two_checkpoints_are_kept"
shared(two, "three_checkpoints", "checkpoint_steps(folder)[:-2]", "checkpoint_steps(folder)[:-3]")
plain = f"{CHECKPOINTS} test_a_checkpoint_is_plain_data_with_flags_and_only_the_filled_rows"
shared(plain, "empty_rows_saved", "np.asarray(stored)[:count]", "np.asarray(stored)")
last_rows = "None if state.transitions is None else tuple(state.transitions)"
shared(plain, "last_transitions_lost", last_rows, "None")
random_rows = "            buffer = add_transitions(buffer, transitions)\n\n        # 3."
shared(plain, "random_steps_lost", random_rows, "            pass\n\n        # 3.")
go_on = f"{CHECKPOINTS} test_the_environments_go_on_where_they_were"
shared(
    go_on,
    "environments_made_anew",
    "            if isinstance(value, gym.Env):\n",
    "            if False:\n",
)
simulator = f"{CHECKPOINTS} test_an_environment_whose_simulator_is_gone_begins_a_new_episode"
shared(simulator, "restored_untried", "        trial.step(trial.action_space.sample())\n", "")
way = f"{CHECKPOINTS} test_an_environment_with_a_reduction_of_its_own_counts_as_one_that_cannot_be_pickled"
ways = '("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__")'
shared(way, "reduction_ignored", ways, '("__getstate__", "__setstate__")')
uneven = f"{SCRIPTS} test_infos_of_unequal_shapes_and_types_do_no_harm"
shared(
    uneven, "infos_as_they_are", "return EpisodeInfo(make_env(env_id))", "return make_env(env_id)"
)
shared(uneven, "charts_of_one_type", "float(value) for name, value", "value for name, value")
below = f"{SCRIPTS} test_seeds_of_episodes_repeat_and_runs_of_neighbouring_seeds_share_none"
drawn = "np.random.SeedSequence(seed).generate_state(count).tolist()"
shared(below, "episodes_from_one_seed", drawn, "[seed % 2**32] * count")
shared(below, "seeds_shared", drawn, "[(seed + i) % 2**32 for i in range(count)]")
resumed_speed = (
    f"{SCRIPTS} test_the_speed_of_a_resumed_run_leaves_out_its_first_rounds_which_compile"
)
first_rounds = "max(self.args.learning_starts, self.first_step)"
shared(resumed_speed, "compiling_counts_as_speed", first_rounds, "self.args.learning_starts")
shared(below, "seed_too_great", drawn, "[2**32 * seed + i for i in range(count)]")
other = f"{CHECKPOINTS} test_other_scripts_sizes_flags_and_missing_folders_are_refused"
shared(other, "other_script_accepted", 'if content["script"] != Args.exp_name:', "if False:")
flipped = f"{CHECKPOINTS} test_a_flipped_bit_is_noticed_in_any_place"
shared(
    flipped,
    "no_checksum",
    'with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=0) as gzip_file:',
    'with open(temporary, "wb") as gzip_file:',
    "with gzip.open(path) as file:",
    'with open(path, "rb") as file:',
)
locked = f"{CHECKPOINTS} test_a_folder_that_another_process_writes_is_refused"
shared(locked, "no_lock", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl")
finite = f"{CHECKPOINTS} test_an_environment_that_is_not_finite_ends_the_run"
shared(finite, "one_finite_is_enough", "np.isfinite(array).all()", "np.isfinite(array).any()")
unsaved = f"{CHECKPOINTS} test_parameters_that_are_not_finite_are_not_saved"
shared(
    unsaved,
    "bad_parameters_saved",
    '        self.require_finite(state.step, parameters=content["leaves"])\n        folder',
    "        folder",
)
whole_file = f"{CHECKPOINTS} test_a_file_has_its_name_only_once_it_is_whole"
shared(whole_file, "written_in_place", 'path.with_name(f"{path.name}.tmp")', "path")
extended = f"{CHECKPOINTS} test_an_extension_outlives_a_kill_before_the_next_checkpoint"
shared(extended, "extension_not_saved", "        if is_extended:", "        if False:")
twice = (
    f"{CHECKPOINTS} test_a_signal_that_is_sent_twice_counts_once_and_a_later_one_ends_the_process"
)
shared(twice, "every_signal_counts", "elif now > self.signal_time + 1:", "else:")
pickles = f"{CHECKPOINTS} test_an_environment_that_pickles_itself_begins_a_new_episode"
shared(
    pickles,
    "own_pickling_ignored",
    '                    raise pickle.PicklingError("it has a way of its own")',
    "                    pass",
)
left_over = f"{CHECKPOINTS} test_a_file_may_be_called_tmp_and_what_a_kill_left_is_removed"
shared(left_over, "left_overs_stay", "                unfinished.unlink()", "                pass")
within = f"{SCRIPTS} test_scaled_actions_stay_within_the_bounds"
clipped = "env = gym.wrappers.TransformAction(env, clip, env.action_space)"
shared(within, "scaled_actions_not_clipped", clipped, "pass")
no_moviepy = f"{SCRIPTS} test_a_video_without_moviepy_is_refused_before_anything_is_written"
text = "has_moviepy or not args.capture_video, what"
shared(no_moviepy, "video_without_moviepy", text, "True, what")
logged = f"{SCRIPTS} test_the_flags_are_logged_with_the_values_that_learning_uses"
shared(logged, "script_not_logged", '{"script": Args.exp_name} | asdict(args)', "asdict(args)")
film = f"{SCRIPTS} test_a_film_is_written_at_the_end_of_its_evaluation"
shared(film, "film_kept_in_memory", "run.save_video(step, eval_envs[0])", "pass")
first = f"{SCRIPTS} test_a_first_observation_that_is_not_finite_ends_the_run"
first_check = "    run.require_finite(state.step, observations=state.obs)\n"
shared(first, "first_observation_unchecked", first_check, "")


# ------------------------------------------------ baselines ----------------------------------------------
def baseline(script, test, name, text, replacement):
    """Add a mutant of one script in baselines/."""
    path = f"baselines/{script}.py"
    add([path], f"test_baselines test_{script}_{test}", f"{script}:{name}", text, replacement)


noise = "noise_of_the_target_has_the_variance_of_a_clipped_normal"
clip = "    noise = jnp.clip(noise, -args.target_noise_clip, args.target_noise_clip)\n"
baseline("td3", noise, "target_noise_unclipped", clip, "")
density = "density_integrates_to_one_and_has_the_moments_of_the_samples"
exact = "density_is_exact_in_float32_where_tanh_has_rounded_to_one"
slope = "log_slope = 2 * (math.log(2) - u - nn.softplus(-2 * u))"
baseline("sac", density, "log_of_two_once", slope, slope.replace("2 * (math.log(2)", "2 * (0"))
baseline("sac", exact, "slope_of_tanh", slope, "log_slope = jnp.log(1 - jnp.tanh(u) ** 2 + 1e-6)")
falls = "temperature_falls_where_the_policy_is_broad_and_rises_where_it_is_narrow"
gap = "log_alpha * (entropy - target_entropy)"
baseline("sac", falls, "temperature_upward", gap, "log_alpha * (target_entropy - entropy)")
quadratic = "targets_of_a_quadratic_q"
score = "return -sigma * gradients / (args.temperature * size)"
baseline("qsm", quadratic, "score_upside_down", score, score.replace("-sigma", "sigma"))
baseline("qsm", quadratic, "sum_of_critics", "q_values.mean(axis=0).sum()", "q_values.sum()")
box = "random_actions_are_uniform_on_the_whole_box"
baseline("qvpo", box, "half_the_box", "minval=-1.0, maxval=1.0", "minval=0.0, maxval=1.0")
advantage = "weights_are_advantages_which_a_shift_of_q_does_not_change"
mean = " - q_values.mean(axis=-1, keepdims=True)"
baseline("qvpo", advantage, "weights_are_values", mean, "")
control = "posterior_of_a_gaussian_and_the_error_of_each_control"
squared = "covariance = jnp.sum(w**2 *"
baseline("rfm", control, "covariance_of_plain_weights", squared, "covariance = jnp.sum(w *")
baseline("rfm", control, "no_control", "mean + control * mean_score", "mean")
row = "targets_take_the_smaller_critic_row_by_row"
smaller = "mean.argmin(axis=0)[None]"
baseline("dacer", row, "larger_critic", smaller, "mean.argmax(axis=0)[None]")
last = "writes_the_drawn_rows_alone_and_of_equal_ones_the_last"
baseline("dipo", last, "any_of_equal_rows", ', mode="drop")', ', mode="clip")')
second = "slow_actor_follows_at_every_second_update_on_halfcheetah"
baseline("dipo", second, "at_every_update", "% agent.args.slow_actor_interval == 0", "% 1 == 0")
together = "limits_the_norm_of_both_critics_together_and_of_the_actor_alone"
baseline("dipo", together, "no_limit", "optax.chain(clip, optax.adam", "optax.chain(optax.adam")
each = "limits_the_norm_of_each_critic_by_itself"
baseline("rfm", each, "one_norm", "return jax.vmap(clip_one)(grads)", "return clip_one(grads)")


# --------------------------------------------------- run -------------------------------------------------
def check_list():
    """Exit with the names of mutants whose text is not found once, or that are no Python."""
    wrong = []
    names = [mutant.name for mutant in MUTANTS]
    wrong += [f"{name}: named twice" for name in set(names) if names.count(name) > 1]
    for mutant in MUTANTS:
        for file in mutant.files:
            source = (ROOT / file).read_text()
            for text, _ in mutant.changes:
                if source.count(text) != 1:
                    wrong.append(f"{mutant.name}: {source.count(text)} times in {file}: {text!r}")
            try:
                ast.parse(mutate(source, mutant))
            except SyntaxError as error:
                wrong.append(f"{mutant.name}: {file} is no Python: {error}")
    if wrong:
        raise SystemExit("\n".join(wrong))


def mutate(source, mutant):
    for text, replacement in mutant.changes:
        source = source.replace(text, replacement)
    return source


def copy_repository(source, folder, mutant=None):
    """The files that tests need, with the changes of a mutant."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            place = folder / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
    if mutant:
        for file in mutant.files:
            place = folder / file
            place.write_text(mutate(place.read_text(), mutant))


def run_pytest(folder, tests, log):
    """In a process of its own: exits with pytest's code."""
    import pytest

    os.chdir(folder)
    output = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests])))


def prepare_processes():
    """Processes that start with the libraries imported, and none of this repository."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    context = multiprocessing.get_context("forkserver")
    libraries = ["jax", "flax.linen", "optax", "gymnasium", "scipy.stats", "scipy.optimize"]
    libraries += ["hypothesis", "pytest", "tyro", "cloudpickle", "mujoco", "tqdm"]
    libraries += ["tensorboard.backend.event_processing.event_accumulator"]
    libraries += ["tensorboard.summary.writer.event_file_writer"]
    context.set_forkserver_preload(libraries)
    return context


def run_tests(context, source, tests, mutant=None, timeout=TIMEOUT):
    """Pytest's exit code on a copy (None: it did not end in time), and the end of its output."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve() / "repository"
        folder.mkdir()
        copy_repository(source, folder, mutant)
        log = folder.parent / "log"
        process = context.Process(target=run_pytest, args=(folder, tests, log))
        process.start()
        process.join(timeout)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        output = log.read_text() if log.exists() else ""
        return code, output[-3000:]


def judge(context, source, mutant):
    """Run one mutant: "killed", "survived", or "error" where pytest could not run the tests."""
    start = time.monotonic()
    code, output = run_tests(context, source, mutant.tests, mutant)
    verdict = {0: "survived", 1: "killed", None: "killed"}.get(code, "error")
    print(f"{verdict:9} {mutant.name} ({time.monotonic() - start:.0f} s)", flush=True)
    if verdict == "error":
        print(output, flush=True)
    return verdict


def check_tests(context, source, mutants):
    """Exit unless all tests of these mutants pass without a change."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    print(f"{len(tests)} tests without a change", flush=True)
    code, output = run_tests(context, source, list(tests), timeout=None)
    if code != 0:
        raise SystemExit(f"{output}\nthe tests must pass first")


def select(patterns):
    """The mutants of these names; exits with one line if there are none."""
    selected = []
    for pattern in patterns:
        matching = [mutant for mutant in MUTANTS if fnmatch.fnmatch(mutant.name, pattern)]
        if not matching:
            raise SystemExit(f"no mutant is named {pattern}")
        selected += [mutant for mutant in matching if mutant not in selected]
    return selected


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="names or shell patterns")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests unchanged")
    args = parser.parse_args()
    check_list()
    mutants = select(args.names)
    if args.list:
        print("\n".join(mutant.name for mutant in mutants))
        return
    context = prepare_processes()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.workers) as pool:
        source = pathlib.Path(name).resolve()
        copy_repository(ROOT, source)  # what is edited meanwhile does not count
        if not args.unchecked:
            check_tests(context, source, mutants)
        verdicts = list(pool.map(partial(judge, context, source), mutants))
    killed = verdicts.count("killed")
    print(f"\n{killed} of {len(mutants)} killed ({killed / len(mutants):.1%})")
    for verdict, mutant in zip(verdicts, mutants, strict=True):
        if verdict != "killed":
            print(f"{verdict}: {mutant.name}")
    if killed < len(mutants):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
