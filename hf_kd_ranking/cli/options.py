"""Options that several verbs share, and how their values are read and their results printed."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import is_torch_tf32_available
from transformers.utils.import_utils import enable_tf32

from ..artifacts import has_description, read_description
from ..data.collections import READERS, RankingCollection, load_collection
from ..data.texts import AGGREGATIONS
from ..errors import InputError
from ..models import ARCHITECTURES
from ..ranker import Ranker, default_dtype

Result = dict[str, Any] | tuple[dict[str, Any], str]  # what a verb returns: for programs, and the text for people
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Model = Annotated[str, typer.Option(help="Ranker: a folder or a name on the Hub.")]
FirstStageOrModel = Annotated[str | None, typer.Option("--model", help="Ranker; BM25 if not given.")]
Models = Annotated[list[str], typer.Option("--model", help="Rankers, each PATH or NAME=PATH.")]
Architecture = Annotated[str | None, typer.Option(help=f"Architecture on an encoder: {', '.join(ARCHITECTURES)}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of texts or pairs per forward pass.")]
TokensPerBatch = Annotated[
    int | None, typer.Option(min=1, help="Number of tokens per forward pass, in place of --batch-size.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"Precision: {', '.join(DTYPES)} (fp32 with faster products). Default: bf16 on GPUs, else fp32."
    ),
]
# Optional in verbs that give them the default None: those take --dataset as well.
Queries = Annotated[Path | None, typer.Option(help="Queries: id<TAB>text, JSONL, or a text store.")]
Collection = Annotated[Path | None, typer.Option(help="Documents: id<TAB>text, JSONL, or a text store.")]
Candidates = Annotated[Path | None, typer.Option(help="Candidates of each query: a TREC run.")]
Qrels = Annotated[Path | None, typer.Option(help="Judgments: TREC qrels.")]
Dataset = Annotated[str | None, typer.Option(help="All files: a folder, trec-dl-2019, beir/scifact/test, ...")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Scores = Annotated[Path, typer.Option(help="Teacher rows: TSV, JSONL or Parquet.")]
ScoreFiles = Annotated[list[Path], typer.Option("--scores", help="Files of teacher rows.")]
Runs = Annotated[list[str], typer.Option("--run", help="TREC runs, each PATH or NAME=PATH.")]
Measures = Annotated[list[str], typer.Option("--measure", help="Measures of ir_measures: nDCG@10, RR(rel=2)@10.")]
Aggregation = Annotated[
    str, typer.Option(help=f"Scores of passages to those of documents: {', '.join(AGGREGATIONS)}.")
]
OfPassages = Annotated[
    str | None, typer.Option("--aggregation", help=f"For runs of passages, DOCUMENT#N: {', '.join(AGGREGATIONS)}.")
]
K = Annotated[int, typer.Option(min=1, help="Number of documents per query.")]
Weights = Annotated[list[float] | None, typer.Option(help="Weights, one per file.")]
Language = Annotated[str | None, typer.Option(help="BM25: language of stems and stop words, or auto; default: none.")]
ExcludeSameId = Annotated[bool, typer.Option(help="Leave out the document with the id of its query (ArguAna, Quora).")]
FaissSettings = Annotated[
    str | None, typer.Option("--settings", help="Search settings of a faiss index: nprobe=16, efSearch=128.")
]
Probes = Annotated[int | None, typer.Option(min=1, help="Number of centroids per query token, for a ColBERT.")]
Private = Annotated[bool, typer.Option(help="Make a private repository.")]
Output = Annotated[Path, typer.Option(help="Output; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists.")]
Json = Annotated[bool, typer.Option("--json/--no-json", help="Print the result as one line of JSON.")]


def open_collection(
    dataset: str | None, split: str, optional: Sequence[str] = ("candidates",), **files: Path | None
) -> RankingCollection:
    """Return the data set that a verb's options name, with the files that are given (not None) in place of its own.

    The verb names those of `queries`, `documents`, `qrels` and `candidates` that are its options; without a data set,
    only those of `optional` may be None.
    """
    readers, missing = {}, []
    for name, path in files.items():
        if path is not None:
            readers[name] = partial(READERS[name], path)
        elif name not in optional:
            missing.append("--collection" if name == "documents" else f"--{name}")
    if dataset is not None:
        return load_collection(dataset, split, readers)
    if missing:
        raise InputError(f"Give {', '.join(missing)}, or --dataset.")
    return RankingCollection("files", readers)


def load_ranker(
    model: str,
    architecture: str | None,
    batch_size: int,
    dtype: str | None,
    tokens_per_batch: int | None = None,
    index: Path | None = None,
    must_rank: bool = True,
    **settings: Any,
) -> Ranker:
    """Load the ranker that `--model` and the options beside it name; an InputError refuses untrained layers.

    `must_rank=False` accepts them: such a ranker is as fast as a trained one. Without a dtype it has the precision of
    the vectors in `index`, if they are given: a GPU may have made them.
    """
    precision = torch_dtype(dtype)
    if precision is None and index is not None and has_description(index):
        precision = read_description(index).get("model_dtype")
    settings |= {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "dtype": precision}
    ranker = Ranker.from_pretrained(model, architecture, **settings)
    if must_rank and ranker.model.is_fresh:
        raise InputError(
            f"{model} is not a {architecture} ranker, and a new one on its encoder must be trained before it ranks; "
            "leave the architecture out if the checkpoint is another library's ranker."
        )
    return ranker


def named_paths(values: Sequence[str], description: str) -> dict[str, str]:
    """Return the paths of values PATH or NAME=PATH by name, which is by default that of the file or folder."""
    paths = {}
    for value in values:
        name, path = "", value
        if not Path(value).exists():  # a path may contain an equals sign
            name, _, path = value.rpartition("=")
        if not name:
            name = Path(path).stem if Path(path).is_file() else Path(path).name
        if name in paths:
            raise InputError(f"Two of the {description} are called {name!r}; write NAME=PATH.")
        paths[name] = path
    return paths


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype named by `--dtype`, None for the default; "tf32" is switched on for the process."""
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"--dtype is one of {', '.join(DTYPES)}, got {name!r}.")
    if name == "tf32":
        if not is_torch_tf32_available():
            raise InputError("--dtype tf32 needs a GPU of NVIDIA's Ampere generation or a newer one; take fp32.")
        enable_tf32(True)
    return DTYPES[name]


def default_precision() -> str:
    """Return the name of the precision in which rankers are loaded where `--dtype` is not given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if default_dtype(device) == torch.bfloat16:
        return "bf16"
    return "fp32"


def run_tag(model: str) -> str:
    """Return the tag of a run that a model made: the name of its folder, without spaces."""
    return "_".join(Path(model).resolve().name.split())


def print_result(result: Result | None, as_json: bool) -> None:
    """Print the result of a verb as one line of JSON, or its text; without a text, one line of names and values."""
    if result is None:
        return
    text = None
    if isinstance(result, tuple):
        result, text = result
    if as_json:
        text = json.dumps(result)
    elif text is None:
        values = []
        for name, value in result.items():
            is_number = isinstance(value, int) and not isinstance(value, bool)
            values.append(f"{name} {value:,}" if is_number else f"{name} {value}")
        text = ", ".join(values)
    typer.echo(text)
