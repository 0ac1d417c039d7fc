"""The options of `distill`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from ..artifacts import existing_file
from ..data.tables import first_line
from ..errors import InputError
from ..evaluation.metrics import parse_measures
from ..losses import IN_BATCH, get_losses
from ..models import ARCHITECTURES
from ..retrieval.base import INDEX_NAMES
from ..teachers.generators import FALLBACKS, FIRST_SENTENCE
from ..teachers.sample import RELATIVE_MARGIN, SAMPLINGS
from ..training.job import json_option

SPLITS = ("train", "dev", "test")
NO_TEACHER, FIRST_TEACHER, TEACHER = CONDITIONS = ("no_teacher", "first_teacher", "teacher")
BM25 = "bm25"  # as a teacher, and as a source of candidates
SOURCES = (BM25, "candidates", "dense")
RERANK, SEARCH = PURPOSES = ("rerank", "search")
FLOAT32, INT8 = PRECISIONS = ("float32", "int8")
# Settings of single architectures. Fresh layers learn faster than the encoder, and TK and TKL have no others.
ARCHITECTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "bert_cat": {"head_learning_rate": 1e-3},
    "colbert": {"compression_dim": 128, "head_learning_rate": 1e-3},
    "prettr": {"head_learning_rate": 1e-3},
    "splade": {
        "document_top_k": 200,
        "head_learning_rate": 1e-3,
        "regularization": "flops(query=0.01,document=0.01,warmup=0.3)",
    },
    "tk": {"learning_rates": [3e-4, 1e-3]},
    "tkl": {"learning_rates": [3e-4, 1e-3]},
}


class TargetNotMetError(RuntimeError):
    """A job with good input that cannot reach what was asked for: a weak teacher, or a budget that nothing meets."""


@dataclass
class DistillJob:
    """A collection, teachers or their scores, and what the ranker should be; the options of `distill`.

    Students learn from all queries; judgments serve to choose, to test, as labels and to train teachers. Rows of
    scores bring their own training queries, and all judged queries are held out. Without judgments rankers are
    measured by their agreement with the teachers.

    Example:
        >>> job = kd.DistillJob("collection.tsv", "queries.tsv", "distilled", teachers=["bert_cat"], qrels="qrels.txt")
        >>> job.architectures, job.k
        (['bert_dot', 'colbert'], 100)
    """

    collection: str = HfArg(help="Documents: id<TAB>text, JSON lines, or a text store.")
    queries: str | None = HfArg(
        default=None, help="Queries: id<TAB>text, JSON lines, or a text store; judged or not. Generated if not given."
    )
    output: str = HfArg(default="", help="Folder of all steps, of the report and of the chosen pipeline; needed.")

    # What is taught
    teachers: list[str] = HfArg(
        default_factory=list,
        help="Teachers: rankers, cross-encoders or bi-encoders; architectures, which are first trained on the labels; "
        "or bm25. With more than one, students learn the mean of the standardised scores.",
        aliases=["--teacher"],
    )
    scores: list[str] = HfArg(
        default_factory=list,
        help="Files of teacher scores, in place of teachers: rows of triples as published, or TREC runs.",
    )
    qrels: str | None = HfArg(default=None, help="Judgments of any queries; a share of those is held out.")
    dev_qrels: str | None = HfArg(default=None, help="Judgments of the validation (dev) queries.")
    test_qrels: str | None = HfArg(default=None, help="Judgments of the test queries.")
    minimum_grade: int = HfArg(default=1, help="Lowest grade of a positive of the training lists.")
    held_out: float = HfArg(default=0.2, help="Share of the judged queries for validation and test, half for each.")
    train_queries: int | None = HfArg(default=None, help="Largest number of training queries; all if not given.")

    # Queries that are generated
    query_generator: str | None = HfArg(
        default=None,
        help="Generator of the training queries: a language model, the address of a chat endpoint, an output of "
        f"`teacher queries`, or, both weak, {' or '.join(FALLBACKS)}; without --queries by default {FIRST_SENTENCE}. "
        "What is measured on stays what --dev-qrels and --test-qrels name.",
    )
    queries_per_document: int = HfArg(default=3, help="Largest number of generated queries per document.")
    query_documents: int = HfArg(default=5_000, help="Largest number of documents that queries are generated for.")

    # Which lists of documents
    candidates: str | None = HfArg(
        default=None, help="Candidates of your own search engine, a TREC run of all queries, in place of BM25's."
    )
    exclude_same_id: bool = HfArg(
        default=False, help="Leave out the document with the id of its query (ArguAna, Quora)."
    )
    sources: list[str] = HfArg(
        default_factory=list,
        help="Sources of training candidates with shares that sum up to 1, such as bm25:0.5 dense:0.5: bm25, "
        "candidates (your run), dense (see --dense-model). By default the candidates that are re-ranked.",
    )
    dense_model: str | None = HfArg(default=None, help="Bi-encoder of the dense source; by default the only teacher.")
    language: str | None = HfArg(
        default=None,
        help="Language of BM25's stems, one of Snowball's, or auto; without it words are indexed as they are.",
    )
    candidate_depth: int = HfArg(default=50, help="Ranks of each source over which training candidates are spread.")
    candidates_per_query: int = HfArg(default=30, help="Training candidates per query that the teacher scores.")
    documents: int = HfArg(default=4, help="Documents of a training list, the positive first.")
    lists_per_query: int = HfArg(default=1, help="Training lists per query.", aliases=["--triples-per-query"])
    sampling: str = HfArg(
        default="stratified", help=f"Negatives of a list, by the teacher's scores: {', '.join(SAMPLINGS)}."
    )
    relative_margin: float = HfArg(
        default=RELATIVE_MARGIN,
        help="Negatives have at most this share of their positive's teacher score.",
    )
    rounds: int = HfArg(default=1, help="2 mines the collection with the best student and trains once more.")

    # How it is taught
    model_name: str = HfArg(default="distilbert/distilbert-base-uncased", help="Encoder of the students.")
    architectures: list[str] = HfArg(
        default_factory=lambda: ["bert_dot", "colbert"], help=f"Architectures to train: {', '.join(ARCHITECTURES)}."
    )
    layer_counts: list[int] = HfArg(
        default_factory=list, help="Numbers of encoder layers that students keep, evenly spread; all by default."
    )
    conditions: list[str] = HfArg(
        default_factory=list,
        help=f"Conditions to train each architecture under ({', '.join(CONDITIONS)}): from the labels only, from the "
        "first teacher, from the mean of all teachers. By default teacher, and no_teacher if there are labels.",
    )
    loss: str | None = HfArg(
        default=None,
        help="Loss with a teacher; without one it is RankNet on the labels. The default is in_batch_kl_div if the "
        "student, neither bert_cat nor prettr, and the only teacher encode queries and documents separately, else "
        "margin_mse.",
    )
    learning_rates: list[float] = HfArg(
        default_factory=lambda: [5e-5, 1.5e-4],
        help="Learning rates, tried on the validation queries under every condition; TK and TKL have 3e-4 and 1e-3.",
    )
    epochs: float = HfArg(default=1, help="Epochs of each training; the best on the validation queries is kept.")
    evaluations: int = HfArg(default=1, help="Evaluations on dev per training; the best checkpoint is kept.")
    patience: int | None = HfArg(default=None, help="Stop a training after so many evaluations without a gain.")
    seeds: int = HfArg(default=1, help="Number of trainings of each chosen student; the best on dev is delivered.")
    batch_size: int = HfArg(default=16, help="Lists per step, over all processes.")
    bf16: bool = HfArg(default=False, help="Training in bfloat16 mixed precision.")
    max_query_length: int = HfArg(default=30, help="Longest query in tokens.")
    max_document_length: int = HfArg(default=200, help="Longest document in tokens.")
    teacher_batch_size: int = HfArg(default=32, help="Pairs per forward pass of a teacher.")
    teacher_bf16: bool | None = HfArg(default=None, help="Teachers score in bfloat16; default: on GPUs that have it.")
    overrides: dict | str | None = HfArg(
        default=None,
        help="JSON: settings of single architectures, or of 'teacher' for trained ones: learning_rates, epochs, "
        "head_learning_rate, layers (those that are kept of the encoder), regularization (penalties that are added to "
        "the loss of a splade), or fields of the config.",
    )

    # What is chosen
    purpose: str = HfArg(
        default=RERANK,
        help="Re-rank the candidates (rerank), or search the whole collection (search).",
    )
    measure: str = HfArg(default="nDCG@10", help="Measure that decides, in ir_measures' notation.")
    k: int = HfArg(default=100, help="Number of candidates per query, the largest depth.")
    depths: list[int] = HfArg(default_factory=list, help="Depths of re-ranking to choose from; k and k/2 by default.")
    precisions: list[str] = HfArg(
        default_factory=lambda: [FLOAT32],
        help=f"Precisions to choose from: {', '.join(PRECISIONS)} (ONNX, for rankers that read both texts at once).",
    )
    fusion: bool = HfArg(default=True, help="Try sums with the candidates' own scores; the weight is fitted on dev.")
    budget_ms: float | None = HfArg(
        default=None, help="Longest median latency of the chosen pipeline, ms per query, first stage included."
    )
    store_vectors: bool = HfArg(default=True, help="Deliver stored vectors of the collection if the ranker has them.")

    # Names and resources
    base_model: str | None = HfArg(default=None, help="Name of the encoder on the Hub, for cards.")
    data_name: str | None = HfArg(default=None, help="Name of the collection, for cards; None is its file's name.")
    device: str | None = HfArg(default=None, help="Device: cpu or cuda; a GPU if there is one and none is given.")
    parallel: int = HfArg(
        default=1, help="Independent trainings side by side, on several devices or cores of this machine."
    )
    force: bool = HfArg(default=False, help="Continue although the teacher ranks no better than the candidates.")

    def __post_init__(self) -> None:
        self.overrides = json_option("overrides", self.overrides)

    @property
    def brings_rows(self) -> bool:
        """True if the scores are rows of triples, which are trained on as they are."""
        return bool(self.scores) and not is_run(self.scores[0])

    @property
    def is_judged(self) -> bool:
        """True if there are judgments of any queries."""
        return not self.qrels == self.dev_qrels == self.test_qrels is None

    @property
    def synthetic_splits(self) -> list[str]:
        """Splits whose queries are generated."""
        if self.query_generator is None:
            return []
        given = {"dev": self.dev_qrels, "test": self.test_qrels}  # training queries are always generated
        return [split for split in SPLITS if given.get(split) is None]

    @property
    def agreement_splits(self) -> list[str]:
        """Splits that are measured by the agreement with the teachers: they have no judgments that people made."""
        if not self.is_judged:
            return ["dev", "test"]
        return self.synthetic_splits[1:]

    def data_of(self, split: str) -> str:
        """Return the name of the data of a split, for cards."""
        name = self.data_name or Path(self.collection).name
        if split in self.synthetic_splits:
            return f"{name} (synthetic queries)"
        return name

    @property
    def shares(self) -> dict[str, float]:
        """Source of training candidates -> its share."""
        if not self.sources:
            return {BM25 if self.candidates is None else "candidates": 1.0}
        shares = {}
        for text in self.sources:
            name, _, share = text.partition(":")
            try:
                shares[name] = float(share or 1)
            except ValueError:
                raise InputError(f"The share of the source {name} must be a number, got {share!r}.") from None
        return shares

    @property
    def tried_depths(self) -> list[int]:
        """Depths of re-ranking to choose from, ascending; k is one of them."""
        depths = self.depths or [max(self.k // 2, 1)]
        return sorted({*depths, self.k})

    def training_options(self, architecture: str, is_teacher: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return how an architecture (or a teacher) is trained, and the fields of its config that are set."""
        own = self.overrides.get("teacher" if is_teacher else architecture, {})
        config = {**ARCHITECTURE_SETTINGS.get(architecture, {}), **own}
        options = {"learning_rates": config.pop("learning_rates", self.learning_rates)}
        options["epochs"] = float(config.pop("epochs", self.epochs))  # 2 and 2.0 have the same digest
        options["head_learning_rate"] = config.pop("head_learning_rate", None)
        options["regularization"] = config.pop("regularization", None)
        return options, config

    def check(self) -> None:
        """Check the options before anything is read, or raise an InputError that names what cannot work."""
        if not self.output:
            raise InputError("Give --output, the folder of all steps and of the chosen pipeline.")
        self._check_names()
        self._check_sources()
        self._check_judgments()
        self._check_numbers()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda needs a GPU that torch can use, and there is none.")
        best = Path(self.output, "best")
        if best.exists() and not (best / "pipeline.json").is_file():
            raise InputError(f"{best} does not hold a pipeline of an earlier call; give another output folder.")

    def _check_names(self) -> None:
        known_names = {
            "architectures": (self.architectures, ARCHITECTURES),
            "conditions": (self.conditions, CONDITIONS),
            "overrides": (self.overrides, (*ARCHITECTURES, "teacher")),
            "sources": (self.shares, SOURCES),
            "sampling": ([self.sampling], SAMPLINGS),
            "purpose": ([self.purpose], PURPOSES),
            "precisions": (self.precisions, PRECISIONS),
            "device": ([self.device or "cpu"], ("cpu", "cuda")),
        }
        for option, (names, known) in known_names.items():
            unknown = [name for name in names if name not in known]
            if unknown:
                raise InputError(f"Unknown {option} {', '.join(unknown)}; there are {', '.join(known)}.")
        parse_measures([self.measure])
        for name, own in self.overrides.items():
            rates = own.get("learning_rates", [0.0]) if isinstance(own, dict) else None
            if not isinstance(rates, list) or not rates:
                raise InputError(f"overrides of {name} must be an object, its learning_rates a list; got {own!r}.")
        if INT8 in self.precisions and "bert_cat" not in self.architectures:
            raise InputError(
                "The precision int8 is for bert_cat: the others compare vectors that are stored in float32."
            )
        if INT8 in self.precisions and self.overrides.get("bert_cat", {}).get("passage_length") is not None:
            raise InputError("The precision int8 reads a pair as one sequence; leave out passage_length of bert_cat.")
        separate = [name for name in self.architectures if can_search(name)]
        if self.purpose == SEARCH and len(separate) < len(self.architectures):
            raise InputError("Only bert_dot, colbert and splade search a collection; leave out other architectures.")
        if self.rounds > 1 and not separate:
            raise InputError("A second round needs a bert_dot, colbert or splade that mines the collection.")
        if self.loss is None:
            return
        in_batch = [name for name in get_losses(self.loss) if name.startswith(IN_BATCH)]
        joint = [name for name in self.architectures if ARCHITECTURES[name].config_class.vectors_per_text == "none"]
        if in_batch and joint:
            raise InputError(
                f"{in_batch[0]} scores documents of other queries, which a {joint[0]} cannot: it reads both texts "
                "at once. Leave out the loss or the architecture."
            )

    def _check_sources(self) -> None:
        for path in self.scores:
            if {".jsonl", ".json"} & set(Path(path).suffixes):
                raise InputError(f"Scores are rows of triples or TREC runs; {path} holds lists.")
        sources = self.teachers or self.scores
        if not (sources and self.architectures and self.learning_rates):
            raise InputError("Distilling needs a teacher or scores, an architecture and a learning rate.")
        if self.teachers and self.scores:
            raise InputError("Give teachers, or files of their scores, not both.")
        if FIRST_TEACHER in self.conditions and len(sources) == 1:
            raise InputError(f"The condition {FIRST_TEACHER} needs several teachers; a single one is {TEACHER}.")
        if len({is_run(path) for path in self.scores}) > 1:
            raise InputError("Scores are all rows of triples, or all TREC runs; ensembles of both need one form.")
        total = sum(self.shares.values())
        if abs(total - 1) > 1e-3 or min(self.shares.values()) <= 0:
            raise InputError(f"The shares of the sources must be above 0 and sum up to 1, got {total:g} in all.")
        if self.rounds > 1 and self.scores:
            raise InputError("A second round needs teachers that score what is mined; files of scores cannot.")
        if "candidates" in self.shares and self.candidates is None:
            raise InputError("The source candidates is the run of --candidates, which is not given.")

    def _check_judgments(self) -> None:
        if not self.is_judged and self.brings_rows:
            raise InputError("Rows of scores need judgments of other queries: give --qrels, or --dev-qrels with test.")
        is_generated = self.query_generator is not None
        if not is_generated and self.qrels is None and (self.dev_qrels is None) != (self.test_qrels is None):
            raise InputError("Give --dev-qrels and --test-qrels, or --qrels for what is missing.")
        if self.qrels is None and set(self.teachers) & set(ARCHITECTURES):
            raise InputError("A teacher is trained on judgments: give --qrels, or a teacher that is trained.")
        if self.agreement_splits and self.teachers == [BM25]:
            raise InputError("The teacher bm25 needs judgments: without them BM25 would be measured against itself.")

    def _check_numbers(self) -> None:
        low = []
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and value <= 0:
                low.append(f"{field.name} {value}")
        if low:
            raise InputError(f"Options must be above 0, got {', '.join(low)}.")
        if self.patience is not None and max(self.evaluations, self.epochs) <= 1:
            raise InputError(f"patience {self.patience} needs several evaluations of a training; raise --evaluations.")
        if self.documents < 2:
            raise InputError(f"A training list has at least two documents, got documents {self.documents}.")
        for name in ("held_out", "relative_margin"):
            if not 0 < getattr(self, name) <= 1 or self.held_out == 1:
                raise InputError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        wrong = [depth for depth in self.depths if not 1 <= depth <= self.k]
        if wrong:
            raise InputError(f"Depths lie between 1 and k, {self.k}; got {', '.join(map(str, wrong))}.")


def can_search(architecture: str) -> bool:
    """Return whether an index can search the vectors of an architecture."""
    config = ARCHITECTURES[architecture].config_class
    return (config.vectors_per_text, config.similarity) in INDEX_NAMES


def is_run(path: str | Path) -> bool:
    """Return whether a file of scores is a TREC run, which has six columns; a row of a triple has five."""
    if Path(path).suffix == ".parquet":
        return False
    return len(first_line(existing_file(path, "scores")).split()) == 6
