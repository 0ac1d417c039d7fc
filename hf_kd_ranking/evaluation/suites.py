"""Suites: rankers on many test collections, with one results file per ranker and one table.

A results file is JSON: `kind`, `version`, `model` (the digest of the ranker), `settings`, and `sets`, set ->
`language`, `content` (digest of the data), `exclude_same_id`, `means` (measure -> mean) and `queries` (measure ->
query_id -> value). It is written after every set, so that a second run does the missing sets only.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..artifacts import changed_names, content_digest, read_json, write_json
from ..data.collections import load_collection
from ..data.rankings import Run
from ..errors import InputError
from ..processes import processes
from ..ranker import Ranker
from .metrics import DEFAULT_MEASURES, evaluate_queries, mean_values, parse_measures
from .rerank import RerankingEvaluator
from .retrieve import RetrievalEvaluator
from .significance import correct, paired_t_test

logger = logging.getLogger(__name__)
NANOBEIR = "ArguAna ClimateFEVER DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ QuoraRetrieval SCIDOCS SciFact"
BEIR = "arguana climate-fever dbpedia fever fiqa hotpotqa nfcorpus nq quora scidocs scifact touche2020 trec-covid"
# Suite -> the start of its sets' names on the Hub, and their ends. BEIR is without MS MARCO, on which rankers are
# trained, and without the twelve forums of CQADupStack.
SUITES = {"nanobeir": ("zeta-alpha-ai/Nano", f"{NANOBEIR} Touche2020".split()), "beir": ("mteb/", BEIR.split())}
QUERIES_ARE_DOCUMENTS = ("arguana", "quora")  # sets whose documents with the id of their query are always left out
FIRST_STAGE = "first_stage"
TEST_ROW = "| {measure} | {set} | {ranker} | {difference:+.4f} | {p_value:.2g} | {p_corrected:.2g} |"
KIND, VERSION = "suite-results", 2


class SuiteSet(NamedTuple):
    """A set that is ready to be measured."""

    candidates: Run  # of the first stage
    evaluator: RerankingEvaluator | RetrievalEvaluator
    language: str | None  # ISO 639-1, if the set names it
    exclude_same_id: bool  # whether documents with the id of their query are left out


@dataclass(frozen=True)
class Suite:
    """A suite, and how rankers are measured on its sets.

    Args:
        name: a folder of collections, see `load_collection`, or a name in `SUITES`.
        measures: as `evaluate_run`.
        retrieve: True searches every collection with the ranker; False re-ranks the first stage, the candidates of the
            set if it has a run of them, else BM25's.
        k: number of documents per query.
        language: language of BM25, see `BM25Index.build`.
        exclude_same_id: leave out the document with the id of its query; always done for sets named after ArguAna or
            Quora.
    """

    name: str
    split: str = "test"
    measures: Sequence[str] = DEFAULT_MEASURES
    retrieve: bool = False
    k: int = 100
    language: str | None = None
    exclude_same_id: bool = False

    def sets(self) -> dict[str, str]:
        """Return set -> name of its collection.

        Raises:
            FileNotFoundError: if the suite is unknown.
            InputError: if its folder has no folder inside.
        """
        if self.name in SUITES:
            start, ends = SUITES[self.name]
            return {end: start + end for end in ends}
        folder = Path(self.name)
        if not folder.is_dir():
            known = " or ".join(SUITES)
            raise FileNotFoundError(f"There is no suite {self.name!r}: give a folder of collections, {known}.")
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not inside:
            raise InputError(f"The suite {folder} is empty: it needs a folder with a collection for every set.")
        return {path.name: str(path) for path in inside}

    def settings(self) -> dict[str, Any]:
        """Return the settings, for results files."""
        return {**asdict(self), "name": Path(self.name).resolve().name, "measures": list(self.measures)}

    def content(self, source: str) -> str:
        """Return the digest of a set's documents, queries, judgments and candidates; raises as `open`."""
        data = load_collection(source, self.split)
        parts = [data.documents.fingerprint(), data.queries.fingerprint(), data.qrels, data.candidates]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()

    def open(self, source: str) -> SuiteSet:
        """Read a set and find the candidates of its first stage; bad data raise an InputError or an OSError."""
        from ..retrieval.bm25 import BM25Index  # an extra

        data = load_collection(source, self.split)
        qrels, documents = data.qrels, data.documents
        texts = dict(zip(qrels, data.queries[list(qrels)], strict=True))
        if len(texts) < 2:
            raise InputError(f"A set needs at least two judged queries, and {source} has {len(texts)}.")
        exclude = self.exclude_same_id or any(name in Path(source).name.lower() for name in QUERIES_ARE_DOCUMENTS)
        depth = self.k + exclude
        candidates = data.candidates or BM25Index.build(documents, language=self.language).search(texts, depth)
        if exclude:
            candidates = candidates.without_same_ids()
        candidates = candidates.top(self.k)
        if self.retrieve:
            evaluator = RetrievalEvaluator(qrels, data.queries, documents, self.measures, self.k, exclude)
        else:
            evaluator = RerankingEvaluator(candidates, qrels, data.queries, documents, self.measures)
        return SuiteSet(candidates, evaluator, data.language, exclude)


