"""Prepare the data of `recipes.py`: two collections, BM25's candidates, and the scores of two teachers.

    python examples/benchmarks/recipes_data.py FOLDER --scifact DIR [--without-cross-encoders]

DIR is SciFact in BEIR's layout; PyDocs is that of the demo. The teachers are all-MiniLM-L6-v2 as it is, and the mean
of two BERT_CATs that are trained here on the labels of PyDocs, which only `recipes.py --part losses` needs. What is in
FOLDER is not made again. About 20 minutes on one CPU core with bfloat16.
"""

import argparse
import zlib
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from accelerate import Accelerator
from transformers import set_seed

import hf_kd_ranking as kd
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.demo.backbone import find_backbone
from hf_kd_ranking.demo.pydocs import build_pydocs
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.ranker import load_tokenizer

SPLITS = ("train", "dev", "test")
LENGTHS = {
    "pydocs": {"max_query_length": 20, "max_document_length": 48},
    "scifact": {"max_query_length": 32, "max_document_length": 96},
}
CANDIDATES, RERANKED = 50, 20
MOST_QUERIES = {"train": 6_000, "dev": 1_000, "test": 1_000}  # to search for
EVALUATED = 400
SCORED = {"bi_encoder": (2_800, CANDIDATES), "cross_encoders": (1_350, 16)}  # training queries, candidates of each
CROSS_ENCODERS = (("ranknet", 2, 4_000), ("info_nce", 4, 3_000))  # losses on the labels, documents per list, queries
DOCUMENTS_PER_STEP = 64
TRAINING = {  # of teachers and students
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "bf16": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "overwrite": True,
    "report_to": [],
    "disable_tqdm": True,
}


def main() -> None:
    """Make what is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scifact", type=Path, required=True, help="folder of SciFact in BEIR's layout")
    parser.add_argument("--without-cross-encoders", action="store_true", help="skip the teachers of --part losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build_pydocs(args.folder / "pydocs" / "collection")
    copy_scifact(args.scifact, args.folder / "scifact" / "collection")
    for name in LENGTHS:
        for split in SPLITS:
            search(args.folder / name, split)
    for name in LENGTHS:
        for split in SPLITS:
            score_by_vectors(args.folder / name, split)
    if not args.without_cross_encoders:
        for split in SPLITS:
            score_by_cross_encoders(args.folder / "pydocs", split)


def copy_scifact(source: Path, folder: Path) -> None:
    """Write SciFact as TSV; 100 training queries, chosen by a hash of their ids, are the validation queries."""
    if (folder / "qrels.test.txt").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in (("corpus", "collection.tsv"), ("queries", "queries.tsv")):
        with (folder / target).open("w", encoding="utf-8") as file:
            for text_id, text in kd.TextStore.from_jsonl(source / f"{name}.jsonl").items():
                file.write(f"{text_id}\t{' '.join(text.split())}\n")
    train = kd.read_qrels(source / "qrels" / "train.tsv")
    by_hash = sorted(train, key=lambda query_id: zlib.crc32(query_id.encode()))
    write_qrels({query_id: train[query_id] for query_id in by_hash[100:]}, folder / "qrels.train.txt")
    write_qrels({query_id: train[query_id] for query_id in by_hash[:100]}, folder / "qrels.dev.txt")
    write_qrels(kd.read_qrels(source / "qrels" / "test.tsv"), folder / "qrels.test.txt")


def search(folder: Path, split: str) -> None:
    """Write BM25's candidates; of validation and test queries those that have a relevant one."""
    path = folder / f"candidates.{split}.trec"
    if path.is_file():
        return
    collection = kd.load_collection(str(folder / "collection"), split)
    texts = {query_id: collection.queries[query_id] for query_id in list(collection.qrels)[: MOST_QUERIES[split]]}
    run = kd.BM25Index.build(collection.documents).search(texts, CANDIDATES)
    if split != "train":
        found = kd.Run()
        for query_id, ranking in run.top(RERANKED).items():
            if len(found) < EVALUATED and not collection.qrels[query_id].keys().isdisjoint(dict(ranking)):
                found[query_id] = ranking
        run = found
    kd.write_run(run, path)


