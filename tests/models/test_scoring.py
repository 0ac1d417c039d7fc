"""The score functions on vectors small enough to multiply by hand."""

import pytest
import torch

from hf_kd_ranking.models.scoring import dot_product

QUERY = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]])


def test_one_document_a_query_matches_hand_computed_values():
    document = torch.tensor([[3.0, 1.0, 2.0], [2.0, 9.0, -0.25]])
    assert dot_product(QUERY, document).tolist() == [3.0, 0.0]  # 3 + 2 - 2, 1 + 0 - 1


def test_n_documents_a_query_match_hand_computed_values():
    document = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[2.0, 0.0, 0.0]] * 3])
    assert dot_product(QUERY, document).tolist() == [[1.0, 2.0, -1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_documents_score_as_one_by_one_whatever_n(n):
    generator = torch.Generator().manual_seed(0)
    query, document = torch.randn(2, 3, generator=generator), torch.randn(2, n, 3, generator=generator)
    scores = dot_product(query, document)
    assert scores.shape == (2, n)
    expected = torch.stack([dot_product(query, document[:, j]) for j in range(n)], dim=1)
    torch.testing.assert_close(scores, expected)


def test_scores_are_the_matrix_product_of_plain_torch():
    generator = torch.Generator().manual_seed(1)
    query, document = torch.randn(4, 16, generator=generator), torch.randn(4, 5, 16, generator=generator)
    torch.testing.assert_close(dot_product(query, document), torch.einsum("bh,bnh->bn", query, document))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (1, 1, 2)])
def test_half_precision_vectors_give_float32_scores_without_rounding(dtype, shape):
    query = torch.tensor([[8.0, 0.125]], dtype=dtype)
    document = torch.tensor([12.5, 1.0], dtype=dtype).view(shape)
    scores = dot_product(query, document)
    assert scores.dtype == torch.float32
    assert scores.item() == 100.125  # bfloat16 has no number between 100 and 100.5


def test_scores_stay_float32_under_autocast():
    query, document = torch.tensor([[8.0, 0.125]]), torch.tensor([[12.5, 1.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = dot_product(query, document)
    assert (scores.dtype, scores.item()) == (torch.float32, 100.125)


def test_vectors_of_different_width_are_refused():
    with pytest.raises(RuntimeError, match="must match"):
        dot_product(torch.zeros(2, 3), torch.zeros(2, 4))
