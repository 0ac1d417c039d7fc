"""TREC runs and qrels: what is written reads back bit for bit, and every bad line is named."""

import gc
import gzip
import logging
import pickle
import re

import numpy as np
import pyarrow as pa
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data import runs
from hf_kd_ranking.data.rankings import Ranking, as_run
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.errors import InputError

IDS = ["7130104", "msmarco_passage_00_12", "d/ü", "文書-1", "-3", "a\u200bb"]
# Scores whose decimal form is long, tiny, huge or negative; falling.
SCORES = [3e38, 1 / 3, 0.1 + 0.2, 5e-324, -0.7000000000000001, -1e22]


def written(tmp_path, content: str | bytes):
    path = tmp_path / "input.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- Round trips ----------------------------------------------------------------------------------------------------


def test_run_reads_back_bit_by_bit(tmp_path):
    run = kd.Run({"q2": list(zip(IDS, SCORES, strict=True)), "q/ü": [("7130104", 1.0)], "q1": [("d", -2.5)]})
    kd.write_run(run, tmp_path / "run.trec")
    again = kd.read_run(tmp_path / "run.trec")
    assert again == run
    assert list(again) == ["q2", "q/ü", "q1"]
    assert isinstance(again, kd.Run)


def test_float32_scores_read_back_as_the_same_float32(tmp_path):
    scores = np.sort(np.random.default_rng(0).normal(size=200).astype(np.float32))[::-1]
    kd.write_run({"q": [(str(i), score) for i, score in enumerate(scores)]}, tmp_path / "run.trec")
    assert [np.float32(score) for _, score in kd.read_run(tmp_path / "run.trec")["q"]] == list(scores)


def test_a_run_is_written_as_trec_eval_reads_it(tmp_path):
    kd.write_run({"q1": [("d1", 2.0), ("d2", 1.5)], "q2": [("d1", -1)]}, tmp_path / "run.trec", tag="mine")
    lines = ["q1 Q0 d1 1 2.0 mine", "q1 Q0 d2 2 1.5 mine", "q2 Q0 d1 1 -1.0 mine"]
    assert (tmp_path / "run.trec").read_bytes() == "".join(line + "\n" for line in lines).encode()


def test_qrels_read_back_with_every_grade(tmp_path):
    qrels = {"q/ü": {"文書-1": 3, "d": 0, "spam": -2}, "q1": {"d": 1}}
    write_qrels(qrels, tmp_path / "qrels.txt")
    assert (tmp_path / "qrels.txt").read_text(encoding="utf-8").startswith("q/ü 0 文書-1 3\nq/ü 0 d 0\n")
    assert kd.read_qrels(tmp_path / "qrels.txt") == qrels


def test_scores_give_the_order_and_ties_keep_that_of_the_file(tmp_path):
    path = written(tmp_path, "q Q0 b 1 1.0 t\nq Q0 c 2 3.0 t\nq Q0 a 3 1.0 t\nq Q0 z 4 3.0 t\n")
    assert [doc_id for doc_id, _ in kd.read_run(path)["q"]] == ["c", "z", "b", "a"]


def test_crlf_blank_lines_tabs_and_byte_order_mark_are_read(tmp_path):
    path = written(tmp_path, "\ufeffq\tQ0\td\t1\t2.5\tt\r\n\r\nq Q0  e 2 1 t".encode())
    assert kd.read_run(path) == {"q": [("d", 2.5), ("e", 1.0)]}


def test_beir_qrels_with_their_header_equal_the_trec_form(tmp_path):
    path = written(tmp_path, "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td1\t1\n")
    assert kd.read_qrels(path) == {"q1": {"d1": 2, "d2": 0}, "q2": {"d1": 1}}


def test_ms_marcos_runs_have_the_rank_as_their_third_column(tmp_path):
    path = written(tmp_path, "\ufeff7\t30\t1\n7\t20\t2\n\n\ufeff8\t30\t2\n8\t9\t1\n")
    run = kd.read_run(path)
    assert run == {"7": [("30", -1.0), ("20", -2.0)], "8": [("9", -1.0), ("30", -2.0)]}
    assert kd.read_run(path, 1) == run.top(1)
    with pytest.raises(ValueError, match=r"line 2: rank must be a finite integer, got '2\.5'"):
        kd.read_run(written(tmp_path, "7 30 1\n7 20 2.5\n"))


