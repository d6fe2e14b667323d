"""README.md: short, and its Python runs word for word."""

import re

import jax
import numpy as np
from conftest import ROOT
from helpers import SCRIPTS

README = (ROOT / "README.md").read_text()


def python_blocks(heading):
    """The Python code of a section, block by block."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_use_it_in_your_own_project_runs_as_it_stands(tmp_path, monkeypatch):
    """The three ways of use in one session, the last one with a model that a run would have saved."""
    own_environment, dataset_and_seeds, trained_agent = python_blocks("Use it in your own project")
    namespace = {}
    exec(own_environment, namespace)
    assert namespace["agent"].num_updates == 100 * 4
    actions, obs = namespace["actions"], namespace["obs"]
    assert actions.shape == obs.shape == (4, 1)
    exec(dataset_and_seeds, namespace)
    assert namespace["agent"].num_updates == 100 * 4 + 20
    assert namespace["metrics"]["losses/critic_loss"].shape == (5,)
    first_layers = namespace["agents"].params["critic"]["params"]["first_kernel"]
    assert len(np.unique(np.asarray(first_layers)[:, 0, 0, 0])) == 5

    script = SCRIPTS["neg"]
    args = script.Args(
        env_id="InvertedPendulum-v5", diffusion_steps=3, hidden_dim=16, eval_best_of=2
    )
    agent = script.create_agent(args, 4, 1, jax.random.key(0))
    path = re.search(r'load_agent\("(.*?)"\)', trained_agent)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir(parents=True)
    script.write_file(tmp_path / path / "gempo_neg.model", script.agent_content(args, agent))
    exec(trained_agent, namespace)
    obs = np.float32(namespace["obs"])[None]
    expected = script.act(agent, obs, jax.random.key(0), 0, training=False)[0]
    np.testing.assert_array_equal(namespace["action"], expected)
