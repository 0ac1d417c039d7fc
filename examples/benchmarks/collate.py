"""Measure how many triples per second one core turns into batches: tokenised in each batch, and from stored token ids.

    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python examples/benchmarks/collate.py --tokenizer FOLDER \
        --collection collection.tsv --queries queries.tsv [--triples 2048] [--batch-size 32] [--rounds 3]

Triples are drawn at random from the two files; queries are cut to 30 tokens and passages to 200. Both ways make the
same batches, which is checked, and take turns, a batch each. Time is that of the CPU in one thread, so that other work
on the machine hardly matters. Prints a line per architecture with the throughput of the fastest round of each way, and
as its last line one JSON object.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer

import hf_kd_ranking as kd
from hf_kd_ranking.data.collate import RankingCollator, sides, split_batch
from hf_kd_ranking.data.tokens import StoredInputs, TokenStore
from hf_kd_ranking.models import RankingProcessor

CONFIGS = {
    "bert_cat": kd.BertCatConfig,
    "bert_dot": kd.BertDotConfig,
    "colbert": kd.ColBERTConfig,
    "prettr": kd.PreTTRConfig,
    "tk": kd.TKConfig,
}


def main() -> None:
    """Measure each architecture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("tokenizer", "collection", "queries"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--triples", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    queries, documents = kd.TextStore.from_file(args.queries), kd.TextStore.from_file(args.collection)
    datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp()  # so that ids are stored now
    start = time.process_time()
    TokenStore.build(documents, tokenizer)
    results = {"tokenising_texts_per_second": len(documents) / (time.process_time() - start)}
    batches = draw_batches(queries, documents, args.triples, args.batch_size)
    for architecture, config in CONFIGS.items():
        processor = RankingProcessor.from_config(tokenizer, config())
        tokenised = RankingCollator(processor, queries, documents)
        stored = replace(tokenised, processor=StoredInputs.build(processor, queries, documents))
        for batch in batches:
            check_equal(tokenised(batch), stored(batch))
        speed = {"tokenised": 0.0, "stored": 0.0}
        for _ in range(args.rounds):
            for name, rate in measure(tokenised, stored, batches).items():
                speed[name] = max(speed[name], rate)
        speed["ratio"] = speed["stored"] / speed["tokenised"]
        results[architecture] = speed
        print(architecture, json.dumps(speed), flush=True)
    print(json.dumps(results))


def draw_batches(queries: kd.TextStore, documents: kd.TextStore, triples: int, batch_size: int) -> list[list[dict]]:
    """Return batches of rows with a random query and two random documents."""
    generator = np.random.default_rng(0)
    query_ids = queries.ids_of(generator.integers(len(queries), size=triples))
    document_ids = documents.ids_of(generator.integers(len(documents), size=2 * triples))
    if queries.has_integer_ids:
        query_ids = [int(id_) for id_ in query_ids]
    if documents.has_integer_ids:
        document_ids = [int(id_) for id_ in document_ids]
    rows = []
    for place, query_id in enumerate(query_ids):
        doc_ids = document_ids[2 * place : 2 * place + 2]
        rows.append({"query_id": query_id, "doc_ids": doc_ids, "teacher_scores": [1.0, 0.0]})
    return [rows[start : start + batch_size] for start in range(0, triples, batch_size)]


def check_equal(first: dict, second: dict) -> None:
    """Raise an AssertionError if two batches have different inputs."""
    for one, other in zip(sides(split_batch(first)[0]), sides(split_batch(second)[0]), strict=True):
        assert list(one) == list(other)
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def measure(tokenised: RankingCollator, stored: RankingCollator, batches: list[list[dict]]) -> dict[str, float]:
    """Return triples per second of both collators, which take turns."""
    seconds = {"tokenised": 0.0, "stored": 0.0}
    for batch in batches:
        for name, collator in (("tokenised", tokenised), ("stored", stored)):
            start = time.process_time()
            collator(batch)
            seconds[name] += time.process_time() - start
    return {name: sum(map(len, batches)) / duration for name, duration in seconds.items()}


if __name__ == "__main__":
    main()
