"""What leaves a server's connection: every byte in its order, the head of a short answer together with its body."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from serving.server import _Transport, running

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Recorded:
    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str) -> str:
        return name


@pytest.mark.parametrize(
    ("writes", "sent"),
    [
        ([HEAD, b"ok"], [HEAD + b"ok"]),
        ([HEAD, b"ok", HEAD, b"ok"], [HEAD + b"ok"] * 2),
        ([HEAD, b"x" * 70_000], [HEAD, b"x" * 70_000]),
        ([HEAD, b"2\r\nok\r\n", b"0\r\n\r\n"], [HEAD + b"2\r\nok\r\n", b"0\r\n\r\n"]),
        ([HEAD, b""], [HEAD]),
        ([HEAD], []),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], [b"HTTP/1.1 100 Continue\r\n\r\n"]),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\nno"], [b"HTTP/1.1 400 Bad Request\r\n\r\nno"]),
    ],
)
def test_a_head_goes_with_what_follows(writes: list[bytes], sent: list[bytes]) -> None:
    recorded = Recorded()
    transport = _Transport(recorded)
    for data in writes:
        transport.write(data)
    assert recorded.written == sent
    assert transport.get_extra_info("peername") == "peername"
    transport.close()
    assert b"".join(recorded.written) == b"".join(writes)
    assert recorded.closed


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers in as many parts as the path says, with a length or without."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    parts = int(scope["path"].rpartition("/")[2])
    body = b"part"
    headers = [(b"content-length", b"%d" % (parts * 4))] if scope["path"].startswith("/length") else []
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in range(parts):
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": body, "more_body": part + 1 < parts})
    if not parts:
        await send({"type": "http.response.body", "body": b""})


def test_answers_of_every_shape_arrive_over_one_connection() -> None:
    with running(app) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for _ in range(2):
            for kind in ("length", "chunks"):
                for parts in (0, 1, 3):
                    assert client.get(f"/{kind}/{parts}").content == b"part" * parts
            head = client.head("/length/3")
            assert (head.status_code, head.headers["content-length"], head.content) == (200, "12", b"")

        expecting = client.post("/length/1", content=b"x" * 10, headers={"expect": "100-continue"})
        assert expecting.content == b"part"


def test_a_request_that_is_none_is_answered_and_the_connection_closed() -> None:
    with running(app) as url, socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as plug:  # type: ignore[arg-type]
        plug.sendall(b"nonsense\r\n\r\n")
        answer = b""
        while part := plug.recv(4_096):
            answer += part
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answer.endswith(b"Invalid HTTP request received.")
