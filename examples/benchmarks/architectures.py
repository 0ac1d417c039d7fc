"""Measure the latency of the five architectures on one encoder, beside the paper's figures.

    python examples/benchmarks/architectures.py ENCODER --queries queries.tsv --collection collection.tsv [--rounds 10]

Fresh rankers (their scores mean nothing, their latency is that of trained ones) with the paper's lengths, 30 and 200,
on the collection's first 1,000 passages. BERT_CAT takes most of the time. The last line is one JSON object.
"""

import argparse
import json
from functools import partial
from itertools import islice

import hf_kd_ranking as kd
from hf_kd_ranking.reporting.efficiency import efficiency_text

# Table 5 of the paper, milliseconds for 1,000 passages on a GPU; DistilBERT for all but TK.
PAPER = {"bert_cat": 956, "prettr": 456, "colbert": 28, "bert_dot": 24, "tk": 13.5}
SETTINGS = {
    "bert_cat": {},
    "prettr": {"join_layer_idx": 3},
    "colbert": {"compression_dim": 128},
    "bert_dot": {"pooling": "mean"},
    "tk": {},
}


def main() -> None:
    """Measure, and compare with the paper."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("--queries", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--k", type=int, default=1_000, help="candidates per query")
    parser.add_argument("--rounds", type=int, default=10, help="timed queries")
    args = parser.parse_args()
    queries = [text for _, text in islice(kd.TextStore.from_file(args.queries).items(), args.rounds)]
    documents = [text for _, text in islice(kd.TextStore.from_file(args.collection).items(), args.k)]
    rankers = {}
    for name, settings in SETTINGS.items():
        rankers[name] = partial(kd.Ranker.from_pretrained, args.encoder, name, **settings)
    results = kd.measure_efficiency(rankers, queries, documents)
    print(efficiency_text(results))
    slowest = results["rankers"]["bert_cat"]["total_ms"]["p50"]
    for name, figures in results["rankers"].items():
        figures["times_faster_than_bert_cat"] = slowest / figures["total_ms"]["p50"]
        times, of_paper = figures["times_faster_than_bert_cat"], PAPER["bert_cat"] / PAPER[name]
        print(f"{name}: {times:.1f} times faster than BERT_CAT, paper {of_paper:.1f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
