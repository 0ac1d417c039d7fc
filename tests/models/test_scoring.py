"""The score functions on vectors small enough to multiply by hand."""

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.models import scoring
from hf_kd_ranking.models.scoring import (
    dot_product,
    dot_products,
    kernel_pooling,
    kernel_poolings,
    max_sim,
    max_sim_without_padding,
    max_sims,
)

QUERY = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]])


def test_one_document_per_query_matches_hand_computed_values():
    document = torch.tensor([[3.0, 1.0, 2.0], [2.0, 9.0, -0.25]])
    assert dot_product(QUERY, document).tolist() == [3.0, 0.0]  # 3 + 2 - 2, 1 + 0 - 1


def test_n_documents_per_query_match_hand_computed_values():
    document = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[2.0, 0.0, 0.0]] * 3])
    assert dot_product(QUERY, document).tolist() == [[1.0, 2.0, -1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_documents_score_as_one_by_one(n):
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
def test_half_precision_vectors_score_in_float32(dtype, shape):
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


def test_all_pairs_of_one_vector_match_hand_computed_values():
    document = torch.tensor([[3.0, 1.0, 2.0], [2.0, 9.0, -0.25], [0.0, 0.0, 1.0]])
    assert dot_products(QUERY, document).tolist() == [[3.0, 20.25, -1.0], [9.5, 0.0, 4.0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = dot_products(torch.tensor([[8.0, 0.125]]), torch.tensor([[12.5, 1.0]]))
    assert (scores.dtype, scores.item()) == (torch.float32, 100.125)


# ---- MaxSim ---------------------------------------------------------------------------------------------------------


TOKENS = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]])  # (1, Lq, D)
DOCUMENTS = torch.tensor([[[[2.0, 1.0], [-1.0, 4.0]], [[-1.0, -1.0], [-2.0, 0.5]]]])  # (1, n, Ld, D)


def test_max_sim_matches_hand_computed_values():
    # First document: max(2, -1) + max(2, 8) + max(9, 9); second: max(-1, -2) + max(-2, 1) + max(-6, -4.5).
    assert max_sim(TOKENS, DOCUMENTS).tolist() == [[19.0, -4.5]]
    assert max_sim(TOKENS, DOCUMENTS[:, 0]).tolist() == [19.0]


def test_masked_query_tokens_add_nothing_to_max_sim():
    assert max_sim(TOKENS, DOCUMENTS, query_mask=torch.tensor([[1, 0, 1]])).tolist() == [[11.0, -5.5]]
    assert max_sim(TOKENS, DOCUMENTS, query_mask=torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]


def test_masked_document_tokens_never_win_max_sim():
    mask = torch.tensor([[[1, 0], [1, 0]]])
    assert max_sim(TOKENS, DOCUMENTS, document_mask=mask).tolist() == [[13.0, -9.0]]  # 2 + 2 + 9, -1 - 2 - 6
    zeros = DOCUMENTS * mask.unsqueeze(-1)  # a similarity of 0 is above all of the second document's
    assert max_sim(TOKENS, zeros, document_mask=mask).tolist() == [[13.0, -9.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_max_sim_without_padding_is_that_of_padded_documents(dtype):
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([3, 0, 5, 1])
    query = torch.randn(1, 4, 8, generator=generator)
    document = torch.randn(1, 4, 5, 8, generator=generator).to(dtype)
    mask = torch.arange(5) < lengths.unsqueeze(1)
    scores = max_sim_without_padding(query[0], document[0][mask], lengths)
    torch.testing.assert_close(scores, max_sim(query, document, None, mask.unsqueeze(0))[0])


def test_max_sim_of_a_document_without_tokens_is_the_constant():
    mask = torch.tensor([[[1, 1], [0, 0]]])
    assert max_sim(TOKENS, DOCUMENTS, torch.tensor([[1, 1, 0]]), mask).tolist() == [[10.0, -20_000.0]]


def test_all_pairs_of_tokens_match_hand_computed_values():
    queries = torch.cat([TOKENS, -TOKENS])
    assert max_sims(queries, DOCUMENTS[0]).tolist() == [[19.0, -4.5], [-10.0, 10.0]]
    masks = torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.tensor([[1, 0], [1, 0]])
    # First query: 2 + 9 and -1 - 6; second: -2 - 2 - 9 and 1 + 2 + 6.
    assert max_sims(queries, DOCUMENTS[0], *masks).tolist() == [[11.0, -7.0], [-13.0, 9.0]]


# ---- Kernel pooling -------------------------------------------------------------------------------------------------


ONES = torch.ones(1, 2)
MU, SIGMA, SCALE = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0])


def test_kernel_pooling_matches_hand_computed_values():
    query, document = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]), torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    # Cosines of the first query token: 1 and 0.6, of the second: 0 and 0.8.
    near_1 = math.log(1 + math.exp(-(0.4**2) / 0.5)) + math.log(math.exp(-1 / 0.5) + math.exp(-(0.2**2) / 0.5))
    near_0 = math.log(2 * (math.exp(-1 / 0.125) + math.exp(-(0.6**2) / 0.125)))
    near_0 += math.log(2 * (1 + math.exp(-(0.8**2) / 0.125)))
    pooled = kernel_pooling(query, document, ONES, ONES, MU, SIGMA, SCALE)
    assert pooled.tolist()[0] == pytest.approx([near_1, near_0], rel=1e-5)


