"""PyDocs: a retrieval collection from the docstrings of the installed Python packages.

The first sentence of a docstring is a query, and the rest is its one relevant passage. Sources are parsed with `ast`:
nothing is imported, executed or downloaded, so a machine without the Hub has something to train and evaluate on.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..artifacts import building, changed_names, content_digest, read_json
from ..errors import InputError

logger = logging.getLogger(__name__)

# Import names: large, well documented, and installed wherever torch, transformers, datasets and scikit-learn are.
PACKAGES = (
    *("accelerate", "aiohttp", "click", "datasets", "fsspec", "huggingface_hub", "jinja2", "joblib", "mpmath"),
    *("networkx", "numpy", "pandas", "pygments", "rich", "scipy", "sklearn", "sympy", "torch", "transformers"),
)
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name on PyPI is not the import name
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

# All that decides the result besides the sources; saved, so that a folder made by other rules is not reused.
RECIPE = {
    "version": 1,  # raise it when a rule below changes that is not a number here
    "query_words": [4, 40],
    "passage_words": [10, 28],  # at least 10; cut to 28, so that the models (48 word pieces) see what BM25 sees
    "test_below": 75,  # of 1000 buckets
    "dev_below": 100,
    "near_duplicate_jaccard": 0.5,
}
RULES = (  # in the order of testing
    "no_sentence",
    "no_passage",
    "query_too_short",
    "query_too_long",
    "passage_too_short",
    "duplicate_query",
    "duplicate_passage",
)
SPLITS = ("train", "dev", "test")
MAX_PASSAGE_CHARACTERS = 2000  # far more than 28 words: only saves cleaning what is cut off afterwards
FIRST_QUERY_ID = 1_000_000  # far from the document ids, so that mixing the two up fails
FILE_NAMES = {"collection.tsv", "stats.json"}.union(*({f"queries.{s}.tsv", f"qrels.{s}.txt"} for s in SPLITS))

BALANCED = r"\((?:[^()]|\([^()]*\))*\)"
# "foo(a, b=(1, 2)) -> c" on a line of its own, as C extensions and their imitators write it
SIGNATURES = re.compile(rf"\A(?:\s*[\w.*]+{BALANCED}[ \t]*(?:->[^\n]*)?[:;,]?[ \t]*(?:\n|\Z))+")
# no sentence first: "name (type): ...", "name : type", "Args:", or a heading of one word
NO_SENTENCE = re.compile(
    rf"\A\s*(?:\*{{0,2}}[`'\"]?\w+[`'\"]?\*{{0,2}}(?:[ \t]*{BALANCED}[ \t]*:| : )|\w+:[ \t]*\n|\w+\n[ \t]*[-=~]{{3}})"
)
# the query ends at an empty line, before a list, doctest, field, directive or section, or after its first sentence
PARAGRAPH_END = re.compile(r"\n(?=[ \t]*(?:\n|[-*+>:@|]|\.\. |\d+[.)]|\w+:[ \t]*\n|\w+\n[ \t]*[-=~]{3}))")
SENTENCE_END = re.compile(r"(?<!\b[a-z]\.[a-z])(?<!\bvs)(?<!\bcf)(?<!\betc)\.(?=\s)")  # not after "e.g.", "w.r.t."
MARKUP = (
    (re.compile(r"\[([^\]\n]*)\]\([^)\s]*\)"), r"\1"),  # [text](url)
    (re.compile(r"`([^`<>]+?)\s*<[^`<>]*>`_*"), r"\1"),  # `text <target>`_
    (re.compile(r"\[`([^`\]]*)`\]"), r"\1"),  # [`Name`], a link in transformers' docs
    (re.compile(r":[a-zA-Z][\w:+-]*:(?=`)|`[~!]?|\[\w+\]_"), ""),  # :role:, backticks, [1]_
    # *emphasis* and **kwargs, not x**2; the stars come first and are looked behind at, which is ten times faster
    (re.compile(r"\*(?<![\w*)\]]\*)\*?(?=\w)|\*(?<=[\w.]\*)\*?(?![\w(*])"), ""),
    (re.compile(r"^[ \t]*\.\. [\w-]+::|%\(\w+\)s|</?(?:Tip|Added|Changed|Deprecated)\b[^>]*>", re.MULTILINE), ""),
)


@dataclass(frozen=True)
class PyDocs:
    """The files of one built collection; `queries` and `qrels` by split, with one relevant passage per query."""

    collection: Path  # `doc_id<TAB>passage`, ids 0 to N-1, all splits together
    queries: dict[str, Path]  # `query_id<TAB>query`
    qrels: dict[str, Path]  # `query_id 0 doc_id 1`
    stats: dict[str, Any]  # counts of files, docstrings, drops by rule and pairs by split; versions of the packages


class Pair(NamedTuple):
    """A query and its relevant passage, both on one line and without markup."""

    query: str
    passage: str


def build_pydocs(output: Path, roots: dict[str, Path] | None = None) -> PyDocs:
    """Build the PyDocs collection, or return the one in `output` if it was made from the same sources.

    Exact duplicates on either side are dropped (the first stays). md5(query) mod 1000 decides the split: test < 75,
    dev < 100, else train. Then test pairs that nearly equal a train pair go, and dev pairs that nearly equal a train
    or test pair: a Jaccard similarity of 0.5 or more between the sets of word bigrams, of the queries or of the
    passages. One word replaced inside a query of 8 words leaves 5/9 = 0.56, four in a passage of 28 leave 19/35 =
    0.54: so 0.5 finds the template filled in twice, where a model could repeat what it saw in training; by inspection
    most pairs below it differ in content. Twins within one split stay. The same sources give the same bytes.

    Args:
        output: folder to write; replaced as a whole once everything is ready.
        roots: name -> source folder. None: the standard library and those of `PACKAGES` that are installed.

    Raises:
        InputError: if a root is not a folder, `output` holds anything but a PyDocs, or no docstring gives a pair.
    """
    output = Path(output)
    if roots is None:
        sources, versions = _installed_sources()
    else:
        sources, versions = dict(sorted(roots.items())), {}
        for name, root in sources.items():
            if not root.is_dir():
                raise InputError(f"PyDocs needs a folder of .py files as root, and {root} is not a folder.")
            versions[name] = content_digest(root)
    origin = {"recipe": RECIPE, "python": platform.python_version(), "packages": versions}
    if all((output / name).is_file() for name in FILE_NAMES):
        saved = read_json(output / "stats.json")
        if not changed_names(saved, origin):
            return _describe(output, saved)
    if not _is_replaceable(output):
        raise InputError(f"PyDocs needs a new folder or an earlier PyDocs to replace, got {output}; name another.")
    files: list[Path] = []
    for root in sources.values():
        files += _python_files(root)
    pairs, counts = _collect(files)
    if not pairs:
        raise InputError(
            f"PyDocs needs docstrings of a sentence and a text, but none of {counts['docstrings']} docstrings in "
            f"{counts['files_parsed']} files of {list(sources)} is usable; name roots with documented Python sources."
        )
    split_of, removed = _split(pairs)
    sizes = Counter(split_of.values())
    stats = {**origin, **counts, "near_duplicates_removed": removed}
    stats["pairs"] = {split: sizes[split] for split in SPLITS}
    with building(output, replaces=True) as folder:
        for name, text in _file_texts(split_of, stats).items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return _describe(output, stats)


def _installed_sources() -> tuple[dict[str, Path], dict[str, str]]:
    """Return source folder and release of the standard library and of each installed package."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # a top-level name: located, not imported
        if spec is not None and spec.origin is not None:
            roots[name] = Path(spec.origin).parent
            versions[name] = importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    return dict(sorted(roots.items())), dict(sorted(versions.items()))


