"""The report: its figures equal those of measures and tests, no data is interpreted as HTML, nothing is loaded."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking import reporting
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.evaluation.significance import mean_interval

pytest.importorskip("matplotlib")

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
NAME = "b<i>'\"&$x$"  # a file's name may be this
MEASURES = ("nDCG@10", "RR@10")


class Page(HTMLParser):
    """Tags, texts outside scripts and styles, and everything that a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, text):
        if self.cdata_elem is None:  # not in a script or a style
            self.texts.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        return json.loads(re.search(r'<script [^>]*id="data">(.*?)</script>', self.source, re.DOTALL)[1])


def write_results(folder: Path, queries: int = 12, runs: int = 3, seed: int = 0) -> Path:
    """A whole folder: `best` ranks the relevant document first, `NAME` third, `bm25` at random among 20."""
    rng = np.random.default_rng(seed)
    (folder / "runs").mkdir(parents=True)
    (folder / "training").mkdir()
    candidates = {f"q{i}": [f"d{doc}" for doc in rng.choice(200, 20, replace=False)] for i in range(queries)}
    relevant = {query: str(rng.choice(docs)) for query, docs in candidates.items()}
    for name, place in list({"bm25": None, NAME: 2, "best": 0}.items())[:runs]:
        rankings = {}
        for query, docs in candidates.items():
            order = list(docs)
            if place is not None:
                order.remove(relevant[query])
                order.insert(place if rng.random() < 0.9 else 5, relevant[query])
            rankings[query] = [(doc, float(-rank)) for rank, doc in enumerate(order)]
        kd.write_run(rankings, folder / "runs" / f"{name}.trec")
    shutil.copy(folder / "runs" / "bm25.trec", folder / "candidates.trec")
    write_qrels({query: {doc: 1, "unseen": 2} for query, doc in relevant.items()}, folder / "qrels.txt")
    (folder / "queries.tsv").write_text("".join(f"{query}\tfind words of {HOSTILE} {query}\n" for query in candidates))
    texts = {f"d{i}": f"Words of {HOSTILE} d{i} " + "long " * (i + 100) for i in range(200)}
    (folder / "collection.tsv").write_text("".join(f"{doc}\t{text}\n" for doc, text in texts.items()))
    ms = {"p50": 12.5, "p95": 20.0, "p99": 30.0}
    figures = {"architecture": HOSTILE, "total_ms": ms, "encode_ms": ms, "model_bytes": 4_500_000, "device": "cpu"}
    content = {
        "environment": {"torch": "2.13.0", "threads": 2},
        "protocol": {"queries": 50, "warm_up": HOSTILE},
        "rankers": {"best": figures, NAME: figures | {"total_ms": {"p50": 1.25, "p95": 2.0}}},
    }
    (folder / "efficiency.json").write_text(json.dumps(content))
    history = [{"step": step, "loss": 1 / step, "epoch": 0} for step in (1, 2, 3)]
    history += [{"step": 2, "eval_RR@10": 0.5}, {"step": 3, "eval_RR@10": 0.6}, {"step": 3, "eval_RR@10": 0.6}]
    (folder / "training" / "best.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of results with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("report")
    results, output = write_results(folder / "results"), folder / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        written = kd.write_report(results, output, MEASURES, [(NAME, "best")], folder / "plot.svg", title=HOSTILE)
    assert written == {"output": str(output), "plot": str(folder / "plot.svg"), "rankers": 3, "queries": 12}
    return results, output


@pytest.fixture
def page(written) -> Page:
    return Page(written[1])


def test_report_table_has_measures_best_ranker_first(written, page):
    results, _ = written
    qrels = kd.read_qrels(results / "qrels.txt")
    runs = {name: kd.read_run(results / "runs" / f"{name}.trec") for name in ("best", NAME, "bm25")}
    means = {name: kd.evaluate_run(run, qrels, MEASURES) for name, run in runs.items()}
    assert page.data["names"] == sorted(means, key=lambda name: -means[name]["nDCG@10"]) == ["best", NAME, "bm25"]
    for by_measure in means.values():
        for measure in MEASURES:
            assert f"{by_measure[measure]:.4f}" in page.text
    assert "12.5" in page.text
    assert "4.5" in page.text


def test_mean_interval_is_bootstrapped_over_queries():
    values = [0.1, 0.9, 0.4, 0.4, 0.75, 0.0]
    interval = mean_interval(values)
    rng = np.random.default_rng(7)
    low, high = np.quantile(rng.choice(values, (20_000, 6)).mean(1), (0.025, 0.975))
    assert interval["mean"] == pytest.approx(sum(values) / 6)
    assert (interval["low"], interval["high"]) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_report_pairs_and_marks_equal_compare_runs(written, page):
    results, _ = written
    runs = {name: kd.read_run(results / "runs" / f"{name}.trec") for name in ("bm25", NAME, "best")}
    pairs = kd.compare_runs(runs, kd.read_qrels(results / "qrels.txt"), MEASURES)["pairs"]
    names, marks = page.data["names"], page.data["marks"]
    assert len(pairs) == len(page.data["pairs"]) == 6
    for pair in pairs:
        assert f"{pair['difference']:+.4f}" in page.text
        assert f"{pair['wins']} / {pair['ties']} / {pair['losses']}" in page.text
        sign = int(np.sign(pair["difference"])) if pair["p_corrected"] < 0.05 else 0
        control, treatment = names.index(pair["control"]), names.index(pair["treatment"])
        measure = MEASURES.index(pair["measure"])
        assert (marks[control][treatment][measure], marks[treatment][control][measure]) == (sign, -sign)
    assert marks[names.index(NAME)][names.index("best")] == [1, 1]
    assert page.source.count('aria-label="significantly above the control"') == 2  # of the arrow's control, NAME


def test_report_begins_with_what_was_found(written, page, tmp_path):
    mean = kd.evaluate_run(kd.read_run(written[0] / "runs" / "best.trec"), kd.read_qrels(written[0] / "qrels.txt"))
    assert f"best has the highest nDCG@10, {mean['nDCG@10']:.4f} on 12 queries (95 % interval" in page.text
    assert "It is significantly better than all others." in page.text
    kd.write_report(written[0], tmp_path / "page.html", MEASURES, summary=["One.", "Two <b>2</b>."])
    text = Page(tmp_path / "page.html").text
    assert "One. Two <b>2</b>." in text and "has the highest" not in text


def test_report_names_rankers_with_the_same_highest_mean(written, tmp_path):
    folder = shutil.copytree(written[0], tmp_path / "results")
    shutil.copy(folder / "runs" / "best.trec", folder / "runs" / "copy.trec")
    kd.write_report(folder, tmp_path / "page.html", MEASURES)
    text = Page(tmp_path / "page.html").text
    assert ", and so has copy. No significant difference from copy was found." in text


def test_report_shows_findings_of_others_in_place_of_its_own_tests(written, tmp_path):
    kd.write_report(written[0], tmp_path / "page.html", MEASURES, findings=["a against b: <b>0.1 more</b>."])
    page = Page(tmp_path / "page.html")
    assert "a against b: <b>0.1 more</b>." in page.text and "pairs" not in page.ids
    assert page.data["pairs"] == [] and not np.any(page.data["marks"])
    assert len(page.data["queries"]) > 0  # which remain


def test_report_escapes_data_and_loads_nothing(page):
    assert "img" not in page.tags
    assert "i" not in page.tags
    assert page.tags.count("script") == 2
    assert {*page.fetched} <= {"data:,", *(f"#{name}" for name in page.ids)}
    assert "url(http" not in page.source
    assert len(page.ids) == len(set(page.ids))
    assert page.text.startswith(HOSTILE)
    assert page.text.count(HOSTILE) >= 4  # title, heading, architecture, protocol
    assert any(query["text"].startswith(f"find words of {HOSTILE}") for query in page.data["queries"])


def test_report_browser_has_passages_grades_and_ranks(written, page):
    results, _ = written
    qrels, best = kd.read_qrels(results / "qrels.txt"), kd.read_run(results / "runs" / "best.trec")
    assert len(page.data["queries"]) == 12
    for query in page.data["queries"]:
        grades = qrels[query["id"]]
        expected = [[doc, score, grades.get(doc)] for doc, score in best[query["id"]][:5]]
        assert query["top"][page.data["names"].index("best")] == expected
        (doc,) = grades.keys() - {"unseen"}
        ranks = [[doc for doc, _ in best[query["id"]]].index(doc) + 1, *query["relevant"][1][2][1:]]
        assert query["relevant"] == [["unseen", 2, [None] * 3], [doc, 1, ranks]]
        shown = [doc for top in query["top"] for doc, _, _ in top]
        assert set(shown) <= page.data["texts"].keys()
    assert page.data["texts"]["unseen"] is None
    lengths = [len(text) for text in page.data["texts"].values() if text]
    assert max(lengths) == 600 + len(" ...")


def test_report_embeds_only_queries_that_moved_most(tmp_path):
    results = write_results(tmp_path / "results", queries=130, runs=2)
    kd.write_report(results, tmp_path / "report.html", ["RR@10"])
    data = Page(tmp_path / "report.html").data
    runs = [kd.read_run(results / "runs" / f"{name}.trec") for name in data["names"]]
    assert len(data["queries"]) == 100
    spreads = [abs(query["values"][0][0] - query["values"][1][0]) for query in data["queries"]]
    assert spreads == sorted(spreads, reverse=True)
    kept = {query["id"] for query in data["queries"]}
    qrels = kd.read_qrels(results / "qrels.txt")
    for query in qrels.keys() - kept:
        first, second = (kd.evaluate_run(run, {query: qrels[query]}, ["RR@10"])["RR@10"] for run in runs)
        assert abs(first - second) <= spreads[-1] + 1e-12
    shown = {doc for query in data["queries"] for top in query["top"] for doc, _, _ in top}
    assert data["texts"].keys() == shown | {doc for query in data["queries"] for doc, _, _ in query["relevant"]}


def test_report_plots_have_text_descriptions(page):
    assert page.tags.count("svg") == 5  # latency; depth by two measures; loss and a held-out measure
    assert re.search(r"best \(.*?\) 0\.\d{4} at 12\.5 ms", page.text)
    assert "best from 1 at 1 to 0.3333 at 3" in page.text  # the loss
    assert "best from 0.5 at 2 to 0.6 at 3" in page.text


def test_report_data_has_no_infinity(tmp_path):
    results = write_results(tmp_path / "results", runs=2)
    write_qrels({f"q{i}": {"x": 1} for i in range(12)}, results / "qrels.txt")
    for name, place in (("bm25", 1), (NAME, 0)):
        rankings = {
            f"q{i}": sorted([("x", 1.0 - place), ("y", 0.5)], key=lambda scored: -scored[1]) for i in range(12)
        }
        kd.write_run(rankings, results / "runs" / f"{name}.trec")
    kd.write_report(results, tmp_path / "report.html", ["RR@10"])
    page = Page(tmp_path / "report.html")
    assert not re.search("Infinity|NaN", page.source)
    assert page.data["pairs"][0]["wins"] == 12


def test_report_is_deterministic(written, tmp_path):
    results, output = written
    kd.write_report(results, tmp_path / "again.html", MEASURES, [(NAME, "best")], title=HOSTILE)
    assert (tmp_path / "again.html").read_bytes() == output.read_bytes()


def test_report_needs_only_runs_and_judgments(tmp_path):
    results = write_results(tmp_path / "results", runs=1)
    for name in ("candidates.trec", "queries.tsv", "collection.tsv", "efficiency.json", "training"):
        path = results / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kd.write_report(results, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not {"latency", "depth", "training", "queries", "pairs", "protocol"} & set(page.ids)
    assert "1 ranker on 12 judged queries" in page.text


def test_training_curves_start_at_step_0(monkeypatch):
    from hf_kd_ranking.reporting import figures  # needs matplotlib

    panels, draw = [], figures.line_plot
    monkeypatch.setattr(figures, "inline_svg", lambda *args: "")
    monkeypatch.setattr(figures, "line_plot", lambda *args, **kw: panels.append(draw(*args, **kw)) or panels[-1])
    training = {"a": [{"step": 74, "eval_RR@10": 0.5}], "b": [{"step": 75, "eval_RR@10": 0.6}]}
    context = {"styles": {"a": ("#000", "solid"), "b": ("#111", "solid")}, "measures": ["RR@10"], "depths": {}}
    context |= {"names": [], "efficiency": {}, "means": {}, "arrows": ()}
    figures.page_figures(context, training)
    assert [panel.axes[0].get_xlim()[0] for panel in panels] == [0]


def test_report_says_why_run_has_no_depth_curve(tmp_path):
    results = write_results(tmp_path / "results")
    run = kd.read_run(results / "runs" / "best.trec")
    kd.write_run(run.top(8), results / "runs" / "best.trec")
    kd.write_report(results, tmp_path / "report.html", ["RR@10"])
    page = Page(tmp_path / "report.html")
    assert "No curve for best: The run lacks 12 of 20 candidates of query 'q0'" in page.text


def test_report_without_matplotlib_has_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("plot", "figures"):
        monkeypatch.delitem(sys.modules, f"hf_kd_ranking.reporting.{name}", raising=False)
        monkeypatch.delattr(reporting, name, raising=False)
    results = write_results(tmp_path / "results", runs=2)
    kd.write_report(results, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.text.count("matplotlib is missing; install it (extra [report])") == 3
    assert "svg" not in page.tags
    with pytest.raises(ValueError, match=r"A plot needs matplotlib; install it \(extra \[report\]\)"):
        kd.write_report(results, tmp_path / "report.html", plot=tmp_path / "plot.png")


def test_report_refuses_or_leaves_out_missing_queries(tmp_path):
    results = write_results(tmp_path / "results")
    run = kd.read_run(results / "runs" / "best.trec")
    del run["q3"]
    kd.write_run(run, results / "runs" / "best.trec")
    with pytest.raises(ValueError, match=r"different judged queries .*q3.*in common with intersect"):
        kd.write_report(results, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    assert kd.write_report(results, tmp_path / "report.html", intersect=True)["queries"] == 11
    assert "Paired tests over 11 queries" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        ({"runs": None}, {}, r"runs holds no NAME\.trec"),
        ({"qrels.txt": None}, {}, r"qrels file .*qrels\.txt does not exist"),
        ({"qrels.txt": "q0 0 d1 1\n"}, {}, "at least two judged queries in common, got 1"),
        ({"qrels.txt": "a 0 d1 1\nb 0 d1 1\n"}, {}, "two judged queries in common, got 0"),
        ({"runs/bm25.trec": "q0 Q0 d1 1 x tag\n"}, {}, r"bm25\.trec line 1: score"),
        ({}, {"files": {"queries": "gone.tsv"}}, r"gone\.tsv does not exist"),
        ({}, {"arrows": [("bm25", "gone")]}, "No run is called gone; there are .*, best, bm25"),
        ({}, {"measures": ["nDC@10"]}, "Unknown measure"),
        ({}, {"plot": "plot.pdf"}, r"\.png or \.svg, got 'plot\.pdf'"),
        ({"efficiency.json": None}, {"plot": "plot.png"}, r"needs latencies of the runs, in .*efficiency\.json"),
        ({"efficiency.json": "{"}, {}, r"efficiency\.json is damaged: it is not valid JSON"),
        ({"efficiency.json": "[]"}, {}, r"efficiency\.json is damaged: it must hold a JSON object, got '\[\]'"),
        ({"efficiency.json": '{"rankers": {"best": {}}}'}, {}, "ranker 'best' needs total_ms with p50 and p95"),
        ({"efficiency.json": '{"rankers": {}, "protocol": 1}'}, {}, "'protocol' must be an object"),
        (
            {"training/best.json": '{"log_history": [{"loss": 1}]}'},
            {},
            r"best\.json: log_history must be entries with a step",
        ),
    ],
)
def test_report_names_bad_input(tmp_path, broken, options, message):
    results = write_results(tmp_path / "results", queries=3)
    for name, content in broken.items():
        path = results / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if content is not None:
            path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        kd.write_report(results, tmp_path / "report.html", **options)
    assert not (tmp_path / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def in_browser(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its script has run, and what the console said."""
    result = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"),
            *(f"--user-data-dir={profile}", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_report_works_in_browser_without_messages(written, tmp_path):
    document, console = in_browser(written[1], tmp_path / "profile")
    assert console == []
    assert len(re.findall(r'<button type="button" tabindex="-?\d"', document)) == 12
    assert document.count('aria-current="true"') == 1
    assert re.search(r"B − A over all queries: \+0\.\d{3} nDCG@10", document)
    assert "<mark>Words</mark> <mark>of</mark>" not in document  # `of` is in every passage
    assert "<mark>Words</mark> of " in document
    probe = tmp_path / "probe.html"
    probe.write_text(written[1].read_text().replace("</body>", "<script>console.log(window.hacked)</script></body>"))
    _, console = in_browser(probe, tmp_path / "profile")
    assert len(console) == 1
    assert '"undefined"' in console[0]
