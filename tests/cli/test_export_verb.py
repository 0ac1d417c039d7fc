"""`export` as the command line calls it."""

import json

import pytest
from sentence_transformers import SentenceTransformer

import hf_kd_ranking as kd


@pytest.fixture
def folder(encoder, tokenizer, tmp_path):
    """A saved BERT_DOT."""
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "ranker")
    return tmp_path / "ranker"


def test_export_prints_the_largest_difference(call, folder, tmp_path):
    status, out, err = call(f"export --model {folder} --to sentence-transformer --output {tmp_path}/out --json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result.pop("largest_difference") < 1e-4
    expected = {"output": f"{tmp_path}/out", "format": "sentence-transformer", "architecture": "BERT_Dot"}
    assert result == expected
    assert SentenceTransformer(f"{tmp_path}/out", device="cpu").similarity_fn_name == "dot"


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (
            "pylate",
            "The format pylate cannot give the scores of this BERT_Dot. model_type=BERT_Dot: this layout is for",
        ),
        ("tf", "Unknown format 'tf'; choose one of cross-encoder, sentence-transformer, multi-vector, "),
    ],
)
def test_export_refuses_bad_input_in_one_line(call, folder, tmp_path, to, message):
    status, _, err = call(f"export --model {folder} --to {to} --output {tmp_path}/out")
    assert status == 2
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
