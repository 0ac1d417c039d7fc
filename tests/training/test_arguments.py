"""Settings that training refuses before any work, and the checkpoint that it resumes."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

import hf_kd_ranking as kd
from hf_kd_ranking.losses import LOSSES
from hf_kd_ranking.training.feeding import default_workers


def arguments(folder: Path, **settings) -> kd.RankingTrainingArguments:
    return kd.RankingTrainingArguments(str(folder), use_cpu=True, **settings)


def add_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "run.json"):
        (checkpoint / name).write_text("{}")
    return checkpoint


def test_defaults_are_the_papers(tmp_path):
    args = arguments(tmp_path)
    assert (args.learning_rate, args.per_device_train_batch_size, args.loss) == (7e-6, 32, "margin_mse")
    assert args.teacher_factor() == 1.0
    assert args.remove_unused_columns is False and TrainingArguments.remove_unused_columns is True


def test_batches_of_ids_survive_remove_unused_columns(tmp_path):
    assert arguments(tmp_path, remove_unused_columns=True).remove_unused_columns is False


def test_unknown_loss_names_the_nearest_and_all_others(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown loss 'margin-mse'; did you mean 'margin_mse'\?") as error:
        arguments(tmp_path, loss="margin-mse")
    assert all(name in str(error.value) for name in LOSSES)


@pytest.mark.parametrize("scale", ["0", "-2", "inf", "nan", "big", ""])
def test_teacher_scale_that_is_not_a_factor_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match=rf"teacher_scale must be a positive number or 'match', got '{scale}'"):
        arguments(tmp_path, teacher_scale=scale)


@pytest.mark.parametrize(("scale", "factor"), [("0.25", 0.25), ("3", 3.0), (0.5, 0.5), ("match", None)])
def test_teacher_scale_is_a_factor_or_to_be_matched(tmp_path, scale, factor):
    assert arguments(tmp_path, teacher_scale=scale).teacher_factor() == factor


# ---- Workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "processes", "workers"), [(16, "1", 4), (16, "8", 2), (2, "8", 1), (3, None, 3)])
def test_default_workers_share_the_cores_of_a_machine(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert default_workers() == workers


def test_on_the_cpu_batches_are_made_by_the_process_that_trains(tmp_path):
    assert arguments(tmp_path).dataloader_num_workers == 0
    assert arguments(tmp_path, dataloader_num_workers=2).dataloader_num_workers == 2
    assert not arguments(tmp_path).accelerator_config.non_blocking


# ---- The output folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [None, "true", "false"])
def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path, resume):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert arguments(tmp_path / name, resume_from_checkpoint=resume).checkpoint_to_resume() is None


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    checkpoint = add_checkpoint(tmp_path, 10)
    with pytest.raises(FileExistsError, match=r"is not empty.*--resume-from-checkpoint true.*--overwrite"):
        arguments(tmp_path).checkpoint_to_resume()
    assert (checkpoint / "trainer_state.json").is_file()


def test_overwrite_starts_afresh_without_earlier_checkpoints(tmp_path):
    add_checkpoint(tmp_path, 10)
    (tmp_path / "notes.txt").write_text("mine")
    assert arguments(tmp_path, overwrite=True).checkpoint_to_resume() is None
    # Else a later resume would take the longer run's last checkpoint; what training did not write stays.
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    add_checkpoint(tmp_path, 9)
    last = add_checkpoint(tmp_path, 10)  # the last by step, not by name
    assert arguments(tmp_path, resume_from_checkpoint="true").checkpoint_to_resume() == str(last)


def test_resume_true_starts_afresh_without_a_checkpoint(tmp_path):
    (tmp_path / "log.txt").write_text("begun")
    assert arguments(tmp_path, resume_from_checkpoint="true").checkpoint_to_resume() is None
    assert (tmp_path / "log.txt").is_file()


def test_resume_from_a_named_checkpoint_takes_it(tmp_path):
    checkpoint = add_checkpoint(tmp_path, 9)
    add_checkpoint(tmp_path, 10)
    assert arguments(tmp_path, resume_from_checkpoint=str(checkpoint)).checkpoint_to_resume() == str(checkpoint)


def test_resume_from_another_folder_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"elsewhere is not a checkpoint: it has no trainer_state\.json"):
        arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "elsewhere")).checkpoint_to_resume()


def test_resume_true_may_be_a_boolean(tmp_path):
    last = add_checkpoint(tmp_path, 10)
    assert arguments(tmp_path, resume_from_checkpoint=True).checkpoint_to_resume() == str(last)
