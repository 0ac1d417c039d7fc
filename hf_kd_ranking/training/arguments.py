"""Settings of `RankingTrainer`, and the checkpoint that a run resumes."""

import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_tf32_available

from ..errors import InputError
from ..losses import LOSSES, get_losses, get_regularizers
from .checkpoints import last_complete
from .feeding import MOST_WORKERS, default_workers

MATCH = "match"
TARGET = "teacher_scores"
HALF_WEIGHTS = "it leaves the weights in half precision after an evaluation; bf16 evaluates under autocast"
NO_LENGTHS = "rows hold ids, and their texts are read only when a batch is made"
# Settings of transformers that a ranker cannot have, with the reason.
REFUSED = {
    "label_smoothing_factor": "the targets are the teacher's scores and not classes",
    "bf16_full_eval": HALF_WEIGHTS,
    "fp16_full_eval": HALF_WEIGHTS,
    "use_liger_kernel": "Liger has no kernels for rankers",
    "liger_kernel_config": "Liger has no kernels for rankers",
    "use_cache": "a ranker generates no text, so that it has nothing to cache",
    "length_column_name": NO_LENGTHS,
    "enable_jit_checkpoint": "every run already saves a checkpoint on SIGTERM",
    "hub_revision": "rankers are published on the main branch of their repository",
    "debug": "the hooks of transformers fail at the boolean masks of encoders",
    "parallelism_config": "rankers are trained by DDP, FSDP or DeepSpeed",
}


