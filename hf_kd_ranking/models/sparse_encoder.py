"""SparseEncoder checkpoints of sentence-transformers as SPLADE rankers, with their scores.

The documents are encoded by a masked language model with SPLADE pooling (max, ReLU). Queries are encoded alike, or
have one static weight per word, by a Router.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file
from transformers import AutoConfig, AutoTokenizer

from .errors import InputError
from .foreign import DOT_PRODUCT, SETTINGS, read_json, read_lengths, read_prompts, refusal, refuse_unknown
from .splade import Splade

ROUTER_FILE = "router_config.json"
MASKED_MODULES = ("Transformer", "MLMTransformer")
POOLING = {"pooling_strategy": "max", "activation_function": "relu"}


def encoder_folder(name_or_path: str) -> str:
    """Return where encoder and tokenizer of a checkpoint are: itself, or a folder inside if it has a Router."""
    path = Path(name_or_path)
    if not (path / ROUTER_FILE).is_file() or (path / "config.json").is_file():
        return name_or_path
    structure = read_json(name_or_path, ROUTER_FILE).get("structure") or {}
    return str(path / (structure.get("document") or [""])[0])


def load_sparse_encoder(name: str, **overrides: Any) -> Splade | None:
    """Load a SparseEncoder; None if a checkpoint is another one.

    Args:
        name: a folder or a name on the Hub.
        **overrides: fields of the config of SPLADE, and `dtype`.

    Raises:
        InputError: naming what SPLADE cannot express.
    """
    settings = read_json(name, "config_sentence_transformers.json") or {}
    if settings.get("model_type") != "SparseEncoder" or read_json(name, "modules.json") is None:
        return None
    refuse_unknown(name, "config_sentence_transformers.json", settings, (*SETTINGS, "max_active_dims"))
    if settings.get("similarity_fn_name") not in (None, *DOT_PRODUCT):
        raise refusal(name, f"it compares by {settings['similarity_fn_name']}, needed dot")
    queries, documents = _routes(name)
    folder = encoder_folder(name)
    _check_chain(name, documents)
    is_static = queries is not None
    fields = read_prompts(settings) | {"query_top_k": settings.get("max_active_dims"), "expansion": "head"}
    fields["document_top_k"] = fields["query_top_k"]
    fields |= read_lengths(folder, AutoConfig.from_pretrained(folder), settings, Splade)
    weights = None
    if is_static:
        weights, length = _read_static(name, queries, folder)
        fields |= {"query_encoding": "static", "max_query_length": min(length, fields["max_document_length"])}
    model = Splade.from_encoder(folder, **(fields | overrides))
    if is_static:
        with torch.no_grad():
            model._query_weights.weight.zero_()
            model._query_weights.weight[: len(weights), 0] = weights
    model.is_fresh = False
    return model


def _routes(name: str) -> tuple[list[tuple[str, str]] | None, list[tuple[str, str]]]:
    """Return (class name, folder) of the modules of queries and of documents; None for queries read as documents."""
    modules = [(module["type"].rpartition(".")[2], module["path"]) for module in read_json(name, "modules.json")]
    if modules[0][0] != "Router":
        return None, modules
    router = read_json(name, ROUTER_FILE)
    if len(modules) > 1 or not Path(name).is_dir() or router is None:
        raise refusal(name, "its modules follow a Router, or it is not in a local folder (hf download)")
    structure, types = router.get("structure") or {}, router.get("types") or {}
    if set(structure) != {"query", "document"} or (router.get("parameters") or {}).get("route_mappings"):
        raise refusal(name, f"its Router has the routes {', '.join(structure)}, needed query and document")
    routes = {}
    for side, folders in structure.items():
        routes[side] = [(types[folder].rpartition(".")[2], folder) for folder in folders]
    if routes["query"] == routes["document"]:
        return None, routes["document"]
    return routes["query"], routes["document"]


def _check_chain(name: str, modules: list[tuple[str, str]]) -> None:
    names = [class_name for class_name, _ in modules]
    if len(names) != 2 or names[0] not in MASKED_MODULES or names[1] != "SpladePooling":
        raise refusal(name, f"its modules are {', '.join(names)}, needed a masked language model and SpladePooling")
    settings = read_json(name, "sentence_bert_config.json", modules[0][1]) or {}
    if names[0] == "Transformer" and settings.get("transformer_task") != "fill-mask":
        raise refusal(name, f"its transformer_task is {settings.get('transformer_task')}, needed fill-mask")
    pooling = read_json(name, "config.json", modules[1][1]) or {}
    for key, needed in POOLING.items():
        if pooling.get(key, needed) != needed:
            raise refusal(name, f"its {key} is {pooling[key]}, needed {needed}")


def _read_static(name: str, modules: list[tuple[str, str]], encoder: str) -> tuple[torch.Tensor, int]:
    """Return the weight of each word of static queries, and the longest query in tokens with [CLS] and [SEP]."""
    names = [class_name for class_name, _ in modules]
    if names != ["SparseStaticEmbedding"]:
        raise refusal(name, f"its queries are encoded by {', '.join(names)}, needed SparseStaticEmbedding")
    folder = Path(name) / modules[0][1]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(encoder).get_vocab():
        raise refusal(name, "its queries and its documents have different vocabularies")
    path = (read_json(name, "config.json", modules[0][1]) or {}).get("path")
    if path is None:
        if not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder} has no model.safetensors; convert the weights, pickles are not read.")
        weights = load_state_dict_from_file(folder / "model.safetensors")["weight"]
    else:
        weights = torch.zeros(len(tokenizer))
        for word, weight in (read_json(name, Path(path).name, modules[0][1]) or {}).items():
            weights[tokenizer.convert_tokens_to_ids(word)] = weight
    return weights, tokenizer.model_max_length + 2