@dataclass(eq=False, repr=False)
class SuiteEvaluator:
    """Measure a ranker on several sets; for use in training and elsewhere.

    Args:
        sets: set -> its `RerankingEvaluator` or `RetrievalEvaluator`, of the same measures.
    """

    sets: Mapping[str, Callable[[Ranker], dict[str, float]]]

    @classmethod
    def load(cls, name: str, **settings: Any) -> "SuiteEvaluator":
        """Open all sets of a suite; the settings are those of `Suite`, and a broken set raises its error."""
        suite = Suite(name, **settings)
        return cls({set_name: suite.open(source).evaluator for set_name, source in suite.sets().items()})

    def __call__(self, ranker: Ranker) -> dict[str, float]:
        """Return measure -> mean over the sets, and SET_MEASURE -> value, for example `scifact_nDCG@10`."""
        by_measure, of_sets = {}, {}
        for set_name, evaluator in self.sets.items():
            for measure, value in evaluator(ranker).items():
                by_measure.setdefault(measure, []).append(value)
                of_sets[f"{set_name}_{measure}"] = value
        means = {measure: fmean(values) for measure, values in by_measure.items()}
        return means | of_sets


def evaluate_suite(
    suite: Suite, models: Mapping[str, str], load: Callable[[str], Ranker], folder: Path, dtype: str
) -> dict[str, str]:
    """Measure rankers and the first stage on the sets that their files in a folder of results lack.

    Under `accelerate launch` all processes make the same call, and share what their rankers share; the main process
    writes the results.

    Args:
        models: name -> path, or name on the Hub.
        load: loads a ranker from its path.
        folder: folder of results, made if it does not exist.
        dtype: precision in which `load` loads them, for the settings in results.

    Returns:
        Set -> message, for the sets whose data are broken.

    Raises:
        InputError: if the folder has results of other settings, data or rankers of the same name, a name cannot be
            that of a file, a ranker cannot search, or no set can be read.
    """
    results = _begin(suite, models, folder, {**suite.settings(), "dtype": dtype})
    folder.mkdir(parents=True, exist_ok=True)
    processes().wait_for_everyone()  # all have read the same results
    sources = suite.sets()
    rankers, failed = {}, {}
    for set_name, source in sources.items():
        missing = [name for name in (FIRST_STAGE, *models) if set_name not in results[name]["sets"]]
        for name in missing:
            if name != FIRST_STAGE and name not in rankers:
                rankers[name] = _load(suite, load, models[name])
        with _broken_data(set_name, failed):
            content = suite.content(source)
            opened = suite.open(source) if missing else None
        if set_name in failed:
            continue
        for name in results:
            _check_content(folder / f"{name}.json", results[name], set_name, content)
        for name in missing:
            logger.info("%s: %s", set_name, name)
            with _broken_data(set_name, failed):
                values = _measure(suite, opened, rankers.get(name))
                results[name]["sets"][set_name] = {"content": content, **values}
            if set_name in results[name]["sets"] and processes().is_main_process:
                write_json(folder / f"{name}.json", results[name])
    if len(failed) == len(sources):
        set_name, message = next(iter(failed.items()))
        raise InputError(f"No set of {suite.name} can be measured; {set_name}: {message}")
    return failed


def _begin(
    suite: Suite, models: Mapping[str, str], folder: Path, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return name -> results so far, those of other rankers in the folder included, after all checks before work."""
    parse_measures(suite.measures)
    if FIRST_STAGE in models:
        raise InputError(f"{FIRST_STAGE} is the name of the first stage; give the ranker another one, NAME=PATH.")
    for name in models:
        if not name or Path(name).name != name:
            raise InputError(f"The name {name!r} cannot be that of a results file; give another one, NAME=PATH.")
    results = read_results(folder, settings) if folder.is_dir() else {}
    for name in (FIRST_STAGE, *models):
        digest = content_digest(models[name]) if name in models else FIRST_STAGE
        empty = {"kind": KIND, "version": VERSION, "model": digest, "settings": settings, "sets": {}}
        if results.setdefault(name, empty)["model"] != digest:
            raise InputError(f"{folder / name}.json has the results of another ranker; give this one another name.")
    return results


def _check_content(path: Path, result: Mapping[str, Any], set_name: str, content: str) -> None:
    """Refuse results on other data than those of the digest `content`."""
    if set_name in result["sets"] and result["sets"][set_name].get("content") != content:
        raise InputError(f"{path} has results on other data of the set {set_name}; give another folder of results.")


@contextmanager
def _broken_data(set_name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note the error of a set's data, so that the other sets are measured."""
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error.__cause__, ConnectionError):  # the Hub cannot be reached, not for other sets either
            raise
        failed[set_name] = str(error)


