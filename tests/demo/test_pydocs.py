"""PyDocs on small packages written here; splits and similarities in the comments are computed by hand."""

import ast
import json
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

from hf_kd_ranking.demo import pydocs
from hf_kd_ranking.demo.pydocs import PyDocs, build_pydocs

# md5(query) mod 1000 = 74, 75, 99, 100: both sides of both borders, test < 75 and dev < 100
BORDER_QUERIES = {
    "Fill walls from old disks.": "test",
    "Send lines by their size.": "dev",
    "Item 959 holds one value.": "dev",
    "Paint results by their size.": "train",
}
SENTENCE = "Paint results by their size."
TEXT = "one two three four five six seven eight nine ten"


def passage(name: object) -> str:
    """Ten words of which no two passages share a bigram."""
    return " ".join(f"w{index}x{name}" for index in range(10))


def write_module(path: Path, docstrings: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    functions = [f"def f{index}():\n    {docstring!r}\n" for index, docstring in enumerate(docstrings)]
    path.write_text("".join(functions), encoding="utf-8")


def build(folder: Path, docstrings: list[str]) -> PyDocs:
    write_module(folder / "source" / "module.py", docstrings)
    return build_pydocs(folder / "output", {"source": folder / "source"})


def read_pairs(docs: PyDocs) -> dict[str, tuple[str, str]]:
    """Query -> (passage, split), through the qrels."""
    passages = dict(line.split("\t") for line in docs.collection.read_text(encoding="utf-8").splitlines())
    pairs = {}
    for split, path in docs.queries.items():
        queries = dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
        for line in docs.qrels[split].read_text(encoding="utf-8").splitlines():
            query_id, _, doc_id, _ = line.split()
            pairs[queries[query_id]] = (passages[doc_id], split)
    return pairs


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_hold_the_hand_written_lines(tmp_path):
    (tmp_path / "source" / "b").mkdir(parents=True)
    (tmp_path / "source" / "a.py").write_text(
        f'"""Fill walls from old disks.\n\n{passage(0)}"""\n'
        f'class A:\n    """Send lines by their size. {passage(1)}"""\n'
        "    async def f(self):\n        try: self\n"
        f'        except E:\n            def g(): """{SENTENCE} {passage(2)}"""\n'
    )
    write_module(tmp_path / "source" / "b" / "c.py", [f"Item 959 holds one value. {passage(3)}"])
    docs = build_pydocs(tmp_path / "output", {"source": tmp_path / "source"})
    # documents in order of file and position; queries in order of md5: 0122 Fill, bf63 Item, dbfd Paint, f1fc Send
    assert docs.collection.read_text() == "".join(f"{index}\t{passage(index)}\n" for index in range(4))
    assert {split: path.read_text() for split, path in docs.queries.items()} == {
        "train": "1000002\tPaint results by their size.\n",
        "dev": "1000001\tItem 959 holds one value.\n1000003\tSend lines by their size.\n",
        "test": "1000000\tFill walls from old disks.\n",
    }
    assert {split: path.read_text() for split, path in docs.qrels.items()} == {
        "train": "1000002 0 2 1\n",
        "dev": "1000001 0 3 1\n1000003 0 1 1\n",
        "test": "1000000 0 0 1\n",
    }
    assert docs.stats["pairs"] == {"train": 1, "dev": 2, "test": 1}
    assert docs.stats["docstrings"] == 4
    assert docs.stats == json.loads((tmp_path / "output" / "stats.json").read_text())


def test_split_follows_md5_of_the_query_at_its_borders(tmp_path):
    docs = build(tmp_path, [f"{query} {passage(index)}" for index, query in enumerate(BORDER_QUERIES)])
    assert {query: split for query, (_, split) in read_pairs(docs).items()} == BORDER_QUERIES


@pytest.mark.parametrize(
    ("docstring", "query", "text"),
    [
        (f"Read e.g. old files w.r.t. time. {TEXT}", "Read e.g. old files w.r.t. time.", TEXT),
        (f"Read version 1.5 of it\n\n{TEXT}", "Read version 1.5 of it", TEXT),
        (f"Read all of this\n    - {TEXT}", "Read all of this", TEXT),
        (f"Read all of this\nArgs:\n    {TEXT}", "Read all of this", f"Args: {TEXT}"),
        (f"Read all of this\nNotes\n-----\n{TEXT}", "Read all of this", f"Notes {TEXT}"),
        (f"read(a, b=(1, 2)) -> int\nread(a)\n\nRead all of this. {TEXT}", "Read all of this.", TEXT),
        (f"Read :class:`~a.B` and :py:func:`f`. {TEXT}", "Read a.B and f.", TEXT),
        (f"Read `a file <f.html>`_ or [b](http://c). {TEXT}", "Read a file or b.", TEXT),
        (f"Read [`A.b`] and ``c`` [1]_. {TEXT}", "Read A.b and c", TEXT),
        (f"Read *all* **kwargs as x**2 or a*b. {TEXT}", "Read all kwargs as x**2 or a*b.", TEXT),
        (f"Read a -- b == c. {TEXT}\n.. note:: d %(e)s <Tip>", "Read a b c.", f"{TEXT} d"),
        (f"Read one a\ud800 lone surrogate. {TEXT}", "Read one a? lone surrogate.", TEXT),
    ],
)
def test_first_sentence_is_the_query_and_markup_goes(tmp_path, docstring, query, text):
    (found, (found_text, _)), *others = read_pairs(build(tmp_path, [docstring])).items()
    assert (found, found_text, others) == (query, text, [])


def test_passages_are_cut_to_28_words_after_words_without_letters_are_dropped(tmp_path):
    words = [f"w{index}" for index in range(40)]
    docs = build(tmp_path, [f"{SENTENCE} {' -- '.join(words)}"])
    assert read_pairs(docs)[SENTENCE][0] == " ".join(words[:28])


@pytest.mark.parametrize(
    ("docstring", "rule"),
    [
        (f"name (int, *optional*): what it is. {TEXT}", "no_sentence"),
        (f"name : int or so. {TEXT}", "no_sentence"),
        (f"Args:\n    name: what it is. {TEXT}", "no_sentence"),
        ("Read all of this.", "no_passage"),
        (f"Read all this. {TEXT}", "query_too_short"),
        (f"{'word ' * 41}. {TEXT}", "query_too_long"),
        (f"Read all of this. {TEXT.removesuffix(' ten')}", "passage_too_short"),
        (f"{SENTENCE} {TEXT}", "duplicate_query"),
        (f"Read all of this. {passage(0)}", "duplicate_passage"),
    ],
)
def test_each_rule_drops_and_counts_its_docstring(tmp_path, docstring, rule):
    docs = build(tmp_path, [f"{SENTENCE} {passage(0)}", docstring])
    assert {name: count for name, count in docs.stats["dropped"].items() if count} == {rule: 1}
    assert read_pairs(docs) == {SENTENCE: (passage(0), "train")}


def test_queries_of_4_and_40_words_stay(tmp_path):
    queries = ["Read all of this.", " ".join(f"q{index}" for index in range(40)) + "."]
    docs = build(tmp_path, [f"{query} {passage(index)}" for index, query in enumerate(queries)])
    assert set(read_pairs(docs)) == set(queries)


@pytest.mark.parametrize(
    ("train_query", "is_removed"),
    [
        ("Kappa lambda sigma blue.", True),  # 2 of 4 bigrams in common: 0.5
        ("kappa, LAMBDA (sigma) blue.", True),  # neither case nor punctuation counts
        ("Kappa lambda sigma blue sky.", False),  # 2 of 5: 0.4
    ],
)
def test_test_query_goes_at_half_of_its_bigrams_in_train(tmp_path, train_query, is_removed):
    docs = build(tmp_path, [f"Kappa lambda sigma red. {passage(0)}", f"{train_query} {passage(1)}"])
    assert docs.stats["near_duplicates_removed"] == {"test": int(is_removed), "dev": 0}
    assert ("Kappa lambda sigma red." in read_pairs(docs)) is not is_removed
    assert train_query in read_pairs(docs)


def test_test_passage_goes_at_half_of_its_bigrams_in_train(tmp_path):
    # 10 words, 9 bigrams: the last three words differ, 6 of 12 bigrams in common
    near = " ".join([*passage(0).split()[:7], "other", "words", "here"])
    docs = build(tmp_path, [f"Fill walls from old disks. {passage(0)}", f"{SENTENCE} {near}"])
    assert docs.stats["near_duplicates_removed"] == {"test": 1, "dev": 0}
    far = " ".join([*passage(0).split()[:6], "some", "other", "words", "here"])  # 5 of 13
    docs = build(tmp_path, [f"Fill walls from old disks. {passage(0)}", f"{SENTENCE} {far}"])
    assert docs.stats["near_duplicates_removed"] == {"test": 0, "dev": 0}


def test_dev_gives_way_to_test_and_twins_within_a_split_stay(tmp_path):
    # md5 mod 1000: 8 -> 49 and 15 -> 8 are test, 6 -> 90 is dev; 3 of 5 bigrams in common
    docs = build(tmp_path, [f"Omega psi chi phi {number}. {passage(number)}" for number in (6, 8, 15)])
    assert docs.stats["near_duplicates_removed"] == {"test": 0, "dev": 1}
    assert docs.stats["pairs"] == {"train": 0, "dev": 0, "test": 2}


def test_sources_are_not_executed_and_bad_files_are_counted(tmp_path):
    source = tmp_path / "source"
    write_module(source / "good.py", [f"{SENTENCE} {passage(0)}"])
    (source / "good.py").write_text((source / "good.py").read_text() + "raise SystemExit\n")
    (source / "bad.py").write_text("def (")
    (source / "null.py").write_bytes(b"a = '\0'")
    for folder in ("tests", "test", "site-packages"):
        write_module(source / "sub" / folder / "skipped.py", [f"Read all of this. {passage(1)}"])
    docs = build_pydocs(tmp_path / "output", {"source": source})
    assert (docs.stats["files_parsed"], docs.stats["files_unreadable"]) == (1, 2)
    assert set(read_pairs(docs)) == {SENTENCE}


def test_second_run_reads_what_is_there_until_sources_or_rules_change(tmp_path, monkeypatch):
    docstrings = [f"{SENTENCE} {passage(0)}"]
    docs = build(tmp_path, docstrings)
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", None)
        assert build(tmp_path, docstrings) == docs
    assert len(read_pairs(build(tmp_path, [*docstrings, f"Read all of this. {passage(1)}"]))) == 2
    monkeypatch.setitem(pydocs.RECIPE, "passage_words", [10, 12])
    assert build(tmp_path, [f"{SENTENCE} {TEXT} a b c d"]).stats["recipe"]["passage_words"] == [10, 12]
    monkeypatch.setitem(pydocs.RECIPE, "passage_words", [10, 11])
    assert read_pairs(build(tmp_path, [f"{SENTENCE} {TEXT} a b c d"])) == {SENTENCE: (f"{TEXT} a", "train")}


@pytest.mark.parametrize("is_rebuilt", [False, True])
def test_interrupted_run_leaves_nothing_half_written(tmp_path, monkeypatch, is_rebuilt):
    before = read_bytes(build(tmp_path, [f"{SENTENCE} {passage(0)}"]).collection.parent) if is_rebuilt else None
    write_text = Path.write_text

    def interrupt(path: Path, *args: object, **kwargs: object) -> int:
        if path.name == "qrels.dev.txt":
            raise KeyboardInterrupt
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, [f"{SENTENCE} {passage(1)}"])
    assert {path.name for path in tmp_path.iterdir()} == {"source", "output"} if is_rebuilt else {"source"}
    assert not is_rebuilt or read_bytes(tmp_path / "output") == before


