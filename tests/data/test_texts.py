"""Text stores: every text comes back as it was written, under either spelling of its id, in every process."""

import gzip
import json
import os
import pickle
import re

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError

# Texts with what a careless reader loses: quotes, blanks at both ends, nothing at all, and what Python's splitlines
# takes for the end of a line.
TEXTS = [
    '"quoted',
    'in "the" middle"',
    "",
    "  blanks  ",
    "a\u2028b\u2029c\u0085d\x0be\x0cf",
    "ü文書\U0001f600",
    "NULL",
    "#",
]
ID_KINDS = {
    "rows": [str(i) for i in range(len(TEXTS))],
    "sparse": ["70", "0", "-4", "123456789012345678", "8", "9", "10", "71"],
    "msmarco-v2": [f"msmarco_passage_00_{i}" for i in (12, 1, 2, 120, 0, 7, 9, 3)],
    "odd": ["a b", "ü", "文書", "007", "7", "-0", " 7", "+7"],
}
WITH_EVERY_KIND_OF_ID = pytest.mark.parametrize("ids", ID_KINDS.values(), ids=ID_KINDS)


def tsv(tmp_path, *lines: str, name: str = "texts.tsv"):
    path = tmp_path / name
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path


def build(tmp_path, form: str, ids: list[str], texts: list[str]) -> kd.TextStore:
    if form == "tsv":
        return kd.TextStore.from_tsv(tsv(tmp_path, *map("\t".join, zip(ids, texts, strict=True))))
    if form == "jsonl":
        lines = [json.dumps({"_id": i, "text": text}) for i, text in zip(ids, texts, strict=True)]
        return kd.TextStore.from_jsonl(tsv(tmp_path, *lines, name="texts.jsonl"))
    dataset = datasets.Dataset.from_dict({"docno": ids, "body": texts})
    return kd.TextStore.from_dataset(dataset, tmp_path / "store", id_column="docno", text_column="body")


# ---- Building and looking up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tsv", "jsonl", "dataset"])
@WITH_EVERY_KIND_OF_ID
def test_texts_come_back_as_written_in_source_order(tmp_path, form, ids):
    store = build(tmp_path, form, ids, TEXTS)
    assert list(store.items()) == list(zip(ids, TEXTS, strict=True))
    assert list(store.ids()) == ids
    assert len(store) == len(TEXTS)
    assert store[ids[::-1]] == TEXTS[::-1]
    assert [store[i] for i in ids] == TEXTS
    assert store[[ids[2], ids[2], ids[0]]] == [TEXTS[2], TEXTS[2], TEXTS[0]]
    assert store[[]] == []


@WITH_EVERY_KIND_OF_ID
def test_an_opened_and_an_unpickled_store_give_the_same(tmp_path, ids):
    store = build(tmp_path, "tsv", ids, TEXTS)
    for again in (kd.TextStore.open(store.folder), pickle.loads(pickle.dumps(store))):
        assert list(again.items()) == list(zip(ids, TEXTS, strict=True))
        assert again[ids[::-1]] == TEXTS[::-1]
        assert again.has_integer_ids is store.has_integer_ids
        assert again.source == str(tmp_path / "texts.tsv")


def test_a_pickled_store_is_its_path_and_not_its_texts(tmp_path):
    store = build(tmp_path, "tsv", ["0"], ["x" * 10_000])
    assert len(pickle.dumps(store)) < 1_000


@pytest.mark.parametrize(
    ("kind", "integer"), [("rows", True), ("sparse", True), ("msmarco-v2", False), ("odd", False)]
)
def test_integer_ids_are_looked_up_by_either_spelling(tmp_path, kind, integer):
    store = build(tmp_path, "tsv", ID_KINDS[kind], TEXTS)
    assert store.has_integer_ids is integer
    if integer:
        numbers = [int(i) for i in ID_KINDS[kind]]
        assert store[numbers] == store[np.array(numbers)] == store[[*map(str, numbers[:-1]), numbers[-1]]] == TEXTS
        assert store[np.int64(numbers[0])] == store[np.str_(numbers[0])] == TEXTS[0]
    elif kind == "odd":
        assert store[7] == store["7"] == TEXTS[4]  # not that of "007", " 7" or "+7"


