"""The folder in which documented commands and examples run: toy data and tiny models under the names that they use."""

import json
import random
import shutil
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_kd_ranking as kd
from hf_kd_ranking.hub.manifest import write_manifest
from hf_kd_ranking.hub.model_card import write_model_card
from hf_kd_ranking.searcher import Pipeline, save_pipeline

ROOT = Path(__file__).parents[1]
ENCODER = "distilbert/distilbert-base-uncased"
# Architecture -> the names of its rankers. A folder with the name of a model on the Hub is loaded in its place.
RANKERS = {
    "bert_cat": "bert_cat my_ranker teacher sebastian-hofstaetter/distilbert-cat-margin_mse-T2-msmarco",
    "bert_dot": "bert_dot reproduce/pydocs/all-MiniLM-L6-v2 "
    "sebastian-hofstaetter/distilbert-dot-margin_mse-T2-msmarco "
    "sebastian-hofstaetter/distilbert-dot-tas_b-b256-msmarco",
    "colbert": "colbert ranker models/colbert sebastian-hofstaetter/colbert-distilbert-margin_mse-T2-msmarco",
    "prettr": "prettr sebastian-hofstaetter/prettr-distilbert-split_at_3-margin_mse-T2-msmarco",
    "splade": "splade",
}
CLASSIFIERS = ["BAAI/bge-reranker-base", "cross-encoder/ms-marco-MiniLM-L6-v2"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
COUNT = 40  # documents, and queries
# Other names of the files.
COPIES = {
    "bert_cat_ensemble_msmarcopassage_train_scores_ids.tsv": "scores.tsv",
    "qrels.dev.txt": "qrels.txt",
    "reproduce/pydocs/collection/collection.tsv": "collection.tsv",
    "reproduce/pydocs/queries.tsv": "queries.tsv",
    "train.tsv": "queries.tsv",
    "train.txt": "qrels.txt",
}


def make_workplace(folder: Path, tokenizer: PreTrainedTokenizerBase, words: list[str]) -> None:
    """Write the files and models into a folder."""
    write_data(folder, words)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **SIZES)  # it reads 512 tokens
    encoder = BertModel(config)
    for name in (ENCODER, "encoder", "distilbert-base-uncased"):
        save(encoder, tokenizer, folder / name)
    classifier = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES))
    for name in CLASSIFIERS:
        save(classifier, tokenizer, folder / name)
    for architecture, names in RANKERS.items():
        settings = {"compression_dim": 128} if architecture == "colbert" else {}
        model = kd.load_ranker(folder / ENCODER, architecture, **settings)
        if architecture == "splade":  # whose fresh head weighs no word of so small a vocabulary
            torch.nn.init.zeros_(model._expansion_head.bias)
        for name in names.split():
            kd.Ranker(model, tokenizer).save_pretrained(folder / name)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    generator = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, eos_token_id=3))
    save(generator, tokenizer, folder / "doc2query/msmarco-t5-base-v1")
    write_runs(folder)
    write_training_run(folder / "tk_run", len(tokenizer))
    (folder / "examples").symlink_to(ROOT / "examples")


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, words: list[str]) -> None:
    """Write documents, queries of words of one document each, judgments, teacher rows, a suite, a template."""
    rng = random.Random(0)
    lines = {"collection.tsv": [], "corpus.jsonl": [], "queries.tsv": [], "qrels.txt": [], "triples.tsv": []}
    for number in range(COUNT):
        text = rng.choices(words, k=8)
        query, other = " ".join(rng.sample(text, 3)), (number + 1) % COUNT
        document = {"_id": str(number), "title": f"{query} {words[number % len(words)]}", "text": " ".join(text)}
        lines["collection.tsv"].append(f"{number}\t{document['text']}\n")
        lines["corpus.jsonl"].append(json.dumps(document) + "\n")
        lines["queries.tsv"].append(f"{100 + number}\t{query}\n")
        lines["qrels.txt"].append(f"{100 + number} 0 {number} 1\n")
        lines["triples.tsv"].append(f"{100 + number}\t{number}\t{other}\n")
    lines["scores.tsv"] = [f"{rng.gauss(2, 2)}\t{rng.gauss(0, 2)}\t{row}" for row in lines["triples.tsv"]]
    lines["other.tsv"] = [f"{rng.gauss(2, 2)}\t{rng.gauss(0, 2)}\t{row}" for row in lines["triples.tsv"]]
    lines["glove.6B.300d.txt"] = []
    for word in words:
        lines["glove.6B.300d.txt"].append(f"{word} {' '.join(f'{rng.gauss(0, 1):.3f}' for _ in range(8))}\n")
    lines["prompt.txt"] = ["Query: {query}\n\nDocument: {document}\n\nAnswer:"]
    lines["query_prompt.txt"] = ["Write {count} queries.\n\nDocument: {document}"]
    for name in ("gpt.jsonl", "zephyr.jsonl"):
        lines[name] = [order(100 + number, rng.sample(range(COUNT), 5)) for number in range(COUNT)]
    for name, of_file in lines.items():
        (folder / name).write_text("".join(of_file))
    for target, source in COPIES.items():
        copy(folder / source, folder / target)
    for place, split in enumerate(("dev", "test", "train")):
        (folder / f"reproduce/pydocs/qrels.{split}.txt").write_text("".join(lines["qrels.txt"][place::3]))
    for name in ("scifact", "nfcorpus"):
        for source in ("collection.tsv", "queries.tsv", "qrels.txt"):
            copy(folder / source, folder / "beir_folders" / name / source)


