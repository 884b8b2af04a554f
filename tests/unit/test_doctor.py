"""`l2e-ds doctor` on one rank: what it finds missing, and what fixes it. For several ranks see tests/integration."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from l2e_ds.doctor import command, host, ranks
from l2e_ds.doctor.all_reduce import Timing
from l2e_ds.doctor.finding import Finding
from tests.processes import REPOSITORY

SECRET = "hf_neverPrintThisOne"


def run_doctor(*arguments: str, **environment: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-m", "l2e_ds.cli", "doctor", *arguments],
        env={**kept, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def the(findings: Iterable[Finding], name: str, *states: str) -> Finding:
    findings = list(findings)
    found = [finding for finding in findings if finding.name == name and finding.state in (states or ("ok",))]
    assert len(found) == 1, findings
    return found[0]


def install(folder: Path, name: str, version: str, *lines: str) -> None:
    """Write what pip leaves of a package for importlib.metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]))


def test_a_machine_where_a_run_can_start(tmp_path):
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    code, said = run_doctor(
        *("--directory", str(tmp_path), "--seconds", "1"), PATH=path, HF_TOKEN=SECRET, HF_HUB_OFFLINE="1"
    )
    assert code == 0, said
    lines = said.splitlines()
    assert lines[-1] == "a run can start here"
    assert all(re.match(r"(ok|note) +[a-z-]+|  -> \w", line) for line in lines[:-1]), said
    for expected in (
        "launcher +alone",
        "versions +l2e-ds .*, torch ",
        "accelerator",
        "all-reduce +a group of one",
        "hub.*a token",
    ):
        assert re.search(rf"^ok +{expected}", said, re.MULTILINE), (expected, said)
    assert SECRET not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_machine_where_none_can(tmp_path):
    absent = tmp_path / "not there"
    code, said = run_doctor(
        *("--directory", str(absent), "--seconds", "1"),
        PATH="",
        TORCH_EXTENSIONS_DIR=str(tmp_path),
        HF_TOKEN=SECRET,
        HF_ENDPOINT=f"http://me:{SECRET}@127.0.0.1:9",
    )
    assert code == 1, said
    assert re.search(rf"^missing +directory .*\n  -> mkdir -p '{re.escape(str(absent))}'$", said, re.MULTILINE), said
    assert re.search(r"^note +hub +127.0.0.1:9 does not answer", said, re.MULTILINE), said
    assert said.splitlines()[-1] == "a run cannot start here; missing: directory"
    assert SECRET not in said
    assert "Traceback" not in said


