"""Render the cards of the paper's five published checkpoints, and of the demo's rankers, into `model_cards/`.

    python examples/write_model_cards.py [--demo demo_output]

The content of the published checkpoints' cards is in `model_cards/published.yaml`; the demo writes the cards of its
students. Every card is in a folder with the name of its repository, with `.eval_results` next to it.
"""

import argparse
from pathlib import Path

import yaml

from hf_kd_ranking.hub.model_card import RankerCard, write_card, write_model_card

OWNER = "sebastian-hofstaetter"
FOLDER = Path(__file__).parents[1] / "model_cards"


def main() -> None:
    """Render the cards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, help="Output folder of `make demo`; published checkpoints only if unset.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="Folder of the cards.")
    args = parser.parse_args()
    # 1. The published checkpoints
    published = yaml.safe_load((FOLDER / "published.yaml").read_text(encoding="utf-8"))
    for name, content in published["cards"].items():
        (args.output / name).mkdir(parents=True, exist_ok=True)
        card = RankerCard(repository=f"{OWNER}/{name}", **{**published["shared"], **content})
        write_card(args.output / name, card)
    # 2. The students that the demo chose, with the results and latency that it measured
    if args.demo is None:
        return
    folders = sorted(args.demo.glob("students/*/chosen/ranker"))
    if not folders:
        raise SystemExit(f"{args.demo} has no students; give the output folder of `make demo`.")
    for folder in folders:
        name = f"{folder.parts[-3].replace(' ', '-')}-pydocs"  # bert_dot teacher
        (args.output / name).mkdir(parents=True, exist_ok=True)
        write_model_card(folder, name, output=args.output / name)


if __name__ == "__main__":
    main()
