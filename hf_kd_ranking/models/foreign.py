"""Checkpoints of sentence-transformers, PyLate and transformers' sequence classifiers as rankers, with their scores.

A checkpoint is read only if a ranker computes exactly its scores; any other is refused with the reason.
"""

import json
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from .base import RankerModel, check_fields, check_finite, clear_errors, first_keys
from .bert_cat import BertCat
from .bert_dot import BertDot
from .colbert import ColBERT
from .encoder import EncoderRanker, max_positions, read_encoder_config, without_pooler
from .errors import InputError

# Cosine is the default of sentence-transformers if a checkpoint names no similarity.
COSINE = (None, "cosine", "cos_sim")
DOT_PRODUCT = ("dot", "dot_score")
UNLIMITED = 2**16  # tokens, for encoders without a limit
POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}  # in the files of older releases
# Settings that are read here, or do not change scores; a checkpoint with any other is refused. Of the library, of the
# encoder, of the modules.
SETTINGS = (
    "__version__ model_type prompts default_prompt_name similarity_fn_name activation_fn keep_in_fp32_modules "
    "requirements query_prefix document_prefix query_length document_length attend_to_expansion_tokens "
    "do_query_expansion skiplist_words"
).split()
ENCODER_SETTINGS = (
    "transformer_task modality_config module_output_name unpad_inputs query_length document_length query_expansion "
    "max_seq_length do_lower_case"
).split()
MODULE_SETTINGS = {
    "Transformer": (),
    "Pooling": ("embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt", *POOLING),
    "Dense": ("in_features", "out_features", "bias", "activation_function", "use_residual"),
    "MultiVectorMask": ("skiplist_words", "skiplist_tasks", "keep_only_token_ids"),
    "Normalize": (),
}
ENCODER_FILES = "bert roberta distilbert camembert albert xlm-roberta xlnet".split()  # sentence_..._config.json
# Activations of CrossEncoders that leave the order of the logits as it is.
INCREASING = ("Identity", "Sigmoid", "Tanh", "LogSigmoid", "Softplus", "Softsign")

# Names of the two layers in the head of a sequence classifier, and the activation between them.
ClassifierHead = namedtuple("ClassifierHead", "dense output activation")
_TWO_LAYERS = ("classifier.dense", "classifier.out_proj")
# By model_type; other classifiers have heads that BERT_CAT has no fields for.
CLASSIFIER_HEADS = {
    "bert": ClassifierHead("bert.pooler.dense", "classifier", "tanh"),
    "distilbert": ClassifierHead("pre_classifier", "classifier", "relu"),
    "electra": ClassifierHead(*_TWO_LAYERS, "gelu"),
} | dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), ClassifierHead(*_TWO_LAYERS, "tanh"))


