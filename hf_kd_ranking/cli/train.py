"""`hf-kd-ranking train`: the main job on files."""

import json
import sys
from collections.abc import Sequence

from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .options import Result
from .settings import parse_settings, with_settings


@with_settings(TrainingJob, RankingTrainingArguments)
def train(job: TrainingJob, args: RankingTrainingArguments) -> Result | None:
    """Train a ranker on teacher scores.

    Example: hf-kd-ranking train --model distilbert/distilbert-base-uncased --architecture bert_dot --scores scores.tsv
    --queries queries.tsv --collection collection.tsv --output student
    """
    results = train_ranker(job, args, command=sys.argv)
    measures = {when: results[when] for when in ("first_stage", "before", "after", "cuts")}
    if args.process_index != 0:
        return None
    return measures, json.dumps(measures, indent=2)


def parse_job(arguments: Sequence[str]) -> tuple[TrainingJob, RankingTrainingArguments, bool]:
    """Return what is trained, how, and whether `--json` was given, see `parse_settings`."""
    (job, args), as_json = parse_settings((TrainingJob, RankingTrainingArguments), arguments)
    return job, args, as_json