def test_qrels_of_three_columns_need_no_header(tmp_path):
    assert kd.read_qrels(written(tmp_path, "q1 d1 2\nq1 d2 0\n")) == {"q1": {"d1": 2, "d2": 0}}


BEIR = "\ufeffquery-id\tcorpus-id\tscore\n"
MARKED = {
    "run": (kd.read_run, "\ufeffq Q0 a 1 2 t\n\ufeffq Q0 b 2 1 t\n", {"q": [("a", 2.0), ("b", 1.0)]}),
    "qrels": (kd.read_qrels, "\ufeffq 0 a 1\n\ufeffq 0 b 2\n", {"q": {"a": 1, "b": 2}}),
    "BEIR": (kd.read_qrels, f"{BEIR}q\ta\t1\n{BEIR}q\tb\t2\n", {"q": {"a": 1, "b": 2}}),
}


@pytest.mark.parametrize(("read", "content", "expected"), MARKED.values(), ids=MARKED)
def test_byte_order_marks_of_joined_files_are_no_part_of_ids(tmp_path, read, content, expected):
    assert read(written(tmp_path, content)) == expected


@pytest.mark.parametrize("column_2", ["0", "Q0"])
def test_the_second_column_of_qrels_is_not_read(tmp_path, column_2):
    assert kd.read_qrels(written(tmp_path, f"q {column_2} d 2\n")) == {"q": {"d": 2}}


# ---- Errors of the readers ------------------------------------------------------------------------------------------

RUN_LINE = "q Q0 d 1 2.5 t\n"
BAD_RUNS = {
    "five columns": (
        RUN_LINE + "q Q0 e 2 1.5\n",
        "line 2: needed 6 columns (query_id Q0 doc_id rank score tag), got 5",
    ),
    "seven columns": (RUN_LINE + "\nq Q0 my doc 2 1.5 t\n", "line 3: needed 6 columns"),
    "an underscore": (RUN_LINE + "q Q0 e 2 1_0 t\n", "line 2: score must be a finite number, got '1_0'"),
    "a word": ("q Q0 d 1 high t\n", "line 1: score must be a finite number, got 'high'"),
    "NaN": (RUN_LINE + "q Q0 e 2 nan t\n", "line 2: score must be a finite number, got 'nan'"),
    "infinite": (RUN_LINE + "q Q0 e 2 -inf t\n", "line 2: score must be a finite number, got '-inf'"),
    "a document twice": (
        RUN_LINE + "r Q0 d 1 2 t\nq Q0 d 2 1 t\n",
        "line 3: document 'd' appears twice in the ranking",
    ),
    "bad UTF-8": (RUN_LINE.encode() + b"q Q0 \xff 2 1.5 t\n", "line 2: byte 0xff at column 6 is not UTF-8"),
    "blank lines only": ("\n \n", "is empty; needed lines of query_id Q0 doc_id rank score tag"),
}
BAD_QRELS = {
    "three columns": ("q 0 d 1\nq d 1\n", "line 2: needed 4 columns (query_id 0 doc_id grade), got 3: 'q d 1'"),
    "four columns in BEIR": (
        "query-id\tcorpus-id\tscore\nq\t0\td\t1\n",
        "line 2: needed 3 columns (query-id corpus-id score), got 4",
    ),
    "a word": ("q 0 d yes\n", "line 1: grade must be a finite integer, got 'yes'"),
    "a fraction": ("q 0 d 1\nq 0 e 0.5\n", "line 2: grade must be a finite integer, got '0.5'"),
    "NaN": ("q 0 d nan\n", "line 1: grade must be a finite integer, got 'nan'"),
    "an underscore": ("q 0 d 1\nq 0 e 1_0\n", "line 2: grade must be a finite integer, got '1_0'"),
    "wide digits": ("q 0 d １\n", "line 1: grade must be a finite integer, got '１'"),
    "33 bits": ("q 0 d 4294967296\n", "line 1: grade must be a finite integer, got '4294967296'"),
    "two grades": ("q 0 d 1\n\nq 0 d 2\n", "line 3: 'q' 'd' has two grades, 2 and an earlier one"),
    "blank lines only": ("\n", "is empty; needed lines of query_id 0 doc_id grade"),
}