def test_default_roots_are_the_standard_library_and_installed_packages_without_import(tmp_path, monkeypatch):
    write_module(tmp_path / "stdlib" / "module.py", [f"{SENTENCE} {passage(0)}"])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(pydocs, "PACKAGES", ("mpmath", "no_such_package"))
    monkeypatch.delitem(sys.modules, "mpmath", raising=False)
    docs = build_pydocs(tmp_path / "output")
    assert "mpmath" not in sys.modules
    python = ".".join(map(str, sys.version_info[:3]))
    assert docs.stats["packages"] == {"mpmath": version("mpmath"), "python": python}
    assert docs.stats["files_parsed"] > 10
    assert SENTENCE in read_pairs(docs)


@pytest.mark.parametrize("name", ["collection.tsv", "notes.txt"])
def test_folder_with_other_data_is_refused_and_kept(tmp_path, name):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"needs a new folder or an earlier PyDocs to replace, got .*output; name"):
        build(tmp_path, [f"{SENTENCE} {passage(0)}"])
    assert read_bytes(tmp_path / "output") == {name: b"mine"}


def test_sources_without_a_usable_docstring_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of 2 docstrings in 1 files of \['source'\] is usable; name roots"):
        build(tmp_path, ["Short.", "Read all of this."])
    assert not (tmp_path / "output").exists()


def test_root_must_be_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"needs a folder of \.py files as root, and .*missing is not a folder"):
        build_pydocs(tmp_path / "output", {"source": tmp_path / "missing"})
