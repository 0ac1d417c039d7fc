"""Checkpoints that are damaged, incomplete, unsafe or another architecture's are refused with one clear line."""

from pathlib import Path

import pytest
import torch
from published_checkpoints import LOADERS, PLAIN, PUBLISHED, change_weights, loaders_of, refused
from transformers import AutoModel

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoint"


# ---- Heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name].head])
def test_published_checkpoint_without_its_head_is_refused(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    change_weights(folder, dict.fromkeys(published.head))
    message = (
        rf"is not a complete {published.cls.__name__} checkpoint \(missing keys: {', '.join(sorted(published.head))}\)"
    )
    for loader in loaders_of(name):
        with refused(ValueError, message):
            LOADERS[loader](published, folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_head_of_another_architecture_is_refused(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    head = "compressor.weight" if "compressor.weight" not in published.head else "_classification_layer.weight"
    change_weights(folder, {head: torch.zeros(1, 16)})
    with refused(ValueError, rf"unexpected keys: {head}\)"):
        published.cls.from_pretrained(folder, **published.overrides)
    message = rf"is a ranker and not a plain encoder \({head}\)" if name in PLAIN else rf"unexpected keys: {head}\)"
    with refused(ValueError, message):
        published.load(folder)


# ---- Another architecture's checkpoint ------------------------------------------------------------------------------


def test_no_class_loads_a_saved_checkpoint_of_another(model, tmp_path):
    model.save_pretrained(tmp_path)
    found = model.config.model_type
    for name, other in ARCHITECTURES.items():
        if other is type(model):
            assert type(other.from_pretrained(tmp_path)) is type(kd.load_ranker(tmp_path, name)) is other
            continue
        with refused(ValueError, rf"is a {found} checkpoint, not {other.config_class.model_type}: load"):
            other.from_pretrained(tmp_path)
        with refused(ValueError, rf"is a {found} checkpoint, not '{name}'; leave the arch"):
            kd.load_ranker(tmp_path, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_class_loads_a_published_checkpoint_of_another(name, folder):
    published = PUBLISHED[name]
    published.write(folder)
    for other in ARCHITECTURES.values():
        if other is not published.cls:
            with refused(ValueError, r"is a \w+ checkpoint, not|is not a complete \w+ checkpoint"):
                other.from_pretrained(
                    folder, **({"max_document_length": 200} if issubclass(other, kd.TK) else published.overrides)
                )


@pytest.mark.parametrize("name", ["bert_cat", "colbert", "prettr"])
def test_load_ranker_refuses_another_architecture(name, folder):
    PUBLISHED[name].write(folder)
    found = PUBLISHED[name].cls.config_class.model_type
    for architecture in ARCHITECTURES.keys() - {name}:
        with refused(ValueError, rf"is a {found} checkpoint, not '{architecture}'; leave the arch"):
            kd.load_ranker(folder, architecture, **PUBLISHED[name].overrides)


def test_no_ranker_is_built_on_a_ranker(encoder_model, tmp_path):
    encoder_model.save_pretrained(tmp_path)
    for cls in (kd.BertCat, kd.BertDot, kd.ColBERT, kd.PreTTR):
        with refused(ValueError, r"is a ranker and not a plain encoder \(\w+\): load_ranker"):
            cls.from_encoder(str(tmp_path))


# ---- Broken folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [None, *ARCHITECTURES])
def test_empty_folder_is_refused(architecture, tmp_path):
    with refused(FileNotFoundError, r"is not a model folder: it has no config\.json"):
        kd.load_ranker(tmp_path, architecture)
    if architecture is not None:
        with refused(FileNotFoundError, r"^No model .*no file named model.safetensors"):
            ARCHITECTURES[architecture].from_pretrained(tmp_path)


def test_folder_with_a_config_only_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    for load in (kd.load_ranker, type(model).from_pretrained, AutoModel.from_pretrained):
        with refused(FileNotFoundError, r"^No model .*no file named model.safetensors"):
            load(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_that_are_not_finite_are_refused(name, folder):
    published = PUBLISHED[name]
    weights = published.write(folder)
    key = "embeddings.word_embeddings.weight"
    table = weights[f"bert_model.{key}"].clone()
    table[7, 3] = torch.nan
    change_weights(folder, {published.prefix + key: table})
    for loader in loaders_of(name):
        with refused(ValueError, rf"weights of (bert_model\.)?{key} are not finite; .*damaged"):
            LOADERS[loader](published, folder)


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pickled_code_in_a_checkpoint_is_not_run(name, folder, tmp_path):
    published, path = PUBLISHED[name], tmp_path / "executed"
    published.write(folder)
    change_weights(folder, {"payload": Payload(path)})
    for loader in loaders_of(name):
        with refused(ValueError, "^The weights of .* are pickled together with code, which is not run"):
            LOADERS[loader](published, folder)
    assert not path.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert path.exists(), "the payload is harmless, the test could not fail"


def test_pickled_code_in_a_training_folder_is_not_run(tmp_path):
    folder, path = tmp_path / "run", tmp_path / "executed"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: TK\n")
    torch.save({"payload": Payload(path)}, folder / "best-model.pytorch-state-dict")
    with refused(ValueError, "^The weights of .* are pickled together with code, which is not run"):
        kd.load_ranker(folder)
    assert not path.exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_without_a_vocabulary_is_refused(name, folder):
    PUBLISHED[name].write(folder)
    for file in ("vocab.txt", "tokenizer_config.json"):
        (folder / file).unlink()
    settings = PUBLISHED[name].overrides | {"architecture": PUBLISHED[name].architecture}
    with refused(FileNotFoundError, r"^No tokenizer in .*save the one that the model was trained"):
        kd.Ranker.from_pretrained(folder, device="cpu", **settings)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("architecture", ["bert_cat", "bert_dot", "colbert", "prettr", "tk"])
def test_encoder_folder_without_weights_is_refused(name, architecture, folder):
    PUBLISHED[name].write(folder)
    (folder / "pytorch_model.bin").unlink()
    with refused(FileNotFoundError, r"no file named model\.safetensors"):
        kd.load_ranker(folder, architecture)


def test_embeddings_that_are_not_finite_are_refused(folder):
    weights = PUBLISHED["bert_dot"].write(folder)
    table = weights["bert_model.embeddings.word_embeddings.weight"].clone()
    table[7, 3] = torch.nan
    change_weights(folder, {"embeddings.word_embeddings.weight": table})
    with refused(ValueError, "not finite"):
        kd.TK.from_encoder(folder)
