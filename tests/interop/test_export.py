"""Exported rankers have the ranker's scores in the library that reads the layout; others are refused."""

import copy
import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, DistilBertConfig, ElectraConfig

import hf_kd_ranking as kd
from hf_kd_ranking.interop.export import FORMATS, largest_difference
from hf_kd_ranking.interop.onnx import OnnxRanker

rng = random.Random(0)
WORDS = "apple bread cat dog earth fire glass house what is a the of unheard".split()
QUERIES = [" ".join(rng.choices(WORDS, k=rng.randint(0, 12))) for _ in range(100)]
DOCUMENTS = [" ".join(rng.choices(WORDS, k=rng.randint(0, 30))) for _ in range(100)]
SETTINGS = {"max_query_length": 8, "max_document_length": 16, "initializer_range": 0.5}


@pytest.fixture
def ranker_folder(encoder, tokenizer, tmp_path) -> Callable[..., Path]:
    """ranker_folder(architecture, **config): a saved ranker with one layer."""

    def save(architecture: str, **config) -> Path:
        torch.manual_seed(1)
        layers = {} if architecture.startswith("tk") else {"layers": [0]}
        model = kd.load_ranker(encoder, architecture, **(SETTINGS | layers | config))
        kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "ranker")
        return tmp_path / "ranker"

    return save


def assert_equal_scores(folder: Path, found: np.ndarray) -> None:
    expected = kd.Ranker.from_pretrained(folder, device="cpu").score(QUERIES, DOCUMENTS)
    assert np.ptp(expected) > 0.1, "scores that hardly differ would agree with anything"
    assert largest_difference(expected, found) < 1e-4


def pairwise(encoder: SentenceTransformer | MultiVectorEncoder) -> np.ndarray:
    vectors = encoder.encode_query(QUERIES), encoder.encode_document(DOCUMENTS)
    return encoder.similarity_pairwise(*vectors).numpy()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling": "mean", "query_prefix": "what is ", "document_prefix": "the "},
        {"pooling": "mean", "compression_dim": 6, "normalize": True},
    ],
)
def test_bert_dot_exports_to_sentence_transformer_and_back(config, ranker_folder, tmp_path):
    folder = ranker_folder("bert_dot", **config)
    result = kd.export_ranker(folder, "sentence-transformer", tmp_path / "out")
    assert result["largest_difference"] < 1e-4 and result["architecture"] == "BERT_Dot"
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert found.similarity_fn_name == "dot"
    assert_equal_scores(folder, pairwise(found))
    again, ours = kd.load_ranker(tmp_path / "out").config, kd.load_ranker(folder).config
    for name in (*config, "max_query_length", "max_document_length"):
        assert again.to_dict()[name] == ours.to_dict()[name], name
    assert_equal_scores(folder, kd.Ranker.from_pretrained(tmp_path / "out", device="cpu").score(QUERIES, DOCUMENTS))


@pytest.mark.parametrize("is_normalized", [True, False])
def test_colbert_without_query_masks_exports_to_multi_vector(is_normalized, ranker_folder, tmp_path):
    folder = ranker_folder("colbert", compression_dim=6, query_augmentation=0, normalize=is_normalized)
    kd.export_ranker(folder, "multi-vector", tmp_path / "out")
    assert_equal_scores(folder, pairwise(MultiVectorEncoder(str(tmp_path / "out"), device="cpu")))
    assert_equal_scores(folder, kd.Ranker.from_pretrained(tmp_path / "out", device="cpu").score(QUERIES, DOCUMENTS))