def test_ids_that_are_the_rows_need_no_index(tmp_path):
    assert not list(build(tmp_path, "tsv", ["0", "1", "2"], TEXTS[:3]).folder.glob("keys.npy"))
    assert list(build(tmp_path, "tsv", ["0", "2", "1"], TEXTS[1:4]).folder.glob("keys.npy"))


def test_a_title_is_put_before_its_text(tmp_path):
    rows = [{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "title": "", "text": "y"}, {"_id": 3, "text": " z"}]
    store = kd.TextStore.from_jsonl(tsv(tmp_path, *map(json.dumps, rows), name="corpus.jsonl"))
    assert list(store.items()) == [("a", "T x"), ("b", "y"), ("3", " z")]


@pytest.mark.parametrize("title", ["T", "", None])
def test_titles_of_a_data_set_are_read_as_those_of_json_lines(tmp_path, title):
    rows = [{"_id": "a", "title": title, "text": " x "}, {"_id": "b", "title": "U", "text": "y"}]
    from_lines = kd.TextStore.from_jsonl(tsv(tmp_path, *map(json.dumps, rows), name="corpus.jsonl"))
    store = kd.TextStore.from_dataset(datasets.Dataset.from_list(rows), tmp_path / "store", id_column="_id")
    assert store["a"] == ("T  x" if title else " x ")
    assert store["b"] == "U y"
    assert store.fingerprint() == from_lines.fingerprint()


def test_crlf_blank_lines_and_byte_order_mark_are_read(tmp_path):
    store = kd.TextStore.from_tsv(tsv(tmp_path, "\ufeff0\ta\r", "\r", "1\tb\r", "\ufeff2\tc\ufeff\r"))
    assert list(store.items()) == [("0", "a"), ("1", "b"), ("2", "c\ufeff")]
    assert store.has_integer_ids
    lines = ['\ufeff{"id": 0, "text": "a"}', '\ufeff{"id": 1, "text": "b"}']
    store = kd.TextStore.from_jsonl(tsv(tmp_path, *lines, name="t.jsonl"))
    assert list(store.items()) == [("0", "a"), ("1", "b")]


def test_from_file_opens_folders_json_lines_and_tsv(tmp_path):
    store = kd.TextStore.from_file(tsv(tmp_path, "0\ta"))
    assert kd.TextStore.from_file(store.folder)["0"] == "a"
    assert kd.TextStore.from_file(tsv(tmp_path, '{"id": 5, "text": "b"}', name="t.jsonl"))[5] == "b"


# ---- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "absent"), [("rows", [-1, 8, "-1", "00", "x", 2**40]), ("sparse", [1, -5, 72, "070"])]
)
def test_rows_of_is_the_place_in_the_source_or_minus_one(tmp_path, kind, absent):
    store = build(tmp_path, "tsv", ID_KINDS[kind], TEXTS)
    rows = store.rows_of([ID_KINDS[kind][5], *absent, ID_KINDS[kind][1]])
    assert rows.tolist() == [5, *[-1] * len(absent), 1]
    assert rows.dtype == np.int64
    assert [i in store for i in absent] == [False] * len(absent)
    assert all(i in store for i in ID_KINDS[kind])


def test_rows_of_has_the_shape_of_the_ids(tmp_path):
    store = build(tmp_path, "tsv", ["50", "60", "70"], TEXTS[:3])
    assert store.rows_of(np.array([[50, 70], [60, 61]])).tolist() == [[0, 2], [1, -1]]
    assert store.rows_of([]).shape == (0,)


def test_a_string_id_that_shares_the_hash_of_another_is_absent(tmp_path, monkeypatch):
    store = build(tmp_path, "tsv", ["a", "b"], TEXTS[:2])
    monkeypatch.setattr("hf_kd_ranking.data.ids._hashes", lambda ids: np.array([store._keys[0] for _ in ids]))
    owner = list(store.ids())[store._rows[0]]
    assert store.rows_of(["a", "b"]).tolist() == [0 if owner == "a" else -1, 1 if owner == "b" else -1]


@pytest.mark.parametrize("id_", ["--5", "²"])
def test_a_string_that_only_looks_like_an_integer_is_absent(tmp_path, id_):
    assert id_ not in build(tmp_path, "tsv", ["0", "1"], TEXTS[:2])


