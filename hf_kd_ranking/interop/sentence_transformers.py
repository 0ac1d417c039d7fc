"""Layouts that sentence-transformers reads, its own and PyLate's: writers, scorers, and what they cannot express."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..models import BertCat, BertCatConfig, BertDot, ColBERT, ColBERTConfig, Splade, SpladeConfig
from ..models.foreign import CLASSIFIER_HEADS
from ..models.splade import MASKED_HEADS


def write_cross_encoder(model: BertCat, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a `CrossEncoder` whose activation is the identity.

    It is transformers' classifier if that can compute the score. Otherwise it is the ranker with its code, which needs
    this package or `trust_remote_code=True`. Pairs are cut as the ranker cuts them, the longer text first.
    """
    from sentence_transformers import CrossEncoder

    tokenizer.model_max_length = model.config.max_query_length + model.config.max_document_length
    with TemporaryDirectory() as scratch:
        (_plain_classifier(model) or model).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        encoder = CrossEncoder(scratch, device="cpu", local_files_only=True, activation_fn=torch.nn.Identity())
        if model.config.query_prefix:
            encoder.prompts = {"query": model.config.query_prefix}
            encoder.default_prompt_name = "query"
        encoder.save_pretrained(str(folder), create_model_card=False)


def _plain_classifier(model: BertCat) -> PreTrainedModel | None:
    """Return the sequence classifier of transformers with a BERT_CAT's scores; None if its head cannot compute them.

    Its head has two layers. If the BERT_CAT has two as well they are copied. A single linear layer w fits into ReLU
    and GELU heads, because f(w x) - f(-w x) = w x.
    """
    config = model.config
    head = CLASSIFIER_HEADS.get(config.encoder_config.model_type)
    if head is None or config.head_activation not in (None, head.activation):
        return None
    if config.head_activation is None and head.activation == "tanh":
        return None
    settings = config.encoder_config.to_dict() | {"num_labels": 1, "problem_type": "regression"}
    encoder_config = type(config.encoder_config).from_dict(settings)
    classifier = AutoModelForSequenceClassification.from_config(encoder_config)
    classifier.base_model.load_state_dict(model.bert_model.state_dict(), strict=False)  # BERT's has a pooler too
    dense, output = classifier.get_submodule(head.dense), classifier.get_submodule(head.output)
    with torch.no_grad():
        if config.head_activation is not None:
            dense.load_state_dict(model._dense_layer.state_dict())
            output.load_state_dict(model._classification_layer.state_dict())
        else:
            weight, bias = model._classification_layer.weight, model._classification_layer.bias
            for parameter in (dense.weight, dense.bias, output.weight, output.bias):
                parameter.zero_()
            dense.weight[:2] = torch.cat([weight, -weight])
            dense.bias[:2] = torch.cat([bias, -bias])
            output.weight[0, :2] = torch.tensor([1.0, -1.0])
    return classifier.eval()


