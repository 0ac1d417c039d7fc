"""A job that is killed or stopped at any moment ends, started again, as an undisturbed one."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hf_kd_ranking.artifacts import locked

pytestmark = pytest.mark.slow
# Of equal pipelines the fastest is chosen, so that only one depth and no sum is tried.
ONE = {"architectures": ["bert_dot"], "conditions": ["teacher"], "depths": [8], "fusion": False}


def wait_for(process: subprocess.Popen, path: Path) -> None:
    """Wait until a running job has made a file or folder."""
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.005)


def wait_for_training(process) -> None:
    """Wait until a job shows the progress of a long training: a bar without a title; those of the plan are short."""
    wait_for(process, process.paths[1])
    until = time.monotonic() + 120
    while not re.search(r"(^|[\r\n]) +0%\|[^|]*\| 0/\d{3,} ", process.paths[1].read_text()):
        assert process.poll() is None and time.monotonic() < until, "no training began"
        time.sleep(0.005)


def stop(process: subprocess.Popen, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a job, and return its exit status and what it printed as errors."""
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def finish(process: subprocess.Popen) -> dict:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(printed.splitlines()[-1])


def test_job_killed_five_times_ends_as_undisturbed(make_job, launch, tmp_path):
    whole = finish(launch(make_job(**ONE, output=str(tmp_path / "whole")), is_warm=False))
    job = make_job(**ONE, output=str(tmp_path / "killed"))
    moments = ["bm25_search/dev", "teacher_scores/teacher/train", "students/bert_dot teacher/rate-0.001/ranker"]
    for moment in (*moments, "test/bert_dot teacher", "timing"):
        process = launch(job)
        wait_for(process, tmp_path / "killed" / moment)
        assert stop(process, signal.SIGKILL)[0] == -signal.SIGKILL
    with locked(tmp_path / "killed"):  # the lock of a killed process is free
        pass
    resumed = finish(launch(job))
    for name in ("test", "dev", "fused", "lists", "queries", "rates"):
        assert resumed[name] == whole[name], name
    assert resumed["pipeline"]["system"] == whole["pipeline"]["system"]
    for file in ("lists/teacher/rows.jsonl", "teacher_scores/teacher/test/run.trec", "test/bert_dot teacher/run.trec"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_terminated_job_says_how_it_resumes(make_job, launch, out, tmp_path):
    # Each signal comes into a folder of its own: what an earlier process left says nothing about the next one.
    interrupted = tmp_path / "interrupted"
    process = launch(make_job(**ONE, epochs=400, output=str(interrupted)))
    wait_for(process, interrupted / "bm25")
    status, errors = stop(process, signal.SIGINT)
    assert (status, "interrupted; the same command resumes" in errors) == (130, True)
    job = make_job(**ONE, epochs=400)
    process = launch(job)
    wait_for(process, out / "bm25")
    status, errors = stop(process, signal.SIGTERM)
    assert (status, "Stopped by SIGTERM; the same command resumes" in errors) == (1, True)
    process = launch(job)
    training = out / "students/bert_dot teacher/rate-0.001/ranker"
    wait_for_training(process)
    other = launch(job)
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 2 and f"is in use by process {process.pid}; wait" in errors
    status, errors = stop(process, signal.SIGTERM)
    assert status == 1
    assert "Stopped by SIGTERM, the training saved a checkpoint; the same command resumes" in errors
    assert "--resume" not in errors
    assert list(training.glob("checkpoint-*"))
