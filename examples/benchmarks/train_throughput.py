"""Measure training throughput: triples per second of this package, sentence-transformers and the bare backbone.

    python examples/benchmarks/train_throughput.py --model MODEL --collection collection.tsv --queries queries.tsv \
        --scores scores.tsv [--triples 192] [--repetitions 3] [--architectures bert_dot bert_cat colbert prettr tk]

All train the same triples with Margin-MSE and AdamW in float32, batches of 16, queries cut to 30 tokens and passages
to 200. `limit` is the physical one: forward and backward pass and AdamW of the bare backbone on exactly the real
tokens, sorted by length, as many per step as 16 triples have; for PreTTR and TK, which run their backbone by
themselves, it is the ranker on triples sorted by length. The first step of each is not counted. The three take turns,
`--repetitions` times. Prints a line per architecture, and as its last line one JSON object: the medians of the rates,
and the median, the smallest and the largest ratio of a turn.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from statistics import median

import datasets
import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows
from hf_kd_ranking.models import RankingProcessor

BATCH = 16
ARCHITECTURES = ["bert_dot", "bert_cat", "colbert", "prettr", "tk"]


class Clock(TrainerCallback):
    """The time at which each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Keep the time."""
        self.times.append(time.perf_counter())

    def triples_per_second(self) -> float:
        """Return the throughput of all steps but the first."""
        return BATCH * (len(self.times) - 1) / (self.times[-1] - self.times[0])


def main() -> None:
    """Measure each architecture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "collection", "queries", "scores"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--triples", type=int, default=192)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    queries, documents = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    rows = kd.load_teacher_scores(args.scores).select(range(args.triples))
    texts = {"query": [], "positive": [], "negative": [], "label": []}
    for row in rows.rows:
        texts["query"].append(queries[row["query_id"]])
        texts["positive"].append(documents[row["doc_ids"][0]])
        texts["negative"].append(documents[row["doc_ids"][1]])
        texts["label"].append(row["teacher_scores"][0] - row["teacher_scores"][1])
    results = {}
    for architecture in args.architectures:
        turns = []
        for _ in range(args.repetitions):
            speed = {"ours": train_ours(args.model, architecture, rows, queries, documents)}
            speed["limit"] = measure_limit(args.model, architecture, texts)
            if architecture in ("bert_dot", "bert_cat", "colbert"):
                speed["sentence_transformers"] = train_theirs(args.model, architecture, texts)
            turns.append(speed)
        results[architecture] = summarize(turns)
        print(architecture, json.dumps(results[architecture]), flush=True)
    print(json.dumps(results))


def summarize(turns: list[dict[str, float]]) -> dict[str, dict]:
    """Return the medians of the rates, and of our rate over each other one its median, smallest and largest."""
    summary = {"triples_per_second": {name: median(turn[name] for turn in turns) for name in turns[0]}}
    for name in turns[0]:
        if name != "ours":
            ratios = [turn["ours"] / turn[name] for turn in turns]
            summary[f"over_{name}"] = {"median": median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    return summary


def settings() -> dict:
    """Return the training arguments of both libraries."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1000,
        "num_train_epochs": 1,
    }


def train_ours(
    model: str, architecture: str, rows: TeacherRows, queries: kd.TextStore, documents: kd.TextStore
) -> float:
    """Return triples per second of `RankingTrainer`."""
    clock = Clock()
    trainer = kd.RankingTrainer(
        kd.load_ranker(model, architecture),
        kd.RankingTrainingArguments(**settings()),
        train_dataset=rows,
        queries=queries,
        documents=documents,
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.train()
    return clock.triples_per_second()


def train_theirs(model: str, architecture: str, texts: dict[str, list]) -> float:
    """Return triples per second of sentence-transformers' trainer with its Margin-MSE."""
    import sentence_transformers as st
    from sentence_transformers import cross_encoder, sentence_transformer
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss

    if architecture == "bert_dot":
        student, loss = st.SentenceTransformer(model, device="cpu"), sentence_transformer.losses.MarginMSELoss
        student.max_seq_length = 200
        trainer, arguments = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    elif architecture == "bert_cat":
        student = st.CrossEncoder(model, num_labels=1, max_length=230, device="cpu")
        loss = cross_encoder.losses.MarginMSELoss
        trainer, arguments = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
    else:
        student, loss = st.MultiVectorEncoder(model, device="cpu"), MultiVectorMarginMSELoss
        trainer, arguments = st.MultiVectorEncoderTrainer, st.MultiVectorEncoderTrainingArguments
    clock, data = Clock(), datasets.Dataset.from_dict(texts)
    args = arguments(**settings())
    trainer(model=student, args=args, train_dataset=data, loss=loss(student), callbacks=[clock]).train()
    return clock.triples_per_second()


def measure_limit(model: str, architecture: str, texts: dict[str, list]) -> float:
    """Return triples per second of the bare backbone (PreTTR, TK: of the ranker) on batches sorted by length."""
    tokenizer, count = AutoTokenizer.from_pretrained(model), len(texts["query"])
    triples = list(zip(texts["query"], texts["positive"], texts["negative"], strict=True))
    if architecture in ("prettr", "tk"):
        ranker = kd.load_ranker(model, architecture).train()
        processor = RankingProcessor.from_config(tokenizer, ranker.config)
        triples.sort(key=lambda triple: len(triple[1]) + len(triple[2]))
        batches = []
        for start in range(0, count, BATCH):
            queries, positives, negatives = zip(*triples[start : start + BATCH], strict=True)
            documents = [text for pair in zip(positives, negatives, strict=True) for text in pair]
            batches.append(processor(list(queries), documents))
        return count * passes_per_second(ranker, batches, lambda batch: ranker(**batch).scores)
    sequences = []
    for query, positive, negative in triples:
        if architecture == "bert_cat":
            for document in (positive, negative):
                sequences.append(tokenizer(query, document, truncation=True, max_length=230)["input_ids"])
            continue
        added = [tokenizer.mask_token_id] * 8 if architecture == "colbert" else []
        sequences.append(tokenizer(query, truncation=True, max_length=30)["input_ids"] + added)
        for document in (positive, negative):
            sequences.append(tokenizer(document, truncation=True, max_length=200)["input_ids"])
    encoder = AutoModel.from_pretrained(model).train()
    batches = [tokenizer.pad({"input_ids": batch}, return_tensors="pt") for batch in by_tokens(sequences, count)]
    return count * passes_per_second(encoder, batches, lambda batch: encoder(**batch).last_hidden_state[:, 0])


def by_tokens(sequences: list[list[int]], triples: int) -> list[list[list[int]]]:
    """Return the sequences in order of length, in batches with as many tokens as a step of triples."""
    tokens_per_step = sum(map(len, sequences)) * BATCH / triples
    batches, tokens = [[]], 0
    for sequence in sorted(sequences, key=len):
        if tokens >= tokens_per_step:
            batches.append([])
            tokens = 0
        batches[-1].append(sequence)
        tokens += len(sequence)
    return batches


def passes_per_second(model: torch.nn.Module, batches: list, forward: Callable) -> float:
    """Return the rate of training passes over all batches, after one step to warm up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    start = None
    for batch in (batches[0], *batches):
        forward(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if start is None:
            start = time.perf_counter()
    return 1 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
