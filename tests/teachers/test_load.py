"""Teachers of every kind score as their model called by hand, pair by pair, and give raw scores."""

import json
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES
from hf_kd_ranking.teachers import language_models
from hf_kd_ranking.teachers.load import Teacher, load_teacher
from hf_kd_ranking.teachers.prompts import INSTRUCTION, QWEN_TEMPLATE, Prompt

# Lengths differ, so that batches have padding; a pair twice; a text that is cut at 64 tokens.
QUERIES = ["moon", "what is bread", "moon", "how to glass house", "a", "moon"]
DOCUMENTS = ["night lake lake", "bread house", "jam", "king " * 70, "", "jam"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LM_SIZES = SIZES | {
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LABELS = ["irrelevant", "relevant", "perfect"]


def score(folder, **options) -> np.ndarray:
    return load_teacher(str(folder), device="cpu", **options).score(QUERIES, DOCUMENTS)


def close(wanted) -> list:
    return pytest.approx(np.asarray(wanted, dtype=np.float32), rel=1e-4, abs=1e-5)


@pytest.fixture
def make_classifier(tmp_path, tokenizer):
    def make(labels: list[str]):
        torch.manual_seed(2)
        config = BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            initializer_range=0.5,
            num_labels=len(labels),
            **SIZES,
        )
        config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
        tokenizer.save_pretrained(tmp_path / "classifier")
        return tmp_path / "classifier"

    return make


@torch.no_grad()
def logits_by_hand(folder, tokenizer) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        inputs = tokenizer([query], [document], truncation=True, max_length=64, return_tensors="pt")
        rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


# ---- Our rankers ----------------------------------------------------------------------------------------------------


def test_ranker_is_recognized_and_scores_the_same(model, tokenizer, tmp_path):
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path / "mine")
    teacher = load_teacher(str(tmp_path / "mine"), batch_size=2, device="cpu")
    scores = teacher.score(QUERIES, DOCUMENTS)
    assert (scores.dtype, scores.shape, teacher.name) == (np.float32, (6,), "mine")
    assert scores.std() > 0.05, "scores too alike to tell a change"
    one_by_one = [ranker.score([query], [document])[0] for query, document in zip(QUERIES, DOCUMENTS, strict=True)]
    assert scores == close(one_by_one)
    kind = next(name for name, cls in ARCHITECTURES.items() if type(model) is cls)
    np.testing.assert_array_equal(score(tmp_path / "mine", kind=kind, batch_size=2), scores)


def test_plain_encoder_has_the_kind_that_is_named(encoder, tokenizer, tmp_path):
    torch.manual_seed(4)
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **SIZES)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = kd.Ranker.from_pretrained(tmp_path, "bert_dot", device="cpu").score(QUERIES, DOCUMENTS)
    assert wanted.std() > 0.05
    assert score(tmp_path, kind="bert_dot") == close(wanted)


# ---- Classifiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "classifier"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_classifier_of_one_output_gives_its_raw_logit(make_classifier, tokenizer, kind, batch_size):
    folder = make_classifier(["LABEL_0"])
    wanted = logits_by_hand(folder, tokenizer)[:, 0]
    assert not all(0 <= logit <= 1 for logit in wanted), "the random weights hide a sigmoid"
    assert score(folder, kind=kind, batch_size=batch_size) == close(wanted)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_label_names_the_output_that_is_the_score(make_classifier, tokenizer, label, problem):
    folder, index = make_classifier(LABELS), LABELS.index(label)
    logits = logits_by_hand(folder, tokenizer)
    wanted = logits[:, index]
    if problem is None:  # the logit of the probability of a class: log p - log (1 - p)
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        wanted = np.log(probabilities[:, index] / (1 - probabilities[:, index]))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": problem}))
    assert score(folder, label=label) == close(wanted)


def test_of_several_outputs_one_must_be_named(make_classifier):
    folder = make_classifier(LABELS)
    with pytest.raises(ValueError, match="has 3 outputs; name the one to score by: irrelevant, relevant, perfect"):
        load_teacher(str(folder))
    with pytest.raises(ValueError, match="has no output 'great'; it has irrelevant, relevant, perfect"):
        load_teacher(str(folder), label="great")


