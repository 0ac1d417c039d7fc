"""The rankers: one file per architecture, all registered with the transformers Auto classes on import."""

from .base import RankerConfig, RankerModel, RankingOutput
from .bert_cat import BertCat, BertCatConfig
from .bert_dot import BertDot, BertDotConfig
from .colbert import ColBERT, ColBERTConfig
from .loading import ARCHITECTURES, find_architecture, load_ranker, register_ranker
from .pipeline import register_pipeline
from .prettr import PreTTR, PreTTRConfig
from .splade import Splade, SpladeConfig
from .tk import TK, TKConfig
from .tkl import TKL, TKLConfig
from .tokenization import Cuts, RankingProcessor, TokenLists
from .word_vectors import read_word_vectors

__all__ = [
    "ARCHITECTURES",
    "BertCat",
    "BertCatConfig",
    "BertDot",
    "BertDotConfig",
    "ColBERT",
    "ColBERTConfig",
    "PreTTR",
    "PreTTRConfig",
    "RankerConfig",
    "RankerModel",
    "RankingOutput",
    "Cuts",
    "RankingProcessor",
    "Splade",
    "SpladeConfig",
    "TK",
    "TKConfig",
    "TKL",
    "TKLConfig",
    "TokenLists",
    "find_architecture",
    "load_ranker",
    "read_word_vectors",
    "register_ranker",
]

register_pipeline()
