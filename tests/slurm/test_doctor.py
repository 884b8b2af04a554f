"""`srun l2e-ds doctor` on two nodes: what can only be found between hosts."""

import re
import subprocess
import sys

import pytest

from tests.processes import REPOSITORY


@pytest.mark.full
def test_two_nodes_with_a_shared_folder_and_without(slurm, tmp_path):
    environment = {**slurm, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for node in ("n1", "n2"):
        (tmp_path / node).mkdir()
    said = {}
    for name, folder in {"shared": tmp_path, "own": f"{tmp_path}/$SLURMD_NODENAME"}.items():
        doctor = f"exec {sys.executable} -m l2e_ds.cli doctor --seconds 1 --directory {folder}"
        done = subprocess.run(
            ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", "-c", doctor],
            env={**environment, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        said[name] = done.stdout + done.stderr
        assert (done.returncode == 0) == (name == "shared"), said[name]
    for expected in (
        r"launcher +srun: 2 ranks",
        r"host +n1: rank 0; ",
        r"host +n2: rank 1; ",
        rf"directory +{tmp_path} is shared by all hosts",
        r"all-reduce +the sum of 2 ranks was right",
    ):
        assert re.search(rf"^ok +{expected}", said["shared"], re.MULTILINE), (expected, said["shared"])
    assert re.search(r"^missing +directory +n2 cannot see what rank 0 writes", said["own"], re.MULTILINE), said["own"]
    assert "a run cannot start here; missing: directory" in said["own"].splitlines()
