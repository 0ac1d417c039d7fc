"""FlagEmbedding's lines of texts become rows of ids, and the ids lead back to the texts."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

import hf_kd_ranking as kd

EXAMPLE = Path(__file__).parents[2] / "examples" / "convert_flag_embedding.py"
SPEC = importlib.util.spec_from_file_location("convert_flag_embedding", EXAMPLE)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)
convert_flag_embedding = example.convert_flag_embedding

LINE = {
    "query": "what is jam",
    "pos": ["fruit", "sugar"],
    "neg": ["traffic", "music", "sugar free"],
    "pos_scores": [0.9, 3],
    "neg_scores": [-1.5, 1e-7, 0.1],
    "prompt": "not read",
}


def written(folder: Path, *rows: dict | str) -> Path:
    path = folder / "train.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def converted(folder: Path, *rows: dict | str) -> list[tuple[float, float, str, str, str]]:
    """The rows with texts in the place of ids, as the rest of the package reads them."""
    files = convert_flag_embedding(written(folder, *rows), folder / "new")
    queries, documents = kd.TextStore.from_file(files.queries), kd.TextStore.from_file(files.collection)
    rows = []
    for row in kd.load_teacher_scores(files.scores):
        rows.append((*row["teacher_scores"], queries[row["query_id"]], *documents[row["doc_ids"]]))
    return rows


def test_each_positive_is_paired_with_each_negative(tmp_path):
    rows = converted(tmp_path, LINE)
    wanted = [
        (pos_score, neg_score, LINE["query"], positive, negative)
        for positive, pos_score in zip(LINE["pos"], LINE["pos_scores"], strict=True)
        for negative, neg_score in zip(LINE["neg"], LINE["neg_scores"], strict=True)
    ]
    assert len(rows) == 6
    assert rows == [(pytest.approx(pos), pytest.approx(neg), *texts) for pos, neg, *texts in wanted]


def test_scores_keep_all_their_digits(tmp_path):
    scores = [0.1 + 0.2, 5e-324, -1e22]
    files = convert_flag_embedding(written(tmp_path, LINE | {"neg_scores": scores}), tmp_path / "new")
    rows = [line.split("\t") for line in files.scores.read_text().splitlines()]
    assert [float(row[1]) for row in rows] == scores * 2
    assert [float(row[0]) for row in rows] == [0.9] * 3 + [3.0] * 3


def test_equal_texts_have_one_id_in_file_order(tmp_path):
    other = {
        "query": "jam session",
        "pos": ["music"],
        "neg": ["sugar", "new"],
        "pos_scores": [1],
        "neg_scores": [2, 3],
    }
    files = convert_flag_embedding(written(tmp_path, LINE, other, LINE), tmp_path / "new")
    documents = [line.split("\t") for line in files.collection.read_text().splitlines()]
    texts = ["fruit", "traffic", "music", "sugar free", "sugar", "new"]
    assert documents == [[str(number), text] for number, text in enumerate(texts)]
    assert files.queries.read_text() == "0\twhat is jam\n1\tjam session\n"
    lines = files.scores.read_text().splitlines()
    assert [line.split("\t")[2] for line in lines] == ["0"] * 6 + ["1"] * 2 + ["0"] * 6
    assert lines[:6] == lines[8:]


def test_queries_and_documents_are_numbered_separately(tmp_path):
    files = convert_flag_embedding(written(tmp_path, LINE | {"pos": ["what is jam", "b"]}), tmp_path / "new")
    assert files.queries.read_text() == "0\twhat is jam\n"
    assert files.collection.read_text().startswith("0\twhat is jam\n")


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "a\r\nb", "a\rb", "a\u2028b", "a b"])
def test_tabs_and_line_breaks_become_blanks(tmp_path, text):
    rows = converted(tmp_path, LINE | {"query": text, "neg": [text, "music", "x"]})
    assert rows[0][2:] == ("a b", "fruit", "a b")


def test_blank_lines_are_skipped_and_texts_may_be_empty(tmp_path):
    rows = converted(tmp_path, "", LINE | {"query": "", "pos": ["", "ü文書\U0001f600"]}, "")
    assert [row[2:4] for row in rows] == [("", "")] * 3 + [("", "ü文書\U0001f600")] * 3


BAD_LINES = {
    "no scores": ({name: LINE[name] for name in ("query", "pos", "neg")}, "missing pos_scores, neg_scores"),
    "no query": ({name: LINE[name] for name in LINE if name != "query"}, "missing query"),
    "fewer scores": (LINE | {"pos_scores": [1]}, "pos_scores must be 2 numbers, got [1]"),
    "a word": (LINE | {"neg_scores": [1, "high", 2]}, "neg_scores must be 3 numbers, got [1, 'high', 2]"),
    "null": (LINE | {"neg_scores": [1, None, 2]}, "neg_scores must be 3 numbers, got [1, None, 2]"),
    "no JSON": ('{"query": ', "invalid JSON (Expecting value at column"),
    "no object": ("[1]", "needed a JSON object, got list"),
    "no list of scores": (LINE | {"pos_scores": None}, "pos_scores must be 2 numbers, got None"),
    "one text": (LINE | {"pos": "a", "pos_scores": [1]}, "pos must be a list of one or more strings, got 'a'"),
    "no text": (LINE | {"pos": [None]}, "pos must be a list of one or more strings, got [None]"),
    "no string": (LINE | {"query": 5}, "query must be a string, got 5"),
    "NaN": (LINE | {"neg_scores": [1, 2, float("nan")]}, "neg_scores must be 3 numbers, got [1, 2, nan]"),
}


@pytest.mark.parametrize(("row", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named_and_leave_no_folder(tmp_path, row, message):
    path = written(tmp_path, LINE, "", row)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} line 3: ')}.*{re.escape(message)}"):
        convert_flag_embedding(path, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_folder_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'new'} exists; give another output")):
        convert_flag_embedding(written(tmp_path, LINE), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'none.jsonl'} does not exist")):
        convert_flag_embedding(tmp_path / "none.jsonl", tmp_path / "other")