def test_a_long_negative_integer_is_found_by_its_string(tmp_path):
    assert build(tmp_path, "tsv", ["-123456789012345678"], ["x"])["-123456789012345678"] == "x"


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "missing"), [(ID_KINDS["rows"], "'-1', '9', '007'"), (ID_KINDS["odd"], "'-1', '9', '70'")]
)
def test_missing_ids_are_counted_and_the_first_three_named(tmp_path, ids, missing):
    store = build(tmp_path, "tsv", ids, TEXTS)
    wanted = [ids[0], -1, 9, json.loads(missing.split(", ")[-1].replace("'", '"')), "none"]
    with pytest.raises(KeyError) as error:
        store[wanted]
    expected = f"4 of 5 ids are not among the 8 texts of {tmp_path / 'texts.tsv'}: {missing}; do the files belong"
    assert error.value.args[0].startswith(expected)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0\ta", "", "1\tb\tc"], " line 3: needed 2 tab-separated columns (id, text), got 3: '1\\tb\\tc'"),
        (["0\ta", "b"], " line 2: needed 2 tab-separated columns (id, text), got 1: 'b'"),
        (["a\tx", "b\ty", "a\tz"], ": id 'a' appears twice with different texts, in rows 1 and 3"),
        (["0\tx", "1\ty", "1\tz"], ": id '1' appears twice with different texts, in rows 2 and 3"),
        (["5\tx", "4\ty", "5\tx", "5\tz"], ": id '5' appears twice with different texts, in rows 1 and 4"),
        (["", ""], " holds no rows"),
        (['{"_id": 1, "text": "a"}', '{"key": 2, "text": "a"}'], " line 2: needed an id (_id, id, doc_id, query_id)"),
        (['{"_id": 1, "text": null}'], " line 1: needed an id (_id, id, doc_id, query_id) and a string 'text'"),
        (['{"_id": 1, "text": "a"}', "", '{"_id":'], " line 3: invalid JSON (Expecting value at column 8)"),
        (['{"_id": null, "text": "a"}'], " line 1: _id must be a string or an integer, got null"),
        (['{"id": 1.5, "text": "a"}'], " line 1: id must be a string or an integer, got 1.5"),
        (['{"id": true, "text": "a"}'], " line 1: id must be a string or an integer, got true"),
        (['{"id": 1, "text": "a", "title": 5}'], " line 1: title must be a string or null, got 5"),
        (
            ['{"id": 1, "text": "\\ud83d\\ude00"}', '{"id": 2, "text": "a \\ud83d"}'],
            " line 2: 'text' has half of a surrogate pair, \\ud83d",
        ),
        (['{"id": "\\udc00", "text": "a"}'], " line 1: 'id' has half of a surrogate pair, \\udc00"),
        (['{"id":' + "[" * 100_000], " line 1: JSON that cannot be read"),
        (['["_id", "text"]'], " line 1: needed a JSON object, got list"),
    ],
)
def test_bad_texts_are_refused_and_leave_no_store(tmp_path, lines, message):
    path = tsv(tmp_path, *lines, name="t.jsonl" if "{" in lines[0] or "[" in lines[0] else "t.tsv")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}{message}')}"):
        kd.TextStore.from_file(path)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("form", ["tsv", "jsonl", "dataset"])
@pytest.mark.parametrize("ids", [["0", "1", "2"], ["5", "7", "6"], ["a", "b", "c"]])
def test_an_id_twice_with_one_text_is_there_once(tmp_path, ids, form):
    first, second, third = ids
    store = build(tmp_path, form, [first, second, second, third, first], ["x", "y", "y", "z", "x"])
    assert list(store.items()) == [(first, "x"), (second, "y"), (third, "z")]
    assert store[[third, second, first]] == ["z", "y", "x"]
    assert store.rows_of(ids).tolist() == [0, 1, 2]
    (tmp_path / "once").mkdir()
    assert build(tmp_path / "once", form, ids, ["x", "y", "z"]).fingerprint() == store.fingerprint()


@pytest.mark.parametrize("change", [("a", "y"), ("b", "x"), ("aa", "x")])
def test_the_fingerprint_is_that_of_ids_and_texts(tmp_path, change):
    store = build(tmp_path, "tsv", ["a", "c"], ["x", "z"])
    (tmp_path / "other").mkdir()
    assert build(tmp_path / "other", "tsv", [change[0], "c"], [change[1], "z"]).fingerprint() != store.fingerprint()
    store.save(tmp_path / "copy")
    copy = kd.TextStore.open(tmp_path / "copy")
    assert copy.fingerprint() == copy.compute_fingerprint() == store.fingerprint()
    (copy.folder / "texts.bin").write_bytes(b"yz\n")
    assert copy.compute_fingerprint() != store.fingerprint()