@pytest.mark.parametrize("prefixes", [{}, {"query_prefix": "apple", "document_prefix": "[MASK]"}])
def test_normalised_colbert_exports_to_pylate_and_back(prefixes, ranker_folder, tmp_path):
    folder = ranker_folder("colbert", compression_dim=6, query_augmentation=0, normalize=True, **prefixes)
    kd.export_ranker(folder, "pylate", tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [m["type"] for m in modules] == ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    assert_equal_scores(folder, pairwise(MultiVectorEncoder(str(tmp_path / "out"), device="cpu")))
    assert_equal_scores(folder, kd.Ranker.from_pretrained(tmp_path / "out", device="cpu").score(QUERIES, DOCUMENTS))


@pytest.mark.parametrize("config", [{}, {"query_prefix": "what is "}, {"head_activation": "gelu"}])
def test_bert_cat_exports_to_cross_encoder_with_raw_scores(config, ranker_folder, tmp_path):
    folder = ranker_folder("bert_cat", **config)
    kd.export_ranker(folder, "cross-encoder", tmp_path / "out")
    found = CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert isinstance(found.activation_fn, torch.nn.Identity)
    assert_equal_scores(folder, found.predict(list(zip(QUERIES, DOCUMENTS, strict=True))))


SIZES = {
    "vocab_size": 39,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
BACKBONES = {
    "distilbert": DistilBertConfig(vocab_size=39, dim=16, n_layers=1, n_heads=2, hidden_dim=32, initializer_range=0.5),
    "electra": ElectraConfig(**SIZES, embedding_size=16, initializer_range=0.5),
    "bert": BertConfig(**SIZES, initializer_range=0.5),
}


@pytest.mark.parametrize(
    ("backbone", "head"), [("distilbert", None), ("distilbert", "relu"), ("electra", None), ("bert", "tanh")]
)
def test_bert_cat_with_fitting_head_is_a_plain_classifier(backbone, head, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    if backbone == "distilbert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    AutoModel.from_config(BACKBONES[backbone]).save_pretrained(tmp_path / "encoder")
    model = kd.load_ranker(tmp_path / "encoder", "bert_cat", head_activation=head, **SETTINGS)
    torch.nn.init.constant_(model._classification_layer.bias, 0.7)
    folder = tmp_path / "ranker"
    kd.Ranker(model, tokenizer).save_pretrained(folder)
    kd.export_ranker(folder, "cross-encoder", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == backbone
    assert not list((tmp_path / "out").glob("*.py"))
    assert_equal_scores(
        folder, CrossEncoder(str(tmp_path / "out")).predict(list(zip(QUERIES, DOCUMENTS, strict=True)))
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert classifier.num_labels == 1
    assert_equal_scores(folder, kd.Ranker.from_pretrained(tmp_path / "out", device="cpu").score(QUERIES, DOCUMENTS))


@pytest.mark.slow
def test_cross_encoder_works_without_the_package(ranker_folder, tmp_path):
    folder = ranker_folder("bert_cat")
    kd.export_ranker(folder, "cross-encoder", tmp_path / "out")
    code = (
        "import sys; from sentence_transformers import CrossEncoder\n"
        f"model = CrossEncoder({str(tmp_path / 'out')!r}, device='cpu', trust_remote_code=True)\n"
        "assert 'hf_kd_ranking' not in sys.modules\n"
        "print(model.predict([('what is a cat', 'a cat')])[0])"
    )
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = kd.Ranker.from_pretrained(folder, device="cpu").score(["what is a cat"], ["a cat"])[0]
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected), abs=1e-4)


GRAPHS = {
    "bert_cat": {},
    "bert_dot": {"pooling": "mean", "normalize": True},
    "colbert": {"compression_dim": 6, "initializer_range": 0.1},
    "prettr": {"join_layer_idx": 1, "layers": None},
    "splade": {"expansion": "none"},
    "tk": {"num_hidden_layers": 1, "intermediate_size": 32},
    "tkl": {"num_hidden_layers": 1, "intermediate_size": 32, "chunk_size": 5, "region_size": 4},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in GRAPHS if name != "colbert"]


@pytest.mark.parametrize("architecture", ["colbert", *SLOW])
def test_onnx_graph_has_equal_scores_for_any_batch_and_length(architecture, ranker_folder, tmp_path):
    folder = ranker_folder(architecture, **GRAPHS[architecture])
    result = kd.export_ranker(folder, "onnx", tmp_path / "out")
    assert result["largest_difference"] < 1e-4
    graph = OnnxRanker(tmp_path / "out", threads=1)
    for batch_size in (1, 7, 100):
        assert_equal_scores(folder, graph.score(QUERIES, DOCUMENTS, batch_size))


def test_onnx_int8_graph_has_close_scores(ranker_folder, tmp_path):
    folder = ranker_folder("bert_dot", normalize=True)
    result = kd.export_ranker(folder, "onnx-int8", tmp_path / "out")
    assert 1e-6 < result["largest_difference"] < 0.3, "cosines; not equal, not another ranker's"
    expected = kd.Ranker.from_pretrained(folder, device="cpu").score(QUERIES, DOCUMENTS)
    found = OnnxRanker(tmp_path / "out", threads=1).score(QUERIES, DOCUMENTS)
    assert np.corrcoef(expected, found)[0, 1] > 0.85
    weights = {tensor.data_type for tensor in onnx_weights(tmp_path / "out" / "model.onnx") if len(tensor.dims) == 2}
    assert 3 in weights, "no matrix of int8"


def onnx_weights(path: Path) -> list:
    import onnx

    return list(onnx.load(path).graph.initializer)


@pytest.mark.parametrize(
    ("architecture", "config", "format", "reasons"),
    [
        (
            "colbert",
            {},
            "multi-vector",
            [r"query_augmentation=8: these \[MASK\] tokens", "query_augmentation=0 leaves"],
        ),
        ("colbert", {}, "pylate", ["query_augmentation=8: ", "normalize=False: PyLate scales"]),
        (
            "colbert",
            {"query_augmentation": 0, "normalize": True, "query_prefix": "what is "},
            "pylate",
            ["query_prefix='what is ': PyLate's prefix is one token"],
        ),
        ("bert_cat", {"document_prefix": "the "}, "cross-encoder", ["document_prefix='the ': a CrossEncoder has"]),
        ("bert_cat", {"passage_length": 9}, "cross-encoder", ["passage_length=9: a CrossEncoder reads a pair as one"]),
        ("bert_cat", {"passage_length": 9}, "onnx", ["passage_length=9: the graph reads a pair as one sequence"]),
        ("bert_cat", {}, "sentence-transformer", ["model_type=BERT_Cat: this layout is for BERT_Dot"]),
        ("bert_dot", {}, "multi-vector", ["model_type=BERT_Dot: this layout is for ColBERT"]),
        ("prettr", {"join_layer_idx": 1}, "cross-encoder", ["model_type=PreTTR: this layout is for BERT_Cat"]),
        ("splade", {"query_encoding": "static"}, "onnx-int8", ["query_encoding='static': the graph encodes queries"]),
        ("tk", {}, "pylate", ["model_type=TK: this layout is for ColBERT"]),
    ],
)
def test_export_names_what_a_layout_cannot_express(architecture, config, format, reasons, ranker_folder, tmp_path):
    folder = ranker_folder(architecture, **config)
    with pytest.raises(ValueError, match=f"^The format {format} cannot give the scores") as error:
        kd.export_ranker(folder, format, tmp_path / "out")
    for reason in reasons:
        assert error.match(reason)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def new_ranker(toy_architecture, encoder, tokenizer, tmp_path) -> Path:
    """Folder of a ranker whose architecture no layout is made for."""
    model = kd.load_ranker(encoder, "toy", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "ranker")
    return tmp_path / "ranker"


@pytest.mark.slow
@pytest.mark.parametrize(("similarity", "output"), [("dot", "vectors"), ("layers", "scores")])
def test_new_architecture_exports_to_onnx(similarity, output, toy_architecture, new_ranker, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_architecture.config_class, "similarity", similarity)
    kd.export_ranker(new_ranker, "onnx", tmp_path / "out")
    graph = OnnxRanker(tmp_path / "out", threads=1)
    assert [node.name for node in graph.session.get_outputs()] == [output]
    assert_equal_scores(new_ranker, graph.score(QUERIES, DOCUMENTS))


def test_new_architecture_is_refused_by_the_layouts_of_others(new_ranker, tmp_path):
    for name, layout in FORMATS.items():
        if layout.model_class is not None:
            with pytest.raises(ValueError, match="model_type=Toy: this layout is for "):
                kd.export_ranker(new_ranker, name, tmp_path / "out")


def test_export_override_removes_query_masks(ranker_folder, tmp_path):
    folder = ranker_folder("colbert", compression_dim=6)
    kd.export_ranker(folder, "multi-vector", tmp_path / "out", query_augmentation=0)
    expected = kd.Ranker.from_pretrained(folder, device="cpu", query_augmentation=0).score(QUERIES, DOCUMENTS)
    assert largest_difference(expected, pairwise(MultiVectorEncoder(str(tmp_path / "out"), device="cpu"))) < 1e-4


def test_export_with_different_scores_leaves_nothing(ranker_folder, tmp_path, monkeypatch):
    layout = FORMATS["sentence-transformer"]
    wrong = dataclasses.replace(layout, score=lambda *args: layout.score(*args) + 0.01)
    monkeypatch.setitem(FORMATS, "sentence-transformer", wrong)
    with pytest.raises(ValueError, match=r"differ from the ranker's by \S+, more than 0.0001; nothing was written"):
        kd.export_ranker(ranker_folder("bert_dot"), "sentence-transformer", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ranker"]


def test_export_replaces_only_models_and_only_if_asked(ranker_folder, tmp_path):
    folder = ranker_folder("bert_dot")
    kd.export_ranker(folder, "sentence-transformer", tmp_path / "out")
    (tmp_path / "out" / "left_over").touch()
    with pytest.raises(FileExistsError, match="out exists"):
        kd.export_ranker(folder, "sentence-transformer", tmp_path / "out")
    kd.export_ranker(folder, "sentence-transformer", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "left_over").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is not a model's folder"):
        kd.export_ranker(folder, "sentence-transformer", tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="is the ranker itself"):
        kd.export_ranker(folder, "sentence-transformer", folder, overwrite=True)


def test_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=f"^Unknown format 'tf'; choose one of {', '.join(FORMATS)}"):
        kd.export_ranker("any", "tf", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        OnnxRanker(tmp_path)


def test_export_names_a_missing_library(ranker_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"^The format sentence-transformer needs more .*hf_kd_ranking\[export\]"):
        kd.export_ranker(ranker_folder("bert_dot"), "sentence-transformer", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_needs_a_tokenizer(encoder_model, tmp_path):
    encoder_model.save_pretrained(tmp_path / "ranker")
    with pytest.raises(FileNotFoundError, match=r"^No tokenizer in .*save the one that the model was trained with"):
        kd.export_ranker(tmp_path / "ranker", "onnx", tmp_path / "out")


def test_largest_difference_is_relative_above_one():
    assert largest_difference(np.array([0.5, 100.0]), np.array([0.6, 101.0])) == pytest.approx(0.1)
    assert largest_difference(np.array([0.5, -100.0]), np.array([0.5, -102.0])) == pytest.approx(0.02)
