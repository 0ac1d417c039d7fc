"""Input that the teacher tools must refuse, or must not change without saying so."""

import datasets
import numpy as np
import pytest
import torch
from test_load import DOCUMENTS, QUERIES, SIZES, close, llama, make_classifier, score, yes_minus_no  # noqa: F401
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import hf_kd_ranking as kd
from hf_kd_ranking.data.rows import TeacherRows, write_teacher_scores
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.models import ARCHITECTURES
from hf_kd_ranking.teachers.load import Teacher, load_teacher

ZEROS = Teacher("zeros", lambda queries, _: np.zeros(len(queries), dtype=np.float32), "f")


def parquet(path, columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def ensemble(tmp_path, *files, **options):
    kd.ensemble_teachers(files, tmp_path / "out.tsv", **options)
    return [tuple(map(float, line.split("\t")[:2])) for line in (tmp_path / "out.tsv").read_text().splitlines()]


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_parquet_scores_must_be_finite_numbers(tmp_path, bad):
    columns = {"pos_score": [bad, 1.0], "neg_score": [1.0, 2.0], "query_id": [1, 1]}
    columns |= {"pos_id": [5, 8], "neg_id": [6, 7]}
    with pytest.raises(ValueError, match=r"n\.parquet row 0: pos_score"):
        ensemble(tmp_path, parquet(tmp_path / "n.parquet", columns))


def test_small_scores_survive_jsonl(tmp_path):
    scores = [[1e-12, 0.000123456789]]
    rows = datasets.Dataset.from_dict({"query_id": [7], "doc_ids": [[1, 2]], "teacher_scores": scores})
    write_teacher_scores(TeacherRows(rows), tmp_path / "l.jsonl")
    assert kd.load_teacher_scores(tmp_path / "l.jsonl")[0]["teacher_scores"] == [
        float(np.float32(value)) for value in (1e-12, 0.000123456789)
    ]


def test_padded_prompt_has_the_positions_of_an_unpadded_one(tokenizer, tmp_path):
    torch.manual_seed(0)
    words = llama(tokenizer)[0]
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=512, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    wanted = [yes_minus_no(tmp_path, *pair) for pair in zip(QUERIES, DOCUMENTS, strict=True)]
    assert score(tmp_path, kind="yes-no", batch_size=4) == close(wanted)


def test_fingerprint_changes_with_the_dtype(make_classifier):  # noqa: F811
    folder = make_classifier(["L"])
    BertForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = {load_teacher(str(folder), dtype=dtype).fingerprint for dtype in (torch.float32, torch.bfloat16)}
    assert len(found) == 2


def test_missing_folder_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_teacher(str(tmp_path / "none"))


def test_length_without_room_for_the_prompt_is_refused(tokenizer, tmp_path):
    for part in llama(tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_length"):
        score(tmp_path, max_length=20)


def test_file_of_blank_lines_holds_no_rows(tmp_path):
    for name in ("s.tsv", "c.tsv"):
        (tmp_path / name).write_text("0\ta\n" if name == "c.tsv" else "\n\n")
    store = kd.TextStore.from_file(tmp_path / "c.tsv")
    for run in (
        lambda: kd.ensemble_teachers([tmp_path / "s.tsv"], tmp_path / "out.tsv"),
        lambda: kd.score_teacher(ZEROS, tmp_path / "s.tsv", store, store, tmp_path / "out.tsv"),
        lambda: kd.expand_ids(tmp_path / "s.tsv", store, store, tmp_path / "out.tsv"),
    ):
        with pytest.raises(ValueError, match=r"s\.tsv holds no rows"):
            run()


@pytest.mark.parametrize("options", [{"weights": [float("nan")]}, {"weights": [float("inf")]}])
def test_weights_that_are_not_finite_are_refused(tmp_path, options):
    (tmp_path / "a.tsv").write_text("1\t2\tq\ta\tb\n")
    with pytest.raises(ValueError, match="weight"):
        ensemble(tmp_path, tmp_path / "a.tsv", **options)


def test_no_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="file"):
        ensemble(tmp_path)


EMPTY = datasets.Dataset.from_dict({"query_id": [], "pos_id": [], "neg_id": []})


@pytest.mark.parametrize("source", [kd.Run(), EMPTY])
def test_nothing_to_score_is_refused(tmp_path, source):
    (tmp_path / "c.tsv").write_text("0\ta\n")
    store = kd.TextStore.from_file(tmp_path / "c.tsv")
    with pytest.raises(ValueError):
        kd.score_teacher(ZEROS, source, store, store, tmp_path / "out.tsv")


def test_unknown_id_of_a_run_file_is_named_with_file(tmp_path):
    (tmp_path / "c.tsv").write_text("a\tx\nb\ty\n")
    (tmp_path / "r.trec").write_text("a Q0 b 1 1.0 t\na Q0 zz 2 0.5 t\n")
    store = kd.TextStore.from_file(tmp_path / "c.tsv")
    with pytest.raises(KeyError, match=r"r\.trec"):
        kd.score_teacher(ZEROS, tmp_path / "r.trec", store, store, tmp_path / "out.trec")


def test_written_margins_are_still_marked(tmp_path):
    margins = {"query_id": [1], "positive_id": [5], "negative_id": [6], "score": [3.0]}
    write_teacher_scores(kd.load_teacher_scores(datasets.Dataset.from_dict(margins)), tmp_path / "m.parquet")
    assert kd.load_teacher_scores(tmp_path / "m.parquet").has_only_margins


def test_expand_refuses_an_unknown_on_missing(tmp_path):
    (tmp_path / "c.tsv").write_text("0\ta\n")
    (tmp_path / "s.tsv").write_text("1\t2\t0\t0\t0\n")
    store = kd.TextStore.from_file(tmp_path / "c.tsv")
    with pytest.raises(ValueError, match="on_missing"):
        kd.expand_ids(tmp_path / "s.tsv", store, store, tmp_path / "out.tsv", on_missing="drop")


# ---- A checkpoint opened as something else has no scores ------------------------------------------------------------


@pytest.fixture
def plain_encoder(tokenizer, tmp_path):
    """An encoder with positions for texts of the default lengths, and layers to split."""
    config = BertConfig(vocab_size=len(tokenizer), **SIZES | {"num_hidden_layers": 4})
    BertModel(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return str(tmp_path / "plain")


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "classifier"])
def test_untrained_layers_on_an_encoder_are_no_teacher(plain_encoder, kind):
    if kind == "bert_dot":  # without layers of its own
        np.testing.assert_array_equal(score(plain_encoder, kind=kind), score(plain_encoder, kind=kind))
        return
    with pytest.raises(InputError, match=r"would score at random|its scores would be random"):
        load_teacher(plain_encoder, kind)


