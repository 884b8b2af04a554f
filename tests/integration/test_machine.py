"""What a machine lacks ends in one line: folders, links, names, packages, hosts, a reader of what is printed."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from l2e_ds.cli import main
from l2e_ds.console import READER_IS_GONE
from l2e_ds.supervise import supervisor
from l2e_ds.supervise.launcher import check_hosts
from l2e_ds.system.installed import is_installed
from tests.processes import REPOSITORY, finish
from tests.unit.report.making import write_run

LONG = "x" * 300


def error_of(capsys, *words: object) -> str:
    assert main([*map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("l2e-ds: error: ")
    return line


@pytest.mark.parametrize("key", ["training.run_directory", "data.cache", "deepspeed.config", "training.resume"])
@pytest.mark.parametrize("name", [LONG, f"{LONG}/below", f"here/{LONG}"])
def test_a_name_that_is_too_long(run_file, capsys, monkeypatch, tmp_path, key, name):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, "train", run_file, f"{key}={name}")
    assert LONG in line and ("File name too long" in line or "no such" in line)
    assert not (tmp_path / "here").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("link", "key"),
    [("run", "training.run_directory"), ("run/checkpoints", "training.run_directory"), ("cache", "data.cache")],
)
def test_a_link_to_nowhere(run_file, capsys, tmp_path, link, key):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "gone")
    line = error_of(capsys, "train", run_file)
    assert f"{key}: {tmp_path / link} is a link to {tmp_path / 'gone'}, which is not there" in line


def test_a_file_where_checkpoints_should_be(run_file, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    assert f"training.run_directory: cannot write below {tmp_path}/run/checkpoints" in error_of(
        capsys, "train", run_file
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "RANK is set but MASTER_ADDR is not"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "node0"}, "RANK is set but MASTER_PORT is not"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "expected numbers"),
    ],
)
def test_a_launcher_that_says_half(run_file, capsys, monkeypatch, environment, words):
    for key, value in ({"RANK": "0"} | environment).items():
        monkeypatch.setenv(key, value)
    assert f"launcher: {words}" in error_of(capsys, "train", run_file)


def test_an_optimizer_that_deepspeed_does_not_take(run_file, tmp_path):
    path = tmp_path / "sgd.json"
    path.write_text(json.dumps({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 2}}))
    codes, said = finish("-m", "l2e_ds.train", run_file, f"deepspeed.config={path}")
    assert codes == [2] and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if "error" in line]
    problem = "deepspeed.config: sgd.json: DeepSpeed builds no engine with optimizer.type SGD: "
    assert line.startswith(f"l2e-ds: error: {problem}") and "untested ZeRO Optimizer" in line


def test_a_port_that_is_in_use(run_file):
    """Its exit code is 1: a supervisor starts the run again, and the launcher may find another port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        port = str(other.getsockname()[1])
        words = f"uses port {port}, on which rank 0 must listen; set MASTER_PORT to a free one"
        codes, said = finish("-m", "l2e_ds.train", run_file, **rank, MASTER_PORT=port)
        assert codes == [1] and words in said and "Traceback" not in said, said
        assert said.count("l2e-ds: error:") == 1
        codes, said = finish("-m", "l2e_ds.doctor", **rank, MASTER_PORT=port)
        assert codes == [1] and words in said and "-> export MASTER_PORT=PORT" in said, said


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_such_package").mkdir()
    assert not is_installed("no_such_package") and not is_installed("no_such_package_either")
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package/__init__.py").touch()
    assert is_installed("a_package")


def test_help_without_the_extras(tmp_path):
    """Commands that need an extra say so in one line, but only when they run."""
    missing = ("scipy", "matplotlib", "pyarrow")
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from l2e_ds.cli import main; from benchmarks.__main__ import main as bench\n"
        "for words in (['analyze'], ['neuron'], ['report']):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0, words\n"
        "features = ['--features', 'f.jsonl']\n"
        "assert main(['analyze', 'model', *features, '--output', 'o']) == 2\n"
        "assert main(['neuron', 'model', *features, '--layer', '0', '--index', '0']) == 2\n"
        "assert main(['report', 'run', '--output', 'r.html']) == 2\n"
        "assert bench(['analysis']) == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    needs = "needs matplotlib, pyarrow, scipy: pip install 'l2e-ds[analysis]'"
    assert done.stderr.splitlines() == [
        f"l2e-ds: error: analyze: {needs}",
        f"l2e-ds: error: neuron: {needs}",
        "l2e-ds: error: report: needs matplotlib: pip install 'l2e-ds[report]'",
        f"l2e-ds: error: analysis: {needs}",
    ]


@pytest.mark.parametrize("words", [["summary", "run"], ["train", "run.yaml", "--dry-run"]])
def test_a_reader_that_has_seen_enough(run_file, tmp_path, words):
    """With `| head -1` there is no traceback, and the exit code is what a shell gives for SIGPIPE."""
    write_run(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "l2e_ds.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (READER_IS_GONE, "")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a /dev/shm of its own needs root")
def test_a_full_shared_memory_is_named(tmp_path, corpus):
    """Worker processes keep their locks in shared memory."""
    Tokenizer(WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a")).save(str(tmp_path / "words.json"))
    words = [sys.executable, "-m", "l2e_ds.cli", "tokenize", corpus, "--output", tmp_path / "out"]
    words += ["--tokenizer", tmp_path / "words.json", "--workers", "2"]
    full = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full; exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", full, "sh", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "l2e-ds: error: /dev/shm" in done.stderr and "No space left on device" in done.stderr


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh: apt-get install openssh-client")
@pytest.mark.parametrize("options", [["--force_multi"], []])
def test_a_host_that_is_not_there(run_file, capsys, tmp_path, options):
    """The error is one line with exit code 2, and nothing is started."""
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\none.invalid slots=1\n\ntwo.invalid slots=1\n")
    (tmp_path / "deepspeed").write_text("#!/bin/sh\ntouch started\n")
    (tmp_path / "deepspeed").chmod(0o755)
    launcher = [str(tmp_path / "deepspeed"), "--hostfile", str(hosts), *options]
    assert supervisor.main([str(run_file), "--", *launcher, "--module", "l2e_ds.train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"l2e-ds: error: --hostfile: {hosts}: ssh does not reach one.invalid (and 1 more): ssh: ")


@pytest.mark.parametrize(
    "options",
    [
        ["--no_ssh_check", "--force_multi"],
        ["--no_ssh", "--node_rank", "0", "--master_addr", "one.invalid"],
        ["--launcher", "slurm", "--force_multi"],
        ["--include", "three@four:0", "--force_multi"],
        ["--exclude", "one.invalid@two.invalid"],
        ["--num_nodes", "1"],
    ],
)
def test_hosts_that_take_no_part_are_not_asked(tmp_path, options):
    (tmp_path / "hosts").write_text("one.invalid slots=1\ntwo.invalid slots=1\n")
    check_hosts(["deepspeed", "--hostfile", str(tmp_path / "hosts"), *options, "--module", "l2e_ds.train"])
