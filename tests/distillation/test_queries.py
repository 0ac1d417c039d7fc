"""The split of the queries, by their texts."""

from itertools import pairwise
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.texts import normalized
from hf_kd_ranking.distillation.queries import Split, read_judgments, split_queries


def split_of(job: kd.DistillJob) -> Split:
    return split_queries(job, read_judgments(job), kd.TextStore.from_file(job.queries))


def write_queries(folder: Path, texts: dict[str, str], judged: list[str]) -> dict[str, str]:
    """Write queries, and judgments of some of them; return the options that name the files."""
    (folder / "log.tsv").write_text("".join(f"{query_id}\t{text}\n" for query_id, text in texts.items()))
    (folder / "judged.txt").write_text("".join(f"{query_id} 0 d1 1\n" for query_id in judged))
    return {"queries": str(folder / "log.tsv"), "qrels": str(folder / "judged.txt")}


def split_log(make_job, files: dict[str, str], **options) -> Split:
    job = make_job(qrels=files["qrels"], **options)
    job.queries = files["queries"]
    return split_of(job)


@pytest.fixture
def part_of_qrels(tmp_path):
    """Write lines of the fixture's judgments into a file of their own, and return its path."""

    def write(name: str, start: int, stop: int) -> str:
        lines = (tmp_path / "qrels.txt").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.txt").write_text("".join(lines[start:stop]))
        return str(tmp_path / f"{name}.txt")

    return write


def test_texts_are_compared_without_case_blanks_and_composition():
    assert normalized("  Cafe\u0301  AU\tlait ") == "caf\u00e9 au lait"


def test_queries_of_one_text_are_in_one_split(make_job, tmp_path):
    texts = {f"a{i}": f"how to {i}" for i in range(60)} | {f"b{i}": f"How  TO {i}" for i in range(60)}
    split = split_log(make_job, write_queries(tmp_path, texts, list(texts))).query_ids
    assert sum(map(len, split.values())) == 120
    for query_ids in split.values():
        assert {query_id[1:] for query_id in query_ids if query_id[0] == "a"} == {
            query_id[1:] for query_id in query_ids if query_id[0] == "b"
        }


def test_copy_without_judgment_of_a_held_out_query_is_left_out_and_counted(make_job, tmp_path):
    texts = {f"a{i}": f"how to {i}" for i in range(60)} | {f"b{i}": f"How  TO {i}" for i in range(60)}
    split = split_log(make_job, write_queries(tmp_path, texts, list(texts)[:60]))
    held_out = [query_id[1:] for part in ("dev", "test") for query_id in split.query_ids[part]]
    copies = {query_id[1:] for query_id in split.query_ids["train"] if query_id[0] == "b"}
    assert held_out and copies.isdisjoint(held_out) and len(copies) == 60 - len(held_out)
    assert split.overlaps == {
        "dev queries left out, as their text is one of a held-out query": 0,
        "train queries left out, as their text is one of a held-out query": len(held_out),
    }


def test_larger_share_only_adds_to_dev_and_test(make_job, tmp_path):
    texts = {f"a{i}": f"how to {i}" for i in range(400)}
    files = write_queries(tmp_path, texts, list(texts))
    splits = [split_log(make_job, files, held_out=share).query_ids for share in (0.1, 0.2, 0.4, 0.9)]
    for smaller, larger in pairwise(splits):
        assert set(smaller["dev"]) < set(larger["dev"]) and set(smaller["test"]) < set(larger["test"])
    assert 0.3 < (len(splits[2]["dev"]) + len(splits[2]["test"])) / 400 < 0.5
    # A query does not move when others come or go.
    fewer = split_log(make_job, write_queries(tmp_path, dict(list(texts.items())[200:]), list(texts)[200:]))
    more = split_log(make_job, files)
    for name in splits[0]:
        assert set(fewer.query_ids[name]) <= set(more.query_ids[name])


