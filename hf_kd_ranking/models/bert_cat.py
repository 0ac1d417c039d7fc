"""BERT_CAT: the encoder reads query and document as one sequence; the score is linear in its [CLS] vector.

Source: Nogueira and Cho 2019, https://arxiv.org/abs/1901.04085; arXiv 2010.02666, equation 1.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .base import RankingOutput
from .encoder import EncoderRanker, EncoderRankerConfig
from .scoring import Float32Linear


@strict
class BertCatConfig(EncoderRankerConfig):
    """Configuration of BERT_CAT.

    A pair is cut to `max_query_length + max_document_length` tokens, longest text first.

    Args:
        head_activation: activation of a dense layer before the linear one, as in the sequence classifiers of
            transformers (BERT "tanh", DistilBERT "relu", ELECTRA "gelu"); None for no dense layer, as in the paper.

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

    def __post_init__(self, **kwargs: Any) -> None:
        # One raw logit: with the default of two labels, transformers' text-classification pipeline would put a softmax
        # over it and answer 1.0 to everything; sentence-transformers' CrossEncoder would put a sigmoid over it.
        self.problem_type = "regression"
        kwargs["num_labels"] = 1
        kwargs.setdefault("sentence_transformers", {"activation_fn": "torch.nn.modules.linear.Identity"})
        super().__post_init__(**kwargs)

    def sequence_lengths(self) -> dict[str, int]:
        """Return the length of the one sequence that a pair becomes."""
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
        states = self.encode_first(inputs)  # (B * n, H)
        if self.config.head_activation is not None:
            states = ACT2FN[self.config.head_activation](self._dense_layer(states))
        logits = self._classification_layer(states)  # (B * n, 1)
        scores = logits.float().view(input_ids.shape[:-1])
        loss = None if labels is None else nn.functional.mse_loss(scores, labels.view(scores.shape).float())
        return RankingOutput(loss=loss, logits=logits, scores=scores)
