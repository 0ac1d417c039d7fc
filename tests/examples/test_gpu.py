"""The benchmark of a GPU runs on a CPU, without the libraries that a borrowed machine may lack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, DistilBertConfig

from hf_kd_ranking.models import RankingProcessor
from hf_kd_ranking.ranker import load_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
MISSING = ("datasets", "evaluate", "ir_measures", "typer", "bm25s", "faiss", "sentence_transformers")
# An entry of None makes Python raise an ImportError, and find no module, as where the library is not installed.
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))
sys.path.insert(0, {folder!r})
sys.argv = ["gpu.py", "--smoke"]
runpy.run_path({folder!r} + "/gpu.py", run_name="__main__")
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(FOLDER)
    import gpu
    import gpu_sections
    import gpu_setup

    yield gpu, gpu_sections, gpu_setup


def test_gpu_benchmark_runs_without_datasets(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    command = [sys.executable, "-c", RUN.format(missing=MISSING, folder=str(FOLDER))]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(process.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    assert results["left_out"] == []
    sections = results["sections"]
    for case in sections.pop("trainer").values():
        assert "datasets" in case["skipped"]
    skipped = set()
    for section, cases in sections.items():
        for name, case in cases.items():
            assert "failed" not in case, name
            if "skipped" in case:
                skipped.add(f"{section} {name}")
    assert skipped and all(name.endswith(" peer") for name in skipped)
    for architecture in ("bert_dot", "bert_cat", "colbert", "prettr", "tk"):
        assert sections["equality"][architecture]["is_equal"]
        assert sections["training"][f"tiny {architecture} 4"]["model_tflops_per_second"] > 0
        assert sections["scoring"][f"tiny {architecture}"]["pairs_per_second"] > 0
    assert set(sections["in_batch"]) == {"bert_dot", "colbert", "tk"}


@pytest.mark.parametrize("architecture", ["bert_dot", "bert_cat", "colbert", "prettr", "tk"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_forward_flops_are_those_that_torch_counts(benchmark, tmp_path, architecture, kind):
    _, sections, setup = benchmark
    config = DistilBertConfig(vocab_size=400, dim=16, n_layers=3, n_heads=2, hidden_dim=48)
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
        config = BertConfig(vocab_size=400, **sizes)
    setup.write_encoder(tmp_path, config)
    model = sections.load(tmp_path, architecture)
    processor = RankingProcessor.from_config(load_tokenizer(tmp_path), model.config)
    features = processor(["a b c"], ["a b c d e f", "f e d c b a"])  # of one length: nothing is padded
    # The fused attention of CPUs is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**features)
    assert setup.forward_flops(model, features) == counter.get_total_flops()


def test_gpu_benchmark_goes_on_after_a_case_out_of_memory(benchmark):
    gpu, _, _ = benchmark

    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert gpu.attempt(run) == {"out_of_memory": True}


def test_gpu_benchmark_names_cases_beyond_the_time(run_example):
    with pytest.raises(SystemExit) as exit_:
        run_example("benchmarks/gpu.py", "--smoke", "--scale", 0, "--sections", "equality")
    assert exit_.value.code == 0


def test_gpu_benchmark_measures_sentence_transformers(benchmark, tmp_path):
    pytest.importorskip("sentence_transformers")
    gpu, sections, setup = benchmark
    bench = setup.build_bench(tmp_path, is_smoke=True, model=None)
    cases = {}
    for section in (sections.training, sections.scoring, sections.encoding):
        results = {}
        for name, run in section(bench):
            if name.endswith("peer"):
                results[name] = run()
                measured = results[name].items()
                results[name.removesuffix(" peer")] = {measure: 3 * value for measure, value in measured}
        cases[section.__name__] = results
    ratios = gpu.ratios(cases)
    assert len(ratios) == 6 and all(ratio == pytest.approx(3) for ratio in ratios.values())
