"""Publishing, by the real client against a stand-in of the Hub: one commit, everything in it, no token anywhere."""

import json
import shutil
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers.trainer_utils import HubStrategy

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import file_digest as digest
from hf_kd_ranking.hub.manifest import public_command, read_manifest
from hf_kd_ranking.hub.publish import files_to_publish, publish_ranker

TOKEN = "hf_" + "a1B2" * 8  # the stand-in's
CODE = {"base.py", "bert_dot.py", "encoder.py", "padding.py", "scoring.py"}


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


def test_one_commit_holds_what_others_need_and_nothing_else(hub, folder, tmp_path):
    plan = publish_ranker(folder, "me/ranker", private=True)
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


def test_a_dry_run_lists_the_same_and_asks_nobody(folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    plan = publish_ranker(folder, "me/ranker", is_dry_run=True)
    assert plan["address"] is None
    assert plan["files"] == {name: path.stat().st_size for name, path in files_to_publish(folder).items()}
    assert plan["bytes"] == sum(plan["files"].values()) > plan["files"]["model.safetensors"]


def test_an_upload_that_was_cut_off_sends_large_files_once(hub, folder):
    hub.status["/commit/"] = 400
    with pytest.raises(OSError, match="the Hub answered 400"):
        publish_ranker(folder, "me/ranker")
    del hub.status["/commit/"]
    publish_ranker(folder, "me/ranker", overwrite=True)
    assert len(hub.uploads) == 1
    assert hub.files("me/ranker")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_repository_that_exists_is_kept(hub, folder):
    publish_ranker(folder, "me/ranker")
    with pytest.raises(FileExistsError, match=r"me/ranker exists on the Hub.*--overwrite"):
        publish_ranker(folder, "me/ranker")
    publish_ranker(folder, "me/ranker", overwrite=True)
    assert len(hub.repositories["me/ranker"]["commits"]) == 2


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "does not know the token"), (403, "may not write there"), (500, "the Hub answered 500")],
)
def test_a_refusal_is_one_line_without_the_token(hub, folder, status, words):
    hub.status["/api/repos/create"] = status
    with pytest.raises(OSError, match=f"^Publishing me/ranker: .*{words}") as caught:
        publish_ranker(folder, "me/ranker")
    assert TOKEN not in "".join(traceback.format_exception(caught.value, limit=None))
    assert "\n" not in str(caught.value)


def test_no_token_no_network_and_offline_are_told_apart(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match="hf auth login"):
        publish_ranker(folder, "me/ranker")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where nobody listens
    with pytest.raises(OSError, match="no connection to the Hub"):
        publish_ranker(folder, "me/ranker")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE switches off"):
        publish_ranker(folder, "me/ranker")


def plain_encoder(folder: Path, encoder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((encoder / name).read_bytes())


def other_weights(folder: Path, encoder: Path) -> None:
    kd.BertDot.from_encoder(
        encoder, max_query_length=8, max_document_length=16, pooling="mean", layers=[0]
    ).save_pretrained(folder)


WRONG = {
    "no checkpoint": (lambda folder, _: (folder / "model.safetensors").unlink(), "is no checkpoint"),
    "a plain encoder": (plain_encoder, "holds a bert, no ranker"),
    "results of other weights": (other_weights, r"measured with other weights .*model.safetensors"),
    "a token": (lambda folder, _: (folder / "notes.txt").write_text(f"x {TOKEN}"), "notes.txt holds an access token"),
}


@pytest.mark.parametrize(("damage", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_should_not_be_published_is_refused_before_the_hub_is_asked(hub, folder, encoder, damage, words):
    damage(folder, encoder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        publish_ranker(folder, "me/ranker")
    assert hub.repositories == {}


def test_the_own_token_is_found_whatever_its_form(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-9")
    (folder / "notes.txt").write_text("x secret-9 y")
    with pytest.raises(ValueError, match=r"notes\.txt holds an access token"):
        publish_ranker(folder, "me/ranker", is_dry_run=True)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "no model card"),
        ("# Ranker\n", "no metadata"),
        ("---\nlicense: mit\n---\n\nTODO\n", "line 5 has 'TODO'"),
    ],
)
def test_a_card_by_hand_must_be_whole(folder, card, words):
    (folder / "manifest.json").unlink()
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        publish_ranker(folder, "me/ranker", is_dry_run=True)


@pytest.mark.parametrize("name", ["ranker", "a/b/c", "me/ran ker", "me/../x"])
def test_a_name_that_cannot_be_is_refused(folder, name):
    with pytest.raises(ValueError, match="name"):
        publish_ranker(folder, name)


def test_the_manifest_ties_results_to_data_and_weights(folder, toy):
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


def test_a_command_is_shown_without_tokens_and_local_folders():
    parts = ["/home/me/train.py", "--hub_token", "secret", "--hub_token=secret", f"--x={TOKEN}", "--lr", "1e-5"]
    assert public_command(["/x/hf_kd_ranking/__main__.py", "demo"]) == ["hf_kd_ranking", "demo"]
    assert public_command(parts) == ["train.py", "--hub_token", "***", "--hub_token=***", "--x=***", "--lr", "1e-5"]


def test_the_trainer_publishes_at_the_end(hub, toy, encoder, tmp_path, private_cache):
    job, args = make_job(toy, encoder, tmp_path / "out")
    args.push_to_hub, args.hub_model_id, args.hub_strategy = True, "me/ranker", HubStrategy.END
    kd.train_ranker(job, args)
    files = hub.files("me/ranker")
    assert files["model.safetensors"] == Path(args.output_dir, "model.safetensors").read_bytes()
    assert "dice" in files["README.md"].decode() and "| first stage |" in files["README.md"].decode()


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_a_model_publishes_itself_with_its_code(hub, model):
    model.push_to_hub("me/model")
    files = hub.files("me/model")
    assert {"config.json", "model.safetensors", "base.py"} <= files.keys()
