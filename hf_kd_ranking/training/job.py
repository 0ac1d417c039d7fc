"""The main job in one call: files in, a distilled ranker with its card and results out."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.hf_argparser import HfArg

from ..artifacts import writing
from ..data.rows import load_teacher_scores
from ..data.runs import read_qrels, read_run, write_run
from ..data.texts import TextStore
from ..evaluation.metrics import DEFAULT_MEASURES, evaluate_queries
from ..evaluation.rerank import RerankingEvaluator
from ..evaluation.significance import compare_with_first_stage
from ..hub.manifest import measures_of
from ..models import ARCHITECTURES, RankerModel, load_ranker
from ..ranker import Ranker, load_tokenizer
from .arguments import RankingTrainingArguments
from .topics import saved_clusters
from .trainer import RankingTrainer


@dataclass
class TrainingJob:
    """What is trained on what: the paths and the student. How it is trained is in `RankingTrainingArguments`."""

    model_name: str | None = HfArg(default=None, help="An encoder, or a ranker to train further.")
    architecture: str | None = HfArg(default=None, help=f"{', '.join(ARCHITECTURES)}; for an encoder.")
    layers: list[int] | None = HfArg(default=None, help="Encoder layers the student keeps; all if unset.")
    config_overrides: dict | str | None = HfArg(
        default=None, help="Fields of the architecture's config as JSON, for example '{\"compression_dim\": 128}'."
    )
    max_query_length: int = HfArg(default=30, help="Tokens; 30 in the paper.")
    max_document_length: int = HfArg(default=200, help="Tokens; 200 in the paper.")
    attn_implementation: str | None = HfArg(
        default=None, help="Attention of the encoder: eager, sdpa, flash_attention_2, ...; best if unset."
    )
    teacher_scores: str | None = HfArg(
        default=None, help="Rows of pos_score neg_score query_id pos_id neg_id (TSV), or lists (JSONL)."
    )
    streaming: bool = HfArg(default=False, help="Read the teacher scores as a stream, shuffled 10,000 at a time.")
    collection: str | None = HfArg(default=None, help="Documents: id<TAB>text, or JSONL.")
    queries: str | None = HfArg(default=None, help="Queries of the teacher scores and of the evaluation.")
    in_batch_teacher: str | None = HfArg(
        default=None, help="A ranker that scores all pairs of a batch, for in_batch_ losses; a ColBERT."
    )
    query_clusters: int | None = HfArg(
        default=None, help="Batches on one topic out of so many (TAS-Balanced); 2000 in the paper."
    )
    cluster_model: str | None = HfArg(
        default=None, help="The BERT_DOT whose query vectors are clustered, for query_clusters."
    )
    candidates: str | None = HfArg(default=None, help="Held-out queries' first stage, a TREC run.")
    qrels: str | None = HfArg(default=None, help="Held-out queries' judgments, TREC qrels.")
    measures: list[str] = HfArg(default_factory=lambda: list(DEFAULT_MEASURES), help="As ir_measures names them.")

    def __post_init__(self) -> None:
        self.config_overrides = json_option("config_overrides", self.config_overrides)

    def check(self) -> None:
        """Say what is missing.

        Raises:
            ValueError: naming the options.
        """
        needed = ("model_name", "teacher_scores", "collection", "queries")
        if missing := [f"--{name}" for name in needed if getattr(self, name) is None]:
            raise ValueError(f"Training needs {', '.join(missing)} as well.")
        if (self.candidates is None) != (self.qrels is None):
            raise ValueError("Evaluation needs both --candidates (a run) and --qrels, or neither.")
        if (self.query_clusters is None) != (self.cluster_model is None):
            raise ValueError("Batches on one topic need both --query_clusters and --cluster_model, or neither.")
        if self.streaming and self.query_clusters is not None:
            raise ValueError("Batches on one topic need all rows at hand; leave --streaming or --query_clusters out.")

    def load_model(self) -> RankerModel:
        """The student as it starts."""
        overrides = self.config_overrides | ({} if self.layers is None else {"layers": self.layers})
        model = load_ranker(
            self.model_name,
            self.architecture,
            max_query_length=self.max_query_length,
            max_document_length=self.max_document_length,
            **overrides,
        )
        if self.attn_implementation is not None:
            model.set_attn_implementation(self.attn_implementation)
        return model


def json_option(name: str, value: dict | str | None) -> dict[str, Any]:
    """An option that is JSON on the command line and a dict in Python; empty where it is not given.

    Raises:
        ValueError: if it is no JSON, or no object.
    """
    if not isinstance(value, str):
        return value or {}
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} is no JSON ({error}): {value!r}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"--{name} must be a JSON object, got {value!r}.")
    return found


def train_ranker(job: TrainingJob, args: RankingTrainingArguments, is_measured_before: bool = True) -> dict[str, Any]:
    """Run a job: train, evaluate before and after, save the ranker, card, manifest, `results.json` and run.

    Args:
        is_measured_before: False leaves out the evaluation before training, where many students begin alike.

    Returns:
        What `results.json` holds: `first_stage`, `before`, `after` (measures), `tests` (of after against the first
        stage), `training`, `job`.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: for bad input, before anything is written.
        SystemExit: after SIGTERM, with a checkpoint saved and nothing else.
    """
    job.check()
    checkpoint = args.checkpoint_to_resume()
    set_seed(args.seed)  # the student's new layers are random
    trainer = _make_trainer(job, args, is_new=checkpoint is None)
    evaluator = trainer.evaluator
    is_measured_before = is_measured_before and evaluator is not None and checkpoint is None
    before = trainer.evaluate() if is_measured_before else {}
    training = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.termination.is_asked:
        raise SystemExit(
            f"Stopped by SIGTERM at step {trainer.state.global_step:,} with a checkpoint in {args.output_dir}; the "
            "same command with --resume_from_checkpoint true goes on."
        )
    after = {} if evaluator is None else _measured_last(trainer) or trainer.evaluate()
    tested = {"first_stage": {}, "tests": {}}
    if evaluator is not None:
        runs = (evaluator.last_run, evaluator.candidates)
        tested = compare_with_first_stage(
            *(evaluate_queries(run, evaluator.qrels, evaluator.measures) for run in runs)
        )
    results = tested | {"before": before, "after": after, "training": training, "job": asdict(job)}
    trainer.save_model(_internal_call=True)  # publishing comes with the card
    trainer.save_state()
    if trainer.is_world_process_zero():
        _write_results(results, trainer)
    files = {name: getattr(job, name) for name in ("teacher_scores", "collection", "queries", "candidates", "qrels")}
    of_card = results | {"before": measures_of(before), "after": measures_of(after)}
    card = {"results": {name: of_card[name] for name in ("first_stage", "before", "after", "tests")}, "files": files}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    return results


def _make_trainer(job: TrainingJob, args: RankingTrainingArguments, is_new: bool) -> RankingTrainer:
    """The job's files opened, its student as it starts."""
    with args.main_process_first():  # one process builds the memory-mapped files, the others open them
        rows = load_teacher_scores(job.teacher_scores, streaming=job.streaming)
        queries, documents = TextStore.from_file(job.queries), TextStore.from_file(job.collection)
    if job.streaming:
        rows = rows.repeat(None).shuffle(args.seed if args.data_seed is None else args.data_seed, buffer_size=10_000)
    evaluator = clusters = None
    if job.candidates is not None:
        candidates, qrels = read_run(job.candidates), read_qrels(job.qrels)
        evaluator = RerankingEvaluator(candidates, qrels, queries, documents, job.measures)
    if job.cluster_model is not None:
        clusters = saved_clusters(
            Ranker.from_pretrained(job.cluster_model, "bert_dot", args.device, args.per_device_eval_batch_size),
            *(queries, rows, job.query_clusters, args),
            is_new=is_new,
        )
    return RankingTrainer(
        job.load_model(),
        args,
        train_dataset=rows,
        queries=queries,
        documents=documents,
        evaluator=evaluator,
        processing_class=load_tokenizer(job.model_name),
        in_batch_teacher=job.in_batch_teacher and Ranker.from_pretrained(job.in_batch_teacher, device=args.device),
        query_clusters=clusters,
    )


def _write_results(results: dict[str, Any], trainer: RankingTrainer) -> None:
    """`results.json`, and the held-out queries' run."""
    output, run = Path(trainer.args.output_dir), trainer.evaluator and trainer.evaluator.last_run
    with writing(output / "results.json") as file:
        json.dump(results, file, indent=2)
    if run is not None:
        (output / "runs").mkdir(exist_ok=True)
        write_run(run, output / "runs" / "held_out.trec", tag=trainer.model.config.model_type)


def _measured_last(trainer: RankingTrainer) -> dict[str, float]:
    """What training measured of the very weights that it ended with; empty where it did not."""
    args, state = trainer.args, trainer.state
    entry = next((entry for entry in reversed(state.log_history) if any(map(_is_measure, entry))), {})
    is_of_the_end = (
        entry.get("step") == state.global_step and trainer.evaluator.last_run is not None
    )  # in this process
    is_kept = not args.load_best_model_at_end or state.best_global_step == state.global_step
    if not is_of_the_end or not is_kept or args.lora_r is not None:  # merged adapters round otherwise
        return {}
    return {name: value for name, value in entry.items() if _is_measure(name)}


def _is_measure(name: str) -> bool:
    return name.startswith("eval_")