def write_encoder(model: BertDot | ColBERT, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a BERT_DOT as a `SentenceTransformer`, a ColBERT as a `MultiVectorEncoder`; prefixes become prompts.

    `encode_query` and `encode_document` cut texts at the ranker's lengths; `encode` at the longer one.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling

    config, has_token_vectors = model.config, isinstance(model, ColBERT)
    modules, layer_input = [], "token_embeddings"
    if not has_token_vectors:
        modules, layer_input = [Pooling(config.encoder_config.hidden_size, config.pooling)], "sentence_embedding"
    if config.compression_dim is not None:
        layer, identity = model.compressor, torch.nn.Identity()
        sizes = layer.in_features, layer.out_features
        dense = Dense(*sizes, activation_function=identity, module_input_name=layer_input)
        dense.linear.load_state_dict(layer.state_dict())
        modules.append(dense)
    if has_token_vectors:
        modules.append(MultiVectorMask())
    if config.normalize:
        modules.append(Normalize(module_input_name=layer_input))
    encoder = AutoModel.from_config(config.encoder_config)
    missing = encoder.load_state_dict(model.bert_model.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name in missing:  # a pooler, which is not read
            encoder.get_parameter(name).zero_()
    lengths = {"query_length": config.max_query_length, "document_length": config.max_document_length}
    tokenizer.model_max_length = max(lengths.values())
    settings = {"prompts": {"query": config.query_prefix, "document": config.document_prefix}, "device": "cpu"}
    with TemporaryDirectory() as scratch:
        encoder.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        modules.insert(0, Transformer(scratch, **lengths))
        if has_token_vectors:
            result = MultiVectorEncoder(modules=modules, similarity_fn_name="maxsim", **settings)
        else:
            result = SentenceTransformer(modules=modules, similarity_fn_name="dot", **settings)
        result.save_pretrained(str(folder), create_model_card=False)


def write_sparse_encoder(model: Splade, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a `SparseEncoder`: a masked language model with SPLADE pooling.

    Static queries have a Router to their weights. Both sides are cut at the ranker's lengths.
    """
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    config = model.config
    lengths = {"query_length": config.max_query_length, "document_length": config.max_document_length}
    settings = {"prompts": {"query": config.query_prefix, "document": config.document_prefix}, "device": "cpu"}
    settings |= {"similarity_fn_name": "dot", "max_active_dims": config.document_top_k}
    with TemporaryDirectory() as scratch:
        tokenizer.model_max_length = max(lengths.values())
        _masked_model(model).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        modules = [Transformer(scratch, transformer_task="fill-mask", **lengths), SpladePooling("max")]
        if config.query_encoding == "static":
            tokenizer.model_max_length = config.max_query_length - 2  # without [CLS] and [SEP]
            weights = model._query_weights.weight.detach().squeeze(1).clone()
            weights[config.special_token_ids or []] = 0
            query_modules = [SparseStaticEmbedding(tokenizer, weights[: len(tokenizer.get_vocab())])]
            modules = [Router.for_query_document(query_modules=query_modules, document_modules=modules)]
        result = SparseEncoder(modules=modules, **settings)
        result.save_pretrained(str(folder), create_model_card=False)


def _masked_model(model: Splade) -> PreTrainedModel:
    """Return the masked language model of transformers with the head of a SPLADE."""
    config, names = model.config.encoder_config, MASKED_HEADS[model.config.encoder_config.model_type]
    masked = AutoModelForMaskedLM.from_config(config)
    masked.base_model.load_state_dict(model.bert_model.state_dict())
    head = model._expansion_head
    masked.get_submodule(names.dense).load_state_dict(head.dense.state_dict())
    masked.get_submodule(names.norm).load_state_dict(head.norm.state_dict())
    with torch.no_grad():
        masked.get_parameter(names.bias).copy_(head.bias)
    masked.tie_weights()
    return masked.eval()


def sparse_encoder_obstacles(config: SpladeConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a SPLADE that a `SparseEncoder` cannot express, with the reasons."""
    obstacles, model_type = [], config.encoder_config.model_type
    if config.expansion == "none":
        obstacles.append("expansion='none': a SparseEncoder has no layer that weighs the tokens of a text")
    elif model_type not in MASKED_HEADS or model_type == "modernbert":
        obstacles.append(f"expansion={config.expansion!r}: the masked language model of {model_type} has another head")
    if config.query_encoding == "lexical":
        obstacles.append("query_encoding='lexical': a SparseEncoder expands queries, or has static weights for them")
    if config.threshold > 0:
        obstacles.append(f"threshold={config.threshold}: a SparseEncoder prunes by max_active_dims only")
    if config.query_top_k != config.document_top_k:
        limits = f"query_top_k={config.query_top_k}, document_top_k={config.document_top_k}"
        obstacles.append(f"{limits}: a SparseEncoder has one limit for both sides (max_active_dims)")
    return obstacles


def write_pylate(model: ColBERT, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write PyLate's layout: encoder and linear layer; PyLate masks and normalises by itself."""
    write_encoder(model, tokenizer, folder)
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[:2]
    for extra in folder.glob("[2-9]_*"):
        shutil.rmtree(extra)
    modules[0]["type"] = "sentence_transformers.models.Transformer"
    modules[1]["type"] = "pylate.models.Dense.Dense"
    config = model.config
    settings = {
        "model_type": "ColBERT",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": config.query_prefix,
        "document_prefix": config.document_prefix,
        "query_length": config.max_query_length,
        "document_length": config.max_document_length,
        "do_query_expansion": False,
        "attend_to_expansion_tokens": False,
        "skiplist_words": [],
    }
    encoder = {"max_seq_length": max(config.max_query_length, config.max_document_length), "do_lower_case": False}
    files = {"modules": modules, "config_sentence_transformers": settings, "sentence_bert_config": encoder}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def score(class_name: str, folder: Path, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """Score pairs with a class of sentence-transformers, (N,)."""
    import sentence_transformers

    encoder = vars(sentence_transformers)[class_name](str(folder), device="cpu", local_files_only=True)
    if class_name == "CrossEncoder":
        return encoder.predict(list(zip(queries, documents, strict=True)), show_progress_bar=False)
    query_vectors = encoder.encode_query(list(queries), show_progress_bar=False)
    document_vectors = encoder.encode_document(list(documents), show_progress_bar=False)
    return encoder.similarity_pairwise(query_vectors, document_vectors).numpy()


def cross_encoder_obstacles(config: BertCatConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a BERT_CAT that a `CrossEncoder` cannot express, with the reasons."""
    obstacles = []
    if config.document_prefix:
        prefix = f"document_prefix={config.document_prefix!r}"
        obstacles.append(f"{prefix}: a CrossEncoder has a prompt before the query only")
    if config.passage_length is not None:
        obstacles.append(f"passage_length={config.passage_length}: a CrossEncoder reads a pair as one sequence")
    return obstacles


def multi_vector_obstacles(config: ColBERTConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a ColBERT that a `MultiVectorEncoder` cannot express, with the reasons."""
    if not config.query_augmentation:
        return []
    return [
        f"query_augmentation={config.query_augmentation}: these [MASK] tokens follow the [SEP] of a query of any "
        "length, but this layout pads queries to one length; query_augmentation=0 leaves them out, which changes the "
        "scores: train with it"
    ]


def pylate_obstacles(config: ColBERTConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the fields of a ColBERT that PyLate's layout cannot express, with the reasons."""
    obstacles = multi_vector_obstacles(config, tokenizer)
    if not config.normalize:
        obstacles.append("normalize=False: PyLate scales every vector to length 1; train with normalize=True")
    for name, prefix in (("query_prefix", config.query_prefix), ("document_prefix", config.document_prefix)):
        if prefix and tokenizer.tokenize(prefix) != [prefix]:
            obstacles.append(f"{name}={prefix!r}: PyLate's prefix is one token, and the tokenizer splits this text")
    return obstacles
