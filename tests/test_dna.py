"""dna_finetune.py: its process, sampler, weights, data files, runs and errors; and its baselines."""

import ast
import gzip
import importlib.util
import inspect
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dna_finetune as dna
import gempo_exp
import gempo_linear
import gempo_neg
import gempo_square
from baselines import convert_drakes, dna_guidance
from benchmark import plot_dna

# All tests share these sizes, and the oracles and the denoiser of `workplace`, since compiling takes
# most of their time.
TINY = dict(
    data_size=1000,
    sequence_length=48,
    hidden_dim=8,
    num_layers=1,
    pretrain_steps=3,
    pretrain_batch_size=16,
    oracle_dim=4,
    oracle_steps=3,
    num_updates=4,
    num_groups=2,
    group_size=32,
    sample_steps=8,
    learning_rate=1e-2,
    eval_samples=64,
)


WHOLE = dna.Args(**TINY, exp_name="whole", checkpoint_frequency=2, normalizer="simplex")


def error_line(function, *args, **kwargs):
    """The message with which a function exits; it must be one line."""
    with pytest.raises(SystemExit) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def read_scalars(folder):
    """The values of each TensorBoard tag in `folder`; their steps must be 1, 2, 3 and so on."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {}
    for name in events.Tags()["scalars"]:
        series = events.Scalars(name)
        assert [event.step for event in series] == list(range(1, len(series) + 1))
        scalars[name] = [event.value for event in series]
    return scalars


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without most of its optimizations: compiling takes half the time, and that is most of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a finished run, `whole`, and the cache that it has filled."""
    folder = tmp_path_factory.mktemp("dna")
    previous = os.getcwd()
    os.chdir(folder)
    try:
        dna.main(WHOLE)
    finally:
        os.chdir(previous)
    return folder


@pytest.fixture(scope="module")
def setup(workplace):
    """Generated data, and the networks after a few steps."""
    return dna.prepare(dna.Args(**TINY, cache_path=str(workplace / "runs" / "cache")))


