"""Set up JAX before anything imports it: exact products, and a compilation cache on the disk."""

import gc
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the scripts lie, wherever pytest is started

# By the environment, so that the subprocesses of test_scripts.py have it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A GPU's default is TF32: 3 decimal digits.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# Derandomized: a failure is the same for everyone. No deadline: a shape's first example compiles.
profile = dict(derandomize=True, deadline=None, max_examples=60, database=None)
settings.register_profile("gempo", **profile)
settings.load_profile("gempo")


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs():
    """After each module, drop what JAX compiled: each program maps a dozen pieces of memory.

    Linux allows a process 65,530 of them (vm.max_map_count). The whole suite in one process came
    to more, and JAX then crashed.
    """
    yield
    import jax  # after the environment above is set

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
