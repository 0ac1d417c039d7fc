"""The outcome of `distill` in words: tables, tests, and the verdict.

An outcome is the content of `outcome.json`, see `outcome.write_outcome`.
"""

from collections.abc import Mapping
from typing import Any

from .job import DistillJob

SIGNIFICANT = 0.05
FEW_QUERIES = 50  # TREC's usual number of topics


def outcome_text(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """Return the outcome as text: what was compared, tables of the test and of the frontier, and the verdict."""
    queries = ", ".join(f"{split} {count:,}" for split, count in outcome["queries"].items())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in outcome["rates"].items())
    lists = ", ".join(f"{name} {count:,}" for name, count in outcome["lists"].items())
    headings = {}
    for split in ("test", "dev"):
        headings[split] = split + synthetic_mark(outcome, split)
        if split in outcome["agreement"]:
            headings[split] += " (agreement with the teacher, not relevance)"
    lines = [
        f"Queries: {queries}. Training lists: {lists}. Learning rates were chosen on dev from one grid for all "
        f"conditions ({rates}); {job.seeds} seed(s).",
    ]
    if outcome["synthetic"]:
        lines.append(synthetic_text(outcome))
    lines += [f"{count:,} {what}." for what, count in outcome["overlaps"].items() if count]
    lines += cut_sentences(outcome)
    first_stage, sums = outcome["pipeline"]["first_stage"], set(outcome["sums"].values())
    header = (
        f"| ranker | {job.measure}, {headings['test']} | with {first_stage} | {headings['dev']} | ms per query, p50 |"
    )
    lines += ["", header, "| --- | --- | --- | --- | --- |"]
    for name, value in outcome["test"].items():
        if name in sums and name != outcome["chosen"]:
            continue  # it has a column
        cells = [name, f"{value:.4f}"]
        for key, form in (("fused", ".4f"), ("dev", ".4f"), ("latency_ms", ".1f")):
            cells.append(format(outcome[key][name], form) if name in outcome[key] else "")
        lines.append(f"| {' | '.join(cells)} |")
    for name, values in outcome["seeds"].items():
        lines.append(f"Seeds of {name}: {', '.join(f'{value:.4f}' for value in values)}.")
    lines += ["", "Frontier on dev (nothing is both faster and better):", ""]
    lines += [f"| pipeline | {job.measure}, {headings['dev']} | ms per query, p50 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {dev:.4f} | {latency:.1f} |" for name, dev, latency in outcome["frontier"]]
    lines += ["", f"Tests ({outcome['family']}):", *(finding_text(test, outcome) for test in outcome["tests"])]
    lines += ["", outcome["verdict"]]
    lines.append(f"Pipeline: {outcome['folder'] or 'none'}. Report: {outcome['page']}")
    return "\n".join(lines)


def verdict(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """Return in words what was chosen and what it is worth on the test queries."""
    name, test = outcome["chosen"], outcome["test"]
    interval = outcome["interval"]
    budget = "" if job.budget_ms is None else f" within {job.budget_ms:g} ms per query"
    dev_mark, test_mark = synthetic_mark(outcome, "dev"), synthetic_mark(outcome, "test")
    text = (
        f"Chosen on dev{dev_mark}{budget}: {name}, {outcome['latency_ms'][name]:.1f} ms per query (median). On the "
        f"{outcome['queries']['test']:,} test queries{test_mark}: {job.measure} {test[name]:.4f} (95 % interval "
        f"{interval['low']:.4f} to {interval['high']:.4f})"
    )
    if test.get("teacher"):
        text += f", {100 * test[name] / test['teacher']:.0f} % of the teacher's {test['teacher']:.4f}"
    lines = [f"{text}.", _conclusion(outcome)]
    of_seeds = outcome["seeds"].get(name)
    if of_seeds:
        seed = outcome["pipeline"]["seed"]
        lines.append(
            f"That is the mean of {len(of_seeds)} seeds; delivered is seed {seed}, the best on dev, with "
            f"{of_seeds[seed]:.4f} on test."
        )
    lines += [finding_text(test, outcome) for test in _tests_of_the_choice(outcome)]
    count = outcome["queries"]["dev"]
    if count < FEW_QUERIES:
        lines.append(
            f"The choice rests on {count:,} dev queries, which are few: another sample may choose otherwise. Judge "
            f"at least {FEW_QUERIES}."
        )
    if job.candidates is not None:
        lines.append("Candidates come from your own engine, whose time is not included.")
    return "\n".join(lines)


def _tests_of_the_choice(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tests of the chosen pipeline against what a user has without distilling."""
    tests = []
    for test in outcome["tests"]:
        if test["treatment"] == outcome["chosen"] and test["control"] in outcome["rivals"]:
            tests.append(test)
    return tests


def _conclusion(outcome: Mapping[str, Any]) -> str:
    """Return in one sentence whether distilling was worth it."""
    if outcome["pipeline"]["system"] is None:
        return "No ranker was better than this first stage on dev, so it is delivered without one."
    if not outcome["is_trained"]:
        return "No trained student was better on dev than this one, which is not trained."
    beaten, others = [], []
    for test in _tests_of_the_choice(outcome):
        if test["p_corrected"] < SIGNIFICANT and test["difference"] > 0:
            beaten.append(test["control"])
        else:
            others.append(test["control"])
    if not beaten:
        return "On the test queries it is not shown to be better than what a user has without distilling."
    text = f"On the test queries it is significantly better than {', '.join(beaten)}"
    if others:
        text += f", but not shown to be better than {', '.join(others)}"
    return f"{text}."


def synthetic_mark(outcome: Mapping[str, Any], split: str) -> str:
    """Return what figures of a split are called if its queries are generated."""
    return ", synthetic" if split in outcome["synthetic"] else ""


def synthetic_text(outcome: Mapping[str, Any]) -> str:
    """Return which figures are of generated queries, and what wrote these."""
    splits = ", ".join(outcome["synthetic"])
    return (
        f"Synthetic: the queries of {splits} are generated ({outcome['generator']}), and so are all figures on them."
    )


def finding_text(test: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """Return one test in a sentence."""
    if test["p_corrected"] >= SIGNIFICANT:
        finding = f"no difference found ({test['difference']:+.4f})"
    elif test["difference"] > 0:
        finding = f"{test['difference']:.4f} more"
    else:
        finding = f"{-test['difference']:.4f} less"
    low, high = test["interval"]
    return (
        f"{test['treatment']} against {test['control']}: {finding}, 95 % interval {low:+.4f} to {high:+.4f}, p = "
        f"{test['p_value']:.2g}, corrected {test['p_corrected']:.2g}, {test['queries']:,} queries"
        f"{synthetic_mark(outcome, 'test')}."
    )


def cut_sentences(outcome: Mapping[str, Any]) -> list[str]:
    """Return how much is cut, in a sentence for all students of the same length."""
    sentences: dict[str, list[str]] = {}
    for name, shares in outcome["cuts"].items():
        if shares:
            text = f"{shares['cut_texts']:.1%} of the documents are cut, {shares['cut_tokens']:.1%} of their tokens"
            sentences.setdefault(text, []).append(name)
    return [f"{text} are not read ({', '.join(names)})." for text, names in sentences.items()]
