"""Every ranker on every kind of encoder: built on its weights, trained a step, saved, loaded, with the same scores."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    XLMRobertaConfig,
)

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.models import ARCHITECTURES, RankerModel

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 42,  # what RoBERTa needs for 40 tokens
    "initializer_range": 0.3,  # far from zero, so that scores differ by more than rounding
    "pad_token_id": 0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
}
SPECIAL_IDS = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
BACKBONES: dict[str, PreTrainedConfig] = {
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=42,
        initializer_range=0.3,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": XLMRobertaConfig(**SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    "minilm": BertConfig(**SIZES | {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 3}),
    "electra": ElectraConfig(**SIZES, embedding_size=8),
    "albert": AlbertConfig(**SIZES, embedding_size=8),
    "modernbert": ModernBertConfig(**SIZES, **SPECIAL_IDS, global_attn_every_n_layers=2, local_attention=4),
}
CAN_BE_SPLIT = ["distilbert", "bert", "roberta", "xlm-roberta", "minilm"]
ENCODER_RANKERS = {
    "bert_cat": {},
    "bert_dot": {},
    "colbert": {"compression_dim": 6, "query_augmentation": 2},
    "prettr": {"join_layer_idx": 1, "query_augmentation": 2},
}
LENGTHS = {"max_query_length": 6, "max_document_length": 12}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """A folder of random encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    for seed, (name, config) in enumerate(BACKBONES.items()):
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder / name)
    return folder


def build(folder: Path, architecture: str) -> RankerModel:
    torch.manual_seed(1)
    if architecture == "tk":
        return kd.TK.from_encoder(folder, **LENGTHS, num_hidden_layers=1, intermediate_size=32)
    return kd.load_ranker(folder, architecture, **LENGTHS, initializer_range=0.3, **ENCODER_RANKERS[architecture])


def side(generator: torch.Generator, *shape: int) -> dict[str, torch.Tensor]:
    """Random ids and masks, the first two tokens attended."""
    lengths = torch.randint(2, shape[-1] + 1, shape[:-1], generator=generator).unsqueeze(-1)
    return {
        "input_ids": torch.randint(3, VOCABULARY, shape, generator=generator),
        "attention_mask": (torch.arange(shape[-1]) < lengths).long(),
    }


def random_batch(architecture: str) -> dict:
    """Three queries of two documents each."""
    generator = torch.Generator().manual_seed(2)
    if architecture == "bert_cat":
        return side(generator, 3, 2, 18)
    return {"query": side(generator, 3, 8), "document": side(generator, 3, 2, 12)}


@torch.no_grad()
def scores_of(model: RankerModel, batch: dict) -> torch.Tensor:
    return model.eval()(**batch).scores


PAIRS = [
    (backbone, architecture)
    for backbone in BACKBONES
    for architecture in [*ENCODER_RANKERS, "tk"]
    if architecture != "prettr" or backbone in CAN_BE_SPLIT
]


@pytest.mark.parametrize(("backbone", "architecture"), PAIRS)
def test_ranker_is_built_trained_saved_and_loaded(encoders, tmp_path, backbone, architecture):
    model, batch = build(encoders / backbone, architecture), random_batch(architecture)
    fresh = scores_of(model, batch)
    assert fresh.shape == (3, 2)
    assert fresh.isfinite().all()
    assert fresh.std() > 0.01, "scores too alike to tell a change"

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    teacher = torch.tensor([[3.0, 1.0], [-2.0, 0.0], [5.0, -5.0]])
    loss = kd.losses.margin_mse(model(**batch).scores, teacher)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    trained = scores_of(model, batch)
    assert (trained - fresh).abs().min() > 1e-4

    model.save_pretrained(tmp_path)
    again = kd.load_ranker(tmp_path)
    assert type(again) is type(model)
    assert torch.allclose(scores_of(again, batch), trained, atol=1e-5)


