"""TKL: scores by hand, an implementation with loops over one pair at a time, and documents of any length."""

import math

import pytest
import torch

import hf_kd_ranking as kd

SIZES = {"vocab_size": 50, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}


def side(rows: list[list[int]], width: int = 0) -> dict[str, torch.Tensor]:
    width = max(width, *map(len, rows))
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])  # padding is a word that nothing attends to
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def score(model: kd.TKL, query: dict, document: dict) -> torch.Tensor:
    return model(query=query, document=document).scores


def make_model(**config) -> kd.TKL:
    """A model with random values in all layers, which fresh layers have not: their saturation is nearly the same."""
    torch.manual_seed(3)
    model = kd.TKL(kd.TKLConfig(**(SIZES | config))).eval()
    with torch.no_grad():
        model.mixer.fill_(0.3)
        model.saturation.weight.normal_(0, 0.1)
        model.saturation.bias.copy_(torch.tensor([2.0, 3.0, 1.0]))
        model.region_weights.uniform_(0.2, 1.5)
        model.kernel_bin_weights.weight.normal_()
    return model


# ---- By hand --------------------------------------------------------------------------------------------------------


def test_score_is_the_weighted_sum_of_the_best_regions():
    config = {"vocab_size": 10, "hidden_size": 2, "num_attention_heads": 1, "kernel_mu": [1.0], "kernel_sigma": [0.1]}
    regions = {"region_size": 2, "region_step": 1, "region_count": 2, "region_neighbors": 1}
    model = kd.TKL(kd.TKLConfig(**config, **regions)).eval()
    with torch.no_grad():
        model.word_embeddings.weight[2:4] = torch.eye(2)
        model.word_embeddings.weight[9] = torch.tensor([1.0, 0.0])  # padding would match
        model.mixer.fill_(1.0)  # words as they are
        model.salience.weight.zero_()
        model.saturation.weight.copy_(torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]]))
        model.saturation.bias.copy_(torch.tensor([2.0, 2.0, 1.0]))  # (2 + length / 2) sqrt(x) - 1
        model.kernel_bin_weights.weight.fill_(1.0)
        model.region_weights.copy_(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]))
    # Word 2 is in the query. Its counts in the regions of "2 2 3 3 2" are 2, 1, 0, 1 and, in the last token, 1.
    first, second, third, fourth, fifth = 3 * math.sqrt(2) - 1, 2.0, -1.0, 2.0, 1.5
    # The first is the best, and its own left neighbour. Without a token in common the fourth is the best.
    wanted = (1 + 2) * first + 4 * second + 8 * third + 16 * fourth + 32 * fifth
    assert wanted == pytest.approx(9 * math.sqrt(2) + 77)
    document = [2, 2, 3, 3, 2]
    for width in (5, 6, 90):
        assert score(model, side([[2]]), side([document], width)).item() == pytest.approx(wanted, abs=1e-3)
    # One region of one token is all that there is: it has three places, and no region is left for the others.
    assert score(model, side([[2]]), side([[2]], 9)).item() == pytest.approx((1 + 2 + 4) * fifth, abs=1e-3)
    # Twice the query doubles every score; a query without words has none.
    assert score(model, side([[2, 2]]), side([document])).item() == pytest.approx(2 * wanted, abs=1e-3)
    assert score(model, {"input_ids": torch.tensor([[0]])}, side([document])).item() == 0
    assert score(model, side([[2]]), {"input_ids": torch.tensor([[0, 0]])}).item() == 0


# ---- One pair at a time, with loops ---------------------------------------------------------------------------------


def read_words(model: kd.TKL, ids: list[int], positions: torch.Tensor) -> torch.Tensor:
    """Vectors of some tokens that the layers read together, (L, H)."""
    states = model.word_embeddings.weight[ids] + positions
    return model.contextualizer(states.unsqueeze(1)).squeeze(1)