# -------------------------------------------- the file --------------------------------------------
def test_the_script_imports_nothing_of_this_repository_but_the_pictures():
    nodes = list(ast.walk(ast.parse(inspect.getsource(dna))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    allowed = {"flax", "jax", "numpy", "optax", "scipy", "tensorboard", "tqdm", "tyro", "benchmark"}
    assert {name.split(".")[0] for name in names} <= allowed | set(sys.stdlib_module_names)
    pictures = inspect.getsource(plot_dna)
    assert "dna_finetune" not in re.findall(r"^\s*(?:import|from) (\S+)", pictures, re.MULTILINE)


@pytest.mark.parametrize("script", [gempo_exp, gempo_square, gempo_neg])
@pytest.mark.parametrize("name", ["solve_normalizer", "reweight"])
def test_the_simplex_normalizer_is_the_rl_scripts_word_for_word(script, name):
    weighting = script.__name__.removeprefix("gempo_")
    original = inspect.getsource(getattr(script, name))
    renamed = re.sub(r"\b(solve_normalizer|reweight)\(", rf"\1_{weighting}(", original)
    assert inspect.getsource(getattr(dna, f"{name}_{weighting}")) == renamed


@pytest.mark.parametrize("name", ["temperature_loss", "require", "one_line", "create_folder"])
def test_other_shared_functions_are_the_rl_scripts_word_for_word(name):
    assert inspect.getsource(getattr(dna, name)) == inspect.getsource(getattr(gempo_linear, name))


# --------------------------------------- the noising process --------------------------------------
@given(st.floats(1e-3, 1.0))
@settings(max_examples=30)
def test_the_rate_of_the_noise_over_expm1_of_it_is_one_over_t(t):
    def sigma(t):
        return -jnp.log1p(-dna.mask_chance(t))

    with jax.enable_x64(True):
        rate = jax.grad(sigma)(jnp.float64(t)) / jnp.expm1(sigma(jnp.float64(t)))
    assert rate == pytest.approx(1 / t, rel=1e-9)


def uniform_logits(x):
    return jnp.zeros((*x.shape, 4))


def test_a_uniform_model_has_the_same_loss_at_every_time(monkeypatch):
    """200 log 4 nats in expectation. The times are those that mask_chance is asked for."""
    times = []
    mask_chance = dna.mask_chance

    def recording(t):
        times.append(t)
        return mask_chance(t)

    monkeypatch.setattr(dna, "mask_chance", recording)
    tokens = jnp.zeros((3, 64, 200), jnp.uint8)

    @jax.jit
    def loss_and_times(key):
        loss = dna.denoising_loss(uniform_logits, tokens, key)
        return loss, times.pop()

    keys = jax.random.split(jax.random.key(0), 60)
    results = [loss_and_times(key) for key in keys]
    losses, times = (np.stack(values) for values in zip(*results, strict=True))
    for low in np.arange(0.05, 1, 0.19):  # below 0.05 the weight 1/t makes the mean too noisy
        part = losses[(times >= low) & (times < low + 0.19)]
        error = 4 * float(part.std()) / len(part) ** 0.5
        assert part.mean() == pytest.approx(200 * math.log(4), abs=error)
    parts = np.floor(times * 64).astype(int)  # stratified: one time in each 64th part of (0, 1)
    counts = np.apply_along_axis(np.bincount, -1, parts.reshape(-1, 64), minlength=64)
    assert np.mean(counts == 1) > 0.98  # but for times moved across a border by T_MIN
    assert times.min() >= dna.T_MIN == 1e-5 and times.max() < 1


def test_the_loss_counts_masked_tokens_alone():
    """A model that knows every visible letter wrong, and masked ones right, has no loss."""
    tokens = jax.random.randint(jax.random.key(0), (3, 64, 200), 0, 4).astype(jnp.uint8)

    def logits_of(x):
        right = jax.nn.one_hot(tokens, 4)
        wrong = jax.nn.one_hot((tokens + 1) % 4, 4)
        return 50 * jnp.where((x == dna.MASK)[..., None], right, wrong)

    def opposite(x):
        return -logits_of(x)

    key = jax.random.key(1)
    assert np.max(np.abs(dna.denoising_loss(logits_of, tokens, key))) < 1e-3
    assert np.min(dna.denoising_loss(opposite, tokens, key)) >= 0
    assert np.mean(dna.denoising_loss(opposite, tokens, key)) > 100


# ------------------------------------------- the sampler ------------------------------------------
def draw(logits_of, num_samples, num_steps, length):
    """dna.sample_sequences of a function instead of a Model."""
    sample = dna.sample_sequences.__wrapped__
    return np.asarray(sample(logits_of, jax.random.key(0), num_samples, num_steps, length))


def test_unmasked_tokens_are_carried_over_and_no_mask_is_left():
    """The denoiser notes what it is shown; the result must agree with every token ever shown."""
    seen = []

    def logits_of(x):
        jax.debug.callback(lambda x: seen.append(np.array(x)), x, ordered=True)
        return uniform_logits(x)

    x = draw(logits_of, 32, 7, 60)
    jax.effects_barrier()
    assert x.dtype == np.uint8 and x.max() <= 3
    assert len(seen) == 8 and (seen[0] == dna.MASK).all()
    shares = [np.mean(state == dna.MASK) for state in seen]
    np.testing.assert_allclose(shares, 1 - np.arange(8) / 7, atol=0.03)  # a seventh each step
    for state in seen:
        assert (x == state)[state != dna.MASK].all()


def test_the_sampler_draws_from_a_product_distribution_given_its_exact_denoiser():
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=12).astype(np.float32)  # (L, 4)

    def logits_of(x):
        return jnp.broadcast_to(jnp.log(p), (*x.shape, 4))

    x = draw(logits_of, 20_000, 10, 12)
    shares = (x[..., None] == range(4)).mean(0)
    assert np.max(np.abs(shares - p)) < 4 * 0.5 / 20_000**0.5
    assert np.max(np.abs(np.corrcoef(x.T) - np.eye(12))) < 0.04  # and independently


def test_the_sampler_finds_dependence_between_letters():
    """x_1 = x_0, x_0 uniform: the denoiser tells the second letter once the first is known."""

    def logits_of(x):
        other = x[:, ::-1]
        known = 50.0 * jax.nn.one_hot(other, 4)
        return jnp.where((other == dna.MASK)[..., None], 0.0, known)

    x = draw(logits_of, 4000, 50, 2)
    together = 1 / 50  # both masks lifted in one step: then three in four differ
    assert np.mean(x[:, 0] == x[:, 1]) == pytest.approx(1 - 0.75 * together, abs=0.01)


# ------------------------------------------- the weights ------------------------------------------
def weigh(rewards, temperature=1.0, **flags):
    return np.asarray(dna.compute_weights(jnp.asarray(rewards), temperature, dna.Args(**flags)))


@pytest.mark.parametrize(
    ("ell", "mean"), [(0, 0.399), (-0.05, 0.374), (-0.3, 0.267), (-0.5, 0.198)]
)
def test_expected_weights_of_normal_rewards(ell, mean):
    z = jax.random.normal(jax.random.key(0), (1, 1_000_000))
    weights = weigh(z, weighting="neg", ell=ell)
    assert weights.mean() == pytest.approx(mean, abs=1.5e-3)
    assert weights.min() == pytest.approx(ell, abs=1e-6) and weights.max() == pytest.approx(3.0)


def test_weights_of_a_group_by_hand():
    r = np.float32([[1.0, 2.0, 3.0, 10.0]])  # mean 4, variance 12.5
    z = (r - 4) / 12.5**0.5
    np.testing.assert_allclose(weigh(r, weighting="linear"), np.maximum(z, 0), atol=1e-6)
    np.testing.assert_allclose(weigh(r, weighting="neg"), np.maximum(z, -0.3), atol=1e-6)
    square = weigh(r, weighting="square")
    np.testing.assert_allclose(square, np.maximum(z, 0) ** 2, rtol=1e-5, atol=1e-6)
    exp = np.exp((r - 10) / 0.5)
    weights = weigh(r, weighting="exp", exp_temperature=0.5)
    np.testing.assert_allclose(weights, exp / exp.sum(), rtol=1e-5)
    wd1 = weigh(r[:, :2], weighting="wd1")  # of the rewards as they are, tanh(1/2)
    np.testing.assert_allclose(wd1, [[-0.46211716, 0.46211716]], rtol=1e-5)


def test_square_has_no_cap_and_linear_and_neg_are_clipped_at_three():
    r = np.zeros((1, 100), np.float32)
    r[0, 0] = 1.0  # z = sqrt(99)
    assert weigh(r, weighting="square").max() == pytest.approx(99, rel=1e-3)
    assert weigh(r, weighting="linear").max() == weigh(r, weighting="neg").max() == 3


def test_simplex_weights_sum_to_one_and_neg_is_linear_without_a_floor():
    r = jax.random.normal(jax.random.key(0), (4, 32))
    weights = {}
    for weighting in ("exp", "linear", "square", "neg"):
        flags = {"normalizer": "simplex", "weighting": weighting}
        weights[weighting] = weigh(r, 0.7, **flags)
        np.testing.assert_allclose(weights[weighting].sum(axis=1), 1, atol=1e-5)
    assert weights["neg"].min() == pytest.approx(-0.3 / 32)  # ell is a floor on n w
    without = weigh(r, 0.7, normalizer="simplex", weighting="neg", ell=0.0)
    np.testing.assert_array_equal(weights["linear"], without)
    np.testing.assert_allclose(weights["linear"], gempo_linear.reweight(r, 0.7), atol=1e-6)


def test_a_weighting_without_a_branch_is_an_error():
    for normalizer in ("zscore", "simplex"):
        with pytest.raises(ValueError, match="does not know other"):
            weigh([[1.0, 2.0]], normalizer=normalizer, weighting="other")


def test_the_loss_is_the_weighted_sum_over_each_group(setup):
    """Against NumPy, from the losses of each sample at each of four times."""
    args, key = WHOLE, jax.random.key(3)
    tokens = jax.random.randint(jax.random.key(1), (2, 32, 48), 0, 4).astype(jnp.uint8)
    weights = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    state = dna.create_state(args, setup.denoiser)
    _, metrics = dna.learn(state, tokens, weights, key, args)
    copies = jnp.tile(tokens, (args.times_per_sample, 1, 1, 1))
    nats = np.asarray(jax.jit(dna.denoising_loss)(setup.denoiser, copies, key)).mean(axis=0)
    expected = (weights * nats).sum(axis=1).mean() / 48
    assert float(metrics["losses/weighted_loss"]) == pytest.approx(expected, rel=1e-4)


# ----------------------------------------- generated data -----------------------------------------
@pytest.fixture(scope="module")
def data():
    return dna.generate_data(5_000, 200, 0)


def test_generated_data(data):
    """Quantiles near the real data's, half of the sequences for each oracle, varied GC."""
    median, high = np.quantile(data.activity, [0.5, 0.99])
    assert median == pytest.approx(0.1, abs=0.15) and high == pytest.approx(4.8, abs=0.4)
    assert data.is_eval_half.mean() == pytest.approx(0.5, abs=0.05)
    gc = np.isin(data.tokens, (1, 2)).mean(axis=1)
    assert 0.42 < gc.mean() < 0.5 and 0.07 < gc.std() < 0.13
    counts = dna.count_motifs(data.tokens) / len(data.tokens)
    assert (counts[dna.EFFECTS > 0] > 0.2).all() and 3.5 < counts.sum() < 5


def put(sequence, site, start):
    return sequence[:start] + site + sequence[start + len(site) :]


def reverse_complement(sequence):
    return sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1]


NEUTRAL = "A" * 200
ETS, HNF1A, REPRESSOR = "ACCGGAAGT", "GTTAATGATTAAC", "CACCTG"


def activity_of(*sequences):
    return np.asarray(dna.true_activity(dna.encode(sequences)))


