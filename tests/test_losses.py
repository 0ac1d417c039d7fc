"""Losses against hand-computed values, the paper's training code (golden/losses.json), and what must not matter."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from hf_kd_ranking.errors import InputError
from hf_kd_ranking.losses import (
    LOSSES,
    adr_mse,
    all_margins_mse,
    check_data,
    get_loss,
    get_losses,
    info_nce,
    kl_div,
    lambda_loss,
    list_mle,
    margin_mse,
    margins,
    mse,
    order_ranknet,
    ranknet,
    spread,
    weighted_ranknet,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
FUNCTIONS = {name: loss.function for name, loss in LOSSES.items()}
ALL_LOSSES = pytest.mark.parametrize("loss", FUNCTIONS.values(), ids=FUNCTIONS)


def without(*names: str) -> pytest.MarkDecorator:
    left = {name: loss for name, loss in FUNCTIONS.items() if name not in names}
    return pytest.mark.parametrize("loss", left.values(), ids=left)


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


def test_margin_mse_of_lists_compares_column_0_with_others():
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


def test_ranknet_of_lists_compares_column_0_with_others():
    student = torch.tensor([[1.0, 0.0, 3.0]])  # margins 1, -2
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert ranknet(student, torch.zeros(1, 3)).item() == pytest.approx(expected)


def test_ranknet_does_not_read_teacher_scores():
    student = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    assert ranknet(student, torch.full((2, 2), float("nan"))) == ranknet(student, torch.zeros(2, 2))


@golden("margin-mse")
def test_margin_mse_and_gradient_equal_the_papers_code(case):
    student = columns(case, "scores_pos", "scores_neg").requires_grad_()
    loss = margin_mse(student, columns(case, "label_pos", "label_neg"))
    loss.backward()
    assert loss.item() == pytest.approx(case["output"], rel=1e-5, abs=1e-6)
    gradient = columns({"inputs": case["grads"]}, "scores_pos", "scores_neg")
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


@golden("ranknet")
def test_ranknet_and_gradient_equal_the_papers_code(case):
    student = columns(case, "scores_pos", "scores_neg").requires_grad_()
    loss = ranknet(student, torch.zeros(len(student), 2))
    loss.backward()
    assert loss.item() == pytest.approx(case["output"], rel=1e-5)
    gradient = columns({"inputs": case["grads"]}, "scores_pos", "scores_neg")
    torch.testing.assert_close(student.grad, gradient, rtol=1e-5, atol=1e-6)


@without("mse", "lambda_loss")  # which read single scores, and grades
def test_shift_of_all_scores_of_a_row_changes_nothing(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, generator=generator).unbind()
    shift = torch.tensor([[10.0], [-3.0], [0.5], [100.0]])  # another one for each row
    torch.testing.assert_close(loss(student + shift, teacher - shift), loss(student, teacher), rtol=1e-4, atol=1e-5)


@ALL_LOSSES
def test_order_of_negatives_and_rows_changes_nothing(loss):
    student, teacher = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(student[:, [0, 3, 1, 2]], teacher[:, [0, 3, 1, 2]]), expected)
    torch.testing.assert_close(loss(student.flip(0), teacher.flip(0)), expected)


@without("mse")
def test_only_the_student_gets_a_gradient(loss):
    student = torch.tensor([[1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[5.0, 2.0]], requires_grad=True)
    loss(student, teacher).backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]  # descent widens a margin that is too small
    assert teacher.grad is None


@without("lambda_loss")
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


def test_other_losses_match_hand_computed_values():
    student = torch.tensor([[2.0, 0.0, 1.0]])
    teacher = torch.tensor([[5.0, 1.0, 2.0]])
    assert all_margins_mse(student, teacher).item() == pytest.approx(((2 - 4) ** 2 + (1 - 3) ** 2 + (-1 + 1) ** 2) / 3)
    assert mse(student, teacher).item() == pytest.approx((9 + 1 + 1) / 3)
    softplus = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))]
    assert weighted_ranknet(student, teacher).item() == pytest.approx((4 * softplus[0] + 3 * softplus[1]) / 2)
    q, p = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in ([2, 0, 1], [5, 1, 2]))
    assert kl_div(student, teacher).item() == pytest.approx(
        sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    )
    assert info_nce(student, teacher).item() == pytest.approx(-math.log(q[0]))


def test_kl_div_temperature_divides_the_scores():
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)).unbind()
    torch.testing.assert_close(kl_div(student, teacher, 2.0), 4 * kl_div(student / 2, teacher / 2))
    assert kl_div(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-6)


def test_lambda_loss_matches_a_hand_computed_value():
    # Ranked by the student: grades 0, 2. Ideal DCG 3; gains 0 and 1; the pair's weight is |1/D(1) - 1/D(2)| * 1.
    weight = 1 / math.log2(2) - 1 / math.log2(3)
    wanted = -weight * math.log2(1 / (1 + math.exp(1.0)))
    assert lambda_loss(torch.tensor([[0.5, 1.5]]), torch.tensor([[2.0, 0.0]])).item() == pytest.approx(wanted)


def test_lambda_loss_refuses_scores_that_are_not_grades():
    with pytest.raises(ValueError, match=r"lambda_loss takes grades up to 40, got 1000"):
        lambda_loss(torch.zeros(1, 2), torch.tensor([[1000.0, 1.0]]))


def test_losses_of_an_order_match_hand_computed_values():
    student = torch.tensor([[2.0, 0.0, 1.0]])
    teacher = torch.tensor([[5.0, 1.0, 2.0]])  # ranks 1, 3, 2
    pairs = [softplus(-(2 - 0)), softplus(-(2 - 1)), softplus(-(1 - 0))]
    assert order_ranknet(student, teacher).item() == pytest.approx(sum(pairs) / 3)
    first = math.log(math.exp(2) + math.exp(1) + math.exp(0)) - 2
    second = math.log(math.exp(1) + math.exp(0)) - 1
    assert list_mle(student, teacher).item() == pytest.approx(first + second)
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in (-2, -1, 1, 2)}
    approximate = [1 + sigmoid[-2] + sigmoid[-1], 1 + sigmoid[2] + sigmoid[1], 1 + sigmoid[1] + sigmoid[-1]]
    errors = [(rank - p) ** 2 / math.log2(1 + rank) for rank, p in zip([1, 3, 2], approximate, strict=True)]
    assert adr_mse(student, teacher).item() == pytest.approx(sum(errors) / 3)
    assert adr_mse(student, teacher, temperature=0.01).item() == pytest.approx(0, abs=1e-6)


def test_losses_of_an_order_handle_ties():
    student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[5.0, 5.0, 2.0]])  # ranks 1.5, 1.5, 3
    assert order_ranknet(student, teacher).item() == pytest.approx((softplus(-1) + softplus(1)) / 2)
    assert order_ranknet(student, torch.ones(1, 3)) == 0
    sigmoid = {x: 1 / (1 + math.exp(-x)) for x in (-2, -1, 1, 2)}
    approximate = [1 + sigmoid[-2] + sigmoid[-1], 1 + sigmoid[2] + sigmoid[1], 1 + sigmoid[1] + sigmoid[-1]]
    errors = [(rank - p) ** 2 / math.log2(1 + rank) for rank, p in zip([1.5, 1.5, 3], approximate, strict=True)]
    assert adr_mse(student, teacher).item() == pytest.approx(sum(errors) / 3)


@pytest.mark.parametrize("loss", [order_ranknet, list_mle, adr_mse])
def test_losses_of_an_order_read_nothing_else_of_the_teacher(loss):
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3)).unbind()
    assert loss(student, teacher) == loss(student, teacher.exp() * 1000) != loss(student, -teacher)


class Fixed(torch.nn.Module):
    """A cross-encoder of sentence-transformers whose scores are given."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs: list, **options: object) -> dict:
        return {}

    def forward(self, features: dict) -> dict:
        return {"scores": self.scores}