@pytest.mark.parametrize(("backbone", "architecture"), [(backbone, name) for backbone, name in PAIRS if name != "tk"])
def test_eager_and_sdpa_attention_agree(encoders, tmp_path, backbone, architecture):
    build(encoders / backbone, architecture).save_pretrained(tmp_path)
    batch, scores = random_batch(architecture), {}
    for attention in ("eager", "sdpa"):
        model = kd.load_ranker(tmp_path, attn_implementation=attention)
        assert model.bert_model.config._attn_implementation == attention
        scores[attention] = scores_of(model, batch)
    assert torch.allclose(scores["eager"], scores["sdpa"], atol=1e-5)


@pytest.mark.parametrize(("backbone", "architecture"), PAIRS)
def test_unattended_tokens_do_not_matter(encoders, backbone, architecture):
    model, batch = build(encoders / backbone, architecture), random_batch(architecture)
    wanted = scores_of(model, batch)

    def other_words(inputs: dict) -> dict:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        assert not mask.all()
        return inputs | {"input_ids": torch.where(mask, ids, 3 + (ids + 1) % (VOCABULARY - 3))}

    changed = other_words(batch) if architecture == "bert_cat" else {key: other_words(batch[key]) for key in batch}
    assert torch.allclose(scores_of(model, changed), wanted, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ranker_of_some_layers_is_saved_and_loaded(encoders, tmp_path, backbone):
    if backbone == "albert":
        pytest.skip("its layers are one")
    if backbone == "modernbert":
        with pytest.raises(
            ValueError, match=r"Layer 1 of modernbert has other weights .* keep layer 0 in its place, got \["
        ):
            kd.load_ranker(encoders / backbone, "bert_dot", layers=[1], **LENGTHS)
    layers = [0] if backbone == "modernbert" else [1]
    model, batch = kd.load_ranker(encoders / backbone, "bert_dot", layers=layers, **LENGTHS), random_batch("bert_dot")
    model.save_pretrained(tmp_path)
    assert torch.equal(scores_of(kd.load_ranker(tmp_path), batch), scores_of(model, batch))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_encoder_takes_the_saved_weights(encoders, backbone):
    wanted = AutoModel.from_pretrained(encoders / backbone).state_dict()
    weights = build(encoders / backbone, "bert_dot").bert_model.state_dict()
    assert weights.keys() == {name for name in wanted if not name.startswith("pooler.")}
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_tk_takes_the_encoders_word_embeddings(encoders, backbone):
    wanted = AutoModel.from_pretrained(encoders / backbone).get_input_embeddings().weight
    model = build(encoders / backbone, "tk")
    table = model.word_embeddings.weight
    assert torch.allclose(table, wanted * (table[5, 3] / wanted[5, 3]))  # one factor
    assert (model.config.vocab_size, model.config.hidden_size) == tuple(wanted.shape)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in CAN_BE_SPLIT])
def test_prettr_refuses_encoders_that_it_cannot_split(encoders, backbone):
    with pytest.raises(
        ValueError, match=rf"PreTTR cannot split {backbone} encoders; it can split distilbert, bert, rob"
    ):
        build(encoders / backbone, "prettr")


@pytest.mark.parametrize("backbone", ["roberta", "xlm-roberta"])
@pytest.mark.parametrize("architecture", ["bert_dot", "prettr"])
def test_positions_after_the_padding_id_are_counted(encoders, backbone, architecture):
    # 42 embeddings, of which the first two, up to the padding id, are not positions.
    model, query = build(encoders / backbone, architecture), random_batch(architecture)["query"]
    longest = 40 if architecture == "bert_dot" else 40 - 8 + 1  # after the query, without [CLS]
    ids = torch.full((3, 2, longest + 1), 5)
    document = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fits = {name: tensor[..., :longest] for name, tensor in document.items()}
    assert scores_of(model, {"query": query, "document": fits}).isfinite().all()
    with pytest.raises(ValueError, match="needs positions for 41 tokens, the model has 40"):
        scores_of(model, {"query": query, "document": document})


