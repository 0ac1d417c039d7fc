"""Retrieval equals re-ranking of the whole collection."""

import pytest

import hf_kd_ranking as kd


@pytest.fixture
def data(toy):
    return (
        kd.read_qrels(toy / "qrels.txt"),
        *(kd.TextStore.from_tsv(toy / name) for name in ("queries.tsv", "collection.tsv")),
    )


@pytest.mark.parametrize("model", ["bert_dot", "colbert"], indirect=True)
def test_retrieval_equals_reranking_whole_collection(model, tokenizer, data):
    qrels, queries, documents = data
    ranker = kd.Ranker(model, tokenizer)
    everything = kd.Run({query_id: [(doc_id, 0.0) for doc_id in documents.ids()] for query_id in qrels})
    wanted = kd.RerankingEvaluator(everything, qrels, queries, documents).rerank(ranker)
    evaluator = kd.RetrievalEvaluator(qrels, queries, documents, ["RR@10", "R@20"], k=20)
    run = evaluator.retrieve(ranker)
    assert run.keys() == wanted.keys()
    for query_id, ranking in run.items():
        assert len(ranking) == 20
        best = [score for _, score in wanted[query_id][:20]]
        assert [score for _, score in ranking] == pytest.approx(best, rel=1e-4, abs=1e-4)
    assert evaluator(ranker) == pytest.approx(kd.evaluate_run(wanted.top(20), qrels, ["RR@10", "R@20"]))


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_retrieval_refuses_what_it_cannot_search_or_measure(model, tokenizer, data):
    qrels, queries, documents = data
    with pytest.raises(ValueError, match="A TK re-ranks candidates and cannot search a collection"):
        kd.RetrievalEvaluator(qrels, queries, documents).retrieve(kd.Ranker(model, tokenizer))
    with pytest.raises(ValueError, match="Unknown measure"):
        kd.RetrievalEvaluator(qrels, queries, documents, ["best"])
    with pytest.raises(KeyError, match="'none'"):
        kd.RetrievalEvaluator({"none": {"1": 1}}, queries, documents)
    with pytest.raises(ValueError, match="None of the 1 judged documents is in"):
        kd.RetrievalEvaluator({"112": {"gone": 1}}, queries, documents)


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_trainer_evaluates_by_retrieval(student, make_trainer, data):
    evaluator = kd.RetrievalEvaluator(*data, measures=["RR@10"])
    trainer = make_trainer(student, {"evaluator": evaluator}, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    values = [entry["eval_RR@10"] for entry in trainer.state.log_history if "eval_RR@10" in entry]
    assert len(values) == 2
    assert values[-1] == pytest.approx(evaluator(kd.Ranker(student, trainer.processing_class))["RR@10"])
