"""Publishing with the real client to a stand-in for the Hub: one commit, complete, and without any token."""

import json
import shutil
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers.trainer_utils import HubStrategy

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import file_digest as digest
from hf_kd_ranking.hub.manifest import _public_command, read_manifest
from hf_kd_ranking.hub.publish import PART_SUFFIXES, SUFFIXES, publish
from hf_kd_ranking.searcher import CHECKPOINT_FILES, Pipeline, save_pipeline

TOKEN = "hf_" + "a1B2" * 8  # the stand-in's
CODE = {"base.py", "bert_dot.py", "encoder.py", "errors.py", "padding.py", "parts.py", "scoring.py"}


def make_job(toy: Path, encoder: Path, output: Path) -> tuple[kd.TrainingJob, kd.RankingTrainingArguments]:
    job = kd.TrainingJob(str(encoder), "bert_dot", max_query_length=8, max_document_length=16)
    job.teacher_scores, job.collection, job.queries = (
        str(toy / name) for name in ("scores.tsv", "collection.tsv", "queries.tsv")
    )
    job.candidates, job.qrels = str(toy / "candidates.trec"), str(toy / "qrels.txt")
    settings = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return job, kd.RankingTrainingArguments(str(output), data_name="me/toy", teacher_name="dice", **settings)


@pytest.fixture(scope="module")
def trained(toy, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    job, args = make_job(toy, encoder, folder / "ranker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        kd.train_ranker(job, args)
    return Path(args.output_dir)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "ranker")


def test_publish_sends_what_others_need_in_one_commit(hub, folder, tmp_path):
    plan = publish(folder, "me/ranker", private=True)
    files = hub.files("me/ranker")
    assert hub.repositories["me/ranker"]["private"] is True
    assert plan["address"] == f"{hub.address}/me/ranker/commit/{'2' * 40}"
    assert plan["files"] == {name: len(content) for name, content in files.items()}
    expected = {"README.md", "config.json", "model.safetensors", "manifest.json", "results.json", "trainer_state.json"}
    expected |= {"runs/held_out.trec", ".eval_results/ranking.yaml", "tokenizer.json", "tokenizer_config.json"}
    assert files.keys() == expected | CODE  # no checkpoint-1, no training_args.bin
    assert 'from_pretrained("me/ranker")' in files["README.md"].decode()
    for name, content in files.items():
        copy = tmp_path / "there" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    here, there = (kd.Ranker.from_pretrained(path).score("a b", ["a c", "d"]) for path in (folder, tmp_path / "there"))
    assert here.tolist() == there.tolist()


def test_dry_run_lists_files_and_changes_nothing(hub, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    efficiency = {
        "environment": {"threads": 1, "torch": "2"},
        "protocol": {"candidates": 9, "stored": "nothing"},
        "costs": {"device": "cpu", "dtype": "float32", "total_ms": {"p50": 1.0, "p95": 2.0}, "parameters": 7}
        | {"model_bytes": 28, "bytes_per_passage": None, "peak_process_mb": 3},
    }
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        plan = publish(folder, "me/ranker", is_dry_run=True, efficiency=efficiency)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert plan["address"] is None and hub.repositories == {}
    assert plan["bytes"] == sum(plan["files"].values()) > plan["files"]["model.safetensors"]
    published = publish(folder, "me/ranker", efficiency=efficiency)
    assert published["files"] == plan["files"]
    assert plan["files"] == {name: len(content) for name, content in hub.files("me/ranker").items()}


def test_publish_sends_large_files_once_after_an_interruption(hub, folder):
    hub.status["/commit/"] = 400
    with pytest.raises(OSError, match="the Hub answered 400"):
        publish(folder, "me/ranker")
    del hub.status["/commit/"]
    publish(folder, "me/ranker", overwrite=True)
    assert len(hub.uploads) == 1
    assert hub.files("me/ranker")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_publish_keeps_a_repository_that_exists(hub, folder):
    publish(folder, "me/ranker")
    with pytest.raises(FileExistsError, match=r"me/ranker exists on the Hub.*--overwrite"):
        publish(folder, "me/ranker")
    publish(folder, "me/ranker", overwrite=True)
    assert len(hub.repositories["me/ranker"]["commits"]) == 2


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "does not know the token"), (403, "may not write there"), (500, "the Hub answered 500")],
)
def test_refusal_is_one_line_without_the_token(hub, folder, status, words):
    hub.status["/api/repos/create"] = status
    with pytest.raises(OSError, match=f"^Publishing me/ranker: .*{words}") as caught:
        publish(folder, "me/ranker")
    assert TOKEN not in "".join(traceback.format_exception(caught.value, limit=None))
    assert "\n" not in str(caught.value)


