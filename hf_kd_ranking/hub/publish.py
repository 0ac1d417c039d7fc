"""Publish a folder on the Hub: its files are listed and checked first, and arrive in one commit.

huggingface_hub manages the token (`hf auth login`, or HF_TOKEN); it never appears in a file or a message. After an
interruption the same command sends only what is missing, because the Hub knows the parts of large files that it has.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id
from transformers import AutoConfig

from ..artifacts import read_json
from ..errors import InputError
from ..models import RankerConfig
from .manifest import FILE as MANIFEST
from .manifest import TOKEN
from .model_card import write_model_card, write_pipeline_card

# Files that others need of a checkpoint. Everything else (optimizer states, pickles, logs) is not published.
SUFFIXES = {".safetensors", ".parquet", ".json", ".py", ".txt", ".model", ".onnx", ".md", ".yaml", ".trec"}
PART_SUFFIXES = {".npy", ".bin", ".faiss"}  # of the texts, vectors and indexes of a pipeline
BINARY = {".safetensors", ".parquet", ".onnx", *PART_SUFFIXES}
PIPELINE = "pipeline.json"
LEFT_OUT = re.compile(r"checkpoint-\d+|adapter|\.(?!eval_results$).*|__pycache__")
# Placeholders of templates, of people and of transformers' cards.
PLACEHOLDER = re.compile(r"\{\{|\}\}|\bTODO\b|\[More Information Needed\]")
REFUSALS = {
    401: "the Hub does not know the token: `hf auth login`, or the environment variable HF_TOKEN",
    403: "the token may not write there: use one with write access, and a name under your own user or organisation",
    409: "the name is taken",
}


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    overwrite: bool = False,
    is_dry_run: bool = False,
    efficiency: dict[str, Any] | None = None,
    token: str | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """Publish a trained checkpoint with its card, results, manifest and runs, or a pipeline with all its parts.

    If a checkpoint has a manifest, its card is written again with the repository's name. In the folder of a pipeline
    nothing is changed; its card is that of its ranker.

    Args:
        folder: folder that training, `save_pretrained` or `save_pipeline` wrote.
        repo_id: owner/name.
        private: True makes a new repository private.
        overwrite: True commits to a repository that exists.
        is_dry_run: True lists the files, changes nothing in the folder and does not contact the Hub.
        efficiency: figures for the card, see `write_model_card`.
        token: access token; None takes the one that huggingface_hub has.
        message: of the commit; None names the architecture.

    Returns:
        `repository`, `private`, `files` (path in the repository -> bytes), `bytes`, `address` of the commit or None.

    Raises:
        FileNotFoundError, InputError: if the folder or its card is incomplete or not valid, its results belong to
            other weights, a file contains an access token, or the name is not valid.
        FileExistsError, OSError: see `upload`.
    """
    folder = Path(folder)
    check_name(repo_id)
    with TemporaryDirectory() as scratch:
        if (folder / PIPELINE).is_file():
            kind, files = "pipeline", _pipeline_files(folder, repo_id, Path(scratch), efficiency)
        else:
            kind, files = _ranker_files(folder, repo_id, Path(scratch) if is_dry_run else folder, efficiency)
        check_card(files.get("README.md", folder / "README.md"))
        _check_no_token(files)
        sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
        address = None
        if not is_dry_run:
            message = message or f"Upload {kind} by hf_kd_ranking"
            address = upload(files, repo_id, "model", message, private, overwrite, token)
    size = sum(sizes.values())
    return {"repository": repo_id, "private": private, "files": sizes, "bytes": size, "address": address}


def _ranker_files(
    folder: Path, repo_id: str, output: Path, efficiency: dict[str, Any] | None
) -> tuple[str, dict[str, Path]]:
    """Return what a checkpoint is, and its files, whose card is written into another folder."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} is not a checkpoint: it needs config.json and *.safetensors.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, RankerConfig):
        raise InputError(f"{folder} contains a {config.model_type}, not a ranker; upload it with `hf upload`.")
    files = files_to_publish(folder)
    if (folder / MANIFEST).is_file():
        write_model_card(folder, repo_id, efficiency, output)
        files.update(files_to_publish(output))
    return f"{config.model_type} ranker", files