def _load(suite: Suite, load: Callable[[str], Ranker], path: str) -> Ranker:
    ranker = load(path)
    if suite.retrieve and not ranker.model.config.is_searchable:
        raise InputError(f"{path} is a {ranker.model.config.model_type}, which re-ranks and cannot search.")
    return ranker


def _measure(suite: Suite, opened: SuiteSet, ranker: Ranker | None) -> dict[str, Any]:
    """Return what results files say about a set; None is the first stage."""
    run = opened.candidates
    if ranker is not None:
        rank = opened.evaluator.retrieve if suite.retrieve else opened.evaluator.rerank
        run = rank(ranker)
    values = evaluate_queries(run, opened.evaluator.qrels, suite.measures)
    about = {"language": opened.language, "exclude_same_id": opened.exclude_same_id}
    return {**about, "means": mean_values(values), "queries": values}


def read_results(folder: Path, settings: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return name -> content of the results files in a folder, the first stage first.

    An InputError names a file that is damaged or of another kind, of other settings than the ones given (else the
    first's), or on other data of a set than the first's.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}, the folder of results, does not exist; --suite and --model fill it.")
    results, contents = {}, {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem != FIRST_STAGE, path.stem)):
        content = read_json(path, what="results")
        if (content.get("kind"), content.get("version")) != (KIND, VERSION):
            raise InputError(f"{path} is not a results file of version {VERSION}; move it to another folder.")
        if not (isinstance(content.get("settings"), dict) and isinstance(content.get("sets"), dict)):
            raise InputError(f"{path} is damaged: it lacks settings or sets; remove it, and measure again.")
        settings = settings or content["settings"]
        changed = changed_names(settings, content["settings"])
        if changed:
            raise InputError(f"{path} has results with another {', '.join(changed)}; give another folder.")
        for set_name, measured in content["sets"].items():
            _check_content(path, content, set_name, contents.setdefault(set_name, measured.get("content")))
        results[path.stem] = content
    return results


def summarize(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare results by `read_results`.

    Returns:
        `sets` (those that all rankers have, over which the means are), `languages` (language -> its sets among them),
        `rankers` (name -> measure -> set -> mean) and `tests`: for every ranker and measure the paired t-test against
        the first stage on every set, as `paired_t_test`, with `p_corrected` by Holm over the sets.
    """
    rankers, languages, shared = {}, {}, {}
    for name, content in results.items():
        rankers[name] = {}
        for set_name, measured in content["sets"].items():
            for measure, value in measured["means"].items():
                rankers[name].setdefault(measure, {})[set_name] = value
            if all(set_name in other["sets"] for other in results.values()):
                shared[set_name] = measured["language"]
    for set_name, language in shared.items():
        if language is not None:
            languages.setdefault(language, []).append(set_name)
    tests = []
    for name in rankers:
        if name != FIRST_STAGE and FIRST_STAGE in results:
            for measure in rankers[name]:
                tests += _compare(name, results[name]["sets"], results[FIRST_STAGE]["sets"], measure)
    return {"sets": list(shared), "languages": languages, "rankers": rankers, "tests": tests}


def _compare(name: str, treatment: Mapping, control: Mapping, measure: str) -> list[dict[str, Any]]:
    """Return the tests of one ranker and measure on the sets that both sides have."""
    tests = []
    for set_name in treatment:
        if set_name in control:
            sides = treatment[set_name]["queries"][measure], control[set_name]["queries"][measure]
            tests.append({"ranker": name, "measure": measure, "set": set_name, **paired_t_test(*sides)})
    correct(tests)
    return tests


def suite_text(summary: Mapping[str, Any]) -> str:
    """Format a summary as Markdown: means by set and by the languages that sets name, and tests."""
    rankers, lines, columns = summary["rankers"], [], {}
    for by_measure in rankers.values():
        for values in by_measure.values():
            columns |= values
    groups = {f"mean of {len(summary['sets'])} sets": summary["sets"]}
    for language, sets in summary["languages"].items():
        groups[f"{language} ({len(sets)})"] = sets
    for measure in next(iter(rankers.values()), ()):
        header = [measure, *columns, *groups]
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, by_measure in rankers.items():
            values = by_measure.get(measure, {})
            cells = [name]
            for sets in (*([set_name] for set_name in columns), *groups.values()):
                found = [values[set_name] for set_name in sets if set_name in values]
                cells.append(f"{fmean(found):.4f}" if found else "-")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"| measure | set | ranker - {FIRST_STAGE} | difference | p (t-test) | p (Holm) |", "|---" * 6 + "|"]
    for test in summary["tests"]:
        lines.append(TEST_ROW.format_map(test))
    return "\n".join(lines)
