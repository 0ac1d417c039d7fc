"""`hf-kd-ranking export`: a ranker in the layout of another library or runtime."""

from typing import Annotated

import typer

from ..interop.export import FORMATS, export_ranker
from . import options


def export(
    model: options.Model,
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS)}.")],
    output: options.Output,
    architecture: options.Architecture = None,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Write a ranker in another library's layout, with equal scores (except onnx-int8).

    Example: hf-kd-ranking export --model bert_dot --to sentence-transformer --output exported
    """
    return export_ranker(model, to, output, architecture, overwrite)
