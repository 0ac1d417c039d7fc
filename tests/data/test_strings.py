"""Strings on disk come back as they went in; arrays of ids become integers only where nothing is lost."""

import numpy as np
import pyarrow as pa
import pytest
from hf_kd_ranking.data.strings import open_strings, write_strings

import hf_kd_ranking as kd
from hf_kd_ranking.data import formats
from hf_kd_ranking.data.tables import is_plain_integer, plain_integers

STRINGS = ["", "a", "", "ü文書\U0001f600", "two\nlines\tand a tab", "x" * 5_000, " ", "\x00", ""]

# ---- On disk --------------------------------------------------------------------------------------------------------

CUTS = {
    "in one": [STRINGS],
    "one by one": [[text] for text in STRINGS],
    "with empty arrays": [[], STRINGS[:4], [], [], STRINGS[4:], []],
}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_strings_come_back_however_they_were_cut_into_arrays(tmp_path, cut, kind):
    assert write_strings(tmp_path / "texts", (pa.array(part, kind) for part in cut)) == len(STRINGS)
    found = open_strings(tmp_path / "texts")
    assert found.to_pylist() == STRINGS
    assert [found[row].as_py() for row in (8, 3, 0, 3)] == [STRINGS[row] for row in (8, 3, 0, 3)]
    assert found.take(pa.array([5, 1, 1])).to_pylist() == [STRINGS[5], "a", "a"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_slice_gives_its_own_rows_and_no_others(tmp_path, kind):
    array = pa.array(STRINGS, kind)
    write_strings(tmp_path / "texts", iter([array[3:5], array[6:6], array[1:2], array[5:]]))
    assert open_strings(tmp_path / "texts").to_pylist() == [*STRINGS[3:5], STRINGS[1], *STRINGS[5:]]


@pytest.mark.parametrize("strings", [[], ["", ""]])
def test_nothing_at_all_can_be_mapped(tmp_path, strings):
    assert write_strings(tmp_path / "texts", iter([pa.array(strings, pa.string())])) == len(strings)
    assert open_strings(tmp_path / "texts").to_pylist() == strings


def test_rows_stay_readable_after_the_mapping_goes_out_of_scope(tmp_path):
    write_strings(tmp_path / "texts", iter([pa.array(STRINGS)]))
    taken = open_strings(tmp_path / "texts").take(pa.array([3, 5]))
    assert taken.to_pylist() == [STRINGS[3], STRINGS[5]]


def test_strings_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"texts\.bin does not exist"):
        open_strings(tmp_path / "texts")


# ---- Ids that are integers ------------------------------------------------------------------------------------------

PLAIN = ["0", "7", "-5", "10", "9" * 18, "-" + "9" * 18]
NOT_PLAIN = ["007", "00", "+1", "", "1 ", " 1", "1\n", "-0", "-", "--5", "-05", "9" * 19, "-" + "9" * 19, "1.0", "1e3"]
NOT_PLAIN += ["0x1f", "1_0", "²", "٣", "1a", "a1", "\x001", "1\x00", "1" + "0" * 18]


@pytest.mark.parametrize("text", PLAIN)
def test_a_plain_integer_becomes_one(text):
    found = plain_integers(pa.array([text, "12"]))
    assert found.dtype == np.int64
    assert found.tolist() == [int(text), 12]
    assert is_plain_integer(text)


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_one_text_that_is_spelled_otherwise_keeps_all_as_strings(text):
    for others in ([], ["12"], ["-12"]):
        assert plain_integers(pa.array([*others, text])) is None
        assert plain_integers(pa.array([text, *others])) is None
    assert not is_plain_integer(text)


def test_no_ids_are_integers():
    found = plain_integers(pa.array([], pa.string()))
    assert (found.dtype, found.shape) == (np.int64, (0,))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_only_the_rows_of_a_slice_are_looked_at(kind):
    array = pa.array(["x", "12", "-3", "", "007"], kind)
    assert plain_integers(array[1:3]).tolist() == [12, -3]
    assert plain_integers(array[1:4]) is None


def test_positive_integers_are_told_without_the_slow_pattern(monkeypatch):
    monkeypatch.setattr(formats.pc, "match_substring_regex", lambda *_: pytest.fail("the pattern was asked"))
    assert plain_integers(pa.array(["0", "10", "9" * 18])).tolist() == [0, 10, int("9" * 18)]


STORES = {
    "rows": ["0", "1", "2"],
    "sparse": ["70", "-4", "123456789012345678"],
    "strings": ["7", "007", "d/ü"],
}


@pytest.mark.parametrize("ids", STORES.values(), ids=STORES)
@pytest.mark.parametrize("asked", [PLAIN, NOT_PLAIN, ["7", "007"], []])
def test_a_store_finds_the_same_rows_by_an_arrow_array_as_by_strings(tmp_path, ids, asked):
    (tmp_path / "texts.tsv").write_text("".join(f"{i}\ttext of {i}\n" for i in ids))
    store = kd.TextStore.from_file(tmp_path / "texts.tsv")
    wanted = [*ids, *asked, *ids[::-1]]
    rows = [ids.index(i) if i in ids else -1 for i in wanted]
    assert store.rows_of_array(pa.array(wanted, pa.string())).tolist() == rows
    assert store.rows_of_array(pa.array(wanted, pa.large_string())).tolist() == rows
    assert store.rows_of(wanted).tolist() == rows
    assert store.rows_of_array(pa.array(asked, pa.string())).tolist() == rows[len(ids) : len(ids) + len(asked)]


def test_the_fingerprint_of_a_store_is_that_of_its_ids_and_texts(tmp_path):
    texts = ["0\ta\n1\tb\n", "0\ta\n1\tc\n", "0\tab\n1\t\n", "1\ta\n0\tb\n", "x\ta\n1\tb\n"]
    found = []
    for number, text in enumerate([*texts, texts[0]]):
        path = tmp_path / f"{number}.tsv"
        path.write_text(text)
        found.append(kd.TextStore.from_tsv(path).fingerprint())
    assert len(set(found[:5])) == 5
    assert found[5] == found[0]  # whatever the name of the file
