"""Slow and half-open connections end, give way to new ones, and leave the others alone."""

import socket
import threading

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from hf_kd_ranking.serving import connections
from hf_kd_ranking.serving.connections import LimitedProtocol, ProxiedProtocol

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=[LimitedProtocol, ProxiedProtocol])
def address(request):
    """Address of a server in a thread, whose answer is "well"."""

    async def answer(_):
        return PlainTextResponse("well")

    async def begin():
        ready.set()

    ready = threading.Event()
    config = uvicorn.Config(Starlette(routes=[Route("/", answer)]), http=request.param, limit_concurrency=100)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=300) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    received = b""
    try:
        while part := connection.recv(4096):
            received += part
    except ConnectionResetError:
        pass
    return received


def fetch(address) -> bytes:
    with socket.create_connection(address, 20) as connection:
        connection.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return read_all(connection)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_half_open_connections_give_way(address, sent):
    half_open = [socket.create_connection(address, 20) for _ in range(120)]
    for connection in half_open:
        connection.sendall(sent)
    assert fetch(address).endswith(b"well")
    assert read_all(half_open[0]) == b""  # the oldest is closed
    for connection in half_open:
        connection.close()


@pytest.mark.parametrize("sent", [b"", REQUEST[:9], REQUEST, REQUEST + REQUEST[:9]])
def test_a_slow_head_ends_the_connection(address, sent, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with socket.create_connection(address, 20) as connection:
        connection.sendall(sent)
        received = read_all(connection)
    assert received.count(b"well") == (REQUEST in sent)


def test_bytes_one_at_a_time_do_not_prolong_the_head(address, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with socket.create_connection(address, 0.05) as connection, pytest.raises(OSError):
        for byte in REQUEST[:-1] + b"X: " + b"a" * 300:
            connection.sendall(bytes([byte]))
            try:
                assert connection.recv(10) == b""
                raise ConnectionResetError
            except TimeoutError:
                pass
