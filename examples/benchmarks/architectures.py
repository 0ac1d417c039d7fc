"""The five architectures on one encoder, side by side: latency of 1,000 candidates beside the paper's.

    python examples/benchmarks/architectures.py ENCODER --queries queries.tsv --collection collection.tsv [--rounds 10]

Fresh rankers (their scores mean nothing, their cost is that of trained ones) with the paper's lengths, 30 and 200, on
the collection's first 1,000 passages. BERT_CAT takes most of the time. The last line is one JSON object.
"""

import argparse
import json
from functools import partial
from itertools import islice

import hf_kd_ranking as kd
from hf_kd_ranking.reporting.efficiency import efficiency_text

# Table 5 of the paper, milliseconds of 1,000 passages on a GPU; DistilBERT for all but TK.
PAPER = {"bert_cat": 956, "prettr": 456, "colbert": 28, "bert_dot": 24, "tk": 13.5}
SETTINGS = {
    "bert_cat": {},
    "prettr": {"join_layer_idx": 3},
    "colbert": {"compression_dim": 128},
    "bert_dot": {"pooling": "mean"},
    "tk": {},
}


def main() -> None:
    """Measure and compare with the paper."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder")
    parser.add_argument("--queries", required=True)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--candidates", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    queries, documents = (
        [text for _, text in islice(kd.TextStore.from_file(path).items(), count)]
        for path, count in ((args.queries, args.rounds), (args.collection, args.candidates))
    )
    rankers = {
        name: partial(kd.Ranker.from_pretrained, args.encoder, name, **settings) for name, settings in SETTINGS.items()
    }
    results = kd.measure_efficiency(rankers, queries, documents)
    print(efficiency_text(results))
    ours = {name: of["total_ms"]["p50"] for name, of in results["rankers"].items()}
    for name, latency in ours.items():
        results["rankers"][name]["times_faster_than_bert_cat"] = ours["bert_cat"] / latency
        print(f"{name}: {ours['bert_cat'] / latency:.1f} times faster than BERT_CAT, paper {956 / PAPER[name]:.1f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
