"""Measure `serve` under load on this machine: latency and requests per second, with and without batching.

    python examples/benchmarks/serve_load.py RANKER [--architecture bert_dot] [--concurrency 1 8 32] [--requests 200]
    python examples/benchmarks/serve_load.py RANKER --minutes 30      # a soak: good and bad requests, 32 clients
    python examples/benchmarks/serve_load.py RANKER --stored 100      # 100 documents by id, and without the server
    python examples/benchmarks/serve_load.py RANKER --pairs 10000     # `teacher score`, by the server and in process

RANKER is a ranker, or an encoder with --architecture: an untrained ranker is as fast. Two servers are started at free
ports of the loopback interface, one that batches requests together and one that does not. Their rounds alternate, each
client sends its next request when it has its answer, and every answer is compared with `Ranker.score`. Clients share
the processor with the servers. The last line is one JSON object.
"""

import argparse
import asyncio
import atexit
import collections
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import httpx
import numpy as np

import hf_kd_ranking as kd

POOL = 64  # different requests
TOLERANCE = 1e-4
BATCHED, SINGLE = "batched", "one by one"
# What a soak sends besides good requests -> the status of the answer.
BAD = {
    b"{": 400,
    b'{"query": "a"}': 422,
    b'{"query": "", "documents": ["a"]}': 400,
    b'{"query": "a", "documents": []}': 400,
    b'{"query": "a", "documents": ["a"], "model": "unknown"}': 404,
    b'{"query": "a", "documents": [{"id": "1"}]}': 422,
    b'{"query": "\xff", "documents": ["a"]}': 400,
    json.dumps({"query": "a", "texts": ["a"] * 1_001}).encode(): 413,
}


def main() -> None:
    """Start the servers, send requests, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranker")
    parser.add_argument("--architecture")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="requests per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=20, help="documents per request")
    parser.add_argument("--words", type=int, nargs=2, default=[5, 40], help="shortest and longest document")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--stored", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0)
    args = parser.parse_args()
    ranker = kd.Ranker.from_pretrained(args.ranker, args.architecture, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        ranker.save_pretrained(folder)
        if args.stored > 0:
            return print(json.dumps(compare_stored(folder, ranker, args)))
        if args.pairs > 0:
            return print(json.dumps(compare_teachers(folder, ranker, args)))
        requests, wanted = make_requests(ranker, args.documents, args.words)
        del ranker
        if args.minutes > 0:
            result = soak(folder, requests, wanted, args.minutes)
        else:
            result = compare(folder, requests, wanted, args)
    print(json.dumps(result))


def make_requests(ranker: kd.Ranker, documents: int, words: list[int]) -> tuple[list[bytes], list[np.ndarray]]:
    """Return bodies, each with texts of its own, and the scores of their answers by place."""
    rng = random.Random(0)
    vocabulary = [word for word in ranker.tokenizer.get_vocab() if word.isalpha()]
    vocabulary.sort()
    bodies, wanted = [], []
    for _ in range(POOL):
        query = " ".join(rng.choices(vocabulary, k=6))
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(*words))) for _ in range(documents)]
        bodies.append(json.dumps({"query": query, "texts": texts, "raw_scores": True}).encode())
        wanted.append(ranker.score(query, texts))
    return bodies, wanted


class Server:
    """A process that serves a ranker at a free port of this machine."""

    def __init__(self, folder: str, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "hf_kd_ranking",
            "serve",
            "--model",
            folder,
            "--port",
            "0",
            "--json",
            *options,
        ]
        self.log = (Path(folder) / f"log{len(options)}").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        atexit.register(self.process.kill)  # also after an error
        self.address = json.loads(self.process.stdout.readline())["address"]
        while httpx.get(f"{self.address}/health", timeout=60).status_code == 503:
            time.sleep(0.1)

    def memory(self) -> float:
        """Return the resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1_000

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def compare(folder: str, requests: list[bytes], wanted: list[np.ndarray], args: argparse.Namespace) -> dict:
    """Return latency and throughput of both servers at each concurrency."""
    servers = {BATCHED: Server(folder), SINGLE: Server(folder, "--batch-tokens", "1", "--batch-window", "0")}
    rows, wrong = [], 0
    print("| clients | server | p50 ms | p95 ms | p99 ms | requests/s |\n" + "| --- " * 6 + "|")
    for concurrency in args.concurrency:
        times = {name: [] for name in servers}
        rates = {name: [] for name in servers}
        for round_number, name in product(range(args.rounds + 1), servers):
            start = time.perf_counter()
            found = asyncio.run(send_all(servers[name].address, requests, wanted, concurrency, args.requests))
            seconds = time.perf_counter() - start
            wrong += sum(outcome != "200" for outcome, _ in found)
            if round_number > 0:  # the first warms up
                times[name] += [1_000 * elapsed for _, elapsed in found]
                rates[name].append(args.requests / seconds)
        for name in servers:
            p50, p95, p99 = np.percentile(times[name], [50, 95, 99]).round(1).tolist()
            rate = round(statistics.median(rates[name]), 1)
            rows.append({"clients": concurrency, "server": name, "p50": p50, "p95": p95, "p99": p99, "rate": rate})
            print(f"| {concurrency} | {name} | {p50} | {p95} | {p99} | {rate} |", flush=True)
        ratios = [a / b for a, b in zip(rates[BATCHED], rates[SINGLE], strict=True)]
        rows[-2]["ratio"] = round(statistics.median(ratios), 3)
    for server in servers.values():
        server.stop()
    return {"rows": rows, "wrong_or_lost": wrong, "documents": args.documents, "words": args.words}


