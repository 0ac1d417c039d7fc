"""The model card and `.eval_results`: facts in, README.md out.

A training's facts come from its manifest (`write_model_card`); those of the paper's checkpoints from a file.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import CONFIG_MAPPING

from ..artifacts import writing
from .manifest import read_manifest, save_manifest

TEMPLATE = Path(__file__).parent / "templates" / "ranker.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

UNMEASURED = (
    "Not measured with these weights. `hf-kd-ranking benchmark` measures latency, memory and bytes a passage; the "
    "architectures' typical ratios are in hf_kd_ranking's README."
)


def write_model_card(
    folder: str | os.PathLike,
    repository: str | None = None,
    efficiency: Mapping[str, Any] | None = None,
) -> Path:
    """Write `README.md`, and `.eval_results` where the data is a data set of the Hub, from a checkpoint's manifest.

    Args:
        folder: of the checkpoint.
        repository: on the Hub, owner/name; None is the folder's name.
        efficiency: see `costs_of`. Kept in the manifest, so that the next card has it as well.

    Raises:
        FileNotFoundError, ValueError: where there is no manifest, or it is of other weights.
        KeyError: if the card does not know the architecture.
    """
    manifest, name = read_manifest(folder), repository or Path(folder).name
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if efficiency is not None:
        manifest["efficiency"] = dict(efficiency)
        save_manifest(folder, manifest)
    results, data = manifest["results"], manifest["data"] or "a collection that its author did not name"
    measured = [
        {"dataset": f"held-out queries of {data}", "measure": measure, "value": value}
        | {"first_stage": results.get("first_stage", {}).get(measure)}
        | {"p_value": results.get("tests", {}).get(measure, {}).get("p_value")}
        for measure, value in results["after"].items()
    ]
    facts = {
        "name": name.rpartition("/")[2],
        "repository": name,
        "model_type": config["model_type"],
        "base_model": manifest.get("base_model") or base_model(config),
        "teacher": manifest["teacher"] or "scores whose maker was not named",
        "loss": manifest["loss"],
        "data": data,
        "dataset_id": manifest["data"] if HUB_ID.fullmatch(manifest["data"] or "") else None,
        "rows": manifest["rows"],
        "settings": manifest["settings"],
        "versions": manifest["versions"],
        "command": " ".join(manifest["command"]),
        "results": measured,
        "costs": _costs(manifest["efficiency"]) if manifest.get("efficiency") else UNMEASURED,
        "max_query_length": config["max_query_length"],
        "max_document_length": config["max_document_length"],
    }
    return write_card(folder, facts)


def costs_of(measured: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One ranker's part of what `measure_efficiency` gave: `environment`, `protocol`, and its own as `costs`.

    Raises:
        KeyError: listing the rankers that were measured.
    """
    if name not in measured["rankers"]:
        raise KeyError(f"No costs were measured of {name!r}, but of {', '.join(measured['rankers'])}.")
    return {part: measured[part] for part in ("environment", "protocol")} | {"costs": measured["rankers"][name]}


def write_card(folder: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Render facts into a folder: `README.md`, and `.eval_results/ranking.yaml` if they name a `dataset_id`.

    Args:
        facts: `name`, `repository`, `model_type`, `teacher`, `loss`, `data`, `rows`, `settings`, `results` (each with
            `dataset`, `measure`, `value`, and perhaps `first_stage`, `p_value`), `costs`, `max_query_length`,
            `max_document_length`; and where they are known `base_model`, `dataset_id`, `license`, `architecture` (an
            argument that loading needs), `versions`, `command`.

    Raises:
        KeyError: naming a fact that is missing.
    """
    folder, results = Path(folder), facts["results"]
    metadata = ModelCardData(
        model_name=facts["name"],
        library_name="transformers",
        pipeline_tag="text-ranking",
        license=facts.get("license", "apache-2.0"),
        language="en",
        base_model=facts.get("base_model"),
        datasets=facts.get("dataset_id"),
        tags=["hf_kd_ranking", "knowledge-distillation", "passage-ranking", facts["model_type"]],
        eval_results=[_model_index_entry(result, facts.get("dataset_id")) for result in results] or None,
    )
    argument = f', "{facts["architecture"]}"' if facts.get("architecture") else ""
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        **{
            **facts,
            "architecture": CONFIG_MAPPING[facts["model_type"]].summary,
            "results": _results_table(results),
            "settings": "\n".join(f"| {name} | {value} |" for name, value in facts["settings"].items()),
            "rows": f"{facts['rows']:,}",
            "load": f'"{facts["repository"]}"{argument}',
            "versions": ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items()),
            "command": facts.get("command"),
        },
    )
    card.save(folder / "README.md")
    if facts.get("dataset_id") and results:
        entries = [
            EvalResultEntry(facts["dataset_id"], result["measure"], round(result["value"], 4), notes=result["dataset"])
            for result in results
        ]
        (folder / ".eval_results").mkdir(exist_ok=True)
        with writing(folder / ".eval_results" / "ranking.yaml") as file:
            yaml.safe_dump(eval_result_entries_to_yaml(entries), file, sort_keys=False)
    return folder / "README.md"


def base_model(config: Mapping[str, Any]) -> str | None:
    """The backbone's Hub name as its config remembers it; None where it came from a folder or a config alone."""
    name = config.get("encoder_config", {}).get("_name_or_path") or ""  # TK has no encoder
    return name if "/" in name else None


def _model_index_entry(result: Mapping[str, Any], dataset_id: str | None) -> EvalResult:
    return EvalResult(
        task_type="text-ranking",
        task_name="Passage ranking",
        dataset_type=dataset_id or "held-out",
        dataset_name=result["dataset"],
        dataset_split=result["dataset"],  # entries are told apart by it, not by their name
        metric_type=result["measure"],
        metric_value=round(result["value"], 4),
    )


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Not evaluated on held-out queries."
    lines = ["| queries | measure | value | first stage | p |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        first, p_value = result.get("first_stage"), result.get("p_value")
        cells = [result["dataset"], result["measure"], f"{result['value']:.4g}"]
        cells += ["" if first is None else f"{first:.4g}", "" if p_value is None else f"{p_value:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "The part behind @ is the cutoff; a grade of 1 or more counts as relevant, where the measure names no other "
        "(rel=); nDCG uses the grades. p is a paired two-sided t-test over the queries against the first stage."
    )
    return "\n".join([*lines, "", note])


def _costs(efficiency: Mapping[str, Any]) -> str:
    costs, protocol, machine = efficiency["costs"], efficiency["protocol"], efficiency["environment"]
    stored = costs["bytes_per_passage"]
    rows = {
        f"a query against {protocol['candidates']:,} passages, median": f"{costs['total_ms']['p50']:,.1f} ms",
        "the same, 95th percentile": f"{costs['total_ms']['p95']:,.1f} ms",
        "bytes stored a passage, float32": "nothing is stored" if stored is None else f"{stored:,.0f}",
        "parameters": f"{costs['parameters']:,}",
        "weights": f"{costs['model_bytes'] / 1e6:,.1f} MB",
        "peak memory beyond the process's own": f"{costs['peak_process_mb']:,.0f} MB",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    where = f"{costs['device']}, {costs['dtype']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"| cost | |\n| --- | --- |\n{table}\n\nMeasured on {where}; {protocol['stored']}."
