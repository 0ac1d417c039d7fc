"""A job of two launched processes delivers what one process delivers."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import locked

pytestmark = pytest.mark.slow
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def printed_result(printed: str) -> dict:
    """Return the line that the main process prints."""
    lines = [line for line in printed.splitlines() if line.startswith('{"chosen"')]
    assert len(lines) == 1, "one process prints"
    return json.loads(lines[0])


def finish(process: subprocess.Popen) -> str:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed


@pytest.mark.parametrize("purpose", ["rerank", "search"])
def test_two_processes_deliver_the_pipeline_of_one(make_job, fixed_encoder, launch, launch_ranks, tmp_path, purpose):
    # 24 and 28 lists in batches of 4: accelerate would fill a last batch that is not full with repeated rows.
    # No sums: of near ties between fitted weights rounding would decide.
    settings = {"model_name": str(fixed_encoder), "batch_size": 4, "purpose": purpose, "fusion": False}
    printed = [finish(launch(make_job(output=str(tmp_path / "one"), **settings)))]
    job = make_job(output=str(tmp_path / "two"), **settings)
    if purpose == "search":  # by torchrun, so that each process has hashes of its own
        printed.append(finish(launch(job, *TWO)))
    else:
        printed.append("".join(launch_ranks(job)))
    outcomes = [printed_result(lines) for lines in printed]
    one, two = outcomes
    assert two["chosen"] == one["chosen"]
    for architecture in ("bert_dot", "colbert"):
        weights = {}
        for condition in ("no_teacher", "teacher"):
            for outcome in outcomes:
                state = load_file(Path(outcome["folders"][f"{architecture} {condition}"], "model.safetensors"))
                # A key's bias changes no attention: its gradient is rounding, which Adam scales to a full step.
                parts = [state[key].flatten() for key in sorted(state) if not key.endswith("key.bias")]
                weights.setdefault(condition, []).append(torch.cat(parts))
        of_teacher = (weights["teacher"][0] - weights["no_teacher"][0]).abs().mean()
        for condition, (of_one, of_two) in weights.items():
            # Usually a millionth; a term whose two best matches are about equal may change sides by rounding.
            assert (of_one - of_two).abs().mean() < 0.1 * of_teacher, (architecture, condition)
    for name in one["test"]:
        if "untrained" in name or name in ("BM25", "teacher"):
            runs = [kd.read_run(tmp_path / output / f"report/runs/{name}.trec") for output in ("one", "two")]
            assert list(runs[1]) == list(runs[0])
            for query_id, ranking in runs[0].items():
                assert dict(runs[1][query_id]) == pytest.approx(dict(ranking), abs=1e-4), (name, query_id)
    pipelines = [kd.load_pipeline(outcome["folder"]) for outcome in outcomes]
    found = [pipeline.search("apple dog moon", k=5) for pipeline in pipelines]
    assert [score for _, score in found[1]] == pytest.approx([score for _, score in found[0]], rel=0.02)


def test_error_of_one_process_ends_all(make_job, launch, out):
    process = launch(make_job(architectures=["bert_dot"], budget_ms=1e-6), *TWO)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.count("error: No pipeline is within 1e-06 ms") == 1
    with locked(out):  # nothing holds the folder
        pass
