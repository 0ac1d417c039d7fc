"""The encoded collection returns the ranker's vectors for any ids; other models and damage are refused."""

import shutil

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import read_description
from hf_kd_ranking.retrieval import vector_store
from hf_kd_ranking.retrieval.vector_store import pack

STORING = ("bert_dot", "bert_dot-mean-compressed", "colbert", "prettr", "prettr-compressed", "tk", "tkl")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("model", STORING, indirect=True)
def test_store_returns_the_vectors_of_the_ranker(ranker, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_store, "DOCUMENTS_PER_BLOCK", 9)
    store = kd.VectorStore.build(ranker, documents, tmp_path / "store")
    texts = dict(documents.items())
    assert list(store.ids()) == list(texts)
    found, wanted = store.take(np.arange(len(store))), ranker.encode_documents(list(texts.values()))
    assert len(found) == len(store) == 41
    assert store.has_token_vectors is isinstance(wanted, list)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert store.rows_of(["文書 same as 5", "d ü 7", "d ü 99"]).tolist() == [40, 7, -1]
    again = kd.VectorStore.open(tmp_path / "store", ranker)
    lengths = [len(vectors) for vectors in wanted] if store.has_token_vectors else [1] * 41
    for start, counts, vectors in again.chunks(20):
        assert counts.tolist() == lengths[start : start + len(counts)]
        assert len(vectors) == counts.sum()
    assert np.array_equal(np.concatenate([vectors for *_, vectors in again.chunks(20)]), again.values)
    assert not (tmp_path / "store.parts").exists()


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 0.5 / 127)])
def test_store_storages_lose_only_their_rounding(ranker, documents, tmp_path, storage, error):
    whole = kd.VectorStore.build(ranker, documents, tmp_path / "whole")
    small = kd.VectorStore.build(ranker, documents, tmp_path / "small", storage)
    wanted, found = (np.concatenate(store.take(np.arange(41))) for store in (whole, small))
    assert (np.abs(found - wanted) <= error * np.abs(wanted).max(1, keepdims=True) + 1e-6).all()
    assert not np.array_equal(found, wanted)
    assert small.bytes_per_document < whole.bytes_per_document