async def send_all(
    address: str, requests: list[bytes], wanted: list[np.ndarray], concurrency: int, count: int
) -> list[tuple[str, float]]:
    """Send `count` requests from `concurrency` clients; return outcome and seconds of each."""
    numbers, found = iter(range(count)), []

    async def work(http: httpx.AsyncClient) -> None:
        for number in numbers:
            start = time.perf_counter()
            outcome = await ask(http, requests[number % POOL], wanted[number % POOL])
            found.append((outcome, time.perf_counter() - start))

    async with make_client(address, concurrency) as http:
        await asyncio.gather(*(work(http) for _ in range(concurrency)))
    return found


def make_client(address: str, concurrency: int) -> httpx.AsyncClient:
    """Return a client that keeps a connection per user."""
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    headers = {"Content-Type": "application/json"}
    return httpx.AsyncClient(base_url=address, limits=limits, timeout=120, headers=headers)


async def ask(http: httpx.AsyncClient, body: bytes, wanted: np.ndarray) -> str:
    """Send a good request; return its status, "wrong" for another request's scores, or the name of an error."""
    try:
        answer = await http.post("/rerank", content=body)
    except httpx.HTTPError as error:
        return type(error).__name__
    if answer.status_code != 200:
        return str(answer.status_code)
    scores = np.full(len(wanted), np.inf)
    for result in answer.json():
        scores[result["index"]] = result["score"]
    if np.abs(scores - wanted).max() > TOLERANCE * max(1, np.abs(wanted).max()):
        return "wrong"
    return "200"


def compare_stored(folder: str, ranker: kd.Ranker, args: argparse.Namespace) -> dict:
    """Return the milliseconds of re-ranking stored documents by id, through the server and in this process."""
    rng, rows = random.Random(0), []
    vocabulary = sorted(word for word in ranker.tokenizer.get_vocab() if word.isalpha())
    for number in range(3 * args.stored):
        rows.append(f"{number}\t{' '.join(rng.choices(vocabulary, k=rng.randint(*args.words)))}\n")
    path = Path(folder) / "documents.tsv"
    path.write_text("".join(rows))
    store = kd.VectorStore.build(ranker, kd.TextStore.from_tsv(path), Path(folder) / "index")
    reranker, server, times = kd.StoredReranker(store), Server(folder, "--index", str(store.folder)), {}
    with httpx.Client(base_url=server.address, timeout=60) as http:
        for number in range(args.requests + 1):
            query, ids = " ".join(rng.choices(vocabulary, k=6)), rng.sample(range(len(rows)), args.stored)
            start = time.perf_counter()
            scores = reranker.score(query, ids)
            middle = time.perf_counter()
            body = {"query": query, "documents": [{"id": str(doc_id)} for doc_id in ids], "raw_scores": True}
            results = http.post("/rerank", json=body).json()["results"]
            end = time.perf_counter()
            assert np.allclose([result["relevance_score"] for result in results], np.sort(scores)[::-1], atol=1e-3)
            if number > 0:  # the first warms up
                times.setdefault("in process", []).append(1_000 * (middle - start))
                times.setdefault("served", []).append(1_000 * (end - middle))
    server.stop()
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["served"], times["in process"], strict=True)]
    return {"documents": args.stored, "median_ms": medians, "ratio": round(statistics.median(ratios), 3)}


