"""Write the files that `reproduce_small.yaml` and `reproduce_small_msmarco.yaml` name, into `reproduce/`.

    python examples/prepare_small.py

PyDocs is built from the installed packages. MS MARCO is prepared if HF_KD_RANKING_DATA names a folder with
`msmarco-v1`, `msmarco-v2` (TREC-DL 2020 to 2022: passages, queries, scores of systems) and `trec-dl` (judgments).
"""

import csv
import os
from pathlib import Path

from scipy.stats import zscore

import hf_kd_ranking as kd
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.demo.experiment import demo_job

TEACHER = "SPLADE_P_P_ENSEMBLE_DISTIL"
OUTPUT = Path("reproduce")
QUERIES = {"train": 960, "dev": 100, "test": 500}  # of PyDocs, at most
DEV_QUERIES = 12  # of 2021; the other queries train
YEARS = {"dl20": "msmarco-v1", "dl21": "msmarco-v2", "dl22": "msmarco-v2"}


def main() -> None:
    """Prepare PyDocs, and MS MARCO if there is data."""
    (OUTPUT / "pydocs").mkdir(parents=True, exist_ok=True)
    job = demo_job(OUTPUT / "pydocs", seeds=3, is_complete=True, queries=QUERIES)
    print(f"wrote {job.queries}, the queries of PyDocs")
    if "HF_KD_RANKING_DATA" in os.environ:
        prepare_msmarco(Path(os.environ["HF_KD_RANKING_DATA"]), OUTPUT / "msmarco")


def prepare_msmarco(data: Path, output: Path) -> None:
    """Join the collections of two years, and split the judged queries: half of those of 2020 are the test."""
    output.mkdir(parents=True, exist_ok=True)
    queries, teacher, judged, scored = [], kd.Run(), {}, {}
    for year, name in YEARS.items():
        queries.append(data / name / f"queries.{year}.tsv")
        teacher |= read_scores(data / name / f"scores.{year}.tsv")
    for year in ("dl20", "dl21"):
        judged[year] = kd.read_qrels(data / "trec-dl" / f"qrels.{year}-passage.txt")
        scored[year] = [query_id for query_id in judged[year] if query_id in teacher]
    join_texts([data / "msmarco-v1/collection.tsv", data / "msmarco-v2/collection.tsv"], output / "collection.tsv")
    join_texts(queries, output / "queries.tsv")
    kd.write_run(teacher, output / "splade.trec")
    splits = {"dev": scored["dl21"][:DEV_QUERIES], "test": scored["dl20"][::2]}
    splits["train"] = scored["dl20"][1::2] + scored["dl21"][DEV_QUERIES:]
    qrels = judged["dl20"] | judged["dl21"]
    for split, query_ids in splits.items():
        write_qrels({query_id: qrels[query_id] for query_id in query_ids}, output / f"qrels.{split}.txt")
        print(f"{len(query_ids)} {split} queries of MS MARCO")


def join_texts(paths: list[Path], output: Path) -> None:
    """Write the texts of all files into one file."""
    with output.open("w", encoding="utf-8", newline="\n") as file:
        for path in paths:
            for text_id, text in kd.TextStore.from_tsv(path).items():
                file.write(f"{text_id}\t{text}\n")


def read_scores(path: Path) -> kd.Run:
    """Read a column of a table of systems' scores, and standardise them: those of one year are ten times as large."""
    query_ids, doc_ids, scores = [], [], []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row[TEACHER]:  # else the teacher did not return the document
                query_ids.append(row["qid"])
                doc_ids.append(row["pid"])
                scores.append(float(row[TEACHER]))
    return kd.Run.from_scores(query_ids, doc_ids, zscore(scores))


if __name__ == "__main__":
    main()
