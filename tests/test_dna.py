"""dna_finetune.py: its process, sampler, weights, data files, checkpoints and errors against known answers."""

import ast
import fcntl
import gzip
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dna_finetune as dna
from baselines import dna_extras, dna_guidance

SCRIPT = ROOT / "dna_finetune.py"
TINY = dict(data_size=1000, sequence_length=48, hidden_dim=8, num_layers=2, pretrain_steps=3, pretrain_batch_size=16)
TINY |= dict(oracle_dim=4, oracle_steps=3, num_updates=4, num_groups=2, group_size=4, sample_steps=3, eval_samples=16)
FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_script(*flags, cwd, script=SCRIPT, env=None, **kwargs):
    command = [sys.executable, str(script), *map(str, flags)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, **kwargs)


def read_scalars(folder):
    """The values of each TensorBoard tag in `folder`; their steps must be 1, 2, 3 and so on."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert all([event.step for event in series] == list(range(1, len(series) + 1)) for series in scalars.values())
    return {name: [event.value for event in series] for name, series in scalars.items()}


def error_line(function, *args):
    """The message with which a function exits; it must be one line."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# ------------------------------------------------------ the file -----------------------------------------------------
def test_the_script_is_short_and_imports_nothing_of_this_repository():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 700
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {"flax", "jax", "numpy", "optax", "orbax", "scipy", "tensorboardX", "tqdm", "tyro"}
    assert names <= allowed | set(sys.stdlib_module_names)


def test_public_functions_have_docstrings():
    for module in (dna, dna_guidance, dna_extras):
        for node in ast.parse(pathlib.Path(module.__file__).read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "Args":
                assert ast.get_docstring(node), node.name


# ------------------------------------------------ the noising process ------------------------------------------------
@given(st.floats(1e-3, 1.0))
@settings(deadline=None, max_examples=50)
def test_the_rate_of_the_noise_over_expm1_of_it_is_one_over_t(t):
    def sigma(t):
        return -jnp.log1p(-dna.mask_chance(t))

    with jax.enable_x64(True):
        rate = jax.grad(sigma)(jnp.float64(t)) / jnp.expm1(sigma(jnp.float64(t)))
    assert rate == pytest.approx(1 / t, rel=1e-9)


def uniform_logits(x):
    return jnp.zeros((*x.shape, 4))


def test_a_uniform_model_has_the_same_loss_at_every_time():
    """200 log 4 nats in expectation; of 64 times the stride is 41, the first from 0.618 * 64 on that is prime to 64."""
    tokens, losses, times = jnp.zeros((64, 200), jnp.uint8), [], []
    for seed in range(200):
        key = jax.random.key(seed)
        losses.append(dna.denoising_loss(uniform_logits, key, tokens))
        times.append((jax.random.uniform(jax.random.split(key)[0]) + jnp.arange(64) * 41 % 64 / 64) % 1)
    losses, times = np.concatenate(losses), np.concatenate(times)
    for low in np.arange(0.05, 1, 0.19):  # below 0.05 the weight 1/t makes the mean too noisy to test
        part = losses[(times >= low) & (times < low + 0.19)]
        assert part.mean() == pytest.approx(200 * math.log(4), abs=4 * float(part.std()) / len(part) ** 0.5)


def test_the_loss_counts_masked_tokens_alone():
    """A model that knows every visible token's letter wrong, and masked ones right, has no loss."""
    tokens = jax.random.randint(jax.random.key(0), (32, 50), 0, 4).astype(jnp.uint8)

    def logits_of(x):
        wrong = jax.nn.one_hot((tokens + 1) % 4, 4)
        return 50 * jnp.where((x == dna.MASK)[..., None], jax.nn.one_hot(tokens, 4), wrong)

    assert np.max(np.abs(dna.denoising_loss(logits_of, jax.random.key(1), tokens))) < 1e-4
    assert np.min(dna.denoising_loss(lambda x: -logits_of(x), jax.random.key(1), tokens)) >= 0
    assert np.mean(dna.denoising_loss(lambda x: -logits_of(x), jax.random.key(1), tokens)) > 100


# ---------------------------------------------------- the sampler ----------------------------------------------------
def test_unmasked_tokens_are_carried_over_and_no_mask_is_left():
    """The denoiser notes what it is shown: the final sequence must agree with every token ever shown."""
    seen = []

    def logits_of(x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x, ordered=True)
        return jax.random.normal(jax.random.key(3), (*x.shape, 4))

    x = np.asarray(dna.sample_sequences(logits_of, jax.random.key(0), 32, 7, 60))
    jax.effects_barrier()
    assert x.dtype == np.uint8 and x.max() <= 3
    assert len(seen) == 8 and (seen[0] == dna.MASK).all()
    shares = [np.mean(state == dna.MASK) for state in seen]
    np.testing.assert_allclose(shares, 1 - np.arange(8) / 7, atol=0.03)  # a seventh of them each step
    for state in seen:
        assert (x == state)[state != dna.MASK].all()


def test_the_sampler_draws_from_a_product_distribution_given_its_exact_denoiser():
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=12).astype(np.float32)  # (L, 4)

    def logits_of(x):
        return jnp.broadcast_to(jnp.log(p), (*x.shape, 4))

    x = np.asarray(dna.sample_sequences(logits_of, jax.random.key(0), 20_000, 10, 12))
    shares = (x[..., None] == range(4)).mean(0)
    assert np.max(np.abs(shares - p)) < 4 * 0.5 / 20_000**0.5
    assert np.max(np.abs(np.corrcoef(x.T) - np.eye(12))) < 0.04  # and independently


