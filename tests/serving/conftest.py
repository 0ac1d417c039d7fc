"""A small model, a pipeline, and an application with them."""

import contextlib

import pytest
from starlette.testclient import TestClient

import hf_kd_ranking as kd
from hf_kd_ranking.searcher import Pipeline
from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.search import SearchEngine
from hf_kd_ranking.serving.service import Service

HOSTILE = "apple bread <script>window.ran = 1</script> <img src=x onerror='window.ran = 1'> & \"king\""


@pytest.fixture
def hostile() -> str:
    """A passage that would run if it were read as markup."""
    return HOSTILE


@pytest.fixture
def documents(toy, tmp_path) -> kd.TextStore:
    """The toy documents, and one whose text and id are markup."""
    rows = (toy / "collection.tsv").read_text() + f"<b>41</b>\t{HOSTILE}\n"
    (tmp_path / "documents.tsv").write_text(rows)
    return kd.TextStore.from_tsv(tmp_path / "documents.tsv")


@pytest.fixture
def bm25(documents) -> kd.BM25Index:
    return kd.BM25Index.build(documents)


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer)


@pytest.fixture
def engine(documents, bm25, ranker) -> SearchEngine:
    """Re-ranks BM25's candidates from their texts."""
    return SearchEngine(Pipeline(documents, bm25, ranker, depth=20))


@pytest.fixture
def serve():
    """serve(served_model, ...): a client of an application that is ready, see `make_app` and `Service`."""
    with contextlib.ExitStack() as stack:

        def start(model, about=None, key=None, allowed_origins=(), **settings):
            service = Service(lambda progress: model, **settings)
            app = make_app(service, about, key, allowed_origins=allowed_origins)
            client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
            client.service = service
            stack.enter_context(client)
            while client.get("/health").status_code == 503:
                pass
            return client

        yield start


@pytest.fixture
def client(serve, ranker):
    """A client of an API without a collection."""
    return serve(ServedModel("tiny", ranker))
