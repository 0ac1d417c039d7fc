# The public names, grouped by what they are for. `__init__.py` reads this list and imports each name on first use;
# type checkers and editors read it as it is. `X as X` exports a name to them.

# Rankers
# isort: split
from .models import TK as TK
from .models import TKL as TKL
from .models import BertCat as BertCat
from .models import BertCatConfig as BertCatConfig
from .models import BertDot as BertDot
from .models import BertDotConfig as BertDotConfig
from .models import ColBERT as ColBERT
from .models import ColBERTConfig as ColBERTConfig
from .models import PreTTR as PreTTR
from .models import PreTTRConfig as PreTTRConfig
from .models import Splade as Splade
from .models import SpladeConfig as SpladeConfig
from .models import TKConfig as TKConfig
from .models import TKLConfig as TKLConfig
from .models import load_ranker as load_ranker
from .ranker import Ranker as Ranker

# Data
# isort: split
from .data.collections import load_collection as load_collection
from .data.rows import load_teacher_scores as load_teacher_scores
from .data.runs import Run as Run
from .data.runs import read_qrels as read_qrels
from .data.runs import read_run as read_run
from .data.runs import write_run as write_run
from .data.texts import TextStore as TextStore
from .errors import InputError as InputError

# Teachers
# isort: split
from .teachers.diagnose import diagnose_teachers as diagnose_teachers
from .teachers.ensemble import ensemble_teachers as ensemble_teachers
from .teachers.expand import expand_ids as expand_ids
from .teachers.load import load_teacher as load_teacher
from .teachers.sample import sample_triples as sample_triples
from .teachers.score import score_teacher as score_teacher

# Training
# isort: split
from . import losses as losses
from .training.arguments import RankingTrainingArguments as RankingTrainingArguments
from .training.job import TrainingJob as TrainingJob
from .training.job import train_ranker as train_ranker
from .training.trainer import RankingTrainer as RankingTrainer

# Distillation: from a collection and a teacher to a pipeline
# isort: split
from .distillation.job import DistillJob as DistillJob
from .distillation.pipeline import distill as distill
from .searcher import load_pipeline as load_pipeline

# Search
# isort: split
from .retrieval.bm25 import BM25Index as BM25Index
from .retrieval.colbert import ColBERTIndex as ColBERTIndex
from .retrieval.dense import DenseIndex as DenseIndex
from .retrieval.qdrant import QdrantIndex as QdrantIndex
from .retrieval.sparse import SparseIndex as SparseIndex
from .retrieval.stored_reranker import StoredReranker as StoredReranker
from .retrieval.vector_store import VectorStore as VectorStore

# Evaluation
# isort: split
from .evaluation.hf_metric import RankingMetric as RankingMetric
from .evaluation.metrics import evaluate_run as evaluate_run
from .evaluation.rerank import RerankingEvaluator as RerankingEvaluator
from .evaluation.retrieve import RetrievalEvaluator as RetrievalEvaluator
from .evaluation.significance import compare_runs as compare_runs
from .reporting.efficiency import measure_efficiency as measure_efficiency
from .reporting.report import write_report as write_report

# Other libraries
# isort: split
from .integrations.mteb import MtebEncoder as MtebEncoder
from .integrations.mteb import MtebRanker as MtebRanker
from .interop.export import export_ranker as export_ranker

__version__: str
