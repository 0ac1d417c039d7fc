"""Teachers that sentence-transformers runs, so that the score is that library's for the same checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..inference import check_pairs, fingerprint
from ..models.base import clear_errors
from ..models.foreign import INCREASING, load_complete, read_activation, read_json
from .classifiers import choose_output, keep_words, max_tokens, prepare_classifier, set_padding

CLASSES = {"cross-encoder": "CrossEncoder", "bi-encoder": "SentenceTransformer", "multi-vector": "MultiVectorEncoder"}
# The kinds of `load_teacher` by the model_type in config_sentence_transformers.json.
MODEL_TYPES = {name: kind for kind, name in CLASSES.items()} | {"ColBERT": "multi-vector"}
TASKS = ("sequence-classification", "text-generation", "feature-extraction")  # of the encoders of cross-encoders
MIN_TEXT = 4  # tokens of a document for which a prompt must leave room

Score = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def load_cross_encoder(
    name: str, label: str | None, max_length: int | None, batch_size: int, dtype: torch.dtype, device: str
) -> tuple[Score, str]:
    """Load a `CrossEncoder`; return the function that scores, by its logits, and the fingerprint."""
    settings = read_json(name, "config_sentence_transformers.json") or {}
    task = (read_json(name, "sentence_bert_config.json") or {}).get("transformer_task", "sequence-classification")
    if task not in TASKS:
        raise InputError(f"{name} cannot be a teacher: it is a cross-encoder for {task}, which takes more than text.")
    model = _load("cross-encoder", name, dtype, device)
    output, activation = None, read_activation(model.config, settings)
    if task == "sequence-classification":
        output = choose_output(name, model.config, activation, label)
        model.tokenizer.padding_side = prepare_classifier(model.model, model.tokenizer)
    elif model.num_labels > 1 or activation not in INCREASING:
        raise InputError(f"{name} cannot be a teacher: it has {model.num_labels} outputs, activation {activation}.")
    elif task == "text-generation":
        _keep_answers(model)
        if not _has_relative_positions(model):
            batch_size = 1  # the library pads on the left, which moves absolute positions
    model.max_seq_length = max_tokens(model.config, model.max_seq_length, max_length)

    def score(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        check_pairs(queries, documents)
        if "message" in model[0].modality_config:
            _check_room(model, name, queries)
        pairs = list(zip(queries, documents, strict=True))
        options = {"batch_size": batch_size, "activation_fn": nn.Identity(), "show_progress_bar": False}
        with clear_errors(name):  # for example of a template without a place for the document
            logits = model.predict(pairs, convert_to_tensor=True, **options).float()
        scores = logits if output is None else output.scores(logits.view(len(pairs), -1))
        return scores.cpu().numpy()

    return score, fingerprint(model, "cross-encoder", settings, label, max_length, batch_size, dtype)


def load_encoder(
    name: str, kind: str, similarity: str | None, batch_size: int, dtype: torch.dtype, device: str
) -> tuple[Score, str]:
    """Load a bi-encoder or a multi-vector encoder; return the function that scores, and the fingerprint."""
    model = _load(kind, name, dtype, device)
    settings = read_json(name, "config_sentence_transformers.json") or {}
    options = {"batch_size": batch_size, "show_progress_bar": False}
    if kind == "bi-encoder":
        similarity = similarity or {"cos_sim": "cosine"}.get(model.similarity_fn_name, model.similarity_fn_name)
        if similarity not in ("dot", "cosine"):
            raise InputError(f"A bi-encoder scores by 'dot' or 'cosine', got {similarity!r}.")
        options |= {"convert_to_numpy": True, "normalize_embeddings": similarity == "cosine"}
    elif similarity is not None:
        raise InputError(f"{name} is a multi-vector encoder, which has its own similarity; leave {similarity!r} out.")

    def encode(encode_side: Callable, texts: Sequence[str]) -> list[Any]:
        """Return a vector per text; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        vectors = dict(zip(distinct, encode_side(distinct, **options), strict=True))
        return [vectors[text] for text in texts]

    def score(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        check_pairs(queries, documents)
        pairs = encode(model.encode_query, queries), encode(model.encode_document, documents)
        if kind == "multi-vector":
            return model.similarity_pairwise(*pairs).float().cpu().numpy()
        scores = np.empty(len(queries), dtype=np.float32)
        for row, (query, document) in enumerate(zip(*pairs, strict=True)):
            scores[row] = query.astype(np.float32) @ document.astype(np.float32)
        return scores

    return score, fingerprint(model, kind, settings, similarity, batch_size, dtype)


def _check_room(model: Any, name: str, queries: Sequence[str]) -> None:
    """Raise an InputError if a chat template with a query has no room for a document, which the library would cut."""
    prompt = model.prompts.get(model.default_prompt_name)
    for query in dict.fromkeys(queries):
        tokens = model.preprocess([(query, "")], prompt=prompt, processing_kwargs={"text": {"truncation": False}})
        count = tokens["input_ids"].shape[1]
        if count + MIN_TEXT > model.max_seq_length:
            raise InputError(
                f"{name} reads {model.max_seq_length} tokens; its prompt with the query {query[:60]!r} has {count}: "
                "no document fits; shorten the query or give a larger max_length."
            )


def _has_relative_positions(model: nn.Module) -> bool:
    """Return True for rotary positions, of which only the differences count."""
    return any(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules())


def _load(kind: str, name: str, dtype: torch.dtype, device: str) -> Any:
    """Load the library's model, after a check that all weights are there: it replaces missing ones by random ones."""
    try:
        import sentence_transformers
        from sentence_transformers.base.modules import Transformer
    except ImportError as error:
        raise InputError(f"{name} is a {kind}: pip install sentence-transformers.") from error
    with clear_errors(name):
        model = vars(sentence_transformers)[CLASSES[kind]](name, device=str(device), model_kwargs={"dtype": dtype})
    modules = read_json(name, "modules.json") or [{"path": ""}]
    if isinstance(model[0], Transformer) and isinstance(model[0].model, PreTrainedModel):
        load_complete(type(model[0].model), name, subfolder=modules[0]["path"], dtype=dtype)
    for module in model.modules():
        if isinstance(module, Transformer) and module.tokenizer is not None:
            set_padding(module.tokenizer, module.config)
            if module.transformer_task != "text-generation" and module.query_expansion is None:
                module.tokenizer.padding_side = "right"
    return model


def _keep_answers(model: Any) -> None:
    """Let a language model compute the logits of the answers only, in float32."""
    from sentence_transformers.cross_encoder.modules import LogitScore

    for module in model:
        if isinstance(module, LogitScore):
            answers = [token for token in (module.true_token_id, module.false_token_id) if token is not None]
            keep_words(model.model, answers)
            module.true_token_id, module.false_token_id = 0, (1 if len(answers) == 2 else None)
