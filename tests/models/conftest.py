"""The golden cases of the rankers with a vector a term: checkpoints in the published layout, inputs and numbers."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
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