def test_pack_int8_matches_hand_computed_values():
    values, scales = pack(np.array([[2.54, -1.27, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32), "int8")
    assert values.tolist() == [[127, -64, 0], [0, 0, 0]]  # -63.5 rounds to the even number
    assert scales.tolist() == pytest.approx([0.02, 0.0])


def test_pack_refuses_what_float16_cannot_hold():
    with pytest.raises(ValueError, match="not finite in float16; store float32"):
        pack(np.array([[1e6, 0.0]], dtype=np.float32), "float16")


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_store_compress_stays_near_the_vectors(ranker, documents, tmp_path):
    whole = kd.VectorStore.build(ranker, documents, tmp_path / "whole")
    small = whole.compress(tmp_path / "small", "IVF4,SQ8")
    wanted, found = (np.concatenate(store.take(np.arange(41))) for store in (whole, small))
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert small.values.shape == (len(whole.values), 7)  # a byte of 4 centroids, and one for each of 6 values
    assert list(small.ids()) == list(whole.ids())
    with pytest.raises(ValueError, match=r"faiss cannot build 'IVF4,XX' over \d+ vectors"):
        whole.compress(tmp_path / "other", "IVF4,XX")
    with pytest.raises(FileExistsError, match="small exists"):
        whole.compress(tmp_path / "small", "IVF4,SQ8")


# ---- Interruptions and versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot", "tk"], indirect=True)
def test_store_resumes_wherever_it_was_stopped(ranker, documents, tmp_path, monkeypatch, stop_at_write):
    """Stopped at each write: the description of the work, five blocks, and the description of the store."""
    monkeypatch.setattr(vector_store, "DOCUMENTS_PER_BLOCK", 9)
    names = stop_at_write(0)
    kd.VectorStore.build(ranker, documents, tmp_path / "whole", "int8")
    wanted, blocks = files(tmp_path / "whole"), [f"block-{number:06d}.npz" for number in range(5)]
    assert names == ["artifact.json", *blocks, "artifact.json"]
    for stop_at in range(1, 8):
        folder = tmp_path / f"stopped{stop_at}"
        stop_at_write(stop_at)
        with pytest.raises(KeyboardInterrupt):
            kd.VectorStore.build(ranker, documents, folder, "int8")
        with pytest.raises(FileNotFoundError, match=r"artifact\.json does not exist"):
            kd.VectorStore.open(folder)
        names = stop_at_write(0)
        kd.VectorStore.build(ranker, documents, folder, "int8")
        assert names == [["artifact.json"], []][stop_at > 1] + blocks[max(stop_at - 2, 0) :] + ["artifact.json"]
        assert files(folder) == wanted
        assert not folder.with_name(f"{folder.name}.parts").exists()


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_store_refuses_unfinished_work_of_other_inputs(ranker, documents, tmp_path, stop_at_write):
    stop_at_write(2)
    with pytest.raises(KeyboardInterrupt):
        kd.VectorStore.build(ranker, documents, tmp_path / "store")
    with pytest.raises(ValueError, match=r"store.parts holds the unfinished work of another storage; finish that"):
        kd.VectorStore.build(ranker, documents, tmp_path / "store", "float16")


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_store_keeps_the_old_version_until_the_new_is_complete(ranker, documents, tmp_path, stop_at_write):
    old = kd.VectorStore.build(ranker, documents, tmp_path / "store")
    with pytest.raises(FileExistsError, match="store exists; give a new folder, or --overwrite"):
        kd.VectorStore.build(ranker, documents, tmp_path / "store", "float16")
    names = stop_at_write(3)
    assert kd.VectorStore.build(ranker, documents, tmp_path / "store").description == old.description
    assert names == []  # the same call opens what is complete
    before, wanted = files(tmp_path / "store"), old.take(np.arange(41))
    with pytest.raises(KeyboardInterrupt):  # at the description of the new version
        kd.VectorStore.build(ranker, documents, tmp_path / "store", "float16", overwrite=True)
    assert (names[-1], files(tmp_path / "store")) == ("artifact.json", before)
    stop_at_write(0)
    new = kd.VectorStore.build(ranker, documents, tmp_path / "store", "float16", overwrite=True)
    assert (new.description["version"], new.values.dtype, new.ranker) == (2, np.float16, ranker)
    assert np.array_equal(old.take(np.arange(41)), wanted)  # a reader keeps what it has opened
    assert [path.name for path in (tmp_path / "store").glob("v*")] == ["v2"]


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_store_refuses_another_model(ranker, documents, tmp_path, encoder):
    kd.VectorStore.build(ranker, documents, tmp_path / "store")

    def reopened(**overrides):
        model = kd.load_ranker(tmp_path / "model", **overrides)
        return kd.VectorStore.open(tmp_path / "store", kd.Ranker(model, ranker.tokenizer))

    ranker.save_pretrained(tmp_path / "model")
    assert len(reopened(max_query_length=9)) == 41  # changes no document
    for overrides, message in [
        ({"pooling": "mean"}, "another model: model "),
        ({"max_document_length": 9}, "another model: model "),
        ({"dtype": torch.bfloat16}, "another model: model dtype float32 there, bfloat16 here"),
    ]:
        with pytest.raises(ValueError, match=message):
            reopened(**overrides)
    other = kd.ColBERT.from_encoder(encoder, max_document_length=16, max_query_length=8)
    with pytest.raises(ValueError, match="another model: architecture BERT_Dot there, ColBERT here"):
        kd.VectorStore.open(tmp_path / "store", kd.Ranker(other, ranker.tokenizer))
    with torch.no_grad():
        next(ranker.model.parameters())[-1, -1] += 1e-6
    with pytest.raises(ValueError, match="another model: model "):
        kd.VectorStore.open(tmp_path / "store", ranker)


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_store_names_a_damaged_or_truncated_file(ranker, documents, tmp_path, damage):
    kd.VectorStore.build(ranker, documents, tmp_path / "whole", "int8")
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
                kd.VectorStore.open(tmp_path / "bad")


@pytest.mark.parametrize("model", ["bert_cat", "prettr-query_length"], indirect=True)
def test_store_refuses_rankers_whose_documents_need_the_query(ranker, documents, tmp_path):
    with pytest.raises(ValueError, match=r"as one sequence|cannot be encoded without"):
        kd.VectorStore.build(ranker, documents, tmp_path / "store")
    assert not list(tmp_path.glob("store*"))


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_store_refuses_unknown_storages_and_other_kinds(ranker, documents, tmp_path):
    with pytest.raises(ValueError, match="stored as one of float32, float16, int8, got 'int4'"):
        kd.VectorStore.build(ranker, documents, tmp_path / "store", "int4")
    kd.DenseIndex.build(kd.VectorStore.build(ranker, documents, tmp_path / "store"), tmp_path / "dense")
    with pytest.raises(ValueError, match="dense is an index of kind dense, needed vectors"):
        kd.VectorStore.open(tmp_path / "dense")
    assert read_description(tmp_path / "store")["architecture"] == "BERT_Dot"
