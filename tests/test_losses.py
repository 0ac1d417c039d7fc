"""Losses against hand-computed values, the paper's training code (golden/losses.json), and what must not matter."""

import json
import math
from pathlib import Path

import pytest
import torch

from hf_kd_ranking.losses import LOSSES, get_loss, margin_mse, margins, ranknet, spread

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def golden(loss: str) -> pytest.MarkDecorator:
    cases = [case for case in GOLDEN if case["loss"] == loss]
    return pytest.mark.parametrize("case", cases, ids=[case["case"] for case in cases])


def columns(case: dict, *names: str) -> torch.Tensor:
    """Columns of a golden case, stored as (B,) or (B, 1), side by side: (B, len(names))."""
    return torch.stack([torch.tensor(case["inputs"][name]).flatten() for name in names], dim=1)


def test_margin_mse_of_pairs_matches_hand_computed_value():
    student = torch.tensor([[3.0, 1.0], [0.0, 2.0]])  # margins 2, -2
    teacher = torch.tensor([[9.0, 4.0], [1.0, 1.0]])  # margins 5,  0
    assert margin_mse(student, teacher).item() == pytest.approx((3**2 + 2**2) / 2)


def test_margin_mse_of_lists_compares_column_0_with_every_other_column():
    student = torch.tensor([[5.0, 3.0, 1.0], [0.0, 2.0, -1.0]])  # margins  2, 4 | -2, 1
    teacher = torch.tensor([[7.0, 4.0, 8.0], [1.0, 1.0, 0.5]])  # margins  3, -1 |  0, 0.5
    assert margin_mse(student, teacher).item() == pytest.approx((1**2 + 5**2 + 2**2 + 0.5**2) / 4)


def test_margin_mse_follows_a_teacher_that_prefers_the_negative():
    teacher = torch.tensor([[1.0, 4.0]])  # margin -3
    assert margin_mse(torch.tensor([[1.0, 4.0]]), teacher).item() == 0.0
    assert margin_mse(torch.tensor([[4.0, 1.0]]), teacher).item() == pytest.approx(6.0**2)  # not (3 - 3)^2


def test_margin_mse_on_n_documents_is_the_mean_over_its_pairs():
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    pairs = [margin_mse(student[:, [0, j]], teacher[:, [0, j]]) for j in range(1, 5)]
    torch.testing.assert_close(margin_mse(student, teacher), torch.stack(pairs).mean())


def test_ranknet_matches_hand_computed_value():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # margins 2, -1
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert ranknet(student, torch.zeros(2, 2)).item() == pytest.approx(expected)


def test_ranknet_of_lists_compares_column_0_with_every_other_column():
    student = torch.tensor([[1.0, 0.0, 3.0]])  # margins 1, -2
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert ranknet(student, torch.zeros(1, 3)).item() == pytest.approx(expected)


def test_ranknet_does_not_read_teacher_scores():
    student = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    assert ranknet(student, torch.full((2, 2), float("nan"))) == ranknet(student, torch.zeros(2, 2))


@golden("margin-mse")
def test_margin_mse_and_its_gradient_equal_the_papers_training_code(case):
    student = columns(case, "scores_pos", "scores_neg").requires_grad_()
    loss = margin_mse(student, columns(case, "label_pos", "label_neg"))
    loss.backward()
    assert loss.item() == pytest.approx(case["output"], rel=1e-5, abs=1e-6)
    gradient = columns({"inputs": case["grads"]}, "scores_pos", "scores_neg")
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


@golden("ranknet")
def test_ranknet_and_its_gradient_equal_the_papers_training_code_with_target_probability_one(case):
    student = columns(case, "scores_pos", "scores_neg").requires_grad_()
    loss = ranknet(student, torch.zeros(len(student), 2))
    loss.backward()
    assert loss.item() == pytest.approx(case["output"], rel=1e-5)
    gradient = columns({"inputs": case["grads"]}, "scores_pos", "scores_neg")
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


@ALL_LOSSES
def test_a_constant_added_to_all_scores_of_a_row_changes_nothing(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, generator=generator).unbind()
    shift = torch.tensor([[10.0], [-3.0], [0.5], [100.0]])  # another one for each row
    torch.testing.assert_close(loss(student + shift, teacher - shift), loss(student, teacher), rtol=1e-4, atol=1e-5)


@ALL_LOSSES
def test_the_order_of_the_negatives_and_of_the_rows_changes_nothing(loss):
    student, teacher = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(student[:, [0, 3, 1, 2]], teacher[:, [0, 3, 1, 2]]), expected)
    torch.testing.assert_close(loss(student.flip(0), teacher.flip(0)), expected)


@ALL_LOSSES
def test_only_the_student_gets_a_gradient(loss):
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[5.0, 2.0]], requires_grad=True)
    loss(student, teacher).backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]  # descent widens a margin that is too small
    assert teacher.grad is None


@ALL_LOSSES
def test_half_precision_scores_are_compared_in_float32(loss):
    student = torch.tensor([[100.0, 99.5], [3.0, 1.0]], dtype=torch.bfloat16)
    teacher = torch.tensor([[1000.25, 999.0], [8.0, 7.0]])
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher))


@ALL_LOSSES
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param((4, 1), (4,), id="would-broadcast-to-4x4"),
        pytest.param((4,), (4,), id="flat"),
        pytest.param((4, 1), (4, 1), id="no-negative"),
        pytest.param((4, 2), (4, 3), id="other-list-length"),
        pytest.param((4, 2), (1, 2), id="would-broadcast-over-rows"),
        pytest.param((2, 4, 2), (2, 4, 2), id="three-dimensions"),
    ],
)
def test_shapes_that_make_no_pairs_are_refused_by_name(loss, student, teacher):
    with pytest.raises(ValueError, match="at least two documents") as error:
        loss(torch.zeros(student), torch.zeros(teacher))
    assert f"got {student} and {teacher}; check what the collator" in str(error.value)


def test_margins_are_positive_minus_negative_in_both_outputs():
    student, teacher = margins(torch.tensor([[5.0, 3.0, 6.0]]), torch.tensor([[1.0, -2.0, 0.5]]))
    assert student.tolist() == [[2.0, -1.0]]
    assert teacher.tolist() == [[3.0, 0.5]]


@pytest.mark.parametrize(("values", "expected"), [([3.0, -4.0], math.sqrt(12.5)), ([-2.0], 2.0), ([], 0.0)])
def test_spread_is_the_root_mean_square(values, expected):
    assert spread(torch.tensor(values)) == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_get_loss_finds_a_loss_by_its_function_name(name):
    assert get_loss(name) is LOSSES[name]
    assert get_loss(name).__name__ == name


@pytest.mark.parametrize(("name", "nearest"), [("margin-mse", "margin_mse"), ("rank_net", "ranknet")])
def test_an_unknown_loss_names_the_nearest_and_all_others(name, nearest):
    with pytest.raises(ValueError) as error:
        get_loss(name)
    message = str(error.value)
    assert message.startswith(f"Unknown loss {name!r}; did you mean {nearest!r}?")
    assert message.endswith("Choose one of margin_mse, ranknet.")


def test_an_unknown_loss_that_resembles_none_lists_all():
    with pytest.raises(ValueError, match=r"^Unknown loss 'xyz'.* Choose one of margin_mse, ranknet\.$") as error:
        get_loss("xyz")
    assert "did you mean" not in str(error.value)
