"""The card of published teacher scores: metadata that the Hub reads, and a description of the file next to it."""

import hashlib
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import write_teacher_scores
from hf_kd_ranking.hub.dataset_card import FILE, write_dataset_card

PAIRS = {"pos_score": [1.5, 0.0], "neg_score": [-2.0, 1.0], "query_id": [7, 8], "pos_id": [12, 1], "neg_id": [3, 2]}
LISTS = {
    "query_id": [7, 8],
    "doc_ids": [[12, 3, 4], [1, 2, 5]],
    "teacher_scores": [[1.5, -2.0, 0.0], [0.0, 1.0, 3.0]],
}
MARGINS = {"query_id": [7, 8], "positive_id": [12, 1], "negative_id": [3, 2], "score": [3.5, -1.0]}
TRIPLES = {name: PAIRS[name] for name in ("query_id", "pos_id", "neg_id")}


def write_folder(folder: Path, rows: dict) -> Path:
    folder.mkdir()
    write_teacher_scores(kd.load_teacher_scores(datasets.Dataset.from_dict(rows)), folder / FILE)
    write_dataset_card(
        folder, "me/my-scores", 1_234_567, ["maker/big", "maker/bigger"], "MS MARCO passages", "cc-by-4.0"
    )
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "hub", PAIRS)


def test_dataset_card_has_metadata(folder):
    data = DatasetCard.load(folder / "README.md").data.to_dict()
    assert data["pretty_name"] == "me/my-scores"
    assert data["license"] == "cc-by-4.0"
    assert data["task_categories"] == ["text-ranking"]
    assert {"hf_kd_ranking", "knowledge-distillation"} <= set(data["tags"])
    assert data["size_categories"] == ["1M<n<10M"]
    assert data["configs"] == [{"config_name": "default", "data_files": FILE}]


def test_dataset_card_names_rows_teachers_texts_and_digest(folder):
    text = DatasetCard.load(folder / "README.md").text
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    for phrase in (
        "# me/my-scores",
        "1,234,567 rows of ids and scores",
        "The scores are the average of these teachers:\n\n- maker/big\n- maker/bigger\n",
        "The ids belong to MS MARCO passages.",
        f"`{FILE}`, sha256 `{digest}`",
        'datasets.load_dataset("me/my-scores", split="train")',
    ):
        assert phrase in text
    assert "{{" not in text


def test_dataset_card_invents_no_licence(folder):
    path = write_dataset_card(folder, "me/my-scores", 2, ["a"], "texts")
    card = DatasetCard.load(path)
    assert path == folder / "README.md"
    assert card.data.license == "other"
    assert "Teacher:\n\n- a\n" in card.text


@pytest.mark.parametrize("rows", [PAIRS, LISTS, MARGINS, TRIPLES], ids=["pairs", "lists", "margins", "triples"])
def test_dataset_card_explains_the_columns_of_the_file(rows, tmp_path):
    folder = write_folder(tmp_path / "hub", rows)
    text = DatasetCard.load(folder / "README.md").text
    explained = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert sorted(re.findall(r"`(\w+)`", explained)) == sorted(rows)


def test_published_teacher_scores_load_as_the_card_says(folder):
    rows = kd.load_teacher_scores(datasets.load_dataset(str(folder), split="train"))
    assert [rows[0], rows[1]] == [
        {"query_id": 7, "doc_ids": [12, 3], "teacher_scores": [1.5, -2.0]},
        {"query_id": 8, "doc_ids": [1, 2], "teacher_scores": [0.0, 1.0]},
    ]


def test_dataset_card_needs_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE):
        write_dataset_card(tmp_path, "me/my-scores", 1, ["a"], "texts")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (10_000, "10K<n<100K"),
        (999_999, "100K<n<1M"),
        (1_000_000, "1M<n<10M"),
        (40_000_000, "10M<n<100M"),
        (100_000_000, "100M<n<1B"),
    ],
)
def test_size_category_has_the_names_of_the_hub(rows, name, folder):
    path = write_dataset_card(folder, "me/my-scores", rows, ["a"], "texts")
    assert DatasetCard.load(path).data.to_dict()["size_categories"] == [name]
