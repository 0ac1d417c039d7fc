"""Renderings of a diagnosis: text and page."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest
from teacher_files import write_rows

import hf_kd_ranking as kd
from hf_kd_ranking.teachers.diagnose import diagnose_teachers
from hf_kd_ranking.teachers.diagnosis import diagnosis_html, diagnosis_text


@pytest.fixture
def diagnosis(first, second, stores) -> dict:
    return diagnose_teachers([first, second], *stores)


class Page(HTMLParser):
    """Cells and paragraphs of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts, self.tags, self.loaded = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def read_page(diagnosis: dict, tmp_path) -> Page:
    diagnosis_html(diagnosis, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


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
    assert re.search(r"^1 and 2 +3 +0\.8746 +1 +3 +0\.6667$", text, re.MULTILINE)
    assert re.search(r"^2 and 3 +1 +- +- +1 +0$", text, re.MULTILINE)
    assert "In 2 of 5 rows (40.00%) the negative scores above the positive" in text
    assert re.search(r"^1 +10 +99 +-1\.486 +- \| 0 / 4 \| - +what is <b>kd</b> +text of 10 +-$", text, re.MULTILINE)


def test_text_cuts_long_cells_and_line_breaks(tmp_path, first):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"_id": 1, "text": "line\nbreak\t" + "long " * 40}))
    text = diagnosis_text(diagnose_teachers([first], kd.TextStore.from_jsonl(path)))
    row = next(line for line in text.splitlines() if "line break long" in line)
    assert len(row) < 120


def test_page_has_the_numbers_and_loads_nothing(tmp_path, diagnosis):
    page = read_page(diagnosis, tmp_path)
    for text in ("2.898", "0.8746", "0.6667", "20.00%", "-1.486", "2 / 3 | 1 / 3", "text of 12"):
        assert text in page.texts
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_page_escapes_texts(tmp_path, diagnosis):
    page = read_page(diagnosis, tmp_path)
    assert "what is <b>kd</b>" in page.texts
    assert "b" not in page.tags


def test_page_without_matplotlib_has_the_tables(tmp_path, monkeypatch, first):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = read_page(diagnose_teachers(first), tmp_path)
    assert "matplotlib is missing; install it (extra [report]) to see them." in page.texts
    assert "img" not in page.tags
    assert "2.898" in page.texts


def test_page_has_the_histograms_inside(tmp_path, diagnosis):
    pytest.importorskip("matplotlib")
    page = read_page(diagnosis, tmp_path)
    (image,) = page.loaded
    assert image.startswith("data:image/png;base64,iVBOR")


def test_page_in_a_missing_folder_is_refused(tmp_path, first):
    with pytest.raises(FileNotFoundError, match=r"none, the folder of the output page\.html, does not exist"):
        diagnosis_html(diagnose_teachers(first), tmp_path / "none" / "page.html")
