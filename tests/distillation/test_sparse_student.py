"""A student with sparse vectors goes through the job, and searches the collection."""

import hf_kd_ranking as kd


def test_sparse_student_is_trained_measured_and_delivered(make_job, out):
    overrides = {"splade": {"expansion": "none"}}  # a fresh head on a random encoder has no weights above zero
    settings = {"architectures": ["splade"], "conditions": ["teacher"], "fusion": False, "purpose": "search"}
    outcome = kd.distill(make_job(**settings, overrides=overrides))
    assert {"splade untrained", "splade teacher"} < outcome["test"].keys()
    assert kd.load_ranker(outcome["folders"]["splade teacher"]).config.expansion == "none"
    words = kd.TextStore.from_tsv(out.parent / "collection.tsv")["d0"].split()
    assert kd.load_pipeline(out / "best").search(" ".join(words), 3)
