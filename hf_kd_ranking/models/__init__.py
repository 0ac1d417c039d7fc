"""The rankers: one file per architecture, each registered with the transformers Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .base import RankerConfig, RankerModel, RankingOutput
from .bert_cat import BertCat, BertCatConfig
from .bert_dot import BertDot, BertDotConfig
from .colbert import ColBERT, ColBERTConfig
from .loading import ARCHITECTURES, load_ranker
from .pipeline import register_pipeline
from .prettr import PreTTR, PreTTRConfig
from .tk import TK, TKConfig
from .tokenization import RankingTokenizer, TokenLists
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
    "RankingTokenizer",
    "TK",
    "TKConfig",
    "TokenLists",
    "load_ranker",
    "read_word_vectors",
]

# Here and not in the models' files, which also run as remote code where they must not register themselves.
_AUTO = {"AutoModel": AutoModel, "AutoModelForSequenceClassification": AutoModelForSequenceClassification}
for _model in ARCHITECTURES.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    for _name in _model.auto_classes:
        _AUTO[_name].register(_model.config_class, _model)
register_pipeline()
