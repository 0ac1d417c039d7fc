"""The golden cases: checkpoints in the published layout, and what every architecture is compared on."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hf_kd_ranking as kd
from hf_kd_ranking.models import RankerModel

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # of the golden cases' README: 2e-5 * (1 + |want|)
# Config file -> weights file: of a repository on the Hub, of a training run.
LAYOUTS = {"config.json": "pytorch_model.bin", "config.yaml": "best-model.pytorch-state-dict"}


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """golden_checkpoint(name): a folder as the authors' code wrote it; read it, do not write to it."""

    @functools.cache
    def rebuild(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for config, weights in LAYOUTS.items():
            if (GOLDEN / name / config).is_file():
                shutil.copyfile(GOLDEN / name / config, folder / config)
                torch.save(unpack_weights(GOLDEN / name / "weights.npz"), folder / weights)
        return folder

    return rebuild


def unpack_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict of float32 stored byte plane by byte plane, which packs best.

    Rows of words and positions that no case reads are zero.
    """
    packed = np.load(path)
    flat = torch.from_numpy(np.ascontiguousarray(packed["planes"].T).view(np.float32).ravel())
    shapes = json.loads(packed["index"].tobytes())
    parts = flat.split([int(np.prod(shape)) for shape in shapes.values()])
    return {name: part.view(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@pytest.fixture
def score_golden_texts() -> Callable[[RankerModel], np.ndarray]:
    """score_golden_texts(model): (queries, documents), each query with each document."""
    texts = json.loads((GOLDEN / "texts.json").read_text())
    queries, documents = texts["queries"], texts["documents"]

    def score(model: RankerModel) -> np.ndarray:
        ranker = kd.Ranker(
            model, AutoTokenizer.from_pretrained(GOLDEN / "bert_cat"), batch_size=7
        )  # one for all cases
        scores = ranker.score([query for query in queries for _ in documents], documents * len(queries))
        return scores.reshape(len(queries), len(documents))

    return score


@pytest.fixture
def check_golden_step() -> Callable[[RankerModel, dict, dict], None]:
    """check_golden_step(model, batch, step): a step of Margin-MSE has the original scores, loss and gradients."""

    def plain(name: str) -> str:
        for part in ("neural_ir_model.", "bert_model.", "token_embedder_tokens."):
            name = name.replace(part, "")
        return name

    def check(model: RankerModel, batch: dict, step: dict) -> None:
        # Query i with document i, and with document i + 1, which in one sequence brings its own query along.
        documents = batch.get("document", batch)
        documents = {name: torch.stack([rows, rows.roll(-1, 0)], 1) for name, rows in documents.items()}
        scores = model(**(batch | {"document": documents} if "document" in batch else documents)).scores  # (B, 2)
        loss = kd.losses.margin_mse(scores, torch.tensor([step["teacher_pos"], step["teacher_neg"]]).T)
        loss.backward()
        np.testing.assert_allclose(scores.detach().T, [step["scores_pos"], step["scores_neg"]], **TOLERANCE)
        assert loss.item() == pytest.approx(step["loss"], rel=4e-4)
        gradients = {plain(name): parameter.grad for name, parameter in model.named_parameters()}
        norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
        if "gradient_norms" in step:
            assert norms == pytest.approx(
                {plain(name): norm for name, norm in step["gradient_norms"].items()}, rel=4e-4, abs=4e-4
            )
            return
        wanted = {plain(name): numbers for name, numbers in step["gradient_norms_and_sums"].items()}
        assert gradients.keys() == wanted.keys()
        for name, (norm, total) in wanted.items():
            tolerance = 4e-4 * (1 + norm)
            assert norms[name] == pytest.approx(norm, abs=tolerance), name
            assert gradients[name].sum().item() == pytest.approx(total, abs=tolerance), name

    return check
