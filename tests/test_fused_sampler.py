"""The fused sampler of benchmark/, in Pallas' interpret mode, draws what the scripts' sampler draws."""

import importlib.util
import pathlib
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gempo_linear

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import fused_sampler  # noqa: E402 (the line above finds it)


def draw(dtype):
    """Actions (3, 16, 2) of the fused and of the scripts' sampler, from the same key."""
    agent = helpers.create_agent("linear", 3, 2, hidden_dim=32)
    params = helpers.as_jax(helpers.perturb(agent.params["actor"]))
    obs, key = jax.random.normal(jax.random.key(1), (3, 3)), jax.random.key(2)
    fused = fused_sampler.sample_actions(
        agent.actor, params, obs, key, 16, 5, dtype=dtype, interpret=True
    )
    ours = gempo_linear.sample_actions(agent.actor, params, obs, key, 16, 5)
    assert fused.shape == ours.shape == (3, 16, 2)
    return np.asarray(fused), np.asarray(ours)


def test_in_float32_it_draws_the_same_actions():
    fused, ours = draw(jnp.float32)
    np.testing.assert_allclose(fused, ours, atol=1e-5)
    assert ours.std() > 0.1


def test_in_bfloat16_it_draws_about_the_same_actions():
    fused, ours = draw(jnp.bfloat16)
    change = np.abs(fused - ours)
    assert 0 < change.mean() < 0.02 * ours.std()


@pytest.mark.slow
def test_it_compiles_for_a_gpu():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip('needs the CUDA plugin: pip install "jax[cuda12]"')
    command = [sys.executable, ROOT / "benchmark" / "fused_sampler.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fused" in done.stdout and "pallas_call" in done.stdout