def test_losses_of_an_order_equal_sentence_transformers():
    from sentence_transformers.cross_encoder import losses

    student, teacher = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(4)).unbind()
    inputs = [list("abc"), [list("uvwxyz")] * 3]
    for ours, theirs in [
        (adr_mse(student, teacher, temperature=0.5), losses.ADRMSELoss(Fixed(student), alpha=2, mini_batch_size=-1)),
        (
            list_mle(student, teacher),
            losses.ListMLELoss(Fixed(student), mini_batch_size=-1, respect_input_order=False),
        ),
    ]:
        torch.testing.assert_close(ours, theirs(inputs, list(teacher)))


# The first three pairs of the paper's training code's random case, and what it gives for them alone.
POINTWISE = torch.tensor([[1.9241867, 0.0992526], [6.6639862, 5.8690720], [2.8223925, 4.5186262]])
TEACHER = torch.tensor([[1.8430858, 0.4945046], [3.5527329, -5.7936282], [2.0422117, 5.5272927]])


def test_pairwise_losses_are_the_papers_formulas():
    (pos, neg), (t_pos, t_neg) = POINTWISE.T, TEACHER.T
    log_sigmoid = torch.log(torch.sigmoid(pos - neg))
    torch.testing.assert_close(weighted_ranknet(POINTWISE, TEACHER), -(log_sigmoid * (t_pos - t_neg)).mean())
    two_mses = (((pos - t_pos) ** 2).mean() + ((neg - t_neg) ** 2).mean()) / 2
    torch.testing.assert_close(mse(POINTWISE, TEACHER), two_mses)