def _python_files(root: Path) -> list[Path]:
    files = []
    for path in root.rglob("*.py"):
        place = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(place.parts[:-1]):
            files.append((place.parts, path))
    return [path for _, path in sorted(files)]


def _collect(files: list[Path]) -> tuple[list[Pair], dict[str, Any]]:
    """Return all pairs in order of file and position, without exact duplicates, and the counts."""
    counts, dropped = dict.fromkeys(("files_parsed", "files_unreadable", "docstrings"), 0), dict.fromkeys(RULES, 0)
    passages: dict[str, str] = {}  # query -> passage
    seen: set[str] = set()  # passages
    gc.freeze()  # without what the process has loaded before (torch), which would double the time
    for path in tqdm(files, desc="PyDocs", unit="file"):
        candidates = _parse(path)
        counts["files_unreadable" if candidates is None else "files_parsed"] += 1
        for pair in candidates or ():
            counts["docstrings"] += 1
            rule = _broken_rule(pair, passages, seen)
            if rule is not None:
                dropped[rule] += 1
                continue
            passages[pair.query] = pair.passage
            seen.add(pair.passage)
    gc.unfreeze()
    logger.info("PyDocs: %d of %d files could not be parsed", counts["files_unreadable"], len(files))
    return [Pair(*item) for item in passages.items()], {**counts, "dropped": dropped}


