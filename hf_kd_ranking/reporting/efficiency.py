"""What a ranker costs: latency of a query, throughput, memory, bytes of the model and of a stored passage.

The protocol, which every result repeats: each query is ranked alone against the same candidates. Inside the timed
region are tokenising and encoding the query (`encode`), scoring all candidates and sorting them (`score`), each until
its numbers are in the CPU's memory, so that a GPU has finished. Where the architecture allows it, the candidates'
vectors were computed ahead and lie in memory in float32; otherwise tokenising and encoding them is part of `score`.
Not inside: loading, finding the candidates, reading their texts or vectors from disk. Rankers take turns query by
query, so that what else the machine does meets them alike; the first queries are warm-up.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..inference import score_stored
from ..models import ARCHITECTURES
from ..ranker import Ranker

PERCENTILES = (50, 95, 99)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_efficiency(
    rankers: Mapping[str, Callable[[], Ranker]], queries: Sequence[str], documents: Sequence[str], warm_up: int = 2
) -> dict[str, Any]:
    """Measure rankers side by side, see the module.

    Args:
        rankers: name -> what loads the ranker.
        queries: texts; one round of measuring each.
        documents: the candidates of every query; the paper has 1,000.
        warm_up: rounds that are not counted, of the first queries.

    Returns:
        `environment`, `protocol` and `rankers`: name -> `architecture`, `device`, `dtype`, `parameters`,
        `model_bytes`, `bytes_per_passage` (None where nothing is stored), `encode_ms` (None where the query is not
        encoded alone), `score_ms` and `total_ms` ({"p50", "p95", "p99", "mean"}), `passages_per_second` (encoding
        ahead; None likewise), `pairs_per_second` (scoring from text), `peak_process_mb` (beyond what the process had
        before) and `peak_cuda_mb` (None without).

    Raises:
        ValueError: if there is no ranker, query or document.
    """
    if not rankers or not queries or not documents:
        raise ValueError(
            f"Measuring needs rankers, queries and documents, got {len(rankers)}, {len(queries)} and {len(documents)}."
        )
    results, sides, times = {}, {}, {name: [] for name in rankers}
    for name, load in rankers.items():
        results[name], sides[name] = _prepare(load, queries, documents)
    rounds = [*(queries * warm_up)[:warm_up], *queries]
    for query in tqdm(rounds, desc="Timing", unit="query"):
        for name, (ranker, stored) in sides.items():
            times[name].append(_time_query(ranker, query, documents, stored))
    for name, of_ranker in times.items():
        encode, score = np.array(of_ranker[warm_up:]).T * 1000
        is_apart = results[name]["bytes_per_passage"] is not None
        results[name]["encode_ms"] = _percentiles(encode) if is_apart else None
        results[name] |= {"score_ms": _percentiles(score), "total_ms": _percentiles(encode + score)}
    protocol = {"queries": len(queries), "warm_up": warm_up, "candidates": len(documents)}
    protocol["stored"] = "vectors of the candidates in memory, float32, where bytes_per_passage is given"
    return {"environment": environment(), "protocol": protocol, "rankers": results}


def _prepare(load: Callable[[], Ranker], queries: Sequence[str], documents: Sequence[str]) -> tuple[dict, tuple]:
    """What is measured once of a ranker, and the ranker with its stored documents, or None."""
    before, stored = _start_of_peak(), None
    ranker = load()
    model, is_cuda = ranker.model, ranker.model.device.type == "cuda"
    facts = {
        "architecture": next(name for name, kind in ARCHITECTURES.items() if isinstance(model, kind)),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": ranker.batch_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "bytes_per_passage": None,
        "passages_per_second": None,
    }
    if model.config.is_storable:
        start = time.perf_counter()
        stored = ranker.encode_documents(documents)
        facts["passages_per_second"] = len(documents) / (time.perf_counter() - start)
        facts["bytes_per_passage"] = sum(vectors.nbytes for vectors in stored) / len(documents)
    start = time.perf_counter()
    ranker.score(queries[0], documents)
    facts["pairs_per_second"] = len(documents) / (time.perf_counter() - start)
    facts["peak_process_mb"] = peak_mb() - before
    facts["peak_cuda_mb"] = torch.cuda.max_memory_allocated(model.device) / 2**20 if is_cuda else None
    return facts, (ranker, stored)


def _time_query(
    ranker: Ranker, query: str, documents: Sequence[str], stored: Sequence[np.ndarray] | None
) -> tuple[float, float]:
    """Seconds of encoding and of scoring."""
    start = time.perf_counter()
    if stored is None:
        np.argsort(-ranker.score(query, documents), kind="stable")
        return 0.0, time.perf_counter() - start
    vectors = ranker.encode_queries([query])[0]
    encoded = time.perf_counter()
    np.argsort(-score_stored(ranker.model, vectors, stored, ranker.batch_size), kind="stable")
    return encoded - start, time.perf_counter() - encoded


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = {
        f"p{part}": float(value) for part, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
    return found | {"mean": float(values.mean())}


def _start_of_peak() -> float:
    """Begin a new peak of memory, and the resident MB at its start; where the system cannot, 0 and the old peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not os.access(CLEAR, os.W_OK):
        return 0.0
    CLEAR.write_text("5")
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """The process's resident MB at its peak."""
    if STATUS.is_file():
        return _status_mb("VmHWM")
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status_mb(name: str) -> float:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they change figures."""
    cpu = Path("/proc/cpuinfo")
    models = cpu.read_text().split("model name\t: ")[1:2] if cpu.is_file() else []
    return {
        **{name: _version(name) for name in ("hf_kd_ranking", "torch", "transformers", "numpy")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": models[0].splitlines()[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on the path
        return "not installed"


def efficiency_text(results: Mapping[str, Any]) -> str:
    """What `measure_efficiency` gives as a Markdown table; `times faster` is against the slowest ranker's median."""
    heads = ("ranker", "architecture", "total p50 ms", "p95", "p99", "encode p50", "score p50", "times faster")
    heads += ("passages/s", "pairs/s", "bytes/passage", "model MB", "peak MB", "peak CUDA MB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    slowest = max(of["total_ms"]["p50"] for of in results["rankers"].values())
    for name, of in results["rankers"].items():
        total, encode = of["total_ms"], of["encode_ms"] or {"p50": None}
        cells = [
            total["p50"],
            total["p95"],
            total["p99"],
            encode["p50"],
            of["score_ms"]["p50"],
            slowest / total["p50"],
        ]
        cells += [of["passages_per_second"], of["pairs_per_second"], of["bytes_per_passage"], of["model_bytes"] / 1e6]
        cells += [of["peak_process_mb"], of["peak_cuda_mb"]]
        texts = ["-" if cell is None else f"{cell:,.1f}" if cell < 1000 else f"{cell:,.0f}" for cell in cells]
        lines.append(f"| {' | '.join([name, of['architecture'], *texts])} |")
    facts = [f"{name} {value}" for part in ("protocol", "environment") for name, value in results[part].items()]
    return "\n".join([*lines, "", "; ".join(facts)])
