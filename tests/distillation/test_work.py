"""Steps run once for the same inputs, resume, and never take files of others."""

import json
import os
import signal
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_kd_ranking.distillation import work as work_module
from hf_kd_ranking.distillation.work import (
    Artifact,
    Workspace,
    comparable,
    inputs_digest,
    path_identity,
    shared,
    stopping_at_signals,
)


@pytest.fixture
def work(tmp_path) -> Workspace:
    return Workspace(tmp_path / "out")


@pytest.fixture
def calls() -> list[list[str]]:
    return []


@pytest.fixture
def step(calls):
    """A step that notes what it finds in its folder, and stops the first time."""

    def make_part(folder: Path, number: int) -> None:
        calls.append(sorted(path.name for path in folder.iterdir()))
        (folder / "part").write_text(str(number))
        if len(calls) == 1:
            raise OSError("stopped")

    return make_part


def test_step_resumes_then_runs_once_then_again_for_other_inputs(work, step, calls):
    with pytest.raises(OSError, match="stopped"):
        work.step("a/b", step, 1)
    first = work.step("a/b", step, 1)
    assert work.step("a/b", step, 1) == first and work.is_done(first)
    other = work.step("a/b", step, 2)
    assert other.digest != first.digest and not work.is_done(first)
    assert calls == [["artifact.json"], ["artifact.json", "part"], ["artifact.json"]]
    description = json.loads((work.folder / "a/b/artifact.json").read_text())
    assert (description["inputs"], description["step"], description["is_complete"]) == ([2], "make_part", True)
    assert description["seconds"] >= 0


def test_step_depends_on_the_digest_of_earlier_steps(work):
    def write(folder: Path, *inputs) -> None:
        (folder / "x").touch()

    first, second = work.step("first", write, "one"), work.step("other", write, "two")
    assert work.locate("next", write, first).digest != work.locate("next", write, second).digest
    assert work.locate("next", write, first) == work.locate("next", write, work.step("first", write, "one"))


def test_step_refuses_a_folder_with_files_of_others(work, step):
    (work.folder / "mine").mkdir(parents=True)
    (work.folder / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="contains files that no step wrote"):
        work.step("mine", step, 1)
    assert (work.folder / "mine" / "notes.txt").read_text() == "keep"
    (work.folder / "killed").mkdir()
    (work.folder / "killed" / "artifact.json.tmp7").write_text("{")  # by a process that was killed as it began
    assert work.is_done(work.step("killed", lambda *_: None, 1))


def test_claim_keeps_an_output_for_its_collection(work, tmp_path):
    collection = tmp_path / "collection.tsv"
    collection.write_text("a\tx\n")
    work.claim({"collection": collection, "queries": "q"})
    work.claim({"collection": collection, "queries": "q"})
    collection.write_text("a\ty\n")
    with pytest.raises(ValueError, match="was made from another collection; give another output folder"):
        work.claim({"collection": collection, "queries": "q"})


def test_inputs_are_compared_by_content(tmp_path):
    @dataclass
    class Settings:
        rate: float
        file: Path

    class Store:
        def fingerprint(self) -> str:
            return "f"

    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("one")
    folder.mkdir()
    (folder / "config.json").write_text("one")
    values = [Settings(0.1, file), {"folder": folder}, (Artifact(file, "d"), Store(), None, "hub/name")]
    before = [inputs_digest(value) for value in values]
    assert comparable(values[2]) == ["d", "f", None, "hub/name"]
    assert comparable(Path("owner/name-of-the-hub")) == "owner/name-of-the-hub"
    file.write_text("two")
    (folder / "config.json").rename(folder / "other.json")
    after = [inputs_digest(value) for value in values]
    assert [one == two for one, two in zip(before, after, strict=True)] == [False, False, True]


def test_note_beside_a_model_changes_nothing_and_its_files_do(tmp_path):
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/model.safetensors").write_text("weights")
    (tmp_path / "model/vocab.txt").write_text("words")
    before = path_identity(tmp_path / "model")
    for note in ("README.md", "notes.txt", "train.log"):
        (tmp_path / "model" / note).write_text("note")
    (tmp_path / "model").rename(tmp_path / "renamed")
    folder = tmp_path / "renamed"
    assert path_identity(folder) == before
    identities = {before}
    for file in ("model.safetensors", "vocab.txt", "sub/config.json"):
        (folder / file).write_text("other")
        identities.add(path_identity(folder))
    assert len(identities) == 4


def test_another_revision_of_a_model_on_the_hub_is_another_model(monkeypatch):
    cached = {"file": None}
    monkeypatch.setattr(work_module, "try_to_load_from_cache", lambda name, file: cached["file"])
    assert path_identity(Path("owner/name")) == "owner/name"  # not downloaded yet
    identities = []
    for revision in ("a1", "b2"):
        cached["file"] = f"/cache/models--owner--name/snapshots/{revision}/config.json"
        identities.append(path_identity(Path("owner/name")))
    assert identities == ["owner/name a1", "owner/name b2"]
    monkeypatch.undo()
    assert path_identity(Path("no/such/folder/at all")) == "no/such/folder/at all"


def test_main_process_runs_steps_that_others_only_wait_for(work, monkeypatch):
    state = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    called = []

    def alone(folder: Path, number: int) -> None:
        called.append("alone")

    @shared
    def together(folder: Path, number: int) -> None:
        called.append("together")

    monkeypatch.setattr(work_module, "processes", lambda: state)
    for function in (alone, together):
        work.step(function.__name__, function, 1)
    assert called == ["together"] and not work.folder.exists()
    state.is_main_process = True
    for function in (alone, together):
        assert work.is_done(work.step(function.__name__, function, 1))
    assert called == ["together", "alone", "together"]


def test_long_inputs_are_described_by_a_digest(work):
    def write(folder: Path, *inputs) -> None:
        pass

    work.step("long", write, ["q"] * 1_000, "short")
    long, short = json.loads((work.folder / "long/artifact.json").read_text())["inputs"]
    assert len(long) == 64 and short == "short"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_that_python_discards_ends_the_job_at_the_next_step(work, number, error):
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)

    previous, made = signal.getsignal(number), []

    def make(folder, name):
        if name == "first":
            Finalised()
        made.append(name)

    with pytest.raises(error), stopping_at_signals():
        work.step("first", make, "first")
        work.step("second", make, "second")
    assert made == ["first"]
    assert signal.getsignal(number) is previous
    work.step("second", make, "second")


def test_free_gpu_gets_the_next_step(work, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    futures, used = [], []

    def submit(*_):
        used.append(os.environ["CUDA_VISIBLE_DEVICES"])
        futures.append(Future())
        if len(futures) == 2:
            futures[0].set_result(None)
        if len(futures) == 3:
            futures[1].set_result(None)
            futures[2].set_result(None)
        return futures[-1]

    steps = dict.fromkeys("abc", (print,))
    work_module._submit(SimpleNamespace(submit=submit), work, steps, parallel=2)
    assert used == ["4", "7", "4"]
