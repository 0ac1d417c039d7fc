"""Obvious mistakes in calls of the public functions: an error that says what was needed and what came."""

import math

import numpy as np
import pytest
from conftest import make_model

import hf_kd_ranking as kd

HALF = "\ud83d"  # of a character


@pytest.fixture
def names(toy, encoder, tokenizer, tmp_path) -> dict:
    """Return the values that the calls below name."""
    documents = kd.TextStore.from_tsv(toy / "collection.tsv")
    ranker = kd.Ranker(make_model("bert_dot", encoder), tokenizer)
    return {
        "kd": kd,
        "np": np,
        "nan": math.nan,
        "half": HALF,
        "toy": toy,
        "tmp": tmp_path,
        "encoder": encoder,
        "tokenizer": tokenizer,
        "documents": documents,
        "ranker": ranker,
        "bm25": kd.BM25Index.build(documents),
        "run": kd.read_run(toy / "candidates.trec"),
        "qrels": kd.read_qrels(toy / "qrels.txt"),
    }


CALLS = {
    "ranker.encode_documents('apple')": "TypeError: Needed a list of texts, got the string 'apple'",
    "ranker.encode_queries(None)": "TypeError: Needed a list of texts, got NoneType",
    "ranker.encode_queries({'a': 1})": "TypeError: Needed a list of texts, got dict",
    "ranker.encode_documents([half])": "InputError: The text '\\ud83d' has half of a surrogate pair at character 0",
    "ranker.encode_documents(['a', None])": "TypeError: Needed strings as texts, got NoneType 'None' in place 1",
    "ranker.score('a', ['b', nan])": "TypeError: Needed strings as documents, got float 'nan' in place 1",
    "ranker.score('a', None)": "TypeError: Needed a list of queries, got the string 'a'",
    "ranker.score(3, ['a'])": "TypeError: Needed a list of queries, got int",
    "ranker.score(['a'], ['b', 'c'])": "InputError: Scoring pairs needs one document per query, got 1 and 2",
    "ranker.rerank('a', ['b'], top_k=-1)": "InputError: top_k is an integer from 1, or None for all, got -1",
    "kd.Ranker(ranker.model, tokenizer, batch_size=0)": "InputError: batch_size is an integer from 1, got 0",
    "kd.Ranker(ranker.model, None)": "TypeError: A ranker is a model and its tokenizer",
    "kd.Ranker.from_pretrained(None)": "TypeError: A model is a folder or a name on the Hub, got None",
    "kd.Ranker.from_pretrained(tmp / 'none')": "FileNotFoundError",
    "kd.Ranker.from_pretrained(encoder, 'bert_dot', device='gpu9')": "InputError: There is no device 'gpu9'",
    "kd.load_ranker(encoder, ['bert_dot'])": "InputError: Unknown architecture ['bert_dot']",
    "kd.BertDot.from_pretrained(None)": "TypeError: A model is a folder or a name on the Hub, got None",
    "kd.load_ranker(encoder, 'bert_dot', compression_dim=-4)": "InputError: compression_dim must be at least 1, got",
    "ranker.model(query='apple', document='king')": "TypeError: Needed a tokenizer's output with input_ids, got str",
    "kd.TextStore.from_dataset([{'id': '1', 'text': 'a'}], tmp / 's')": "TypeError: Needed a datasets.Dataset, got",
    "documents[None]": "TypeError: Ids are a list, got NoneType",
    "documents[['none']]": "UnknownIdError: 1 of 1 ids are not among",
    "kd.TextStore.from_tsv(toy)": "FileNotFoundError",
    "kd.read_run(toy / 'candidates.trec', k='3')": "InputError: k is the number of documents",
    "kd.read_run(toy)": "FileNotFoundError",
    "bm25.search({'q': 'apple'}, k=1.5)": "InputError: k must be at least 1, got 1.5",
    "bm25.search({'q': 'apple'}, k=-1)": "InputError: k must be at least 1, got -1",
    "bm25.search('apple')": "TypeError: Queries are a dictionary",
    "bm25.search({'q': None})": "TypeError: A query is a str, got NoneType",
    "kd.evaluate_run(run, qrels, ['nDCG@0'])": "InputError: The cutoff of nDCG@0 is an integer from 1, got 0",
    "kd.evaluate_run(run, qrels, ['RR(rel=0)@10'])": "InputError: The rel of RR(rel=0)@10 is an integer from 1",
    "kd.evaluate_run(run, qrels, ['nDCG@-1'])": "InputError: Unknown measure in nDCG@-1",
    "kd.evaluate_run(run, qrels, [None])": "TypeError: Measures are a list of names such as nDCG@10, got [None]",
    "kd.evaluate_run(run, qrels, 'nDCG@10')": "TypeError: Measures are a list of names such as nDCG@10",
    "kd.evaluate_run(run, qrels, [])": "InputError: At least one measure is needed",
    "kd.evaluate_run(run, {'112': {'1': nan}})": "InputError: Query '112'",
    "kd.evaluate_run({'112': [('1', nan)]}, qrels)": "InputError: Query '112', document '1'",
    "kd.load_teacher_scores(toy)": "FileNotFoundError",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_is_named(call, names):
    kind, _, message = CALLS[call].partition(": ")
    with pytest.raises(Exception) as raised:
        eval(call, names)
    assert type(raised.value).__name__ == kind
    assert message in str(raised.value)