def _pipeline_files(folder: Path, repo_id: str, output: Path, efficiency: dict[str, Any] | None) -> dict[str, Path]:
    pipeline = read_json(folder / PIPELINE, what="pipeline's")
    missing = [name for name in ("parts", "purpose", "depth", "weight") if name not in pipeline]
    if missing:
        raise InputError(f"{folder / PIPELINE} is damaged: it lacks {', '.join(missing)}; copy the pipeline again.")
    files = files_to_publish(folder, SUFFIXES | PART_SUFFIXES)
    missing = [name for name in pipeline["parts"] if not any(path.startswith(f"{name}/") for path in files)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks parts of its pipeline: {', '.join(missing)}.")
    write_pipeline_card(folder, pipeline, repo_id, output, efficiency)
    return files | files_to_publish(output)


def check_name(repo_id: str) -> None:
    """Refuse, by an InputError, what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a valid repository name: {error}") from error
    if "/" not in repo_id:
        raise InputError(f"A repository name has the form owner/name, got {repo_id!r}.")


def check_card(path: Path) -> None:
    """Refuse a card that is missing (FileNotFoundError), has no metadata or a placeholder (InputError)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no model card, README.md; train_ranker or write_card writes one.")
    card = ModelCard.load(path)
    if not card.data.to_dict():
        raise InputError(f"{path} has no metadata: the Hub reads it from a YAML block between --- at the top.")
    placeholder = PLACEHOLDER.search(card.content)
    if placeholder is not None:
        line = card.content.count("\n", 0, placeholder.start()) + 1
        raise InputError(f"{path} line {line} has {placeholder.group()!r} left to fill in.")


def files_to_publish(folder: Path, suffixes: Collection[str] = SUFFIXES) -> dict[str, Path]:
    """Return the files of a folder with one of the suffixes to publish: path in the repository -> file, sorted."""
    files = {}
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not LEFT_OUT.fullmatch(name)]
        for name in names:
            path = Path(directory, name)
            if path.suffix in suffixes and not LEFT_OUT.fullmatch(name):
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def _check_no_token(files: dict[str, Path]) -> None:
    own = get_token()
    for path in files.values():
        if path.suffix in BINARY:
            continue
        content = path.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(content) or (own and own in content):
            raise InputError(f"{path} contains an access token of the Hub; remove it, and revoke it if others saw it.")


def upload(
    files: dict[str, Path],
    repo_id: str,
    repo_type: str,
    message: str,
    private: bool = False,
    overwrite: bool = False,
    token: str | None = None,
) -> str:
    """Make the repository, send files in one commit, and return the commit's address.

    Raises:
        FileExistsError: if the repository exists and `overwrite` is False.
        OSError: in one line with what to do, if the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        if not overwrite and api.repo_exists(repo_id, repo_type=repo_type):
            raise FileExistsError(f"{repo_id} exists on the Hub: choose another name, or --overwrite to commit to it.")
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url
    except LocalTokenNotFoundError:
        problem = "needs a token with write access: `hf auth login`, or the environment variable HF_TOKEN"
    except OfflineModeIsEnabled:
        problem = "needs the network, which HF_HUB_OFFLINE switches off"
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = f"the Hub answered {status}: {error.server_message or error.response.reason_phrase}"
        problem = REFUSALS.get(status, answer)
    except httpx.HTTPError as error:
        problem = f"no connection to the Hub ({type(error).__name__}); the same command resumes the upload"
    # Outside of the handlers, so that it is not chained: a debugger would show the request's headers.
    raise OSError(f"Publishing {repo_id}: {problem}.")
