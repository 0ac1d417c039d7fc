"""The options of `distill`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from ..artifacts import existing_file
from ..data.tables import read_lines
from ..evaluation.metrics import parse_measures
from ..losses import IN_BATCH, LOSSES, get_losses
from ..models import ARCHITECTURES
from ..training.job import json_option

SPLITS = ("train", "dev", "test")
NO_TEACHER, FIRST_TEACHER, TEACHER = CONDITIONS = ("no_teacher", "first_teacher", "teacher")
BM25 = "bm25"  # as a teacher: the scores of the candidates
# Settings of single architectures. Fresh layers learn faster than the encoder, and TK has no others.
ARCHITECTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "bert_cat": {"head_learning_rate": 1e-3},
    "colbert": {"compression_dim": 128, "head_learning_rate": 1e-3},
    "prettr": {"head_learning_rate": 1e-3},
    "tk": {"learning_rates": [3e-4, 1e-3]},
}


@dataclass
class DistillJob:
    """A collection, teachers or their scores, and what the ranker should be; the options of `distill`.

    Rows of scores bring their own training queries, and all judged queries are held out. Without judgments a query's
    positives are the teachers' best candidates, and rankers are measured by their agreement with the teachers.
    """

    collection: str = HfArg(help="Documents: id<TAB>text, JSON lines, or a text store.")
    queries: str = HfArg(help="Queries: id<TAB>text, JSON lines, or a text store.")
    output: str = HfArg(help="Folder of all steps, of the report and of the best ranker.")
    teachers: list[str] = HfArg(
        default_factory=list,
        help="Teachers: rankers, cross-encoders or bi-encoders; architectures, which are first trained on the labels "
        "of the triples; or bm25. With more than one, students learn the mean of the standardised scores.",
        aliases=["--teacher"],
    )
    scores: list[str] = HfArg(
        default_factory=list,
        help="Files of teacher scores, in place of teachers: rows of triples as published, or TREC runs.",
    )
    qrels: str | None = HfArg(default=None, help="Judgments; without them agreement with the teachers is measured.")
    dev_qrels: str | None = HfArg(default=None, help="Judgments of the validation (dev) queries.")
    test_qrels: str | None = HfArg(default=None, help="Judgments of the test queries.")
    model_name: str = HfArg(default="distilbert/distilbert-base-uncased", help="Encoder of the students.")
    architectures: list[str] = HfArg(
        default_factory=lambda: ["bert_dot", "colbert"], help=f"Architectures to train: {', '.join(ARCHITECTURES)}."
    )
    conditions: list[str] = HfArg(
        default_factory=lambda: [NO_TEACHER, TEACHER],
        help=f"Conditions to train each architecture under ({', '.join(CONDITIONS)}): from the labels only, from the "
        "first teacher, from the mean of all teachers.",
    )
    loss: str = HfArg(default="margin_mse", help="Loss with a teacher; without one it is RankNet on the labels.")
    budget_ms: float | None = HfArg(default=None, help="Longest median latency of the chosen ranker, ms per query.")
    k: int = HfArg(default=100, help="Number of BM25 candidates per query.")
    triples_per_query: int = HfArg(default=8, help="Number of triples that are sampled per query.")
    held_out: float = HfArg(default=0.2, help="Share of the queries for validation and the test, half for each.")
    measure: str = HfArg(default="nDCG@10", help="Measure that decides, in ir_measures' notation.")
    learning_rates: list[float] = HfArg(
        default_factory=lambda: [2e-5, 7e-5],
        help="Learning rates, tried on the validation queries under every condition; TK has 3e-4 and 1e-3.",
    )
    epochs: float = HfArg(default=1, help="Epochs of each training; the best on the validation queries is kept.")
    seeds: int = HfArg(default=1, help="Number of trainings of each chosen student; figures are their means.")
    batch_size: int = HfArg(default=32, help="Triples per step.")
    bf16: bool = HfArg(default=False, help="Training in bfloat16 mixed precision, for GPUs.")
    max_query_length: int = HfArg(default=30, help="Longest query in tokens.")
    max_document_length: int = HfArg(default=200, help="Longest document in tokens.")
    overrides: dict | str | None = HfArg(
        default=None,
        help="JSON: settings of single architectures, or of 'teacher' for trained ones: learning_rates, epochs, "
        "head_learning_rate, layers (those that are kept of the encoder), or fields of the config.",
    )
    base_model: str | None = HfArg(default=None, help="Name of the encoder on the Hub, for cards.")
    data_name: str | None = HfArg(default=None, help="Name of the collection, for cards; None is its file's name.")
    retrieve: bool = HfArg(default=True, help="Search the whole collection with rankers of one vector per passage.")
    device: str | None = HfArg(default=None, help="Device: cpu or cuda; a GPU if there is one and none is given.")
    force: bool = HfArg(default=False, help="Continue although the teacher ranks no better than BM25.")

    def __post_init__(self) -> None:
        self.overrides = json_option("overrides", self.overrides)

    @property
    def brings_rows(self) -> bool:
        """True if the scores are rows of triples, which are trained on as they are."""
        return bool(self.scores) and not is_run(self.scores[0])

    @property
    def collection_name(self) -> str:
        """Name of the collection, for cards."""
        return self.data_name or Path(self.collection).name

    def training_options(self, architecture: str, is_teacher: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return how an architecture (or a teacher) is trained, and the fields of its config that are set."""
        own = self.overrides.get("teacher" if is_teacher else architecture, {})
        config = {**ARCHITECTURE_SETTINGS.get(architecture, {}), **own}
        options = {"learning_rates": config.pop("learning_rates", self.learning_rates)}
        options["epochs"] = float(config.pop("epochs", self.epochs))  # 2 and 2.0 have the same digest
        options["head_learning_rate"] = config.pop("head_learning_rate", None)
        return options, config

    def check(self) -> None:
        """Check the options before anything is read, or raise a ValueError that names what cannot work."""
        self._check_names()
        self._check_sources()
        self._check_numbers()
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a GPU that torch can use, and there is none.")
        best = Path(self.output, "best")
        if best.exists() and not (best / "manifest.json").is_file():
            raise ValueError(f"{best} does not hold a ranker of an earlier call; give another output folder.")

    def _check_names(self) -> None:
        known_names = {
            "architectures": (self.architectures, ARCHITECTURES),
            "conditions": (self.conditions, CONDITIONS),
            "overrides": (self.overrides, (*ARCHITECTURES, "teacher")),
        }
        for option, (names, known) in known_names.items():
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"Unknown {option} {', '.join(unknown)}; there are {', '.join(known)}.")
        parse_measures([self.measure])
        for name in get_losses(self.loss):
            if name.startswith(IN_BATCH) or LOSSES[name].needs_lists:
                raise ValueError(f"distill trains on pairs; {name} needs more: use `train`.")
        for name, own in self.overrides.items():
            rates = own.get("learning_rates", [0.0]) if isinstance(own, dict) else None
            if not isinstance(rates, list) or not rates:
                raise ValueError(f"overrides of {name} must be an object, its learning_rates a list; got {own!r}.")

    def _check_sources(self) -> None:
        for path in self.scores:
            if {".jsonl", ".json"} & set(Path(path).suffixes):
                raise ValueError(f"Scores are rows of triples or TREC runs; {path} holds lists.")
        sources = self.teachers or self.scores
        if not (sources and self.architectures and self.conditions and self.learning_rates):
            raise ValueError("Distilling needs a teacher or scores, an architecture, a condition and a learning rate.")
        if self.teachers and self.scores:
            raise ValueError("Give teachers, or files of their scores, not both.")
        if FIRST_TEACHER in self.conditions and len(sources) == 1:
            raise ValueError(f"The condition {FIRST_TEACHER} needs several teachers; a single one is {TEACHER}.")
        if len({is_run(path) for path in self.scores}) > 1:
            raise ValueError("Scores are all rows of triples, or all TREC runs; ensembles of both need one form.")
        if self.qrels is None and (self.brings_rows or self.dev_qrels or self.test_qrels):
            raise ValueError("Give --qrels too: rows of scores and other judgments leave open what is held out.")
        if self.qrels is None and set(self.teachers) & set(ARCHITECTURES):
            raise ValueError("A teacher is trained on judgments: give --qrels, or a teacher that is trained.")

    def _check_numbers(self) -> None:
        names = ("k", "triples_per_query", "seeds", "batch_size", "max_query_length", "max_document_length", "epochs")
        low = [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) <= 0]
        if low:
            raise ValueError(f"Options must be above 0, got {', '.join(low)}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share of the queries between 0 and 1, got {self.held_out}.")


def is_run(path: str | Path) -> bool:
    """Return whether a file of scores is a TREC run, which has six columns; a row of a triple has five."""
    if Path(path).suffix == ".parquet":
        return False
    widths = (len(text.split()) for _, text in read_lines(existing_file(path, "scores")))
    return next(filter(None, widths), 0) == 6