def test_missing_token_network_and_offline_have_own_messages(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match="hf auth login"):
        publish(folder, "me/ranker")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    with pytest.raises(OSError, match="no connection to the Hub"):
        publish(folder, "me/ranker")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE switches off"):
        publish(folder, "me/ranker")


def plain_encoder(folder: Path, encoder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((encoder / name).read_bytes())


def other_weights(folder: Path, encoder: Path) -> None:
    kd.BertDot.from_encoder(
        encoder, max_query_length=8, max_document_length=16, pooling="mean", layers=[0]
    ).save_pretrained(folder)


WRONG = {
    "no checkpoint": (lambda folder, _: (folder / "model.safetensors").unlink(), "is not a checkpoint"),
    "a plain encoder": (plain_encoder, "contains a bert, not a ranker"),
    "results of other weights": (other_weights, r"measured with other weights .*model.safetensors"),
    "a token": (
        lambda folder, _: (folder / "notes.txt").write_text(f"x {TOKEN}"),
        "contains an access token",
    ),
}


@pytest.mark.parametrize(("damage", "words"), WRONG.values(), ids=WRONG.keys())
def test_publish_refuses_bad_folders_before_contacting_the_hub(hub, folder, encoder, damage, words):
    damage(folder, encoder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        publish(folder, "me/ranker")
    assert hub.repositories == {}


def test_publish_refuses_the_own_token_in_any_form(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-9")
    (folder / "notes.txt").write_text("x secret-9 y")
    with pytest.raises(ValueError, match=r"notes\.txt contains an access token"):
        publish(folder, "me/ranker", is_dry_run=True)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "no model card"),
        ("# Ranker\n", "no metadata"),
        ("---\nlicense: mit\n---\n\nTODO\n", "line 5 has 'TODO'"),
    ],
)
def test_publish_refuses_an_incomplete_card(folder, card, words):
    (folder / "manifest.json").unlink()
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        publish(folder, "me/ranker", is_dry_run=True)


@pytest.mark.parametrize("name", ["ranker", "a/b/c", "me/ran ker", "me/../x"])
def test_publish_refuses_an_invalid_name(folder, name):
    with pytest.raises(ValueError, match="name"):
        publish(folder, name)


def test_manifest_ties_results_to_data_and_weights(folder, toy):
    manifest = read_manifest(folder)
    assert manifest["weights"] == {"model.safetensors": digest(folder / "model.safetensors")}
    assert manifest["files"]["teacher_scores"] == {"name": "scores.tsv", "sha256": digest(toy / "scores.tsv")}
    assert manifest["versions"].keys() >= {"torch", "transformers", "python"}
    saved = json.loads((folder / "results.json").read_text())
    assert manifest["results"]["after"] == {
        "RR@10": saved["after"]["eval_RR@10"],
        "nDCG@10": saved["after"]["eval_nDCG@10"],
    }
    run, qrels = kd.read_run(folder / "runs" / "held_out.trec"), kd.read_qrels(toy / "qrels.txt")
    assert kd.evaluate_run(run, qrels, ("RR@10",))["RR@10"] == pytest.approx(saved["after"]["eval_RR@10"])
    assert str(toy) not in json.dumps(manifest)


def test_public_command_has_no_tokens_and_local_folders():
    parts = ["/home/me/train.py", "--hub_token", "secret", "--hub_token=secret", f"--x={TOKEN}", "--lr", "1e-5"]
    assert _public_command(["/x/hf_kd_ranking/__main__.py", "demo"]) == ["hf_kd_ranking", "demo"]
    assert _public_command(parts) == ["train.py", "--hub_token", "***", "--hub_token=***", "--x=***", "--lr", "1e-5"]
    assert _public_command(["--hub-token", "secret", "--hub-token=secret"]) == [
        "--hub-token",
        "***",
        "--hub-token=***",
    ]


