"""A mistyped option is an error in every command, even if it abbreviates another one."""

import pytest

from benchmarks.__main__ import main as benchmarks_main
from l2e_ds import cli, train
from l2e_ds.doctor.command import main as doctor_main
from l2e_ds.slurm import job
from l2e_ds.supervise import supervisor
from l2e_ds.system.files import whole_folder, write_whole


@pytest.mark.parametrize(
    ("command", "words", "mistyped"),
    [
        (benchmarks_main, ["overhead", "--round", "3"], "--round"),
        (cli.main, ["plan", "run.yaml", "--gpus", "8", "--gpu", "h100", "--node", "2"], "--node"),
        (cli.main, ["export", "runs/x", "--output", "there", "--st", "3"], "--st"),
        (cli.main, ["checkpoint", "prune", "runs/x", "--keep-last", "1", "--dry"], "--dry"),
        (cli.main, ["doctor", "--second", "3"], "--second"),
        (cli.main, ["train", "run.yaml", "--dry"], "--dry"),
        (train.main, ["run.yaml", "--dry"], "--dry"),
        (supervisor.main, ["--restart", "3", "run.yaml", "--", "torchrun"], "--restart"),
        (job.main, ["--restart", "3", "run.yaml", "--", "srun"], "--restart"),
    ],
)
def test_options_are_not_abbreviated(command, words, mistyped, capsys):
    with pytest.raises(SystemExit) as ended:
        command(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {mistyped}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "words"), [(benchmarks_main, ["overhead"]), (cli.main, ["doctor"]), (doctor_main, []), (train.main, [])]
)
def test_the_deepspeed_launcher_s_option_comes_first(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        command(["--local_rank=0", *words, "--help"])
    assert ended.value.code == 0
    assert "local_rank" not in capsys.readouterr().out


def test_what_the_user_can_mend_of_the_system_is_one_line(tmp_path, capsys, monkeypatch):
    def refused(*_words):
        raise PermissionError(13, "Permission denied", "runs/x")

    monkeypatch.setattr("l2e_ds.report.summary.summarise", refused)
    assert cli.main(["summary", "runs/x"]) == 2
    assert capsys.readouterr().err == "l2e-ds: error: runs/x: Permission denied\n"


@pytest.mark.parametrize("write", [lambda path: write_whole(path, ""), lambda path: whole_folder(path).__enter__()])
def test_errors_name_the_new_file_and_not_its_temporary_one(tmp_path, write):
    path = tmp_path / ("x" * 250)  # which is short enough, and the temporary name is not
    with pytest.raises(OSError, match="File name too long") as raised:
        write(path)
    assert raised.value.filename == str(path)


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupted(*_words):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2e_ds.report.summary.summarise", interrupted)
    assert cli.main(["summary", "runs/x"]) == 130
    assert capsys.readouterr().err == "l2e-ds: interrupted\n"