def test_the_sampler_finds_dependence_between_letters():
    """x_1 = x_0, x_0 uniform: the exact denoiser tells the second letter once the first is known."""

    def logits_of(x):
        other = x[:, ::-1]
        return jnp.where((other == dna.MASK)[..., None], 0.0, 50.0 * jax.nn.one_hot(other, 4))

    x = np.asarray(dna.sample_sequences(logits_of, jax.random.key(0), 4000, 50, 2))
    together = 1 / 50  # both masks lifted in one step: then three in four differ
    assert np.mean(x[:, 0] == x[:, 1]) == pytest.approx(1 - 0.75 * together, abs=0.01)


# ---------------------------------------------------- the weights ----------------------------------------------------
@pytest.mark.parametrize(("ell", "mean"), [(0, 0.399), (-0.05, 0.374), (-0.1, 0.351), (-0.3, 0.267), (-0.5, 0.198)])
def test_expected_weights_of_normal_rewards(ell, mean):
    z = jax.random.normal(jax.random.key(0), (1, 1_000_000))
    weights = dna.zscore_weights(z, "neg", ell, 0.1)
    assert np.mean(weights) == pytest.approx(mean, abs=1.5e-3)
    assert np.min(weights) == pytest.approx(ell, abs=1e-6) and np.max(weights) == pytest.approx(3.0)


def test_weights_of_a_group_by_hand():
    r = jnp.array([[1.0, 2.0, 3.0, 10.0]])  # mean 4, variance 12.5
    z = (np.array(r) - 4) / 12.5**0.5
    weights = partial(dna.zscore_weights, r, ell=-0.3, exp_temperature=0.5)
    np.testing.assert_allclose(weights("linear"), np.maximum(z, 0), atol=1e-6)
    np.testing.assert_allclose(weights("neg"), np.maximum(z, -0.3), atol=1e-6)
    np.testing.assert_allclose(weights("square"), np.maximum(z, 0) ** 2, rtol=1e-5, atol=1e-6)
    exp = np.exp((np.array(r) - 10) / 0.5)
    np.testing.assert_allclose(weights("exp"), exp / exp.sum(), rtol=1e-5)
    np.testing.assert_allclose(dna.zscore_weights(r[:, :2], "wd1", 0.0, 0.1), [[-0.46211716, 0.46211716]], rtol=1e-5)


rewards = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40).map(lambda r: jnp.array(r, jnp.float32))


@given(rewards)
@settings(deadline=None, max_examples=40)
def test_wd1_sums_to_zero(r):
    assert abs(np.sum(dna.zscore_weights(r, "wd1", 0.0, 0.1))) < 1e-5


@given(rewards, st.sampled_from(["linear", "square", "neg", "exp", "wd1"]))
@settings(deadline=None, max_examples=60)
def test_weights_rise_with_the_reward_and_stay_finite(r, weighting):
    weights = np.asarray(dna.zscore_weights(r, weighting, -0.3, 0.1))
    assert np.isfinite(weights).all()
    assert (np.diff(weights[np.argsort(r, stable=True)]) >= -1e-6).all()


@given(rewards, st.floats(0.05, 50), st.sampled_from(["linear", "square", "neg", "exp"]))
@settings(deadline=None, max_examples=60)
def test_simplex_weights_solve_the_equation_of_nu(r, temp, weighting):
    """They sum to one, and agree with a float64 root finder for nu."""
    weights = np.asarray(dna.simplex_weights(r, jnp.float32(temp), weighting, -0.3))
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    y, floor = np.float64(r) / temp, -0.3 / len(r) if weighting == "neg" else 0.0
    g = {"exp": np.exp, "square": lambda y: np.maximum(y, 0) ** 2}.get(weighting, lambda y: np.maximum(y, floor))
    low, high = y.max() - 2 - 100 * (weighting == "exp"), y.max() + 100 * (weighting == "exp")
    for _ in range(200):
        nu = (low + high) / 2
        low, high = (nu, high) if g(y - nu).sum() > 1 else (low, nu)
    np.testing.assert_allclose(weights, g(y - nu), atol=1e-4)


def test_appendix_f_drives_the_kl_to_its_budget():
    r, log_lambda = jax.random.normal(jax.random.key(0), (4, 32)), jnp.float32(0.0)
    optimizer = optax.adam(0.05)
    state = optimizer.init(log_lambda)
    for _ in range(300):
        weights = dna.simplex_weights(r, jnp.exp(log_lambda), "square", 0.0)
        updates, state = optimizer.update(jax.grad(dna.temperature_loss)(log_lambda, weights, 1.0), state)
        log_lambda += updates
    p = np.maximum(dna.simplex_weights(r, jnp.exp(log_lambda), "square", 0.0), 1e-6)
    p /= p.sum(-1, keepdims=True)
    assert np.log(32) + np.mean(np.sum(p * np.log(p), -1)) == pytest.approx(1.0, abs=0.02)


def test_the_loss_is_the_weighted_sum_over_each_group():
    """Against NumPy, with the weights and the losses of each sample."""
    args = dna.check_args(dna.Args(**TINY, weighting="neg"))
    model = dna.Denoiser(8, 2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 48), jnp.uint8))
    tokens = jax.random.randint(jax.random.key(1), (8, 48), 0, 4).astype(jnp.uint8)
    r, key = jax.random.normal(jax.random.key(2), (8,)), jax.random.key(3)
    batch = (tokens, r)
    loss, scalars = dna.finetuning_loss({"model": params, "log_lambda": jnp.zeros(())}, key, batch, model, args)
    copies = jnp.tile(tokens, (args.times_per_sample, 1))
    nats = np.asarray(dna.denoising_loss(partial(model.apply, params), key, copies)).reshape(-1, 2, 4).mean(0)
    groups = np.asarray(r).reshape(2, 4)
    z = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    assert float(loss) == pytest.approx((np.clip(z, -0.3, 3) * nats).sum(1).mean() / 48, rel=1e-4)
    assert float(scalars["weights/negative_share"]) == np.mean(z < 0)


