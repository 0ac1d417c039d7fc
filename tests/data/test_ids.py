"""Strings on disk come back as they went in; ids lead to their rows in every spelling."""

import numpy as np
import pyarrow as pa
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.ids import IdIndex, open_strings, write_strings

STRINGS = ["", "a", "", "ü文書\U0001f600", "two\nlines\tand a tab", "x" * 5_000, " ", "\x00", ""]

# ---- On disk --------------------------------------------------------------------------------------------------------

CUTS = {
    "in one": [STRINGS],
    "one by one": [[text] for text in STRINGS],
    "with empty arrays": [[], STRINGS[:4], [], [], STRINGS[4:], []],
}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_strings_come_back_from_any_cut_into_arrays(tmp_path, cut, kind):
    assert write_strings(tmp_path / "texts", [pa.array(part, kind) for part in cut]) == len(STRINGS)
    found = open_strings(tmp_path / "texts")
    assert found.to_pylist() == STRINGS
    assert [found[row].as_py() for row in (8, 3, 0, 3)] == [STRINGS[row] for row in (8, 3, 0, 3)]
    assert found.take(pa.array([5, 1, 1])).to_pylist() == [STRINGS[5], "a", "a"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_strings_of_a_slice_are_only_its_own(tmp_path, kind):
    array = pa.array(STRINGS, kind)
    write_strings(tmp_path / "texts", iter([array[3:5], array[6:6], array[1:2], array[5:]]))
    assert open_strings(tmp_path / "texts").to_pylist() == [*STRINGS[3:5], STRINGS[1], *STRINGS[5:]]


@pytest.mark.parametrize("strings", [[], ["", ""]])
def test_strings_may_be_empty_or_absent(tmp_path, strings):
    assert write_strings(tmp_path / "texts", iter([pa.array(strings, pa.string())])) == len(strings)
    assert open_strings(tmp_path / "texts").to_pylist() == strings


def test_strings_stay_readable_after_the_mapping_ends(tmp_path):
    write_strings(tmp_path / "texts", iter([pa.array(STRINGS)]))
    taken = open_strings(tmp_path / "texts").take(pa.array([3, 5]))
    assert taken.to_pylist() == [STRINGS[3], STRINGS[5]]


def test_strings_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"texts\.bin does not exist"):
        open_strings(tmp_path / "texts")


# ---- Look-ups -------------------------------------------------------------------------------------------------------

PLAIN = ["0", "7", "-5", "9" * 18]
NOT_PLAIN = ["007", "+1", "", " 1", "-0", "9" * 19, "1.0", "²", "a1"]
STORES = {
    "rows": ["0", "1", "2"],
    "sparse": ["70", "-4", "123456789012345678"],
    "strings": ["7", "007", "d/ü"],
}


@pytest.mark.parametrize("ids", STORES.values(), ids=STORES)
@pytest.mark.parametrize("asked", [PLAIN, NOT_PLAIN, ["7", "007"], []])
def test_store_looks_up_arrow_arrays_as_strings(tmp_path, ids, asked):
    (tmp_path / "texts.tsv").write_text("".join(f"{i}\ttext of {i}\n" for i in ids))
    store = kd.TextStore.from_file(tmp_path / "texts.tsv")
    wanted = [*ids, *asked, *ids[::-1]]
    rows = [ids.index(i) if i in ids else -1 for i in wanted]
    assert store.rows_of_array(pa.array(wanted, pa.string())).tolist() == rows
    assert store.rows_of_array(pa.array(wanted, pa.large_string())).tolist() == rows
    assert store.rows_of(wanted).tolist() == rows
    assert store.rows_of_array(pa.array(asked, pa.string())).tolist() == rows[len(ids) : len(ids) + len(asked)]


def test_store_fingerprint_depends_on_ids_and_texts(tmp_path):
    texts = ["0\ta\n1\tb\n", "0\ta\n1\tc\n", "0\tab\n1\t\n", "1\ta\n0\tb\n", "x\ta\n1\tb\n"]
    found = []
    for number, text in enumerate([*texts, texts[0]]):
        path = tmp_path / f"{number}.tsv"
        path.write_text(text)
        found.append(kd.TextStore.from_tsv(path).fingerprint())
    assert len(set(found[:5])) == 5
    assert found[5] == found[0]  # the name of the file does not matter


@pytest.mark.parametrize("ids", [["0", "1", "2", "3"], ["7", "5", "9", "-1"], ["a", "7", "ü b", "c"]])
def test_index_without_rows_equals_one_that_is_built_so(ids):
    column = [pa.array(ids, pa.string())]
    built = IdIndex.build(column, np.array([False, True, False, True]))
    index = IdIndex.build(column).without(np.array([1, 3]))
    assert index.rows_of([*ids, "8"]).tolist() == built.rows_of([*ids, "8"]).tolist() == [0, -1, 2, -1, -1]
    assert index.ids_of(np.arange(4)) == ids
    assert index.without(np.array([0])).rows_of(ids).tolist() == [-1, -1, 2, -1]