@pytest.mark.data
def test_losses_equal_the_papers_code_on_all_its_cases():
    cases = json.loads((Path(os.environ["HF_KD_RANKING_DATA"]).parent / "golden" / "losses.json").read_text())
    compared = 0
    for case in cases:
        inputs = {name: torch.tensor(values) for name, values in case["inputs"].items()}
        if case["case"] == "column_scores_flat_labels_broadcast":
            continue  # its own broadcasting is the defect
        if case["loss"] in PAIRWISE:
            student = torch.stack([inputs["scores_pos"].flatten(), inputs["scores_neg"].flatten()], 1)
            teacher = torch.stack([inputs["label_pos"].flatten(), inputs["label_neg"].flatten()], 1)
            got = PAIRWISE[case["loss"]](student, teacher).item()
        elif case["settings"] == {"weighing_scheme": "ndcgLoss2_scheme"} and case["case"].startswith("4x6/grades"):
            scores = inputs["y_pred"]
            got = len(scores) * lambda_loss(scores, inputs["y_true"]).item()  # it sums over rows
        else:
            continue
        compared += 1
        assert got == pytest.approx(case["output"], rel=1e-5, abs=1e-5), (case["loss"], case["case"])
    assert compared > 30


PAIRWISE = {
    "margin-mse": margin_mse,
    "MSETeacherPointwise": mse,
    "RankNetTeacher": weighted_ranknet,
}


# ---- Lists of different lengths -------------------------------------------------------------------------------------

# Two rows, of three and two documents; what stands in the last place of the second must not matter.
STUDENT = torch.tensor([[2.0, 0.0, 1.0], [1.0, 3.0, 50.0]])  # margins 2, 1 | -2
TEACHER_LISTS = torch.tensor([[5.0, 1.0, 2.0], [2.0, 1.0, -70.0]])  # margins 4, 3 | 1
MASK = torch.tensor([[True, True, True], [True, True, False]])


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_masked_losses_match_hand_computed_values():
    values = {name: loss(STUDENT, TEACHER_LISTS, mask=MASK).item() for name, loss in FUNCTIONS.items()}
    assert values["margin_mse"] == pytest.approx(((4 + 4) / 2 + 9) / 2)
    assert values["all_margins_mse"] == pytest.approx(((4 + 4 + 0) / 3 + 9) / 2)
    assert values["mse"] == pytest.approx(((9 + 1 + 1) / 3 + (1 + 4) / 2) / 2)
    assert values["ranknet"] == pytest.approx(((softplus(-2) + softplus(-1)) / 2 + softplus(2)) / 2)
    assert values["weighted_ranknet"] == pytest.approx(((4 * softplus(-2) + 3 * softplus(-1)) / 2 + softplus(2)) / 2)
    first_row = math.log(1 + math.exp(-2) + math.exp(-1))
    assert values["info_nce"] == pytest.approx((first_row + softplus(2)) / 2)


@ALL_LOSSES
def test_masked_loss_is_the_mean_of_the_rows_without_padding(loss):
    wanted = (loss(STUDENT[:1], TEACHER_LISTS[:1]) + loss(STUDENT[1:, :2], TEACHER_LISTS[1:, :2])) / 2
    torch.testing.assert_close(loss(STUDENT, TEACHER_LISTS, mask=MASK), wanted)


@ALL_LOSSES
def test_mask_of_equal_lists_changes_nothing(loss):
    torch.testing.assert_close(
        loss(STUDENT, TEACHER_LISTS, mask=torch.ones(2, 3, dtype=torch.bool)), loss(STUDENT, TEACHER_LISTS)
    )