def test_kernel_pooling_ignores_masked_tokens():
    query, document = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]), torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    first = torch.tensor([[1, 0]])
    near_1 = math.log(1 + math.exp(-(0.4**2) / 0.5)) + 0
    near_0 = math.log(2 * (math.exp(-1 / 0.125) + math.exp(-(0.6**2) / 0.125)))
    pooled = kernel_pooling(query, document, first, ONES, MU, SIGMA, SCALE)
    assert pooled.tolist()[0] == pytest.approx([near_1, near_0], rel=1e-5)
    pooled = kernel_pooling(query, document, ONES, first, MU, SIGMA, SCALE)  # cosines 1 and 0
    near_1, near_0 = 0 + math.log(math.exp(-1 / 0.5)), math.log(2 * math.exp(-1 / 0.125)) + math.log(2)
    assert pooled.tolist()[0] == pytest.approx([near_1, near_0], rel=1e-5)


def test_counts_of_nothing_are_finite():
    query, document = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]), torch.zeros(1, 2, 2)
    pooled = kernel_pooling(query, document, ONES, torch.zeros(1, 2), MU, SIGMA, SCALE)
    assert pooled.tolist()[0] == pytest.approx([2 * math.log(1e-10)] * 2)  # the published floor, per query token
    pooled = kernel_pooling(query, document, torch.zeros(1, 2), ONES, MU, SIGMA, SCALE)
    assert pooled.tolist() == [[0.0, 0.0]]


# ---- Both, over many documents --------------------------------------------------------------------------------------


def plain_max_sim(query, documents, query_mask=None, document_mask=None):
    """The definition, by operations that PyTorch differentiates."""
    products = torch.einsum("btd,bnld->bntl", query, documents)
    if document_mask is not None:
        products = products.masked_fill(~document_mask.bool().unsqueeze(2), -10_000.0)
    largest = products.amax(-1)
    return (largest if query_mask is None else largest * query_mask.unsqueeze(1)).sum(-1)


def plain_kernel_pooling(query, documents, query_mask, document_mask, mu, sigma, scale):
    """The definition, by operations that PyTorch differentiates."""
    cosines = torch.cosine_similarity(query[:, None, :, None], documents.unsqueeze(2), dim=-1)  # (B, n, Lq, Ld)
    values = torch.exp(-((cosines.unsqueeze(-1) - mu) ** 2) / (2 * sigma**2)) * document_mask[:, :, None, :, None]
    logs = (values.sum(3) * scale).clamp(min=1e-10).log()  # (B, n, Lq, K)
    return (logs * query_mask[:, None, :, None]).sum(2)