def order(query_id: int, doc_ids: list[int]) -> str:
    """Return the order of a query as RankLLM writes it."""
    candidates = [{"docid": str(doc_id), "score": float(place)} for place, doc_id in enumerate(doc_ids)]
    return json.dumps({"query": {"text": "a", "qid": str(query_id)}, "candidates": candidates}) + "\n"


def write_runs(folder: Path) -> None:
    """Write two runs, their folder of results, and what `push` needs: a trained ranker, a pipeline, its latency."""
    documents = kd.TextStore.from_tsv(folder / "collection.tsv")
    queries = dict(kd.TextStore.from_tsv(folder / "queries.tsv").items())
    bm25 = kd.BM25Index.build(documents)
    runs = {"bm25": bm25.search(queries, 20), "dense": kd.Run()}
    for query_id, ranking in runs["bm25"].items():
        runs["dense"][query_id] = [(doc_id, -score) for doc_id, score in ranking]
    for name, run in runs.items():
        (folder / "results" / "runs").mkdir(parents=True, exist_ok=True)
        kd.write_run(run, folder / f"{name}.trec")
        copy(folder / f"{name}.trec", folder / "results" / "runs" / f"{name}.trec")
    copy(folder / "bm25.trec", folder / "bm25.dev.trec")
    copy(folder / "qrels.txt", folder / "results" / "qrels.txt")
    ranker = kd.Ranker.from_pretrained(folder / "bert_dot")
    write_manifest(folder / "bert_dot", kd.RankingTrainingArguments("bert_dot").to_dict(), 7, {"after": {}}, {})
    write_model_card(folder / "bert_dot")
    latency = kd.measure_efficiency({"bert_dot": lambda: ranker}, ["apple bread"], ["king", "queen"], warm_up=0)
    (folder / "results" / "efficiency.json").write_text(json.dumps(latency))
    save_pipeline(folder / "best", Pipeline(documents, bm25, ranker, depth=10), folder / "bert_dot")
    shutil.copytree(folder / "best", folder / "distilled" / "best")


def write_training_run(folder: Path, vocabulary: int) -> None:
    """Write a TK as the authors' code does."""
    sizes = {"hidden_size": 30, "num_attention_heads": 10, "intermediate_size": 300}
    model = kd.TK(kd.TKConfig(vocab_size=vocabulary, max_position_embeddings=200, **sizes))
    copy(ROOT / "tests" / "golden" / "tk" / "config.yaml", folder / "config.yaml")
    torch.save(model.state_dict(), folder / "best-model.pytorch-state-dict")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
