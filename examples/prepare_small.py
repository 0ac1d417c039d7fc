"""Write the files that `reproduce_small.yaml` and `reproduce_small_msmarco.yaml` name, into `reproduce/`.

    python examples/prepare_small.py

PyDocs is built from the installed packages. MS MARCO is prepared where HF_KD_RANKING_DATA names a folder with
`msmarco-v1`, `msmarco-v2` (passages, queries and systems' scores of TREC-DL 2020 and 2021) and `trec-dl` (judgments).
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
QUERIES = {"train": 640, "dev": 100, "test": 2_000}  # of PyDocs; of the test all that there are
DEV_QUERIES = 12  # of 2021; the rest trains


def main() -> None:
    """Prepare what can be."""
    (OUTPUT / "pydocs").mkdir(parents=True, exist_ok=True)
    job = demo_job(OUTPUT / "pydocs", seeds=3, is_complete=True, queries=QUERIES)
    print({split: len(ids) for split, ids in job.split_queries(job.read_judgments()).items()}, "queries of PyDocs")
    if data := os.environ.get("HF_KD_RANKING_DATA"):
        print(prepare_msmarco(Path(data), OUTPUT / "msmarco"), "queries of MS MARCO")


def prepare_msmarco(data: Path, output: Path) -> dict[str, int]:
    """Join the two collections, and split the judged queries: 2021 and half of 2020 train, the other half is the test.

    Returns:
        Queries of each split.
    """
    output.mkdir(parents=True, exist_ok=True)
    folders, years = (data / "msmarco-v1", data / "msmarco-v2"), ("dl20", "dl21")
    for name in ("collection.tsv", "queries.tsv"):
        parts = [
            folder / (name if name == "collection.tsv" else f"queries.{year}.tsv")
            for folder, year in zip(folders, years, strict=True)
        ]
        with (output / name).open("w", encoding="utf-8", newline="\n") as file:
            for part in parts:
                file.writelines(f"{text_id}\t{text}\n" for text_id, text in kd.TextStore.from_tsv(part).items())
    qrels = {year: kd.read_qrels(data / "trec-dl" / f"qrels.{year}-passage.txt") for year in years}
    scored = kd.Run()
    for folder, year in zip(folders, years, strict=True):
        scored |= read_scores(folder / f"scores.{year}.tsv")
    kd.write_run(scored, output / "splade.trec")
    asked = {year: [q for q in qrels[year] if q in scored] for year in years}
    splits = {"test": asked["dl20"][::2], "dev": asked["dl21"][:DEV_QUERIES]}
    splits["train"] = asked["dl20"][1::2] + asked["dl21"][DEV_QUERIES:]
    judged = qrels["dl20"] | qrels["dl21"]
    for split, ids in splits.items():
        write_qrels({query_id: judged[query_id] for query_id in ids}, output / f"qrels.{split}.txt")
    return {split: len(ids) for split, ids in splits.items()}


def read_scores(path: Path) -> kd.Run:
    """The teacher's run in a table of several systems' scores, where a blank is a document that it does not list.

    Standardised, since the scores of one year are on a scale ten times that of the other's.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row[TEACHER]]
    columns = ([row[name] for row in rows] for name in ("qid", "pid"))
    return kd.Run.from_scores(*columns, zscore([float(row[TEACHER]) for row in rows]))


if __name__ == "__main__":
    main()