def read_document(model: kd.TKL, ids: list[int]) -> torch.Tensor:
    config, vectors = model.config, []
    for start in range(0, len(ids), config.chunk_size):
        end = min(start + config.chunk_size, len(ids))
        first, last = max(start - config.chunk_overlap, 0), min(end + config.chunk_overlap, len(ids))
        place = config.chunk_overlap - (start - first)  # of the first token within the chunk
        states = read_words(model, ids[first:last], model.positional_features_d[0, place : place + last - first])
        vectors.append(states[start - first : end - first])
    return torch.cat(vectors)


def saturate(model: kd.TKL, count: float, salience: float, length: int) -> float:
    features = torch.tensor([salience, float(length)])
    factor, root, shift = (model.saturation.weight @ features + model.saturation.bias).tolist()
    return factor * max(count, 1e-10) ** (1 / max(root, 1)) - shift


def score_one(model: kd.TKL, query: list[int], document: list[int]) -> float:
    config, mixer = model.config, model.mixer.item()
    weights = model.kernel_bin_weights.weight[0].tolist()
    contextual = read_words(model, query, model.positional_features_q[0, : len(query)]), read_document(model, document)
    words = model.word_embeddings.weight[query], model.word_embeddings.weight[document]
    queries, documents = (mixer * plain + (1 - mixer) * read for plain, read in zip(words, contextual, strict=True))
    saliences = [float(model.salience.weight[0] @ vector) for vector in queries]
    cosines = torch.nn.functional.cosine_similarity(queries.unsqueeze(1), documents.unsqueeze(0), dim=-1).tolist()
    scores = []
    for start in range(0, len(document), config.region_step):
        end, total = min(start + config.region_size, len(document)), 0.0
        for row, salience in zip(cosines, saliences, strict=True):
            kernels = zip(config.kernel_mu, config.kernel_sigma, weights, strict=True)
            for centre, width, weight in kernels:
                count = sum(math.exp(-((cosine - centre) ** 2) / (2 * width**2)) for cosine in row[start:end])
                total += weight * saturate(model, count, salience, end - start)
        scores.append(total)
    found, free = 0.0, list(range(len(scores)))
    for rank in range(config.region_count):
        if not free:
            break
        best = max(free, key=lambda region: scores[region])
        for place in range(-config.region_neighbors, config.region_neighbors + 1):
            neighbor = min(max(best + place, 0), len(scores) - 1)
            found += model.region_weights[rank, place + config.region_neighbors].item() * scores[neighbor]
        free = [region for region in free if abs(region - best) * config.region_step >= config.region_size]
    return found


