"""Sequence classifiers as teachers: the output that is the score, padding, and the last layer in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..models.encoder import max_positions
from ..models.foreign import INCREASING, UNLIMITED
from ..models.scoring import Float32Linear

INDEPENDENT = ("multi_label_classification", "regression")  # problem types of which an output says nothing of another


@dataclass(frozen=True)
class Output:
    """The output of a classifier that is the score."""

    index: int
    is_class: bool  # outputs are classes, of which a pair has one: the order is that of the probability

    def scores(self, logits: Tensor) -> Tensor:
        """Return the logit of the output, or the logit of the probability of the class; (N, outputs) to (N,)."""
        if not self.is_class:
            return logits[:, self.index]
        others = torch.cat([logits[:, : self.index], logits[:, self.index + 1 :]], 1)
        return logits[:, self.index] - others.logsumexp(1)


def choose_output(name: str, config: PreTrainedConfig, activation: str, label: str | None) -> Output:
    """Find the output that is the score, by its label; None if there is only one.

    A label that is missing or unknown, or an activation that changes the order of the logits, is an InputError.
    """
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if label is None and len(labels) > 1:
        raise InputError(f"{name} has {len(labels)} outputs; name the one to score by: {', '.join(labels)}.")
    if label is not None and label not in labels:
        raise InputError(f"{name} has no output {label!r}; it has {', '.join(labels)}.")
    index = 0 if label is None else labels.index(label)
    if len(labels) > 1 and activation in ("Identity", "Softmax"):
        return Output(index, config.problem_type not in INDEPENDENT)
    if activation not in INCREASING:
        raise InputError(f"{name} cannot be a teacher: its activation {activation} changes the order of the logits.")
    return Output(index, is_class=False)


def prepare_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Let a classifier score any batch as single pairs, its last layer in float32; return the side of the padding."""
    set_padding(tokenizer, model.config)
    last = None
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == model.config.num_labels:
            last = module
    if last is not None:
        last.__class__ = Float32Linear
    # XLNet reads the last state, whatever the mask says.
    return "left" if getattr(model.config, "summary_type", None) == "last" else "right"


def keep_words(model: PreTrainedModel, token_ids: list[int]) -> None:
    """Let a language model compute the logits of these tokens only, in float32.

    In bfloat16 the difference of two logits would have few values.
    """
    words = model.get_output_embeddings()
    layer = Float32Linear(words.in_features, len(token_ids), words.bias is not None, words.weight.device, model.dtype)
    layer.weight.data = words.weight.data[token_ids].clone()
    if words.bias is not None:
        layer.bias.data = words.bias.data[token_ids].clone()
    model.set_output_embeddings(layer)


def set_padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give tokenizer and model one padding id: the config's, else the tokenizer's, else another special token.

    The classifiers of decoders read the last token that is not padding; so it is not the token that ends every text.
    """
    text_config = config.get_text_config()
    padding = text_config.pad_token_id
    if padding is None or not 0 <= padding < len(tokenizer):
        end = tokenizer("a")["input_ids"][-1]
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0, 1)
        padding = next(token for token in known if token not in (None, end))
    if padding != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    text_config.pad_token_id = padding


def max_tokens(config: PreTrainedConfig, model_max_length: int | None, max_length: int | None) -> int:
    """Return the longest pair in tokens: the least of what the model, its tokenizer and the user allow."""
    limits = (max_positions(config), model_max_length, max_length, UNLIMITED)
    return min(limit for limit in limits if limit is not None)
