"""Bad jobs are refused before any work; queries and labels decide what a job can do."""

import dataclasses
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import context as context_module
from hf_kd_ranking.distillation.context import Context, name_sources


@pytest.fixture
def bi_encoder(tmp_path, encoder, tokenizer) -> str:
    """Folder of a bert_dot with random weights."""
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "bi_encoder")
    return str(tmp_path / "bi_encoder")


def test_teachers_of_one_name_get_numbers(make_job):
    job = dataclasses.replace(make_job(), teachers=["x/a", "y/a", "z/a-0", "mean"])
    assert name_sources(job) == {"a-0": "x/a", "a-1": "y/a", "a-0-2": "z/a-0", "mean-3": "mean"}


def test_conditions_are_those_that_there_are_labels_for(make_job, tmp_path):
    assert Context(make_job()).job.conditions == ["no_teacher", "teacher"]
    assert Context(make_job(minimum_grade=2)).job.conditions == ["teacher"]  # all grades are 1
    assert Context(make_job(qrels=None)).job.conditions == ["teacher"]
    assert Context(make_job(conditions=["teacher"])).job.conditions == ["teacher"]
    with pytest.raises(ValueError, match="condition no_teacher needs judgments of training queries"):
        Context(make_job(minimum_grade=2, conditions=["no_teacher"]))


def test_single_teacher_that_encodes_documents_separately_is_live(make_job, tmp_path, bi_encoder):
    assert Context(make_job(teachers=[bi_encoder])).live_teacher == bi_encoder
    for teachers in ([str(tmp_path / "teacher")], [bi_encoder, "bm25"], ["bm25"], ["bert_dot"]):
        assert Context(make_job(teachers=teachers)).live_teacher is None


def test_loss_over_the_batch_needs_a_live_teacher(make_job, bi_encoder):
    loss = "margin_mse:1,in_batch_margin_mse:1"
    assert Context(make_job(teachers=[bi_encoder], loss=loss)).live_teacher == bi_encoder
    with pytest.raises(ValueError, match=r"in_batch_margin_mse needs a live teacher: .* got .*/teacher"):
        Context(make_job(loss=loss))
    Context(make_job(loss="margin_mse:1,in_batch_info_nce:1"))  # reads labels only


def test_dense_source_needs_a_model(make_job, bi_encoder):
    sources = {"sources": ["bm25:0.5", "dense:0.5"]}
    with pytest.raises(ValueError, match="source dense needs --dense-model"):
        Context(make_job(**sources))
    assert Context(make_job(**sources, dense_model=bi_encoder)).dense_model == bi_encoder
    assert Context(make_job(**sources, teachers=[bi_encoder])).dense_model == bi_encoder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"other": [("d1", 1.0)]}, r"mine\.trec: query 'other' \(1 in all\) is not in .*queries\.tsv"),
        ({"q3": [("d1", 2.0), ("x", 1.0)]}, r"mine\.trec: document 'x' \(1 in all\) is not in .*collection\.tsv"),
        ({"dev": None}, r"mine\.trec lacks 1 of the \d+ dev queries, for example 'q\d+'"),
        ({"train": None}, None),  # it has no list then
    ],
)
def test_run_of_candidates_is_of_this_collection_and_complete(make_job, tmp_path, changes, words):
    run = {f"q{i}": [(f"d{i}", 2.0), (f"d{(i + 1) % 60}", 1.0)] for i in range(60)}
    splits = Context(make_job()).splits
    for name, found in changes.items():
        if found is None:
            del run[splits[name][0]]
        else:
            run[name] = found
    kd.write_run(run, tmp_path / "mine.trec")
    job = make_job(candidates=str(tmp_path / "mine.trec"))
    if words is None:
        assert Context(job).job.candidates == job.candidates
        return
    with pytest.raises(ValueError, match=words):
        Context(job)


def test_positives_of_train_and_test_are_counted(make_job, tmp_path):
    assert Context(make_job()).overlaps["positives of train and test"] == 0
    splits = Context(make_job()).splits
    with (tmp_path / "qrels.txt").open("a") as file:
        file.writelines(f"{query_id} 0 d{splits['train'][0][1:]} 1\n" for query_id in splits["test"][:2])
    assert Context(make_job()).overlaps["positives of train and test"] == 1  # one document, of two test queries


def test_judged_document_without_text_counts_in_tests_only(make_job, tmp_path):
    with (tmp_path / "qrels.txt").open("a") as file:
        file.writelines(f"q{i} 0 gone{i} 1\n" for i in range(60))
    context = Context(make_job())
    assert all(len(grades) == 1 for grades in context.grades("train").values())
    assert all(len(grades) == 2 for grades in context.grades("test").values())


def test_a_repeated_line_of_the_collection_changes_nothing(make_job, tmp_path):
    before = Context(make_job())
    with (tmp_path / "collection.tsv").open("a") as file:
        file.write((tmp_path / "collection.tsv").read_text().splitlines()[0] + "\n")
    after = Context(make_job())
    assert len(after.documents) == len(before.documents)
    assert after.fingerprint() == before.fingerprint()


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("collection.tsv", "d 1\tx\n", "cannot hold the id 'd 1' of the documents"),
        ("queries.tsv", "q 1\tx\n", "cannot hold the id 'q 1' of the queries"),
    ],
)
def test_ids_that_no_run_can_hold_are_refused_before_any_work(make_job, tmp_path, out, name, line, words):
    with (tmp_path / name).open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=words):
        Context(make_job())
    assert not out.exists()


def test_language_of_bm25_is_one_of_snowballs(make_job):
    assert Context(make_job(language="german")).job.language == "german"
    with pytest.raises(ValueError, match=r"The language is one of arabic, .* got 'klingon'"):
        Context(make_job(language="klingon"))


def test_batches_are_shared_evenly_between_processes(make_job, monkeypatch):
    monkeypatch.setattr(context_module, "processes", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="batch_size 8 is not a multiple of the 3 processes"):
        Context(make_job())


def test_path_of_a_model_that_does_not_exist_is_refused_before_any_work(make_job, tmp_path):
    for changes in ({"teachers": [str(tmp_path / "gone")]}, {"model_name": "./gone"}, {"dense_model": "a/b/c"}):
        with pytest.raises(
            FileNotFoundError, match=r"The model .* does not exist; give a folder, or a name on the Hub"
        ):
            Context(make_job(**changes))