def needed(teacher: str, folder: Path, split: str) -> kd.Run:
    """Return what a teacher scores: candidates, and the positives of training queries."""
    run = kd.read_run(folder / f"candidates.{split}.trec")
    if split == "train":
        queries, candidates = SCORED[teacher]
        qrels = kd.load_collection(str(folder / "collection"), split).qrels
        with_positives = kd.Run()
        for query_id, ranking in list(run.top(candidates).items())[:queries]:
            missing = sorted(qrels[query_id].keys() - dict(ranking).keys())
            with_positives[query_id] = [*ranking, *((doc_id, 0.0) for doc_id in missing)]
        return with_positives
    return run


def in_bfloat16(ranker: kd.Ranker) -> kd.Ranker:
    """Let a ranker compute in bfloat16, as training does."""
    ranker.model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(ranker.model, evaluation_mode=True)
    return ranker


def score_by_vectors(folder: Path, split: str) -> None:
    """Write the scores of all-MiniLM-L6-v2, which encodes each document once."""
    path = folder / f"bi_encoder.{split}.trec"
    if path.is_file():
        return
    collection = kd.load_collection(str(folder / "collection"), split)
    ranker = in_bfloat16(kd.Ranker.from_pretrained(find_backbone(), **LENGTHS[folder.name]))
    store = kd.VectorStore.build(ranker, collection.documents, folder / "vectors")
    kd.write_run(kd.StoredReranker(store).rerank(needed("bi_encoder", folder, split), collection.queries), path)


def score_by_cross_encoders(folder: Path, split: str) -> None:
    """Write the mean of BERT_CATs, each divided by its standard deviation within the queries."""
    path = folder / f"cross_encoders.{split}.trec"
    if path.is_file():
        return
    collection = kd.load_collection(str(folder / "collection"), split)
    run = needed("cross_encoders", folder, split)
    sums = {query_id: {} for query_id in run}
    for loss, documents, queries in CROSS_ENCODERS:
        ranker = cross_encoder(folder, loss, documents, queries)
        scored = rerank_run(ranker, run, collection.queries, collection.documents)
        deviation = fmean(np.var([score for _, score in ranking]) for ranking in scored.values()) ** 0.5
        for query_id, ranking in scored.items():
            for doc_id, score in ranking:
                sums[query_id][doc_id] = sums[query_id].get(doc_id, 0.0) + score / deviation
    mean = kd.Run()
    for query_id, scores in sums.items():
        mean[query_id] = sorted(scores.items(), key=lambda item: -item[1])
    kd.write_run(mean, path)


def cross_encoder(folder: Path, loss: str, documents: int, queries: int) -> kd.Ranker:
    """Train a BERT_CAT on labels, or open it."""
    output = folder / f"teacher-{loss}"
    if not (output / "config.json").is_file():
        collection = kd.load_collection(str(folder / "collection"), "train")
        run = kd.Run(list(kd.read_run(folder / "candidates.train.trec").top(RERANKED).items())[:queries])
        rows = kd.sample_triples(run, collection.qrels, documents=documents, seed=documents).rows
        rows = rows.add_column("teacher_scores", [[0.0] * len(doc_ids) for doc_ids in rows["doc_ids"]])  # not read
        set_seed(documents)
        model = kd.load_ranker(find_backbone(), "bert_cat", **LENGTHS[folder.name])
        args = kd.RankingTrainingArguments(
            str(folder / "training"),
            loss=loss,
            learning_rate=2e-4,
            head_learning_rate=1e-3,
            max_steps=queries * documents // DOCUMENTS_PER_STEP,
            per_device_train_batch_size=DOCUMENTS_PER_STEP // documents,
            seed=documents,
            **TRAINING,
        )
        trainer = kd.RankingTrainer(
            model,
            args,
            train_dataset=rows,
            queries=collection.queries,
            documents=collection.documents,
            processing_class=load_tokenizer(find_backbone()),
        )
        trainer.train()
        trainer.ranker.save_pretrained(output)
    return in_bfloat16(kd.Ranker.from_pretrained(output))


if __name__ == "__main__":
    main()
