"""`hf-kd-ranking export`: a ranker in the layout of another library or runtime."""

from typing import Annotated

import typer

from ..interop.export import FORMATS, export_ranker
from . import options


def export(
    model: Annotated[str, typer.Option(help="The ranker: a folder or a Hub name.")],
    to: Annotated[str, typer.Option(help=f"The format: {', '.join(FORMATS)}.")],
    output: options.Output,
    architecture: options.Architecture = None,
    overwrite: options.Overwrite = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Write a ranker in another library's layout, with equal scores (onnx-int8 apart), or say why it cannot be."""
    options.report(export_ranker(model, to, output, architecture, overwrite), json)