def test_sites_are_found_on_both_strands_and_with_one_letter_wrong():
    flawed, twice_flawed = "ACCGGTAGT", "ACCGGTTGT"
    planted = [ETS, reverse_complement(ETS), "ATTGCGCAAT", flawed, twice_flawed]
    tokens = dna.encode([put(NEUTRAL, site, 50) for site in planted])
    strength = np.asarray(dna.find_sites(tokens))[:, 50]
    names = list(dna.MOTIFS)
    ets, cebpa = names.index("ETS"), names.index("CEBPA")
    np.testing.assert_allclose(strength[:, ets], [1, 1, 0, dna.WEAK_SITE, 0])
    assert strength[2, cebpa] == 1
    assert np.sum(np.asarray(dna.find_sites(tokens)) == 1) == 3
    at_the_end = dna.encode([put(NEUTRAL, ETS, 191), put(NEUTRAL, ETS[:8], 192)])
    strength = np.asarray(dna.find_sites(at_the_end))
    assert (strength == 1).sum(axis=(1, 2)).tolist() == [1, 0]
    assert strength[1, 192, ets] == 0  # not even a weak one, whose missing letter is beyond the end


def test_sites_do_not_depend_on_the_strand():
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, size=(2_000, 60)).astype(np.uint8)
    strengths = [
        np.sort(np.asarray(dna.find_sites(x)), axis=1) for x in (tokens, 3 - tokens[:, ::-1])
    ]
    np.testing.assert_array_equal(*strengths)


def test_the_true_activity_by_hand():
    def hill(x):
        return dna.SILENT + dna.RISE * x**dna.POWER / (
            dna.HALF_SATURATION**dna.POWER + x**dna.POWER
        )

    one = put(NEUTRAL, HNF1A, 90)
    both = put(one, ETS, 20)
    repressed = put(both, REPRESSOR, 150)
    twice = put(one, HNF1A, 20)
    bound = 1 - math.exp(-1.5)
    expected = [
        dna.SILENT,
        hill(1.7 * bound),
        hill((1.7 + 1.1) * bound),
        hill((1.7 + 1.1) * bound / (1 + 0.5 * bound)),
        hill(1.7 * (1 - math.exp(-3))),
    ]
    values = activity_of(NEUTRAL, one, both, repressed, twice)
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_the_best_designed_sequences_reach_nine():
    """A site of each activator, and once more as many as fit."""
    activators = [site for site, effect in dna.MOTIFS.values() if effect > 0]
    letters = [dna.IUPAC[letter][0] for letter in "".join(activators)]
    tokens = np.resize(letters, (1, 200))
    assert 8 < dna.true_activity(tokens)[0] < 9.1


# ------------------------------------------- data files -------------------------------------------
def write_table(path, rows, header=("seq", "hepg2")):
    delimiter = "\t" if ".tsv" in path.name else ","
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def random_rows(size, length=48):
    rng = np.random.default_rng(0)
    sequences = dna.decode(rng.integers(0, 4, (size, length)))
    return [(sequence, f"{rng.normal():.3f}") for sequence in sequences]


def read(path, **flags):
    return dna.read_data(dna.Args(data_path=str(path), sequence_length=48, **flags))


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.tsv", "data.tsv.gz"])
def test_data_files_of_each_format(tmp_path, name, capsys):
    rows = random_rows(300)
    lines = [(sequence.lower(), y, "x") for sequence, y in rows]
    path = write_table(tmp_path / name, lines, ("seq", "hepg2", "k562"))
    data = read(path)
    assert dna.decode(data.tokens) == [sequence for sequence, _ in rows]
    np.testing.assert_allclose(data.activity, [float(y) for _, y in rows], atol=1e-6)
    rule = "48 letters A, C, G or T, and a number as the activity"
    assert capsys.readouterr().out == f"{path}: 300 of 300 rows have {rule}\n"


def test_columns_are_flags_and_an_elements_rows_stay_in_one_half(tmp_path):
    rows = [(f"e{i // 2}", sequence, y) for i, (sequence, y) in enumerate(random_rows(400))]
    path = write_table(tmp_path / "data.tsv", rows, ("element", "dna", "log2"))
    flags = dict(sequence_column="dna", activity_column="log2", split_column="element")
    half = read(path, **flags).is_eval_half
    assert (half[::2] == half[1::2]).all() and half.sum() == 200


def test_without_a_split_column_both_strands_stay_in_one_half(tmp_path):
    rows = random_rows(300)
    rows += [(reverse_complement(sequence), y) for sequence, y in rows]
    half = read(write_table(tmp_path / "d.csv", rows)).is_eval_half
    assert (half[:300] == half[300:]).all() and 100 < half[:300].sum() < 200


def test_the_halves_are_drawn_and_not_every_other_name(tmp_path):
    rows = [(f"e{i:03}", sequence, y) for i, (sequence, y) in enumerate(random_rows(400))]
    path = write_table(tmp_path / "data.csv", rows, ("element", "seq", "hepg2"))
    half = read(path, split_column="element").is_eval_half
    changes = np.mean(half[1:] != half[:-1])
    assert half.sum() == 200 and 0.4 < changes < 0.6
    assert not (half == read(path, split_column="element", data_seed=1).is_eval_half).all()


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys):
    odd = [("ACGT", "1"), ("N" * 48, "1"), ("ACGT" * 12, "NA"), ("", "1")]
    odd += [("ACGT" * 12, "inf"), ("ACGT" * 12, "high"), ("ACGT" * 12,)]
    odd += [("ACGT" * 12, "1e39"), ("ACGT" * 12, "-1e39")]  # infinite as float32
    assert len(read(write_table(tmp_path / "d.csv", random_rows(300) + odd)).tokens) == 300
    assert "d.csv: 300 of 309 rows have 48 letters" in capsys.readouterr().out


