"""Steps of a long job: each makes one folder, runs once for the same inputs, and resumes after an interruption."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from ..artifacts import content_digest, has_description, read_description, remove_folder, write_description


@dataclass(frozen=True)
class Artifact:
    """The folder that a step of a job makes.

    Args:
        path: the folder; it may not exist yet where a job is only planned.
        digest: digest of everything that the folder is made from.
    """

    path: Path
    digest: str


class Workspace:
    """A folder in which every step of a job leaves an artifact.

    Args:
        folder: the output of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def step(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Run a step, unless its artifact exists and was made from the same inputs.

        A step that was interrupted is called again with what it left in its folder. An artifact of other inputs is
        removed first.

        Args:
            name: path of the artifact below the workspace.
            function: called with the folder and the inputs; its name is part of the artifact's identity.
            *inputs: what the result depends on, see `comparable`.

        Raises:
            FileExistsError: if the folder contains files that no step wrote.
        """
        artifact, described = self.locate(name, function, *inputs)
        if self.is_done(artifact):
            return artifact
        folder = artifact.path
        if folder.exists() and not self._is_begun(artifact):
            if not has_description(folder) and any(folder.iterdir()):
                raise FileExistsError(f"{folder} contains files that no step wrote; give another output folder.")
            remove_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"step": function.__name__, "inputs": described, "digest": artifact.digest}
        write_description(folder, {**description, "is_complete": False})
        start = time.perf_counter()
        function(folder, *inputs)
        seconds = time.perf_counter() - start
        write_description(folder, {**description, "is_complete": True, "seconds": seconds})
        return artifact

    def locate(self, name: str, function: Callable[..., object], *inputs: Any) -> tuple[Artifact, list]:
        """Return the artifact that a step makes and its inputs as JSON, without making it."""
        described = comparable(inputs)
        return Artifact(self.folder / name, inputs_digest([function.__name__, described])), described

    def is_done(self, artifact: Artifact) -> bool:
        """Return whether an artifact is complete and was made from its inputs."""
        return self._is_begun(artifact) and read_description(artifact.path)["is_complete"]

    def _is_begun(self, artifact: Artifact) -> bool:
        return has_description(artifact.path) and read_description(artifact.path).get("digest") == artifact.digest


def inputs_digest(inputs: Any) -> str:
    """Return the sha256 of what something is made from, see `comparable`."""
    return hashlib.sha256(json.dumps(comparable(inputs), sort_keys=True).encode()).hexdigest()


def comparable(value: Any) -> Any:
    """Return a value as JSON that is equal only for equal content.

    Args:
        value: JSON; a `Path`, which stands for the content of its file or folder; an `Artifact`; a dataclass; an
            object with a method `fingerprint`, such as a text store; or lists and dictionaries of these.
    """
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, Path):
        return content_digest(value)
    if is_dataclass(value):
        return comparable(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): comparable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(part) for part in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.fingerprint()
