"""What the demo found, as text: the table, what it was measured on, and one sentence."""

ROWS = {
    "BM25": "BM25, the first stage",
    "teacher T1": "BERT_CAT, 6 layers, trained on the triples' labels (teacher T1)",
    "teacher MiniLM": "all-MiniLM-L6-v2 bi-encoder, 6 layers, not trained here (second teacher of T2)",
    "untrained student": "BERT_DOT student, 3 layers, not trained",
    "no teacher": "BERT_DOT student, RankNet on the labels (control)",
    "T1": "BERT_DOT student, Margin-MSE from T1",
    "T2": "BERT_DOT student, Margin-MSE from T2 = mean of the two teachers",
}


def outcome_text(results: dict) -> str:
    """Render what `results.json` holds."""
    measure = results["measure"]
    width = max(map(len, ROWS.values()))
    table = [f"{ROWS[name]:<{width}}  {value:.4f}" for name, value in results["test"].items()]
    return "\n".join(
        ["", _conditions(results), "", f"{'test split':<{width}}  {measure}", *table, "", _finding(results), ""]
    )


def _conditions(results: dict) -> str:
    stats, queries = results["collection"], results["queries"]
    chosen = ", ".join(f"{name} {rate:g}" for name, rate in results["chosen_learning_rate"].items())
    return "\n".join(
        [
            f"PyDocs: {sum(stats['pairs'].values()):,} documents from {stats['docstrings']:,} docstrings of "
            f"{len(stats['packages'])} packages;",
            f"dropped {sum(stats['dropped'].values()):,} by length or as duplicates, and "
            f"{sum(stats['near_duplicates_removed'].values()):,} near duplicates across the splits.",
            f"Queries (first sentences) whose passage is among BM25's top 20: train {queries['train']:,}, dev "
            f"{queries['dev']:,}, test {queries['test']:,}. This filter favours BM25.",
            f"Teacher and students see the same {results['triples']:,} triples. Learning rates chosen on dev from one "
            f"grid: {chosen}; best of {results['epochs_offered']} epochs on dev; {results['seeds']} seed(s).",
        ]
    )


def _finding(results: dict) -> str:
    sentences = []
    for name, test in results["against_no_teacher"].items():
        kind = "more" if test["difference"] > 0 else "less"
        verdict = (
            f"reaches {abs(test['difference']):.4f} {kind} {results['measure']} than the same without a teacher"
            if test["p_value"] < 0.05
            else f"does not differ from the same student without a teacher (difference {test['difference']:+.4f})"
        )
        sentences.append(
            f"With {name} the student {verdict} (paired t-test over {test['queries']:,} queries, p = "
            f"{test['p_value']:.2g})."
        )
    return " ".join(sentences)