def test_bad_files_end_in_one_line(tmp_path):
    def line(path, **flags):
        message = error_line(read, path, **flags)
        assert message.startswith(f"--data-path {path}: ")
        return message

    assert "No such file" in line(tmp_path / "none.csv")
    assert "directory" in line(tmp_path)
    good = write_table(tmp_path / "good.csv", random_rows(300))
    assert "no column 'dna', only ['seq', 'hepg2']" in line(good, sequence_column="dna")
    assert "no column 'chr'" in line(good, split_column="chr")
    assert "no column ''" in line(good, split_column="")
    assert "no column ''" in line(good, sequence_column="")
    assert "100 such rows in each half" in line(write_table(tmp_path / "few.csv", random_rows(20)))
    (tmp_path / "empty.csv").write_text("")
    assert "100 such rows in each half" in line(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(bytes(range(256)))
    line(tmp_path / "bytes.csv")
    (tmp_path / "d.csv.gz").write_text("no gzip")
    assert "gzip" in line(tmp_path / "d.csv.gz")
    whole = write_table(tmp_path / "e.csv.gz", random_rows(300)).read_bytes()
    (tmp_path / "e.csv.gz").write_bytes(whole[:1000])
    assert "end" in line(tmp_path / "e.csv.gz")
    rows = [(*row, "chr1") for row in random_rows(300)]
    same = write_table(tmp_path / "s.csv", rows, ("seq", "hepg2", "chr"))
    assert "its halves (groups: 1) have 300 and 0 rows" in line(same, split_column="chr")
    rows[0] = (*rows[0][:2], "chr2")
    lopsided = write_table(tmp_path / "l.csv", rows, ("seq", "hepg2", "chr"))
    assert re.search(
        r"\(groups: 2\) have (1 and 299|299 and 1) rows", line(lopsided, split_column="chr")
    )


# --------------------------------------- DRAKES checkpoints ---------------------------------------
def drakes_state(hidden=16, layers=5):
    """A state dict of DRAKES' shapes (PyTorch's order) with random numbers."""
    rng = np.random.default_rng(0)
    shapes = {"linear": (hidden, 5, 9), "time_embedder.1": (hidden, hidden)}
    shapes |= {"final_conv.0": (hidden, hidden, 1), "final_conv.2": (5, hidden, 1)}
    for i in range(layers):
        shapes |= {f"convs.{i}": (hidden, hidden, 9), f"norms.{i}": (hidden,)}
        shapes |= {f"time_layers.{i}.dense": (hidden, hidden)}
    state = {"backbone.time_embedder.0.W": rng.normal(size=hidden // 2)}
    for name, shape in shapes.items():
        scale = 1 / np.prod(shape[1:]) ** 0.5
        state[f"backbone.{name}.weight"] = rng.normal(size=shape) * scale + ("norms" in name)
        state[f"backbone.{name}.bias"] = 0.3 * rng.normal(size=shape[0])
    return {key: np.float32(value) for key, value in state.items()}


def drakes_forward(state, x, dilations):
    """DRAKES' network in NumPy, in PyTorch's layout, at tokens x (B, L): logits (B, L, 5)."""
    state = {key.removeprefix("backbone."): np.float64(value) for key, value in state.items()}

    def conv(h, name, dilation=1):  # h (B, C, L)
        weight = state[f"{name}.weight"]
        width, length = weight.shape[2], h.shape[2]
        reach = (width - 1) // 2 * dilation
        h = np.pad(h, ((0, 0), (0, 0), (reach, reach)))
        total = state[f"{name}.bias"][:, None]
        for k in range(width):
            part = h[:, :, k * dilation :][:, :, :length]
            total = total + np.einsum("oi,bil->bol", weight[:, :, k], part)
        return total

    def dense(h, name):
        return state[f"{name}.weight"] @ h + state[f"{name}.bias"]

    half = len(state["time_embedder.0.W"])
    features = np.concatenate([np.sin(np.zeros(half)), np.cos(np.zeros(half))])  # sigma = 0
    time = np.maximum(dense(features, "time_embedder.1"), 0)
    h = np.maximum(conv(np.eye(5)[x].transpose(0, 2, 1), "linear"), 0)
    for i, dilation in enumerate(dilations):
        y = h + dense(time, f"time_layers.{i}.dense")[:, None]
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        y = y * state[f"norms.{i}.weight"][:, None] + state[f"norms.{i}.bias"][:, None]
        h = h + np.maximum(conv(y, f"convs.{i}", dilation), 0)
    return conv(np.maximum(conv(h, "final_conv.0"), 0), "final_conv.2").transpose(0, 2, 1)


def test_a_converted_drakes_network_computes_what_a_numpy_reference_does(tmp_path):
    state = drakes_state()
    model = convert_drakes.convert(state)
    assert (model.network.hidden_dim, model.network.num_layers) == (16, 5)
    x = np.random.default_rng(1).integers(0, 5, (2, 200))
    expected = drakes_forward(state, x, [1, 1, 4, 16, 64])[..., :4]
    np.testing.assert_allclose(model(x), expected, atol=2e-4 * np.abs(expected).max())
    dna.write_pickle(tmp_path / "drakes.model", model.params)
    loaded = dna.load_denoiser(str(tmp_path / "drakes.model"))
    assert loaded.network == model.network
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, model.params))


def test_a_drakes_state_dict_that_does_not_fit_is_refused():
    for change, message in [
        ({"backbone.norms.1.bias": None}, "backbone.norms.1.bias is missing"),
        ({"backbone.convs.0.weight": np.zeros((16, 16, 7))}, "conv_0 has the shapes"),
        ({"backbone.linear.bias": None}, "backbone.linear.bias is missing"),
    ]:
        changed = drakes_state() | change
        changed = {key: value for key, value in changed.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert_drakes.convert(changed)


def test_drakes_files_become_denoisers_to_start_from(tmp_path, monkeypatch):
    args = convert_drakes.Args(tmp_path / "drakes.ckpt", tmp_path / "drakes.model")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "PyTorch" in error_line(convert_drakes.main, args)
    monkeypatch.delitem(sys.modules, "torch")
    torch = pytest.importorskip("torch")
    state = drakes_state()
    tensors = {key: torch.tensor(value) for key, value in state.items()}
    torch.save({"state_dict": tensors, "epoch": 1}, args.checkpoint)
    convert_drakes.main(args)
    loaded = dna.load_denoiser(str(args.output))
    same = jax.tree.map(np.array_equal, loaded.params, convert_drakes.convert(state).params)
    assert loaded.network.num_layers == 5 and jax.tree.all(same)
    args.checkpoint.write_bytes(b"damaged")
    assert "--trust" in error_line(convert_drakes.main, args)


# --------------------------------------------- metrics --------------------------------------------
def test_metrics_against_plain_loops(setup):
    args = dna.Args(**TINY)
    tokens = setup.data.tokens[:12].copy()
    tokens[1] = tokens[0]
    metrics = dna.compute_metrics(tokens, setup, args)
    pairs = [(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    assert metrics["hamming_distance"] == pytest.approx(np.mean([np.sum(a != b) for a, b in pairs]))
    assert metrics["unique_fraction"] == pytest.approx(11 / 12)
    text = dna.decode(tokens)
    gc = sum(sequence.count("G") + sequence.count("C") for sequence in text)
    assert metrics["gc"] == pytest.approx(gc / 12 / 48)
    top = dna.decode(setup.data.tokens[np.argsort(-setup.data.activity)[:10]])
    kmers = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    counts = []
    for part in (text, top):
        words = [sequence[i : i + 3] for sequence in part for i in range(46)]
        counts.append([words.count(kmer) for kmer in kmers])
    assert metrics["kmer_pearson"] == pytest.approx(np.corrcoef(counts)[0, 1], abs=1e-6)
    truth = np.median(dna.true_activity(tokens))
    assert metrics["true_activity"] == pytest.approx(truth)
    predicted = np.median(dna.predict(setup.eval_oracle, tokens))
    assert metrics["predicted_activity"] == pytest.approx(predicted, abs=1e-5)
    reward = np.median(dna.predict(setup.reward_oracle, tokens))
    assert metrics["reward"] == pytest.approx(reward, abs=1e-5)
    assert "true_activity" not in dna.compute_metrics(tokens, setup, replace(args, data_path="x"))


def test_correlations_of_constant_counts_are_zero():
    assert dna.correlate(np.ones(5), np.arange(5)) == 0
    assert dna.correlate(np.arange(5), 2 * np.arange(5)) == pytest.approx(1)


def test_log_likelihood_of_the_uniform_model(setup):
    denoiser = with_constant_logits(setup.denoiser, [0.0] * 5)
    tokens = jnp.zeros((128, 48), jnp.uint8)
    values = [dna.log_likelihood(denoiser, jax.random.key(i), tokens) for i in range(8)]
    assert np.mean(values) == pytest.approx(-48 * math.log(4), rel=0.03)


def test_networks_take_tokens_and_chances_of_letters(setup):
    compute = jax.jit(dna.Model.__call__)
    masks = jnp.full((2, 48), dna.MASK)
    logits = compute(setup.denoiser, masks)
    assert logits.shape == (2, 48, 4)  # the mask has no logit
    np.testing.assert_array_equal(logits, compute(setup.denoiser, jax.nn.one_hot(masks, 5)))
    tokens = jnp.asarray(setup.data.tokens[:3])
    activity = compute(setup.eval_oracle, tokens)
    np.testing.assert_array_equal(activity, compute(setup.eval_oracle, jax.nn.one_hot(tokens, 4)))


# -------------------------------------------- learning --------------------------------------------
class NoRun:
    """A run that keeps what is logged, in the place of a RunFolder."""

    def __init__(self):
        self.scalars = []

    def log(self, update, scalars):
        self.scalars.append({tag: float(value) for tag, value in scalars.items()})

    def save(self, state):
        pass


def share_of_a(tokens, setup):
    return 10 * np.mean(np.asarray(tokens) == 0, axis=-1)


FLAGS = {
    "exp": {},
    "neg": {"normalizer": "simplex", "ell": -0.1},
}


@pytest.mark.parametrize("weighting", FLAGS)
def test_fine_tuning_raises_a_simple_reward(weighting, setup, monkeypatch):
    """The reward, the share of A, may be any Python. simplex moves its lambda."""
    monkeypatch.setattr(dna, "compute_reward", share_of_a)
    flags = {"weighting": weighting, "num_updates": 25} | FLAGS[weighting]
    args = dna.Args(**(TINY | flags))
    run, state = NoRun(), dna.create_state(args, setup.denoiser)
    denoiser = dna.finetune(args, setup, state, run)
    before = np.mean(dna.draw_samples(setup.denoiser, args) == 0)
    assert np.mean(dna.draw_samples(denoiser, args) == 0) > before + 0.2
    assert run.scalars[-1].get("charts/lambda") != 1
    assert ("charts/lambda" in run.scalars[-1]) == (args.normalizer == "simplex")


def test_fit_learns_and_ends_in_one_line_if_it_diverges():
    """A linear network learns y = x_0 - 2 x_1 + 1."""
    x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)
    data = x, x @ np.float32([1, -2]) + 1
    network = nn.Dense(1)
    model = dna.Model(network.init(jax.random.key(0), x), network)

    def loss(model, batch, key):
        x, y = batch
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    settings = dna.FitSettings(num_steps=300, batch_size=64, lr=3e-2, seed=0)
    layer = dna.fit("line", model, loss, data, settings).params["params"]
    np.testing.assert_allclose(layer["kernel"][:, 0], [1, -2], atol=1e-3)
    np.testing.assert_allclose(layer["bias"], [1], atol=1e-3)
    data = data[0], data[1] * np.float32(math.nan)
    message = error_line(dna.fit, "line", model, loss, data, settings)
    assert message == "line diverged: its parameters are not finite, its loss is nan"


def test_a_model_that_diverges_in_the_last_update_is_not_kept():
    """The root of 0 is finite, but its gradient is not."""

    def loss(model, batch, key):
        return jnp.sqrt(model.params["bias"])

    model = dna.Model({"bias": jnp.zeros(())}, None)
    settings = dna.FitSettings(num_steps=1, batch_size=1, lr=1.0, seed=0, warmup=0, decay=False)
    message = error_line(dna.fit, "root", model, loss, np.zeros(1), settings)
    assert message.startswith("root diverged: ")


def test_schedules():
    schedule = dna.make_schedule(dna.FitSettings(100, 1, 1.0, 0, warmup=10, decay=False))
    assert [float(schedule(i)) for i in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    schedule = dna.make_schedule(dna.FitSettings(100, 1, 1.0, 0, warmup=0, decay=False))
    assert [float(schedule(i)) for i in (0, 99)] == [1, 1]  # DRAKES' first update is one, too
    schedule = dna.make_schedule(dna.FitSettings(100, 1, 1.0, 0, warmup=10))
    values = [float(schedule(i)) for i in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)


# ------------------------------------------- whole runs -------------------------------------------
@pytest.fixture
def inside(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


def find_run(folder, name):
    return next((folder / "runs").glob(f"*__{name}__1__*"))


METRICS = ["predicted_activity", "reward", "true_activity", "kmer_pearson", "motif_spearman"]
METRICS += ["log_likelihood_bound", "unique_fraction", "hamming_distance", "gc"]


def test_a_run_writes_what_it_promises(workplace):
    run = find_run(workplace, "whole")
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == ["pretrained", "finetuned"]
    for part in metrics.values():
        assert list(part) == METRICS and all(map(math.isfinite, part.values()))
    for name in metrics:
        lines = (run / f"{name}.fasta").read_text().splitlines()
        headers, sequences = lines[0::2], lines[1::2]
        assert len(headers) == 64
        assert all(re.fullmatch(r"[ACGT]{48}", sequence) for sequence in sequences)
        header = r">\d+ predicted_activity=\S+ true_activity=\S+ sites=\S*"
        assert all(re.fullmatch(header, line) for line in headers)
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures == {"activities.png", "learning.png", "motifs.png"}
    assert (run / "checkpoint").exists() and not list(run.glob("*.tmp"))
    scalars = read_scalars(run)
    assert len(scalars["charts/reward"]) == 4
    assert {"weights/min", "weights/max", "charts/true_activity"} <= set(scalars)
    assert json.loads((run / "args.json").read_text())["num_updates"] == 4


def test_the_next_run_takes_from_the_cache_what_it_can(inside, capsys):
    args = dna.Args(**TINY)
    first = dna.prepare(args)
    assert "it/s" not in capsys.readouterr().out  # no bar: nothing was trained
    second = dna.prepare(replace(args, pretrain_steps=2))
    out = capsys.readouterr().out
    assert "denoiser: 100%" in out and "oracle: 100%" not in out
    kernels = [setup.denoiser.params["params"]["conv_0"]["kernel"] for setup in (first, second)]
    assert not np.array_equal(*kernels)
    oracles = [setup.reward_oracle.params for setup in (first, second)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *oracles))


def import_copy(folder, monkeypatch, name):
    """dna_finetune.py, copied into `folder` and imported from there."""
    path = pathlib.Path(shutil.copy(ROOT / "dna_finetune.py", folder / f"{name}.py"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module, path


def test_an_edit_of_the_script_during_a_run_does_not_rename_what_it_caches(
    inside, monkeypatch, capsys
):
    module, path = import_copy(inside, monkeypatch, "edited")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + ["\n"] * 100 + lines[3:]))
    module.prepare(module.Args(**TINY))
    assert "it/s" not in capsys.readouterr().out  # all three are those of the run `whole`


def test_a_pasted_script_shares_no_cache(tmp_path, monkeypatch):
    def fail(part):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", fail)
    module, _ = import_copy(tmp_path, monkeypatch, "pasted")
    again, _ = import_copy(tmp_path, monkeypatch, "pasted")
    assert module.CACHED_SOURCE != again.CACHED_SOURCE != dna.CACHED_SOURCE


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dna.time, "time", lambda: 1_700_000_000.5)
    runs = [dna.RunFolder(WHOLE, "neg") for _ in range(3)]
    for run in runs:
        run.writer.close()
    names = [f"neg__whole__1__{1_700_000_000 + i}" for i in range(3)]
    assert [run.path.name for run in runs] == names


def test_a_saved_denoiser_starts_a_run(inside, monkeypatch):
    saved = find_run(inside, "whole") / "finetuned.model"
    args = dna.Args(**TINY, exp_name="second", weighting="linear", denoiser_path=str(saved))
    start = dna.prepare(args).denoiser
    assert (start.network.hidden_dim, start.network.num_layers) == (8, 1)
    assert dna.draw_samples(start, args).shape == (64, 48)
    cache = inside / "runs" / "cache"
    pretrained = dna.load_denoiser(str(next(cache.glob("denoiser*")))).params
    assert not jax.tree.all(jax.tree.map(np.array_equal, pretrained, start.params))
    for path in (find_run(inside, "whole") / "checkpoint", next(cache.glob("reward*"))):
        assert "no denoiser" in error_line(dna.load_denoiser, str(path))
    assert "No such file" in error_line(dna.load_denoiser, "none")
    for params in (None, {"conv_in": {"bias": np.zeros(4)}, "norm_0": {}}):
        dna.write_pickle(inside / "odd", {"params": params})
        assert "no denoiser" in error_line(dna.load_denoiser, str(inside / "odd"))
    monkeypatch.setattr(dna, "train_oracle", None)  # a bad file is noticed before any training
    for path in ("none", ""):
        error_line(dna.prepare, replace(args, denoiser_path=path))
    assert "directory" in error_line(dna.prepare, replace(args, denoiser_path=None, data_path=""))


def interrupt_after(monkeypatch, num_calls, error):
    """Let compute_reward raise `error` in the call after `num_calls`."""
    compute_reward, calls = dna.compute_reward, []

    def interrupted(tokens, setup):
        calls.append(0)
        if len(calls) > num_calls:
            raise error
        return compute_reward(tokens, setup)

    monkeypatch.setattr(dna, "compute_reward", interrupted)


def test_a_resumed_run_ends_as_if_it_had_never_stopped(inside, monkeypatch):
    """The same metrics, sequences and scalars, bitwise, the temperature's among them."""
    args = dna.Args(**TINY, exp_name="resumed", checkpoint_frequency=2, normalizer="simplex")
    interrupt_after(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        dna.main(args)
    monkeypatch.undo()
    monkeypatch.chdir(inside)
    run = find_run(inside, "resumed")
    _, leaves = dna.load_checkpoint(str(run))
    assert leaves[0] == 2
    dna.main(dna.Args(resume=str(run)))
    expected = find_run(inside, "whole")
    for file in ("metrics.json", "pretrained.fasta", "finetuned.fasta"):
        assert (run / file).read_bytes() == (expected / file).read_bytes()
    assert read_scalars(run) == read_scalars(expected)


def test_a_run_that_is_stopped_in_its_evaluation_goes_on_with_it(inside, monkeypatch):
    """With fewer updates than --checkpoint-frequency, too."""
    args = dna.Args(**TINY, exp_name="evaluated", normalizer="simplex")
    assert args.num_updates < args.checkpoint_frequency
    interrupt_after(monkeypatch, args.num_updates + 1, KeyboardInterrupt)  # one is a trial
    with pytest.raises(KeyboardInterrupt):
        dna.main(args)
    monkeypatch.undo()
    monkeypatch.chdir(inside)
    run = find_run(inside, "evaluated")
    assert (run / "finetuned.model").exists() and not (run / "metrics.json").exists()
    dna.main(dna.Args(resume=str(run)))
    expected = find_run(inside, "whole")
    assert (run / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()


def test_what_cannot_be_resumed_ends_in_one_line(inside):
    run = find_run(inside, "whole")

    def line(path, **flags):
        return error_line(dna.main, dna.Args(resume=str(path), **flags))

    assert "runs/none/checkpoint cannot be used: [Errno 2] No such file" in line("runs/none")
    assert "--resume must be the only flag" in line(run, seed=3)
    assert "checkpoint cannot be used: [Errno 2] No such file" in line("")
    copy = inside / "copy"
    copy.mkdir()
    (copy / "checkpoint").write_bytes((run / "checkpoint").read_bytes()[:-100])
    assert "checkpoint cannot be used" in line(copy)
    dna.write_pickle(copy / "checkpoint", {"args": {"flag_of_another_version": 1}, "leaves": []})
    assert "checkpoint is no checkpoint of this script: " in line(copy)
    content = dna.read_pickle(run / "checkpoint")
    dna.write_pickle(copy / "checkpoint", content | {"leaves": content["leaves"][:-1]})
    assert "checkpoint cannot be used: it is of another denoiser" in line(copy)
    runs = sorted((inside / "runs").iterdir())
    assert "nowhere.csv" in error_line(dna.main, dna.Args(**TINY, data_path="nowhere.csv"))
    assert sorted((inside / "runs").iterdir()) == runs  # no empty folder is left


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    dna.write_pickle(path, {"update": 2})

    def fail(number):
        raise OSError("No space left on device")

    monkeypatch.setattr(dna.os, "fsync", fail)
    with pytest.raises(OSError):
        dna.write_pickle(path, {"update": 4})
    assert dna.read_pickle(path) == {"update": 2}
    assert list(tmp_path.iterdir()) == [path]  # what was half written is gone


@pytest.mark.parametrize("script", ["dna_finetune.py", "baselines/dna_guidance.py"])
def test_a_folder_that_cannot_be_written_ends_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file in the place of the folder")
    monkeypatch.setattr(sys, "argv", [script])
    message = error_line(runpy.run_path, str(ROOT / script), run_name="__main__")
    assert "File exists: 'runs'" in message


def test_divergence_ends_in_one_line(inside, monkeypatch):
    learn, calls = dna.learn, []

    def diverging(*args):
        calls.append(0)
        state, metrics = learn(*args)
        if len(calls) == 3:
            metrics["losses/weighted_loss"] = math.nan
        return state, metrics

    monkeypatch.setattr(dna, "learn", diverging)
    args = dna.Args(**TINY, exp_name="diverged", checkpoint_frequency=2)
    message = error_line(dna.main, args)
    assert re.search(r"__diverged__\S+ stopped: losses/weighted_loss is nan in update 3$", message)
    _, leaves = dna.load_checkpoint(str(find_run(inside, "diverged")))
    assert leaves[0] == 2


@pytest.mark.parametrize("bad", [np.full(64, np.nan), np.zeros(63), 1.0])
def test_a_reward_of_no_use_ends_in_one_line(setup, monkeypatch, bad):
    monkeypatch.setattr(dna, "compute_reward", lambda tokens, setup: bad)
    args = dna.Args(**TINY)
    state = dna.create_state(args, setup.denoiser)
    message = error_line(dna.finetune, args, setup, state, NoRun())
    assert message == "compute_reward must give 64 finite numbers"


def test_a_reward_that_fails_does_so_before_the_pretraining(inside, monkeypatch):
    def pretrain(data, args):
        raise AssertionError("pretraining has begun")

    monkeypatch.setattr(dna, "pretrain_denoiser", pretrain)
    monkeypatch.setattr(dna, "compute_reward", lambda tokens, setup: 1.0)
    message = error_line(dna.prepare, dna.Args(**TINY))
    assert message == "compute_reward must give 2 finite numbers"


def test_weights_that_fail_do_so_before_the_pretraining(inside, monkeypatch):
    def pretrain(data, args):
        raise AssertionError("pretraining has begun")

    monkeypatch.setattr(dna, "pretrain_denoiser", pretrain)
    for normalizer in ("zscore", "simplex"):
        args = dna.Args(**TINY | {"weighting": "mine", "normalizer": normalizer, "ell": -1.0})
        dna.check_args(args)  # it may use ell
        with pytest.raises(ValueError, match="weights does not know mine"):
            dna.prepare(args)


def test_a_reward_can_use_the_denoiser_before_it_is_pretrained(inside, monkeypatch):
    tried = []

    def likelihood(tokens, setup):
        tried.append(len(tokens))
        return dna.log_likelihood(setup.denoiser, jax.random.key(0), tokens)

    monkeypatch.setattr(dna, "compute_reward", likelihood)
    monkeypatch.setattr(dna, "pretrain_denoiser", lambda data, args: "pretrained")
    assert dna.prepare(dna.Args(**TINY)).denoiser == "pretrained" and tried == [2]


def test_a_reward_gets_jax_arrays_in_the_evaluation_too_and_keeps_its_traceback(setup, monkeypatch):
    tokens = np.zeros((8, 48), np.uint8)
    monkeypatch.setattr(dna, "compute_reward", lambda tokens, _: tokens.at[:, 0].set(2)[:, 0])
    np.testing.assert_array_equal(dna.checked_reward(tokens, setup), np.full(8, 2.0))
    assert dna.compute_metrics(tokens, setup, dna.Args(**TINY))["reward"] == 2
    guidance = dna_guidance.Args(**TINY | dict(method="best_of_n", eval_samples=2))
    assert dna_guidance.sample_best_of_n(setup, guidance).shape == (2, 48)

    def fail(tokens, setup):
        raise ConnectionError("no answer")

    monkeypatch.setattr(dna, "compute_reward", fail)
    with pytest.raises(RuntimeError, match="compute_reward failed") as stop:
        dna.checked_reward(tokens, setup)
    assert isinstance(stop.value.__cause__, ConnectionError)


def test_the_file_alone_reads_a_file_of_data(inside, setup, monkeypatch):
    """Given the generated data as a file, it finds denoiser and oracles of it in the cache.

    So it starts from the same metrics as `whole`, but for the truth. Without plot_dna.py it draws no
    pictures.
    """
    monkeypatch.setitem(sys.modules, "benchmark", None)
    script = shutil.copy(ROOT / "dna_finetune.py", inside / "alone.py")
    data = setup.data
    columns = dna.decode(data.tokens), map(repr, data.activity.tolist()), data.is_eval_half.tolist()
    write_table(inside / "data.tsv", zip(*columns, strict=True), ("seq", "hepg2", "half"))
    flags = TINY | dict(exp_name="alone", data_path="data.tsv", split_column="half", num_updates=1)
    argv = ["alone.py"]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(script), run_name="__main__")
    run = find_run(inside, "alone")
    assert not list(run.glob("*.png"))
    metrics = json.loads((run / "metrics.json").read_text())["pretrained"]
    expected = json.loads((find_run(inside, "whole") / "metrics.json").read_text())["pretrained"]
    del expected["true_activity"]
    assert metrics == expected


REFUSED = {
    "--ell must be finite and at most 0": {"ell": 0.1},
    "--ell must be left out with --weighting exp": {"ell": -0.5, "weighting": "exp"},
    "--num-updates must be a whole number, at least 1": {"num_updates": 0},
    "--group-size must be a whole number, at least 2": {"group_size": 1},
    "--learning-rate must be a finite number above 0": {"learning_rate": math.nan},
    "--sequence-length must be a whole number, at least 40": {"sequence_length": 20},
    "--target-kl must be below log(group_size)": {"normalizer": "simplex", "target_kl": 9.0},
    "--weighting must be another one": {"weighting": "wd1", "normalizer": "simplex"},
    "--data-size must be a whole number, at least 1000": {"data_size": 10},
    "--checkpoint-frequency must be a whole number, at least 1": {"checkpoint_frequency": 0},
    "--seed must be a whole number, at least 0": {"seed": -1},
    "--seed must be below 2": {"seed": 2**32},
    "--exp-name must be a part of a file's name": {"exp_name": "a/b"},
    "--data-seed must be below 2": {"data_seed": 2**63},
    "--data-path must be a name, or left out": {"data_path": ""},
    "--denoiser-path must be a name, or left out": {"denoiser_path": ""},
    "--split-column must be a name, or left out": {"split_column": ""},
    "--sequence-column must be a name, or left out": {"sequence_column": ""},
}


@pytest.mark.parametrize("message", REFUSED)
def test_flags_out_of_range_end_in_one_line(message):
    assert error_line(dna.check_args, dna.Args(**REFUSED[message])).startswith(message)


def test_help_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dna_finetune.py", "--help"])
    with pytest.raises(SystemExit):
        dna.parse_args()
    text = re.sub(r"[^\w.-]+", " ", capsys.readouterr().out)  # without frame and line breaks
    source = (ROOT / "dna_finetune.py").read_text()
    for field in fields(dna.Args):
        comment = re.search(rf"^    {field.name}: [^#]*# (.*)$", source, re.MULTILINE)[1]
        assert " ".join(re.sub(r"[^\w.-]+", " ", comment).split()[:4]) in text, field.name


def test_beside_resume_a_flag_with_its_default_is_refused_too(monkeypatch):
    """It would be ignored without a word; flags of a run are its own."""
    for words in (["--num-updates", "200"], ["--seed=1"], ["--preset", "small"]):
        monkeypatch.setattr(sys, "argv", ["dna_finetune.py", "--resume", "runs/x", *words])
        assert error_line(dna.parse_args).startswith("--resume must be the only flag, since")
        monkeypatch.setattr(sys, "argv", ["dna_finetune.py", *words])
        assert dna.parse_args().resume is None
    monkeypatch.setattr(sys, "argv", ["dna_finetune.py", "--resume", "runs/x"])
    assert dna.parse_args() == dna.Args(resume="runs/x")


@pytest.mark.parametrize("script", ["dna_finetune.py", "baselines/dna_guidance.py"])
def test_ctrl_c_ends_a_run_in_one_line(tmp_path, script):
    """Neither a traceback nor JAX's crash while Python closes down."""
    # A shell's background job ignores SIGINT, and so would its children.
    command = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    command += f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    flags = ["--data-size", "1000", "--oracle-steps", "1000000"]
    words = [sys.executable, "-c", command, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, cwd=tmp_path, **pipes) as run:
        shown = ""
        while "reward-oracle" not in shown:
            letter = run.stdout.read(1)
            assert letter, run.stderr.read()  # it has ended
            shown += letter
        run.send_signal(signal.SIGINT)
        rest, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and errors == ""
    assert rest.splitlines()[-1].startswith("stopped")


def test_presets(monkeypatch, capsys):
    """The authors' sizes; other flags override them. --help shows the preset's."""
    for preset in dna.PRESETS.values():
        dna.check_args(dna.Args(**preset))
    monkeypatch.setattr(sys, "argv", ["dna_finetune.py", "--preset", "paper", "--num-updates", "7"])
    paper = dna.parse_args()
    assert (paper.hidden_dim, paper.num_layers, paper.sample_steps) == (128, 20, 128)
    assert (paper.num_groups, paper.group_size, paper.learning_rate) == (4, 128, 1e-4)
    assert (paper.num_updates, paper.times_per_sample, paper.pretrain_decay) == (7, 1, False)
    tokens = jnp.zeros((1, 200), jnp.uint8)
    shapes = jax.eval_shape(dna.Denoiser(128, 20).init, jax.random.key(0), tokens)
    # DRAKES' 3,326,661 less its features of the time, 64 + 129 x 128, and what 20 layers of
    # 128 x 128 make of them: a bias is left of each.
    num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert num_params == 3_326_661 - (64 + 129 * 128) - 20 * 128 * 128
    monkeypatch.setattr(sys, "argv", ["dna_finetune.py", "--preset", "paper", "--help"])
    with pytest.raises(SystemExit):
        dna.parse_args()
    assert "(default: 131500)" in capsys.readouterr().out


# -------------------------------------------- pictures --------------------------------------------
def test_pictures_of_a_finished_run_alone(inside, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(find_run(inside, "whole"), run)
    for path in run.glob("*.png"):
        path.unlink()
    plot_dna.main(plot_dna.Args((run,)))
    assert len(list(run.glob("*.png"))) == 3
    assert "not a finished run" in error_line(plot_dna.main, plot_dna.Args((tmp_path,)))


# -------------------------------------------- baselines -------------------------------------------
GUIDANCE = TINY | dict(alpha=0.02, guidance_scale=20.0, num_candidates=8)


def value_of(setup, tokens):
    return np.asarray(dna.predict(setup.reward_oracle, jnp.asarray(tokens)))


@pytest.mark.parametrize("method", ["cg", "smc", "tds", "best_of_n"])
def test_guidance_raises_the_oracles_value(method, setup):
    args = dna_guidance.Args(**GUIDANCE, method=method)
    before = dna.draw_samples(setup.denoiser, args)
    after = dna_guidance.sample_method(setup, args)
    assert after.shape == before.shape and after.max() <= 3
    values = value_of(setup, before)
    assert value_of(setup, after).mean() > values.mean() + 0.5 * values.std()


@pytest.mark.parametrize("method", ["cg", "smc", "tds"])
def test_guidance_by_a_constant_oracle_is_the_pretrained_sampler(method, setup):
    args = dna_guidance.Args(**GUIDANCE, method=method)
    oracle = setup.reward_oracle
    zeros = jax.tree.map(jnp.zeros_like, oracle.params)
    setup = setup._replace(reward_oracle=oracle.replace(params=zeros))
    plain = dna.draw_samples(setup.denoiser, replace(args, eval_samples=512))
    keys = jax.random.split(jax.random.key(9), 8)
    guided = np.stack([dna_guidance.guided_sample(key, setup, args) for key in keys])
    counts = [np.bincount(x.ravel(), minlength=4) / x.size for x in (plain, guided)]
    np.testing.assert_allclose(*counts, atol=0.025)


class ShareOfA(nn.Module):
    """An oracle without parameters, of letters (B, L, 4)."""

    def __call__(self, letters):
        return letters[..., 0].mean(axis=-1)


def test_drakes_raises_the_reward(setup):
    args = dna_guidance.Args(**TINY | dict(method="drakes", truncation=2, num_updates=14))
    setup = setup._replace(reward_oracle=dna.Model({}, ShareOfA()))
    denoiser = dna_guidance.finetune_drakes(setup, args)
    before, after = (np.mean(dna.draw_samples(x, args) == 0) for x in (setup.denoiser, denoiser))
    assert after > before + 0.2


def with_constant_logits(denoiser, logits):
    """The denoiser with the same logits (5,) at every letter and every input."""
    layers = dict(denoiser.params["params"])
    layers["head_1"] = {"kernel": jnp.zeros((8, 5)), "bias": jnp.asarray(logits)}
    return denoiser.replace(params={"params": layers})


def test_the_kl_term_of_drakes(setup):
    """In two steps, half of the letters are lifted in the second, where the KL is counted.

    Beside a weight of a million, the reward does not count.
    """
    flags = dict(truncation=2, sample_steps=2, kl_weight=1e6)
    args = dna_guidance.Args(**(TINY | flags))
    uniform = with_constant_logits(setup.denoiser, [0.0, 0.0, 0.0, 0.0, 0.0])
    other = with_constant_logits(setup.denoiser, [2.0, 0.0, 1.0, 0.0, 0.0])
    loss = jax.jit(partial(dna_guidance.drakes_loss, args=args))
    value = loss(other, None, jax.random.key(0), setup._replace(denoiser=uniform)) / 1e6
    p = np.exp([2.0, 0.0, 1.0, 0.0]) / np.exp([2.0, 0.0, 1.0, 0.0]).sum()
    kl = np.sum(p * np.log(4 * p))
    assert value == pytest.approx(24 * kl, rel=0.05)


def test_a_baseline_writes_a_run(inside):
    args = dna_guidance.Args(**GUIDANCE, method="cg")
    metrics = dna_guidance.main(args)
    assert list(metrics) == ["pretrained", "finetuned"]
    run = next((inside / "runs").glob("cg__dna_guidance__1__*"))
    assert json.loads((run / "args.json").read_text())["method"] == "cg"
    assert not (run / "learning.png").exists() and (run / "motifs.png").exists()
    for flags, message in [({"alpha": 0.0}, "--alpha must"), ({"resume": "x"}, "--resume must")]:
        assert error_line(dna_guidance.main, replace(args, **flags)).startswith(message)


# ---------------------------------------------- slow ----------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["exp", "linear", "square", "neg"])
def test_at_the_defaults_prediction_and_truth_rise(tmp_path_factory, weighting, monkeypatch):
    """The predicted activity rises by 2 or more, the true one by 1."""
    jax.config.update("jax_disable_most_optimizations", False)  # for long runs they pay
    cache = tmp_path_factory.getbasetemp() / "dna-cache"
    monkeypatch.chdir(tmp_path_factory.mktemp(weighting))
    metrics = dna.main(dna.Args(weighting=weighting, cache_path=str(cache)))
    before, after = metrics["pretrained"], metrics["finetuned"]
    assert after["predicted_activity"] >= before["predicted_activity"] + 2
    assert after["true_activity"] >= before["true_activity"] + 1