def compare_teachers(folder: str, ranker: kd.Ranker, args: argparse.Namespace) -> dict:
    """Return pairs per second of `score_teacher` in this process and through the server, in turns, and their ratio.

    Seconds of the processors, of this process and of the server, do not depend on what else the machine does.
    """
    rng = random.Random(0)
    vocabulary = sorted(word for word in ranker.tokenizer.get_vocab() if word.isalpha())
    server, seconds = Server(folder), collections.defaultdict(list)
    teachers = {"in process": kd.load_teacher(folder, device="cpu")}
    teachers["served"] = kd.load_teacher(f"tei+{server.address}")
    for number in range(args.rounds + 1):
        count = args.pairs // args.rounds if number > 0 else 10 * args.documents  # the first round warms up
        lines, run = {"documents": [], "queries": []}, kd.Run()
        for query in range(count // args.documents):
            run[f"q{query}"] = []
            lines["queries"].append(f"q{query}\t{' '.join(rng.choices(vocabulary, k=6))}\n")
            for document in range(query * args.documents, (query + 1) * args.documents):
                text = " ".join(rng.choices(vocabulary, k=rng.randint(*args.words)))
                lines["documents"].append(f"d{document}\t{text}\n")
                run[f"q{query}"].append((f"d{document}", float(-document)))
        stores = []
        for name in ("queries", "documents"):
            path = Path(folder) / f"{name}-{number}.tsv"
            path.write_text("".join(lines[name]))
            stores.append(kd.TextStore.from_tsv(path, Path(folder) / f"{name}-{number}"))
        runs = {}
        for name, teacher in teachers.items():
            output = Path(folder) / f"{name}-{number}.trec"
            before = time.perf_counter(), time.process_time() + server.cpu_seconds()
            kd.score_teacher(teacher, run, *stores, output)
            after = time.perf_counter(), time.process_time() + server.cpu_seconds()
            runs[name] = kd.read_run(output)
            if number > 0:
                seconds[name].append([end - start for start, end in zip(before, after, strict=True)])
        for query_id, found in runs["served"].items():
            wanted = dict(runs["in process"][query_id])
            assert all(abs(score - wanted[doc_id]) < TOLERANCE * 10 for doc_id, score in found)
    server.stop()
    totals = {name: np.sum(of_rounds, axis=0) for name, of_rounds in seconds.items()}
    result = {"pairs": args.rounds * count, "documents": args.documents, "words": args.words}
    for place, kind in enumerate(("wall", "processor")):
        rates = {name: round(result["pairs"] / total[place], 1) for name, total in totals.items()}
        result[kind] = {"pairs_per_second": rates, "ratio": round(rates["served"] / rates["in process"], 3)}
    return result


def soak(folder: str, requests: list[bytes], wanted: list[np.ndarray], minutes: float) -> dict:
    """Send good, bad and abandoned requests from 32 clients; return the outcomes and the growth of memory."""
    server = Server(folder)
    outcomes, memory = collections.Counter(), []
    end = time.monotonic() + 60 * minutes

    async def work(http: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < end:
            outcomes[await send_any(http, rng, requests, wanted)] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(round(server.memory(), 1))
            await asyncio.sleep(10)

    async def run() -> None:
        async with make_client(server.address, 32) as http:
            await asyncio.gather(watch(), *(work(http, random.Random(seed)) for seed in range(32)))

    asyncio.run(run())
    server.stop()
    fifth = max(1, len(memory) // 5)
    growth = statistics.mean(memory[-fifth:]) - statistics.mean(memory[fifth : 2 * fifth] or memory)
    result = {"minutes": minutes, "outcomes": dict(sorted(outcomes.items())), "memory_mb": memory[:: max(1, fifth)]}
    return result | {"growth_mb": round(growth, 1)}


async def send_any(
    http: httpx.AsyncClient, rng: random.Random, requests: list[bytes], wanted: list[np.ndarray]
) -> str:
    """Send a request of any kind; return what happened in words."""
    place, kind = rng.randrange(POOL), rng.random()
    if kind < 0.7:
        return f"good: {await ask(http, requests[place], wanted[place])}"
    if kind < 0.75:
        try:
            await http.post("/rerank", content=requests[place], timeout=0.02)
        except httpx.TimeoutException:
            return "abandoned"
        return "abandoned too late"
    body = rng.choice(list(BAD))
    status = (await http.post("/rerank", content=body)).status_code
    return f"bad: {status}" if status == BAD[body] else f"bad: {status} in place of {BAD[body]}"


if __name__ == "__main__":
    main()
