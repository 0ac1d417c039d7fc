"""What is distilled: the options of `distill`, the split of the queries, and the checks before anything runs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from ..artifacts import existing_file
from ..artifacts import file_digest as digest
from ..data.rows import column_batches, load_teacher_scores
from ..data.runs import read_qrels, read_run
from ..data.tables import read_lines
from ..data.texts import TextStore
from ..evaluation.metrics import parse_measures
from ..losses import IN_BATCH, LOSSES, get_losses
from ..models import ARCHITECTURES
from ..training.job import json_option

SPLITS = ("train", "dev", "test")
LEAST_QUERIES = {"train": 8, "dev": 2, "test": 2}
NO_TEACHER, FIRST_TEACHER, TEACHER = CONDITIONS = ("no_teacher", "first_teacher", "teacher")
BM25 = "bm25"  # as a teacher: its scores of the candidates are there
TRAINING_OPTIONS = ("learning_rates", "epochs", "head_learning_rate")
# The paper's ColBERT; layers that are new learn faster than the encoder, and TK has no others.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bert_cat": {"head_learning_rate": 1e-3},
    "colbert": {"compression_dim": 128, "head_learning_rate": 1e-3},
    "prettr": {"head_learning_rate": 1e-3},
    "tk": {"learning_rates": [3e-4, 1e-3]},
}


@dataclass
class DistillJob:
    """A collection, teachers or their scores, and what is wanted of the ranker; the options of `distill`.

    Rows of scores bring their own training queries, and all judged queries are held out. Without judgments a query's
    positives are the teachers' best candidates, and rankers are measured by how well they agree with the teachers.
    """

    collection: str = HfArg(help="Documents: id<TAB>text, JSONL, or a text store.")
    queries: str = HfArg(help="Queries, likewise.")
    output: str = HfArg(help="Folder of all stages, of the report and of the best ranker.")
    teachers: list[str] = HfArg(
        default_factory=list,
        help="Rankers, cross-encoders or bi-encoders, architectures, which are first trained on the labels of "
        "the triples, or bm25; of several, students learn the mean of the standardised scores.",
        aliases=["--teacher"],
    )
    scores: list[str] = HfArg(
        default_factory=list,
        help="In place of teachers, files of their scores: rows of triples as published, or TREC runs.",
    )
    qrels: str | None = HfArg(default=None, help="Judgments; without them agreement with the teachers counts.")
    dev_qrels: str | None = HfArg(
        default=None, help="Of the queries to choose by, in place of a share of those in qrels."
    )
    test_qrels: str | None = HfArg(default=None, help="Of the queries to test on, likewise.")
    model_name: str = HfArg(default="distilbert/distilbert-base-uncased", help="The students' encoder.")
    architectures: list[str] = HfArg(
        default_factory=lambda: ["bert_dot", "colbert"], help=f"To train; of {', '.join(ARCHITECTURES)}."
    )
    conditions: list[str] = HfArg(
        default_factory=lambda: [NO_TEACHER, TEACHER],
        help="To train each under: from the labels alone, by the first teacher, by the mean of all; of "
        f"{', '.join(CONDITIONS)}.",
    )
    loss: str = HfArg(default="margin_mse", help="With a teacher; without one it is RankNet on the labels.")
    budget_ms: float | None = HfArg(default=None, help="The longest that a query may take against the candidates.")
    candidates: int = HfArg(default=100, help="Of BM25, a query.")
    triples_per_query: int = HfArg(default=8, help="That are sampled.")
    held_out: float = HfArg(
        default=0.2, help="Share of the queries for choosing (half of it) and for the test (the other half)."
    )
    measure: str = HfArg(default="nDCG@10", help="That decides, in ir_measures' notation.")
    learning_rates: list[float] = HfArg(
        default_factory=lambda: [2e-5, 7e-5],
        help="Tried on the queries for choosing, under every condition; TK has 3e-4 and 1e-3.",
    )
    epochs: float = HfArg(default=1, help="Of each training; of several the best on the queries for choosing is kept.")
    seeds: int = HfArg(default=1, help="Trainings of each chosen student; figures are their means.")
    batch_size: int = HfArg(default=32, help="Triples a step.")
    bf16: bool = HfArg(default=False, help="Train in bfloat16 mixed precision, for GPUs.")
    max_query_length: int = HfArg(default=30, help="Tokens.")
    max_document_length: int = HfArg(default=200, help="Tokens.")
    overrides: dict | str | None = HfArg(
        default=None,
        help="JSON: for an architecture, or 'teacher' for trained ones, what differs: learning_rates, "
        "epochs, head_learning_rate, or fields of its config, with layers, those that it keeps of the encoder.",
    )
    base_model: str | None = HfArg(
        default=None, help="The encoder's name on the Hub, for cards, where it comes from a folder."
    )
    data_name: str | None = HfArg(default=None, help="Of the collection, for cards; its file's name if unset.")
    retrieve: bool = HfArg(
        default=True, help="Also search the whole collection with rankers that store one vector a passage."
    )
    device: str | None = HfArg(default=None, help="cpu or cuda; a GPU where there is one if unset.")
    force: bool = HfArg(default=False, help="Go on though the teacher ranks no better than BM25.")

    def __post_init__(self) -> None:
        self.overrides = json_option("overrides", self.overrides)

    @property
    def brings_rows(self) -> bool:
        """Whether the scores are rows of triples, which are trained on as they are."""
        return bool(self.scores) and not _is_run(self.scores[0])

    def read_judgments(self) -> dict[str, dict[str, int]]:
        """All judgments; empty where there are none."""
        files = [path for path in (self.qrels, self.dev_qrels, self.test_qrels) if path is not None]
        return {query_id: grades for path in files for query_id, grades in read_qrels(path).items()}

    def split_queries(self, judgments: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]]:
        """ "train", "dev" and "test" -> query ids in their order, of judged queries where there are judgments.

        A query's split depends on a digest of its id, so that it stays where it is when others come.

        Raises:
            ValueError, FileNotFoundError: naming what cannot work.
        """
        self._check_options()
        ids = [str(query_id) for query_id, _ in TextStore.from_file(self.queries).items()]
        if self.qrels is not None:
            ids = [query_id for query_id in ids if any(grade > 0 for grade in judgments.get(query_id, {}).values())]
        elif self.scores:  # what a run lacks it cannot judge
            runs = [read_run(path) for path in self.scores]
            ids = [query_id for query_id in ids if all(query_id in run for run in runs)]
        given = {split: path for split, path in (("dev", self.dev_qrels), ("test", self.test_qrels)) if path}
        split_of = {query_id: split for split, path in given.items() for query_id in read_qrels(path)}
        trained = self._queries_of_rows() if self.brings_rows else None
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for query_id in ids:
            if trained is not None and query_id in trained:
                splits["train"].append(query_id)
                continue
            share = self.held_out if trained is None else 1.0
            split = split_of.get(query_id) or _split_by_digest(query_id, share, given)
            if trained is None or split != "train":
                splits[split].append(query_id)
        if trained is not None and not splits["train"]:
            raise ValueError(f"None of the {len(trained):,} queries of the scores has a text in {self.queries}.")
        least = LEAST_QUERIES | ({"train": 0} if self.brings_rows else {})
        if short := [split for split in SPLITS if len(splits[split]) < least[split]]:
            counts = ", ".join(f"{split} {len(found)} (needed {least[split]})" for split, found in splits.items())
            raise ValueError(
                f"Too few queries{' with a relevant document' if self.qrels else ''} for {' and '.join(short)}: "
                f"{counts}; add queries, or change --held-out."
            )
        return splits

    def _check_options(self) -> None:
        for what, names, known in (
            ("architectures", self.architectures, ARCHITECTURES),
            ("conditions", self.conditions, CONDITIONS),
            ("overrides", self.overrides, (*ARCHITECTURES, "teacher")),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"Unknown {what} {', '.join(unknown)}; there are {', '.join(known)}.")
        parse_measures([self.measure])
        if wide := [name for name in get_losses(self.loss) if name.startswith(IN_BATCH) or LOSSES[name].needs_lists]:
            raise ValueError(f"distill trains on pairs, each by itself; {', '.join(wide)} needs more: use `train`.")
        if lists := [path for path in self.scores if {".jsonl", ".json"} & set(Path(path).suffixes)]:
            raise ValueError(f"Scores are rows of triples or TREC runs; {lists[0]} holds lists.")
        sources = self.teachers or self.scores
        if not (sources and self.architectures and self.conditions and self.learning_rates):
            raise ValueError("Distilling needs a teacher or scores, an architecture, a condition and a learning rate.")
        for name, own in self.overrides.items():
            rates = own.get("learning_rates", [0.0]) if isinstance(own, dict) else None
            if not isinstance(rates, list) or not rates:
                raise ValueError(f"overrides of {name} must be an object, its learning_rates a list; got {own!r}.")
        if self.teachers and self.scores:
            raise ValueError("Give teachers, or files of their scores, not both.")
        if FIRST_TEACHER in self.conditions and len(sources) == 1:
            raise ValueError(f"The condition {FIRST_TEACHER} needs several teachers; one alone is {TEACHER}.")
        if len({_is_run(path) for path in self.scores}) > 1:
            raise ValueError("Scores are all rows of triples, or all TREC runs; ensembles of both need one form.")
        if self.qrels is None and (self.brings_rows or self.dev_qrels or self.test_qrels):
            raise ValueError("Give --qrels too: rows of scores and other judgments leave open what is held out.")
        if self.qrels is None and set(self.teachers) & set(ARCHITECTURES):
            raise ValueError("A teacher is trained on judgments: give --qrels, or a teacher that is trained.")
        counts = ("candidates", "triples_per_query", "seeds", "batch_size", "max_query_length", "max_document_length")
        if low := [f"{name} {getattr(self, name)}" for name in (*counts, "epochs") if getattr(self, name) <= 0]:
            raise ValueError(f"Options must be above 0, got {', '.join(low)}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share of the queries between 0 and 1, got {self.held_out}.")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is cpu or cuda, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a GPU that torch can use; there is none.")

    def _queries_of_rows(self) -> set[str]:
        rows = load_teacher_scores(self.scores[0])
        return {str(query_id) for batch in column_batches(rows, ["query_id"]) for query_id in set(batch["query_id"])}

    def options_of(self, architecture: str, is_teacher: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """How an architecture is trained, and the fields of its config that are not the default."""
        own = "teacher" if is_teacher else architecture
        special = OVERRIDES.get(architecture, {}) | self.overrides.get(own, {})
        training = {option: special.pop(option) for option in TRAINING_OPTIONS if option in special}
        general = {"learning_rates": self.learning_rates, "epochs": self.epochs, "head_learning_rate": None}
        options = general | training
        options["epochs"] = float(options["epochs"])  # 2 and 2.0 are the same training, by the same digest
        return options, special

    def inputs(self, *names: str) -> dict[str, Any]:
        """Some of the options, files and local models by their digests: what a stage depends on."""
        found = {name: value for name, value in asdict(self).items() if name in names}
        for name in found.keys() & {"collection", "queries", "qrels", "dev_qrels", "test_qrels", "model_name"}:
            found[name] = found[name] and digest_of(found[name])
        if "scores" in found:
            found["scores"] = [digest_of(path) for path in found["scores"]]
        return found


def digest_of(path: str) -> str:
    """A file's sha256; a folder's, of the names and digests in it; a name on the Hub is itself."""
    if not Path(path).exists():
        return path
    if Path(path).is_file():
        return digest(path)
    listing = {str(part.relative_to(path)): digest(part) for part in sorted(Path(path).rglob("*")) if part.is_file()}
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _split_by_digest(query_id: str, held_out: float, given: Mapping[str, str]) -> str:
    """Of what is held out, half is for the test, or all is for the one split that has no judgments of its own."""
    share = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8]) / 2**64
    held = [split for split in ("test", "dev") if split not in given]
    places = [split for place, split in enumerate(held, start=1) if share < held_out * place / len(held)]
    return places[0] if places else "train"


def _is_run(path: str) -> bool:
    """Six columns are a TREC run, five a row of a triple with its scores."""
    lines = (text.split() for _, text in read_lines(existing_file(path, "scores")))
    return Path(path).suffix != ".parquet" and len(next(filter(None, lines), ())) == 6