def test_queries_without_judgment_are_all_taught(make_job, tmp_path):
    texts = {f"a{i}": f"how to {i}" for i in range(100)}
    split = split_log(make_job, write_queries(tmp_path, texts, list(texts)[:40])).query_ids
    assert {f"a{i}" for i in range(40, 100)} <= set(split["train"])
    assert len(split["dev"]) + len(split["test"]) + len(split["train"]) == 100
    few = split_log(make_job, write_queries(tmp_path, texts, list(texts)[:40]), train_queries=10).query_ids
    assert few == split | {"train": split["train"][:10]}


def test_judgments_of_their_own_decide_what_is_held_out(make_job, part_of_qrels):
    dev, test = part_of_qrels("dev", 40, 45), part_of_qrels("test", 45, 60)
    parts = [[f"q{i}" for i in range(*bounds)] for bounds in ((0, 40), (40, 45), (45, 60))]
    train = part_of_qrels("train", 0, 40)
    for qrels in (train, None):  # judgments of training queries are not needed
        split = split_of(make_job(qrels=qrels, dev_qrels=dev, test_qrels=test)).query_ids
        assert split == dict(zip(("train", "dev", "test"), parts, strict=True))
    split = split_of(make_job(qrels=train, test_qrels=test)).query_ids
    assert split["test"] == parts[2] and 10 < len(split["dev"]) < 30  # all of the held-out half of 40


def test_judgments_of_dev_and_test_share_no_query(make_job, part_of_qrels):
    files = {"dev_qrels": part_of_qrels("dev", 20, 30), "test_qrels": part_of_qrels("test", 28, 60)}
    with pytest.raises(ValueError, match=r"dev\.txt and .*test\.txt share 2 queries, for example 'q28'"):
        read_judgments(make_job(**files))


def test_rows_of_scores_bring_their_queries_and_all_others_are_held_out(make_job, tmp_path):
    lines = [f"2.0\t1.0\tq{i}\td{i}\td{(i + 7) % 60}\n" for i in range(40)]
    (tmp_path / "scores.tsv").write_text("".join(lines))
    split = split_of(make_job(scores=[str(tmp_path / "scores.tsv")])).query_ids
    assert split["train"] == [f"q{i}" for i in range(40)]
    assert sorted(split["dev"] + split["test"]) == [f"q{i}" for i in range(40, 60)]
    (tmp_path / "scores.tsv").write_text("2.0\t1.0\tx\td1\td2\n")
    with pytest.raises(ValueError, match=r"None of the queries of the scores has a text in .*queries\.tsv"):
        split_of(make_job(scores=[str(tmp_path / "scores.tsv")]))


def test_runs_of_scores_teach_only_their_queries(make_job, tmp_path):
    for name, stop in (("one", 50), ("two", 40)):
        kd.write_run({f"q{i}": [("d1", 1.0)] for i in range(stop)}, tmp_path / f"{name}.trec")
    scores = [str(tmp_path / f"{name}.trec") for name in ("one", "two")]
    judged = split_of(make_job(scores=scores)).query_ids
    assert set(judged["train"]) <= {f"q{i}" for i in range(40)}
    assert {f"q{i}" for i in range(40, 60)} & {*judged["dev"], *judged["test"]}  # judgments need no scores
    agreed = split_of(make_job(scores=scores, qrels=None)).query_ids
    assert set().union(*agreed.values()) == {f"q{i}" for i in range(40)}


def test_held_out_queries_have_a_relevant_document(make_job, tmp_path):
    (tmp_path / "dev.txt").write_text("".join(f"q{i} 0 d{i} {int(i > 4)}\n" for i in range(10)))
    split = split_of(make_job(dev_qrels=str(tmp_path / "dev.txt"))).query_ids
    assert split["dev"] == [f"q{i}" for i in range(5, 10)]
    assert not {f"q{i}" for i in range(5)} & {*split["train"], *split["test"]}


def test_too_few_queries_are_refused_with_all_counts(make_job):
    words = r"Too few queries with a relevant document for dev and test: train 60 \(needed 8\), dev 0 \(needed 2\)"
    with pytest.raises(ValueError, match=words):
        split_of(make_job(held_out=1e-6))
    with pytest.raises(ValueError, match="Too few queries for "):
        split_of(make_job(held_out=1e-6, qrels=None))
