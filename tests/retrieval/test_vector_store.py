"""The encoded collection: the ranker's vectors come back, whatever the ids; other models and damage are refused."""

import json
import shutil

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.retrieval import encode
from hf_kd_ranking.retrieval.encode import pack
from hf_kd_ranking.retrieval.vector_store import VectorStore

STORING = ("bert_dot", "bert_dot-mean-compressed", "colbert", "prettr", "prettr-compressed", "tk")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts_of(documents):
    """id -> text, an id that stands twice once."""
    return dict(documents.items())


@pytest.mark.parametrize("model", STORING, indirect=True)
def test_stored_vectors_are_the_rankers(ranker, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "DOCUMENTS_PER_BLOCK", 9)
    store = VectorStore.build(ranker, documents, tmp_path / "store")
    texts = texts_of(documents)
    assert list(store.ids()) == list(texts)
    found, wanted = store.take(np.arange(len(store))), ranker.encode_documents(list(texts.values()))
    assert len(found) == len(store) == 41
    assert store.has_token_vectors is isinstance(wanted, list)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert store.rows_of(["文書 same as 5", "d ü 7", "d ü 99"]).tolist() == [40, 7, -1]
    again = VectorStore.open(tmp_path / "store", ranker)
    pieces = [(start, stop, len(vectors)) for start, stop, vectors in again.chunks(20)]
    assert [start for start, _, _ in pieces] == [0, *(stop for _, stop, _ in pieces[:-1])]
    assert np.array_equal(np.concatenate([vectors for *_, vectors in again.chunks(20)]), again.values)
    assert not (tmp_path / "store.parts").exists()


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 0.5 / 127)])
def test_smaller_storages_lose_no_more_than_their_rounding(ranker, documents, tmp_path, storage, error):
    whole = VectorStore.build(ranker, documents, tmp_path / "whole")
    small = VectorStore.build(ranker, documents, tmp_path / "small", storage)
    wanted, found = (np.concatenate(store.take(np.arange(41))) for store in (whole, small))
    assert (np.abs(found - wanted) <= error * np.abs(wanted).max(1, keepdims=True) + 1e-6).all()
    assert not np.array_equal(found, wanted)
    assert small.bytes_per_document < whole.bytes_per_document


