"""The measurements of `gpu.py`: a section yields the name and the function of each of its cases."""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from gpu_peers import PEERS, load_peer, peer_batches, peer_step, to_device
from gpu_setup import ARCHITECTURES, Bench, batch_tokens, forward_flops, peak_flops
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import hf_kd_ranking as kd
from hf_kd_ranking.data.collate import RankingCollator, split_batch
from hf_kd_ranking.models import RankerModel, RankingProcessor

Cases = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
VECTOR_SIZE = 128  # of a token, where all vectors are fetched from the device; also sentence-transformers' default
QUERY_TOKENS, DOCUMENT_TOKENS = 38, 200  # the longest, for scores of all pairs of a batch
# The largest relative errors of scores, and the smallest cosine of all gradients, against the CPU in float32.
TOLERANCES = {"float32": (1e-3, 0.9999), "bfloat16": (5e-2, 0.98)}


def equality(bench: Bench) -> Cases:
    """Compare scores and gradients with those of the CPU in float32, without dropout."""
    folder = next(iter(bench.encoders.values()))
    for architecture in ARCHITECTURES:
        yield architecture, partial(compare_with_cpu, bench, folder, architecture)


def compare_with_cpu(bench: Bench, folder: Path, architecture: str) -> dict[str, Any]:
    """Return the largest error of a score, relative to the largest score, and the cosine of the gradients."""
    model = load(folder, architecture)
    batch = collator(bench, folder, model)(bench.rows[:8])
    expected, expected_gradient = scores_and_gradient(model, batch)
    model = copy.deepcopy(model).to(bench.device)
    batch = to_device(batch, bench.device)
    result = {"is_equal": True}
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(bench, dtype):
            scores, gradient = scores_and_gradient(model, batch)
        error = float((scores - expected).abs().max() / expected.abs().max())
        cosine = float(nn.functional.cosine_similarity(gradient, expected_gradient, dim=0))
        name = str(dtype).removeprefix("torch.")
        largest_error, smallest_cosine = TOLERANCES[name]
        result["is_equal"] &= error <= largest_error and cosine >= smallest_cosine
        result[f"{name}_error"], result[f"{name}_gradient_cosine"] = error, cosine
    return result