@ALL_LOSSES
def test_masked_documents_get_no_gradient_and_others_a_finite_one(loss):
    student = STUDENT.clone().requires_grad_()
    loss(student, TEACHER_LISTS, mask=MASK).backward()
    assert student.grad[1, 2] == 0
    assert student.grad.isfinite().all()
    assert student.grad[MASK].abs().max() > 0


@ALL_LOSSES
def test_mask_of_another_shape_is_refused(loss):
    with pytest.raises(ValueError, match=r"The mask must have the shape of the scores \(2, 3\), got \(2, 2\)"):
        loss(STUDENT, TEACHER_LISTS, mask=MASK[:, :2])


# ---- Names and requirements -----------------------------------------------------------------------------------------


def test_several_losses_have_weights():
    assert get_losses("margin_mse") == {"margin_mse": 1.0}
    assert get_losses("margin_mse:2, mse:0.5") == {"margin_mse": 2.0, "mse": 0.5}


def test_settings_in_parentheses_reach_the_loss():
    text = "kl_div(temperature=2):3, in_batch_info_nce(temperature=0.5),mse"
    assert get_losses(text) == {"kl_div(temperature=2)": 3.0, "in_batch_info_nce(temperature=0.5)": 1.0, "mse": 1.0}
    student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[5.0, 1.0, 2.0]])
    loss = get_loss("kl_div(temperature=2)")
    assert loss.needs_lists and loss.function(student, teacher) == kl_div(student, teacher, 2.0)
    by_hand = math.log(1 + math.exp(-2 / 0.5) + math.exp(-1 / 0.5))
    loss = get_loss("in_batch_info_nce(temperature=0.5)")
    assert loss.function(student, teacher).item() == pytest.approx(by_hand)
    assert get_loss("mse") == LOSSES["mse"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_div(temperature=0)", "The temperature of kl_div must be a positive number, got '0'"),
        ("kl_div(temperature=warm)", "The temperature of kl_div must be a positive number, got 'warm'"),
        ("kl_div(2)", "kl_div has no setting '2'; it has temperature"),
        ("kl_div()", "kl_div has no setting ''; it has temperature"),
        ("in_batch_kl_div(margin=1)", "in_batch_kl_div has no setting 'margin'; it has temperature"),
        ("mse(temperature=2)", "mse has no setting 'temperature'; it has no settings"),
        ("kl_div(temperature=2:1", "closing parenthesis, got 'kl_div(temperature=2'"),
        ("kl_dib(temperature=2):1", "Unknown loss 'kl_dib'; did you mean 'kl_div'?"),
        ("mse:1,margin_mse,mse:2", "The loss mse is given twice in 'mse:1,margin_mse,mse:2'"),
    ],
)
def test_bad_settings_of_a_loss_are_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        get_losses(text)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match=f"^The weight of mse must be a positive number, got '{weight}'"):
        get_losses(f"margin_mse,mse:{weight}")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("margin-mse", "margin_mse"), ("rank_net", "ranknet"), ("inbatch_margin_mse", "in_batch_margin_mse")],
)
def test_an_unknown_loss_names_the_nearest_and_all_others(name, nearest):
    with pytest.raises(ValueError) as error:
        get_losses(name)
    message = str(error.value)
    assert message.startswith(f"Unknown loss {name!r}; did you mean {nearest!r}?")
    assert message.endswith(f"Choose one of {', '.join(LOSSES)}, or in_batch_ followed by one of them.")


def test_an_unknown_loss_that_resembles_none_lists_all():
    with pytest.raises(ValueError, match=r"^Unknown loss 'xyz'.* Choose one of margin_mse, ") as error:
        get_losses("xyz")
    assert "did you mean" not in str(error.value)


def test_losses_that_need_what_the_rows_lack_are_refused():
    check_data(["margin_mse", "mse", "ranknet", "info_nce"], documents=2, has_only_margins=False)
    check_data(["margin_mse", "kl_div", "ranknet"], documents=3, has_only_margins=True)
    check_data(["in_batch_mse", "in_batch_kl_div"], documents=2, has_only_margins=True)  # they read no row
    with pytest.raises(
        ValueError, match=r"^mse reads the teacher's score of each document, and these rows hold only m"
    ):
        check_data(["margin_mse", "mse"], documents=2, has_only_margins=True)
    with pytest.raises(ValueError, match=r"^kl_div compares lists, and these rows hold 2 documents per query"):
        check_data(["kl_div"], documents=2, has_only_margins=False)
