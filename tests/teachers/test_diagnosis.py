"""A diagnosis as text."""

import json
import re

import pytest
from teacher_files import write_rows

import hf_kd_ranking as kd
from hf_kd_ranking.teachers.diagnose import diagnose_teachers
from hf_kd_ranking.teachers.diagnosis import diagnosis_text


@pytest.fixture
def diagnosis(first, second, stores) -> dict:
    return diagnose_teachers([first, second], *stores)


def test_diagnosis_survives_json(diagnosis):
    assert json.loads(json.dumps(diagnosis, allow_nan=False)) == diagnosis
    assert diagnosis_text(json.loads(json.dumps(diagnosis))) == diagnosis_text(diagnosis)


def test_text_names_files_figures_warnings_and_examples(tmp_path, first, second, stores):
    squashed = write_rows(tmp_path / "squashed.tsv", [(0.9, 0.1, 1, 10, 12)])
    text = diagnosis_text(diagnose_teachers([first, second, squashed], *stores))
    assert f"1: {first}\n2: {second}\n3: {squashed}\n" in text
    assert "Warning, file 3: All scores are within [0, 1]" in text
    assert re.search(r"^rows +5 +4 +1$", text, re.MULTILINE)
    assert re.search(r"^negative margins +20\.00% +50\.00% +0\.00%$", text, re.MULTILINE)
    assert re.search(r"^1 and 2 +3 +0\.8746 +1 +3 +0\.6667 +- +-$", text, re.MULTILINE)
    assert re.search(r"^2 and 3 +1 +- +- +1 +0 +- +-$", text, re.MULTILINE)
    assert "In 2 of 5 rows (40.00%) the negative scores above the positive" in text
    assert re.search(r"^1 +10 +99 +-1\.486 +- \| 0 / 4 \| - +what is <b>kd</b> +text of 10 +-$", text, re.MULTILINE)


def test_text_cuts_long_cells_and_line_breaks(tmp_path, first):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"_id": 1, "text": "line\nbreak\t" + "long " * 40}))
    text = diagnosis_text(diagnose_teachers([first], kd.TextStore.from_jsonl(path)))
    row = next(line for line in text.splitlines() if "line break long" in line)
    assert len(row) < 120
