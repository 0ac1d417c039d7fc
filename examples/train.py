"""Distil a ranker from teacher scores: the main job.

    accelerate launch examples/train.py
        the demo's student, offline: builds the collection, trains and applies the teacher (kept in demo_output/ and
        shared with `make demo`), then trains a BERT_DOT student with Margin-MSE. About 6 minutes on 2 cores.

    accelerate launch examples/train.py --model_name distilbert-base-uncased --architecture bert_dot \
        --teacher_scores bert_cat_ensemble_msmarcopassage_train_scores_ids.tsv \
        --collection collection.tsv --queries queries.all.tsv \
        --candidates bm25.dev.trec --qrels qrels.dev.txt --eval_strategy steps --eval_steps 4000 --save_steps 4000 \
        --load_best_model_at_end --metric_for_best_model eval_nDCG@10 \
        --max_steps 150000 --fp16 --dataloader_num_workers 4 --output_dir bert_dot-T2
        the paper's recipe on MS MARCO; defaults are the paper's settings (Adam, 7e-6, batches of 32).

    accelerate launch examples/train.py --config examples/recipes/pairwise.yaml --max_steps 1000
        options from a file, those of the command line in front of them; see examples/recipes/.

All options: --help. The output folder gets weights, tokenizer, config, a model card and results.json.
"""

import sys

import hf_kd_ranking as kd
from hf_kd_ranking.cli import exit_on_bad_input
from hf_kd_ranking.cli.train import parse_job


def main() -> None:
    """Train from the command line, or the demo's student without arguments."""
    # 1. Arguments: what is trained on what, and how; with none, the demo's
    if len(sys.argv) == 1:
        from hf_kd_ranking.demo.experiment import student_job

        job, args = student_job("demo_output")
    else:
        job, args, _ = parse_job(sys.argv[1:])

    # 2. Load, train, evaluate before and after, save (and push, with --push_to_hub)
    results = kd.train_ranker(job, args, command=sys.argv)

    # 3. What was bought
    if args.process_index == 0:
        for when in ("first_stage", "before", "after"):
            measures = {name.removeprefix("eval_"): value for name, value in results[when].items() if "@" in name}
            print(f"{when:12}", "  ".join(f"{name} {value:.4f}" for name, value in measures.items()))
        print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
