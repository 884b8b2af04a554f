"""`python -m l2e_ds.supervise` with the real launchers on this machine: stopping, restarting, exit codes.

One run, stopped, killed and resumed in many ways, must end with the numbers of a run that nobody disturbed.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time

import pytest

from l2e_ds.distributed.launch import free_port
from tests.integration.running import Launch, lines, newest, saved
from tests.processes import REPOSITORY, finish

DEEPSPEED = [str(REPOSITORY / "launch/deepspeed.sh"), "--num_accelerators", "2"]


# more than any machine trains before a signal reaches it; the last start of each test says where the end is
FOR_EVER = "training.steps=1000000"


@pytest.mark.full
def test_stopped_and_killed_in_every_way_it_is_still_the_same_run(launch, run_file, tmp_path):
    words = [run_file, "checkpoint.every=10", "training.evaluate_every=0", "training.timeout=1"]
    words += ["logging.progress=false"]
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"

    # launch.py is killed; then SIGUSR1 does nothing to the launcher's processes, and SIGTERM to `deepspeed` ends it
    # alone: the run must still stop
    one = launch(*DEEPSPEED, "--restarts", "1", *words, FOR_EVER)
    one.wait_for(lambda: newest(run) >= 12)
    one.find("deepspeed.launcher.launch")[0].kill()
    one.wait_for(lambda: "start 2 of at most 2" in one.said() and len(lines(run, "start")) >= 2)
    one.wait_for(lambda: newest(run) >= lines(run, "start")[-1]["step"] + 2)
    launcher, node = one.find("bin/deepspeed")[0], one.find("deepspeed.launcher.launch")[0]
    ranks = [p for p in one.find("l2e_ds.train") if p.ppid() == node.pid]
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGUSR1)
    node.send_signal(signal.SIGUSR1)
    step = newest(run)
    one.wait_for(lambda: newest(run) >= step + 3)
    launcher.send_signal(signal.SIGTERM)
    assert one.end() == 75, one.said()
    assert "the launcher says 0, but the newest checkpoint is of step" in one.said()
    first = saved(run)
    assert first == newest(run)
    assert not (run / "stop").exists()

    # SIGTERM to launch.py
    one = launch(*DEEPSPEED, *words, FOR_EVER)
    one.wait_for(lambda: newest(run) >= first + 2)
    one.find("deepspeed.launcher.launch")[0].send_signal(signal.SIGTERM)
    assert one.end() == 75, one.said()
    assert first < saved(run) == newest(run)

    # to the end, without a launcher
    words += [f"training.steps={saved(run) + 5}"]
    codes, said = finish("-m", "l2e_ds.train", *words, ranks=2)
    assert codes == [0, 0], said
    assert [line["step"] for line in lines(run)] == list(range(1, saved(run) + 1))
    codes, said = finish("-m", "l2e_ds.train", *words, f"training.run_directory={undisturbed}", ranks=2)
    assert codes == [0, 0], said
    for line, expected in zip(lines(run), lines(undisturbed), strict=True):
        assert line["lm_loss"] == expected["lm_loss"], line["step"]


def supervise(launch, words, launcher, *options: object) -> Launch:
    return launch(sys.executable, "-m", "l2e_ds.supervise", *options, *words, "--", *launcher)


@pytest.mark.full
def test_exit_codes_decide_about_restarts(launch, run_file, tmp_path):
    """The launcher here is only an exit code; 0 does not count while the run is not finished."""
    run = tmp_path / "run"
    for code, expected, starts in ((0, 1, 2), (1, 1, 2), (2, 2, 1), (3, 3, 1), (75, 75, 1), (-9, 137, 2)):
        how = f"kill {code} $$" if code < 0 else f"exit {code}"
        one = supervise(launch, [run_file], ["sh", "-c", how], "--restarts", "1")
        assert one.end() == expected, one.said()
        assert one.said().count("l2e-ds: start ") == starts, one.said()

    # a second SIGTERM does not wait; one that comes by two ways does
    one = supervise(launch, [run_file], ["sh", "-c", "sleep 60"])
    one.wait_for(lambda: one.find("sleep"))
    for pause in (0.1, 2.5):
        one.process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert one.process.poll() is None
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == 137, one.said()
    assert (run / "stop").exists()
    shutil.rmtree(run)

    # a run that must begin afresh goes on from its own checkpoints when it is started again
    words = [run_file, "training.resume=never"]
    (run / "checkpoints/step00000000").mkdir(parents=True)
    (run / "checkpoints/step00000000/manifest.json").touch()
    one = supervise(launch, words, ["sh", "-c", 'echo "words: $*"; exit 1', "sh"], "--restarts", "1")
    assert one.end() == 1
    said = [line for line in one.said().splitlines() if line.startswith("words: ")]
    assert said == [f"words: {run_file} training.resume=never" + end for end in ("", " training.resume=auto")]
    shutil.rmtree(run)

    # bad words: one line, 2, and nothing is started or made
    for words, expected in (
        ([tmp_path / "no.yaml", "--", "true"], "no.yaml: No such file or directory"),
        ([run_file, "--restarts", "x", "--", "true"], "--restarts (or L2E_DS_RESTARTS): got 'x'"),
        ([run_file, "training.steps=many", "--", "true"], "training.steps: got 'many'"),
        ([run_file], "give the launcher after --"),
        ([run_file, "--", "tochrun"], "no such launcher: tochrun"),
    ):
        one = launch(sys.executable, "-m", "l2e_ds.supervise", *words)
        assert one.end() == 2
        assert len(one.said().splitlines()) == 1 and expected in one.said()
    assert not run.exists()


@pytest.mark.full
def test_torchrun_mpirun_and_a_single_process(launch, run_file, tmp_path):
    """torchrun returns 1 for any exit code of its ranks."""
    words = [run_file, FOR_EVER, "training.evaluate_every=0", "logging.progress=false"]
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "l2e_ds.train"]
    run = tmp_path / "run"
    one = supervise(launch, words, torchrun)
    one.wait_for(lambda: newest(run) >= 3)
    one.process.send_signal(signal.SIGINT)
    assert one.end() == 75, one.said()
    first = saved(run)
    assert 3 <= first == newest(run)

    one = launch(REPOSITORY / "launch/mpirun.sh", "-n", "2", *words)
    one.wait_for(lambda: newest(run) >= first + 3)
    one.process.send_signal(signal.SIGHUP)
    assert one.end() == 75, one.said()
    assert first < saved(run) == newest(run)

    one = supervise(launch, [*words, "inhibition.layers=[9]"], torchrun)
    assert one.end() == 2, one.said()
    assert one.said().count("l2e-ds: start ") == 1

    alone = [*words, "training.steps=12", f"training.run_directory={tmp_path / 'alone'}"]
    one = supervise(launch, alone, [sys.executable, "-m", "l2e_ds.train"])
    assert one.end() == 0, one.said()
    assert "finished at step 12" in one.said()
