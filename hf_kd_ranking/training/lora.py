"""Train LoRA adapters on the encoder in place of all weights, with PEFT."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..models import RankerModel
from .arguments import RankingTrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel


def with_adapters(model: RankerModel, args: RankingTrainingArguments) -> "RankerModel | PeftModel":
    """Add adapters to a ranker's encoder, in place, if `lora_r` is set.

    All linear layers of the encoder are adapted; its own weights do not change, and the layers on top of it are
    trained fully.

    Returns:
        The ranker as PEFT wraps it; without `lora_r` the ranker.

    Raises:
        ValueError: if the ranker has no pretrained encoder.
        ImportError: if peft is not installed.
    """
    if args.lora_r is None:
        return model
    encoder = model.base_model_prefix
    if not encoder:
        raise ValueError(
            f"lora_r adapts the linear layers of a pretrained encoder, and a {model.config.model_type} has none; "
            "leave lora_r out."
        )
    from peft import LoraConfig, get_peft_model  # an extra

    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    own = [name for name, _ in model.named_children() if name != encoder]
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or 2 * args.lora_r,
        target_modules=[f"{encoder}.{name}" for name in linear],
        modules_to_save=own or None,
    )
    return get_peft_model(model, config)


def merge_adapters(model: "PeftModel", folder: Path | None) -> RankerModel:
    """Save a wrapped ranker's adapters, then add them to its weights.

    Args:
        model: the wrapped ranker, not usable afterwards.
        folder: folder of the adapters; None does not save them.

    Returns:
        The ranker, with the scores that it had with its adapters.
    """
    if folder is not None:
        model.save_pretrained(folder)
    return model.merge_and_unload()