@pytest.mark.parametrize(("content", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_bad_run_is_refused_with_file_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
        kd.read_run(path)


@pytest.mark.parametrize(("content", "message"), BAD_QRELS.values(), ids=BAD_QRELS)
def test_bad_qrels_are_refused_with_file_and_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
        kd.read_qrels(path)


def test_qrels_with_bad_utf8_are_refused_with_file_and_line(tmp_path):
    path = written(tmp_path, b"q 0 d 1\nq 0 \xff 1\n")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path} line 2: byte 0xff at column 5 is not UTF-8')}"):
        kd.read_qrels(path)


def test_the_same_judgment_twice_is_no_contradiction(tmp_path):
    assert kd.read_qrels(written(tmp_path, "q 0 d 1\nq 0 d 1\n")) == {"q": {"d": 1}}


@pytest.mark.parametrize(("read", "what"), [(kd.read_run, "run"), (kd.read_qrels, "qrels")])
def test_missing_files_folders_and_empty_files_are_refused(tmp_path, read, what):
    with pytest.raises(FileNotFoundError, match=re.escape(f"The {what} file {tmp_path / 'no'} does not exist")):
        read(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=re.escape(f"The {what} file {tmp_path} is a folder, not a file")):
        read(tmp_path)
    path = written(tmp_path, "")
    with pytest.raises(ValueError, match=re.escape(f"The {what} file {path} is empty")):
        read(path)


# ---- Writers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\nb", "a\u00a0b", "a\u2028b", " a", ""])
def test_names_with_white_space_are_refused_before_writing(tmp_path, name):
    path = tmp_path / "out.txt"
    writers = [
        lambda: kd.write_run({name: [("d", 1.0)]}, path),
        lambda: kd.write_run({"q": [("d", 2.0), (name, 1.0)]}, path),
        lambda: kd.write_run({"q": [("d", 1.0)]}, path, tag=name),
        lambda: write_qrels({name: {"d": 1}}, path),
        lambda: write_qrels({"q": {"d": 1, name: 1}}, path),
    ]
    for write in writers:
        with pytest.raises(ValueError, match=f"cannot hold the id {re.escape(repr(name))}; rename it first"):
            write()
    assert list(tmp_path.iterdir()) == []


class _Interrupted(dict):
    def items(self):
        yield from super().items()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("write", "content"),
    [(kd.write_run, {"q": [("d", 1.0)]}), (write_qrels, {"q": {"d": 1}})],
    ids=["run", "qrels"],
)
def test_interrupted_writer_leaves_only_the_old_file(tmp_path, write, content):
    path = tmp_path / "out.txt"
    path.write_text("old\n")
    with pytest.raises(KeyboardInterrupt):
        write(_Interrupted(content), path)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
    write(content, path)
    assert path.read_text().startswith("q ")


# ---- Reading in two ways --------------------------------------------------------------------------------------------

PLAIN = "q Q0 d1 1 3.5 t\nr Q0 d1 1 -1e-3 t\nq Q0 d2 2 3.5 t\nq Q0 7 3 4 t\nr Q0 d9 2 -2 t\n"
FORMS = {
    "spaces": PLAIN,
    "tabs": PLAIN.replace(" ", "\t"),
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "a byte order mark": "\ufeff" + PLAIN,
    "no break at the end": PLAIN.strip(),
    "blank lines": PLAIN.replace("\n", "\n\n"),
    "two spaces": PLAIN.replace(" Q0", "  Q0"),
    "space at the end": PLAIN.replace("\n", " \n"),
    "ranks that are no numbers": PLAIN.replace(" 1 ", " first "),
}
WANTED = {"q": [("7", 4.0), ("d1", 3.5), ("d2", 3.5)], "r": [("d1", -1e-3), ("d9", -2.0)]}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_a_run_in_any_form_reads_the_same(tmp_path, content):
    run = kd.read_run(written(tmp_path, content))
    assert run == WANTED
    assert list(run) == ["q", "r"]
    (tmp_path / "run.trec.gz").write_bytes(gzip.compress(content.encode()))
    assert kd.read_run(tmp_path / "run.trec.gz") == WANTED


