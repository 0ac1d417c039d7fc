"""Train LoRA adapters on the encoder in place of all weights, with PEFT."""

from torch import nn

from ..errors import InputError
from ..models import RankerModel
from .arguments import RankingTrainingArguments


def with_adapters(model: RankerModel, args: RankingTrainingArguments) -> nn.Module:
    """Return the ranker, if `lora_r` is set as PEFT wraps it with adapters on all linear layers of its encoder.

    The encoder's own weights do not change then; the layers on top of it are trained fully.

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
    return get_peft_model(model, config)
