"""Cross-architecture knowledge distillation for efficient neural rankers, on Hugging Face.

Paper: Hofstätter et al. 2020, https://arxiv.org/abs/2010.02666. Importing the package registers its models with the
transformers Auto classes and does nothing else: every other public name is imported on first use (PEP 562).
"""

from importlib import import_module as _import_module

from .models import (
    TK,
    BertCat,
    BertCatConfig,
    BertDot,
    BertDotConfig,
    ColBERT,
    ColBERTConfig,
    PreTTR,
    PreTTRConfig,
    Splade,
    SpladeConfig,
    TKConfig,
    load_ranker,
)

__version__ = "0.1.0"

# Public name -> the module that defines it. `losses` is public as a module.
_LAZY = {
    "BM25Index": "retrieval.bm25",
    "ColBERTIndex": "retrieval.colbert",
    "DenseIndex": "retrieval.dense",
    "DistillJob": "distillation.job",
    "InputError": "errors",
    "MtebEncoder": "integrations.mteb",
    "MtebRanker": "integrations.mteb",
    "QdrantIndex": "retrieval.qdrant",
    "Ranker": "ranker",
    "RankingMetric": "evaluation.hf_metric",
    "RankingTrainer": "training.trainer",
    "RankingTrainingArguments": "training.arguments",
    "RerankingEvaluator": "evaluation.rerank",
    "RetrievalEvaluator": "evaluation.retrieve",
    "Run": "data.runs",
    "SuiteEvaluator": "evaluation.suites",
    "TeacherRows": "data.rows",
    "SparseIndex": "retrieval.sparse",
    "StoredReranker": "retrieval.stored_reranker",
    "TextStore": "data.texts",
    "TrainingJob": "training.job",
    "VectorStore": "retrieval.vector_store",
    "cluster_queries": "training.topics",
    "compare_runs": "evaluation.significance",
    "evaluate_run": "evaluation.metrics",
    "expand_ids": "teachers.expand",
    "diagnose_teachers": "teachers.diagnose",
    "distill": "distillation.pipeline",
    "ensemble_teachers": "teachers.ensemble",
    "export_ranker": "interop.export",
    "load_collection": "data.collections",
    "load_pipeline": "searcher",
    "load_teacher": "teachers.load",
    "load_teacher_scores": "data.rows",
    "measure_efficiency": "reporting.efficiency",
    "read_qrels": "data.runs",
    "read_run": "data.runs",
    "sample_triples": "teachers.sample",
    "score_teacher": "teachers.score",
    "train_ranker": "training.job",
    "write_qrels": "data.runs",
    "write_report": "reporting.report",
    "write_run": "data.runs",
}

__all__ = [
    "BertCat",
    "BertCatConfig",
    "BertDot",
    "BertDotConfig",
    "ColBERT",
    "ColBERTConfig",
    "PreTTR",
    "PreTTRConfig",
    "Splade",
    "SpladeConfig",
    "TK",
    "TKConfig",
    "load_ranker",
    "losses",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    if name == "losses":
        return _import_module(".losses", __name__)
    if name in _LAZY:
        return getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
