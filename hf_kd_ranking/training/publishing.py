"""The card of a trained ranker, and its way to the Hub."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from ..data.languages import detect_languages
from ..errors import InputError
from ..hub.manifest import select_measures, write_manifest
from ..hub.model_card import write_model_card
from ..hub.publish import publish
from .evaluation import EvaluatingTrainer

CARD_FIELDS = ("results", "files", "command")  # that `push_to_hub` passes on


class PublishingTrainer(EvaluatingTrainer):
    """The part of `RankingTrainer` that writes cards and publishes."""

    def create_model_card(
        self,
        model_name: str | None = None,
        results: Mapping[str, Any] | None = None,
        files: Mapping[str, str | None] | None = None,
        command: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `manifest.json` and the model card into the folder of the saved weights.

        Args:
            model_name: name on the card; None is the repository's.
            results, files, command: see `write_manifest`; without results the last evaluation is taken.

        Raises:
            InputError: for other fields of transformers' cards, such as `tags`.
        """
        _refuse_fields(kwargs)
        if not self.is_world_process_zero():
            return
        if results is None:
            results = {"after": {}}
            # The evaluator names its measures; a resumed run has not heard of them and takes what looks like one.
            names = sorted(self.measures) or None
            for logged in self.state.log_history:
                measured = select_measures(logged, names)
                if measured:
                    results["after"] = measured
        arguments = self.args.to_dict()
        languages = detect_languages(self.documents)
        rows = self._training_rows()
        write_manifest(self.args.output_dir, arguments, rows, results, files or {}, command, languages)
        write_model_card(self.args.output_dir, model_name or self.args.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Save weights and card, publish the folder, and return the commit's address (None but on the first process).

        Args:
            commit_message: None names the architecture.
            blocking: must be True.
            token: access token of the Hub; None takes `hub_token`, or the one that is logged in.
            revision: must be None, for the main branch.
            private: True makes a new repository private; None is `hub_private_repo`.
            **kwargs: arguments of `create_model_card`.

        Raises:
            InputError: for a revision, or to publish in the background.
        """
        if revision is not None or not blocking:
            raise InputError("Rankers are published on the main branch, in the foreground; leave the options out.")
        _refuse_fields(kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        result = publish(self.args.output_dir, self.hub_model_id, overwrite=True, token=token, message=commit_message)
        return result["address"]

    def _training_rows(self) -> int:
        if isinstance(self.train_dataset, datasets.Dataset):
            return len(self.train_dataset)
        return self.state.global_step * self.get_total_train_batch_size(self.args)  # of a stream, or 0


def _refuse_fields(given: Mapping[str, Any]) -> None:
    others = [name for name, value in given.items() if value is not None and name not in CARD_FIELDS]
    if others:
        raise InputError(
            f"The card is written from manifest.json and takes no {', '.join(others)}; edit README.md afterwards."
        )
