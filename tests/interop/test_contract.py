"""A checkpoint of another library has that library's scores here, or is refused with the reason.

The wanted score is that of one pair alone, which needs no padding; ours is computed beside longer pairs.
"""

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError

QUERIES = ["moon", "what is bread", "how to glass house", "a", "unheard moon"]
DOCUMENTS = ["night lake lake", "bread house", "king moon jam " * 5, "", "the jam of a king"]
PAIRS = list(zip(QUERIES, DOCUMENTS, strict=True))

IDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER |= {"max_position_embeddings": 64, "initializer_range": 0.5}
DISENTANGLED = ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DECODER = ENCODER | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}
SEQ_TO_SEQ = IDS | {"decoder_start_token_id": 0, "d_model": 16}
BACKBONES = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "xlm-roberta": ENCODER,
    "deberta": DISENTANGLED,
    "deberta-v2": DISENTANGLED,
    "electra": ENCODER | {"embedding_size": 8},
    "albert": ENCODER | {"embedding_size": 8},
    "mpnet": ENCODER,
    "modernbert": ENCODER | {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
    "t5": SEQ_TO_SEQ | {"num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "initializer_factor": 3.0},
    "bart": SEQ_TO_SEQ | {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "init_std": 0.5},
    "xlnet": IDS | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "initializer_range": 0.5},
    "qwen3": DECODER,
    "llama": DECODER,
    "gpt2": DECODER | {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
}
TOKEN_TYPES = ("bert", "deberta", "deberta-v2", "electra", "albert")
CAUSAL = ("qwen3", "llama", "gpt2")
ENCODER_DECODERS = ("t5", "bart")
# Every backbone with a tokenizer that pads on the left; one of a kind also on the right, and without a padding token.
CELLS = [(name, "left") for name in BACKBONES]
for one_of_a_kind in ("bert", "xlnet", "gpt2"):
    CELLS += [(one_of_a_kind, "right"), (one_of_a_kind, None)]


def rewrite(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="session")
def save_model(tokenizer, tmp_path_factory) -> Callable[..., Path]:
    """save_model(backbone, auto_class, padding, **config): a folder of random weights and a tokenizer.

    `padding` is the side of the tokenizer's padding, None if the tokenizer has no padding token.
    """
    made = {}

    def save(name: str, auto_class: type = AutoModel, padding: str | None = "right", **settings) -> Path:
        key = (name, auto_class, padding, repr(settings))
        if key not in made:
            torch.manual_seed(1)
            made[key] = tmp_path_factory.mktemp(name)
            model = auto_class.from_config(CONFIG_MAPPING[name](**(BACKBONES[name] | settings)))
            with torch.no_grad():
                for parameter in model.parameters():  # biases too, which are zero at first
                    if parameter.dim() == 1:
                        parameter += torch.randn_like(parameter) / 5
            model.save_pretrained(made[key])
            theirs = copy.deepcopy(tokenizer)
            theirs.eos_token, theirs.model_max_length = "[SEP]", 24
            if padding is None:
                theirs.pad_token = None
            if name not in TOKEN_TYPES:
                theirs.model_input_names = ["input_ids", "attention_mask"]
            theirs.save_pretrained(made[key])
            rewrite(made[key] / "tokenizer_config.json", padding_side=padding or "right")
        return made[key]

    return save


@pytest.fixture
def save(save_model, tmp_path) -> Callable[..., Path]:
    """save(class, modules, backbone, padding, **settings): a checkpoint of sentence-transformers."""

    def write(cls: type, modules: list, name: str = "bert", padding: str | None = "right", **settings) -> Path:
        backbone = Transformer(str(save_model(name, padding=padding)))
        model = cls(modules=[backbone, *modules], device="cpu", **settings)
        model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
        assert model.tokenizer.padding_side == (padding or "right")
        return tmp_path / "model"

    return write


def their_logits(folder: Path) -> np.ndarray:
    """By transformers, one pair at a time: (N, labels)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), []
    for query, document in PAIRS:
        inputs = tokenizer([query], [document], truncation=True, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


def their_similarities(cls: type, folder: Path) -> np.ndarray:
    """By sentence-transformers, one text at a time: (N,)."""
    model, scores = cls(str(folder), device="cpu"), []
    model.tokenizer.pad_token = model.tokenizer.pad_token or "[SEP]"  # which one text alone does not get
    for query, document in PAIRS:
        scores.append(model.similarity_pairwise(model.encode_query([query]), model.encode_document([document])).item())
    return np.array(scores)


def their_predictions(folder: Path) -> np.ndarray:
    """By sentence-transformers, one pair at a time, without the activation."""
    model = CrossEncoder(str(folder), device="cpu")
    model.tokenizer.pad_token = model.tokenizer.pad_token or "[SEP]"
    return np.stack([model.predict([pair], activation_fn=nn.Identity())[0] for pair in PAIRS])


def by_ranker(folder: Path) -> np.ndarray:
    return kd.Ranker.from_pretrained(folder, device="cpu").score(QUERIES, DOCUMENTS)


def by_teacher(folder: Path, **options) -> np.ndarray:
    return kd.load_teacher(str(folder), device="cpu", **options).score(QUERIES, DOCUMENTS)


def assert_equal_or_refused(
    score: Callable[..., np.ndarray], folder: Path, wanted: np.ndarray | None, reason: str | None = None, **options
) -> None:
    """`reason` is a regular expression for the message of the refusal; None for equal scores."""
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            score(folder, **options)
        return
    assert wanted.std() > 0.01, "scores too alike to tell a change"
    np.testing.assert_allclose(score(folder, **options), wanted, rtol=1e-4, atol=1e-4)


# ---- Backbones and padding ------------------------------------------------------------------------------------------

# By model_type, what a BERT_CAT or a BERT_DOT is refused for; all others are equal.
NO_HEAD = dict.fromkeys(BACKBONES, "its head is that of") | dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "electra", "mpnet")
)
NO_ENCODER = dict.fromkeys(ENCODER_DECODERS, "are encoder-decoders; rankers are built on encoders only")
NO_PADDING = "has no padding token"


@pytest.mark.parametrize(("name", "padding"), CELLS)
def test_classifiers(name, padding, save_model):
    folder = save_model(name, AutoModelForSequenceClassification, padding, num_labels=1)
    wanted = their_logits(folder)[:, 0]
    assert_equal_or_refused(by_teacher, folder, wanted)
    assert_equal_or_refused(by_ranker, folder, wanted, NO_HEAD[name] or (NO_PADDING if padding is None else None))


@pytest.mark.parametrize(("name", "padding"), [("bert", "right"), ("bart", "left"), ("xlnet", "left"), ("gpt2", None)])
def test_classes_are_ordered_by_probability(name, padding, save_model):
    folder = save_model(name, AutoModelForSequenceClassification, padding, num_labels=3)
    assert_equal_or_refused(partial(by_teacher, label="LABEL_1"), folder, log_odds(their_logits(folder)))
    assert_equal_or_refused(by_ranker, folder, None, "its head is that of|it has 3 labels, needed one")


def log_odds(logits: np.ndarray) -> np.ndarray:
    """The logit of the probability of class 1."""
    probabilities = np.exp(logits.astype(np.float64))
    probability = probabilities[:, 1] / probabilities.sum(1)
    return np.log(probability / (1 - probability))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("name", "padding"), [*CELLS[: len(BACKBONES)], ("bert", None), ("gpt2", None)])
def test_bi_encoders(name, pooling, padding, save):
    folder = save(SentenceTransformer, [Pooling(16, pooling)], name, padding, similarity_fn_name="dot")
    reason = NO_ENCODER.get(name)
    if name in CAUSAL and pooling == "cls":
        reason = f"{name} is a causal encoder, .* or bert_dot with pooling='mean'"
    elif padding is None:
        reason = reason or NO_PADDING
    wanted = their_similarities(SentenceTransformer, folder)
    assert_equal_or_refused(by_ranker, folder, wanted, reason)
    if name not in CAUSAL or pooling == "mean":
        assert_equal_or_refused(by_teacher, folder, wanted)


@pytest.mark.parametrize(("name", "padding"), [*CELLS[: len(BACKBONES) : 2], ("bert", None)])
def test_multi_vector_encoders(name, padding, save):
    modules = [linear("token_embeddings"), MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    folder = save(MultiVectorEncoder, modules, name, padding, prompts={"query": "what ", "document": "the "})
    wanted = their_similarities(MultiVectorEncoder, folder)
    assert_equal_or_refused(by_teacher, folder, wanted)
    reason = NO_ENCODER.get(name) or (NO_PADDING if padding is None else None)
    assert_equal_or_refused(by_ranker, folder, wanted, reason)


SIDE = "{{ (messages | selectattr('role', 'eq', '%s') | first).content }}"
TEMPLATES = {"no template": None, "template": f"what {SIDE % 'query'} is {SIDE % 'document'} how to"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("name", "padding"), [("qwen3", "left"), ("llama", None), ("gpt2", "right")])
def test_language_models_with_answers(name, template, padding, save_model, tmp_path):
    encoder = Transformer(
        str(save_model(name, AutoModelForCausalLM, padding)),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": TEMPLATES[template]},
    )
    save_cross_encoder(tmp_path, modules=[encoder, LogitScore(true_token_id=7, false_token_id=9)])
    assert_equal_or_refused(by_teacher, tmp_path, their_predictions(tmp_path))
    assert_equal_or_refused(by_ranker, tmp_path, None, "its modules are Transformer, LogitScore")


@pytest.mark.parametrize("outputs", [1, 2])
def test_scores_of_a_dense_layer(outputs, save_model, tmp_path):
    dense = Dense(16, outputs, activation_function=nn.Identity(), module_output_name="scores")
    modules = [Transformer(str(save_model("qwen3", padding="left"))), Pooling(16, "lasttoken"), dense]
    save_cross_encoder(tmp_path, modules=modules)
    reason = None if outputs == 1 else "cannot be a teacher: it has 2 outputs"
    assert_equal_or_refused(by_teacher, tmp_path, their_predictions(tmp_path), reason)
    assert_equal_or_refused(by_ranker, tmp_path, None, "its modules are Transformer, Pooling, Dense")


def test_instruction_for_a_prompt_of_its_own_is_refused(save_model, tmp_path):
    save_cross_encoder(tmp_path, str(save_model("bert", AutoModelForSequenceClassification, num_labels=1)))
    with pytest.raises(InputError, match="has a prompt of its own"):
        kd.load_teacher(str(tmp_path), instruction="find the moon")


def test_template_without_room_for_the_document_is_refused(save_model, tmp_path):
    encoder = Transformer(
        str(save_model("qwen3", AutoModelForCausalLM)),
        transformer_task="text-generation",
        processor_kwargs={"chat_template": TEMPLATES["template"]},
    )
    save_cross_encoder(tmp_path, modules=[encoder, LogitScore(7, 9)])
    teacher = kd.load_teacher(str(tmp_path), device="cpu")
    with pytest.raises(InputError, match=r"reads 24 tokens; its prompt with the query 'moon moon .* no document fits"):
        teacher.score(["moon " * 30] * 2, ["jam", "bread"])


# ---- What a checkpoint says of itself -------------------------------------------------------------------------------


def linear(name: str = "sentence_embedding", **settings) -> Dense:
    return Dense(16, 6, **{"activation_function": nn.Identity(), "module_input_name": name} | settings)


DOT = {"similarity_fn_name": "dot"}
# Modules after the encoder, settings, and what a ranker is refused for; a teacher is equal.
BI_ENCODERS = {
    "cosine": ([Pooling(16, "mean")], {}, None),
    "normalised": ([Pooling(16, "mean"), Normalize()], DOT, None),
    "dense": ([Pooling(16, "mean"), linear()], DOT, None),
    "dense, normalised": ([Pooling(16, "cls"), linear(bias=False), Normalize()], {}, None),
    "both prompts": ([Pooling(16, "mean")], DOT | {"prompts": {"query": "what ", "document": "the "}}, None),
    "prompt of another name": ([Pooling(16, "mean")], DOT | {"prompts": {"query": "what ", "passage": "the "}}, None),
    "default prompt": ([Pooling(16, "mean")], DOT | {"prompts": {"x": "the "}, "default_prompt_name": "x"}, None),
    "truncated": ([Pooling(16, "mean")], DOT | {"truncate_dim": 8}, "sets truncate_dim to 8"),
    "truncated cosine": ([Pooling(16, "mean"), Normalize()], {"truncate_dim": 3}, "sets truncate_dim to 3"),
    "max": ([Pooling(16, "max")], DOT, "it pools by max"),
    "last token": ([Pooling(16, "lasttoken")], DOT, "it pools by lasttoken"),
    "weighted mean": ([Pooling(16, "weightedmean")], DOT, "it pools by weightedmean"),
    "two poolings": ([Pooling(16, ("cls", "mean"))], DOT, "it pools by cls and mean"),
    "prompt left out": (
        [Pooling(16, "mean", include_prompt=False)],
        DOT | {"prompts": {"query": "what "}},
        "leaves its prompt out",
    ),
    "tanh": ([Pooling(16, "mean"), linear(activation_function=nn.Tanh())], DOT, "Dense module is not linear"),
    "two dense": ([Pooling(16, "mean"), linear(), Dense(6, 4)], DOT, "the module Dense occurs twice"),
    "dense on tokens": ([linear("token_embeddings"), Pooling(6, "mean")], DOT, "its modules are Transformer, Dense"),
}


@pytest.mark.parametrize(("modules", "settings", "reason"), BI_ENCODERS.values(), ids=BI_ENCODERS)
def test_modules_and_settings_of_bi_encoders(modules, settings, reason, save):
    folder = save(SentenceTransformer, modules, **settings)
    wanted = their_similarities(SentenceTransformer, folder)
    assert_equal_or_refused(by_teacher, folder, wanted)
    assert_equal_or_refused(by_ranker, folder, wanted, reason)


# Files of other releases: settings of config_sentence_transformers.json, of sentence_bert_config.json.
FILES = {
    "prompts of one side": ({"prompts": {"query": "what ", "passage": "the "}}, {}, None),
    "shorter": ({}, {"max_seq_length": 7}, None),
    "lengths": ({}, {"query_length": 5, "document_length": 7}, None),
    "cut by the processor": ({}, {"processing_kwargs": {"text": {"max_length": 6}}}, "sets processing_kwargs"),
    "lower case": ({}, {"do_lower_case": True}, None),
}


@pytest.mark.parametrize(("settings", "encoder", "reason"), FILES.values(), ids=FILES)
def test_files_of_bi_encoders(settings, encoder, reason, save):
    folder = save(SentenceTransformer, [Pooling(16, "mean")], **DOT)
    rewrite(folder / "config_sentence_transformers.json", **settings)
    rewrite(folder / "sentence_bert_config.json", **encoder)
    wanted = their_similarities(SentenceTransformer, folder)
    assert_equal_or_refused(by_teacher, folder, wanted)
    assert_equal_or_refused(by_ranker, folder, wanted, reason)


def test_chat_template_of_a_bi_encoder(save_model, tmp_path):
    template = "what {% for message in messages %}{{ message.content }}{% endfor %} is"
    encoder = Transformer(str(save_model("qwen3")), processor_kwargs={"chat_template": template})
    model = SentenceTransformer(modules=[encoder, Pooling(16, "mean")], device="cpu", **DOT)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert_equal_or_refused(by_teacher, tmp_path, their_similarities(SentenceTransformer, tmp_path))
    assert_equal_or_refused(by_ranker, tmp_path, None, "it puts texts into a chat template")


MASKS = {
    "not normalised": ([linear("token_embeddings"), MultiVectorMask()], {}, None),
    "without a linear layer": ([MultiVectorMask()], {}, "its modules are Transformer, MultiVectorMask"),
    "skip list": (
        [linear("token_embeddings"), MultiVectorMask(skiplist_words=["king"])],
        {},
        "leaves document tokens",
    ),
    "mean": ([linear("token_embeddings"), MultiVectorMask()], {"similarity_fn_name": "meanmaxsim"}, "meanmaxsim"),
}


@pytest.mark.parametrize(("modules", "settings", "reason"), MASKS.values(), ids=MASKS)
def test_modules_of_multi_vector_encoders(modules, settings, reason, save):
    folder = save(MultiVectorEncoder, modules, **settings)
    wanted = their_similarities(MultiVectorEncoder, folder)
    assert_equal_or_refused(by_teacher, folder, wanted)
    assert_equal_or_refused(by_ranker, folder, wanted, reason)


def test_query_expansion_of_a_multi_vector_encoder(save):
    folder = save(MultiVectorEncoder, [linear("token_embeddings"), MultiVectorMask()])
    rewrite(folder / "sentence_bert_config.json", query_expansion={"strategy": "fixed", "length": 12})
    assert_equal_or_refused(by_teacher, folder, their_similarities(MultiVectorEncoder, folder))
    assert_equal_or_refused(by_ranker, folder, None, r"pads queries with \[MASK\]")


def save_cross_encoder(folder: Path, name: str | None = None, **settings) -> None:
    CrossEncoder(name, device="cpu", **settings).save_pretrained(str(folder), create_model_card=False)


ORDER = "activation {} changes the order of the logits"
# Labels, activation, and what is refused: of a teacher, of a ranker.
CROSS_ENCODERS = {
    "sigmoid": (1, nn.Sigmoid(), None, None),
    "identity": (1, nn.Identity(), None, None),
    "tanh": (1, nn.Tanh(), None, None),
    "relu": (1, nn.ReLU(), ORDER.format("ReLU"), ORDER.format("ReLU")),
    "softmax of one": (1, nn.Softmax(), ORDER.format("Softmax"), ORDER.format("Softmax")),
    "two": (2, nn.Identity(), None, "it has 2 labels"),
    "two, softmax": (2, nn.Softmax(), None, "it has 2 labels"),
    "three": (3, nn.Identity(), None, "it has 3 labels"),
    "three, independent": (3, nn.Sigmoid(), None, "it has 3 labels"),
    "three, gelu": (3, nn.GELU(), ORDER.format("GELU"), "it has 3 labels"),
}


@pytest.mark.parametrize("prompt", [None, "what is "])
@pytest.mark.parametrize(
    ("labels", "activation", "no_teacher", "no_ranker"), CROSS_ENCODERS.values(), ids=CROSS_ENCODERS
)
def test_cross_encoders(labels, activation, no_teacher, no_ranker, prompt, save_model, tmp_path):
    prompts = {} if prompt is None else {"prompts": {"web": prompt}, "default_prompt_name": "web"}
    plain = save_model("bert", AutoModelForSequenceClassification, "left", num_labels=labels)
    save_cross_encoder(tmp_path, str(plain), activation_fn=activation, **prompts)
    wanted = their_predictions(tmp_path)
    options = {}
    if labels > 1:
        options["label"] = "LABEL_1"
        wanted = wanted[:, 1] if isinstance(activation, nn.Sigmoid) else log_odds(wanted)
    assert_equal_or_refused(by_teacher, tmp_path, wanted, no_teacher, **options)
    assert_equal_or_refused(by_ranker, tmp_path, wanted, no_ranker)


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> Path:
    """Files of the pairs, each document a candidate of its query."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, texts in (("queries", QUERIES), ("collection", DOCUMENTS)):
        (folder / f"{name}.tsv").write_text("".join(f"{row}\t{text}\n" for row, text in enumerate(texts)))
    kd.write_run({str(row): [(str(row), 1.0)] for row in range(len(PAIRS))}, folder / "candidates.trec")
    return folder


def by_command(call: Callable, files: Path, folder: Path, verb: str, kind: str | None = None) -> np.ndarray:
    inputs = " ".join(f"--{name} {files / name}.tsv" for name in ("queries", "collection"))
    option = "" if kind is None else f"--kind {kind}"
    output = files / f"{verb.split()[-1]}.trec"
    command = f"{verb} --model {folder} {inputs} --candidates {files}/candidates.trec --output {output} {option}"
    status, _, errors = call(command)
    if status != 0:
        assert status == 2
        raise InputError(errors)
    run = kd.read_run(output)
    return np.array([run[str(row)][0][1] for row in range(len(PAIRS))])


@pytest.mark.parametrize(("verb", "by_python"), [("teacher score", by_teacher), ("rerank", by_ranker)])
@pytest.mark.parametrize("name", ["bi-encoder", "truncated", "multi-vector", "classifier", "encoder"])
def test_commands_score_as_python_does(name, verb, by_python, save, save_model, files, call):
    if name == "classifier":
        folder = save_model("bert", AutoModelForSequenceClassification, "left", num_labels=1)
    elif name == "encoder":
        folder = save_model("bert")
    elif name == "multi-vector":
        folder = save(MultiVectorEncoder, [linear("token_embeddings"), MultiVectorMask()])
    else:
        folder = save(SentenceTransformer, [Pooling(16, "mean")], **BI_ENCODERS.get(name, (None, DOT))[1])
    wanted, reason = None, None
    try:
        wanted = by_python(folder)
    except InputError as error:
        reason = str(error)[-40:]
    assert_equal_or_refused(partial(by_command, call, files, verb=verb), folder, wanted, reason and re.escape(reason))