def test_max_length_cuts_the_longer_text_first(make_classifier, tokenizer):
    folder = make_classifier(["LABEL_0"])
    short = load_teacher(str(folder), max_length=8, device="cpu").score(["moon lake"], ["king " * 9 + "jam"])
    whole = load_teacher(str(folder), device="cpu").score(["moon lake"], ["king king king"])
    assert short == close(whole)


def test_pairs_end_where_roberta_has_no_more_positions(tokenizer, tmp_path):
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=20, pad_token_id=0, num_labels=1, **SIZES
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(tmp_path)
    longer = load_teacher(str(tmp_path), device="cpu").score(["moon", "moon"], ["king " * 40, "king " * 15])
    assert longer[0] == pytest.approx(longer[1], abs=1e-5)  # 19 tokens of both


@pytest.mark.parametrize("kind", ["classifier", "yes-no"])
def test_an_encoder_without_a_trained_head_is_no_teacher(encoder, kind):
    message = "without a trained head" if kind == "classifier" else "no single token 'yes'"
    with pytest.raises(ValueError, match=message):
        load_teacher(str(encoder), kind)


# ---- sentence-transformers ------------------------------------------------------------------------------------------


@pytest.fixture
def cross_encoder(make_classifier, tmp_path):
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(make_classifier(["LABEL_0"])), device="cpu").save_pretrained(str(tmp_path / "cross"))
    return tmp_path / "cross"


def test_cross_encoder_scores_are_raw_logits(cross_encoder, tokenizer):
    from sentence_transformers import CrossEncoder

    wanted = logits_by_hand(cross_encoder, tokenizer)[:, 0]
    assert score(cross_encoder) == close(wanted)
    squashed = CrossEncoder(str(cross_encoder), device="cpu").predict(list(zip(QUERIES, DOCUMENTS, strict=True)))
    assert squashed == close(1 / (1 + np.exp(-wanted))), "the checkpoint has no sigmoid that could be forgotten"


@pytest.fixture
def make_bi_encoder(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def make(**options):
        module = Transformer(str(encoder), max_seq_length=12)
        model = SentenceTransformer(modules=[module, Pooling(16, pooling_mode="mean")], device="cpu", **options)
        model.save_pretrained(str(tmp_path / "bi"))
        return tmp_path / "bi", model

    return make


def vectors_by_hand(model, prompt: str = "") -> tuple[np.ndarray, np.ndarray]:
    sides = [[prompt + query for query in QUERIES], DOCUMENTS]
    return tuple(np.stack([model.encode([text], show_progress_bar=False)[0] for text in side]) for side in sides)


@pytest.mark.parametrize(
    ("saved", "given", "is_cosine"),
    [
        (None, None, True),
        ("dot", None, False),
        ("cosine", None, True),
        ("dot", "cosine", True),
        ("cosine", "dot", False),
    ],
)
def test_bi_encoder_uses_saved_or_given_similarity(make_bi_encoder, saved, given, is_cosine):
    folder, model = make_bi_encoder(similarity_fn_name=saved)
    queries, documents = vectors_by_hand(model)
    if is_cosine:
        queries, documents = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (queries, documents))
    assert score(folder, similarity=given, batch_size=2) == close((queries * documents).sum(1))


def test_bi_encoder_puts_its_prompt_before_queries(make_bi_encoder):
    folder, model = make_bi_encoder(prompts={"query": "what is ", "document": ""}, similarity_fn_name="dot")
    queries, documents = vectors_by_hand(model, "what is ")
    assert score(folder) == close((queries * documents).sum(1))


@pytest.mark.parametrize("similarity", ["euclidean", "manhattan"])
def test_bi_encoder_with_a_distance_is_refused(make_bi_encoder, similarity):
    folder, _ = make_bi_encoder(similarity_fn_name=similarity)
    with pytest.raises(ValueError, match=f"scores by 'dot' or 'cosine', got '{similarity}'"):
        load_teacher(str(folder))


