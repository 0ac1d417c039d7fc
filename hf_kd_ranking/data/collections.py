"""Load test collections by name: a folder in BEIR's or TREC's layout, the Hub, or ir_datasets (optional)."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import yaml
from huggingface_hub import DatasetCard

from ..errors import InputError
from .caches import CACHE_VERSION, cache_folder
from .runs import Run, read_qrels, read_run
from .texts import TextStore, titled

DATA_FOLDER = "HF_KD_RANKING_DATA"
# Short names of the paper's collections -> their names in ir_datasets.
SHORT_NAMES = {
    "trec-dl-2019": "msmarco-passage/trec-dl-2019/judged",
    "trec-dl-2020": "msmarco-passage/trec-dl-2020/judged",
    "msmarco-dev": "msmarco-passage/dev/small",
}
# Parts of a collection -> readers of their files.
READERS: dict[str, Callable[[str | os.PathLike], Any]] = {
    "documents": TextStore.from_file,
    "queries": TextStore.from_file,
    "qrels": read_qrels,
    "candidates": read_run,
}


class RankingCollection:
    """Queries, documents and judgments that belong together; each is read at its first use, by a function of `parts`.

    Parts are `queries`, `documents`, `qrels`, `candidates` and `card` (of the data set).
    """

    def __init__(self, name: str, parts: Mapping[str, Callable[[], Any]]) -> None:
        self.name = name
        self._parts = parts

    @cached_property
    def queries(self) -> TextStore:
        """query_id -> text."""
        return self._parts["queries"]()

    @cached_property
    def documents(self) -> TextStore:
        """doc_id -> text."""
        return self._parts["documents"]()

    @cached_property
    def qrels(self) -> dict[str, dict[str, int]]:
        """query_id -> {doc_id: grade}."""
        return self._parts["qrels"]()

    @property
    def has_documents(self) -> bool:
        """Whether there are documents."""
        return "documents" in self._parts

    @cached_property
    def language(self) -> str | None:
        """The language that the collection's card names, ISO 639-1; None without a card or with several languages."""
        try:
            languages = self._parts["card"]().data.language
        except (KeyError, OSError, ValueError, yaml.YAMLError):  # without a card that can be read
            return None
        if not isinstance(languages, list):
            return languages
        if len(languages) == 1:
            return languages[0]
        return None

    def judged_queries(self) -> dict[str, str]:
        """Return the queries that have judgments, or all queries of a collection without judgments."""
        is_judged = "qrels" in self._parts
        return {query_id: text for query_id, text in self.queries.items() if not is_judged or query_id in self.qrels}

    @cached_property
    def candidates(self) -> Run | None:
        """The run of a first stage, or None if the collection has none."""
        read = self._parts.get("candidates")
        return read and read()


def load_collection(
    name: str, split: str = "test", parts: Mapping[str, Callable[[], Any]] | None = None
) -> RankingCollection:
    """Open a collection by its name.

    Tried in this order: a folder; a folder of this name in the one that `HF_KD_RANKING_DATA` names; ir_datasets, if it
    is installed (`trec-dl-2019`, `trec-dl-2020`, `msmarco-dev`, or one of its names such as `beir/scifact/test`);
    `owner/name` on the Hub, in BEIR's form (configs `corpus`, `queries`, `qrels`: `zeta-alpha-ai/NanoSciFact`) or
    MTEB's (`mteb/scifact`, whose qrels are the default config). A folder has BEIR's layout (`corpus.jsonl`,
    `queries.jsonl`, `qrels/SPLIT.tsv`) or TREC's (`collection.tsv`, `queries.SPLIT.tsv`, `qrels.SPLIT.txt`, and
    `candidates.SPLIT.trec` if there is a first stage; names without `.SPLIT` are for every split). The metadata of
    its `README.md`, a card as on the Hub, may name the language.

    Args:
        name: as above.
        split: split of a folder, or of a data set on the Hub that has several; ir_datasets' names contain it.
        parts: functions that read other `queries`, `documents`, `qrels` or `candidates` than the collection's.

    Raises:
        FileNotFoundError: if there is no such collection, or a file of its folder is missing.

    Example:
        >>> data = kd.load_collection("beir_folders/scifact")
        >>> run = kd.BM25Index.build(data.documents).search(data.judged_queries(), k=10)
        >>> measures = kd.evaluate_run(run, data.qrels)
    """
    folders = (Path(name), Path(os.environ.get(DATA_FOLDER) or ".") / name)
    folder = next(filter(Path.is_dir, folders), None)
    if folder is not None:
        readers = _folder_parts(folder, split)
    else:
        readers = _ir_datasets_parts(SHORT_NAMES.get(name, name)) or _hub_parts(name, split)
    return RankingCollection(name, {**readers, **(parts or {})})


