"""Clients by their addresses, and connections that cannot put the server out."""

import asyncio
import ipaddress
from collections.abc import Collection, Sequence

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10  # until the head of a request is complete, from the connection or the answer before
ANSWER_SECONDS = 120  # until the client has read its answer; searches wait for one another
IN_ALL = 90  # connections


def find_client(peer: str, forwarded: Sequence[str] = ()) -> str:
    """Return what identifies the client of a request: an IPv4 address, or an IPv6 network of 64 bits.

    Args:
        peer: the address that the connection comes from.
        forwarded: the values of X-Forwarded-For, if there is a proxy. They count only if the peer is on this machine
            or in its private network, as a proxy is, and of them the last public address, or the last one if all are
            private: proxies wrote it, and a client may write what it likes before it.
    """
    addresses = [_network(address.strip()) for address in ",".join(forwarded).split(",")]
    if not _is_private(peer) or addresses[-1] is None:
        return _network(peer) or peer
    for address in reversed(addresses):
        if address is not None and not _is_private(address):
            return address
    return addresses[-1]


def _network(address: str) -> str | None:
    """Return the network of a client, in one spelling; None if the text is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


def _is_private(address: str) -> bool:
    try:
        return ipaddress.ip_network(address).is_private
    except ValueError:
        return False


class LimitedProtocol(H11Protocol):
    """HTTP on one connection, which is closed when its time is over.

    Where one client, or all together, have too many connections, the one is closed that has waited longest for a
    request, so that slow and half-open connections give way to new ones.
    """

    per_client = 20  # connections; a browser opens six

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.address = find_client(transport.get_extra_info("peername")[0])
        self._wait(is_answering=False)
        open_now = [connection for connection in self.connections if not connection.transport.is_closing()]
        of_client = [connection for connection in open_now if connection.address == self.address]
        if len(of_client) > self.per_client:
            _close_longest_waiting(of_client)
        elif len(open_now) > IN_ALL:
            _close_longest_waiting(open_now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time limit."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; the time of its head runs until the head is complete."""
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._follow()

    def _follow(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering != self.is_answering:
            self._timer.cancel()
            self._wait(is_answering)

    def _wait(self, is_answering: bool) -> None:
        self.is_answering, self.since = is_answering, self.loop.time()
        seconds = ANSWER_SECONDS if is_answering else HEAD_SECONDS
        self._timer = self.loop.call_later(seconds, self.transport.abort)


class ProxiedProtocol(LimitedProtocol):
    """The same for a server with a proxy, from which all connections come."""

    per_client = IN_ALL


def _close_longest_waiting(connections: Collection[LimitedProtocol]) -> None:
    waiting = [connection for connection in connections if not connection.is_answering]
    min(waiting, key=lambda connection: connection.since).transport.abort()
