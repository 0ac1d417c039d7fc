"""Publish a folder on the Hub: what goes is listed and checked first, and arrives in one commit.

The token is huggingface_hub's own affair (`hf auth login`, or HF_TOKEN); it is never read into a file or a message. An
upload that was cut off is started again by the same command: the Hub knows the parts of large files that it has.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id
from transformers import AutoConfig

from ..models import RankerConfig
from .manifest import FILE as MANIFEST
from .manifest import TOKEN
from .model_card import write_model_card

# What others need of a checkpoint. Anything else in its folder (optimizer states, pickles, logs) stays at home.
SUFFIXES = {".safetensors", ".parquet", ".json", ".py", ".txt", ".model", ".onnx", ".md", ".yaml", ".trec"}
LEFT_OUT = re.compile(r"checkpoint-\d+|adapter|\.(?!eval_results$).*|__pycache__")


def publish_ranker(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    overwrite: bool = False,
    is_dry_run: bool = False,
    efficiency: dict[str, Any] | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Publish a trained checkpoint with its card, results, manifest and runs.

    Where the folder has a manifest, the card is written anew for the repository's name.

    Args:
        folder: what training, or `save_pretrained`, wrote.
        repo_id: owner/name.
        private: of a repository that is made.
        overwrite: True commits onto a repository that exists.
        is_dry_run: True lists what would go, and asks the Hub nothing.
        efficiency: for the card, see `write_model_card`.
        token: None takes the one that huggingface_hub has.

    Returns:
        `repository`, `files` (path in the repository -> bytes), `bytes`, and `address` of the commit, None if dry.

    Raises:
        FileNotFoundError, ValueError: if the folder is no checkpoint of a ranker, its card is missing or not valid,
            its results are another model's, a file holds an access token, or the name cannot be one.
        FileExistsError: if the repository exists.
        OSError: if the Hub refuses, or cannot be reached.
    """
    folder = Path(folder)
    config = check_checkpoint(folder)
    check_name(repo_id)
    if (folder / MANIFEST).is_file():
        write_model_card(folder, repo_id, efficiency)
    check_card(folder / "README.md")
    files = files_to_publish(folder)
    check_no_token(files)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    plan = {"repository": repo_id, "private": private, "files": sizes, "bytes": sum(sizes.values()), "address": None}
    if is_dry_run:
        return plan
    message = f"Upload {config.model_type} ranker by hf_kd_ranking"
    return plan | {"address": upload(files, repo_id, "model", message, private, overwrite, token)}


def check_checkpoint(folder: Path) -> RankerConfig:
    """The config of a ranker's checkpoint.

    Raises:
        FileNotFoundError, ValueError: if the folder is none.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it needs config.json and *.safetensors, which training writes."
        )
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, RankerConfig):
        raise ValueError(
            f"{folder} holds a {config.model_type}, no ranker of this package; upload it with `hf upload`."
        )
    return config


def check_name(repo_id: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        ValueError: saying what a name is.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository's name: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"A repository's name is owner/name, got {repo_id!r}.")


def check_card(path: Path) -> None:
    """Refuse a folder whose card is missing, has no metadata, or has something left to fill in.

    Raises:
        FileNotFoundError, ValueError: saying what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no model card (README.md): train_ranker writes one, hub.model_card.write_card as well."
        )
    card = ModelCard.load(path)
    if not card.data.to_dict():
        raise ValueError(f"{path} has no metadata: the Hub reads it from a YAML block between --- at the top.")
    # Placeholders of templates, of people and of transformers' cards: a card that still has one was not finished.
    if blank := re.search(r"\{\{|\}\}|\bTODO\b|\[More Information Needed\]", card.content):
        line = card.content[: blank.start()].count("\n") + 1
        raise ValueError(f"{path} line {line} has {blank.group()!r} left to fill in.")


def files_to_publish(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, sorted."""
    found = {}
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not LEFT_OUT.fullmatch(name)]
        paths = [Path(directory, name) for name in names if not LEFT_OUT.fullmatch(name)]
        found |= {path.relative_to(folder).as_posix(): path for path in paths if path.suffix in SUFFIXES}
    return dict(sorted(found.items()))


def check_no_token(files: dict[str, Path]) -> None:
    """Refuse to publish an access token that got into a text.

    Raises:
        ValueError: naming the file.
    """
    own = get_token()
    for path in files.values():
        if path.suffix in (".safetensors", ".parquet", ".onnx"):
            continue
        content = path.read_text(encoding="utf-8", errors="replace")
        if TOKEN.search(content) or (own and own in content):
            raise ValueError(f"{path} holds an access token of the Hub; remove it, and revoke it if others saw it.")


def upload(
    files: dict[str, Path],
    repo_id: str,
    repo_type: str,
    message: str,
    private: bool = False,
    overwrite: bool = False,
    token: str | None = None,
) -> str:
    """Make the repository and send files in one commit; returns the commit's address.

    Raises:
        FileExistsError: if the repository exists and may not be overwritten.
        OSError: with what to do, if the Hub refuses or is out of reach.
    """
    api = HfApi(token=token)
    with clear_hub_errors(repo_id):
        if not overwrite and api.repo_exists(repo_id, repo_type=repo_type):
            raise FileExistsError(f"{repo_id} exists on the Hub: take another name, or --overwrite to commit onto it.")
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url


@contextmanager
def clear_hub_errors(repo_id: str) -> Iterator[None]:
    """Say in one line what went wrong between here and the Hub. The client's own error, which shows the request's
    headers to a debugger, is not chained.

    Raises:
        OSError: in place of huggingface_hub's and httpx's errors.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        problem = "needs a token with write access: `hf auth login`, or the environment's HF_TOKEN"
    except OfflineModeIsEnabled:
        problem = "needs the network, which HF_HUB_OFFLINE switches off"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the Hub does not know the token: `hf auth login`, or the environment's HF_TOKEN",
            403: "the token may not write there: take a token with write access, and a name under your own user or "
            "organisation",
            409: "the name is taken",
        }
        problem = reasons.get(
            status, f"the Hub answered {status}: {error.server_message or error.response.reason_phrase}"
        )
    except httpx.HTTPError as error:
        problem = f"no connection to the Hub ({type(error).__name__}); the same command goes on from what arrived"
    else:
        return
    raise OSError(f"Publishing {repo_id}: {problem}.")
