"""Steps of a long job: each makes one folder, runs once for the same inputs, and resumes after an interruption."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..artifacts import (
    DESCRIPTION,
    changed_names,
    content_digest,
    has_description,
    read_description,
    remove_folder,
    write_description,
)

LONGEST_INPUT = 500  # characters of an input that a description shows; of a longer one it has the digest


@dataclass(frozen=True)
class Artifact:
    """The folder that a step of a job makes.

    Args:
        path: the folder; it does not exist yet where a job is only planned.
        digest: digest of everything that the folder is made from.
    """

    path: Path
    digest: str


class Workspace:
    """A folder, the output of a job, in which every step leaves an artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Write down what the whole job is about, or raise a ValueError that names what differs.

        `inputs` are name -> input, see `comparable`.
        """
        described = comparable(inputs)
        if not has_description(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_description(self.folder, described)
            return
        changed = " and another ".join(changed_names(read_description(self.folder), described))
        if changed:
            raise ValueError(f"{self.folder} was made from another {changed}; give another output folder.")

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
        artifact = self.locate(name, function, *inputs)
        if self.is_done(artifact):
            return artifact
        folder = artifact.path
        if folder.exists() and not self._is_begun(artifact):
            remove_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"step": function.__name__, "inputs": _shortened(inputs), "digest": artifact.digest}
        write_description(folder, {**description, "is_complete": False})
        start = time.perf_counter()
        function(folder, *inputs)
        seconds = time.perf_counter() - start
        write_description(folder, {**description, "is_complete": True, "seconds": seconds})
        return artifact

    def locate(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Return the artifact that a step makes, without making it; errors as `step`."""
        folder = self.folder / name
        if folder.exists() and not has_description(folder):
            # A process that was killed as it began leaves a half-written description.
            if any(not path.name.startswith(DESCRIPTION) for path in folder.iterdir()):
                raise FileExistsError(f"{folder} contains files that no step wrote; give another output folder.")
        return Artifact(folder, inputs_digest([function.__name__, inputs]))

    def is_done(self, artifact: Artifact) -> bool:
        """Return whether an artifact is complete and was made from its inputs."""
        return self._is_begun(artifact) and read_description(artifact.path)["is_complete"]

    def _is_begun(self, artifact: Artifact) -> bool:
        return has_description(artifact.path) and read_description(artifact.path).get("digest") == artifact.digest


def inputs_digest(inputs: Any) -> str:
    """Return the sha256 of inputs, see `comparable`."""
    return hashlib.sha256(json.dumps(comparable(inputs), sort_keys=True).encode()).hexdigest()


def comparable(value: Any) -> Any:
    """Return a value as JSON that is equal only for equal content.

    Args:
        value: JSON; a `Path`, which stands for the content of its file or folder, or for a name on the Hub where it
            does not exist; an `Artifact`; a dataclass; an object with a method `fingerprint`; or lists and
            dictionaries of these.
    """
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, Path):
        return content_digest(value)
    if is_dataclass(value):
        return {field.name: comparable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): comparable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.fingerprint()


def _shortened(inputs: Any) -> list:
    """Return inputs as a description shows them."""
    shown = []
    for value in comparable(inputs):
        text = json.dumps(value)
        shown.append(value if len(text) <= LONGEST_INPUT else hashlib.sha256(text.encode()).hexdigest())
    return shown