def _folder_parts(folder: Path, split: str) -> dict[str, Callable[[], Any]]:
    if (folder / "corpus.jsonl").is_file():
        paths = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / f"{split}.tsv"]
    else:
        paths = [_split_file(folder / name, split) for name in ("collection.tsv", "queries.tsv", "qrels.txt")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: a collection has corpus.jsonl, queries.jsonl and qrels/{split}.tsv "
            f"(BEIR), or collection.tsv, queries.{split}.tsv and qrels.{split}.txt."
        )
    paths.append(_split_file(folder / "candidates.trec", split))
    parts = {"card": partial(DatasetCard.load, str(folder / "README.md"))}
    for part, path in zip(READERS, paths, strict=True):
        if path.is_file():
            parts[part] = partial(READERS[part], path)
    return parts


def _split_file(path: Path, split: str) -> Path:
    """Return the file of a split, or the file that is for all splits."""
    split_file = path.with_name(f"{path.stem}.{split}{path.suffix}")
    return split_file if split_file.is_file() else path


def _hub_parts(name: str, split: str) -> dict[str, Callable[[], Any]]:
    def rows(config: str) -> datasets.Dataset:
        try:
            splits = datasets.load_dataset(name, config)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"No collection {name!r}: no folder of this name, none in ${DATA_FOLDER}, unknown to ir_datasets if "
                f"that is installed (pip install ir-datasets), and on the Hub: {str(error).splitlines()[0]}"
            ) from error
        if len(splits) > 1 and split not in splits:
            raise InputError(f"The {config} of {name} have the splits {', '.join(splits)}, not {split!r}.")
        return splits[split] if split in splits else next(iter(splits.values()))

    def texts(config: str) -> TextStore:
        dataset = rows(config)
        folder = cache_folder(Path(dataset.cache_files[0]["filename"]), "store")
        if (folder / "store.json").is_file():
            return TextStore.open(folder)
        return TextStore.from_dataset(dataset, folder, id_column="_id")

    def qrels() -> dict[str, dict[str, int]]:
        grades = {}
        config = "default" if name.startswith("mteb/") else "qrels"
        for row in rows(config):  # NanoBEIR has no grades: each is relevant
            query_id, doc_id, grade = str(row["query-id"]), str(row["corpus-id"]), row.get("score", 1)
            if not isinstance(grade, int | float) or grade != round(grade):
                place = f"query {query_id!r}, document {doc_id!r}"
                raise InputError(f"The qrels of {name}, {place}: the score must be an integer, got {grade!r}.")
            grades.setdefault(query_id, {})[doc_id] = int(grade)
        return grades

    parts = {"documents": partial(texts, "corpus"), "queries": partial(texts, "queries"), "qrels": qrels}
    return {**parts, "card": partial(DatasetCard.load, name)}


def _ir_datasets_parts(name: str) -> dict[str, Callable[[], Any]] | None:
    """Return the parts, or None if the library is not installed or does not know the name."""
    try:
        import ir_datasets

        source = ir_datasets.load(name)
    except (ImportError, KeyError):
        return None

    def texts(side: str, records: Callable[[], Iterator]) -> TextStore:
        def generate() -> Iterator[dict[str, str]]:
            for record in records():
                if {"title", "text"} <= set(record._fields):
                    text = titled(record.title, record.text)
                else:
                    text = record.default_text()
                yield {"id": record[0], "text": text}

        root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_kd_ranking"
        folder = root / f"{name.replace('/', '-')}-{side}-{CACHE_VERSION}"
        if (folder / "store.json").is_file():
            return TextStore.open(folder)
        return TextStore.from_dataset(datasets.Dataset.from_generator(generate), folder)

    def qrels() -> dict[str, dict[str, int]]:
        grades = {}
        for record in source.qrels_iter():
            grades.setdefault(record.query_id, {})[record.doc_id] = record.relevance
        return grades

    def candidates() -> Run:
        records = [(record.query_id, record.doc_id, record.score) for record in source.scoreddocs_iter()]
        return Run.from_scores(*zip(*records, strict=True))

    parts = {"documents": partial(texts, "docs", source.docs_iter), "qrels": qrels}
    parts["queries"] = partial(texts, "queries", source.queries_iter)
    if source.has_scoreddocs():
        parts["candidates"] = candidates
    return parts