SETTINGS = {
    "of the paper": {},
    "other sizes": {
        "chunk_size": 7,
        "chunk_overlap": 3,
        "region_size": 5,
        "region_step": 3,
        "region_count": 4,
        "region_neighbors": 1,
        "has_document_positions": False,
    },
    "no overlap, no neighbors": {"chunk_overlap": 0, "region_neighbors": 0, "region_step": 1, "region_count": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_scores_equal_loops_over_one_pair_at_a_time(settings):
    model, generator = make_model(**settings), torch.Generator().manual_seed(0)
    queries = [torch.randint(2, 50, (length,), generator=generator).tolist() for length in (5, 1, 3)]
    documents = []
    for lengths in ((1, 29, 41), (40, 96, 30), (250, 2, 81)):  # as chunks and regions end, and between
        documents.append([torch.randint(2, 50, (length,), generator=generator).tolist() for length in lengths])
    with torch.no_grad():
        wanted = []
        for query, texts in zip(queries, documents, strict=True):
            wanted.append([score_one(model, query, document) for document in texts])
    flat = side([document for texts in documents for document in texts], width=300)
    batch = {name: tensor.view(3, 3, -1) for name, tensor in flat.items()}
    scores, wanted = score(model, side(queries), batch), torch.tensor(wanted)
    assert wanted.std() > 1, "scores too alike to tell a change"
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_score_does_not_depend_on_the_width_of_the_batch():
    model, document = make_model(), list(range(2, 45))
    wanted = score(model, side([[5, 7, 11]]), side([document])).item()
    for width in (44, 80, 81, 500):
        found = score(model, side([[5, 7, 11]], 9), side([document], width)).item()
        assert found == pytest.approx(wanted, rel=1e-5)


def test_relevant_words_count_wherever_they_are_in_a_document():
    model = make_model(num_hidden_layers=1)
    model.mixer.data.fill_(1.0)  # cosines of words do not depend on their place
    filler, found = [2] * 1_200, []
    for place in (600, 1_100):
        document = [*filler]
        document[place : place + 3] = [7, 8, 9]
        found.append(score(model, side([[7, 8, 9]]), side([document])).item())
    plain = score(model, side([[7, 8, 9]]), side([filler])).item()
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert abs(found[0] - plain) > 0.1


# ---- Fresh models and settings --------------------------------------------------------------------------------------


def test_root_of_the_saturation_is_at_least_1():
    model, scores = make_model(), []
    query, document = side([[3, 4]]), side([[3, 5, 4, 6, 3]])
    with torch.no_grad():
        model.saturation.weight.zero_()
        for root in (1.0, 0.25, 0.0, -2.0, 2.0):
            model.saturation.bias[1] = root
            scores.append(score(model, query, document).item())
    assert scores[1:4] == [scores[0]] * 3 and scores[4] != scores[0]


def test_fresh_saturation_is_nearly_a_logarithm(encoder):
    model = kd.TKL.from_encoder(encoder)
    assert (model.saturation.bias == 100).all() and 0 < model.saturation.weight.abs().max() <= 0.014
    assert saturate(model, 20.0, 0.0, 0) == pytest.approx(math.log(20), rel=0.02)
    assert 0 < model.kernel_bin_weights.weight.abs().max() <= 0.014
    config = model.config
    assert (config.max_document_length, config.max_position_embeddings) == (2_000, 2_000)
    assert model.positional_features_d.shape[1] == 40 + 2 * 5


def test_documents_shorter_than_a_chunk_are_read(encoder, tokenizer):
    model = kd.TKL.from_encoder(encoder, max_query_length=8, max_document_length=16)
    assert kd.Ranker(model, tokenizer).score("moon", ["moon and king", ""])[1] == 0


def test_texts_without_words_score_zero(encoder, tokenizer, tmp_path):
    ranker = kd.Ranker(kd.TKL.from_encoder(encoder, max_query_length=8, max_document_length=60), tokenizer)
    documents = ["moon and king", "", "river " * 50]
    assert ranker.score("", documents).tolist() == [0, 0, 0]  # a batch of queries without a token
    assert ranker.score("moon", ["", ""]).tolist() == [0, 0]
    (tmp_path / "texts.tsv").write_text("a\t \nb\tmoon\n")
    store = kd.VectorStore.build(ranker, kd.TextStore.from_tsv(tmp_path / "texts.tsv"), tmp_path / "vectors")
    run = kd.StoredReranker(store).rerank({"q": [("a", 1.0), ("b", 0.0)]}, {"q": ""})
    assert [score for _, score in run["q"]] == [0, 0]
    assert kd.StoredReranker(store).rerank({"q": [("a", 1.0)]}, {"q": "moon"})["q"] == [("a", 0)]


def test_head_parameters_are_all_after_the_token_vectors(encoder):
    model = kd.TKL.from_encoder(encoder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in model.head_parameters()} == {
        "region_weights", "salience.weight", "saturation.weight", "saturation.bias", "kernel_bin_weights.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"chunk_overlap": -1}, "chunk_overlap must be at least 0, got -1"),
        ({"region_count": 0}, "region_count must be at least 1, got 0"),
        ({"region_size": 2, "region_step": 3}, "region_size must be at least region_step, .* got 2 and 3"),
        ({"max_document_length": 2_001}, r"max_document_length is 2001 tokens.*for 2000"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        kd.TKLConfig(**config)


def test_scores_without_masks_are_refused():
    vectors = torch.zeros(1, 2, 12)
    with pytest.raises(ValueError, match="TKL scores need the masks of both sides"):
        make_model().score_vectors(vectors, vectors)


def test_a_tk_checkpoint_is_no_tkl(encoder, tmp_path):
    kd.TK.from_encoder(encoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a TK checkpoint, not TKL"):
        kd.TKL.from_pretrained(tmp_path)