def test_int8_matches_hand_computed_values():
    values, scales = pack(np.array([[2.54, -1.27, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32), "int8")
    assert values.tolist() == [[127, -64, 0], [0, 0, 0]]  # -63.5 rounds to the even number
    assert scales.tolist() == pytest.approx([0.02, 0.0])


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="not finite in float16; store float32"):
        pack(np.array([[1e6, 0.0]], dtype=np.float32), "float16")


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_residual_codes_stay_near_the_vectors_and_take_fewer_bytes(ranker, documents, tmp_path):
    whole = VectorStore.build(ranker, documents, tmp_path / "whole")
    small = whole.compress(tmp_path / "small", "IVF4,SQ8")
    wanted, found = (np.concatenate(store.take(np.arange(41))) for store in (whole, small))
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert small.values.shape == (len(whole.values), 7)  # a byte of 4 centroids, and one for each of 6 values
    assert list(small.ids()) == list(whole.ids())
    with pytest.raises(ValueError, match=r"faiss cannot build 'IVF4,XX' over \d+ vectors"):
        whole.compress(tmp_path / "other", "IVF4,XX")


# ---- Interruptions and versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot", "tk"], indirect=True)
@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_an_interrupted_encoding_goes_on_and_ends_with_the_same_bytes(
    ranker, documents, tmp_path, monkeypatch, stop_at
):
    monkeypatch.setattr(encode, "DOCUMENTS_PER_BLOCK", 9)
    VectorStore.build(ranker, documents, tmp_path / "whole", "int8")
    real, calls = encode._encode_block, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(encode, "_encode_block", stop)
    with pytest.raises(KeyboardInterrupt):
        VectorStore.build(ranker, documents, tmp_path / "stopped", "int8")
    with pytest.raises(FileNotFoundError, match=r"index\.json does not exist"):
        VectorStore.open(tmp_path / "stopped")
    VectorStore.build(ranker, documents, tmp_path / "stopped", "int8")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert len(calls) == 6  # five blocks, and the one that was stopped


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_unfinished_work_of_other_inputs_is_refused(ranker, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_encode_block", lambda *_: {}["stop"])
    with pytest.raises(KeyError):
        VectorStore.build(ranker, documents, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store.parts holds the unfinished work of another storage; finish that"):
        VectorStore.build(ranker, documents, tmp_path / "store", "float16")


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_new_version_takes_the_old_ones_place_only_when_it_is_complete(ranker, documents, tmp_path, monkeypatch):
    old = VectorStore.build(ranker, documents, tmp_path / "store")
    with pytest.raises(FileExistsError, match="store holds other vectors; give another output"):
        VectorStore.build(ranker, documents, tmp_path / "store", "float16")
    assert VectorStore.build(ranker, documents, tmp_path / "store").facts == old.facts  # the same once more
    before, wanted = files(tmp_path / "store"), old.take(np.arange(41))
    with monkeypatch.context() as patch:
        patch.setattr("hf_kd_ranking.data.ids.IdIndex.save_ids", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            VectorStore.build(ranker, documents, tmp_path / "store", "float16", overwrite=True)
    assert files(tmp_path / "store") == before
    new = VectorStore.build(ranker, documents, tmp_path / "store", "float16", overwrite=True)
    assert (new.facts["version"], new.values.dtype) == (2, np.float16)
    assert np.array_equal(old.take(np.arange(41)), wanted)  # a reader keeps what it has open
    assert [path.name for path in (tmp_path / "store").glob("v*")] == ["v2"]


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_a_store_of_another_model_is_refused(ranker, documents, tmp_path, encoder):
    VectorStore.build(ranker, documents, tmp_path / "store")

    def reopened(**overrides):
        model = kd.load_ranker(tmp_path / "model", **overrides)
        return VectorStore.open(tmp_path / "store", kd.Ranker(model, ranker.tokenizer))

    ranker.save_pretrained(tmp_path / "model")
    assert len(reopened(max_query_length=9)) == 41  # of the other side
    for overrides, message in [
        ({"pooling": "mean"}, "another model: model "),
        ({"max_document_length": 9}, "another model: model "),
        ({"dtype": torch.bfloat16}, "another model: model dtype float32 there, bfloat16 here"),
    ]:
        with pytest.raises(ValueError, match=message):
            reopened(**overrides)
    other = kd.ColBERT.from_encoder(encoder, max_document_length=16, max_query_length=8)
    with pytest.raises(ValueError, match="another model: architecture BERT_Dot there, ColBERT here"):
        VectorStore.open(tmp_path / "store", kd.Ranker(other, ranker.tokenizer))
    with torch.no_grad():
        next(ranker.model.parameters())[-1, -1] += 1e-6
    with pytest.raises(ValueError, match="another model: model "):
        VectorStore.open(tmp_path / "store", ranker)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_a_damaged_or_truncated_file_is_refused_by_its_name(ranker, documents, tmp_path, damage):
    VectorStore.build(ranker, documents, tmp_path / "whole", "int8")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*")]
    assert len(names) == 8
    for name in names:
        for message in ("is damaged", "truncated|is damaged", "does not exist"):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "bad")
            path = tmp_path / "bad" / name
            if message == "is damaged":
                damage(path)
            elif message == "does not exist":
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:-1])
            with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*({message})"):
                VectorStore.open(tmp_path / "bad")


@pytest.mark.parametrize("model", ["bert_cat", "prettr-query_length"], indirect=True)
def test_rankers_whose_documents_need_their_query_are_refused_before_anything_is_written(ranker, documents, tmp_path):
    with pytest.raises(ValueError, match=r"as one sequence|cannot be encoded without"):
        VectorStore.build(ranker, documents, tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_an_unknown_storage_and_another_kind_of_index_are_refused(ranker, documents, tmp_path):
    with pytest.raises(ValueError, match="stored as one of float32, float16, int8, got 'int4'"):
        VectorStore.build(ranker, documents, tmp_path / "store", "int4")
    kd.DenseIndex.build(ranker, VectorStore.build(ranker, documents, tmp_path / "store")).save(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense is an index of kind dense, needed vectors"):
        VectorStore.open(tmp_path / "dense")
    assert json.loads((tmp_path / "store" / "index.json").read_text())["architecture"] == "BERT_Dot"