def _parse(path: Path) -> list[Pair] | None:
    """Return the pair of each docstring in a file, in order of position; None if this Python cannot parse the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
        return [_pair(docstring) for docstring in _docstrings(tree)]
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring is not None:
            yield docstring.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # no definition is inside an expression
            yield from _docstrings(child)


def _pair(docstring: str) -> Pair:
    """Divide a docstring after its first sentence; an empty query where it does not begin with one."""
    text = SIGNATURES.sub("", docstring).lstrip()
    if NO_SENTENCE.match(text):
        return Pair("", "")
    end = len(text)
    for pattern in (PARAGRAPH_END, SENTENCE_END):
        match = pattern.search(text)
        if match:
            end = min(end, match.end())
    passage = _words(text[end : end + MAX_PASSAGE_CHARACTERS])[: RECIPE["passage_words"][1]]
    return Pair(" ".join(_words(text[:end])), " ".join(passage))


def _words(text: str) -> list[str]:
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return [word for word in text.split() if any(map(str.isalnum, word))]


def _broken_rule(pair: Pair, passages: dict[str, str], seen: set[str]) -> str | None:
    """Return the first of `RULES` that drops a pair, None if it stays."""
    query_words, passage_words = pair.query.count(" ") + 1, pair.passage.count(" ") + 1
    is_broken = {
        "no_sentence": not pair.query,
        "no_passage": not pair.passage,
        "query_too_short": query_words < RECIPE["query_words"][0],
        "query_too_long": query_words > RECIPE["query_words"][1],
        "passage_too_short": passage_words < RECIPE["passage_words"][0],
        "duplicate_query": pair.query in passages,
        "duplicate_passage": pair.passage in seen,
    }
    return next((rule for rule in RULES if is_broken[rule]), None)


def _split(pairs: list[Pair]) -> tuple[dict[Pair, str], dict[str, int]]:
    """Return the split of each remaining pair, in order, and the number of near-duplicates removed per split."""
    split_of = {pair: _split_by_hash(pair) for pair in pairs}
    removed = {}
    for split, other_splits in (("test", ("train",)), ("dev", ("train", "test"))):
        members, others = [], []
        for pair, own_split in split_of.items():
            if own_split == split:
                members.append(pair)
            elif own_split in other_splits:
                others.append(pair)
        near = _nearly_equal(members, others)
        removed[split] = int(near.sum())
        for index in near.nonzero()[0]:
            del split_of[members[index]]
    return split_of, removed


def _split_by_hash(pair: Pair) -> str:
    bucket = _md5(pair) % 1000
    if bucket < RECIPE["test_below"]:
        return "test"
    return "dev" if bucket < RECIPE["dev_below"] else "train"


def _md5(pair: Pair) -> int:
    return int(hashlib.md5(pair.query.encode("utf-8"), usedforsecurity=False).hexdigest(), 16)


def _nearly_equal(pairs: list[Pair], others: list[Pair]) -> np.ndarray:
    """Return, (len(pairs),) bool, where the query or passage of a pair nearly equals that of one of `others`."""
    from sklearn.feature_extraction.text import HashingVectorizer  # a second to import: only where it is used

    near = np.zeros(len(pairs), dtype=bool)
    if not pairs or not others:
        return near
    bigrams = HashingVectorizer(
        ngram_range=(2, 2), token_pattern=r"\w+", binary=True, norm=None, alternate_sign=False, dtype=np.float32
    )
    for texts, other_texts in zip(zip(*pairs, strict=True), zip(*others, strict=True), strict=True):
        left, right = bigrams.transform(texts), bigrams.transform(other_texts)
        shared = (left @ right.T).tocoo()  # (pairs, others), only where a bigram is shared
        union = left.getnnz(axis=1)[shared.row] + right.getnnz(axis=1)[shared.col] - shared.data
        near[shared.row[shared.data >= RECIPE["near_duplicate_jaccard"] * union]] = True
    return near


def _file_texts(split_of: dict[Pair, str], stats: dict[str, Any]) -> dict[str, str]:
    doc_ids = {pair: doc_id for doc_id, pair in enumerate(split_of)}
    # Queries are numbered in the order of md5, so that an id says nothing about the relevant passage's id.
    query_ids = {pair: query_id for query_id, pair in enumerate(sorted(split_of, key=_md5), start=FIRST_QUERY_ID)}
    texts = {
        "collection.tsv": "".join(f"{doc_id}\t{pair.passage}\n" for pair, doc_id in doc_ids.items()),
        "stats.json": json.dumps(stats, indent=2) + "\n",
    }
    for split in SPLITS:
        members = [pair for pair in query_ids if split_of[pair] == split]
        texts[f"queries.{split}.tsv"] = "".join(f"{query_ids[pair]}\t{pair.query}\n" for pair in members)
        texts[f"qrels.{split}.txt"] = "".join(f"{query_ids[pair]} 0 {doc_ids[pair]} 1\n" for pair in members)
    return texts


def _is_replaceable(output: Path) -> bool:
    """Return whether nothing but an earlier PyDocs would be lost; other files may have the same names."""
    if not output.is_dir():
        return not output.exists()
    names = {path.name for path in output.iterdir()}
    return not names or ("stats.json" in names and names <= FILE_NAMES)


def _describe(output: Path, stats: dict[str, Any]) -> PyDocs:
    queries = {split: output / f"queries.{split}.tsv" for split in SPLITS}
    qrels = {split: output / f"qrels.{split}.txt" for split in SPLITS}
    return PyDocs(output / "collection.tsv", queries, qrels, stats)