@pytest.mark.parametrize("chunk", [None, 1, 4 * 3 * 5 * 2])
@pytest.mark.parametrize("has_masks", [True, False])
def test_all_pairs_have_the_scores_and_gradients_of_expanded_documents(monkeypatch, chunk, has_masks):
    if chunk is not None:
        monkeypatch.setitem(scoring.BLOCK_SIZE, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    query, documents = torch.randn(4, 3, 8, generator=generator), torch.randn(7, 5, 8, generator=generator)
    kernels = (torch.tensor([1.0, 0.3, -0.4]), torch.tensor([0.1, 0.5, 0.4]), torch.tensor([1.0, 0.5, 2.0]))
    masks = wide = (None, None)
    if has_masks:
        masks = torch.rand(4, 3, generator=generator) < 0.7, torch.rand(7, 5, generator=generator) < 0.7
        wide = masks[0], masks[1].expand(4, 7, 5)
    forms = [
        (lambda q, d: max_sims(q, d, *masks), lambda q, d: plain_max_sim(q, d.expand(4, *d.shape), *wide)),
        (lambda q, d: dot_products(q[:, 0], d[:, 0]), lambda q, d: dot_product(q[:, 0], d[:, 0].expand(4, 7, 8))),
    ]
    if has_masks:  # kernel pooling needs them
        forms.append(
            (
                lambda q, d: kernel_poolings(q, d, *masks, *kernels),
                lambda q, d: plain_kernel_pooling(q, d.expand(4, *d.shape), *wide, *kernels),
            )
        )
    for forms_of_one in forms:
        found = []
        for function in forms_of_one:
            sides = [query.clone().requires_grad_(), documents.clone().requires_grad_()]
            scores = function(*sides)
            found.append((scores.detach(), *torch.autograd.grad(scores.square().sum(), sides)))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def double(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


FIRST_EMPTY = torch.tensor([[[0, 0], [1, 0], [1, 1]], [[1, 1], [0, 1], [0, 1]]])  # the first document has no tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_own_documents_under_autocast(dtype):
    """Two queries of three documents, of which one has no tokens; the last two are equal in all functions."""
    forms = [(max_sim, plain_max_sim, ()), (kernel_pooling, plain_kernel_pooling, (MU, SIGMA, SCALE))]
    for function, plain, kernels in forms:
        found = []
        for run, is_autocast in ((function, dtype != torch.float32), (plain, False)):
            sides = [double(2, 4, 5, seed=1).float(), double(2, 3, 2, 5, seed=2).float()]
            sides = [side.detach().requires_grad_() for side in sides]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
                scores = run(*sides, torch.tensor([[1, 1, 0, 1]] * 2), FIRST_EMPTY, *kernels)
                found.append((scores.detach(), *torch.autograd.grad(scores.square().sum(), sides)))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_numerical_gradients_in_float64():
    query, own, others = double(2, 3, 4, seed=1), double(2, 3, 2, 4, seed=2), double(3, 2, 4, seed=3)
    kernels = (MU.double(), SIGMA.double(), SCALE.double())
    masks = torch.ones(2, 3), FIRST_EMPTY
    shared = torch.ones(2, 3), FIRST_EMPTY[0]
    torch.autograd.gradcheck(lambda q, d: max_sim(q, d, *masks), (query, own))
    torch.autograd.gradcheck(lambda q, d: max_sims(q, d, *shared), (query, others))
    torch.autograd.gradcheck(lambda q, d: kernel_pooling(q, d, *masks, *kernels), (query, own))
    torch.autograd.gradcheck(lambda q, d: kernel_poolings(q, d, *shared, *kernels), (query, others))


def test_first_of_equal_largest_products_gets_the_gradient():
    query, document = torch.ones(1, 1, 2), torch.tensor([[[0.0, 1.0], [2.0, 1.0], [1.0, 2.0]]])
    document.requires_grad_()
    max_sim(query, document).sum().backward()  # products 1, 3, 3
    assert document.grad.tolist() == [[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]


def test_second_derivatives_are_refused():
    query = double(1, 2, 3, seed=1)
    for function, kernels in ((max_sims, ()), (kernel_poolings, (MU, SIGMA, SCALE))):
        scores = function(query, double(2, 2, 3, seed=2), torch.ones(1, 2), torch.ones(2, 2), *kernels)
        with pytest.raises(NotImplementedError, match=r"no second derivative; .* without create_graph=True"):
            torch.autograd.grad(scores.sum(), query, create_graph=True)


def test_compiled_scores_and_gradients_are_the_same():
    query, documents, masks = double(2, 3, 4, seed=1), double(5, 2, 4, seed=2), (torch.ones(2, 3), torch.ones(5, 2))
    for function in (max_sims, lambda *tensors: kernel_poolings(*tensors, MU, SIGMA, SCALE)):
        found = []
        for run in (function, torch.compile(function, backend="eager")):
            scores = run(query, documents, *masks)
            found.append((scores.detach(), *torch.autograd.grad(scores.square().sum(), (query, documents))))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted)


def max_sim_of(query, documents, query_mask, document_mask):
    return max_sim(query, documents, query_mask, document_mask).unsqueeze(-1)


def kernels_of(query, documents, query_mask, document_mask):
    return kernel_pooling(query, documents, query_mask, document_mask, MU, SIGMA, SCALE)


def random_tokens(n: int) -> tuple[torch.Tensor, ...]:
    """Vectors and masks of 2 queries of 3 tokens, and of n documents each of 5 tokens."""
    generator = torch.Generator().manual_seed(n)
    query, documents = torch.randn(2, 3, 4, generator=generator), torch.randn(2, n, 5, 4, generator=generator)
    masks = torch.rand(2, 3, generator=generator) < 0.7, torch.rand(2, n, 5, generator=generator) < 0.7
    return query, documents, *masks


@pytest.mark.parametrize("function", [max_sim_of, kernels_of])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_n_documents_of_tokens_score_as_one_by_one(function, n):
    query, documents, query_mask, document_mask = random_tokens(n)
    got = function(query, documents, query_mask, document_mask)
    assert got.shape[:2] == (2, n)
    wanted = [function(query, documents[:, i], query_mask, document_mask[:, i]) for i in range(n)]
    torch.testing.assert_close(got, torch.stack(wanted, 1))


@pytest.mark.parametrize("chunk", [1, 2 * 3 * 5, 2 * 2 * 3 * 5 + 1])
def test_max_sim_in_chunks_is_the_same_and_no_chunk_is_larger(monkeypatch, chunk):
    query, documents, *masks = random_tokens(7)
    wanted, sizes, products = max_sim(query, documents, *masks), [], scoring._products

    def recorded(query, documents):
        result = products(query, documents)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(scoring, "_products", recorded)
    monkeypatch.setitem(scoring.BLOCK_SIZE, "cpu", chunk)
    torch.testing.assert_close(max_sim(query, documents, *masks), wanted)
    assert sum(sizes) == 2 * 3 * 7 * 5
    assert max(sizes) == {1: 30, 30: 30, 61: 60}[chunk]  # one document per query at least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_token_vectors_score_in_float32(dtype):
    query, document = torch.tensor([[[8.0, 0.125]]], dtype=dtype), torch.tensor([[[12.5, 1.0]]], dtype=dtype)
    scores = max_sim(query, document)
    assert (scores.dtype, scores.item()) == (torch.float32, 100.125)  # bfloat16: none between 100 and 100.5
    halves = [tensor.to(dtype) for tensor in random_tokens(2)[:2]]
    pooled = kernels_of(*halves, *random_tokens(2)[2:])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, kernels_of(*(half.float() for half in halves), *random_tokens(2)[2:]))


@pytest.mark.parametrize("function", [max_sim_of, kernels_of])
def test_token_scores_are_the_same_under_autocast(function):
    wanted = function(*random_tokens(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*random_tokens(3))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def peak_memory(function: Callable, trace: Path) -> float:
    """Most memory held at once by tensors that a function makes, in MiB."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.inference_mode(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events)) / 2**20


def test_a_thousand_documents_need_little_memory(tmp_path):
    query, documents = torch.randn(4, 38, 16), torch.randn(4, 1000, 200, 16)
    masks, kernels = (torch.ones(4, 38), torch.ones(4, 1000, 200)), (torch.linspace(-1, 1, 11), *torch.ones(2, 11))
    # The pairs of tokens take 116 MiB in float32, a block of them 4, and a kernel of a block as much again.
    needed = peak_memory(lambda: max_sim(query, documents, *masks), tmp_path / "trace.json")
    assert 4 < needed < 16
    # The vectors take 12 MiB, those of unit length as much again.
    one = [tensor[:1] for tensor in (query, documents, *masks)]
    needed = peak_memory(lambda: kernel_pooling(*one, *kernels), tmp_path / "trace.json")
    assert 12 < needed < 40


WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night what is a the of".split()


@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision_has_few_ties(model, tokenizer, is_autocast):
    """In bfloat16 a last layer gave some 200 different scores to 1,000 documents."""
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(4, 14))) for _ in range(1000)]
    ranker = kd.Ranker(model if is_autocast else model.to(torch.bfloat16), tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        scores = ranker.score("what is bread", documents)
    assert len(set(documents)) == 1000
    assert len(set(scores.tolist())) > 950
