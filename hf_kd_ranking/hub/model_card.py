"""Model cards: a checkpoint's manifest, or a description written by hand, becomes `README.md` and `.eval_results`."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from jinja2 import UndefinedError
from transformers import CONFIG_MAPPING

from ..artifacts import existing_file, read_json, write_json, writing
from ..errors import InputError, UnknownIdError
from .manifest import FILE as MANIFEST
from .manifest import read_manifest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINE_USE = """## Use

```python
import hf_kd_ranking as kd
from huggingface_hub import snapshot_download

pipeline = kd.load_pipeline(snapshot_download("{repository}"))
pipeline.search("how are docstrings parsed", k=10)
```

This repository is a whole pipeline ({purpose}, depth {depth}, weight of BM25's scores {weight}) with the parts
`{parts}/`.
"""


@dataclass(frozen=True)
class RankerCard:
    """The content of a ranker's card.

    Args:
        repository: name on the Hub, owner/name, or the name of a folder.
        model_type: architecture, as the config names it.
        teacher, loss, data: names of the teacher, the loss and the collection.
        rows, settings, command: number of teacher rows, arguments and command line of the training.
        results: dictionaries of `dataset`, `measure`, `value`, and if known `first_stage` and `p_value`.
        max_query_length, max_document_length: in tokens.
        efficiency: figures of this ranker, see `select_efficiency`; None if it was not measured.
        costs: latency and memory in words, used if `efficiency` is None.
        base_model, dataset_id: names of the encoder and the collection on the Hub.
        license: licence in the Hub's spelling.
        languages: languages of the documents, ISO 639-1.
        architecture: second argument of `Ranker.from_pretrained`, if loading needs it.
        versions: version of each library.
        cuts: shares of the documents, `cut_texts`, and of their tokens, `cut_tokens`, beyond the length.
    """

    repository: str
    model_type: str
    teacher: str
    loss: str
    data: str
    rows: int
    settings: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    max_query_length: int
    max_document_length: int
    efficiency: Mapping[str, Any] | None = None
    costs: str | None = None
    base_model: str | None = None
    dataset_id: str | None = None
    license: str = "apache-2.0"
    languages: Sequence[str] = ()
    architecture: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    cuts: Mapping[str, float] = field(default_factory=dict)


def write_model_card(
    folder: str | os.PathLike,
    repository: str | None = None,
    efficiency: Mapping[str, Any] | None = None,
    output: str | os.PathLike | None = None,
) -> Path:
    """Write the card of a checkpoint from its manifest, see `write_card`, and return the path of `README.md`.

    Args:
        repository: name on the Hub, owner/name; None takes the folder's name.
        efficiency: see `select_efficiency`. It is saved in the manifest, so that the next card has it as well.
        output: folder for the card, and for the manifest if it changes; None takes the checkpoint's.

    Raises:
        FileNotFoundError, InputError: if the manifest is missing or was written for other weights.
        UnknownIdError: see `write_card`.
    """
    manifest = read_manifest(folder)
    output = Path(output or folder)
    config = read_json(Path(folder, "config.json"), what="config")
    if efficiency is not None:
        manifest["efficiency"] = dict(efficiency)
        write_json(output / MANIFEST, manifest)
    name = repository or Path(folder).name
    try:
        return write_card(output, _describe(name, manifest, config))
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, UndefinedError) as error:
        problem = f"its manifest.json or config.json has a value that a card cannot show ({error!r})"
        raise InputError(f"{folder}: {problem}; train again, or copy the folder again.") from error


def _describe(repository: str, manifest: Mapping[str, Any], config: Mapping[str, Any]) -> RankerCard:
    """Return what a card says, from a manifest and the config beside it."""
    data = manifest["data"] or "a collection whose name was not given"
    measured, results = manifest["results"], []
    for measure, value in measured["after"].items():
        result = {"dataset": f"held-out queries of {manifest.get('test_data', data)}"}
        result |= {"measure": measure, "value": value}
        result["first_stage"] = measured.get("first_stage", {}).get(measure)
        result["p_value"] = measured.get("tests", {}).get(measure, {}).get("p_value")
        results.append(result)
    return RankerCard(
        repository=repository,
        model_type=config["model_type"],
        teacher=manifest["teacher"] or "a model whose name was not given",
        loss=manifest["loss"],
        data=data,
        rows=manifest["rows"],
        settings=manifest["settings"],
        results=results,
        max_query_length=config["max_query_length"],
        max_document_length=config["max_document_length"],
        efficiency=manifest.get("efficiency"),
        base_model=manifest.get("base_model") or _base_model(config),
        dataset_id=data if HUB_ID.fullmatch(data) else None,
        languages=manifest.get("languages", ()),
        versions=manifest["versions"],
        command=" ".join(manifest["command"]),
        cuts=measured.get("cuts", {}),
    )


def write_card(folder: str | os.PathLike, card: RankerCard) -> Path:
    """Write `README.md`, and `.eval_results/ranking.yaml` if the card has a `dataset_id`; return the path of the card.

    An UnknownIdError says if no architecture has the card's model_type.
    """
    folder, name = Path(folder), card.repository.rpartition("/")[2]
    model_index, entries = [], []
    for result in card.results:
        value = round(result["value"], 4)
        model_index.append(
            EvalResult(
                task_type="text-ranking",
                task_name="Passage ranking",
                dataset_type=card.dataset_id or "held-out",
                dataset_name=result["dataset"],
                dataset_split=result["dataset"],  # the Hub distinguishes entries by their split, not by their name
                metric_type=result["measure"],
                metric_value=value,
            )
        )
        if card.dataset_id is not None:
            entries.append(EvalResultEntry(card.dataset_id, result["measure"], value, notes=result["dataset"]))
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-ranking",
        license=card.license,
        language=list(card.languages) or None,
        base_model=card.base_model,
        datasets=card.dataset_id,
        tags=["hf_kd_ranking", "knowledge-distillation", "passage-ranking", card.model_type],
        eval_results=model_index or None,
    )
    template = str(Path(__file__).parent / "templates" / "ranker.md")
    content = {**vars(card), "name": name, "summary": CONFIG_MAPPING[card.model_type].summary}
    ModelCard.from_template(metadata, template_path=template, **content).save(folder / "README.md")
    if entries:
        (folder / ".eval_results").mkdir(exist_ok=True)
        with writing(folder / ".eval_results" / "ranking.yaml") as file:
            yaml.safe_dump(eval_result_entries_to_yaml(entries), file, sort_keys=False)
    return folder / "README.md"


def write_pipeline_card(
    folder: Path,
    pipeline: Mapping[str, Any],
    repository: str,
    output: Path,
    efficiency: Mapping[str, Any] | None = None,
) -> Path:
    """Write the card of a pipeline, that of its ranker with a section on how to load the pipeline; return its path.

    Args:
        folder: folder of the pipeline.
        pipeline: content of its `pipeline.json`.
        repository: name on the Hub, owner/name.
        output: folder for the card.
        efficiency: see `write_model_card`.
    """
    ranker, path = folder / "ranker", output / "README.md"
    if (ranker / MANIFEST).is_file():
        write_model_card(ranker, repository, efficiency, output)
        (output / MANIFEST).unlink(missing_ok=True)  # the ranker has its own
    elif "ranker" in pipeline["parts"]:
        shutil.copy(existing_file(ranker / "README.md", "card"), path)
    else:
        metadata = ModelCardData(pipeline_tag="text-ranking", tags=["hf_kd_ranking", "passage-ranking"])
        path.write_text(f"---\n{metadata}\n---\n\n# {repository.rpartition('/')[2]}\n", encoding="utf-8")
    values = {name: pipeline[name] for name in ("purpose", "depth", "weight")}
    use = PIPELINE_USE.format(repository=repository, parts="/`, `".join(pipeline["parts"]), **values)
    before, _, after = path.read_text(encoding="utf-8").partition("## Use\n")  # how to load the ranker alone
    _, heading, rest = after.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{use}{heading}{rest}", encoding="utf-8")
    return path


def select_efficiency(measured: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one ranker's figures from the result of `measure_efficiency`: `environment`, `protocol` and `costs`.

    An InputError says if it is not such a result, an UnknownIdError if the ranker was not measured.
    """
    if not all(isinstance(measured.get(key), dict) for key in ("rankers", "environment", "protocol")):
        raise InputError("The efficiency is not what `benchmark` writes: it needs rankers, environment and protocol.")
    if name not in measured["rankers"]:
        raise UnknownIdError(f"{name!r} was not measured; the measured rankers are {', '.join(measured['rankers'])}.")
    environment, protocol = measured["environment"], measured["protocol"]
    return {"environment": environment, "protocol": protocol, "costs": measured["rankers"][name]}


def _base_model(config: Mapping[str, Any]) -> str | None:
    """Return the encoder's name on the Hub; None if it came from a folder or there is none."""
    name = config.get("encoder_config", {}).get("_name_or_path") or ""  # TK has no encoder
    return name if "/" in name else None
