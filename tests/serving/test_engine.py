"""The engine: batches, the budget, refusals, cancellation, and the end."""

import threading

import pytest

from hf_kd_ranking.serving.engine import Engine, OverloadedError


class Gate:
    """Work that waits until it is let through, and remembers its batches."""

    def __init__(self):
        self.batches = []
        self.began = threading.Semaphore(0)
        self.let_through = threading.Semaphore(0)

    def run(self, inputs):
        self.batches.append(inputs)
        self.began.release()
        assert self.let_through.acquire(timeout=20)
        return [10 * value for value in inputs]


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def make_engine():
    engines = []

    def make(**settings):
        engines.append(Engine(**{"window_ms": 0, **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def block(engine, gate):
    """Keep the thread busy with the input 0."""
    [first] = engine.submit(gate.run, [0], [1])
    assert gate.began.acquire(timeout=20)
    return first


def release(gate, count):
    for _ in range(count):
        gate.let_through.release()


def test_waiting_jobs_share_a_batch_up_to_the_budget(make_engine, gate):
    engine = make_engine(batch_tokens=10)
    first = block(engine, gate)
    futures = [engine.submit(gate.run, [value], [4])[0] for value in (1, 2, 3)]
    assert len(engine) == 3
    release(gate, 3)
    assert [future.result(20) for future in (first, *futures)] == [0, 10, 20, 30]
    assert gate.batches == [[0], [1, 2], [3]]


def test_a_job_beyond_the_budget_runs_by_itself(make_engine, gate):
    engine = make_engine(batch_tokens=1)
    block(engine, gate)
    futures = engine.submit(gate.run, [1, 2], [99, 99])
    release(gate, 3)
    assert [future.result(20) for future in futures] == [10, 20]
    assert gate.batches == [[0], [1], [2]]


def test_work_of_another_kind_is_not_mixed_in(make_engine, gate):
    engine, other = make_engine(), Gate()
    block(engine, gate)
    [a], [b], [c] = (engine.submit(kind.run, [value], [1]) for kind, value in ((gate, 1), (other, 2), (gate, 3)))
    release(gate, 2)
    release(other, 1)
    assert (a.result(20), b.result(20), c.result(20)) == (10, 20, 30)
    assert (gate.batches, other.batches) == ([[0], [1, 3]], [[2]])


def test_the_window_waits_for_as_many_jobs_as_came_before(make_engine, gate):
    engine = make_engine(window_ms=20_000)
    release(gate, 9)
    assert engine.submit(gate.run, [1], [1])[0].result(10) == 10  # at once: nobody else is active
    engine.submit(gate.run, [2, 3], [1, 1])[1].result(10)
    for _ in range(2):
        assert gate.began.acquire(timeout=20)
    [early] = engine.submit(gate.run, [4], [1])
    assert not gate.began.acquire(timeout=0.3)  # the batch waits for a second job
    [late] = engine.submit(gate.run, [5], [1])
    assert (early.result(10), late.result(10)) == (40, 50)
    assert gate.batches == [[1], [2, 3], [4, 5]]


def test_full_queue_refuses_all_parts_of_a_request(make_engine, gate):
    engine = make_engine(max_waiting=2)
    block(engine, gate)
    [waiting] = engine.submit(gate.run, [1], [1])
    with pytest.raises(OverloadedError, match="1 parts of requests are waiting"):
        engine.submit(gate.run, [2, 3], [1, 1])
    assert len(engine) == 1
    waiting.cancel()
    futures = engine.submit(gate.run, [4, 5], [1, 1])  # the cancelled one leaves its place
    release(gate, 2)
    assert [future.result(20) for future in futures] == [40, 50]
    assert gate.batches == [[0], [4, 5]]


def test_cancelled_work_is_left_out(make_engine, gate):
    engine = make_engine()
    block(engine, gate)
    gone, kept = engine.submit(gate.run, [1, 2], [1, 1])
    assert gone.cancel()
    release(gate, 2)
    assert kept.result(20) == 20
    assert gate.batches == [[0], [2]]
    assert engine.submit(lambda inputs: inputs, ["alive"], [1])[0].result(20) == "alive"


def test_an_error_is_that_of_its_own_request(make_engine, gate):
    def divide(values):
        return [1 / value for value in values]

    engine = make_engine()
    first = block(engine, gate)
    futures = [engine.submit(divide, [value], [1])[0] for value in (1, 0, 2)]
    release(gate, 1)
    assert first.result(20) == 0
    assert (futures[0].result(20), futures[2].result(20)) == (1, 0.5)
    with pytest.raises(ZeroDivisionError):
        futures[1].result(20)


def test_close_finishes_what_waits_and_refuses_more(make_engine, gate):
    engine = make_engine()
    block(engine, gate)
    futures = [engine.submit(gate.run, [value], [1])[0] for value in (1, 2)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    release(gate, 3)
    closing.join(20)
    assert not closing.is_alive()
    assert [future.result(0) for future in futures] == [10, 20]
    with pytest.raises(OverloadedError, match="shutting down"):
        engine.submit(gate.run, [3], [1])
