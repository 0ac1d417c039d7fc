"""SparseEncoder checkpoints: read with equal scores, written so they have ours; others are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from transformers import AutoModelForMaskedLM, BertConfig, DistilBertConfig

import hf_kd_ranking as kd
from hf_kd_ranking.interop.export import largest_difference

QUERIES = ["what is bread", "moon", "", "how to where " * 9, "cat zebra cat unheard"]
DOCUMENTS = ["bread apple iron", "moon", "the", "house of the king " * 9, ""]
BERT = BertConfig(
    vocab_size=39,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    initializer_range=0.5,
)
DISTILBERT = DistilBertConfig(
    vocab_size=39, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64, initializer_range=0.5
)


@pytest.fixture
def masked(tokenizer, tmp_path):
    """masked(config): folder of a masked language model with the tokenizer."""

    def save(config=BERT):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
        tokenizer.save_pretrained(tmp_path / "masked")
        return tmp_path / "masked"

    return save


def sparse_encoder(folder, output, pooling=None, static=None, **settings):
    transformer = Transformer(str(folder), transformer_task="fill-mask", max_seq_length=32)
    modules = [transformer, pooling or SpladePooling("max")]
    if static is not None:
        queries = [SparseStaticEmbedding(transformer.tokenizer, static)]
        modules = [Router.for_query_document(query_modules=queries, document_modules=modules)]
    SparseEncoder(modules=modules, device="cpu", **settings).save_pretrained(str(output), create_model_card=False)
    return SparseEncoder(str(output), device="cpu", local_files_only=True)


def pairwise(encoder):
    vectors = encoder.encode_query(QUERIES), encoder.encode_document(DOCUMENTS)
    return encoder.similarity_pairwise(*vectors).numpy()


def assert_same_scores(folder, encoder):
    ranker = kd.Ranker.from_pretrained(folder, device="cpu")
    scores = ranker.score(QUERIES, DOCUMENTS)
    assert type(ranker.model) is kd.Splade and not ranker.model.is_fresh and np.ptp(scores) > 0.1
    assert largest_difference(pairwise(encoder), scores) < 1e-4
    return ranker.model.config


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=["bert", "distilbert"])
def test_sparse_encoder_scores_as_there(masked, tmp_path, config):
    prompts = {"query": "what is ", "document": "the "}
    encoder = sparse_encoder(masked(config), tmp_path / "there", prompts=prompts, max_active_dims=9)
    fields = assert_same_scores(tmp_path / "there", encoder)
    assert (fields.query_prefix, fields.document_top_k, fields.max_document_length) == ("what is ", 9, 32)


def test_static_queries_score_as_there(masked, tmp_path):
    encoder = sparse_encoder(masked(), tmp_path / "there", static=torch.linspace(-1, 3, 39))
    assert assert_same_scores(tmp_path / "there", encoder).query_encoding == "static"
    folder = tmp_path / "there" / "query_0_SparseStaticEmbedding"
    weights = {"cat": 2.5, "moon": 1.5, "bread": 0.5}  # as OpenSearch writes them
    (folder / "idf.json").write_text(json.dumps(weights))
    (folder / "config.json").write_text(json.dumps({"frozen": True, "path": "idf.json"}))
    (folder / "model.safetensors").unlink()
    ranker = kd.Ranker.from_pretrained(tmp_path / "there", device="cpu")
    found = ranker.encode_queries(["cat moon moon apple"]).toarray()[0]
    ids = ranker.tokenizer.convert_tokens_to_ids(list(weights)[:2])
    assert np.flatnonzero(found).tolist() == sorted(ids) and found[ids].tolist() == [2.5, 1.5]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"pooling": SpladePooling("sum")}, "its pooling_strategy is sum, needed max"),
        ({"pooling": SpladePooling("max", "log1p_relu")}, "its activation_function is log1p_relu, needed relu"),
        ({"similarity_fn_name": "cosine"}, "it compares by cosine, needed dot"),
    ],
)
def test_other_settings_are_refused_with_the_reason(masked, tmp_path, settings, reason):
    sparse_encoder(masked(), tmp_path / "there", **settings)
    with pytest.raises(ValueError, match=reason):
        kd.load_ranker(tmp_path / "there")


def test_other_modules_are_refused_with_the_reason(masked, tmp_path):
    sparse_encoder(masked(), tmp_path / "there")
    modules = json.loads((tmp_path / "there" / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sparse_encoder.modules.SparseAutoEncoder"
    (tmp_path / "there" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="its modules are Transformer, SparseAutoEncoder, needed"):
        kd.load_ranker(tmp_path / "there")
    sparse_encoder(tmp_path / "masked", tmp_path / "router", static=torch.ones(39))
    structure = tmp_path / "router" / "router_config.json"
    content = json.loads(structure.read_text())
    content["structure"]["other"] = content["structure"].pop("query")
    structure.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its Router has the routes document, other, needed query and document"):
        kd.load_ranker(tmp_path / "router")


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("tokenizer.json", "moon", "noom", "its queries and its documents have different vocabularies"),
        ("model.safetensors", "", None, r"model\.safetensors; convert the weights, pickles are not read"),
        (
            "../router_config.json",
            ".SparseStaticEmbedding",
            ".Dense",
            "its queries are encoded by Dense, needed",
        ),
    ],
)
def test_damaged_static_queries_are_refused_with_the_reason(masked, tmp_path, file, old, new, reason):
    sparse_encoder(masked(), tmp_path / "there", static=torch.ones(39))
    [queries] = (tmp_path / "there").glob("query_*")
    path = queries / file
    if new is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=reason):
        kd.load_ranker(tmp_path / "there")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"query_top_k": 5, "document_top_k": 5, "query_prefix": "what is "},
        {"query_encoding": "static", "max_query_length": 7},
    ],
)
def test_export_to_sparse_encoder_and_back(masked, tmp_path, tokenizer, config):
    lengths = {"max_query_length": 8, "max_document_length": 16}
    model = kd.load_ranker(masked(), "splade", **(lengths | config))
    if model.config.query_encoding == "static":
        with torch.no_grad():
            model._query_weights.weight.copy_(torch.linspace(0.1, 3, 39).unsqueeze(1))
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "ranker")
    result = kd.export_ranker(tmp_path / "ranker", "sparse-encoder", tmp_path / "there")
    assert result["largest_difference"] < 1e-4 and result["architecture"] == "Splade"
    scores = kd.Ranker.from_pretrained(tmp_path / "ranker", device="cpu").score(QUERIES, DOCUMENTS)
    assert largest_difference(scores, pairwise(SparseEncoder(str(tmp_path / "there"), device="cpu"))) < 1e-4
    again = kd.Ranker.from_pretrained(tmp_path / "there", device="cpu")
    assert largest_difference(scores, again.score(QUERIES, DOCUMENTS)) < 1e-4
    assert again.model.config.max_query_length == model.config.max_query_length
    kd.export_ranker(tmp_path / "ranker", "sparse-encoder", tmp_path / "there", overwrite=True)
    shutil.rmtree(tmp_path / "there")


def test_export_names_what_a_sparse_encoder_cannot_express(encoder, tokenizer, tmp_path):
    fields = {"expansion": "none", "query_encoding": "lexical", "threshold": 0.1, "document_top_k": 7}
    model = kd.load_ranker(encoder, "splade", max_document_length=16, **fields)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "ranker")
    with pytest.raises(ValueError) as error:
        kd.export_ranker(tmp_path / "ranker", "sparse-encoder", tmp_path / "there")
    for field in ("expansion='none'", "query_encoding='lexical'", "threshold=0.1", "query_top_k=None"):
        assert field in str(error.value)