def load_foreign(name_or_path: str, **overrides: Any) -> RankerModel | None:
    """Load another library's ranking checkpoint; None if the checkpoint is a plain encoder.

    Args:
        name_or_path: a folder or a Hub name. A bi-encoder with [CLS] or mean pooling becomes a BERT_DOT (normalised if
            the checkpoint compares by cosine), a multi-vector encoder (PyLate's too) a ColBERT, a classifier with one
            label a BERT_CAT whose scores are the logits.
        **overrides: fields of the architecture's config, and `dtype`.

    Raises:
        InputError: naming what the ranker cannot express.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    settings = read_json(name_or_path, "config_sentence_transformers.json") or {}
    modules = read_json(name_or_path, "modules.json")
    if modules is None:
        return _read_classifier(name_or_path, config, settings, overrides) if is_classifier(config) else None
    chain = _read_modules(name_or_path, modules)
    refuse_unknown(name_or_path, "config_sentence_transformers.json", settings, SETTINGS)
    kind = settings.get("model_type") or "SentenceTransformer"
    if kind == "CrossEncoder":
        _check_order(name_or_path, chain, ["Transformer"])
        return _read_classifier(name_or_path, config, settings, overrides)
    if kind in ("ColBERT", "MultiVectorEncoder"):
        model_class, fields = ColBERT, _multi_vector_fields(name_or_path, chain, settings)
    elif kind == "SentenceTransformer":
        model_class, fields = BertDot, _bi_encoder_fields(name_or_path, chain, settings)
    else:
        raise refusal(name_or_path, f"it is a {kind}")
    dense = chain.get("Dense")
    if dense is not None:
        activation = dense.get("activation_function", "Tanh").rpartition(".")[2]
        if activation != "Identity" or dense.get("use_residual"):
            raise refusal(name_or_path, f"its Dense module is not linear ({activation}) or adds its input")
        fields["compression_dim"] = dense["out_features"]
    fields |= read_lengths(name_or_path, config, settings, model_class)
    model = model_class.from_encoder(name_or_path, **(fields | overrides))
    if dense is not None:
        file, quiet = f"{dense['path']}/model.safetensors", {"_raise_exceptions_for_missing_entries": False}
        path = cached_file(name_or_path, file, **quiet)
        if path is None:
            raise InputError(f"{name_or_path} has no {file}; convert the weights, pickles are not read.")
        weights = load_state_dict_from_file(path)
        with torch.no_grad():
            model.compressor.weight.copy_(weights["linear.weight"])
            model.compressor.bias.copy_(weights.get("linear.bias", torch.zeros(())))
        check_finite(model, name_or_path)
        model.is_fresh = False
    return model


def is_foreign_ranker(name_or_path: str) -> bool:
    """Return True for a checkpoint that another library scores with: not for encoders and files of word vectors."""
    if Path(name_or_path).is_file():
        return False
    return bool(read_json(name_or_path, "modules.json")) or is_classifier(AutoConfig.from_pretrained(name_or_path))


def is_classifier(config: PreTrainedConfig) -> bool:
    """Return True for the config of a sequence classifier of transformers."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def read_json(name: str, file: str, subfolder: str = "") -> Any:
    """Read a JSON file of a checkpoint, in a folder or on the Hub; None if the file does not exist.

    Raises:
        InputError: if it is damaged, or neither an object nor a list of objects.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, file, subfolder=subfolder, **quiet)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON, or of its encoding
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    parts, needed = [content], set()
    if file == "modules.json":
        parts, needed = content, {"type", "path"}
    is_known = isinstance(parts, list) and len(parts) > 0
    if not is_known or not all(isinstance(part, dict) and needed <= part.keys() for part in parts):
        raise InputError(f"{path} does not have the form that sentence-transformers writes: {str(content)[:60]}.")
    return content


def _read_modules(name: str, modules: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Return the settings of the modules by class name, in the order they run; `path` is a module's folder."""
    chain = {}
    for module in modules:
        library, _, class_name = module["type"].rpartition(".")
        if library.partition(".")[0] not in ("sentence_transformers", "pylate"):
            raise refusal(name, f"its module {module['type']} is code of its own")
        if class_name in chain:
            raise refusal(name, f"the module {class_name} occurs twice")
        chain[class_name] = (read_json(name, "config.json", module["path"]) or {}) | {"path": module["path"]}
    if next(iter(chain)) != "Transformer" or chain["Transformer"]["path"]:
        raise refusal(name, f"its first module is {next(iter(chain))} in {modules[0]['path']!r}, needed an encoder")
    chain["Transformer"] = {"path": ""}  # its folder's config.json is the encoder's
    return chain


def _check_order(name: str, chain: dict[str, dict[str, Any]], known: list[str]) -> None:
    found = list(chain)
    if found[:2] != known[:2] or found != [module for module in known if module in chain]:
        raise refusal(name, f"its modules are {', '.join(found)}, needed {', '.join(known)} (the last two optional)")
    for module, values in chain.items():
        in_and_out = {values.get(f"module_{end}_name") for end in ("input", "output")} - {None}
        if len(in_and_out) > 1 or not in_and_out <= {"sentence_embedding", "token_embeddings"}:
            raise refusal(name, f"its {module} module reads and writes {' and '.join(sorted(in_and_out))}")
        known_values = ("path", "module_input_name", "module_output_name", *MODULE_SETTINGS[module])
        refuse_unknown(name, f"{values['path']}/config.json", values, known_values)