def test_the_standard_library_alone():
    """Without any package doctor still checks the rest, and says what is missing."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "l2e_ds.cli", "doctor"],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert re.search(r"^missing +torch +not installed\n  -> launch/install.sh", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^ok +directory", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.splitlines()[-1] == "a run cannot start here; missing: torch"


@pytest.mark.full
def test_a_torch_that_cannot_be_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    code, said = run_doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}", HF_HUB_OFFLINE="1")
    assert code == 1
    assert re.search(r"^missing +torch .*libcudart.so.99.*\n  -> pip install ", said, re.MULTILINE), said
    assert re.search(r"^ok +directory", said, re.MULTILINE)  # the rest is looked at all the same
    assert said.splitlines()[-1] == "a run cannot start here; missing: torch"


def test_versions_against_the_ranges_of_the_package(tmp_path, monkeypatch):
    required = ("Requires-Dist: torch>=2.6", "Requires-Dist: nosuch>=1", 'Requires-Dist: never; extra == "test"')
    install(tmp_path, "l2e_ds", "0.1.0", *required, "Requires-Dist: tqdm")
    install(tmp_path, "torch", "2.5.1")
    monkeypatch.syspath_prepend(tmp_path)
    findings = list(host.check_versions())
    assert the(findings, "torch", "missing").text == "2.5.1, needed: >=2.6"
    assert the(findings, "nosuch", "missing").fix == "pip install 'nosuch>=1'"
    assert re.search(r"l2e-ds 0\.1\.0 \(code \w{8}\), python 3\.\S+, tqdm 4\.", the(findings, "versions").text)
    assert "never" not in str(findings)


def test_folders(tmp_path):
    good = the(host.check_directory(tmp_path), "directory")
    assert re.search(r"[\d.]+ GB free", good.text)
    assert not list(tmp_path.iterdir())
    refused = the(host.check_directory(Path("/proc")), "directory", "missing")  # by root as well
    assert "cannot write to /proc" in refused.text
    strange = the(host.check_directory(tmp_path / "; rm -rf x"), "directory", "missing")
    assert strange.fix == f"mkdir -p '{tmp_path}/; rm -rf x'"


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(host, "SHARED_MEMORY", 2**60)
    low = the(host.check_shared_memory(), "shared memory", "note")
    assert "/dev/shm" in low.text
    assert "--shm-size" in low.fix


@pytest.mark.parametrize(("device", "state"), [("cpu", "note"), ("cuda", "missing")])
def test_no_compiler_is_found(tmp_path, monkeypatch, device, state):
    """Triton compiles a launcher in C at its first use: no GPU run that inhibits can go without."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self: device)
    assert not list(host.check_compiler())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++" in str(the(host.check_compiler(), "compiler", state).fix)
    monkeypatch.undo()
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda self: device)
    monkeypatch.setattr(host.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in the(host.check_compiler(), "compiler", state).text


def _facts(host: str, **changes) -> dict:
    fact = {"host": host, "versions": {"torch": "2.13.0"}, "device": "CPU", "gpu": None}
    return {**fact, "cores": 8, "threads": 1, "findings": [], **changes}


def test_what_other_hosts_lack_is_said_once():
    shared, own = Finding("note", "hub", "no answer"), Finding("missing", "directory", "none", "make it")
    fine = Finding("ok", "accelerator", "none")
    facts = [_facts("a", findings=[shared]), *(_facts(host, findings=[shared, own, fine]) for host in "bcdefg")]
    said = Finding("missing", "directory", "b, c, d, e and 2 more: none", "make it")
    assert list(ranks.other_hosts(facts)) == [said]


def test_hosts_and_versions_that_differ():
    facts = [_facts("a"), _facts("a"), _facts("b"), _facts("b", versions={"torch": "2.12.0"})]
    bad = the(ranks.check_alike(facts), "versions", "missing")
    assert bad.text == "rank 3 (b): torch 2.12.0, the other ranks 2.13.0"
    assert [finding.text for finding in ranks.check_hosts(facts)] == [
        "a: ranks 0, 1; CPU; OMP_NUM_THREADS 1",
        "b: ranks 2, 3; CPU; OMP_NUM_THREADS 1",
    ]
    crowded = ranks.check_hosts([_facts("a", threads=8) for _ in range(4)])
    assert the(crowded, "host", "note").fix == "export OMP_NUM_THREADS=2   (and at most 8 ranks there)"
    gpus = [_facts("a", device="GPU", gpu=uuid) for uuid in ("x", "y", "y")]
    assert the(ranks.check_hosts(gpus), "host", "missing").text == "a: 3 ranks on 2 GPUs"


def test_what_is_said_of_an_all_reduce():
    timings = [Timing(8, 100, 2e-5, 1e-3), Timing(10**9, 10, 1.0, 1.1)]
    facts = [_facts(host) for host in ("a", "a", "b", "b")]
    measured = [timings] * 4
    findings = list(ranks.all_reduce_findings(measured, facts, "gloo"))
    assert the(findings, "all-reduce").text == "the sum of 4 ranks was right 110 times (gloo)"
    assert the(findings, "latency").text == "8 B: 20 us (longest 1,000 us)"
    assert "1,000.0 ms, 1.00 GB/s (bus 1.50 GB/s)" in the(findings, "bandwidth").text  # 2 (R - 1) / R of 1 GB/s
    measured[1] = [timings[0], Timing(10**9, 10, 1.0, 1.1, is_right=False)]
    wrong = the(ranks.all_reduce_findings(measured, facts, "nccl"), "all-reduce", "missing")
    assert wrong.text == "wrong sums at rank 1 (a) (nccl)"


@pytest.mark.parametrize("seconds", ["0", "-1", "601"])
def test_seconds_out_of_range(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--seconds", seconds])
    assert ended.value.code == 2
    assert f"got {seconds}, allowed: above 0, at most 600" in capsys.readouterr().err
