"""A folder that a Hugging Face Space runs: README.md, Dockerfile, the package, and everything that is searched."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..artifacts import building
from .search import SearchEngine

SOURCE = Path(__file__).parents[2]  # a checkout has a setup.cfg there
README = """---
title: {title}
emoji: 🔎
colorFrom: gray
colorTo: blue
sdk: docker
app_port: 7860
---

{rankers}

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


def write_space(folder: Path, engine: SearchEngine, about: dict, options: Sequence[str], version: str) -> None:
    """Write the folder of a Space; it is complete or absent.

    Args:
        folder: a new folder.
        engine: rebuilt by the Space from copies of models, collection and indexes.
        about: see `SearchPage`; the examples become the Space's queries.
        options: options of `serve` that the Space repeats.
        version: version of the package to install if this is not a checkout that can be copied.
    """
    command = ["hf-kd-ranking", "serve", "--host", "0.0.0.0", "--port", "7860", "--proxy", "--title", about["title"]]
    command += ["--collection", "collection", *options]
    with building(folder) as space:
        for name, search in engine.rankers.items():
            search.ranker.save_pretrained(space / "models" / name)
            command += ["--model", f"{name}=models/{name}"]
            shutil.copytree(search.documents.folder, space / "collection", dirs_exist_ok=True)
            if search.store is not None:
                shutil.copytree(search.store.folder, space / "index" / name)
                command += ["--index", f"index/{name}"]
        if engine.first_stage is not None:
            engine.first_stage.save(space / "bm25")
            command += ["--candidates", "bm25"]
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
        rankers = "\n".join(f"- **{ranker['name']}** {ranker['line']}" for ranker in about["rankers"])
        readme = README.format(title=json.dumps(about["title"]), rankers=rankers)  # a JSON string is a YAML string
        (space / "README.md").write_text(readme, encoding="utf-8")
        dockerfile = DOCKERFILE.format(package=package, command=json.dumps(command))
        (space / "Dockerfile").write_text(dockerfile, encoding="utf-8")
