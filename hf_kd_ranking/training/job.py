"""Train a ranker from files in one call, or in the steps that `train_ranker` is made of."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.hf_argparser import HfArg

from ..artifacts import write_json
from ..data.rows import load_teacher_scores
from ..data.runs import Run, read_qrels, read_run, write_run
from ..data.texts import TextStore
from ..errors import InputError
from ..evaluation.metrics import DEFAULT_MEASURES, evaluate_queries
from ..evaluation.rerank import RerankingEvaluator
from ..evaluation.significance import compare_with_first_stage
from ..hub.manifest import select_measures
from ..models import ARCHITECTURES, RankerModel, RankingProcessor, Splade, load_ranker
from ..ranker import Ranker, load_tokenizer
from .arguments import RankingTrainingArguments
from .callbacks import TitledProgress
from .topics import saved_clusters
from .trainer import RankingTrainer

CUT_SAMPLE = 1_000  # documents on which it is counted how much of them is cut
FREQUENCY_SAMPLE = 20_000  # documents in which words are counted; every training of `distill` counts again


@dataclass
class TrainingJob:
    """The student and the files of a training. Its settings are in `RankingTrainingArguments`.

    Example:
        >>> job = kd.TrainingJob("distilbert/distilbert-base-uncased", "bert_dot", teacher_scores="scores.tsv")
        >>> job.collection, job.queries = "collection.tsv", "queries.tsv"
    """

    model_name: str | None = HfArg(default=None, help="Encoder, or ranker to train further.")
    architecture: str | None = HfArg(default=None, help=f"Architecture on the encoder: {', '.join(ARCHITECTURES)}.")
    layers: list[int] | None = HfArg(default=None, help="Encoder layers that the student keeps; all if unset.")
    config_overrides: dict | str | None = HfArg(
        default=None, help="Fields of the architecture's config as JSON, for example '{\"compression_dim\": 128}'."
    )
    max_query_length: int = HfArg(default=30, help="Tokens; 30 in the paper.")
    max_document_length: int = HfArg(default=200, help="Tokens; 200 in the paper.")
    attn_implementation: str | None = HfArg(
        default=None, help="Attention: eager, sdpa, flash_attention_2, ...; the best available if unset."
    )
    teacher_scores: str | None = HfArg(
        default=None, help="Rows of pos_score neg_score query_id pos_id neg_id (TSV), or lists (JSONL)."
    )
    collection: str | None = HfArg(default=None, help="Documents: id<TAB>text, or JSONL.")
    queries: str | None = HfArg(default=None, help="Queries of the teacher scores and of the evaluation.")
    in_batch_teacher: str | None = HfArg(default=None, help="Ranker for in_batch_ losses, such as a ColBERT.")
    query_clusters: int | None = HfArg(
        default=None, help="Number of topics, for batches on one topic (TAS-Balanced); 2000 in the paper."
    )
    cluster_model: str | None = HfArg(default=None, help="BERT_DOT whose query vectors query_clusters clusters.")
    candidates: str | None = HfArg(default=None, help="First-stage run (TREC) of held-out queries.")
    qrels: str | None = HfArg(default=None, help="Judgments (TREC qrels) of the held-out queries.")
    measures: list[str] = HfArg(
        default_factory=lambda: list(DEFAULT_MEASURES), help="Measures in ir_measures' notation."
    )

    def __post_init__(self) -> None:
        self.config_overrides = json_option("config_overrides", self.config_overrides)

    def check(self) -> None:
        """Raise an InputError that names the options that the job lacks."""
        required = {"model_name": "--model", "teacher_scores": "--scores"}
        required |= {"collection": "--collection", "queries": "--queries"}
        missing = [option for name, option in required.items() if getattr(self, name) is None]
        if missing:
            raise InputError(f"Training needs {', '.join(missing)} as well.")
        if (self.candidates is None) != (self.qrels is None):
            raise InputError("Evaluation needs both --candidates (a run) and --qrels, or neither.")
        if (self.query_clusters is None) != (self.cluster_model is None):
            raise InputError("Batches on one topic need both --query_clusters and --cluster_model, or neither.")

    def load_model(self) -> RankerModel:
        """Load the student as it starts."""
        overrides = dict(self.config_overrides)
        if self.layers is not None:
            overrides["layers"] = self.layers
        lengths = {"max_query_length": self.max_query_length, "max_document_length": self.max_document_length}
        model = load_ranker(self.model_name, self.architecture, **lengths, **overrides)
        if self.attn_implementation is not None:
            model.set_attn_implementation(self.attn_implementation)
        return model

    def load_evaluator(self, queries: TextStore, documents: TextStore) -> RerankingEvaluator | None:
        """Read candidates and judgments of the held-out queries; None if the job has none."""
        if self.candidates is None:
            return None
        candidates, qrels = read_run(self.candidates), read_qrels(self.qrels)
        return RerankingEvaluator(candidates, qrels, queries, documents, self.measures)

    def load_in_batch_teacher(self, args: RankingTrainingArguments) -> Ranker | None:
        """Load the ranker that scores all pairs of a batch; None if the job has none."""
        if self.in_batch_teacher is None:
            return None
        return Ranker.from_pretrained(self.in_batch_teacher, device=args.device)

    def files(self) -> dict[str, str | None]:
        """Return name -> path of what a training reads, for the card."""
        names = ("teacher_scores", "collection", "queries", "candidates", "qrels")
        return {name: getattr(self, name) for name in names}


def json_option(name: str, value: dict | str | None) -> dict[str, Any]:
    """Return an option that is a JSON object on the command line and a dict in Python; empty if it is not given."""
    if not isinstance(value, str):
        return value or {}
    try:
        options = json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} is not valid JSON ({error}): {value!r}.") from error
    if not isinstance(options, dict):
        raise InputError(f"--{name} must be a JSON object, got {value!r}.")
    return options


def train_ranker(
    job: TrainingJob,
    args: RankingTrainingArguments,
    is_measured_before: bool = True,
    command: Sequence[str] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Run a job: train, evaluate before and after, save the ranker, card, manifest, `results.json` and run.

    Args:
        is_measured_before: False leaves out the evaluation before training, if many students start alike.
        command: the command line, for the card; None if there is none.
        title: title of the progress bar, which then replaces the log lines on the screen; `trainer_state.json` has
            them in any case. None prints them.

    Returns:
        The content of `results.json`: `first_stage`, `before`, `after` (measures), `tests` (of after against the first
        stage), `cuts` (see `sample_cuts`), `training`, `job`.

    Raises:
        InputError, FileNotFoundError, FileExistsError: for bad input, before anything is written.
        SystemExit: after SIGTERM, with a checkpoint saved and nothing else.

    Example:
        >>> files = {"teacher_scores": "scores.tsv", "collection": "collection.tsv", "queries": "queries.tsv"}
        >>> job = kd.TrainingJob("distilbert/distilbert-base-uncased", "bert_dot", **files)
        >>> results = kd.train_ranker(job, kd.RankingTrainingArguments("student", max_steps=2))
        {'loss': ...}
        >>> ranker = kd.Ranker.from_pretrained("student")
    """
    # 1. Arguments
    job.check()
    args.check_devices()
    checkpoint = args.checkpoint_to_resume()
    set_seed(args.seed)  # the student's new layers are random

    # 2. Teacher scores, texts, evaluator, student, trainer
    trainer = _make_trainer(job, args, is_new=checkpoint is None)
    evaluator = trainer.evaluator
    if title is not None:
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(TitledProgress(title))

    # 3. Train, and evaluate before and after
    results: dict[str, Any] = {"first_stage": {}, "tests": {}, "before": {}, "after": {}}
    results["cuts"] = sample_cuts(trainer)
    if is_measured_before and evaluator is not None and checkpoint is None:
        results["before"] = trainer.evaluate()
    results["training"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.termination.is_asked:
        raise SystemExit(
            f"Stopped by SIGTERM at step {trainer.state.global_step:,} with a checkpoint in {args.output_dir}; the "
            "same command with --resume-from-checkpoint true resumes."
        )
    run = None
    if evaluator is not None:
        run = trainer.rerank()
        results |= measure_gain(run, evaluator)
        trainer.log(results["after"])
    results["job"] = asdict(job)

    # 4. Save, write the card, publish
    trainer.save_model(_internal_call=True)  # publishing comes with the card
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_results(results, run, args.output_dir, trainer.model.config.model_type)
    measures = {name: results[name] for name in ("first_stage", "tests", "cuts")}
    for when in ("before", "after"):
        measures[when] = select_measures(results[when], job.measures)
    if args.push_to_hub:
        trainer.push_to_hub(results=measures, files=job.files(), command=command)
    else:
        trainer.create_model_card(results=measures, files=job.files(), command=command)
    return results


def _make_trainer(job: TrainingJob, args: RankingTrainingArguments, is_new: bool) -> RankingTrainer:
    with args.main_process_first():  # one process builds the mapped files, the others open them
        rows = load_teacher_scores(job.teacher_scores)
        queries, documents = TextStore.from_file(job.queries), TextStore.from_file(job.collection)
    data = {"train_dataset": rows, "queries": queries, "documents": documents}
    data["evaluator"] = job.load_evaluator(queries, documents)
    if job.cluster_model is not None:
        encoder = Ranker.from_pretrained(job.cluster_model, "bert_dot", args.device, args.per_device_eval_batch_size)
        data["query_clusters"] = saved_clusters(encoder, queries, rows, job.query_clusters, args, is_new)
    student = load_student(job, documents)
    data["in_batch_teacher"] = job.load_in_batch_teacher(args)
    return RankingTrainer(student.model, args, processing_class=student.tokenizer, **data)


def load_student(job: TrainingJob, documents: TextStore) -> Ranker:
    """Load the student as it starts; a fresh SPLADE's static queries start from the collection's word frequencies."""
    student = Ranker(job.load_model(), load_tokenizer(job.model_name))  # which checks that they belong together
    model = student.model
    if isinstance(model, Splade) and model.is_fresh and model.config.query_encoding == "static":
        sample = np.random.default_rng(0).permutation(len(documents))[:FREQUENCY_SAMPLE]
        frequencies = np.zeros(model.config.encoder_config.vocab_size)
        for start in tqdm(range(0, len(sample), 1_000), desc="Counting words", delay=3):
            texts = documents.take(np.sort(sample[start : start + 1_000]))
            for ids in student.processor.encode(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                frequencies[list(set(ids))] += 1
        model.start_from_idf(torch.from_numpy(frequencies), len(sample))
    return student


def sample_cuts(trainer: RankingTrainer) -> dict[str, float]:
    """Return the shares of documents and tokens that the student does not read, see `Cuts.shares`, from a sample."""
    config, rng = trainer.model.config, np.random.default_rng(0)
    processor = RankingProcessor.from_config(trainer.processing_class, config)
    texts = trainer.documents.take(rng.permutation(len(trainer.documents))[:CUT_SAMPLE])
    if processor.joins_texts:
        processor.pairs(trainer.queries.take(rng.integers(len(trainer.queries), size=len(texts))), texts)
    else:
        processor.documents(texts)
    return processor.cuts.shares(config.max_document_length)


def measure_gain(run: Run, evaluator: RerankingEvaluator) -> dict[str, Any]:
    """Return `after` (eval_MEASURE -> mean of the run), `first_stage` (measure -> mean) and `tests` of the two."""
    after = evaluate_queries(run, evaluator.qrels, evaluator.measures)
    first_stage = evaluate_queries(evaluator.candidates, evaluator.qrels, evaluator.measures)
    results = compare_with_first_stage(after, first_stage)
    results["after"] = {f"eval_{name}": value for name, value in results["after"].items()}
    return results


def write_results(results: dict[str, Any], run: Run | None, folder: str | os.PathLike, tag: str) -> None:
    """Write `results.json`, and the held-out queries' run, if there is one, into `runs/held_out.trec`."""
    output = Path(folder)
    write_json(output / "results.json", results)
    if run is not None:
        (output / "runs").mkdir(exist_ok=True)
        write_run(run, output / "runs" / "held_out.trec", tag=tag)