# --------------------------------------------------- generated data --------------------------------------------------
@pytest.fixture(scope="module")
def data():
    return dna.generate_data(20_000, 200, 0)


def test_generated_activity_has_the_real_datas_quantiles(data):
    median, high, top = np.quantile(data.activity, [0.5, 0.99, 0.999])
    assert (median, high, top) == (
        pytest.approx(0.2, abs=0.1),
        pytest.approx(4.6, abs=0.4),
        pytest.approx(6.2, abs=0.5),
    )


def test_generated_background_depletes_cpg_as_the_genome(monkeypatch):
    """Without planted sites, many of which hold a CpG."""
    monkeypatch.setattr(dna, "plant", lambda rng, tokens, rows, k, near=None: np.zeros(len(rows), int))
    x = dna.generate_data(4000, 200, 0).tokens.astype(int)
    share = np.isin(x, (1, 2)).mean(1)
    for low, high in ((0, 0.45), (0.45, 1)):
        rows = x[(share >= low) & (share < high)]
        odds = np.mean((rows[:, :-1] == 1) & (rows[:, 1:] == 2)) / (np.mean(rows == 1) * np.mean(rows == 2))
        assert 0.15 < odds < 0.4  # 0.23 in the genome
    assert 0.38 < share.mean() < 0.55


def test_halves_are_of_whole_chromosomes(data):
    assert data.half.mean() == pytest.approx(0.5, abs=0.05)
    groups = np.repeat([f"chr{i}" for i in range(22)], 7)
    half = dna_extras.split_in_halves(groups)
    assert half.sum() == 77 and all(len(set(half[groups == group])) == 1 for group in groups)


def put(sequence, site, start):
    return sequence[:start] + site + sequence[start + len(site) :]


def activity_of(*sequences):
    return np.asarray(dna.true_activity(dna_extras.encode(list(sequences))))


NEUTRAL = "A" * 200
SITES = {
    "HNF1A": "GTTAATGATTAAC",
    "HNF4A": "GGGTCAAAGGTCA",
    "ETS": "ACCGGAAGT",
    "SNAI/ZEB": "CACCTG",
    "CEBPA": "ATTGCGCAAT",
}


def test_sites_are_found_on_both_strands_and_palindromes_once():
    reverse = SITES["ETS"].translate(str.maketrans("ACGT", "TGCA"))[::-1]
    tokens = dna_extras.encode(
        [put(NEUTRAL, SITES["ETS"], 50), put(NEUTRAL, reverse, 60), put(NEUTRAL, SITES["CEBPA"], 70)]
    )
    strength, is_reverse = map(np.asarray, dna.find_sites(tokens))
    ets, cebpa = dna.NAMES.index("ETS"), dna.NAMES.index("CEBPA")
    assert strength[0, 50, ets] == strength[1, 60, ets] == strength[2, 70, cebpa] == 1
    assert (is_reverse[0, 50, ets], is_reverse[1, 60, ets], is_reverse[2, 70, cebpa]) == (False, True, False)
    assert [(row == 1).sum() for row in strength] == [1, 1, 1]
    flawed = put(NEUTRAL, "ACCGGTAGT", 50)
    assert np.asarray(dna.find_sites(dna_extras.encode([flawed]))[0])[0, 50, ets] == np.float32(dna.WEAK_SITE)


def test_the_grammar_of_activity():
    one = put(NEUTRAL, SITES["HNF1A"], 94)
    far, near = put(one, SITES["HNF4A"], 10), put(one, SITES["HNF4A"], 70)
    other = put(one, SITES["HNF1A"], 10)
    sequences = {"none": NEUTRAL, "one": one, "far": far, "near": near, "twice": other}
    sequences |= {"repressed": put(near, SITES["SNAI/ZEB"], 150), "border": put(NEUTRAL, SITES["HNF1A"], 0)}
    values = dict(zip(sequences, activity_of(*sequences.values()), strict=True))
    assert values["none"] == pytest.approx(dna.SILENT, abs=1e-4)
    assert values["one"] > values["border"] > values["none"]  # position
    assert values["near"] > values["far"] + 0.1  # a pair within 35 bp
    assert values["near"] > values["repressed"]  # repression
    assert values["twice"] < values["far"]  # homotypic saturation: a site of another factor is worth more
    reverse = SITES["ETS"].translate(str.maketrans("ACGT", "TGCA"))[::-1]
    assert np.subtract(*activity_of(put(near, SITES["ETS"], 150), put(near, reverse, 150))) > 0  # orientation


@pytest.mark.slow
def test_the_best_designed_sequences_come_near_nine(data):
    rng = np.random.default_rng(0)
    x = data.tokens[np.argsort(-data.activity)[:8]].copy()
    value = np.asarray(dna.true_activity(x))
    for _ in range(500):
        y = x.copy()
        for i in range(8):
            dna.plant(rng, y, np.array([i]), int(rng.integers(10)))
        new = np.asarray(dna.true_activity(y))
        x[new > value], value = y[new > value], np.maximum(value, new)
    assert 8.7 < value.max() < 9.5


# ----------------------------------------------------- data files ----------------------------------------------------
def write_table(path, rows, header=("seq", "hepg2"), tab=False):
    lines = [("\t" if tab else ",").join(map(str, row)) for row in (header, *rows)]
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def random_rows(size, length=48, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (s, f"{y:.3f}")
        for s, y in zip(dna_extras.decode(rng.integers(0, 4, (size, length))), rng.normal(size=size), strict=True)
    ]


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.tsv", "data.tsv.gz"])
def test_data_files_of_each_format(tmp_path, name, capsys):
    rows = random_rows(300)
    path = write_table(tmp_path / name, [(s.lower(), y, "x") for s, y in rows], ("seq", "hepg2", "k562"), "tsv" in name)
    data = dna_extras.read_data(dna.Args(data_path=str(path), sequence_length=48))
    assert dna_extras.decode(data.tokens) == [s for s, _ in rows]
    np.testing.assert_allclose(data.activity, [float(y) for _, y in rows], atol=1e-6)
    assert capsys.readouterr().out == f"{path}: 300 sequences; all rows used\n"


