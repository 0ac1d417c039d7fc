"""Checkpoints carry their code: they work with trust_remote_code=True on a machine without this package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, pipeline

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES, RankerModel, RankingProcessor
from hf_kd_ranking.models.pipeline import TextRankingPipeline

SOURCE = Path(kd.__file__).parent / "models"
QUERIES = ["what is bread", "moon"]
DOCUMENTS = ["bread apple iron", "moon", "house of the king", "night", "", "how to paper"]
ONE = {"query": QUERIES[0], "documents": DOCUMENTS}
# Checkpoint -> architecture and settings. The last two have the name of their folder in common.
CHECKPOINTS = {name: (name, {"join_layer_idx": 1} if name == "prettr" else {}) for name in ARCHITECTURES} | {
    "first/same_name": ("bert_dot", {"pooling": "mean"}),
    "second/same_name": ("bert_dot", {"compression_dim": 6}),
}
# Elsewhere: answers with what each checkpoint gives there, or with the error.
SCRIPT = """
import json, sys, traceback

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_kd_ranking":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

def tensors(value):
    return {name: tensors(item) for name, item in value.items()} if isinstance(value, dict) else torch.tensor(value)

def load(folder, auto=AutoModel):
    return auto.from_pretrained(folder, trust_remote_code=True).eval()

@torch.no_grad()
def answer(name, inputs):
    folder, batch = f"{root}/{name}", tensors(inputs["batch"])
    model = load(folder)
    model.save_pretrained(f"{root}/again/{name}")
    found = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "scores": model(**batch).scores.tolist(),
        "scores of the copy": load(f"{root}/again/{name}")(**batch).scores.tolist(),
        "tokens": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(inputs["texts"])["input_ids"],
        "ranking": pipeline("text-ranking", model=f"{root}/pipeline/{name}", trust_remote_code=True)(inputs["one"]),
    }
    if name == "bert_cat":
        found["logits"] = load(folder, AutoModelForSequenceClassification)(**batch).logits.tolist()
    return found

root, answers = sys.argv[1], {}
for name, inputs in json.load(open(f"{root}/inputs.json")).items():
    try:
        answers[name] = answer(name, inputs)
    except Exception:
        answers[name] = {"error": traceback.format_exc()}