def scores_and_gradient(model: RankerModel, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the scores, and the gradient of their mean as one vector in float64, both on the CPU.

    Not the gradient of a margin: with random weights it is the small difference of two nearly equal gradients.
    """
    model.zero_grad(set_to_none=True)
    features, _ = split_batch(batch)
    scores = model(**features).scores
    scores.mean().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return scores.detach().cpu(), torch.cat(gradients).double().cpu()


# ---- Training -------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> Cases:
    """Measure training steps on batches that are on the device: ours, and sentence-transformers' beside."""
    for pairs, (name, folder) in product(bench.sizes.pairs, reversed(bench.encoders.items())):
        for architecture in ARCHITECTURES:
            case = (bench, folder, architecture, pairs)
            yield f"{name} {architecture} {pairs}", partial(train_ours, *case)
            if architecture in PEERS:
                yield f"{name} {architecture} {pairs} peer", partial(train_peer, *case)


def train_ours(bench: Bench, folder: Path, architecture: str, pairs: int) -> dict[str, Any]:
    """Return rates, utilisation and memory of training steps of a ranker."""
    model = load(folder, architecture).to(bench.device).train()
    collate = collator(bench, folder, model)
    batches = []
    for start in range(0, bench.sizes.batch_count(pairs) * pairs, pairs):
        batches.append(collate(bench.rows[start : start + pairs]))
    features = [split_batch(batch)[0] for batch in batches]
    tokens = fmean(batch_tokens(batch) for batch in features)
    flops = 3 * fmean(forward_flops(model, batch) for batch in features)
    batches = [to_device(batch, bench.device) for batch in batches]
    result = measure_training(bench, model, batches, lambda batch: ranking_loss(model, batch))
    seconds = result["ms_per_step"] / 1000
    result |= {"triples_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
    result["model_tflops_per_second"] = flops / seconds / 1e12
    peak = peak_flops(bench.device)
    if peak is not None:
        result["utilisation"] = flops / seconds / peak
    return result


def train_peer(bench: Bench, folder: Path, architecture: str, pairs: int) -> dict[str, Any]:
    """Return the rate and memory of the same training with sentence-transformers."""
    model = load_peer(folder, architecture, bench).train()
    batches = list(peer_batches(model, architecture, bench, pairs))
    result = measure_training(bench, model, batches, peer_step(model, architecture))
    return result | {"triples_per_second": pairs / result["ms_per_step"] * 1000}


def measure_training(bench: Bench, model: nn.Module, batches: list, loss: Callable[[Any], Tensor]) -> dict[str, float]:
    """Time steps with AdamW under bfloat16 autocast on float32 weights, after one round to warm up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train() -> None:
        for batch in batches:
            with autocast(bench, torch.bfloat16):
                value = loss(batch)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    times = repeated(bench, train)
    figures = {"ms_per_step": 1000 * median(times) / len(batches), "spread": (max(times) - min(times)) / median(times)}
    return figures | memory(bench)


def ranking_loss(model: RankerModel, batch: dict[str, Any]) -> Tensor:
    """Return Margin-MSE of a batch of the collator."""
    features, targets = split_batch(batch)
    return kd.losses.margin_mse(model(**features).scores, targets["teacher_scores"])


def trainer(bench: Bench) -> Cases:
    """Measure `RankingTrainer` with the dataloader, where its requirements are installed."""
    pairs = bench.sizes.pairs[0]
    for name, folder in reversed(bench.encoders.items()):
        yield f"{name} bert_dot {pairs}", partial(run_trainer, bench, folder, pairs)


def run_trainer(bench: Bench, folder: Path, pairs: int) -> dict[str, float]:
    """Return the rate of all steps of `RankingTrainer` but the first."""
    import datasets
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(now(bench))

    workers = max(bench.sizes.workers)
    arguments = kd.RankingTrainingArguments(
        str(bench.scratch / "trainer"),
        per_device_train_batch_size=pairs,
        bf16=True,
        use_cpu=bench.device.type == "cpu",
        dataloader_num_workers=workers,
        max_steps=2 * bench.sizes.batches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        overwrite=True,
    )
    clock = Clock()
    kd.RankingTrainer(
        load(folder, "bert_dot"),
        arguments,
        train_dataset=datasets.Dataset.from_list(bench.rows),
        queries=bench.queries,
        documents=bench.documents,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[clock],
    ).train()
    steps = len(clock.times) - 1
    return {"triples_per_second": pairs * steps / (clock.times[-1] - clock.times[0]), "workers": workers}


# ---- Losses over the batch ------------------------------------------------------------------------------------------


def in_batch(bench: Bench) -> Cases:
    """Measure scores of all pairs of a batch, forward and backward, of token vectors in bfloat16."""
    folder = list(bench.encoders.values())[-1]
    for architecture in ("colbert", "bert_dot", "tk"):
        yield architecture, partial(score_all_pairs, bench, folder, architecture)


def score_all_pairs(bench: Bench, folder: Path, architecture: str) -> dict[str, float]:
    """Return time and memory of the scores of B queries with 2 * B documents; vectors included."""
    model, count = load(folder, architecture).to(bench.device), bench.sizes.in_batch
    size = model.config.get_text_config().hidden_size
    query_shape, document_shape = (count, size), (2 * count, size)
    masks = []
    if model.config.vectors_per_text == "per_token":
        query_shape, document_shape = (count, QUERY_TOKENS, size), (2 * count, DOCUMENT_TOKENS, size)
        for shape in (query_shape, document_shape):
            masks.append(torch.ones(shape[:2], dtype=torch.bool, device=bench.device))
    settings = {"device": bench.device, "dtype": torch.bfloat16, "requires_grad": True}
    query, document = torch.randn(query_shape, **settings), torch.randn(document_shape, **settings)
    teacher = torch.randn(count, 2 * count, device=bench.device)
    loss = kd.losses.get_loss("in_batch_margin_mse").function

    def run() -> None:
        loss(model.score_all_pairs(query, document, *masks), teacher).backward()
        query.grad = document.grad = None

    times = repeated(bench, run)
    return {"ms": 1000 * median(times), "queries": count, "documents": 2 * count, "size": size} | memory(bench)


# ---- Scoring and encoding -------------------------------------------------------------------------------------------


def scoring(bench: Bench) -> Cases:
    """Measure pairs per second from texts to scores, with bfloat16 weights."""
    for name, folder in reversed(bench.encoders.items()):
        for architecture in ARCHITECTURES:
            case = (bench, folder, architecture)
            yield f"{name} {architecture}", partial(score_ours, *case)
        yield f"{name} bert_cat peer", partial(score_peer, bench, folder)


def pairs_to_score(bench: Bench) -> tuple[list[str], list[str]]:
    """Return queries and passages, 64 passages per query."""
    count, texts = bench.sizes.scored, bench.texts
    queries = [texts["queries"][place // 64 % len(texts["queries"])] for place in range(count)]
    return queries, [texts["passages"][place % len(texts["passages"])] for place in range(count)]


def score_ours(bench: Bench, folder: Path, architecture: str) -> dict[str, float]:
    """Return the rate of `Ranker.score`."""
    ranker = make_ranker(bench, folder, architecture)
    pairs = pairs_to_score(bench)
    return rate(bench, "pairs_per_second", len(pairs[0]), lambda: ranker.score(*pairs))


def score_peer(bench: Bench, folder: Path) -> dict[str, float]:
    """Return the rate of sentence-transformers' CrossEncoder."""
    model = load_peer(folder, "bert_cat", bench, torch.bfloat16)
    pairs = list(zip(*pairs_to_score(bench), strict=True))
    settings = {"batch_size": bench.sizes.scoring_batch, "show_progress_bar": False}
    return rate(bench, "pairs_per_second", len(pairs), lambda: model.predict(pairs, **settings))


def encoding(bench: Bench) -> Cases:
    """Measure passages per second from texts to vectors on the CPU, with bfloat16 weights."""
    for name, folder in reversed(bench.encoders.items()):
        for architecture in ("bert_dot", "colbert", "prettr", "tk"):
            case = (bench, folder, architecture)
            yield f"{name} {architecture}", partial(encode_ours, *case)
            if architecture in PEERS:
                yield f"{name} {architecture} peer", partial(encode_peer, *case)


def encode_ours(bench: Bench, folder: Path, architecture: str) -> dict[str, float]:
    """Return the rate of `Ranker.encode_documents`; a token has `VECTOR_SIZE` numbers."""
    ranker = make_ranker(bench, folder, architecture, is_compressed=architecture in ("colbert", "prettr"))
    passages = bench.texts["passages"]
    return rate(bench, "passages_per_second", len(passages), lambda: ranker.encode_documents(passages))


def encode_peer(bench: Bench, folder: Path, architecture: str) -> dict[str, float]:
    """Return the rate of sentence-transformers' `encode_document`."""
    model, passages = load_peer(folder, architecture, bench, torch.bfloat16), bench.texts["passages"]
    settings = {"batch_size": bench.sizes.scoring_batch, "show_progress_bar": False}
    return rate(bench, "passages_per_second", len(passages), lambda: model.encode_document(passages, **settings))


def make_ranker(bench: Bench, folder: Path, architecture: str, is_compressed: bool = False) -> kd.Ranker:
    """Return a ranker with bfloat16 weights on the device."""
    model = load(folder, architecture, VECTOR_SIZE if is_compressed else None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return kd.Ranker(model.to(bench.device, torch.bfloat16), tokenizer, bench.sizes.scoring_batch)


def rate(bench: Bench, name: str, count: int, run: Callable[[], object]) -> dict[str, float]:
    """Return texts per second and the peak memory of a function."""
    times = repeated(bench, run)
    return {name: count / median(times), "spread": (max(times) - min(times)) / median(times)} | memory(bench)


# ---- Data -----------------------------------------------------------------------------------------------------------


def data(bench: Bench) -> Cases:
    """Measure the collator in dataloader workers, and the share of a training loop that waits for it."""
    name, folder = list(bench.encoders.items())[-1]
    for workers in bench.sizes.workers:
        yield f"{name} bert_dot loop, {workers} workers", partial(run_loop, bench, folder, workers)
    for architecture in ARCHITECTURES:
        for workers in bench.sizes.workers:
            case = (bench, folder, architecture, workers)
            yield f"{architecture} collator, {workers} workers", partial(run_collator, *case)


def run_loop(bench: Bench, folder: Path, workers: int) -> dict[str, float]:
    """Return the rate of a training loop over the dataloader, beside that of batches which are on the device."""
    model = load(folder, "bert_dot").to(bench.device).train()
    loader = make_loader(bench, folder, model, workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train(batches: Iterator[dict]) -> float:
        start = None
        for batch in batches:
            with autocast(bench, torch.bfloat16):
                loss = ranking_loss(model, to_device(batch, bench.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            start = start or now(bench)  # the first batch starts the workers
        return now(bench) - start

    on_device = [to_device(batch, bench.device) for batch in islice(loader, bench.sizes.loader_batches)]
    train(iter(on_device))  # every shape once
    computing, both = train(iter(on_device)), train(islice(loader, bench.sizes.loader_batches))
    count = (len(on_device) - 1) * bench.sizes.pairs[0]
    rates = {"triples_per_second": count / both, "computed_per_second": count / computing}
    return rates | {"waiting_share": max(0.0, 1 - computing / both)}


def run_collator(bench: Bench, folder: Path, architecture: str, workers: int) -> dict[str, float]:
    """Return triples per second of the dataloader alone."""
    loader = make_loader(bench, folder, load(folder, architecture), workers)
    start = None
    for _ in islice(loader, bench.sizes.loader_batches):
        start = start or time.perf_counter()
    count = (bench.sizes.loader_batches - 1) * bench.sizes.pairs[0]
    return {"triples_per_second": count / (time.perf_counter() - start)}


def make_loader(bench: Bench, folder: Path, model: RankerModel, workers: int) -> DataLoader:
    """Return a dataloader over as many rows as `loader_batches` need."""
    pairs = bench.sizes.pairs[0]
    rows = (bench.rows * bench.sizes.loader_batches)[: pairs * bench.sizes.loader_batches]
    settings = {"num_workers": workers, "pin_memory": bench.device.type == "cuda"}
    return DataLoader(rows, pairs, collate_fn=collator(bench, folder, model), **settings)


# ---- Common ---------------------------------------------------------------------------------------------------------


def load(folder: Path, architecture: str, compression_dim: int | None = None) -> RankerModel:
    """Return a fresh ranker with equal weights in every process; a PreTTR joins half of the layers."""
    torch.manual_seed(0)
    settings = {}
    if architecture == "prettr":
        settings["join_layer_idx"] = kd.load_ranker(folder, "bert_cat").config.encoder_config.num_hidden_layers // 2
    if compression_dim is not None:
        settings["compression_dim"] = compression_dim
    return kd.load_ranker(folder, architecture, **settings)


def collator(bench: Bench, folder: Path, model: RankerModel) -> RankingCollator:
    """Return the collator of a ranker."""
    processor = RankingProcessor.from_config(AutoTokenizer.from_pretrained(folder), model.config)
    return RankingCollator(processor, bench.queries, bench.documents)


def autocast(bench: Bench, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context in which a trainer computes in a dtype."""
    return torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def now(bench: Bench) -> float:
    """Return the time at which all work of the device is done."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def repeated(bench: Bench, run: Callable[[], object]) -> list[float]:
    """Return the seconds of each repetition, after one to warm up; memory is counted from here."""
    if bench.device.type == "cuda":
        gc.collect()  # the model of the case before may be in a cycle
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run()
    times = []
    for _ in range(bench.sizes.repetitions):
        start = now(bench)
        run()
        times.append(now(bench) - start)
    return times


def memory(bench: Bench) -> dict[str, float]:
    """Return the device's peak memory since `repeated`; nothing for a CPU."""
    if bench.device.type != "cuda":
        return {}
    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
