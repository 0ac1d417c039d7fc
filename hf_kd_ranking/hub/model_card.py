"""The model card that training writes next to its weights: facts in, README.md out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).parent / "templates" / "ranker.md"

# By model_type.
ARCHITECTURE = {
    "BERT_Cat": "BERT_CAT ranker: the encoder reads query and document as one sequence, and the score is linear in "
    "its [CLS] vector. It is the most effective and the slowest kind; nothing is stored ahead of the query.",
    "BERT_Dot": "BERT_DOT ranker: one encoder makes one vector of a query and one of a document, and the score is "
    "their dot product. Document vectors are stored ahead of the query and can be searched by an index.",
    "ColBERT": "ColBERT ranker: one encoder makes a vector of every term, and the score sums, over the query's terms, "
    "the largest dot product with a document's term. Term vectors are stored ahead of the query.",
    "PreTTR": "PreTTR ranker: an encoder that reads query and document apart in its lower layers and together in its "
    "upper ones; the score is linear in the [CLS] vector. The document's lower states are stored ahead of the query.",
    "TK": "TK ranker: word embeddings, two small transformer layers, and kernel pooling over the cosines of all pairs "
    "of query and document terms. It needs no pretrained encoder; term vectors are stored ahead of the query.",
}
SETTINGS = (
    "learning_rate",
    "head_learning_rate",
    "lora_r",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "teacher_scale",
    "bf16",
    "fp16",
    "seed",
)


def write_model_card(
    folder: str | Path,
    name: str,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    results: Mapping[str, float],
    training_rows: int,
) -> Path:
    """Write `README.md` into a checkpoint's folder.

    Args:
        folder: of the checkpoint.
        name: of the model; a path is cut to its last part.
        config: the ranker's config as a dict.
        arguments: the training arguments as a dict.
        results: a log entry of an evaluation, keys `eval_*`.
        training_rows: teacher rows trained on.

    Raises:
        KeyError: if the card does not know the architecture.
    """
    measures = {
        key.removeprefix("eval_"): value for key, value in results.items() if key.startswith("eval_") and "@" in key
    }
    data = arguments["data_name"] or "a collection that its author did not name"
    metadata = ModelCardData(
        model_name=Path(name).name,
        library_name="transformers",
        pipeline_tag="text-ranking",
        license="apache-2.0",
        language="en",
        base_model=base_model(config),
        tags=["hf_kd_ranking", "knowledge-distillation", "passage-ranking", config["model_type"]],
        eval_results=[
            EvalResult(
                task_type="text-ranking",
                task_name="Re-ranking",
                dataset_type="held-out",
                dataset_name=data,
                metric_type=measure,
                metric_value=round(value, 4),
            )
            for measure, value in measures.items()
        ]
        or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=Path(name).name,
        repository=arguments.get("hub_model_id") or Path(name).name,
        architecture=ARCHITECTURE[config["model_type"]],
        loss=arguments["loss"],
        teacher=arguments["teacher_name"] or "scores whose maker was not named",
        results=_results_table(measures, data),
        settings="\n".join(f"| {key} | {arguments[key]} |" for key in SETTINGS),
        rows=f"{training_rows:,}",
        data=data,
        max_query_length=config["max_query_length"],
        max_document_length=config["max_document_length"],
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path


def base_model(config: Mapping[str, Any]) -> str | None:
    """The backbone's Hub name as its config remembers it; None where it came from a folder or a config alone."""
    name = config.get("encoder_config", {}).get("_name_or_path") or ""  # TK has no encoder
    return name if "/" in name else None


def _results_table(measures: Mapping[str, float], data: str) -> str:
    if not measures:
        return "Not evaluated on held-out queries."
    rows = "\n".join(f"| {measure} | {value:.4f} |" for measure, value in measures.items())
    return f"Re-ranking held-out queries of {data}:\n\n| measure | value |\n| --- | --- |\n{rows}"
