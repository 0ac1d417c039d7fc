"""BERT_CAT: the encoder reads query and document as one sequence; the score is linear in its [CLS] vector.

Source: Nogueira and Cho 2019, https://arxiv.org/abs/1901.04085; arXiv 2010.02666, equation 1. With `passage_length` it
reads long documents as PARADE does: Li et al. 2020, https://arxiv.org/abs/2008.09093.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .base import RankingOutput
from .encoder import EncoderRanker, EncoderRankerConfig
from .errors import InputError
from .scoring import Float32Linear
from .windows import by_pair, cut_pairs


@strict
class BertCatConfig(EncoderRankerConfig):
    """Configuration of BERT_CAT.

    A pair is cut to `max_query_length + max_document_length` tokens, longest text first.

    Args:
        head_activation: activation of a dense layer before the linear one, as in the sequence classifiers of
            transformers (BERT "tanh", DistilBERT "relu", ELECTRA "gelu"); None for no dense layer, as in the paper.
        passage_length: longest passage in tokens, its [SEP] included. The encoder reads a query, cut to
            `max_query_length`, with each passage of its document, and the linear layer one vector that is pooled from
            their [CLS] vectors. None reads a document as a whole, together with its query.
        passage_stride: tokens between the beginnings of two passages; None for passages that do not overlap.
        passage_pooling: "max" takes the largest value of each feature; "attention" the mean weighted by the softmax of
            the products with a learned vector.

    Example:
        >>> kd.BertCatConfig(max_document_length=300).sequence_lengths()
        {'max_query_length + max_document_length': 330}
    """

    model_type = "BERT_Cat"
    summary = (
        "BERT_CAT ranker: the encoder reads query and document as one sequence, and the score is linear in its [CLS] "
        "vector. It is the most effective and the slowest kind; nothing is stored in advance."
    )
    joins_texts = True
    vectors_per_text = "none"
    similarity = None
    is_storable = False
    reads_first_state = True

    problem_type: str | None = "regression"
    head_activation: Literal["tanh", "relu", "gelu"] | None = None
    passage_length: int | None = None
    passage_stride: int | None = None
    passage_pooling: Literal["max", "attention"] = "max"

    def __post_init__(self, **kwargs: Any) -> None:
        # One raw logit: with the default of two labels, transformers' text-classification pipeline would put a softmax
        # over it and answer 1.0 to everything; sentence-transformers' CrossEncoder would put a sigmoid over it.
        self.problem_type = "regression"
        kwargs["num_labels"] = 1
        kwargs.setdefault("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"})
        super().__post_init__(**kwargs)

    @property
    def reads_separators(self) -> bool:
        """True if pairs are cut into passages."""
        return self.passage_length is not None

    @property
    def has_passage_attention(self) -> bool:
        """True if the weights of passages are learned."""
        return self.passage_length is not None and self.passage_pooling == "attention"

    def check(self) -> None:
        """See `RankerConfig`."""
        if self.passage_length is None:
            if self.passage_stride is not None or self.passage_pooling != "max":
                raise InputError("passage_stride and passage_pooling need passage_length, which is None.")
        elif self.passage_length < 2:
            raise InputError(f"passage_length must be at least 2, one token and [SEP], got {self.passage_length}.")
        elif self.passage_stride is not None and not 1 <= self.passage_stride < self.passage_length:
            raise InputError(
                f"passage_stride must be 1..{self.passage_length - 1}, else tokens are left out; got "
                f"{self.passage_stride}."
            )
        super().check()

    def sequence_lengths(self) -> dict[str, int]:
        """Return the length of the one sequence that a pair, or a query with a passage, becomes."""
        if self.passage_length is not None:
            return {"max_query_length + passage_length": self.max_query_length + self.passage_length}
        return {"max_query_length + max_document_length": self.max_query_length + self.max_document_length}


class BertCat(EncoderRanker):
    """BERT_CAT ranker; also a standard one-label sequence classifier.

    Example:
        >>> model = kd.BertCat.from_encoder("distilbert/distilbert-base-uncased")
        >>> tokenizer = AutoTokenizer.from_pretrained("distilbert/distilbert-base-uncased")
        >>> model(**tokenizer("what is bread", "Bread is baked.", return_tensors="pt")).logits.shape
        torch.Size([1, 1])
    """

    config_class = BertCatConfig
    auto_classes = ("AutoModel", "AutoModelForSequenceClassification")

    def __init__(self, config: BertCatConfig) -> None:
        super().__init__(config)
        size = config.encoder_config.hidden_size
        if config.head_activation is not None:
            self._dense_layer = nn.Linear(size, size)
        if config.has_passage_attention:
            self._passage_attention = Float32Linear(size, 1, bias=False)
        self._classification_layer = Float32Linear(size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Tensor,
    ) -> RankingOutput:
        """Score pairs.

        Args:
            input_ids: (B, L) one pair per query, or (B, n, L); the other outputs of the tokenizer have the same shape.
            attention_mask: None attends to everything.
            labels: (B,) target scores for a plain regression loss; None for no loss.
            return_dict: not read; code for sequence classifiers passes it.

        Returns:
            `scores` (B,) or (B, n), and the same as `logits` (B * n, 1).
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if self.config.passage_length is None:
            states = self.encode_first(inputs)  # (B * n, H)
        else:
            states = self._encode_passages(inputs)
        if self.config.head_activation is not None:
            states = ACT2FN[self.config.head_activation](self._dense_layer(states))
        logits = self._classification_layer(states)  # (B * n, 1)
        scores = logits.float().view(input_ids.shape[:-1])
        loss = None if labels is None else nn.functional.mse_loss(scores, labels.view(scores.shape).float())
        return RankingOutput(loss=loss, logits=logits, scores=scores)

    def _encode_passages(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one vector per pair, (N, H), pooled from the [CLS] vectors of its passages."""
        config = self.config
        pairs = {name: tensor.flatten(0, -2) for name, tensor in inputs.items() if name != "lengths"}
        pairs.setdefault("attention_mask", torch.ones_like(pairs["input_ids"]))
        stride = config.passage_stride or config.passage_length - 1
        windows = cut_pairs(pairs, config.max_query_length, config.passage_length, stride)
        states, is_passage = by_pair(self.encode_first(windows.inputs), windows)  # (N, M, H), (N, M)
        if not config.has_passage_attention:
            return states.masked_fill(~is_passage.unsqueeze(2), float("-inf")).amax(1)
        weights = self._passage_attention(states).squeeze(2).masked_fill(~is_passage, float("-inf")).softmax(1)
        return (weights.unsqueeze(2).to(states.dtype) * states).sum(1)