def test_columns_are_flags_and_an_elements_rows_stay_in_one_half(tmp_path):
    rows = [(f"e{i // 2}", s, y) for i, (s, y) in enumerate(random_rows(400))]
    path = write_table(tmp_path / "data.tsv", rows, ("element", "dna", "log2"), True)
    flags = dict(sequence_column="dna", activity_column="log2", split_column="element", sequence_length=48)
    half = dna_extras.read_data(dna.Args(data_path=str(path), **flags)).half
    assert (half[::2] == half[1::2]).all() and half.sum() == 200


def test_without_a_split_column_both_strands_stay_in_one_half(tmp_path):
    rows = random_rows(300)
    rows += [(s.translate(str.maketrans("ACGT", "TGCA"))[::-1], y) for s, y in rows]
    half = dna_extras.read_data(dna.Args(data_path=str(write_table(tmp_path / "d.csv", rows)), sequence_length=48)).half
    assert (half[:300] == half[300:]).all() and 100 < half[:300].sum() < 200


def test_odd_rows_are_left_out_and_counted(tmp_path, capsys):
    rows = random_rows(300)
    odd = [("ACGT", "1"), ("N" * 48, "1"), (rows[0][0], "NA"), (rows[1][0], str(float(rows[1][1]) + 2)), ("", "1")]
    path = write_table(tmp_path / "d.csv", rows + odd)
    data = dna_extras.read_data(dna.Args(data_path=str(path), sequence_length=48))
    assert len(data.tokens) == 300 and data.activity[1] == pytest.approx(float(rows[1][1]) + 1, abs=1e-5)
    out = capsys.readouterr().out
    notes = "1 not 48 long (first: row 302)", "1 with N (first: row 303)", "2 without a value (first: row 304)"
    assert out.count("\n") == 1 and all(note in out for note in (*notes, "1 merged with an equal one (first: row 305)"))


BAD_ROWS = {
    "row 302 has 'X' in its sequence": ("ACGX" * 12, "1"),
    "row 302 has the activity 1.2.3": ("ACGT" * 12, "1.2.3"),
    "row 302 has the activity INF": ("ACGT" * 12, "inf"),
    "row 302 has the activity HIGH": ("ACGT" * 12, "high"),
    "row 302 does not have 2 fields": ("ACGT" * 12, "1", "2"),
    "row 302 does not have 2 fields ": ("ACGT" * 12,),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, message):
    path = write_table(tmp_path / "d.csv", [*random_rows(300), BAD_ROWS[message]])
    line = error_line(dna_extras.read_data, dna.Args(data_path=str(path), sequence_length=48))
    assert line.startswith(f"--data-path {path}: ") and message.strip() in line


