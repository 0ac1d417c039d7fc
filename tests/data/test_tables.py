"""Ids become integers only if nothing is lost; rows lead to lines; a table on disk is complete."""

import numpy as np
import pyarrow as pa
import pytest

from hf_kd_ranking.data import tables
from hf_kd_ranking.data.tables import is_plain_integer, nth_line, plain_integers, write_arrow

PLAIN = ["0", "7", "-5", "10", "9" * 18, "-" + "9" * 18]
NOT_PLAIN = ["007", "00", "+1", "", "1 ", " 1", "1\n", "-0", "-", "--5", "-05", "9" * 19, "-" + "9" * 19, "1.0", "1e3"]
NOT_PLAIN += ["0x1f", "1_0", "²", "٣", "1a", "a1", "\x001", "1\x00", "1" + "0" * 18]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_integers_become_int64(text):
    found = plain_integers(pa.array([text, "12"]))
    assert found.dtype == np.int64
    assert found.tolist() == [int(text), 12]
    assert is_plain_integer(text)


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_one_other_spelling_keeps_all_ids_strings(text):
    for others in ([], ["12"], ["-12"]):
        assert plain_integers(pa.array([*others, text])) is None
        assert plain_integers(pa.array([text, *others])) is None
    assert not is_plain_integer(text)


def test_no_ids_count_as_integers():
    found = plain_integers(pa.array([], pa.string()))
    assert (found.dtype, found.shape) == (np.int64, (0,))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_plain_integers_read_only_the_rows_of_a_slice(kind):
    array = pa.array(["x", "12", "-3", "", "007"], kind)
    assert plain_integers(array[1:3]).tolist() == [12, -3]
    assert plain_integers(array[1:4]) is None


def test_positive_integers_need_no_slow_pattern(monkeypatch):
    monkeypatch.setattr(tables.pc, "match_substring_regex", lambda *_: pytest.fail("the pattern was asked"))
    assert plain_integers(pa.array(["0", "10", "9" * 18])).tolist() == [0, 10, int("9" * 18)]


@pytest.mark.parametrize(("row", "line"), [(0, 2), (1, 3), (2, 6)])
def test_nth_line_counts_rows_from_0_and_skips_blank_lines(tmp_path, row, line):
    path = tmp_path / "input.txt"
    path.write_text("\na\nb\n\n\nc\n")
    assert nth_line(path, row) == line


def test_nth_line_refuses_a_row_beyond_the_file(tmp_path):
    (tmp_path / "input.txt").write_text("\na\n")
    with pytest.raises(IndexError, match=r"input\.txt has 1 rows, asked for row 2"):
        nth_line(tmp_path / "input.txt", 2)


def test_write_arrow_skips_empty_batches_and_refuses_no_rows(tmp_path):
    full = pa.RecordBatch.from_pydict({"a": [1, 2]})
    write_arrow(tmp_path / "rows.arrow", iter([full[:0], full, full[:0], full]), "x.tsv")
    assert pa.ipc.open_stream(tmp_path / "rows.arrow").read_all()["a"].to_pylist() == [1, 2, 1, 2]
    with pytest.raises(ValueError, match=r"x\.tsv holds no rows"):
        write_arrow(tmp_path / "none.arrow", iter([full[:0]]), "x.tsv")
