import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; on toy models threads cost more than they give
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
_cache = tempfile.TemporaryDirectory(prefix="p3o_datasets_")
os.environ["HF_DATASETS_CACHE"] = _cache.name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_script(script, *args, cwd, **kwargs):
    """One script as its own process; its output as text. Does not check the exit status."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A working directory with data/toy, and out/sft and out/reward_model after a few steps: not to be written to.

    Default paths are relative: run scripts with it as working directory and an --output_dir of the test's own.
    """
    folder = tmp_path_factory.mktemp("chain")
    for script, *args in (
        ("toy.py",),
        ("sft.py", "--steps", 30, "--eval_rows", 64),
        ("reward_model.py", "--steps", 15, "--eval_rows", 64),
    ):
        done = run_script(script, *args, cwd=folder)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return folder