@pytest.mark.parametrize("form", ["tsv", "jsonl", "dataset"])
def test_a_folder_with_other_texts_is_refused(tmp_path, form):
    def make(text: str) -> kd.TextStore:
        if form == "dataset":
            dataset = datasets.Dataset.from_dict({"id": ["a"], "text": [text]})
            return kd.TextStore.from_dataset(dataset, tmp_path / "store")
        read = kd.TextStore.from_tsv if form == "tsv" else kd.TextStore.from_jsonl
        line = f"a\t{text}" if form == "tsv" else json.dumps({"id": "a", "text": text})
        return read(tsv(tmp_path, line, name=f"t.{form}"), tmp_path / "store")

    assert make("old")["a"] == make("old")["a"] == "old"
    with pytest.raises(FileExistsError, match=r"store holds the texts of .* has other content; give another folder"):
        make("new")
    assert kd.TextStore.open(tmp_path / "store")["a"] == "old"


def test_a_file_rewritten_at_its_size_and_time_is_read_again(tmp_path):
    path = tsv(tmp_path, "0\t" + "x" * 300_000 + "old" + "x" * 300_000)
    before = path.stat()
    assert "old" in kd.TextStore.from_tsv(path)[0]
    path.write_text(path.read_text().replace("old", "new"))  # far from both ends of the file
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert "new" in kd.TextStore.from_tsv(path)[0]


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ({"id": None, "text": "a"}, "None, 'a' of type str"),
        ({"id": "b", "text": None}, "'b', 'None' of type NoneType"),
    ],
)
def test_a_missing_value_of_a_data_set_is_refused_by_its_row(tmp_path, row, value):
    dataset = datasets.Dataset.from_list([{"id": "x", "text": "y"}, row])
    with pytest.raises(InputError, match=f"row 1: needed an id, a text and at most a title; got {value}"):
        kd.TextStore.from_dataset(dataset, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_store_of_an_earlier_release_is_refused(tmp_path):
    store = build(tmp_path, "tsv", ["a"], ["x"])
    for content in ('{"has_integer_ids": true, "source": "x.tsv"}', "{", "[]"):
        (store.folder / "store.json").write_text(content)
        with pytest.raises(InputError, match=r"store\.json is damaged"):
            kd.TextStore.open(store.folder)


def test_bad_utf8_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"0\ta\n1\tb\xe9\n")
    with pytest.raises(ValueError, match=re.escape(f"{path} line 2: byte 0xe9 at column 4 is not UTF-8")):
        kd.TextStore.from_tsv(path)


def test_missing_columns_and_stores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has the columns docno, text, not id; name them by id_column"):
        kd.TextStore.from_dataset(datasets.Dataset.from_dict({"docno": [1], "text": ["a"]}), tmp_path / "store")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "store"))):
        kd.TextStore.open(tmp_path / "store")


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    path = tsv(tmp_path, "a\tx")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # texts.bin is complete by now
        kd.TextStore.from_tsv(path, tmp_path / "stores" / "mine")
    assert list((tmp_path / "stores").iterdir()) == []
    assert kd.TextStore.from_tsv(path, tmp_path / "stores" / "mine")["a"] == "x"


def test_store_is_not_built_among_other_files(tmp_path):
    path, folder = tsv(tmp_path, "0\tx"), tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("")
    with pytest.raises(
        FileExistsError, match=re.escape(f"{folder} holds something that is not a text store; give an empty")
    ):
        kd.TextStore.from_tsv(path, folder)
    (folder / "notes").unlink()
    assert kd.TextStore.from_tsv(path, folder)[0] == "x"


# ---- Workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_give_the_same_texts(tmp_path, method):
    ids = ID_KINDS["odd"]
    store = build(tmp_path, "tsv", ids, TEXTS)
    loader = DataLoader(
        ids, batch_size=3, num_workers=2, collate_fn=store.__getitem__, multiprocessing_context=method, timeout=60
    )
    assert list(loader) == [TEXTS[:3], TEXTS[3:6], TEXTS[6:]]


def test_compressed_files_are_read_by_their_names(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"_id": "a", "text": "x"}).encode()))
    assert list(kd.TextStore.from_file(path).items()) == [("a", "x")]
