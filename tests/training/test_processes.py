"""Two processes train and evaluate as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from warm_processes import run_ranks

import hf_kd_ranking as kd

pytestmark = pytest.mark.slow
# Eight rows per step on both. Only one run accumulates: a loss over the batch, or a batch on one topic,
# would be another one. Candidates are 21 pairs: one process scores them in two batches, the other in three.
# accelerate takes FSDP for GPUs only, so the script makes it believe in it; torch shards on the CPU as well.
SCRIPT = """
import json, os, sys
import datasets
import numpy as np
import hf_kd_ranking as kd
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import AutoTokenizer

models, toy, output, *runs = sys.argv[1:]
is_fsdp = output.endswith("fsdp")
processes = int(os.environ.get("WORLD_SIZE", 1))
if is_fsdp:
    prepared = AcceleratorState.__init__

    def prepare(self, *args, fsdp_plugin=None, **kwargs):
        prepared(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = prepare
queries, documents = kd.TextStore.from_tsv(f"{toy}/queries.tsv"), kd.TextStore.from_tsv(f"{toy}/collection.tsv")
rows = kd.load_teacher_scores(f"{toy}/scores.tsv")
tokenizer = AutoTokenizer.from_pretrained(f"{models}/bert_dot")


def train(name, run, accumulation=1, parts=None, **arguments):
    if run not in runs:
        return
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "ContextLayer" if name == "tk" else "BertLayer"
    trainer = kd.RankingTrainer(
        kd.load_ranker(f"{models}/{name}"),
        kd.RankingTrainingArguments(
            f"{output}/{run}",
            per_device_train_batch_size=8 // processes // accumulation,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=5,
            learning_rate=5e-3,
            optim="sgd",
            max_steps=20,
            logging_steps=10,
            save_strategy="no",
            teacher_scale="0.5",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        queries=queries,
        documents=documents,
        processing_class=tokenizer,
        **({"train_dataset": rows} | (parts or {})),
    )
    assert trainer.is_fsdp_enabled == is_fsdp
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return trainer


for name in ("bert_cat", "colbert", "prettr", "tk"):
    train(name, name)
candidates = dict(list(kd.read_run(f"{toy}/candidates.trec").items())[:3])
evaluator = kd.RerankingEvaluator(candidates, kd.read_qrels(f"{toy}/qrels.txt"), queries, documents, depth=7)
trainer = train(
    "bert_dot",
    "bert_dot",
    accumulation=1 if is_fsdp else processes,
    parts={"eval_dataset": rows.select(range(51, 64)), "evaluator": evaluator},
    eval_strategy="steps",
    eval_steps=10,
)
with open(f"{output}/rank{trainer.args.process_index}.json", "w") as file:
    json.dump(trainer.evaluate(), file)
teacher = kd.Ranker(kd.load_ranker(f"{models}/colbert"), tokenizer)
loss = "margin_mse:1,in_batch_margin_mse:0.75"
train("bert_dot", "in_batch", parts={"in_batch_teacher": teacher}, loss=loss)
cache = None if processes == 1 else 3
train("bert_dot", "cached", parts={"in_batch_teacher": teacher}, loss=loss, gradient_cache=cache)
lists = []
for place, row in enumerate(rows.rows):  # of two to four documents, so that the longest list is of one process
    more = [doc_id for doc_id in rows[(place + 7) % len(rows)]["doc_ids"] if doc_id not in row["doc_ids"]]
    more = more[: place % 3]
    scores = [*row["teacher_scores"], *range(len(more))]
    lists.append({"query_id": row["query_id"], "doc_ids": [*row["doc_ids"], *more], "teacher_scores": scores})
parts = {"in_batch_teacher": teacher, "train_dataset": datasets.Dataset.from_list(lists)}
train("bert_dot", "uneven", parts=parts, loss="in_batch_margin_mse")
train("bert_dot", "stream", parts={"train_dataset": rows.rows.to_iterable_dataset()})
train("bert_dot", "topics", parts={"query_clusters": np.arange(len(queries)) % 3})
PartialState().destroy_process_group()
"""
SETTINGS = {
    "bert_cat": {},
    "bert_dot": {},
    "colbert": {"compression_dim": 6},
    "prettr": {"join_layer_idx": 1},
    "tk": {"num_hidden_layers": 1, "intermediate_size": 32},
}
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
LAUNCH_FSDP = ("-m", "accelerate.commands.launch", "--config_file", CONFIGS / "fsdp.yaml", "--main_process_port", "0")
RUNS = {
    "ddp": (*SETTINGS, "in_batch", "cached", "uneven", "stream", "topics"),
    "fsdp": ("bert_dot", "prettr", "tk", "in_batch", "cached"),
}
EVERY_RUN = pytest.mark.parametrize(("way", "run_name"), [(way, run) for way, names in RUNS.items() for run in names])
SAME_ON_BOTH = (
    "loss", "grad_norm", "pairwise_agreement", "student_margin", "student_margin_std", "teacher_margin",
    "teacher_margin_std",
)  # fmt: skip
EVALUATED = ("eval_loss", "eval_pairwise_agreement", "eval_nDCG@10", "eval_RR@10")


@pytest.fixture(scope="module")
def models(encoder, tokenizer, tmp_path_factory) -> Path:
    """Folder of a checkpoint of each architecture, without dropout."""
    folder = tmp_path_factory.mktemp("models")
    for name, settings in SETTINGS.items():
        torch.manual_seed(1)
        model = kd.load_ranker(encoder, name, max_query_length=8, max_document_length=16, **settings)
        if name != "tk":
            model.config.encoder_config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        kd.Ranker(model, tokenizer).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def runs(models, toy, tmp_path_factory) -> Path:
    """Output folders of the script on one process, `one`, and on two, `ddp` and `fsdp`."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT)
    arguments = {output: [models, toy, folder / output, *RUNS.get(output, RUNS["ddp"])] for output in ("one", *RUNS)}
    run_ranks([folder / "script.py", *arguments["one"]], folder / "one-output", {}, count=1)
    run_ranks([folder / "script.py", *arguments["ddp"]], folder / "ddp-output", {})
    command = [sys.executable, *LAUNCH_FSDP, folder / "script.py", *arguments["fsdp"]]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@EVERY_RUN
def test_two_processes_log_the_figures_of_one(runs, way, run_name):
    states = [json.loads((runs / output / run_name / "trainer_state.json").read_text()) for output in ("one", way)]
    for name in SAME_ON_BOTH + (EVALUATED if run_name == "bert_dot" else ()):
        one, two = ([entry[name] for entry in state["log_history"] if name in entry] for state in states)
        assert len(one) == 2, f"{name} is not logged"
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name


@EVERY_RUN
def test_two_processes_end_with_the_parameters_of_one(runs, models, way, run_name):
    start = load_file(models / (run_name if run_name in SETTINGS else "bert_dot") / "model.safetensors")
    one, two = (load_file(runs / output / run_name / "model.safetensors") for output in ("one", way))
    assert difference(one, start) > 1e-3, "training moves the parameters"
    assert difference(two, one) <= 1e-5


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("way", RUNS)
def test_both_processes_get_the_same_metrics(runs, way):
    first, second = (json.loads((runs / way / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second


@pytest.mark.parametrize("run_name", RUNS["fsdp"])
def test_fsdp_checkpoint_has_the_files_and_config_of_one(runs, run_name):
    one, fsdp = (runs / output / run_name for output in ("one", "fsdp"))
    assert sorted(path.name for path in fsdp.iterdir()) == sorted(path.name for path in one.iterdir())
    assert json.loads((fsdp / "config.json").read_text()) == json.loads((one / "config.json").read_text())