json.dump(answers, open(f"{root}/answers.json", "w"))
"""


def inputs_of(model: RankerModel, tokenizer) -> dict:
    return RankingProcessor.from_config(tokenizer, model.config)(QUERIES, DOCUMENTS)


def as_lists(batch: dict) -> dict:
    return {name: as_lists(value) if isinstance(value, dict) else value.tolist() for name, value in batch.items()}


@torch.no_grad()
def scores_of(model: RankerModel, tokenizer) -> torch.Tensor:
    return model(**inputs_of(model, tokenizer)).scores


@pytest.fixture(scope="module")
def models(encoder) -> dict[str, RankerModel]:
    found = {}
    for seed, (name, (architecture, settings)) in enumerate(CHECKPOINTS.items()):
        torch.manual_seed(seed)
        lengths = {"max_query_length": 8, "max_document_length": 16, "initializer_range": 0.5}
        found[name] = kd.load_ranker(encoder, architecture, **lengths, **settings)
    torch.nn.init.zeros_(found["splade"]._expansion_head.bias)  # a fresh one weighs no word of so small a vocabulary
    return found


@pytest.fixture(scope="module")
def root(models, tokenizer, tmp_path_factory) -> Path:
    """A folder of all checkpoints, saved as models and as pipelines, and what another machine answers with them."""
    root, inputs = tmp_path_factory.mktemp("remote"), {}
    for name, model in models.items():
        kd.Ranker(model, tokenizer).save_pretrained(root / name)
        pipeline("text-ranking", model=model, tokenizer=tokenizer).save_pretrained(root / "pipeline" / name)
        inputs[name] = {"batch": as_lists(inputs_of(model, tokenizer)), "texts": DOCUMENTS, "one": ONE}
    (root / "inputs.json").write_text(json.dumps(inputs))
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    caches = {"HF_HOME": str(root / "cache"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(root)],
        cwd=elsewhere,
        env=os.environ | caches,
        stdin=subprocess.DEVNULL,  # a question whether to trust the code is an error
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return root


@pytest.fixture(params=CHECKPOINTS)
def name(request) -> str:
    return request.param


@pytest.fixture
def answers(root, name) -> dict[str, Any]:
    """Return the answers of the other machine for a checkpoint."""
    found = json.loads((root / "answers.json").read_text())[name]
    assert "error" not in found, found["error"]
    return found


# ---- Without the package --------------------------------------------------------------------------------------------


def test_the_shipped_class_gives_the_same_scores(models, tokenizer, name, answers):
    assert answers["class"] == type(models[name]).__name__
    assert answers["module"].startswith("transformers_modules.")
    wanted = scores_of(models[name], tokenizer)
    assert wanted.std() > 0.01, "scores too alike to tell a change"
    assert torch.allclose(torch.tensor(answers["scores"]), wanted, atol=1e-5)


def test_checkpoint_of_the_shipped_class_loads_there_and_here(models, root, tokenizer, name, answers):
    assert torch.allclose(torch.tensor(answers["scores of the copy"]), torch.tensor(answers["scores"]), atol=1e-5)
    again = kd.load_ranker(root / "again" / name)
    assert type(again) is type(models[name])
    assert torch.allclose(scores_of(again, tokenizer), scores_of(models[name], tokenizer), atol=1e-5)


def test_the_tokenizer_loads_there(tokenizer, answers):
    assert answers["tokens"] == tokenizer(DOCUMENTS)["input_ids"]


def test_saved_pipeline_ranks_there_as_rerank_here(models, tokenizer, name, answers):
    wanted = kd.Ranker(models[name], tokenizer).rerank(**ONE)
    assert [item["index"] for item in answers["ranking"]] == [index for index, _ in wanted]
    assert [item["score"] for item in answers["ranking"]] == pytest.approx(
        [score for _, score in wanted], rel=1e-6, abs=1e-5
    )
    assert [item["document"] for item in answers["ranking"]] == [DOCUMENTS[index] for index, _ in wanted]


@pytest.mark.parametrize("name", ["bert_cat"], indirect=True)
def test_bert_cat_is_a_sequence_classifier_there(models, tokenizer, name, answers):
    wanted = scores_of(models[name], tokenizer)
    assert torch.allclose(torch.tensor(answers["logits"]), wanted.reshape(-1, 1), atol=1e-5)


# ---- With the package -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str)
def test_the_package_has_precedence_over_shipped_code(model, tmp_path, trust):
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, **trust)) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is type(model.config)


def test_saved_pipeline_needs_no_trust_here(model, tokenizer, tmp_path):
    saved = pipeline("text-ranking", model=model, tokenizer=tokenizer)
    saved.save_pretrained(tmp_path)
    assert "text-ranking" in json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        again = pipeline("text-ranking", model=str(tmp_path), **trust)
        assert type(again) is TextRankingPipeline
        assert type(again.model) is type(model)
        assert [item["index"] for item in again(ONE)] == [item["index"] for item in saved(ONE)]


def test_auto_map_names_classes_in_the_files_beside_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    wanted = {"AutoConfig": type(model.config).__name__, "AutoModel": type(model).__name__}
    if isinstance(model, kd.BertCat):
        wanted["AutoModelForSequenceClassification"] = "BertCat"
    assert {auto: reference.rpartition(".")[2] for auto, reference in auto_map.items()} == wanted
    for reference in auto_map.values():
        module, _, name = reference.rpartition(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_shipped_files_are_the_packages_own(model, tmp_path):
    model.save_pretrained(tmp_path)
    shipped = {path.name: path.read_bytes() for path in tmp_path.glob("*.py")}
    assert {"base.py", f"{type(model).__module__.rpartition('.')[2]}.py"} < shipped.keys()
    assert all((SOURCE / name).read_bytes() == content for name, content in shipped.items())


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


SAVERS = {
    "ranker": lambda model, tokenizer, folder: kd.Ranker(model, tokenizer).save_pretrained(folder),
    "pipeline": lambda model, tokenizer, folder: pipeline(
        "text-ranking", model=model, tokenizer=tokenizer
    ).save_pretrained(folder),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS.keys())
def test_no_saved_file_names_a_local_path(model, tokenizer, tmp_path, save):
    first, second = tmp_path / "first", tmp_path / "second"
    save(model, tokenizer, first)
    loaded = kd.Ranker.from_pretrained(first, device="cpu")
    save(loaded.model, loaded.tokenizer, second)
    for file in [*first.glob("*.json"), *second.glob("*.json")]:
        found = [text for text in strings(json.loads(file.read_text())) if Path(text).is_absolute() and len(text) > 1]
        assert found == [], file.name