# ---- Language models ------------------------------------------------------------------------------------------------


PROMPT = QWEN_TEMPLATE + INSTRUCTION
YES_NO_PREFIX, _, rest = QWEN_TEMPLATE.partition("<Instruct>")
YES_NO_BODY, end_of_turn, rest = ("<Instruct>" + rest).partition("<|im_end|>")
YES_NO_SUFFIX = end_of_turn + rest


def llama(tokenizer) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Whole words again, those of the prompt too."""
    split = pre_tokenizers.Whitespace()
    known = dict.fromkeys([*tokenizer.get_vocab(), "yes", "no", *(word for word, _ in split.pre_tokenize_str(PROMPT))])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = split
    names = ["input_ids", "attention_mask"]
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]", model_input_names=names
    )
    return words, LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **LM_SIZES))


def qwen2(tokenizer) -> tuple[Qwen2Tokenizer, Qwen2ForCausalLM]:
    """Byte pairs, and the marks of a turn as single tokens."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = bytes_
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=bytes_.alphabet(), show_progress=False)
    backend.train_from_iterator([PROMPT, "yes", "no", "yes", "no"], trainer)
    trained = json.loads(backend.to_str())["model"]
    pieces = Qwen2Tokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]])
    pieces.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return pieces, Qwen2ForCausalLM(Qwen2Config(vocab_size=len(pieces), **LM_SIZES))


@pytest.fixture(params=[llama, qwen2], ids=["llama", "qwen2"])
def language_model(request, tokenizer, tmp_path) -> Path:
    torch.manual_seed(3)
    for part in request.param(tokenizer):
        part.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@torch.no_grad()
