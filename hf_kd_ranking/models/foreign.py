"""Checkpoints of sentence-transformers, PyLate and transformers' sequence classifiers as rankers, with their scores.

Only what a ranker can say exactly is read; everything else is refused with what stands in the way.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import load_state_dict_from_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from .base import RankerModel, check_fields, check_finite, clear_errors, first
from .bert_cat import BertCat
from .bert_dot import BertDot
from .colbert import ColBERT
from .encoder import EncoderRanker, max_positions, without_pooler

# Vectors of one length are compared by cosine: sentence-transformers' own default, where a checkpoint names none.
COSINE = (None, "cosine", "cos_sim")
UNLIMITED = 2**16  # tokens; of encoders without a limit
POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}  # as older releases wrote it


class ClassifierHead(NamedTuple):
    """Where a sequence classifier keeps the two layers of its head, and the activation between them."""

    dense: str
    output: str
    activation: str


_TWO_LAYERS = ("classifier.dense", "classifier.out_proj")
# By model_type; other classifiers have heads that BERT_CAT has no fields for.
CLASSIFIER_HEADS = {
    "bert": ClassifierHead("bert.pooler.dense", "classifier", "tanh"),
    "distilbert": ClassifierHead("pre_classifier", "classifier", "relu"),
    "electra": ClassifierHead(*_TWO_LAYERS, "gelu"),
} | dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), ClassifierHead(*_TWO_LAYERS, "tanh"))


def load_foreign(name_or_path: str, **overrides: Any) -> RankerModel | None:
    """Load another library's ranking checkpoint; None for what is none, a plain encoder.

    Args:
        name_or_path: a folder or a Hub name. A bi-encoder with [CLS] or mean pooling becomes a BERT_DOT, which
            normalises its vectors where the checkpoint compares by cosine; a multi-vector encoder (PyLate's too) a
            ColBERT; a classifier with one label a BERT_CAT, whose scores are the logits.
        **overrides: fields of the architecture's config, and `dtype`.

    Raises:
        ValueError: naming what the ranker cannot express.
    """
    modules = read_json(name_or_path, "modules.json")
    config = AutoConfig.from_pretrained(name_or_path)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        return _read_classifier(name_or_path, config, overrides)
    if modules is None:
        return None
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    parts = [read_json(name_or_path, "config.json", module["path"]) or {} for module in modules]
    settings = read_json(name_or_path, "config_sentence_transformers.json") or {}
    if kinds[0] != "Transformer" or modules[0]["path"]:
        raise _refusal(name_or_path, f"its first module is {kinds[0]} in {modules[0]['path']!r}, needed an encoder")
    chain = dict(zip(kinds, parts, strict=True))
    if len(chain) < len(kinds):
        raise _refusal(name_or_path, f"a module occurs twice ({', '.join(kinds)})")
    dense = next((module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Dense"), None)
    if settings.get("model_type") in ("ColBERT", "MultiVectorEncoder"):
        cls, fields = ColBERT, _multi_vector_fields(name_or_path, chain, settings)
    else:
        cls, fields = BertDot, _bi_encoder_fields(name_or_path, chain, settings)
    if dense is not None:
        _check_dense(name_or_path, chain["Dense"])
        fields["compression_dim"] = chain["Dense"]["out_features"]
    model = cls.from_encoder(name_or_path, **(_lengths(name_or_path, config, cls, settings) | fields | overrides))
    if dense is not None:
        _load_dense(name_or_path, dense, model)
    return model


def _bi_encoder_fields(name: str, chain: dict[str, dict], settings: dict[str, Any]) -> dict[str, Any]:
    _check_order(name, list(chain), ["Transformer", "Pooling", "Dense", "Normalize"], needed=2)
    pooling = chain["Pooling"]
    modes = pooling.get("pooling_mode") or [
        POOLING.get(key, key) for key, value in pooling.items() if key.startswith("pooling_mode_") and value
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLING.values():
        raise _refusal(name, f"it pools by {' and '.join(modes) or 'nothing'}, needed cls or mean")
    prompts = _prompts(settings)
    if not pooling.get("include_prompt", True) and any(prompts.values()):
        raise _refusal(name, "it leaves its prompt out of the pooling")
    similarity = settings.get("similarity_fn_name")
    if similarity not in (*COSINE, "dot", "dot_score"):
        raise _refusal(name, f"it compares by {similarity}, needed dot or cosine")
    return {"pooling": modes[0], "normalize": "Normalize" in chain or similarity in COSINE} | prompts


def _multi_vector_fields(name: str, chain: dict[str, dict], settings: dict[str, Any]) -> dict[str, Any]:
    is_pylate = settings["model_type"] == "ColBERT"  # its masking and normalising are no modules of their own
    _check_order(name, list(chain), ["Transformer", "Dense", "MultiVectorMask", "Normalize"], needed=2)
    mask, encoder = chain.get("MultiVectorMask", {}), read_json(name, "sentence_bert_config.json") or {}
    if is_pylate:
        mask = {"skiplist_words": settings.get("skiplist_words", ["punctuation"])}
    if mask.get("skiplist_words") or mask.get("keep_only_token_ids"):
        raise _refusal(name, "it leaves document terms out of the score (skiplist_words), and ColBERT counts all")
    expands = encoder.get("query_expansion") if not is_pylate else settings.get("do_query_expansion") is not False
    if expands:
        raise _refusal(name, "it pads queries with [MASK] to a length; ColBERT adds a number of them, whatever it is")
    if settings.get("similarity_fn_name") not in (None, "maxsim", "MaxSim"):
        raise _refusal(name, f"it scores by {settings['similarity_fn_name']}, needed maxsim")
    prompts = _prompts(settings)
    if is_pylate:
        _check_markers(name, settings)
    return {"query_augmentation": 0, "normalize": is_pylate or "Normalize" in chain} | prompts


def _read_classifier(name: str, config: PreTrainedConfig, overrides: dict[str, Any]) -> BertCat:
    head = CLASSIFIER_HEADS.get(config.model_type)
    if config.num_labels != 1 or head is None:
        reason = f"it has {config.num_labels} labels, needed one" if head else f"of the head of {config.model_type}"
        raise _refusal(name, reason)
    settings = read_json(name, "config_sentence_transformers.json") or {}
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    fields = {"head_activation": head.activation, "query_prefix": prompt or ""}
    fields |= _lengths(name, config, BertCat, settings)
    fields |= overrides
    dtype = fields.pop("dtype", None) or torch.float32
    check_fields(BertCat.config_class, fields)
    with clear_errors(name):
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{name} is not a complete classifier: missing {first(info['missing_keys'])}.")
    check_finite(classifier, name)
    layers = classifier.get_submodule(head.dense), classifier.get_submodule(head.output)
    encoder = without_pooler(classifier.base_model)
    encoder.config._name_or_path = Path(name).name if Path(name).exists() else name
    model = BertCat(BertCat.config_class(encoder_config=encoder.config, **fields)).to(dtype)
    model.bert_model = encoder
    model._dense_layer, model._classification_layer = layers
    return model.eval()


def _lengths(
    name: str, config: PreTrainedConfig, cls: type[EncoderRanker], settings: dict[str, Any]
) -> dict[str, Any]:
    """The lengths at which the checkpoint cuts its texts."""
    positions = max_positions(config) or UNLIMITED
    encoder, tokenizer = (read_json(name, f"{kind}_config.json") or {} for kind in ("sentence_bert", "tokenizer"))
    if encoder.get("do_lower_case") and tokenizer.get("do_lower_case") is False:
        raise _refusal(name, "it lower-cases texts for a tokenizer that does not")
    general = int(min(encoder.get("max_seq_length") or tokenizer.get("model_max_length") or positions, positions))
    if cls is BertCat:
        query = min(cls.config_class.max_query_length, general // 2)
        return {"max_query_length": query, "max_document_length": general - query}
    found = settings | {key: value for key, value in encoder.items() if value is not None}
    lengths = {side: found.get(f"{side}_length") or general for side in ("query", "document")}
    return {f"max_{side}_length": min(length, positions) for side, length in lengths.items()}


def _prompts(settings: dict[str, Any]) -> dict[str, str]:
    """What is put before queries and documents."""
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name")) or ""
    found = {"query": ("query",), "document": ("document", "passage", "corpus")}
    texts = {
        side: next((prompts[n] for n in names if prompts.get(n) is not None), default) for side, names in found.items()
    }
    markers = {side: settings.get(f"{side}_prefix") or "" for side in found}  # PyLate's, before the prompt
    return {f"{side}_prefix": markers[side] + text.removeprefix(markers[side]) for side, text in texts.items()}


def _check_markers(name: str, settings: dict[str, Any]) -> None:
    """PyLate inserts its prefixes as tokens; as text they must become the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    for side in ("query", "document"):
        marker = settings.get(f"{side}_prefix", f"[{side[0].upper()}] ")
        if marker and tokenizer.tokenize(marker) != [marker]:
            raise _refusal(name, f"its {side} prefix {marker!r} is a token that the tokenizer does not make of text")


def _check_order(name: str, kinds: list[str], known: list[str], needed: int) -> None:
    if kinds[:needed] != known[:needed] or kinds != [kind for kind in known if kind in kinds]:
        raise _refusal(name, f"its modules are {', '.join(kinds)}, needed {', '.join(known)} (the last two may lack)")


def _check_dense(name: str, dense: dict[str, Any]) -> None:
    activation = dense.get("activation_function", "Tanh").rpartition(".")[2]
    if activation != "Identity" or dense.get("use_residual"):
        raise _refusal(
            name, f"its Dense module is not linear ({activation}, use_residual {dense.get('use_residual')})"
        )


def _load_dense(name: str, folder: str, model: BertDot | ColBERT) -> None:
    path = cached_file(name, "model.safetensors", subfolder=folder, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(f"{name} has no {folder}/model.safetensors; convert the weights, pickles are not read.")
    weights = load_state_dict_from_file(path)
    with torch.no_grad():
        model.compressor.weight.copy_(weights["linear.weight"])
        model.compressor.bias.copy_(weights.get("linear.bias", torch.zeros(())))
    check_finite(model, name)


def read_json(name: str, file: str, subfolder: str = "") -> Any:
    """What a JSON file of a checkpoint, in a folder or on the Hub, holds; None where there is no such file."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, file, subfolder=subfolder, **quiet)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name} is another library's ranker, whose scores no model of this package can give: {reason}. Classifiers "
        "and bi-encoders can be teachers as they are, load_teacher(name_or_path); with architecture=... the encoder "
        "alone becomes a fresh ranker."
    )
