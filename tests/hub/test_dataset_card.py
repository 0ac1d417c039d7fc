"""The card of published teacher scores loads on the Hub, and says what made the file beside it."""

import hashlib
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import write_teacher_scores
from hf_kd_ranking.hub.dataset_card import FILE, size_category, write_dataset_card

ROWS = {"pos_score": [1.5, 0.0], "neg_score": [-2.0, 1.0], "query_id": [7, 8], "pos_id": [12, 1], "neg_id": [3, 2]}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "hub").mkdir()
    write_teacher_scores(datasets.Dataset.from_dict(ROWS), tmp_path / "hub" / FILE)
    write_dataset_card(
        tmp_path / "hub", "me/my-scores", 1_234_567, ["maker/big", "maker/bigger"], "MS MARCO passages", "cc-by-4.0"
    )
    return tmp_path / "hub"


def test_metadata_says_what_it_is(folder):
    data = DatasetCard.load(folder / "README.md").data.to_dict()
    assert data["pretty_name"] == "me/my-scores"
    assert data["license"] == "cc-by-4.0"
    assert data["task_categories"] == ["text-ranking"]
    assert {"hf_kd_ranking", "knowledge-distillation"} <= set(data["tags"])
    assert data["size_categories"] == ["1M<n<10M"]
    assert data["configs"] == [{"config_name": "default", "data_files": FILE}]


def test_text_names_rows_teachers_texts_and_the_digest_of_the_file(folder):
    text = DatasetCard.load(folder / "README.md").text
    digest = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
    for fact in (
        "# me/my-scores",
        "1,234,567 rows of ids and scores",
        "- maker/big\n- maker/bigger\n",
        "The ids are those of MS MARCO passages,",
        f"`{FILE}`, sha256 `{digest}`",
        'datasets.load_dataset("me/my-scores", split="train")',
    ):
        assert fact in text
    assert "{{" not in text


def test_the_licence_is_not_made_up(folder):
    path = write_dataset_card(folder, "me/my-scores", 2, ["a"], "texts")
    assert path == folder / "README.md"
    assert DatasetCard.load(path).data.license == "other"


def test_the_columns_that_the_card_explains_are_those_of_the_file(folder):
    text = DatasetCard.load(folder / "README.md").text
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(table)) == list(ROWS)


def test_the_folder_loads_as_the_card_says(folder):
    dataset = datasets.load_dataset(str(folder), split="train")
    assert kd.load_teacher_scores(dataset)[:] == ROWS


def test_a_card_without_its_file_is_not_written(tmp_path):
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
def test_sizes_are_named_as_the_hub_does(rows, name):
    assert size_category(rows) == name