def yes_minus_no(folder: Path, query: str, document: str, instruction: str = INSTRUCTION, room: int = 10_000) -> float:
    """By hand, alone: no padding, the whole prompt tokenised at once unless `room` tokens are left for its middle."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    body = YES_NO_BODY.format(instruction=instruction, query=query, document=document)
    ids = tokenizer(YES_NO_PREFIX + body + YES_NO_SUFFIX)["input_ids"]
    if room < 10_000:
        ids = [*tokenizer(YES_NO_PREFIX)["input_ids"], *tokenizer(body)["input_ids"][:room]]
        ids += tokenizer(YES_NO_SUFFIX)["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    vocabulary = tokenizer.get_vocab()
    return (logits[vocabulary["yes"]] - logits[vocabulary["no"]]).item()


@pytest.mark.parametrize("batch_size", [1, 4])  # 4: shorter prompts are padded on the left
def test_language_model_scores_yes_minus_no(language_model, batch_size):
    wanted = [yes_minus_no(language_model, *pair) for pair in zip(QUERIES, DOCUMENTS, strict=True)]
    assert np.std(wanted) > 0.1, "scores too alike to tell a change"
    assert score(language_model, batch_size=batch_size) == close(wanted)


def test_prefix_of_all_prompts_is_read_once(language_model, monkeypatch):
    wanted = load_teacher(str(language_model), batch_size=4, device="cpu").score(QUERIES, DOCUMENTS)
    lengths = []

    def counted(model, input_ids, *args, **options):
        lengths.append(input_ids.shape[1])
        return plain(model, input_ids, *args, **options)

    plain = language_models.yes_minus_no
    monkeypatch.setattr(language_models, "yes_minus_no", counted)
    teacher = load_teacher(str(language_model), batch_size=4, device="cpu")
    del lengths[:]  # of the comparison when it is loaded
    assert teacher.score(QUERIES, DOCUMENTS) == close(wanted)
    kept = max(lengths)
    monkeypatch.setattr(language_models, "_with_kept_prefix", lambda *_: None)
    teacher = load_teacher(str(language_model), batch_size=4, device="cpu")
    assert teacher.score(QUERIES, DOCUMENTS) == close(wanted)
    prefix = AutoTokenizer.from_pretrained(language_model)(QWEN_TEMPLATE.partition("<Instruct>")[0])["input_ids"]
    assert max(lengths) >= kept + len(prefix)


def test_prefix_is_not_kept_where_scores_would_change(language_model, monkeypatch):
    wanted = load_teacher(str(language_model), device="cpu").score(QUERIES, DOCUMENTS)
    repeat = language_models.DynamicCache.batch_repeat_interleave

    def repeat_wrong(cache, count):
        repeat(cache, count)
        for layer in cache.layers:
            layer.values.add_(1.0)

    monkeypatch.setattr(language_models.DynamicCache, "batch_repeat_interleave", repeat_wrong)
    assert load_teacher(str(language_model), device="cpu").score(QUERIES, DOCUMENTS) == close(wanted)


def test_prompt_and_answers_may_be_given(language_model):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(language_model),
        AutoTokenizer.from_pretrained(language_model),
    )
    prompt = Prompt("Judge whether the\nDocument: {document}\nmeets the Query: {query}\n", yes="no", no="yes")
    teacher = load_teacher(str(language_model), prompt=prompt, device="cpu")
    vocabulary, wanted = tokenizer.get_vocab(), []
    for query, document in zip(QUERIES, DOCUMENTS, strict=True):
        ids = tokenizer(f"Judge whether the\nDocument: {document}\nmeets the Query: {query}\n")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        wanted.append((logits[vocabulary["no"]] - logits[vocabulary["yes"]]).item())
    assert teacher.score(QUERIES, DOCUMENTS) == close(wanted)
    assert teacher.fingerprint != load_teacher(str(language_model), device="cpu").fingerprint
    with pytest.raises(ValueError, match="has no single token 'definitely not'"):
        load_teacher(str(language_model), prompt=Prompt(no="definitely not"))


def test_prompt_is_refused_where_nothing_reads_it(make_classifier):
    with pytest.raises(ValueError, match="is a classifier and reads no prompt"):
        load_teacher(str(make_classifier(["L"])), prompt=Prompt())


def test_long_document_is_cut_within_its_prompt(language_model):
    document, tokenizer = " ".join(["king", "moon", "jam"] * 100), AutoTokenizer.from_pretrained(language_model)
    frame = sum(len(tokenizer(part)["input_ids"]) for part in (YES_NO_PREFIX, YES_NO_SUFFIX))
    room = len(
        tokenizer(YES_NO_BODY.format(instruction=INSTRUCTION, query="a", document="king moon jam"))["input_ids"]
    )
    teacher = load_teacher(str(language_model), max_length=frame + room, device="cpu")
    scores = teacher.score(["a"], [document])
    assert scores == close([yes_minus_no(language_model, "a", "king moon jam")])
    assert scores == close([yes_minus_no(language_model, "a", document, room=room)])
    assert scores != close([yes_minus_no(language_model, "a", document, room=room + 1)])


def test_longer_of_query_and_document_is_cut_first(language_model):
    tokenizer = AutoTokenizer.from_pretrained(language_model)

    def body(query: str, document: str) -> str:
        return YES_NO_BODY.format(instruction=INSTRUCTION, query=query, document=document)

    frame = sum(len(tokenizer(part)["input_ids"]) for part in (YES_NO_PREFIX, YES_NO_SUFFIX))
    room = len(tokenizer(body("moon moon moon moon", "king lake"))["input_ids"])
    teacher = load_teacher(str(language_model), max_length=frame + room, device="cpu")
    documents = ["king lake", "bread jam", "night moon"]
    scores = teacher.score([" ".join(["moon"] * 180)] * 3, documents)
    assert len(set(scores.tolist())) == 3
    if len(tokenizer("moon")["input_ids"]) == 1:  # else a word is cut in pieces
        assert scores == close([yes_minus_no(language_model, "moon moon moon moon", text) for text in documents])


def test_instruction_replaces_the_default(language_model):
    wanted = [yes_minus_no(language_model, *pair, "find the moon") for pair in zip(QUERIES, DOCUMENTS, strict=True)]
    assert score(language_model, instruction="find the moon") == close(wanted)


def test_language_model_without_yes_and_no_is_refused(tokenizer, tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LM_SIZES)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no single token 'yes'"):
        load_teacher(str(tmp_path))


# ---- Fingerprints and errors ----------------------------------------------------------------------------------------


def test_fingerprint_depends_on_weights_and_settings(make_classifier):
    folder = make_classifier(LABELS)

    def fingerprint(**options) -> str:
        return load_teacher(str(folder), **({"label": "relevant"} | options)).fingerprint

    found = [
        fingerprint(),
        fingerprint(label="perfect"),
        fingerprint(max_length=20),
        fingerprint(batch_size=2),  # of which the last digits depend
    ]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[-1, -1] += 1e-3  # not among a tensor's first values
    model.save_pretrained(folder)
    assert fingerprint() not in found


def test_fingerprint_of_a_bi_encoder(make_bi_encoder):
    folder, model = make_bi_encoder(similarity_fn_name="dot")
    found = [load_teacher(str(folder), similarity=name).fingerprint for name in (None, "dot", "cosine")]
    assert found[0] == found[1] != found[2]
    with torch.no_grad():
        next(model.parameters())[-1, -1] += 1e-3
    model.save_pretrained(str(folder))
    assert load_teacher(str(folder)).fingerprint not in found


def test_teacher_of_another_library_reads_no_token_budget(make_bi_encoder):
    with pytest.raises(ValueError, match="run by sentence-transformers, which needs batch_size"):
        load_teacher(str(make_bi_encoder()[0]), tokens_per_batch=100, device="cpu")


def test_unknown_kind_is_refused(encoder):
    with pytest.raises(ValueError, match="Unknown kind of teacher 'oracle'; choose one of bert_cat, bert_dot,"):
        load_teacher(str(encoder), "oracle")


def test_plain_encoder_needs_a_kind(encoder):
    with pytest.raises(ValueError, match=r"is a bert of class BertModel, which gives no score by .* kind=bert_"):
        load_teacher(str(encoder))


@pytest.mark.parametrize("kind", [None, "bert_cat"])
def test_folder_without_a_model_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_teacher(str(tmp_path), kind)


def test_file_of_word_vectors_is_refused(tmp_path):
    (tmp_path / "glove.txt").write_text("moon 1 2\nbread 3 4\n")
    with pytest.raises(FileNotFoundError, match=r"No teacher '.*glove.txt'"):
        load_teacher(str(tmp_path / "glove.txt"))


def test_ranker_of_another_kind_is_refused(encoder, tokenizer, tmp_path):
    kd.Ranker(kd.load_ranker(encoder, "bert_dot", max_document_length=16), tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BERT_Dot checkpoint, not 'colbert'"):
        load_teacher(str(tmp_path), "colbert")


# ---- Threads --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["classifier", "yes-no", "bi-encoder"])
def teacher_folder(request, tokenizer, tmp_path) -> Path:
    if request.param == "classifier":
        return request.getfixturevalue("make_classifier")(["relevant"])
    if request.param == "bi-encoder":
        return request.getfixturevalue("make_bi_encoder")()[0]
    for part in llama(tokenizer):
        part.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_threads_get_the_scores_of_one_thread(teacher_folder, check_threads):
    teacher = load_teacher(str(teacher_folder), device="cpu", max_length=200)
    documents = [f"{document} {'jam ' * 90} {number}" for number, document in enumerate(DOCUMENTS[:4] * 4)]  # are cut
    check_threads([partial(teacher.score, [query] * 16, documents) for query in QUERIES[:4]])


def test_second_call_waits_until_the_first_has_ended():
    entered, leave, order = threading.Event(), threading.Event(), []

    def score(queries, documents):
        order.append(f"{queries[0]} begins")
        entered.set()
        leave.wait(60)
        order.append(f"{queries[0]} ends")
        return np.zeros(1, np.float32)

    teacher = Teacher("slow", score, "fingerprint")
    calls = [threading.Thread(target=teacher.score, args=([name], ["a"])) for name in ("first", "second")]
    calls[0].start()
    assert entered.wait(60)
    entered.clear()
    calls[1].start()
    assert not entered.wait(0.2)
    leave.set()
    for call in calls:
        call.join(60)
    assert order == ["first begins", "first ends", "second begins", "second ends"]
