"""The demo's results as a folder that `hf-kd-ranking report` reads, and their report."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ..data.formats import writing
from ..data.texts import TextStore
from ..data.trec import Run, write_run
from ..hub.model_card import costs_of, write_model_card
from ..ranker import Ranker
from ..reporting.efficiency import measure_efficiency
from ..reporting.report import write_report
from .stages import MEASURE, Inputs

# What the latencies are of: the paper's 1,000 passages a query would take BERT_CAT minutes.
TIMED_QUERIES, TIMED_PASSAGES = 10, 100


def write_demo_report(
    inputs: Inputs,
    runs: Mapping[str, Sequence[Run]],
    rankers: Mapping[str, Callable[[], Ranker]],
    trained: Mapping[str, Path],
) -> Path:
    """Write `report.html` into the demo's folder, what it is made of into `report/`, and the costs into model cards.

    Args:
        inputs: the demo's files.
        runs: name -> the test candidates in a ranker's order, of which the first seed is shown.
        rankers: name -> what loads a ranker; they are timed unless that was done before.
        trained: name -> the folder of a trained ranker.

    Returns:
        The page's path.
    """
    results, page = inputs.output / "report", inputs.output / "report.html"
    for part in ("runs", "training"):
        (results / part).mkdir(parents=True, exist_ok=True)
    for name, of_seeds in runs.items():
        write_run(of_seeds[0], results / "runs" / f"{name}.trec", tag=name.replace(" ", "_"))
    for name, folder in trained.items():
        shutil.copy(folder / "trainer_state.json", results / "training" / f"{name}.json")
    measured = results / "efficiency.json"
    if not measured.is_file():
        queries, passages = (
            [text for _, text in islice(TextStore.from_tsv(path).items(), count)]
            for path, count in ((inputs.queries, TIMED_QUERIES), (inputs.collection, TIMED_PASSAGES))
        )
        with writing(measured) as file:
            json.dump(measure_efficiency(rankers, queries, passages), file, indent=1)
    costs = json.loads(measured.read_text(encoding="utf-8"))
    for name, folder in trained.items():
        write_model_card(folder, f"bert_dot-{name.replace(' ', '_')}-pydocs", costs_of(costs, name))
    files = {"qrels": inputs.qrels("test"), "candidates": inputs.candidates("test")}
    files |= {"queries": inputs.queries, "collection": inputs.collection}
    title, arrows = "Distillation on PyDocs", [("no teacher", "T1"), ("no teacher", "T2")]
    write_report(results, page, (MEASURE, "nDCG@10"), arrows, title=title, files=files)
    return page
