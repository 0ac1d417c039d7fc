"""Trainings side by side end as one after the other."""

import json
import os
import signal
import time

import pytest

from hf_kd_ranking.artifacts import read_description
from hf_kd_ranking.distillation.pipeline import make_plan

# Of equal pipelines the fastest is chosen, so that only one depth and no sum is tried.
ONE = {"architectures": ["bert_dot"], "depths": [8], "fusion": False}
TRAININGS = ("students/bert_dot no_teacher/rate-0.001", "students/bert_dot teacher/rate-0.001")


def has_members(group: int) -> bool:
    """Return whether a group of processes has any."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_parallel_trainings_give_the_same_bytes(make_job, launch, tmp_path):
    outcomes = []
    for parallel in (1, 2):
        job = make_job(**ONE, seeds=2, parallel=parallel, output=str(tmp_path / str(parallel)))
        process = launch(job, is_warm=parallel == 1)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        outcomes.append(json.loads(printed.splitlines()[-1]))
    for name in ("test", "dev", "seeds", "rates"):
        assert outcomes[0][name] == outcomes[1][name], name
    for training in (*TRAININGS, TRAININGS[1].replace("rate-0.001", "seed-1")):
        weights = [(tmp_path / output / training / "ranker/model.safetensors").read_bytes() for output in "12"]
        assert weights[0] == weights[1], training


@pytest.mark.slow
def test_error_of_one_training_is_raised_after_the_others_ended(make_job, launch, out):
    settings = {"architectures": ["bert_dot", "colbert"], "conditions": ["teacher"], "parallel": 2}
    process = launch(make_job(**settings, overrides={"colbert": {"learning_rates": [1e30]}}))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: The loss of step" in errors, errors[-3000:]
    assert read_description(out / TRAININGS[1])["is_complete"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_parallel_trainings(make_job, launch, out, number):
    process = launch(make_job(**ONE, epochs=2_000, parallel=2))
    folders = [out / training / "ranker" for training in TRAININGS]
    until = time.monotonic() + 120
    while not all(list(folder.glob("checkpoint-*")) for folder in folders):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    while has_members(process.pid):  # the children end as well
        assert time.monotonic() < until
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert errors.count("the same command resumes") == 1
    assert all(list(folder.glob("checkpoint-*")) for folder in folders)


def test_plan_divides_the_time_of_parallel_trainings(make_job):
    plans = []
    for parallel in (1, 2):
        plans.append({cost.name: cost for cost in make_plan(make_job(**ONE, parallel=parallel))})
    for training in TRAININGS:
        assert plans[1][training].seconds < 0.8 * plans[0][training].seconds
    assert plans[0].keys() == plans[1].keys()
