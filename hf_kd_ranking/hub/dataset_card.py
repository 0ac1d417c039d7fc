"""Teacher scores as a data set on the Hub: a Parquet file, and a card that names the teachers."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
from huggingface_hub import DatasetCard, DatasetCardData

from ..artifacts import existing_file, file_digest

FILE = "teacher_scores.parquet"
# Numbers of rows, and the Hub's names of the ranges below, between and above them.
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
SIZE_NAMES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")


def write_dataset_card(
    folder: str | os.PathLike,
    name: str,
    rows: int,
    teachers: Sequence[str],
    texts: str,
    license_name: str = "other",
) -> Path:
    """Write `README.md` next to the Parquet file of teacher rows, and return its path.

    Args:
        folder: contains `teacher_scores.parquet`, which has `rows` rows.
        name: name of the data set.
        teachers: names of the models that made the scores; several if their scores were averaged.
        texts: name of the data set that the ids belong to.
        license_name: licence of the scores in the Hub's spelling. Users must also respect the licence of the texts.

    Raises:
        FileNotFoundError: if the Parquet file does not exist.
    """
    path = existing_file(Path(folder) / FILE, "teacher scores")
    metadata = DatasetCardData(
        pretty_name=name,
        license=license_name,
        task_categories=["text-ranking"],
        tags=["hf_kd_ranking", "knowledge-distillation"],
        configs=[{"config_name": "default", "data_files": FILE}],
        size_categories=[SIZE_NAMES[bisect_right(SIZES, rows)]],
    )
    card = DatasetCard.from_template(
        metadata,
        template_path=str(Path(__file__).parent / "templates" / "teacher_scores.md"),
        name=name,
        rows=rows,
        teachers=teachers,
        texts=texts,
        columns=pyarrow.parquet.read_schema(path).names,
        file=FILE,
        sha256=file_digest(path),
    )
    card.save(path.with_name("README.md"))
    return path.with_name("README.md")
