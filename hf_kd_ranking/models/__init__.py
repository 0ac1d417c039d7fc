"""The rankers: one file per architecture, each registered with the transformers Auto classes on import."""

from .base import RankerConfig, RankerModel, RankingOutput
from .bert_cat import BertCat, BertCatConfig
from .bert_dot import BertDot, BertDotConfig
from .loading import ARCHITECTURES, load_ranker

__all__ = [
    "ARCHITECTURES",
    "BertCat",
    "BertCatConfig",
    "BertDot",
    "BertDotConfig",
    "RankerConfig",
    "RankerModel",
    "RankingOutput",
    "load_ranker",
]