def test_classifier_named_bert_cat_has_its_own_scores(make_classifier):  # noqa: F811
    folder = make_classifier(["LABEL_0"])
    assert score(folder, kind="bert_cat") == close(score(folder))


@pytest.mark.parametrize("kind", ["bert_dot", "colbert", "prettr", "tk", "yes-no", "bi-encoder", "multi-vector"])
def test_classifier_is_not_opened_as_something_else(make_classifier, kind):  # noqa: F811
    with pytest.raises(InputError, match=f"is a classifier, not a {kind}; leave the kind out"):
        load_teacher(str(make_classifier(["LABEL_0"])), kind)


@pytest.mark.parametrize("change", [{"num_labels": 3}, {"hidden_size": 8}, {"num_hidden_layers": 3}])
def test_classifier_with_other_weights_than_its_config_is_refused(make_classifier, change):  # noqa: F811
    folder = make_classifier(["LABEL_0"])
    BertConfig.from_pretrained(folder, **change).save_pretrained(folder)
    with pytest.raises(InputError, match="does not hold all weights of a BertForSequenceClassification: missing"):
        load_teacher(str(folder), label="LABEL_1")


def test_language_model_without_its_last_layer_is_refused(tokenizer, tmp_path):
    words, model = llama(tokenizer)
    model.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"does not hold all weights of a LlamaForCausalLM: missing lm_head\.weight"):
        load_teacher(str(tmp_path), "yes-no")


def test_language_model_with_a_template_of_its_own_is_refused(tokenizer, tmp_path):
    for part in llama(tokenizer):
        part.save_pretrained(tmp_path)
    words = llama(tokenizer)[0]
    words.chat_template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
    words.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a chat template of its own"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("teacher score --kind bert_cat", "a bert_cat built on it would score at random"),
        ("rerank --architecture bert_cat", "is not a bert_cat ranker, and a new one on its encoder must be trained"),
    ],
)
def test_commands_refuse_untrained_layers(verb, message, plain_encoder, toy, tmp_path, call):
    files = f"--queries {toy}/queries.tsv --collection {toy}/collection.tsv --candidates {toy}/candidates.trec"
    status, _, errors = call(f"{verb} --model {plain_encoder} {files} --output {tmp_path}/out.trec")
    assert status == 2
    assert message in errors
    assert not (tmp_path / "out.trec").exists()


# ---- Half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classifier", "yes-no"])
def test_teacher_in_half_precision_has_few_ties(kind, make_classifier, tokenizer, tmp_path):  # noqa: F811
    folder = tmp_path
    if kind == "classifier":
        folder = make_classifier(["LABEL_0"])
    else:
        for part in llama(tokenizer):
            part.save_pretrained(folder)
    documents = [" ".join(f"{row:012b}".replace("0", "a ").replace("1", "jam ").split()) for row in range(1000)]
    teacher = load_teacher(str(folder), dtype=torch.bfloat16, device="cpu", batch_size=100)
    assert len(set(teacher.score(["moon"] * 1000, documents).tolist())) > 900
