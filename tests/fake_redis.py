"""A stand-in for a Redis server, to make it answer what a real one answers when it goes wrong, at the right moment."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import hiredis

from infra.redis.ports import HOST

#: What becomes of a command: bytes that are sent, bytes one after the other, or None: the connection is closed.
Reply = bytes | Iterator[bytes] | None
Answer = Callable[[list[bytes]], Reply]

INFO = b"# Server\r\nrun_id:fake\r\nmaxmemory_policy:noeviction\r\nrole:master\r\n"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def array(*parts: bytes) -> bytes:
    return b"*%d\r\n" % len(parts) + b"".join(parts)


@dataclass
class FakeRedis:
    """What listens at `port`, and the commands it was sent, without those of greeting."""

    port: int
    commands: list[list[bytes]] = field(default_factory=list)

    @property
    def names(self) -> list[bytes]:
        return [command[0] for command in self.commands]


@contextmanager
def fake_redis(answer: Answer) -> Iterator[FakeRedis]:
    """Listens at a port of its own until the end of the context; INFO is answered as by a healthy server."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            reader = hiredis.Reader()
            with contextlib.suppress(ConnectionError):
                while data := self.request.recv(65_536):
                    reader.feed(data)
                    while (command := reader.gets()) is not False:
                        if not self.reply(command):
                            return

        def reply(self, command: list[bytes]) -> bool:
            if command == [b"INFO"]:
                self.request.sendall(bulk(INFO))
                return True
            fake.commands.append(command)
            said = answer(command)
            for part in [said] if isinstance(said, bytes) else said or []:
                self.request.sendall(part)
            return said is not None

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        block_on_close = False

    with Server((HOST, 0), Handler) as server:
        fake = FakeRedis(server.server_address[1])
        # A client that is never answered must not keep the end of the context waiting.
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        serving.start()
        try:
            yield fake
        finally:
            server.shutdown()
            serving.join()
