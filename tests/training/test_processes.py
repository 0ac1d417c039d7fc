"""Two processes train and evaluate as one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_kd_ranking as kd

pytestmark = pytest.mark.slow
# Eight rows a step on both, on two processes in four batches of two. The training rows fill their batches (accelerate
# would fill a smaller last one with rows from the start); held-out rows and candidates do not.
SCRIPT = """
import json, sys
import hf_kd_ranking as kd
from transformers import AutoTokenizer

model, toy, output, batch_size, accumulation = sys.argv[1:]
queries, documents = kd.TextStore.from_tsv(f"{toy}/queries.tsv"), kd.TextStore.from_tsv(f"{toy}/collection.tsv")
rows = kd.load_teacher_scores(f"{toy}/scores.tsv")
trainer = kd.RankingTrainer(
    kd.load_ranker(model),
    kd.RankingTrainingArguments(
        output,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        optim="sgd",
        num_train_epochs=1,
        eval_strategy="steps",
        eval_steps=4,
        logging_steps=4,
        save_strategy="no",
        teacher_scale="0.5",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=rows,
    eval_dataset=rows.select(range(51, 64)),
    queries=queries,
    documents=documents,
    evaluator=kd.RerankingEvaluator(
        kd.read_run(f"{toy}/candidates.trec"), kd.read_qrels(f"{toy}/qrels.txt"), queries, documents, depth=7
    ),
    processing_class=AutoTokenizer.from_pretrained(model),
)
trainer.train()
trainer.save_model()
trainer.save_state()
with open(f"{output}/rank{trainer.args.process_index}.json", "w") as file:
    json.dump(trainer.evaluate(), file)
"""
SAME_ON_BOTH = (
    "eval_loss", "eval_pairwise_agreement", "eval_nDCG@10", "eval_RR@10", "loss", "grad_norm", "pairwise_agreement",
    "student_margin", "student_margin_std", "teacher_margin", "teacher_margin_std",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(encoder, tokenizer, toy, tmp_path_factory) -> tuple[Path, Path]:
    """Output folders of the script on one and on two processes."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(1)
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    model.config.encoder_config.hidden_dropout_prob = model.config.encoder_config.attention_probs_dropout_prob = 0.0
    kd.Ranker(model, tokenizer).save_pretrained(folder / "model")
    (folder / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for output, launcher, batches in (("1", [], ("8", "1")), ("2", launch, ("2", "2"))):
        arguments = [folder / "script.py", folder / "model", toy, folder / output, *batches]
        command = [sys.executable, *launcher, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder / "1", folder / "2"


def test_two_processes_log_the_figures_of_one(runs):
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in runs]
    for name in SAME_ON_BOTH:
        one, two = ([entry[name] for entry in history if name in entry] for history in histories)
        assert one, f"{name} is not logged"
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
    figures = [entry["eval_loss"] for entry in histories[0] if "eval_loss" in entry]
    assert len(set(figures)) == len(figures) == 2, "training moves the figures"


def test_two_processes_end_with_the_parameters_of_one(runs):
    one, two = (load_file(folder / "model.safetensors") for folder in runs)
    assert all(torch.allclose(two[name], one[name], rtol=0, atol=1e-5) for name in one)


def test_both_processes_get_the_same_metrics(runs):
    first, second = (json.loads((runs[1] / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
