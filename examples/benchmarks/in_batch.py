"""Measure the losses over a batch: time and memory of all pairs, and of a training step with a gradient cache.

    python examples/benchmarks/in_batch.py [--repetitions 3] [--former FOLDER]

All pairs: forward and backward pass of the scores of B queries with all documents of a batch, two per query, from
random vectors of published sizes: 38 query tokens and 200 document tokens, half of them padding. `score_all_pairs` is
compared with documents that are expanded to every query, (B, N, ...), at a batch size at which that fits in memory,
and with the `score_all_pairs` of another version, if `--former` is a checkout of it.

Gradient cache: forward and backward pass of a ColBERT on a random encoder of MiniLM's size, 64 queries, 8 at once.

Each figure is the best of some repetitions, in a process of its own with one thread: processor time, and the peak of
resident memory above what the process had before (from /proc, on Linux). The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig

import hf_kd_ranking as kd

QUERY_LENGTH, DOCUMENT_LENGTH, DOCUMENTS = 38, 200, 2
# Batch sizes of the expanded documents, and of the comparison with another version.
EXPANDED = {"bert_dot": 128, "colbert": 16, "tk": 8}
COMPARED = {"bert_dot": 128, "colbert": 128, "tk": 32}
GIB = 2**30


def main() -> None:
    """Measure every case in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--former", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        architecture, way, batch = args.measure
        print(json.dumps(measure(architecture, way, int(batch))))
        return
    results = []
    for architecture, small in EXPANDED.items():
        sizes = sorted({small, COMPARED[architecture], 128})
        cases = [("expanded", small, None)] + [("pairs", size, None) for size in sizes]
        if args.former is not None:
            cases.append(("pairs", COMPARED[architecture], args.former))
        results += run_cases(architecture, cases, args.repetitions)
    results += run_cases("colbert", [("step", 64, None), ("cached_step", 64, None)], args.repetitions)
    print(json.dumps({"threads": 1, "torch": torch.__version__, "cases": results}))


def run_cases(architecture: str, cases: list[tuple[str, int, Path | None]], repetitions: int) -> list[dict]:
    """Measure some cases in turn, and return the best figures of each."""
    best: dict[tuple, dict] = {}
    for _ in range(repetitions):
        for case in cases:
            way, batch, folder = case
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if folder is not None:
                environment["PYTHONPATH"] = str(folder)
            command = [sys.executable, __file__, "--measure", architecture, way, str(batch)]
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            if result.returncode:
                sys.exit(result.stderr)
            figures = json.loads(result.stdout.splitlines()[-1])
            for name, value in best.get(case, figures).items():
                figures[name] = min(figures[name], value)
            best[case] = figures
    rows = []
    for (way, batch, folder), figures in best.items():
        version = "this" if folder is None else "former"
        rows.append({"architecture": architecture, "way": way, "batch": batch, "version": version, **figures})
        print(
            f"{architecture:9} {way:12} {batch:4} {version:7} {figures['seconds']:8.3f} s {figures['gib']:7.3f} GiB",
            flush=True,
        )
    return rows


def measure(architecture: str, way: str, batch: int) -> dict[str, float]:
    """Return time and peak memory of one forward and one backward pass."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    if architecture == "tk":
        model = kd.TK(kd.TKConfig(vocab_size=10))
    elif architecture == "colbert":
        model = kd.ColBERT(kd.ColBERTConfig(encoder_config=BertConfig(**sizes).to_dict()))
    else:
        model = kd.BertDot(kd.BertDotConfig(encoder_config=BertConfig(**sizes).to_dict()))
    if way.endswith("step"):
        if way == "cached_step":
            model.train().rows_at_once = 8
        texts = {}
        for side, shape in (("query", (batch, QUERY_LENGTH)), ("document", (batch, DOCUMENTS, DOCUMENT_LENGTH))):
            texts[side] = {"input_ids": torch.randint(1000, 30_000, shape), "attention_mask": random_mask(*shape)}

        def run() -> None:
            output = model(**texts)
            documents, masks = output.document_vectors.flatten(0, 1), output.document_mask.flatten(0, 1)
            scores = model.score_all_pairs(output.query_vectors, documents, output.query_mask, masks)
            scores.square().mean().backward()

    else:
        run = all_pairs(model, way, batch)
    return {"gib": round(peak_memory(run) / GIB, 3), "seconds": round(seconds(run), 3)}


def all_pairs(model: kd.BertDot | kd.ColBERT | kd.TK, way: str, batch: int):
    """Return a function that scores all pairs of random vectors and computes the gradients."""
    width = 768
    if model.config.model_type == "TK":
        width = model.config.hidden_size
    documents = DOCUMENTS * batch
    if model.config.vectors_per_text == "one":
        query, document, masks = torch.randn(batch, width), torch.randn(documents, width), (None, None)
    else:
        query = torch.randn(batch, QUERY_LENGTH, width)
        document = torch.randn(documents, DOCUMENT_LENGTH, width)
        masks = random_mask(batch, QUERY_LENGTH), random_mask(documents, DOCUMENT_LENGTH)
    query.requires_grad_()
    document.requires_grad_()

    def run() -> None:
        query.grad = document.grad = None
        if way == "pairs":
            scores = model.score_all_pairs(query, document, *masks)
        else:
            wide = document.expand(batch, *document.shape)
            wide_mask = None if masks[1] is None else masks[1].expand(batch, *masks[1].shape)
            scores = model.score_vectors(query, wide, masks[0], wide_mask)
        scores.square().mean().backward()

    return run


def random_mask(*shape: int) -> torch.Tensor:
    """Return masks of texts of random length, the longest filled."""
    lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1))
    lengths.view(-1)[0] = shape[-1]
    return torch.arange(shape[-1]) < lengths


def peak_memory(run) -> float:
    """Return the peak of resident memory above that before the call, in bytes."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    run()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Return a figure of the process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def seconds(run) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