@dataclass
class RankingTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's settings as defaults, and the settings of distillation.

    Defaults that differ from the parent's: `learning_rate` 7e-6, `per_device_train_batch_size` 32,
    `per_device_eval_batch_size` 64, `logging_steps` 50, `dataloader_num_workers` by the device, `tf32` True on GPUs
    that have it, and `restore_callback_states_from_checkpoint` True, without which a resumed run forgets the patience
    of an `EarlyStoppingCallback`. `remove_unused_columns` is always False, because ids and scores are not arguments of
    a model. Settings that make no sense for a ranker are refused, see `REFUSED`.

    Raises:
        InputError: for a value that this class or transformers refuses.

    Example:
        >>> args = kd.RankingTrainingArguments("student", loss="margin_mse", max_steps=150_000)
        >>> args.learning_rate, args.per_device_train_batch_size
        (7e-06, 32)
    """

    learning_rate: float = HfArg(default=7e-6, help="Learning rate of the encoder; 7e-6 in the paper.")
    per_device_train_batch_size: int = HfArg(default=32, help="Queries per device and step.")
    per_device_eval_batch_size: int = HfArg(default=64, help="Texts per device and forward pass.")
    logging_steps: float = HfArg(default=50, help="Steps between log lines (a share of all, below 1).")
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help=f"Processes that make batches; on a GPU up to {MOST_WORKERS} cores per process if unset, else none.",
    )
    remove_unused_columns: bool = HfArg(default=False, help="Must stay False: batches are made from ids.")
    restore_callback_states_from_checkpoint: bool = HfArg(
        default=True, help="Resume the state of callbacks as well, for example the patience of early stopping."
    )

    # Distillation
    loss: str = HfArg(
        default="margin_mse",
        help=f"Loss: {', '.join(LOSSES)}, or in_batch_ followed by one of them; or several with weights, "
        "margin_mse:1,in_batch_margin_mse:0.75; kl_div and info_nce take a temperature, "
        "kl_div(temperature=2):1,in_batch_info_nce(temperature=0.05):0.2. For a SPLADE also flops or l1, "
        "margin_mse,flops(query=0.03,document=0.02,warmup=0.3).",
    )
    teacher_scale: str = HfArg(
        default="1",
        help="Factor on the teacher's scores: 1 is the paper's; a positive number; or 'match', the ratio of "
        "the student's margins to the teacher's on the first batches (root mean squares), measured once.",
    )
    gradient_cache: int | None = HfArg(
        default=None,
        help="Queries, with their documents, that a step runs at once where a loss compares all documents of the "
        "batch: memory is that of so many, gradients are those of the whole batch, and forward passes run twice.",
    )
    head_learning_rate: float | None = HfArg(default=None, help="Learning rate of the layers on top of the encoder.")
    token_cache: bool = HfArg(
        default=True,
        help="Tokenise each text once and keep the ids on disk, if training reads at least as many documents as the "
        "collection has.",
    )
    margin_bins: int = HfArg(default=10, help="Bins of a query's teacher margins, for batches on one topic.")

    early_stopping_patience: int | None = HfArg(
        default=None, help="Evaluations without a gain after which training stops; needs metric_for_best_model."
    )

    # Adapters
    lora_r: int | None = HfArg(default=None, help="Rank of LoRA adapters on the encoder; None trains all weights.")
    lora_alpha: int | None = HfArg(default=None, help="Scale of the adapters times lora_r; None is 2 * lora_r.")

    # Output
    overwrite: bool = HfArg(default=False, help="Train into an output folder that is not empty.")
    data_name: str | None = HfArg(default=None, help="Name of the training data, for the model card.")
    base_model: str | None = HfArg(default=None, help="Hub name of an encoder from a folder, for the card.")
    teacher_name: str | None = HfArg(default=None, help="Name of the teacher, for the card.")

    def __post_init__(self) -> None:
        is_on_cuda = torch.cuda.is_available() and not self.use_cpu
        if self.tf32 is None and is_on_cuda and is_torch_tf32_available():
            self.tf32 = True  # products of float32 on tensor cores, which tf32=False forbids
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers() if is_on_cuda else 0
        has_accelerator_config = self.accelerator_config is not None
        try:
            super().__post_init__()
        except ValueError as error:  # of transformers' own fields
            raise InputError(" ".join(str(error).split())) from error  # some have several lines
        self._refuse_settings()
        get_losses(self.loss)
        get_regularizers(self.loss)
        if self.gradient_cache is not None and self.gradient_cache < 1:
            raise InputError(f"gradient_cache must be at least 1 query, got {self.gradient_cache}.")
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False  # training stops at such a loss, and the filter reads every loss at once
        if not has_accelerator_config:
            self.accelerator_config.non_blocking = is_on_cuda and self.dataloader_pin_memory
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # rankers have none, and the search slows each step down
        self.label_names = [TARGET]
        self.teacher_factor()
        if self.fp16 and self.device.type == "cpu":  # accelerate ignores it there, without a warning
            raise InputError("fp16 needs a GPU, and this run is on the CPU: leave it out, or take bf16.")

    def _refuse_settings(self) -> None:
        for field in fields(TrainingArguments):
            value = getattr(self, field.name)
            if field.name in REFUSED and value and value != field.default:
                raise InputError(f"{field.name} must stay {field.default!r}, got {value!r}: {REFUSED[field.name]}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"train_sampling_strategy is 'random' or 'sequential', got {self.train_sampling_strategy!r}: "
                f"{NO_LENGTHS}."
            )
        if self.accelerator_config.dispatch_batches:
            raise InputError("dispatch_batches joins batches of unlike lengths; leave it out of accelerator_config.")
        if "inputs" in self.include_for_metrics:
            raise InputError(
                "include_for_metrics takes 'loss', got 'inputs': a row has two texts and no single input."
            )
        if self.label_names not in (None, [TARGET]):
            raise InputError(f"label_names must stay unset, got {self.label_names}: the labels are {TARGET}.")

    def check_devices(self) -> None:
        """Raise an InputError if one process would share its batches among several GPUs (DataParallel)."""
        if self.n_gpu > 1:
            raise InputError(
                f"This process sees {self.n_gpu} GPUs and would copy the model to all of them at every step. Start "
                "one process per GPU with `accelerate launch -m hf_kd_ranking train ...` or `accelerate launch "
                "script.py`, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
            )

    def teacher_factor(self) -> float | None:
        """Return `teacher_scale` as a number, or None if it is to be matched; raise an InputError if it is neither."""
        if self.teacher_scale == MATCH:
            return None
        try:
            factor = float(self.teacher_scale)
        except ValueError:
            factor = math.nan
        if not 0 < factor < math.inf:
            raise InputError(f"teacher_scale must be a positive number or {MATCH!r}, got {self.teacher_scale!r}.")
        return factor

    def checkpoint_to_resume(self) -> str | None:
        """Check the output folder before any work, and return the checkpoint to resume, or None for a fresh start.

        `--resume-from-checkpoint true` takes the last complete one, if any; `--overwrite` removes earlier checkpoints.

        Raises:
            FileExistsError: if the folder is not empty and neither option is given.
            FileNotFoundError: if the named folder is not a checkpoint.
        """
        folder = Path(self.output_dir)
        wanted = str(self.resume_from_checkpoint or "")  # Python callers may pass a bool
        if wanted.lower() == "true":
            return last_complete(folder)
        if wanted.lower() not in ("", "false"):
            if not (Path(wanted) / "trainer_state.json").is_file():
                raise FileNotFoundError(f"{wanted} is not a checkpoint: it has no trainer_state.json.")
            return wanted
        with self.main_process_first(local=False):
            if self.process_index == 0 and folder.is_dir() and any(folder.iterdir()):
                if not self.overwrite:
                    raise FileExistsError(
                        f"The output folder {folder} is not empty; give another one, --resume-from-checkpoint true to "
                        "resume, or --overwrite to train into it."
                    )
                for checkpoint in folder.glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
        return None
