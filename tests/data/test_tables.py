"""Ids and lines of files."""

import pytest

from hf_kd_ranking.data.tables import is_plain_integer, nth_line


@pytest.mark.parametrize("text", ["0", "7", "-7", "123456789012345678"])
def test_an_integer_in_its_only_spelling_is_plain(text):
    assert is_plain_integer(text)


@pytest.mark.parametrize(
    "text",
    ["", "007", "-0", "+7", " 7", "1_0", "٣", "7.0", "9" * 19, "d7", "-", "--5", "²"],
)
def test_text_that_an_int_would_not_spell_the_same_is_no_plain_integer(text):
    assert not is_plain_integer(text)


@pytest.mark.parametrize(("row", "line"), [(0, 2), (1, 3), (2, 6)])
def test_nth_line_counts_rows_from_0_lines_from_1_and_blank_lines_too(tmp_path, row, line):
    path = tmp_path / "input.txt"
    path.write_text("\na\nb\n\n\nc\n")
    assert nth_line(path, row) == line
