"""Training throughput: triples per second of ours, of sentence-transformers and of the bare backbone, in one run.

    python examples/benchmarks/train_throughput.py --model MODEL --collection collection.tsv --queries queries.tsv \
        --scores scores.tsv [--triples 192] [--architectures bert_dot bert_cat colbert prettr tk]

All train the same triples with Margin-MSE and AdamW in float32, batches of 16, queries cut to 30 tokens and passages
to 200. `limit` is the physical one: forward, backward and AdamW of the bare backbone on exactly the real tokens,
sorted by length, as many a step as 16 triples hold; for PreTTR and TK, which run their backbone by themselves, it is
the ranker on triples sorted by length. The first step of each is not counted. Prints a line per architecture, and as
its last line one JSON object with the ratios.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable

import datasets
import torch
from transformers import AutoModel, AutoTokenizer, TrainerCallback

import hf_kd_ranking as kd
from hf_kd_ranking.models import RankingProcessor

BATCH = 16


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Remember when the step ended."""
        self.times.append(time.perf_counter())

    def triples_per_second(self) -> float:
        """Over all steps but the first."""
        return BATCH * (len(self.times) - 1) / (self.times[-1] - self.times[0])


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "collection", "queries", "scores"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--triples", type=int, default=192)
    parser.add_argument("--architectures", nargs="+", default=["bert_dot", "bert_cat", "colbert", "prettr", "tk"])
    args = parser.parse_args()
    stores = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    rows = kd.load_teacher_scores(args.scores).select(range(args.triples))
    texts = [stores[0][rows["query_id"]], stores[1][rows["pos_id"]], stores[1][rows["neg_id"]]]
    results = {}
    for architecture in args.architectures:
        speed = {"ours": ours(args.model, architecture, rows, stores), "limit": limit(args.model, architecture, texts)}
        if architecture in ("bert_dot", "bert_cat", "colbert"):
            speed["sentence_transformers"] = sentence_transformers(args.model, architecture, rows, texts)
        results[architecture] = {"triples_per_second": speed, "of_limit": speed["ours"] / speed["limit"]}
        if "sentence_transformers" in speed:
            results[architecture]["over_sentence_transformers"] = speed["ours"] / speed["sentence_transformers"]
        print(f"{architecture:9}", "  ".join(f"{name} {value:.2f}" for name, value in speed.items()), flush=True)
    print(json.dumps(results))


def settings() -> dict:
    """Training arguments that all share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1000,
        "num_train_epochs": 1,
    }


def ours(model: str, architecture: str, rows: datasets.Dataset, stores: tuple) -> float:
    """Triples a second of `RankingTrainer`."""
    clock = Clock()
    trainer = kd.RankingTrainer(
        kd.load_ranker(model, architecture),
        kd.RankingTrainingArguments(**settings()),
        train_dataset=rows,
        queries=stores[0],
        documents=stores[1],
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    )
    trainer.train()
    return clock.triples_per_second()


def sentence_transformers(model: str, architecture: str, rows: datasets.Dataset, texts: list) -> float:
    """Triples a second of sentence-transformers' trainer with its Margin-MSE."""
    import sentence_transformers as st
    from sentence_transformers import cross_encoder, sentence_transformer
    from sentence_transformers.multi_vector_encoder.losses import MultiVectorMarginMSELoss

    margins = [float(pos - neg) for pos, neg in zip(rows["pos_score"], rows["neg_score"], strict=True)]
    columns = dict(zip(("query", "pos", "neg", "label"), (*texts, margins), strict=True))
    if architecture == "bert_dot":
        student = st.SentenceTransformer(model, device="cpu")
        student.max_seq_length, loss = 200, sentence_transformer.losses.MarginMSELoss
        trainer, arguments = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
    elif architecture == "bert_cat":
        student, loss = st.CrossEncoder(model, num_labels=1, max_length=230, device="cpu"), None
        loss = cross_encoder.losses.MarginMSELoss
        trainer, arguments = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
    else:
        student, loss = (
            st.MultiVectorEncoder(model, device="cpu"),
            MultiVectorMarginMSELoss,
        )
        trainer, arguments = st.MultiVectorEncoderTrainer, st.MultiVectorEncoderTrainingArguments
    clock = Clock()
    data = datasets.Dataset.from_dict(columns)
    args = arguments(**settings(), report_to="none")
    trainer(model=student, args=args, train_dataset=data, loss=loss(student), callbacks=[clock]).train()
    return clock.triples_per_second()


def limit(model: str, architecture: str, texts: list) -> float:
    """Triples a second of the bare backbone on the same tokens, forward and backward."""
    if architecture in ("prettr", "tk"):
        return sorted_ranker(model, architecture, texts)
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).train()
    queries, positives, negatives = texts

    def ids(*columns: list, max_length: int) -> list[list[int]]:
        return tokenizer(*columns, truncation=True, max_length=max_length)["input_ids"]

    if architecture == "bert_cat":
        sequences = ids(queries, positives, max_length=230) + ids(queries, negatives, max_length=230)
    else:
        sequences = [*ids(queries, max_length=30), *ids(positives, max_length=200), *ids(negatives, max_length=200)]
        if architecture == "colbert":
            sequences = [row + [tokenizer.mask_token_id] * 8 if i < len(queries) else row
                         for i, row in enumerate(sequences)]  # fmt: skip
    sequences.sort(key=len)
    per_step, batches, tokens = sum(map(len, sequences)) * BATCH / len(queries), [[]], 0
    for row in sequences:
        batches[-1].append(row)
        tokens += len(row)
        if tokens >= per_step:
            batches, tokens = [*batches, []], 0
    batches = [tokenizer.pad({"input_ids": batch}, return_tensors="pt") for batch in batches if batch]
    return steps_per_second(encoder, batches, lambda batch: encoder(**batch).last_hidden_state[:, 0]) * len(queries)


def sorted_ranker(model: str, architecture: str, texts: list) -> float:
    """Triples a second of the bare ranker on triples sorted by length, where it has no backbone to measure."""
    ranker = kd.load_ranker(model, architecture).train()
    processor = RankingProcessor.from_config(AutoTokenizer.from_pretrained(model), ranker.config)
    triples = sorted(zip(*texts, strict=True), key=lambda row: len(row[1]) + len(row[2]))
    batches = []
    for start in range(0, len(triples), BATCH):
        batch = triples[start : start + BATCH]
        batches.append(processor([row[0] for row in batch], [doc for row in batch for doc in row[1:]]))
    return steps_per_second(ranker, batches, lambda batch: ranker(**batch).scores) * len(triples)


def steps_per_second(model: torch.nn.Module, batches: list, forward: Callable) -> float:
    """Passes over all batches per second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for batch in (batches[0], None, *batches):
        if batch is None:
            start = time.perf_counter()
            continue
        forward(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return 1 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