def refuse_unknown(name: str, file: str, values: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse a checkpoint with settings that are not read here: they may change its scores."""
    for key, value in values.items():
        if key not in known and value not in (None, False, "", {}, []):
            raise refusal(name, f"its {file} sets {key} to {value}")


def _bi_encoder_fields(name: str, chain: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    _check_order(name, chain, ["Transformer", "Pooling", "Dense", "Normalize"])
    pooling, fields = chain["Pooling"], read_prompts(settings)
    if any(fields.values()) and not pooling.get("include_prompt", True):
        raise refusal(name, "it leaves its prompt out of the pooling")
    modes = pooling.get("pooling_mode") or []
    if isinstance(modes, str):
        modes = [modes]
    if not modes:
        modes = [POOLING.get(key, key) for key in pooling if key.startswith("pooling_mode_") and pooling[key]]
    if len(modes) != 1 or modes[0] not in POOLING.values():
        raise refusal(name, f"it pools by {' and '.join(modes) or 'nothing'}, needed cls or mean")
    similarity = settings.get("similarity_fn_name")
    if similarity not in COSINE + DOT_PRODUCT:
        raise refusal(name, f"it compares by {similarity}, needed dot or cosine")
    return fields | {"pooling": modes[0], "normalize": "Normalize" in chain or similarity in COSINE}


def _multi_vector_fields(name: str, chain: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    _check_order(name, chain, ["Transformer", "Dense", "MultiVectorMask", "Normalize"])
    is_pylate = settings["model_type"] == "ColBERT"  # it masks and normalises without modules
    if is_pylate:
        skips_tokens = settings.get("skiplist_words", ["punctuation"])
        expands_queries = settings.get("do_query_expansion") is not False
    else:
        mask, encoder = chain.get("MultiVectorMask", {}), _read_encoder_settings(name)
        skips_tokens = mask.get("skiplist_words") or mask.get("keep_only_token_ids")
        expands_queries = encoder.get("query_expansion")
    if skips_tokens:
        raise refusal(name, "it leaves document tokens out of the score (skiplist_words), and ColBERT counts all")
    if expands_queries:
        raise refusal(name, "it pads queries with [MASK] to a length, and ColBERT adds a fixed number of [MASK]")
    if settings.get("similarity_fn_name") not in (None, "maxsim", "MaxSim"):
        raise refusal(name, f"it scores by {settings['similarity_fn_name']}, needed maxsim")
    for side in ("query", "document"):  # PyLate inserts its prefixes as one token each
        marker = settings.get(f"{side}_prefix", f"[{side[0].upper()}] ")
        if is_pylate and marker and AutoTokenizer.from_pretrained(name).tokenize(marker) != [marker]:
            raise refusal(name, f"its {side} prefix {marker!r} is a token that the tokenizer does not make of text")
    return read_prompts(settings) | {"query_augmentation": 0, "normalize": is_pylate or "Normalize" in chain}


def read_prompts(settings: dict[str, Any]) -> dict[str, str]:
    """Return the prefixes of both sides: those that encode_query and encode_document put before texts."""
    prompts, fields = settings.get("prompts") or {}, {}
    for side in ("query", "document"):
        prompt = prompts.get(side) or ""  # other prompts, and the default prompt, are for `encode`
        marker = settings.get(f"{side}_prefix") or ""  # PyLate's, before the prompt
        fields[f"{side}_prefix"] = marker + prompt.removeprefix(marker)
    return fields


def _read_encoder_settings(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for encoder in ENCODER_FILES:
        settings = read_json(name, f"sentence_{encoder}_config.json") or {}
        if settings:
            break
    refuse_unknown(name, "sentence_bert_config.json", settings, ENCODER_SETTINGS)
    modalities = settings.get("modality_config") or {}
    if "message" in modalities:
        raise refusal(name, "it puts texts into a chat template")
    output = modalities.get("text", {}).get("method_output_name", "last_hidden_state")
    if output not in ("last_hidden_state", "logits"):
        raise refusal(name, f"it reads {output} of its encoder, needed the last states")
    return settings


def read_lengths(
    name: str, config: PreTrainedConfig, settings: dict[str, Any], model_class: type[EncoderRanker]
) -> dict[str, int]:
    """Return the longest query and document in tokens, as fields of a ranker's config."""
    positions = max_positions(config) or UNLIMITED
    encoder = _read_encoder_settings(name)
    tokenizer = read_json(name, "tokenizer_config.json") or {}
    if encoder.get("do_lower_case") and tokenizer.get("do_lower_case") is False:
        raise refusal(name, "it lower-cases texts for a tokenizer that does not")
    longest = encoder.get("max_seq_length") or tokenizer.get("model_max_length") or positions
    longest = int(min(longest, positions))
    if model_class.config_class.joins_texts:
        query = min(model_class.config_class.max_query_length, longest // 2)
        return {"max_query_length": query, "max_document_length": longest - query}
    lengths = {}
    for field in ("query_length", "document_length"):
        length = encoder.get(field) or settings.get(field) or longest
        lengths[f"max_{field}"] = min(length, positions)
    return lengths


def _read_classifier(
    name: str, config: PreTrainedConfig, settings: dict[str, Any], overrides: dict[str, Any]
) -> BertCat:
    head = CLASSIFIER_HEADS.get(config.model_type)
    if head is None:
        raise refusal(name, f"its head is that of {config.model_type} classifiers")
    if config.num_labels != 1:
        raise refusal(name, f"it has {config.num_labels} labels, needed one")
    activation = read_activation(config, settings)
    if activation not in INCREASING:
        raise refusal(name, f"its activation {activation} changes the order of the logits")
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    fields = {"head_activation": head.activation, "query_prefix": prompt or ""}
    fields |= read_lengths(name, config, settings, BertCat)
    fields |= overrides
    dtype = fields.pop("dtype", None) or torch.float32
    check_fields(BertCat.config_class, fields)
    with clear_errors(name):
        config = read_encoder_config(name, fields.pop("encoder_config", None))
    classifier = load_complete(AutoModelForSequenceClassification, name, config=config, dtype=dtype)
    dense, output = classifier.get_submodule(head.dense), classifier.get_submodule(head.output)
    model = BertCat.around(without_pooler(classifier.base_model), **fields)
    model._dense_layer.load_state_dict(dense.state_dict())
    model._classification_layer.load_state_dict(output.state_dict())
    model.is_fresh = model.config.has_passage_attention
    model.check_weights(name)
    return model


def load_complete(model_class: type, name: str, **settings: Any) -> PreTrainedModel:
    """Load a model of transformers, but for its pooler; an InputError names weights that are missing or not finite."""
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # collected here, raised below
    with clear_errors(name):
        model, info = model_class.from_pretrained(name, **settings)
    lacking = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if lacking or info["mismatched_keys"]:
        raise InputError(
            f"{name} does not hold all weights of a {type(model).__name__}: missing {first_keys(lacking)}, mismatched "
            f"{first_keys(info['mismatched_keys'])}; without a trained head its scores would be random."
        )
    check_finite(model, name)
    return model


def read_activation(config: PreTrainedConfig, settings: dict[str, Any]) -> str:
    """Return the name of the activation that a CrossEncoder applies to its logits."""
    path = settings.get("activation_fn")
    if path is None:
        path = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    if path is None:
        path = getattr(config, "sbert_ce_default_activation_function", None)
    if path is None or not path.startswith("torch."):  # other code is not run, there as here
        return "Sigmoid" if config.num_labels == 1 else "Identity"
    return path.rpartition(".")[2]


def refusal(name: str, reason: str) -> InputError:
    """Return the error for a checkpoint whose scores no ranker computes."""
    return InputError(
        f"{name} is another library's ranker, whose scores no ranker of this package can compute: {reason}. As it is, "
        "it can be a teacher, load_teacher(name_or_path); architecture=... builds a fresh ranker on its encoder."
    )
