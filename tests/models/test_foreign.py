"""Checkpoints of sentence-transformers, PyLate and transformers' classifiers: their own scores, or a refusal."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
)

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError

rng = random.Random(0)
WORDS = "apple bread cat dog earth fire glass house what is a the of unheard".split()
QUERIES = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(8)]
DOCUMENTS = [*(" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(7)), ""]
PROMPTS = {"query": "what is ", "passage": "the "}  # as several libraries name the second


@pytest.fixture(scope="module", autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def save(encoder, tmp_path) -> Callable[..., Path]:
    """save(class, *modules, lengths={}, **settings): a checkpoint on the tiny encoder."""

    def write(cls: type, *modules: nn.Module, lengths: dict | None = None, **settings) -> Path:
        backbone = Transformer(str(encoder), **(lengths or {}))
        cls(modules=[backbone, *modules], device="cpu", **settings).save_pretrained(
            str(tmp_path / "model"), create_model_card=False
        )
        return tmp_path / "model"

    return write


def rewrite(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def their_scores(encoder: SentenceTransformer | MultiVectorEncoder) -> np.ndarray:
    vectors = encoder.encode_query(QUERIES), encoder.encode_document(DOCUMENTS)
    return encoder.similarity_pairwise(*vectors).numpy()


def our_scores(folder: Path) -> np.ndarray:
    return kd.Ranker.from_pretrained(folder, device="cpu").score(QUERIES, DOCUMENTS)


def linear(name: str, **settings) -> Dense:
    return Dense(16, 6, activation_function=nn.Identity(), module_input_name=name, **settings)


BI_ENCODERS = {
    "cls": ([Pooling(16, "cls")], {"similarity_fn_name": "dot"}),
    "mean, prompts": ([Pooling(16, "mean")], {"similarity_fn_name": "dot", "prompts": PROMPTS}),
    "default prompt": ([Pooling(16, "mean")], {"prompts": {"any": "the "}, "default_prompt_name": "any"}),
    "normalised": ([Pooling(16, "mean"), Normalize()], {"similarity_fn_name": "dot"}),
    "cosine": ([Pooling(16, "cls")], {"similarity_fn_name": "cosine"}),
    "no similarity": ([Pooling(16, "cls")], {}),
    "dense": ([Pooling(16, "cls"), linear("sentence_embedding")], {"similarity_fn_name": "dot"}),
    "dense without bias": ([Pooling(16, "mean"), linear("sentence_embedding", bias=False), Normalize()], {}),
}


@pytest.mark.parametrize(("modules", "settings"), BI_ENCODERS.values(), ids=BI_ENCODERS)
def test_bi_encoder_is_a_bert_dot_with_its_scores(modules, settings, save):
    folder = save(SentenceTransformer, *modules, lengths={"query_length": 8, "document_length": 20}, **settings)
    model = kd.load_ranker(folder)
    assert type(model) is kd.BertDot
    assert (model.config.max_query_length, model.config.max_document_length) == (8, 20)
    np.testing.assert_allclose(our_scores(folder), their_scores(SentenceTransformer(str(folder))), atol=1e-5)


def test_bi_encoder_saved_as_a_ranker_keeps_its_scores(save, tmp_path, tokenizer):
    folder = save(SentenceTransformer, Pooling(16, "mean"), linear("sentence_embedding"), Normalize(), prompts=PROMPTS)
    ranker = kd.Ranker.from_pretrained(folder, device="cpu")
    ranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(our_scores(tmp_path / "ours"), ranker.score(QUERIES, DOCUMENTS))


def test_files_of_older_releases_are_read(save):
    folder = save(SentenceTransformer, Pooling(16, "cls"), Normalize())
    expected = their_scores(SentenceTransformer(str(folder), processor_kwargs={"model_max_length": 12}))
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"__version__": {}}))
    np.testing.assert_allclose(our_scores(folder), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "settings", "reason"),
    [
        ([Pooling(16, "max")], {}, "it pools by max, needed cls or mean"),
        ([Pooling(16, ("cls", "mean"))], {}, "it pools by cls and mean"),
        ([Pooling(16, "cls"), Dense(16, 6)], {}, r"Dense module is not linear \(Tanh"),
        ([Pooling(16, "cls"), Normalize(), linear("sentence_embedding")], {}, "its modules are .*Normalize, Dense"),
        ([Pooling(16, "cls")], {"similarity_fn_name": "euclidean"}, "it compares by euclidean"),
        ([Pooling(16, "mean", include_prompt=False)], {"prompts": PROMPTS}, "leaves its prompt out"),
    ],
)
def test_bi_encoder_outside_bert_dot_is_refused(modules, settings, reason, save):
    folder = save(SentenceTransformer, *modules, **settings)
    with pytest.raises(ValueError, match=f"can compute: .*{reason}.*load_teacher"):
        kd.load_ranker(folder)
    fresh = kd.load_ranker(folder, "bert_cat", max_document_length=20)  # the encoder is as good as any
    assert type(fresh) is kd.BertCat


def test_a_dense_layer_that_is_pickled_is_not_read(save):
    folder = save(SentenceTransformer, Pooling(16, "cls"), linear("sentence_embedding"))
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no 2_Dense/model\.safetensors; .*pickles are not read"):
        kd.load_ranker(folder)


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_vector_encoder_is_a_colbert_with_its_scores(is_normalized, bias, save):
    modules = [linear("token_embeddings", bias=bias), MultiVectorMask()]
    modules += [Normalize(module_input_name="token_embeddings")] if is_normalized else []
    folder = save(MultiVectorEncoder, *modules, lengths={"query_length": 8, "document_length": 20}, prompts=PROMPTS)
    assert type(kd.load_ranker(folder)) is kd.ColBERT
    np.testing.assert_allclose(our_scores(folder), their_scores(MultiVectorEncoder(str(folder))), atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "settings", "reason"),
    [
        ([linear("token_embeddings"), MultiVectorMask(skiplist_words=["apple"])], {}, "leaves document tokens out"),
        ([MultiVectorMask()], {}, "its modules are Transformer, MultiVectorMask"),
        (
            [linear("token_embeddings"), MultiVectorMask()],
            {"lengths": {"query_expansion": {"strategy": "fixed", "length": 8}}},
            r"pads queries with \[MASK\]",
        ),
        (
            [linear("token_embeddings"), MultiVectorMask()],
            {"similarity_fn_name": "meanmaxsim"},
            "scores by meanmaxsim",
        ),
    ],
)
def test_multi_vector_encoder_outside_colbert_is_refused(modules, settings, reason, save):
    folder = save(MultiVectorEncoder, *modules, **settings)
    with pytest.raises(ValueError, match=f"can compute: .*{reason}"):
        kd.load_ranker(folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"query_prefix": "[MASK]", "document_prefix": "apple"}, None),  # single tokens, as PyLate makes its own
        ({"query_prefix": "[Q] "}, r"query prefix '\[Q\] ' is a token that"),
        ({"skiplist_words": ["."]}, "leaves document tokens out"),
        ({"skiplist_words": None}, "leaves document tokens out"),  # its default is punctuation
        ({"do_query_expansion": True}, r"pads queries with \[MASK\]"),
    ],
)
def test_pylate_layout_is_a_colbert_or_refused(settings, reason, save, tmp_path):
    folder = save(MultiVectorEncoder, linear("token_embeddings", bias=False))
    defaults = {"query_prefix": "", "document_prefix": "", "do_query_expansion": False, "skiplist_words": []}
    settings = {"model_type": "ColBERT", "query_length": 8, "document_length": 20} | defaults | settings
    rewrite(folder / "config_sentence_transformers.json", **{k: v for k, v in settings.items() if v is not None})
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            kd.load_ranker(folder)
        return
    np.testing.assert_allclose(our_scores(folder), their_scores(MultiVectorEncoder(str(folder))), atol=1e-5)


SIZES = {
    "vocab_size": 39,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SIZES |= {"max_position_embeddings": 65, "initializer_range": 0.5, "num_labels": 1, "pad_token_id": 0}
CLASSIFIERS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "mpnet": MPNetConfig(**SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=39, dim=16, n_layers=1, n_heads=2, hidden_dim=32, initializer_range=0.5, num_labels=1
    ),
}


def save_classifier(config: PreTrainedConfig, tokenizer, folder: Path, max_length: int = 24) -> Path:
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # biases too, which are zero at first
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    if config.model_type not in ("bert", "electra"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_classifier_with_one_label_is_a_bert_cat(config, tokenizer, tmp_path):
    folder = save_classifier(config, tokenizer, tmp_path / "model")
    theirs = CrossEncoder(str(folder), activation_fn=nn.Identity(), device="cpu")
    expected = theirs.predict(list(zip(QUERIES, DOCUMENTS, strict=True)))
    ranker = kd.Ranker.from_pretrained(folder, device="cpu")
    assert type(ranker.model) is kd.BertCat
    np.testing.assert_allclose(ranker.score(QUERIES, DOCUMENTS), expected, atol=1e-5)
    ranker.save_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(our_scores(tmp_path / "ours"), ranker.score(QUERIES, DOCUMENTS))


def test_classifier_over_passages_needs_training_only_with_attention(tokenizer, tmp_path):
    folder = save_classifier(CLASSIFIERS["bert"], tokenizer, tmp_path)
    lengths = {"max_query_length": 8, "max_document_length": 40, "passage_length": 10}
    assert not kd.load_ranker(folder, **lengths).is_fresh
    assert kd.load_ranker(folder, **lengths, passage_pooling="attention").is_fresh


def test_prompt_of_a_cross_encoder_is_the_query_prefix(tokenizer, tmp_path):
    save_classifier(CLASSIFIERS["bert"], tokenizer, tmp_path / "plain")
    cross_encoder = CrossEncoder(
        str(tmp_path / "plain"), prompts={"web": "what is "}, default_prompt_name="web", activation_fn=nn.Identity()
    )
    cross_encoder.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    expected = cross_encoder.predict(list(zip(QUERIES, DOCUMENTS, strict=True)))
    np.testing.assert_allclose(our_scores(tmp_path / "model"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**SIZES | {"num_labels": 2}), "it has 2 labels, needed one"),
        (AlbertConfig(**SIZES, embedding_size=16), "its head is that of albert classifiers"),
    ],
)
def test_classifier_outside_bert_cat_is_refused(config, reason, tokenizer, tmp_path):
    folder = save_classifier(config, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match=f"can compute: .*{reason}.*load_teacher"):
        kd.load_ranker(folder)


def test_classifier_without_its_head_is_refused(tokenizer, tmp_path):
    folder = save_classifier(CLASSIFIERS["bert"], tokenizer, tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(folder).bert.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="does not hold all weights of a BertForSequenceClassification: missing classifier"
    ):
        kd.load_ranker(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", "junk", "The weights of .* are damaged: .*header"),
        ("modules.json", "[{", r"modules\.json is not valid JSON"),
        ("modules.json", "[3]", r"modules\.json does not have the form that sentence-transformers writes: \[3\]"),
        ("config_sentence_transformers.json", "[]", r"transformers\.json does not have the form"),
    ],
)
def test_damaged_files_are_named(file, content, message, save):
    folder = save(SentenceTransformer, Pooling(16, "cls"))
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        kd.load_ranker(folder)
    with pytest.raises(InputError, match=message):
        kd.load_teacher(str(folder))


def test_module_with_code_of_its_own_is_refused(save):
    folder = save(SentenceTransformer, Pooling(16, "cls"))
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "pooling.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"its module pooling\.Pooling is code of its own"):
        kd.load_ranker(folder)


def test_new_ranker_on_another_librarys_encoder_is_marked(save):
    folder = save(SentenceTransformer, Pooling(16, "mean"))
    assert kd.load_ranker(folder, "bert_dot", max_document_length=20).is_fresh
    assert not kd.load_ranker(folder).is_fresh
