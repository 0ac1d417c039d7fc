"""A ranker as a component of other frameworks gives the scores and the order of `Ranker.rerank`."""

import os

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"

QUERY = "apple tree"
TEXTS = ["bread and salt", "an apple tree", "the river", "apple pie with salt", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder, tokenizer):
    """A saved ranker."""
    folder = tmp_path_factory.mktemp("ranker")
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranker(folder):
    return kd.Ranker.from_pretrained(folder)


@pytest.fixture(scope="module")
def expected(ranker):
    """(place, score), best first."""
    ranked = ranker.rerank(QUERY, TEXTS)
    assert [place for place, _ in ranked] != list(range(len(TEXTS)))  # the order changes
    return ranked


def test_langchain_compressor_reranks(ranker, expected):
    from langchain_core.documents import Document

    from hf_kd_ranking.integrations.langchain import RankerCompressor

    documents = [Document(text, id=str(place), metadata={"page": place}) for place, text in enumerate(TEXTS)]
    found = RankerCompressor(ranker=ranker, top_k=3).compress_documents(documents, QUERY)
    assert [(int(document.id), document.metadata["relevance_score"]) for document in found] == expected[:3]
    assert [document.metadata["page"] for document in found] == [place for place, _ in expected[:3]]
    assert "relevance_score" not in documents[expected[0][0]].metadata  # what was given is not changed
    assert RankerCompressor(ranker=ranker).compress_documents([], QUERY) == []


def test_langchain_retriever_searches_the_pipeline(ranker, tmp_path):
    from hf_kd_ranking.integrations.langchain import PipelineRetriever
    from hf_kd_ranking.retrieval.bm25 import BM25Index
    from hf_kd_ranking.searcher import Pipeline

    (tmp_path / "collection.tsv").write_text("".join(f"d{i}\t{text or 'dog'}\n" for i, text in enumerate(TEXTS)))
    documents = kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    pipeline = Pipeline(documents, BM25Index.build(documents), ranker, depth=4)
    found = PipelineRetriever(pipeline=pipeline, k=2).invoke(QUERY)
    assert [(document.id, document.metadata["relevance_score"]) for document in found] == pipeline.search(QUERY, 2)
    assert [document.page_content for document in found] == [documents[document.id] for document in found]
    pipeline = Pipeline(first_stage=pipeline.first_stage)
    with pytest.raises(InputError, match="this pipeline has none"):
        PipelineRetriever(pipeline=pipeline).invoke(QUERY)


def test_llama_index_postprocessor_reranks(ranker, expected):
    from llama_index.core.schema import NodeWithScore, TextNode

    from hf_kd_ranking.integrations.llama_index import RankerPostprocessor

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place)), score=0.5) for place, text in enumerate(TEXTS)]
    found = RankerPostprocessor(ranker=ranker, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    assert [(int(node.node.node_id), node.score) for node in found] == expected[:2]
    assert nodes[0].score == 0.5
    assert RankerPostprocessor(ranker=ranker).postprocess_nodes([], query_str=QUERY) == []
    with pytest.raises(InputError, match="needs the query"):
        RankerPostprocessor(ranker=ranker).postprocess_nodes(nodes)


def test_haystack_component_runs_in_a_pipeline_that_is_saved(folder, expected):
    from haystack import Document, Pipeline

    from hf_kd_ranking.integrations.haystack import PassageRanker

    pipeline = Pipeline()
    pipeline.add_component("ranker", PassageRanker(str(folder), top_k=4, device="cpu"))
    documents = [Document(id=str(place), content=text, meta={"page": place}) for place, text in enumerate(TEXTS)]
    data = {"ranker": {"query": QUERY, "documents": documents}}
    found = pipeline.run(data)["ranker"]["documents"]
    assert [(int(document.id), document.score) for document in found] == expected[:4]
    assert documents[expected[0][0]].score is None
    loaded = Pipeline.loads(pipeline.dumps(), allowed_modules=[PassageRanker.__module__])
    data["ranker"]["top_k"] = 1
    assert [document.id for document in loaded.run(data)["ranker"]["documents"]] == [str(expected[0][0])]
    with pytest.raises(InputError, match="document image has none"):
        PassageRanker(str(folder)).run(QUERY, [Document(id="image")])


def test_rerankers_model_ranks(ranker, folder, expected):
    from rerankers import Document

    from hf_kd_ranking.integrations.rerankers import PassageReranker

    reranker = PassageReranker(str(folder), device="cpu")
    found = reranker.rank(QUERY, TEXTS, doc_ids=list("abcde"), metadata=[{"page": place} for place in range(5)])
    assert [("abcde".index(result.doc_id), result.score) for result in found] == expected
    assert [result.rank for result in found] == [1, 2, 3, 4, 5]
    assert found[0].document.metadata == {"page": expected[0][0]}
    documents = [Document(text, doc_id=place) for place, text in enumerate(TEXTS)]
    assert [result.doc_id for result in PassageReranker(ranker).rank(QUERY, documents).top_k(2)] == [
        place for place, _ in expected[:2]
    ]
    assert reranker.score(QUERY, TEXTS[1]) == pytest.approx(dict(expected)[1], abs=1e-5)
    assert reranker.rank(QUERY, []).results == []
