"""Train the same student on the same triples here and in sentence-transformers: effectiveness and time in one run.

    python examples/benchmarks/peers.py demo_output     # after `make demo`

Both start from the same weights and learn by Margin-MSE from the same scores, in the same number of steps of the same
size, at the same learning rate. RR@10 is of the demo's test candidates, and both are measured by the same code.
"""

import argparse
import time
from pathlib import Path

import datasets
import sentence_transformers as st
from recipes_data import TRAINING  # beside this script
from sentence_transformers.cross_encoder.losses import MarginMSELoss as CrossEncoderLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from transformers import PreTrainedTokenizerBase, set_seed

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows
from hf_kd_ranking.demo.backbone import find_backbone
from hf_kd_ranking.evaluation.metrics import evaluate_queries
from hf_kd_ranking.evaluation.rerank import RerankingEvaluator
from hf_kd_ranking.evaluation.significance import paired_t_test
from hf_kd_ranking.models import RankerModel
from hf_kd_ranking.ranker import load_tokenizer

LENGTHS = {"max_query_length": 20, "max_document_length": 48}
STUDENTS = {
    "bert_dot": {"layers": [0, 1, 5], "pooling": "mean"},
    "colbert": {"layers": [0, 1, 5], "compression_dim": 128, "query_augmentation": 0},
    "bert_cat": {},
}
LAYOUTS = {"bert_dot": "sentence-transformer", "colbert": "multi-vector", "bert_cat": "cross-encoder"}
PEERS = {
    "bert_dot": (
        st.SentenceTransformer,
        st.SentenceTransformerTrainer,
        st.SentenceTransformerTrainingArguments,
        MarginMSELoss,
    ),
    "colbert": (
        st.MultiVectorEncoder,
        st.MultiVectorEncoderTrainer,
        st.MultiVectorEncoderTrainingArguments,
        MultiVectorMarginMSELoss,
    ),
    "bert_cat": (
        st.CrossEncoder,
        st.CrossEncoderTrainer,
        st.CrossEncoderTrainingArguments,
        CrossEncoderLoss,
    ),
}
SETTINGS = TRAINING | {
    "learning_rate": 1.5e-4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "seed": 42,
}
del SETTINGS["overwrite"]  # sentence-transformers has no such option


def main() -> None:
    """Train and measure every architecture on both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output of `make demo`")
    parser.add_argument("--output", type=Path, default=Path("peers_output"))
    args = parser.parse_args()
    queries = kd.TextStore.from_tsv(args.demo / "queries.tsv")
    documents = kd.TextStore.from_tsv(args.demo / "collection" / "collection.tsv")
    qrels = kd.read_qrels(args.demo / "qrels.test.txt")
    candidates = kd.read_run(args.demo / "bm25_search" / "test" / "run.trec")
    evaluator = RerankingEvaluator(candidates, qrels, queries, documents, ("RR@10",))
    triples = first_pairs(kd.load_teacher_scores(args.demo / "lists" / "teacher" / "rows.jsonl"))
    print("| student | here | sentence-transformers | p | seconds here | seconds there |\n" + "| --- " * 6 + "|")
    for architecture, config in STUDENTS.items():
        folder = args.output / architecture
        set_seed(SETTINGS["seed"])
        model = kd.load_ranker(find_backbone(), architecture, **LENGTHS, **config)
        tokenizer = load_tokenizer(find_backbone())
        kd.Ranker(model, tokenizer).save_pretrained(folder / "start")
        kd.export_ranker(folder / "start", LAYOUTS[architecture], folder / "exported", overwrite=True)
        start = time.perf_counter()
        ours, scale = train_here(model, tokenizer, triples, queries, documents, folder / "here")
        middle = time.perf_counter()
        theirs = train_there(architecture, triples, scale, queries, documents, folder)
        end = time.perf_counter()
        values = []
        for ranker in (ours, theirs):
            values.append(evaluate_queries(evaluator.rerank(ranker), qrels, ("RR@10",))["RR@10"])
        means = [sum(of_side.values()) / len(of_side) for of_side in values]
        p_value = paired_t_test(*values)["p_value"]
        times = f"{middle - start:.0f} | {end - middle:.0f}"
        print(f"| {architecture} | {means[0]:.4f} | {means[1]:.4f} | {p_value:.2g} | {times} |", flush=True)


def first_pairs(rows: TeacherRows) -> datasets.Dataset:
    """Return the positive and the first negative of every list."""
    pairs = []
    for row in rows.rows:
        scores = row["teacher_scores"][:2]
        pairs.append({"query_id": row["query_id"], "doc_ids": row["doc_ids"][:2], "teacher_scores": scores})
    return datasets.Dataset.from_list(pairs)


def train_here(
    model: RankerModel,
    tokenizer: PreTrainedTokenizerBase,
    triples: datasets.Dataset,
    queries: kd.TextStore,
    documents: kd.TextStore,
    output: Path,
) -> tuple[kd.Ranker, float]:
    """Train with `RankingTrainer`, and return the ranker and the factor on the teacher's scores."""
    scale = "match" if model.config.is_storable else "8"
    args = kd.RankingTrainingArguments(str(output), loss="margin_mse", teacher_scale=scale, overwrite=True, **SETTINGS)
    texts = {"queries": queries, "documents": documents}
    trainer = kd.RankingTrainer(model, args, train_dataset=triples, processing_class=tokenizer, **texts)
    trainer.train()
    return trainer.ranker, trainer.teacher_scale


def train_there(
    architecture: str,
    triples: datasets.Dataset,
    scale: float,
    queries: kd.TextStore,
    documents: kd.TextStore,
    folder: Path,
) -> kd.Ranker:
    """Train with sentence-transformers, and return the result as a ranker."""
    model_class, trainer_class, arguments_class, loss_class = PEERS[architecture]
    rows = []
    for row in triples:
        positive, negative = documents[row["doc_ids"]]
        margin = (row["teacher_scores"][0] - row["teacher_scores"][1]) * scale
        rows.append({"query": queries[row["query_id"]], "positive": positive, "negative": negative, "label": margin})
    model = model_class(str(folder / "exported"), device="cpu")
    args = arguments_class(str(folder / "there"), **SETTINGS)
    dataset = datasets.Dataset.from_list(rows)
    trainer_class(model=model, args=args, train_dataset=dataset, loss=loss_class(model)).train()
    model.save_pretrained(str(folder / "trained"))
    return kd.Ranker.from_pretrained(folder / "trained", **LENGTHS)


if __name__ == "__main__":
    main()
