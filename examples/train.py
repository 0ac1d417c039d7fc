"""Train a ranker on teacher scores: the main job, step by step.

    accelerate launch examples/train.py     # a BERT_DOT on the demo's triples, offline: about 6 minutes on 2 CPU cores
    accelerate launch examples/train.py --config examples/recipes/pairwise.yaml     # the paper's recipe on MS MARCO

Writes weights, tokenizer, config, card and results.json. Options: --help. --resume-from-checkpoint true resumes a run.
"""

import sys
from dataclasses import asdict

from transformers import set_seed

import hf_kd_ranking as kd
from hf_kd_ranking.cli import exit_on_bad_input
from hf_kd_ranking.cli.train import parse_job
from hf_kd_ranking.hub.manifest import select_measures
from hf_kd_ranking.ranker import load_tokenizer
from hf_kd_ranking.training.job import measure_gain, sample_cuts, write_results
from hf_kd_ranking.training.topics import saved_clusters


def main() -> None:
    # 1. Arguments: the student and its files, and the Trainer's settings; the demo's if there are none
    if len(sys.argv) == 1:
        from hf_kd_ranking.demo.experiment import student_job  # needs the extra demo

        job, args = student_job("demo_output")
    else:
        job, args, _ = parse_job(sys.argv[1:])
    job.check()
    checkpoint = args.checkpoint_to_resume()  # None for a fresh start
    set_seed(args.seed)  # the student's new layers are random

    # 2. Teacher scores (a datasets.Dataset of ids) and text stores; one process builds the memory-mapped files
    with args.main_process_first():
        rows = kd.load_teacher_scores(job.teacher_scores)
        queries, documents = kd.TextStore.from_file(job.queries), kd.TextStore.from_file(job.collection)

    # 3. The student, from an encoder; clusters of the queries and a live teacher if the job has them
    clusters = teacher = None
    if job.cluster_model is not None:
        encoder = kd.Ranker.from_pretrained(job.cluster_model, "bert_dot", args.device)
        clusters = saved_clusters(encoder, queries, rows, job.query_clusters, args, is_new=checkpoint is None)
    model, tokenizer = job.load_model(), load_tokenizer(job.model_name)
    if job.in_batch_teacher is not None:
        teacher = kd.Ranker.from_pretrained(job.in_batch_teacher, device=args.device)

    # 4. Evaluator and trainer
    evaluator = job.load_evaluator(queries, documents)
    data = {"train_dataset": rows, "queries": queries, "documents": documents, "processing_class": tokenizer}
    extra = {"evaluator": evaluator, "in_batch_teacher": teacher, "query_clusters": clusters}
    trainer = kd.RankingTrainer(model, args, **data, **extra)

    # 5. Evaluate, train, and compare the result with the first stage
    results = {"first_stage": {}, "tests": {}, "after": {}, "job": asdict(job), "cuts": sample_cuts(trainer)}
    results["before"] = trainer.evaluate() if evaluator is not None and checkpoint is None else {}
    results["training"] = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.termination.is_asked:
        sys.exit(f"Stopped by SIGTERM with a checkpoint in {args.output_dir}; resume as described above.")
    run = trainer.rerank() if evaluator is not None else None
    if run is not None:
        results |= measure_gain(run, evaluator)
        trainer.log(results["after"])

    # 6. Save the ranker and results, write the card, and publish with --push-to-hub
    trainer.save_model(_internal_call=True)  # publishing comes with the card
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_results(results, run, args.output_dir, model.config.model_type)
        print(f"saved to {args.output_dir}", results["first_stage"], results["before"], results["after"], sep="\n")
    measures = {name: results[name] for name in ("first_stage", "tests", "cuts")}
    measures |= {when: select_measures(results[when], job.measures) for when in ("before", "after")}
    write_card = trainer.push_to_hub if args.push_to_hub else trainer.create_model_card
    write_card(results=measures, files=job.files(), command=sys.argv)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