def test_bad_files_end_in_one_line(tmp_path):
    def line(path, **flags):
        return error_line(dna_extras.read_data, dna.Args(data_path=str(path), sequence_length=48, **flags))

    assert "No such file" in line(tmp_path / "none.csv")
    assert "directory" in line(tmp_path)
    good = write_table(tmp_path / "good.csv", random_rows(300))
    assert "there is no column dna, only seq, hepg2" in line(good, sequence_column="dna")
    assert "there is no column chr" in line(good, split_column="chr")
    assert "of which 200" in line(write_table(tmp_path / "few.csv", random_rows(20)))
    (tmp_path / "empty.csv").write_text("")
    assert "no column seq" in line(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    assert "--data-path" in line(tmp_path / "bytes.csv")
    (tmp_path / "d.csv.gz").write_text("no gzip")
    assert "gzip" in line(tmp_path / "d.csv.gz")
    whole = write_table(tmp_path / "e.csv.gz", random_rows(300)).read_bytes()
    (tmp_path / "e.csv.gz").write_bytes(whole[:1000])
    assert "end" in line(tmp_path / "e.csv.gz")
    same = write_table(tmp_path / "s.csv", [(*row, "chr1") for row in random_rows(300)], ("seq", "hepg2", "chr"))
    assert "two different" in line(same, split_column="chr")


# ------------------------------------------------- DRAKES checkpoints ------------------------------------------------
def drakes_state(hidden=128, layers=20, seed=0):
    """A state dict of DRAKES' shapes (PyTorch's order) with random numbers."""
    rng, keys = np.random.default_rng(seed), {}
    shapes = {"linear.weight": (hidden, 5, 9), "linear.bias": (hidden,), "time_embedder.0.W": (hidden // 2,)}
    shapes |= {"time_embedder.1.weight": (hidden, hidden), "time_embedder.1.bias": (hidden,)}
    shapes |= {"final_conv.0.weight": (hidden, hidden, 1), "final_conv.0.bias": (hidden,)}
    shapes |= {"final_conv.2.weight": (5, hidden, 1), "final_conv.2.bias": (5,)}
    for i in range(layers):
        shapes |= {f"convs.{i}.weight": (hidden, hidden, 9), f"convs.{i}.bias": (hidden,)}
        shapes |= {f"time_layers.{i}.dense.weight": (hidden, hidden), f"time_layers.{i}.dense.bias": (hidden,)}
        shapes |= {f"norms.{i}.weight": (hidden,), f"norms.{i}.bias": (hidden,)}
    for key, shape in shapes.items():
        scale = 1 / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3
        keys[f"backbone.{key}"] = np.float32(rng.normal(size=shape) * scale + ("norms" in key and "weight" in key))
    return keys


def drakes_forward(state, x, dilations):
    """DRAKES' network in NumPy, in PyTorch's layout, at tokens x (B, L): logits (B, L, 5)."""

    def conv(h, name, dilation=1):  # h (B, C, L)
        weight, reach = state[f"{name}.weight"], (state[f"{name}.weight"].shape[2] - 1) // 2 * dilation
        h = np.pad(h, ((0, 0), (0, 0), (reach, reach)))
        length = h.shape[2] - 2 * reach
        parts = [
            np.einsum("oi,bil->bol", weight[:, :, k], h[:, :, k * dilation :][:, :, :length])
            for k in range(weight.shape[2])
        ]
        return sum(parts) + state[f"{name}.bias"][:, None]

    state = {key.removeprefix("backbone."): np.float64(value) for key, value in state.items()}
    half = len(state["time_embedder.0.W"])
    features = np.concatenate([np.sin(np.zeros(half)), np.cos(np.zeros(half))])  # sigma = 0
    time = np.maximum(state["time_embedder.1.weight"] @ features + state["time_embedder.1.bias"], 0)
    h = np.maximum(conv(np.eye(5)[x].transpose(0, 2, 1), "linear"), 0)
    for i, dilation in enumerate(dilations):
        y = h + (state[f"time_layers.{i}.dense.weight"] @ time + state[f"time_layers.{i}.dense.bias"])[:, None]
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        y = y * state[f"norms.{i}.weight"][:, None] + state[f"norms.{i}.bias"][:, None]
        h = h + np.maximum(conv(y, f"convs.{i}", dilation), 0)
    return conv(np.maximum(conv(h, "final_conv.0"), 0), "final_conv.2").transpose(0, 2, 1)


def test_a_drakes_state_dict_makes_a_round_trip():
    state = drakes_state()
    model, params = dna_extras.convert(state)
    assert (model.hidden_dim, model.num_layers) == (128, 20)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == sum(x.size for x in state.values()) == 3_326_661  # 3.33M
    back = {}
    for path, key in dna_extras.key_map(20).items():
        value = params["params"][path[0]] if len(path) == 1 else params["params"][path[0]][path[1]]
        back[key] = value.T[..., None] if "final_conv" in key and value.ndim == 2 else value.T
    assert back.keys() == state.keys() and all(np.array_equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(("hidden", "layers"), [(16, 5), pytest.param(128, 20, marks=pytest.mark.slow)])
def test_a_drakes_network_computes_what_a_numpy_reference_does(hidden, layers):
    state, x = drakes_state(hidden, layers), np.random.default_rng(1).integers(0, 5, (2, 200))
    model, params = dna_extras.convert(state)
    dilations = np.repeat([1, 4, 16, 64], [2 * layers // 5, *[layers // 5] * 3])
    expected = drakes_forward(state, x, dilations)[..., :4]
    np.testing.assert_allclose(model.apply(params, x), expected, atol=2e-4 * np.abs(expected).max())


def test_a_drakes_state_dict_that_does_not_fit_is_refused():
    state = drakes_state(8, 2)
    for change, message in [
        ({"backbone.norms.1.bias": None}, "backbone.norms.1.bias is missing"),
        ({"backbone.convs.0.weight": np.zeros((8, 8, 7))}, "backbone.convs.0.weight has the shape"),
        ({"backbone.linear.bias": None}, "no keys"),
    ]:
        changed = {key: value for key, value in (state | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            dna_extras.convert(changed)


def test_drakes_files(tmp_path):
    args = dna.Args(denoiser_checkpoint=str(tmp_path / "drakes.ckpt"))
    torch = pytest.importorskip("torch")
    state = drakes_state(8, 2)
    torch.save({"state_dict": {key: torch.tensor(value) for key, value in state.items()}}, tmp_path / "drakes.ckpt")
    model, params = dna_extras.load_drakes(args)
    expected = dna_extras.convert(state)[1]
    assert model.num_layers == 2 and jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    (tmp_path / "drakes.ckpt").write_bytes(b"damaged")
    assert "--denoiser-checkpoint" in error_line(dna_extras.load_drakes, args)


def test_drakes_needs_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "[torch]" in error_line(dna_extras.load_drakes, dna.Args(denoiser_checkpoint="x.ckpt"))


# ------------------------------------------------------ metrics ------------------------------------------------------
def make_setup(**flags):
    args = dna.check_args(dna.Args(**(TINY | flags)))
    data = dna.generate_data(args.data_size, args.sequence_length, 0)
    model, oracles = dna.Denoiser(8, 2), []
    for seed, width in enumerate((4, 6)):
        params = dna.Oracle(width).init(jax.random.key(seed), jnp.zeros((1, args.sequence_length, 4)))
        oracles.append({"params": params, "mean": jnp.float32(0.5), "std": jnp.float32(2.0)})
    params = model.init(jax.random.key(2), jnp.zeros((1, args.sequence_length), jnp.uint8))
    return dna.Setup(data, model, params, *oracles, partial(dna.predict, oracles[0])), args


def test_metrics_against_plain_loops():
    setup, args = make_setup()
    tokens = setup.data.tokens[:12].copy()
    tokens[1] = tokens[0]
    metrics = dna.compute_metrics(tokens, setup, args)
    pairs = [np.mean(a != b) * 48 for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    assert metrics["hamming_distance"] == pytest.approx(np.mean(pairs))
    assert metrics["unique_fraction"] == pytest.approx(11 / 12)
    text = dna_extras.decode(tokens)
    assert metrics["gc"] == pytest.approx(sum(s.count("G") + s.count("C") for s in text) / 12 / 48)
    top = dna_extras.decode(setup.data.tokens[np.argsort(-setup.data.activity)[:10]])
    kmers = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    counts = [[sum(s[i : i + 3] == k for s in part for i in range(46)) for k in kmers] for part in (text, top)]
    assert metrics["kmer_pearson"] == pytest.approx(np.corrcoef(counts)[0, 1], abs=1e-6)
    assert metrics["true_activity"] == pytest.approx(np.median(dna.true_activity(tokens)))
    assert metrics["pred_activity"] == pytest.approx(np.median(dna.predict(setup.judge, tokens)), abs=1e-5)
    assert "true_activity" not in dna.compute_metrics(tokens, setup, replace(args, data_path="x.csv"))


def test_log_likelihood_of_the_uniform_model():
    model = dna.Denoiser(8, 2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 48), jnp.uint8))
    params["params"]["head_1"] = jax.tree.map(jnp.zeros_like, params["params"]["head_1"])
    values = [dna.log_likelihood(params, jax.random.key(i), jnp.zeros((256, 48), jnp.uint8), model) for i in range(4)]
    assert np.mean(values) == pytest.approx(-48 * math.log(4), rel=0.02)


def test_the_mask_has_no_logit_and_oracles_take_tokens_and_letters():
    setup, _ = make_setup()
    x = jnp.full((2, 48), dna.MASK)
    assert setup.model.apply(setup.pretrained, x).shape == (2, 48, 4)
    tokens = jnp.asarray(setup.data.tokens[:3])
    assert np.array_equal(dna.predict(setup.oracle, tokens), dna.predict(setup.oracle, jax.nn.one_hot(tokens, 4)))


# ------------------------------------------------------ learning -----------------------------------------------------
def test_fine_tuning_raises_a_simple_reward(tmp_path):
    """Reward: the share of A. Forty updates raise it far above a quarter."""
    setup, args = make_setup(num_updates=40, learning_rate=1e-2, group_size=16, checkpoint_frequency=0)
    setup = setup._replace(reward=jax.jit(lambda tokens: (tokens == 0).mean(-1) * 10))
    before = (dna.draw(setup.pretrained, setup, args) == 0).mean()
    for weighting in ("exp", "neg"):
        (folder := tmp_path / weighting).mkdir()
        params = dna.finetune(setup, folder, replace(args, weighting=weighting))
        assert (dna.draw(params, setup, args) == 0).mean() > before + 0.25


def test_simplex_weights_learn_too_and_the_temperature_moves(tmp_path):
    setup, args = make_setup(
        num_updates=40, learning_rate=1e-2, group_size=16, normalizer="simplex", weighting="square"
    )
    setup = setup._replace(reward=jax.jit(lambda tokens: (tokens == 0).mean(-1) * 10))
    before = (dna.draw(setup.pretrained, setup, args) == 0).mean()
    params = dna.finetune(setup, tmp_path, args)
    assert (dna.draw(params, setup, args) == 0).mean() > before + 0.25
    scalars = read_scalars(tmp_path)
    assert scalars["charts/temperature"][-1] < 0.9 and scalars["weights/mean"][-1] == pytest.approx(1 / 16, abs=1e-5)


def test_divergence_ends_in_one_line_that_names_the_last_good_checkpoint(tmp_path):
    setup, args = make_setup(learning_rate=1e30, num_updates=9, checkpoint_frequency=1)
    message = error_line(dna.finetune, setup, tmp_path, args)
    assert re.search(r"finetuning diverged at update \d+: .*not finite; last checkpoint in .*: (\d|none)", message)


# ----------------------------------------------------- whole runs ----------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the script by the command line, with its folder."""
    cwd = tmp_path_factory.mktemp("dna")
    done = run_script(*FLAGS, "--checkpoint-frequency", 2, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, next((cwd / "runs").glob("neg__dna_finetune__1__*")), done


def test_a_run_writes_what_it_promises(finished):
    _, run, done = finished
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["pretrained", "finetuned"]
    names = ["pred_activity", "train_oracle_activity", "true_activity", "kmer_pearson", "motif_correlation"]
    names += ["log_likelihood", "unique_fraction", "hamming_distance", "gc"]
    assert list(metrics["pretrained"]) == list(metrics["finetuned"]) == names
    assert all(math.isfinite(value) for part in metrics.values() for value in part.values())
    assert all(name in done.stdout for name in names)
    fasta = (run / "samples.fasta").read_text().splitlines()
    assert len(fasta) == 32 and all(re.fullmatch(r"[ACGT]{48}", line) for line in fasta[1::2])
    assert {path.name for path in run.glob("*.png")} == {"activities.png", "learning.png", "motifs.png"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]
    assert re.search(r"finetuning: 100%.* 4/4 \[.*<00:00, .*reward -?\d+\.\d\d\]", done.stderr)
    scalars = read_scalars(run)
    assert len(scalars["charts/reward"]) == 4
    assert {"weights/min", "weights/mean", "weights/max", "weights/negative_share"} <= set(scalars)


def test_the_file_alone_trains_and_says_that_there_are_no_pictures(finished, tmp_path):
    cwd, _, _ = finished
    script = shutil.copy(SCRIPT, tmp_path)
    flags = [*FLAGS, "--num-updates", 1, "--cache-path", cwd / "runs" / "cache"]
    done = run_script(*flags, cwd=tmp_path, script=script, env={"PYTHONPATH": ""})
    assert done.returncode == 0 and "no pictures: they need baselines/dna_extras.py" in done.stdout
    run = next((tmp_path / "runs").glob("neg__*"))
    assert {"metrics.json", "samples.fasta"} <= {path.name for path in run.iterdir()} and not list(run.glob("*.png"))
    done = run_script("--reward", "a:b", cwd=tmp_path, script=script, env={"PYTHONPATH": ""})
    assert done.returncode == 1 and "need baselines/dna_extras.py" in done.stderr and done.stderr.count("\n") == 1


def test_the_second_run_takes_model_and_oracles_from_the_cache(finished):
    cwd, first, _ = finished
    done = run_script(*FLAGS, "--weighting", "linear", "--num-updates", 1, cwd=cwd)
    assert done.returncode == 0 and "pretraining" not in done.stderr and "oracle" not in done.stderr
    run = next((cwd / "runs").glob("linear__*"))
    same = [json.loads((path / "metrics.json").read_text())["pretrained"] for path in (first, run)]
    assert same[0] == same[1]


def test_a_resumed_run_ends_as_if_it_had_never_stopped(finished, tmp_path):
    """SIGTERM after an update: a checkpoint and exit 143; --resume ends with the same samples and metrics, bitwise."""
    cwd, run, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(cwd / "runs" / "cache")
    (tmp_path / "slow_reward.py").write_text(
        "import time, pathlib\ndef reward(sequences):\n    pathlib.Path('called').touch(); time.sleep(0.5)\n"
        "    return [s.count('A') for s in sequences]\n"
    )
    flags = [*FLAGS, "--checkpoint-frequency", "3", "--reward", "slow_reward:reward"]
    whole = run_script(*flags, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    first = next((tmp_path / "runs").glob("neg__*"))
    first.rename(tmp_path / "whole")
    (tmp_path / "called").unlink()
    command, env = [sys.executable, str(SCRIPT), *flags], os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "called").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    stopped = next((tmp_path / "runs").glob("neg__*"))
    kept = [int(path.name) for path in (stopped / "checkpoints").iterdir()]
    assert kept and max(kept) < 4 and "Traceback" not in errors
    resumed = run_script("--resume", f"runs/{stopped.name}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("metrics.json", "samples.fasta"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_scalars(stopped) == read_scalars(tmp_path / "whole")


def test_what_cannot_be_resumed_ends_in_one_line(finished, tmp_path):
    cwd, run, _ = finished

    def line(*flags):
        done = run_script(*flags, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "No such file" in line("--resume", "runs/none")
    assert "keeps its own flags" in line("--resume", run, "--seed", 3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "args.json").write_text(json.dumps({"script": "dna_guidance"}))
    assert "must be a run of dna_finetune.py" in line("--resume", other)
    (other / "args.json").write_text("{")
    assert "--resume" in line("--resume", other)
    with open(run / "lock0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing it" in line("--resume", run)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_resumes(small_disk, tmp_path):
    setup, args = make_setup(num_updates=6, checkpoint_frequency=2)
    whole = dna.finetune(setup, tmp_path / "whole", args)
    plain, calls = setup.reward, []

    def fill_then_value(tokens):
        calls.append(len(calls))
        if len(calls) == 4:
            with open(small_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(512))
        return plain(tokens)

    run = small_disk / "run"
    run.mkdir()
    message = error_line(dna.finetune, setup._replace(reward=fill_then_value), run, args)
    assert re.match(r"finetuning stopped at update 4: .*(No space left|RESOURCE_EXHAUSTED)", message)
    (small_disk / "other").unlink()
    resumed = dna.finetune(setup, run, args)
    assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True))
    assert read_scalars(run) == read_scalars(tmp_path / "whole")


def test_a_damaged_checkpoint_ends_in_one_line(tmp_path):
    setup, args = make_setup(num_updates=2, checkpoint_frequency=2)
    dna.finetune(setup, tmp_path, args)
    for path in sorted(
        (tmp_path / "checkpoints" / "2").rglob("*"), key=lambda path: -path.stat().st_size * path.is_file()
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        break
    message = error_line(dna.finetune, setup, tmp_path, replace(args, num_updates=4))
    assert message.startswith("--resume: checkpoint") and "checkpoints/2 is of no use" in message
    folder = tmp_path / "b"
    dna.finetune(setup, folder, args)
    other, other_args = make_setup(num_updates=4, checkpoint_frequency=2)
    other = other._replace(model=dna.Denoiser(16, 2))
    params = other.model.init(jax.random.key(2), jnp.zeros((1, 48), jnp.uint8))
    assert "is of no use" in error_line(dna.finetune, other._replace(pretrained=params), folder, other_args)


def test_a_sharded_run_equals_an_unsharded_one(finished, tmp_path):
    """Two forced host devices against one: the same samples, and metrics within float32's rounding."""
    cwd, run, _ = finished
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(cwd / "runs" / "cache")
    done = run_script(*FLAGS, cwd=tmp_path, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 x ")
    other = next((tmp_path / "runs").glob("neg__*"))
    tables = [read_scalars(path) for path in (run, other)]
    for name in tables[0]:
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=2e-3, atol=2e-3)


REFUSED = {
    "--ell must be finite and at most 0": ["--ell", "0.1"],
    "--num-updates must be a whole number, at least 1": ["--num-updates", "0"],
    "--group-size must be a whole number, at least 2": ["--group-size", "1"],
    "--learning-rate must be a finite number above 0": ["--learning-rate", "nan"],
    "--hidden-dim must be an even number": ["--hidden-dim", "9"],
    "--sequence-length must be at least 40": ["--sequence-length", "20"],
    "--target-kl must be below log(group_size)": ["--normalizer", "simplex", "--target-kl", "9"],
    "--weighting must be one with a positive sum": ["--weighting", "wd1", "--normalizer", "simplex"],
    "--data-size must be at least 1000": ["--data-size", "10"],
    "--exp-name must be a name without slashes": ["--exp-name", "a/b"],
    "--pretrain-warmup must be a whole number, at least 0": ["--pretrain-warmup", "-1"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_flags_out_of_range_end_in_one_line(message):
    import tyro

    args = tyro.cli(dna.Args, args=REFUSED[message])
    assert message in error_line(dna.check_args, args)


def test_defaults_and_the_papers_sizes_are_in_range():
    assert dna.check_args(dna.Args()) and dna.check_args(dna.Args(**dna.PAPER))
    paper = dna.Args(**dna.PAPER)
    assert (paper.hidden_dim, paper.num_layers, paper.sample_steps, paper.num_updates) == (128, 20, 128, 500)
    assert (paper.num_groups, paper.group_size, paper.learning_rate, paper.grad_clip) == (4, 128, 1e-4, 10)
    shapes = jax.eval_shape(dna.Denoiser(128, 20).init, jax.random.key(0), jnp.zeros((1, 200), int))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 3_326_661


def test_rewards_are_plugged_in_by_name_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def gc(sequences):\n    return [s.count('G') + s.count('C') for s in sequences]\n"
        "def short(sequences):\n    return [1.0]\n\ndef nan(sequences):\n    return [float('nan')] * len(sequences)\n"
    )
    tokens = dna_extras.encode(["ACGT", "GGGC"])
    np.testing.assert_array_equal(dna_extras.load_reward("my_rewards:gc")(tokens), [2, 4])
    assert "finite numbers" in error_line(dna_extras.load_reward("my_rewards:short"), tokens)
    assert "finite numbers" in error_line(dna_extras.load_reward("my_rewards:nan"), tokens)
    for name in ("my_rewards", "my_rewards:none", "no_such_module:f"):
        assert f"--reward {name} must be module:function" in error_line(dna_extras.load_reward, name)


# ----------------------------------------------------- baselines -----------------------------------------------------
def guidance_setup(**flags):
    setup, args = make_setup()
    return setup, dna_guidance.Args(**(TINY | flags))


def value_of(setup, tokens):
    return float(np.mean(dna.predict(setup.oracle, jnp.asarray(tokens))))


@pytest.mark.parametrize("method", ["cg", "smc", "tds", "best_of_n"])
def test_guidance_raises_the_oracles_value(method, tmp_path):
    setup, args = guidance_setup(
        method=method, eval_samples=128, group_size=32, sample_steps=12, alpha=0.02, guidance_scale=20.0
    )
    before = dna.draw(setup.pretrained, setup, args)
    after = dna_guidance.sample_method(setup, tmp_path, args)
    assert after.shape == before.shape and after.max() <= 3
    spread = float(np.std(dna.predict(setup.oracle, jnp.asarray(before))))
    assert value_of(setup, after) > value_of(setup, before) + 0.5 * spread


def test_smc_without_a_reward_is_the_pretrained_sampler():
    """With a constant oracle, smc and tds must leave the distribution alone: letter shares agree."""
    setup, args = guidance_setup(group_size=256, sample_steps=12, method="tds")
    params = jax.tree.map(jnp.zeros_like, setup.oracle["params"])
    setup = setup._replace(oracle=setup.oracle | {"params": params})
    plain = np.concatenate([dna.sample_model(setup.pretrained, jax.random.key(i), setup.model, args) for i in range(4)])
    for method in ("smc", "tds", "cg"):
        guided = dna_guidance.guided_sample(jax.random.key(9), setup, replace(args, method=method))
        shares = [np.bincount(np.ravel(x), minlength=4) / np.size(x) for x in (plain, guided)]
        np.testing.assert_allclose(shares[0], shares[1], atol=0.02)


def test_drakes_raises_the_reward_and_its_kl_term_holds_it_back(tmp_path):
    ends = {}
    for weight in (0.0, 10.0):
        setup, args = guidance_setup(
            method="drakes", kl_weight=weight, num_updates=30, learning_rate=1e-2, checkpoint_frequency=0
        )
        (folder := tmp_path / str(weight)).mkdir()
        before = value_of(setup, dna.draw(setup.pretrained, setup, args))
        ends[weight] = value_of(setup, dna.draw(dna_guidance.drakes(setup, folder, args), setup, args)) - before
    assert ends[0.0] > 0.05 and ends[0.0] > 2 * abs(ends[10.0])


def test_baselines_run_as_a_program(finished):
    cwd, _, _ = finished
    script = ROOT / "baselines" / "dna_guidance.py"
    done = run_script(*FLAGS, "--method", "cg", cwd=cwd, script=script)
    assert done.returncode == 0, done.stderr
    run = next((cwd / "runs").glob("cg__dna_guidance__1__*"))
    assert list(json.loads((run / "metrics.json").read_text())) == ["pretrained", "finetuned"]
    done = run_script("--method", "tds", "--reward", "a:b", cwd=cwd, script=script)
    assert done.returncode == 1 and done.stderr.startswith("--reward") and done.stderr.count("\n") == 1


# -------------------------------------------------------- slow -------------------------------------------------------
@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path):
    """jax.distributed over two processes of one device each writes one run with the metrics of a single process."""
    code = (
        "import sys, jax, dna_finetune as dna\n"
        "i = int(sys.argv[1])\n"
        "jax.distributed.initialize('localhost:12457', 2, i)\n"
        f"dna.main(dna.Args(cache_path=f'cache{{i}}', **{TINY!r}))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    kwargs = dict(cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(i)], **kwargs) for i in (0, 1)]
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.fixture(scope="module")
def defaults_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defaults")


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["exp", "linear", "square", "neg"])
def test_at_the_defaults_prediction_and_truth_rise(defaults_folder, weighting):
    """Out of the box: the predicted activity rises by 2 or more, the true one by 1, and the samples stay different."""
    done = run_script("--weighting", weighting, cwd=defaults_folder)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(next(defaults_folder.glob(f"runs/{weighting}__*/metrics.json")).read_text())
    rise = {name: value - metrics["pretrained"][name] for name, value in metrics["finetuned"].items()}
    print(done.stdout)
    assert rise["pred_activity"] >= 2 and rise["true_activity"] >= 1
    assert metrics["finetuned"]["unique_fraction"] > 0.5