def test_the_fast_and_the_careful_reader_agree(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = [
        f"{query} Q0 {doc} {rng.integers(9)} {rng.integers(9) / 4} t\n"
        for query in range(20)
        for doc in rng.permutation(40)[:30]
    ]
    path = written(tmp_path, "".join(rng.permutation(lines)))
    assert runs._read_at_once(path) is not None
    fast = {k: kd.read_run(path, k) for k in (None, 1, 7, 30)}
    monkeypatch.setattr(runs, "_read_at_once", lambda path: None)
    assert fast == {k: kd.read_run(path, k) for k in fast}


def test_k_keeps_the_first_k_and_what_ties_with_the_last(tmp_path):
    path = written(tmp_path, "q Q0 a 1 2 t\nq Q0 b 2 1 t\nr Q0 a 1 1 t\nq Q0 c 3 1 t\nq Q0 d 4 0 t\n")
    assert kd.read_run(path, 1) == {"q": [("a", 2.0)], "r": [("a", 1.0)]}
    assert kd.read_run(path, 2) == {"q": [("a", 2.0), ("b", 1.0), ("c", 1.0)], "r": [("a", 1.0)]}
    assert kd.read_run(path, 9) == kd.read_run(path)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        kd.read_run(path, 0)


def test_k_keeps_what_ties_with_the_last_as_float32(tmp_path):
    path = written(tmp_path, "q Q0 a 1 100000.002 t\nq Q0 b 2 100000.001 t\nq Q0 c 3 100000.03 t\n")
    assert [doc_id for doc_id, _ in kd.read_run(path, 2)["q"]] == ["c", "a", "b"]
    assert [doc_id for doc_id, _ in kd.read_run(path, 1)["q"]] == ["c"]


def test_ranks_that_contradict_scores_are_warned_of_once(tmp_path, caplog):
    run = kd.read_run(written(tmp_path, "q Q0 a 1 1 t\nq Q0 b 2 3 t\n\nq Q0 c 3 2 t\n"))
    assert [doc_id for doc_id, _ in run["q"]] == ["b", "c", "a"]
    assert len(caplog.records) == 1
    assert "input.txt line 1: rank 1 contradicts the scores (1 such places)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kd.read_run(written(tmp_path, "q Q0 a 0 2 t\nq Q0 b 0 1 t\nr Q0 b 5 3 t\nr Q0 a 5 3 t\n"))
    assert caplog.records == []


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\x1f"])
def test_an_id_with_white_space_is_refused_whichever_it_is(tmp_path, space):
    with pytest.raises(ValueError, match=r"line 1: needed 6 columns .* got 7: .*ids cannot hold white space"):
        kd.read_run(written(tmp_path, f"q Q0 a{space}b 1 2 t\n"))


# ---- Runs in memory -------------------------------------------------------------------------------------


def test_top_keeps_the_first_k_of_every_query():
    run = kd.Run({"q": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "r": [("a", 1.0)]})
    assert run.top(2) == {"q": [("a", 3.0), ("b", 2.0)], "r": [("a", 1.0)]}
    assert len(run["q"]) == 3


def test_select_keeps_some_queries_in_the_order_given():
    run = kd.Run({"q": [("a", 3.0)], "r": [("a", 1.0)], "s": []})
    assert list(run.select(["r", "x", "q"]).items()) == [("r", [("a", 1.0)]), ("q", [("a", 3.0)])]


def test_ranking_equals_the_list_of_its_pairs_and_slices_are_views():
    pairs = [("a", 3.0), ("ü b", 2.5), ("c", -1.0)]
    ranking = Ranking(["a", "ü b", "c"], np.array([3, 2.5, -1], dtype=np.float32))
    assert ranking == pairs and pairs == ranking and {"q": pairs} == {"q": ranking}
    assert ranking != pairs[:2] and ranking != tuple(pairs)
    assert [list(ranking[part]) for part in (slice(1, None), slice(5), slice(-2, -1))] == [
        pairs[1:],
        pairs,
        pairs[-2:-1],
    ]
    assert ranking[1:][1:] == pairs[2:] and ranking[::-1] == pairs[::-1] and list(reversed(ranking)) == pairs[::-1]
    assert (ranking[1], ranking[-1], ranking[1:][0]) == (pairs[1], pairs[2], pairs[1])
    assert ranking[1:].doc_ids == ["ü b", "c"] and ranking[1:].scores.tolist() == [2.5, -1.0]
    assert ranking[:1].scores.base is not None
    assert repr(ranking) == repr(pairs) and pickle.loads(pickle.dumps(ranking[1:])) == pairs[1:]
    with pytest.raises(IndexError):
        ranking[:1][1]
    with pytest.raises(InputError, match="one score per document, got 2 and 1"):
        Ranking(["a", "b"], [1.0])


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (Ranking(["a", "b"], [1.0, np.nan]), "Query 'q', document 'b': the score is not a finite number"),
        (Ranking(["a", "b", "a"], [3.0, 2.0, 1.0]), "Query 'q': document 'a' appears twice"),
    ],
    ids=["NaN", "repeated"],
)
def test_ranking_by_columns_is_checked_as_a_list_is(tmp_path, ranking, message):
    with pytest.raises(InputError, match=message):
        kd.write_run(kd.Run({"p": [("a", 1.0)], "q": ranking}), tmp_path / "run.trec")
    assert list(tmp_path.iterdir()) == []
    assert as_run({"q": ranking[:2]} if message.endswith("twice") else {"q": ranking[:1]})["q"] is not None