def test_mpnet_counts_positions_from_the_padding_id_too(tmp_path):
    AutoModel.from_config(MPNetConfig(**SIZES | {"pad_token_id": 1})).save_pretrained(tmp_path)
    model, ids = (
        kd.load_ranker(tmp_path, "bert_dot", max_query_length=6, max_document_length=40),
        torch.full((1, 40), 5),
    )
    assert model(document={"input_ids": ids}).document_vectors.isfinite().all()
    with pytest.raises(ValueError, match=r"max_document_length is 41 tokens, .*positions for 40"):
        kd.load_ranker(tmp_path, "bert_dot", max_document_length=41)


@pytest.mark.parametrize("architecture", ["bert_cat", "bert_dot", "prettr"])
@pytest.mark.parametrize("backbone", CAN_BE_SPLIT)
def test_first_state_only_keeps_scores_and_gradients(encoders, backbone, architecture):
    model, batch, widths = build(encoders / backbone, architecture), random_batch(architecture), []
    last = [part for name, part in model.named_modules() if name.endswith((".ffn", ".intermediate"))][-1]
    last.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    found = {}
    for is_whole in (False, True):
        if is_whole:  # activations that are recomputed need whole layers
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        scores = model(**batch).scores
        scores.sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[is_whole] = scores, gradients
        assert {width > 1 for width in widths} == {is_whole}
        widths.clear()
    assert torch.allclose(found[False][0], found[True][0], atol=1e-6)
    assert found[False][1].keys() == found[True][1].keys()
    assert all(torch.allclose(found[False][1][name], found[True][1][name], atol=1e-5) for name in found[False][1])


CAUSAL_SIZES = {"head_dim": 8, "num_key_value_heads": 1}
CAUSAL = {
    "qwen3": Qwen3Config(**SIZES | CAUSAL_SIZES),
    "llama": LlamaConfig(**SIZES | CAUSAL_SIZES),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "bert": BertConfig(**SIZES, is_decoder=True),
}


@pytest.fixture
def save(tmp_path) -> Callable[[PreTrainedConfig], Path]:
    def write(config: PreTrainedConfig) -> Path:
        AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
        return tmp_path / "encoder"

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_first_state_of_a_causal_encoder_is_refused(name, dtype, save, tmp_path):
    folder = save(CAUSAL[name])
    for architecture in ("bert_cat", "bert_dot"):
        message = rf"encoder: {name} is a causal encoder, .* or bert_dot with pooling='mean'\."
        with pytest.raises(InputError, match=message):
            kd.load_ranker(folder, architecture, dtype=dtype, **LENGTHS)
    model = kd.load_ranker(folder, "bert_dot", pooling="mean", dtype=dtype, **LENGTHS)
    assert scores_of(model, random_batch("bert_dot")).std() > 0.01
    model.save_pretrained(tmp_path / "mean")
    with pytest.raises(InputError, match="is a causal encoder"):
        kd.load_ranker(tmp_path / "mean", pooling="cls")


SEQ_TO_SEQ = {
    "t5": T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
    "bart": BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1),
}


@pytest.mark.parametrize("architecture", ENCODER_RANKERS)
@pytest.mark.parametrize("name", SEQ_TO_SEQ)
def test_encoder_decoder_is_refused(name, architecture, save):
    message = f"{name} models are encoder-decoders; rankers are built on encoders only"
    with pytest.raises(InputError, match=message):
        kd.load_ranker(save(SEQ_TO_SEQ[name]), architecture, **LENGTHS)
    with pytest.raises(InputError, match=f"{message}|PreTTR cannot split"):
        ARCHITECTURES[architecture].config_class(encoder_config=SEQ_TO_SEQ[name], **LENGTHS)


def test_encoder_of_an_encoder_decoder_is_refused(tmp_path):
    T5EncoderModel(SEQ_TO_SEQ["t5"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="t5 models are encoder-decoders"):
        kd.load_ranker(tmp_path, "bert_dot", **LENGTHS)