def test_trainer_publishes_at_the_end(hub, toy, encoder, tmp_path, private_cache):
    job, args = make_job(toy, encoder, tmp_path / "out")
    args.push_to_hub, args.hub_model_id, args.hub_strategy = True, "me/ranker", HubStrategy.END
    kd.train_ranker(job, args)
    files = hub.files("me/ranker")
    assert files["model.safetensors"] == Path(args.output_dir, "model.safetensors").read_bytes()
    assert "dice" in files["README.md"].decode() and "| first stage |" in files["README.md"].decode()


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_options_of_the_trainers_push_work_or_are_refused(hub, model, make_trainer):
    trainer = make_trainer(model, hub_model_id="me/own", hub_private_repo=True)
    for options in ({"revision": "draft"}, {"blocking": False}, {"tags": ["x"]}, {"license": "mit"}):
        with pytest.raises(ValueError, match=r"on the main branch, in the fore|card is written from manifest\.json"):
            trainer.push_to_hub(**options)
    assert hub.repositories == {}
    trainer.push_to_hub(commit_message="First try")
    assert hub.messages == ["First try"] and hub.repositories["me/own"]["private"]
    assert {"model.safetensors", "README.md"} <= hub.files("me/own").keys()


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_model_publishes_itself_with_its_code(hub, model):
    model.push_to_hub("me/model")
    files = hub.files("me/model")
    assert {"config.json", "model.safetensors", "base.py"} <= files.keys()


# ---- Pipelines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(trained, toy, tmp_path) -> Path:
    """A pipeline with every kind of part."""
    ranker, documents = kd.Ranker.from_pretrained(trained), kd.TextStore.from_tsv(toy / "collection.tsv")
    store = kd.VectorStore.build(ranker, documents, tmp_path / "store")
    index = kd.DenseIndex.build(store, factory="HNSW4")
    parts = Pipeline(documents, kd.BM25Index.build(documents), ranker, 5, 0.3, store, index)
    save_pipeline(tmp_path / "best", parts, trained)
    return tmp_path / "best"


def test_published_pipeline_loads_from_a_copy_of_the_repository(hub, pipeline, tmp_path):
    before = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    plan = publish(pipeline, "me/best", is_dry_run=True)
    assert (plan["address"], hub.repositories) == (None, {})
    published = publish(pipeline, "me/best", private=True)
    assert {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()} == before
    files = hub.files("me/best")
    assert plan["files"] == published["files"] == {name: len(content) for name, content in files.items()}
    local = {path.relative_to(pipeline).as_posix() for path in before}
    assert files.keys() == local | {"README.md", ".eval_results/ranking.yaml"}
    assert {"documents/texts.bin", "vectors/v1/vectors.npy", "vectors/dense/v1/dense.faiss"} <= files.keys()
    for name, content in files.items():
        copy = tmp_path / "there" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    found = kd.load_pipeline(tmp_path / "there").search("apple bread")
    assert found == kd.load_pipeline(pipeline).search("apple bread") != []


def test_card_of_a_pipeline_is_the_rankers_with_how_to_load_all(hub, pipeline):
    publish(pipeline, "me/best")
    card = hub.files("me/best")["README.md"].decode()
    assert 'kd.load_pipeline(snapshot_download("me/best"))' in card and "Ranker.from_pretrained" not in card
    assert "(search, depth 5, weight of BM25's scores 0.3)" in card
    assert [line for line in card.splitlines() if line.startswith("## ")][:2] == ["## Use", "## Results"]
    (pipeline / "ranker" / "manifest.json").unlink()
    (pipeline / "ranker" / "README.md").write_text("---\nlicense: mit\n---\n\n# Ours\n")
    publish(pipeline, "me/other")
    card = hub.files("me/other")["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n\n# Ours\n\n## Use\n") and 'snapshot_download("me/other")' in card


def test_pipeline_of_bm25_alone_has_a_card(hub, toy, tmp_path):
    bm25 = kd.BM25Index.build(kd.TextStore.from_tsv(toy / "collection.tsv"))
    save_pipeline(tmp_path / "best", Pipeline(first_stage=bm25))
    publish(tmp_path / "best", "me/best")
    assert "with the parts\n`first_stage/`." in hub.files("me/best")["README.md"].decode()


def test_incomplete_pipeline_is_not_published(hub, pipeline):
    (pipeline / "ranker" / "manifest.json").unlink()
    (pipeline / "ranker" / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"README\.md does not exist"):
        publish(pipeline, "me/best")
    shutil.rmtree(pipeline / "documents")
    with pytest.raises(FileNotFoundError, match="lacks parts of its pipeline: documents"):
        publish(pipeline, "me/best")
    assert hub.repositories == {}


def test_every_saved_file_of_a_ranker_can_be_published():
    assert CHECKPOINT_FILES <= SUFFIXES and not CHECKPOINT_FILES & PART_SUFFIXES