def test_read_run_keeps_the_bytes_of_the_ids_and_sixteen_per_document(tmp_path):
    kd.write_run({q: [(f"{d:07d}", -float(d)) for d in range(500)] for q in range(100)}, tmp_path / "run.trec")
    before = pa.total_allocated_bytes()
    run = kd.read_run(tmp_path / "run.trec")
    gc.collect()
    assert (pa.total_allocated_bytes() - before) / 50_000 < 8 + 8 + 7 + 2
    assert all(ranking._doc_ids is run["0"]._doc_ids for ranking in run.values())


def test_run_is_written_while_its_rankings_are_made(tmp_path):
    made = []

    def rankings():
        for query_id in ("1", "2"):
            made.append(next(tmp_path.iterdir()).name.startswith("run.trec.tmp"))  # the file is open, without its name
            yield query_id, [("d", 2.0), ("e", 1.0)]
        if made[2:]:
            raise KeyError("the index is damaged")

    assert kd.write_run(rankings(), tmp_path / "run.trec") == 4
    assert made == [True, True]
    assert kd.read_run(tmp_path / "run.trec") == {"1": [("d", 2.0), ("e", 1.0)], "2": [("d", 2.0), ("e", 1.0)]}
    (tmp_path / "run.trec").unlink()
    with pytest.raises(KeyError, match="damaged"):
        kd.write_run(rankings(), tmp_path / "run.trec")
    assert list(tmp_path.iterdir()) == []


def test_without_same_ids_drops_the_query_from_its_ranking():
    run = kd.Run({"a": [("a", 3.0), ("b", 2.0)], "b": [("a", 1.0)], "c": [("c", 1.0)]})
    assert run.without_same_ids() == {"a": [("b", 2.0)], "b": [("a", 1.0)], "c": []}


def test_from_scores_groups_sorts_and_keeps_the_order_of_ties():
    run = kd.Run.from_scores([7, 8, 7, 7, 7], [1, 2, 3, 4, 5], np.array([0.5, 1, 2, 0.5, 2], dtype=np.float32))
    assert run == {"7": [("3", 2.0), ("5", 2.0), ("1", 0.5), ("4", 0.5)], "8": [("2", 1.0)]}


def test_from_scores_refuses_lists_of_different_length():
    with pytest.raises(InputError, match="as many query ids as doc ids and scores, got 2, 2 and 1"):
        kd.Run.from_scores(["q", "q"], ["a", "b"], [1.0])
    with pytest.raises(InputError, match="Query 'q', document 'a': the score is not a finite number: nan"):
        kd.Run.from_scores(["q"], ["a"], [float("nan")])


def test_integer_ids_of_runs_and_qrels_become_strings(tmp_path):
    assert kd.evaluate_run({1: {2: 1.0, 3: 2.0}}, {1: {2: 1}}, ["RR@10"]) == {"RR@10": 0.5}
    write_qrels({1: {2: 1}}, tmp_path / "qrels.txt")
    kd.write_run({1: [(2, 1.0)]}, tmp_path / "run.trec")
    assert kd.read_qrels(tmp_path / "qrels.txt") == {"1": {"2": 1}}
    assert kd.read_run(tmp_path / "run.trec") == {"1": [("2", 1.0)]}


@pytest.mark.parametrize("grades", [{"d": 1.5}, {"d": 2**31}, {"d": "1"}, ["d"]])
def test_grades_that_are_not_integers_are_not_written(tmp_path, grades):
    with pytest.raises(InputError, match=r"^Query 'q'"):
        write_qrels({"q": grades}, tmp_path / "qrels.txt")
    assert not (tmp_path / "qrels.txt").exists()
