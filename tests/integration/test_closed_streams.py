"""A run that a daemon or cron started, with its standard streams closed, and that its session's end asks to stop."""

import json
import signal
import subprocess
import sys

from tests.integration.running import newest, saved


def test_it_trains_and_stops_as_any_other(launch, run_file, tmp_path):
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "l2e_ds.train"]
    one = launch(*closed, run_file, "training.steps=100000", "training.evaluate_every=0")
    one.wait_for(lambda: newest(tmp_path / "run") >= 3)
    one.process.send_signal(signal.SIGHUP)
    assert one.end() == 75
    assert saved(tmp_path / "run") == newest(tmp_path / "run")
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)  # and nothing that was printed


def test_an_error_line_that_nobody_can_read_keeps_its_exit_code():
    refused = [sys.executable, "-m", "l2e_ds.cli", "summary", "nowhere"]
    for stderr in (">&-", "> /dev/full"):
        assert subprocess.run(["sh", "-c", f'exec "$@" 2{stderr}', "sh", *refused]).returncode == 2
