"""A training step asks the device for no number: on a GPU the CPU would wait for all work that was added before."""

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

# Operators whose result, or its size, the CPU needs: `item`, `bool`, selections by a mask; and copies of a number.
BLOCKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh")


class BlockingCalls(TorchDispatchMode):
    """Lists the operators of a block that would make the CPU wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        is_selection = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in BLOCKING or is_selection:
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch) -> BlockingCalls:
    """Also lists `tolist`, which is not an operator, and leaves out what transformers asks of each group's mask."""
    calls, ask = BlockingCalls(), masking_utils._ignore_bidirectional_mask_sdpa
    to_list = Tensor.tolist

    def is_full(*args, **kwargs) -> bool:
        before = len(calls.names)
        result = ask(*args, **kwargs)
        del calls.names[before:]
        return result

    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", is_full)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: calls.names.append("tolist") or to_list(tensor))
    return calls


@pytest.mark.parametrize("data", ["triples", "uneven"])
def test_a_step_waits_only_for_the_loss_of_the_step_before(model, make_trainer, uneven, calls, data):
    if model.config.joins_texts and model.config.passage_length is not None:
        pytest.skip("the number of passages is that of the device's tokens")
    parts = {"train_dataset": datasets.concatenate_datasets([uneven, uneven])} if data == "uneven" else {}
    loss = "margin_mse:1,mse:0.5"
    trainer = make_trainer(model, parts, max_steps=2, per_device_train_batch_size=5, loss=loss)
    batches = iter(trainer.get_train_dataloader())
    trainer.finite_losses.is_late = True  # as on a GPU
    waits = []
    for batch in (next(batches), next(batches)):
        calls.names.clear()
        with calls:
            trainer.training_step(trainer.model, batch, 5)
        waits.append(calls.names.copy())
    # The loss of the first step, which was copied to the host when it was computed.
    assert waits == [[], ["_local_scalar_dense"]]
    assert not trainer.args.logging_nan_inf_filter, "Trainer would read every loss"
