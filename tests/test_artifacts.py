"""Files and folders are complete or absent, described, resumable, and locked."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from hf_kd_ranking import artifacts
from hf_kd_ranking.artifacts import (
    building,
    changed_names,
    compute_blocks,
    content_digest,
    existing_file,
    locked,
    new_version,
    open_version,
    read_description,
    refuse_existing,
    work_folder,
    write_description,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_complete_or_not_at_all(tmp_path):
    with writing(tmp_path / "file") as file:
        file.write("ä\n")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == "ä\n".encode()
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "file") as file:
        file.write("other")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "ä\n" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("replaces", [True, False])
def test_folder_appears_complete_or_not_at_all(tmp_path, replaces):
    with building(tmp_path / "folder") as temporary:
        (temporary / "a").touch()
        assert not (tmp_path / "folder").exists()
    with pytest.raises(OSError, match="full"), building(tmp_path / "folder", replaces) as temporary:
        (temporary / "b").touch()
        raise OSError("full")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["a"]
    with building(tmp_path / "folder", replaces) as temporary:
        (temporary / "c").touch()
    assert names(tmp_path / "folder") == (["c"] if replaces else ["a"]) and names(tmp_path) == ["folder"]


def test_outputs_and_inputs_are_checked_before_work(tmp_path):
    (tmp_path / "file").touch()
    refuse_existing(tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match="give another output, or --overwrite"):
        refuse_existing(tmp_path / "file", overwrite=False)
    with pytest.raises(FileNotFoundError, match="the folder of the output x, does not exist; create it"):
        refuse_existing(tmp_path / "none" / "x", overwrite=False)
    with pytest.raises(ValueError, match=r"The scores file .*file is empty"):
        existing_file(tmp_path / "file", "scores")
    with pytest.raises(FileNotFoundError, match=r"The scores file .* is a folder, not a file; give the path"):
        existing_file(tmp_path, "scores")


def test_content_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    digest = content_digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert content_digest(tmp_path / "moved") == digest
    (tmp_path / "moved" / "b" / "file").write_text("y")
    assert content_digest(tmp_path / "moved") != digest
    assert content_digest("owner/name") == "owner/name"


def test_damaged_description_is_refused(tmp_path):
    write_description(tmp_path, {"kind": "x", "rows": 3})
    assert changed_names(read_description(tmp_path), {"kind": "x", "rows": 4}) == ["rows"]
    path = tmp_path / artifacts.DESCRIPTION
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(ValueError, match="is damaged: its checksum differs; remove"):
        read_description(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"description file .* does not exist"):
        read_description(tmp_path)


# ---- Versions -------------------------------------------------------------------------------------------------------


def write_version(folder: Path, text: str) -> None:
    with new_version(folder, {"kind": "toy", "text": text}) as data:
        (data / "file").write_text(text)


def test_new_version_replaces_the_last_one_when_complete(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    write_version(folder, "one")
    put_in_place = artifacts._put_in_place

    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "_put_in_place", stop)
    with pytest.raises(KeyboardInterrupt):
        write_version(folder, "two")
    description, data = open_version(folder, "toy")
    assert (description["text"], (data / "file").read_text()) == ("one", "one")
    monkeypatch.setattr(artifacts, "_put_in_place", put_in_place)
    write_version(folder, "two")
    assert open_version(folder, "toy")[0]["text"] == "two"
    assert names(folder) == ["artifact.json", "v2"] and names(tmp_path) == ["index"]


def test_version_of_another_kind_or_damaged_is_refused(tmp_path):
    folder = tmp_path / "index"
    write_version(folder, "one")
    with pytest.raises(ValueError, match="is an index of kind toy, needed dense"):
        open_version(folder, "dense")
    (folder / "v1" / "file").write_text("two")
    assert open_version(folder, "toy", is_verified=False)
    with pytest.raises(ValueError, match="file is damaged: its checksum differs"):
        open_version(folder, "toy")
    (folder / "v1" / "file").write_text("three")
    with pytest.raises(ValueError, match="has 5 bytes of 3: it is truncated"):
        open_version(folder, "toy")
    (folder / "v1" / "file").unlink()
    with pytest.raises(FileNotFoundError, match="file does not exist; build the index again"):
        open_version(folder, "toy")


# ---- Blocks ---------------------------------------------------------------------------------------------------------


def compute(output: Path, stop_at: int | None = None, **inputs: int) -> np.ndarray:
    """Square 10 numbers in blocks of 3; stop before the block that begins at `stop_at`."""

    def square(block: slice) -> dict[str, np.ndarray]:
        if block.start == stop_at:
            raise KeyboardInterrupt
        return {"squares": np.arange(block.start, block.stop) ** 2}

    with work_folder(output, lambda _: inputs) as folder:
        parts, finished = compute_blocks(folder, 10, 3, square, "Squaring", "number")
        squares = np.concatenate([np.load(part)["squares"] for part in parts])
        compute.finished = finished
    return squares


def test_blocks_resume_after_an_interruption_and_leave_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "out", stop_at=6, seed=1)
    with pytest.raises(ValueError, match=r"out\.parts holds the unfinished work of another seed; finish that first"):
        compute(tmp_path / "out", seed=2)
    assert compute(tmp_path / "out", seed=1).tolist() == [i**2 for i in range(10)]
    assert compute.finished == 6 and names(tmp_path) == []


def test_work_that_cannot_be_prepared_leaves_nothing(tmp_path):
    def fail(folder: Path) -> dict:
        (folder / "half").touch()
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"), work_folder(tmp_path / "out", fail):
        pass
    assert names(tmp_path) == []


# ---- Locks ----------------------------------------------------------------------------------------------------------


def hold(folder: Path, is_held, may_end) -> None:
    with locked(folder):
        is_held.set()
        may_end.wait()


def test_folder_is_refused_with_the_process_that_uses_it(tmp_path):
    spawn = multiprocessing.get_context("fork")
    is_held, may_end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path / "out", is_held, may_end))
    other.start()
    is_held.wait(timeout=60)
    refusal = pytest.raises(ValueError, match=f"out is in use by process {other.pid}; wait until it has ended")
    with refusal, locked(tmp_path / "out"):
        pass
    other.kill()  # the system releases its lock
    other.join()
    with locked(tmp_path / "out"):
        assert (tmp_path / ".out.owner").read_text() == str(os.getpid())
    assert names(tmp_path) == []


def test_working_folder_is_locked_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with locked(Path(".")), pytest.raises(ValueError, match="here is in use by process"), locked(tmp_path / "here"):
        pass
    assert names(tmp_path) == ["here"]
