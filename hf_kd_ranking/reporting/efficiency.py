"""Efficiency of rankers: latency per query, throughput, memory, bytes of the model and of a stored passage.

The protocol, which every result repeats: each query is ranked separately against the same candidates. The timed region
contains tokenising and encoding the query (`encode`), and scoring and sorting all candidates (`score`); each ends when
its numbers are in the CPU's memory, and so after the work of a GPU. Where the architecture allows it, vectors of the
candidates were computed in advance and lie in memory in float32; otherwise tokenising and encoding them is part of
`score`. Loading, finding candidates, and reading their texts or vectors from disk are not timed. Rankers take turns
query by query, so that other load on the machine affects all of them; the first queries are a warm-up.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..inference import score_stored
from ..models import ARCHITECTURES
from ..ranker import Ranker

Stored = Sequence[np.ndarray] | None  # encoded documents; None where a ranker cannot store them
MEBIBYTE = 2**20
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CPU = Path("/proc/cpuinfo")
TABLE_HEADER = (
    "| ranker | architecture | total p50 ms | p95 | p99 | encode p50 | score p50 | times faster | passages/s "
    "| pairs/s | bytes/passage | model MB | peak MB | peak CUDA MB |"
)


def measure_efficiency(
    rankers: Mapping[str, Callable[[], Ranker]], queries: Sequence[str], documents: Sequence[str], warm_up: int = 2
) -> dict[str, Any]:
    """Measure rankers side by side; the module describes the protocol.

    Args:
        rankers: name -> function that loads the ranker.
        queries: texts; each is one round of measuring.
        documents: texts of the candidates of every query; the paper has 1,000.
        warm_up: number of rounds before, with the first queries, that are not counted.

    Returns:
        `environment`, `protocol` and `rankers`: name -> `architecture`, `device`, `dtype`, `batch_size`, `parameters`,
        `model_bytes`, `score_ms` and `total_ms` ({"p50", "p95", "p99", "mean"}), `pairs_per_second` (from text),
        `peak_process_mb` (more than the process had before), `peak_cuda_mb` (None on other devices), and, None where
        nothing is stored, `bytes_per_passage`, `encode_ms` (of the query) and `passages_per_second` (encoding).

    Raises:
        ValueError: if rankers, queries or documents are empty.
    """
    if not rankers or not queries or not documents:
        counts = f"{len(rankers)}, {len(queries)} and {len(documents)}"
        raise ValueError(f"Measuring needs rankers, queries and documents, got {counts}.")
    results, loaded = {}, {}
    for name, load in rankers.items():
        ranker, stored, results[name] = _load_and_measure(load, queries[0], documents)
        loaded[name] = (ranker, stored, [])
    for query in tqdm([*(queries * warm_up)[:warm_up], *queries], desc="Timing", unit="query"):
        for ranker, stored, seconds in loaded.values():
            seconds.append(_time_query(ranker, query, documents, stored))
    for name, (_, stored, seconds) in loaded.items():
        encode, score = np.array(seconds[warm_up:]).T * 1000
        results[name]["encode_ms"] = None if stored is None else _percentiles(encode)
        results[name]["score_ms"] = _percentiles(score)
        results[name]["total_ms"] = _percentiles(encode + score)
    protocol = {"queries": len(queries), "warm_up": warm_up, "candidates": len(documents)}
    protocol["stored"] = "vectors of the candidates in memory, float32, where bytes_per_passage is given"
    return {"environment": environment(), "protocol": protocol, "rankers": results}


def _load_and_measure(load: Callable[[], Ranker], query: str, documents: Sequence[str]) -> tuple[Ranker, Stored, dict]:
    """Return a ranker, its stored documents, and the figures that are measured once."""
    before = 0.0  # where the peak of memory cannot be reset, it is that of the whole process
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")
        before = _status_mb("VmRSS")
    ranker = load()
    model = ranker.model
    is_cuda = model.device.type == "cuda"
    names = {model_class.config_class.model_type: name for name, model_class in ARCHITECTURES.items()}
    figures = {
        "architecture": names[model.config.model_type],
        "device": torch.cuda.get_device_name(model.device) if is_cuda else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": ranker.batch_size,
        "parameters": model.num_parameters(),
        "model_bytes": model.get_memory_footprint(return_buffers=False),
        "bytes_per_passage": None,
        "passages_per_second": None,
    }
    stored = None
    if model.config.is_storable:
        start = time.perf_counter()
        stored = ranker.encode_documents(documents)
        figures["passages_per_second"] = len(documents) / (time.perf_counter() - start)
        figures["bytes_per_passage"] = sum(vectors.nbytes for vectors in stored) / len(documents)
    start = time.perf_counter()
    ranker.score(query, documents)
    figures["pairs_per_second"] = len(documents) / (time.perf_counter() - start)
    figures["peak_process_mb"] = peak_mb() - before
    figures["peak_cuda_mb"] = torch.cuda.max_memory_allocated(model.device) / MEBIBYTE if is_cuda else None
    return ranker, stored, figures


def _time_query(ranker: Ranker, query: str, documents: Sequence[str], stored: Stored) -> tuple[float, float]:
    """Return the seconds of encoding and of scoring."""
    start = time.perf_counter()
    if stored is None:
        np.argsort(-ranker.score(query, documents), kind="stable")
        return 0.0, time.perf_counter() - start
    vectors = ranker.encode_queries([query])[0]
    encoded = time.perf_counter()
    np.argsort(-score_stored(ranker.model, vectors, stored, ranker.batch_size), kind="stable")
    return encoded - start, time.perf_counter() - encoded


def _percentiles(values: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(values.mean())}


def peak_mb() -> float:
    """Return the peak of the process's resident memory in MB."""
    if STATUS.is_file():
        return _status_mb("VmHWM")
    unit = MEBIBYTE if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status_mb(name: str) -> float:
    return int(STATUS.read_text().partition(f"{name}:")[2].split()[0]) / 1024


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as far as they affect the figures."""
    versions = dict.fromkeys(("hf_kd_ranking", "torch", "transformers", "numpy"), "not installed")
    for name in versions:
        with suppress(PackageNotFoundError):  # a checkout that is only on the path
            versions[name] = version(name)
    processor = platform.processor()
    if CPU.is_file():
        processor = CPU.read_text().partition("model name\t: ")[2].partition("\n")[0] or processor
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def efficiency_text(results: Mapping[str, Any]) -> str:
    """Format a result of `measure_efficiency` as a Markdown table; `times faster` compares with the slowest median."""
    slowest = max(figures["total_ms"]["p50"] for figures in results["rankers"].values())
    lines = [TABLE_HEADER, "|---" * TABLE_HEADER.count(" |") + "|"]
    for name, figures in results["rankers"].items():
        total, encode = figures["total_ms"], figures["encode_ms"] or {}
        values = [total["p50"], total["p95"], total["p99"], encode.get("p50"), figures["score_ms"]["p50"]]
        values += [slowest / total["p50"], figures["passages_per_second"], figures["pairs_per_second"]]
        values += [figures["bytes_per_passage"], figures["model_bytes"] / 1e6, figures["peak_process_mb"]]
        cells = [name, figures["architecture"]]
        for value in [*values, figures["peak_cuda_mb"]]:
            cells.append("-" if value is None else f"{value:,.{int(value < 1000)}f}")
        lines.append(f"| {' | '.join(cells)} |")
    settings = results["protocol"] | results["environment"]
    return "\n".join([*lines, "", "; ".join(f"{name} {value}" for name, value in settings.items())])
