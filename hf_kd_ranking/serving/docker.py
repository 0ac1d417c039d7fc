"""A folder for `docker build`, or a Hugging Face Space: Dockerfile, README.md, the package, and all that is served."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..artifacts import building
from .model import ServedModel

SOURCE = Path(__file__).parents[2]  # a checkout has a setup.cfg there
# A Space reads the head of README.md.
README = """---
title: {title}
emoji: 🔎
colorFrom: gray
colorTo: blue
sdk: docker
app_port: 8000
---

**{name}**{line}

    docker build -t {name} . && docker run -p 8000:8000 {name}

Made by `hf-kd-ranking serve --docker`.
"""
DOCKERFILE = """FROM python:3.11-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir "{package}"
RUN useradd --uid 1000 ranking
USER ranking
ENV HF_HUB_OFFLINE=1 HF_HOME=/tmp/hf
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
CMD {command}
"""


def write_image(folder: Path, model: ServedModel, about: dict[str, Any] | None, batch_size: int, version: str) -> None:
    """Write a folder that serves a model, its index and its collection; it is complete or absent.

    Args:
        about: `title` and `examples` of the page; None for the API alone.
        batch_size: texts or pairs per forward pass.
        version: version of the package to install if this is not a checkout that can be copied.
    """
    command = ["hf-kd-ranking", "serve", "--host", "0.0.0.0", "--port", "8000", "--batch-size", str(batch_size)]
    extras, title, line = "serve", model.name, ""
    with building(folder) as image:
        if model.search is None:
            command += _write_ranker(image, model)
        else:
            command += _write_pipeline(image, model, about)
            extras, title, line = "retrieval,serve", about["title"], f" {model.search.describe()}"
        if model.store is not None:
            extras = "retrieval,serve"
        package = f"hf_kd_ranking[{extras}]=={version}"
        if (SOURCE / "setup.cfg").is_file():
            package = f"./package[{extras}]"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(SOURCE / "hf_kd_ranking", image / "package" / "hf_kd_ranking", ignore=ignored)
            for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
                shutil.copy(SOURCE / name, image / "package")
        # A JSON string is a YAML string.
        readme = README.format(title=json.dumps(title), name=model.name, line=line)
        (image / "README.md").write_text(readme, encoding="utf-8")
        dockerfile = DOCKERFILE.format(package=package, command=json.dumps(command))
        (image / "Dockerfile").write_text(dockerfile, encoding="utf-8")


def _write_ranker(image: Path, model: ServedModel) -> list[str]:
    """Write the ranker, and the vectors that requests name by id; return the options that serve them."""
    model.ranker.save_pretrained(image / "model")
    options = ["--model", f"{model.name}=model"]
    if model.store is not None:
        shutil.copytree(model.store.folder, image / "index")
        options += ["--index", "index"]
    return options


def _write_pipeline(image: Path, model: ServedModel, about: dict[str, Any]) -> list[str]:
    """Write the pipeline and the queries of the page; return the options that serve them."""
    from ..searcher import save_pipeline  # needs the libraries of the extra `retrieval`

    saved = f"pipeline/{model.name}"  # the name of the folder is that of the model
    save_pipeline(image / saved, model.search.pipeline)
    options = ["--pipeline", saved, "--title", about["title"]]
    if about["examples"]:
        lines = [f"{number}\t{query}\n" for number, query in enumerate(about["examples"])]
        (image / "queries.tsv").write_text("".join(lines), encoding="utf-8")
        options += ["--queries", "queries.tsv"]
    return options
