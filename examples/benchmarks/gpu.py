"""Measure what a GPU does with this package, in at most 8 minutes: speed, utilisation, memory, equality with the CPU.

    python examples/benchmarks/gpu.py [--model FOLDER] [--sections equality training ...] [--scale 1.0]

A plain checkout is enough: torch, transformers 5.17 or newer, accelerate, numpy and pyarrow. What needs other
libraries is skipped if they are missing, and named: `RankingTrainer` needs datasets, the comparison needs
sentence-transformers. Training is therefore a plain loop over collator, ranker and loss, with bfloat16 autocast and
AdamW; the section `trainer` repeats a case with `RankingTrainer`. A pair of training is a positive and a negative of
one query. Encoders of MiniLM's and DistilBERT's size have random weights, texts are random words with the lengths of
MS MARCO's texts; `--model` takes an encoder with its weights instead.

Sections have time limits; cases beyond them are named as left out. A case that runs out of memory says so, and
the next one starts. Each case prints a line, and the last line is one JSON object; after each section it is also
written to `gpu.json` in the folder named by the environment variable OUT. The exit status is 1 if a case failed, or if
scores or gradients differ from those of the CPU.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import gpu_sections
import numpy as np
import torch
import transformers
from gpu_setup import Bench, build_bench, output_file, peak_flops

# Section -> its seconds; 450 in all.
SECTIONS = {"equality": 40, "training": 180, "in_batch": 20, "scoring": 65, "encoding": 65, "data": 50, "trainer": 30}


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of an encoder with its tokenizer; random ones if left out")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the time limits of the sections")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try the script on a CPU")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = build_bench(Path(folder), args.smoke, args.model)
        results = {"environment": describe(bench), "sections": {}, "left_out": []}
        print(json.dumps(results["environment"]), flush=True)
        for section in args.sections:
            run_section(section, SECTIONS[section] * args.scale, bench, results)
            results["over_sentence_transformers"] = ratios(results["sections"])
            write(results)
    if results["left_out"]:
        print("left out for lack of time:", ", ".join(results["left_out"]))
    print(json.dumps(results))
    sys.exit(int(is_wrong(results["sections"])))


def describe(bench: Bench) -> dict[str, object]:
    """Return device, versions and sizes."""
    name = platform.processor() or platform.machine()
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["transformers"] = transformers.__version__
    return {"device": name, "peak_flops": peak_flops(bench.device), "versions": versions, "sizes": vars(bench.sizes)}


def run_section(section: str, seconds: float, bench: Bench, results: dict) -> None:
    """Run the cases of a section until its time is over, and keep their results."""
    end = time.monotonic() + seconds
    cases = results["sections"][section] = {}
    for name, run in getattr(gpu_sections, section)(bench):
        if time.monotonic() > end:
            results["left_out"].append(f"{section}: {name}")
            continue
        start = time.monotonic()
        cases[name] = attempt(run)
        cases[name]["case_seconds"] = time.monotonic() - start
        print(f"{section}: {name}:", json.dumps(rounded(cases[name])), flush=True)


def attempt(run: Callable[[], dict]) -> dict:
    """Return the result of a case, or why it has none: the other cases are still worth their time."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except ImportError as error:
        return {"skipped": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def rounded(result: dict) -> dict:
    """Return a result with four significant digits, for reading."""
    short = {}
    for name, value in result.items():
        short[name] = float(f"{value:.4g}") if isinstance(value, float) else value
    return short


def ratios(sections: dict[str, dict]) -> dict[str, float]:
    """Return our rate over sentence-transformers' of all cases that both have."""
    found = {}
    for section, cases in sections.items():
        for name, ours in cases.items():
            theirs = cases.get(f"{name} peer", {})
            shared = [measure for measure in ours if measure in theirs and measure.endswith("_per_second")]
            for measure in shared:
                found[f"{section}: {name}"] = ours[measure] / theirs[measure]
    return found


def is_wrong(sections: dict[str, dict]) -> bool:
    """Return whether a case failed or differs from the CPU."""
    for cases in sections.values():
        for result in cases.values():
            if "failed" in result or not result.get("is_equal", True):
                return True
    return False


def write(results: dict) -> None:
    """Write what is known so far into the folder for output, if there is one."""
    path = output_file()
    if path is not None:
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
