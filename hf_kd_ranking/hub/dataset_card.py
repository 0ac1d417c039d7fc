"""Teacher scores as a data set on the Hub: Parquet with a card that says what made them."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..artifacts import file_digest

TEMPLATE = Path(__file__).parent / "templates" / "teacher_scores.md"
FILE = "teacher_scores.parquet"


def write_dataset_card(
    folder: str | os.PathLike,
    name: str,
    rows: int,
    teachers: Sequence[str],
    texts: str,
    license_name: str = "other",
) -> Path:
    """Write `README.md` beside the Parquet file of teacher rows.

    Args:
        folder: holds `teacher_scores.parquet`.
        name: of the data set.
        rows: in the file.
        teachers: names of the models whose scores these are, or were averaged.
        texts: the data set that the ids belong to.
        license_name: as the Hub spells it; the texts' own licence is what the scores' users must look at.

    Raises:
        FileNotFoundError: if the file is not there.
    """
    path = Path(folder) / FILE
    metadata = DatasetCardData(
        pretty_name=name,
        license=license_name,
        task_categories=["text-ranking"],
        tags=["hf_kd_ranking", "knowledge-distillation"],
        configs=[{"config_name": "default", "data_files": FILE}],
        size_categories=[size_category(rows)],
    )
    sha256 = file_digest(path)
    card = DatasetCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        rows=f"{rows:,}",
        teachers="\n".join(f"- {teacher}" for teacher in teachers),
        texts=texts,
        file=FILE,
        sha256=sha256,
    )
    card.save(Path(folder) / "README.md")
    return Path(folder) / "README.md"


def size_category(rows: int) -> str:
    """The Hub's word for a number of rows."""
    limits = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
    return names[sum(rows >= limit for limit in limits)]
