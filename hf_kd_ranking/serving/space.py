"""A folder that a Hugging Face Space runs: README.md, Dockerfile, the package, and everything that is searched."""

import json
import shutil
from pathlib import Path

from ..artifacts import building
from ..searcher import Pipeline, save_pipeline

SOURCE = Path(__file__).parents[2]  # a checkout has a setup.cfg there
README = """---
title: {title}
emoji: 🔎
colorFrom: gray
colorTo: blue
sdk: docker
app_port: 7860
---

**{name}** {line}

Made by `hf-kd-ranking serve --space`.
"""
DOCKERFILE = """FROM python:3.11-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir "{package}"
ENV HF_HUB_OFFLINE=1 HF_HOME=/tmp/hf
EXPOSE 7860
CMD {command}
"""


def write_space(folder: Path, pipeline: Pipeline, about: dict, batch_size: int, version: str) -> None:
    """Write the folder of a Space; it is complete or absent.

    Args:
        folder: a new folder.
        pipeline: saved in the Space.
        about: see `SearchPage`; the examples become the Space's queries.
        batch_size: texts or pairs per forward pass.
        version: version of the package to install if this is not a checkout that can be copied.
    """
    saved = f"pipeline/{about['name']}"  # the page shows the name of the folder
    command = ["hf-kd-ranking", "serve", "--host", "0.0.0.0", "--port", "7860", "--proxy", "--title", about["title"]]
    command += ["--pipeline", saved, "--batch-size", str(batch_size)]
    with building(folder) as space:
        save_pipeline(space / saved, pipeline)
        if about["examples"]:
            queries = "".join(f"{number}\t{query}\n" for number, query in enumerate(about["examples"]))
            (space / "queries.tsv").write_text(queries, encoding="utf-8")
            command += ["--queries", "queries.tsv"]
        package = f"hf_kd_ranking[retrieval,serve]=={version}"
        if (SOURCE / "setup.cfg").is_file():
            package = "./package[retrieval,serve]"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(SOURCE / "hf_kd_ranking", space / "package" / "hf_kd_ranking", ignore=ignored)
            for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
                shutil.copy(SOURCE / name, space / "package")
        title = json.dumps(about["title"])  # a JSON string is a YAML string
        readme = README.format(title=title, name=about["name"], line=about["line"])
        (space / "README.md").write_text(readme, encoding="utf-8")
        dockerfile = DOCKERFILE.format(package=package, command=json.dumps(command))
        (space / "Dockerfile").write_text(dockerfile, encoding="utf-8")
