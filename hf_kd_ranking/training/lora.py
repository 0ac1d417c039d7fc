"""Prepare a ranker for training: its weights in float32, or LoRA adapters on its encoder, with PEFT."""

import torch
from torch import nn
from transformers import set_seed

from ..errors import InputError
from ..models import RankerConfig, RankerModel
from .arguments import RankingTrainingArguments


def trainable(model: RankerModel, args: RankingTrainingArguments) -> nn.Module:
    """Return the ranker with float32 weights, and with adapters if `lora_r` is set.

    A step at a usual learning rate is smaller than the distance of neighbouring numbers in half precision, so that
    most weights of such a checkpoint would not move; `bf16` computes in it under autocast.
    """
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), RankerConfig):
        raise TypeError(f"RankingTrainer trains a ranker, such as load_ranker returns; got {type(model).__name__}.")
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        model = model.float()
    return with_adapters(model, args)


def with_adapters(model: RankerModel, args: RankingTrainingArguments) -> nn.Module:
    """Return the ranker, if `lora_r` is set as PEFT wraps it with adapters on all linear layers of its encoder.

    The encoder's own weights do not change then; the layers on top of it are trained fully. The adapters start as
    `seed` decides.

    Raises:
        InputError: if the ranker has no pretrained encoder.
        ImportError: if peft is not installed.
    """
    if args.lora_r is None:
        return model
    encoder = model.base_model_prefix
    if not encoder:
        raise InputError(
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
    set_seed(args.seed)
    return get_peft_model(model, config)
