"""The limit of an HTTP server in Python: an ASGI app that reads nothing of a request and writes bytes it already has.

It runs under uvicorn with httptools, and with uvloop where that is installed, as Feast's server and ours do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.online_sides import HOST, Command

#: In the environment: the file whose bytes are every answer.
ANSWER = "BENCHMARKS_ANSWER"


def command(answer: Path, port: int) -> Command:
    """How to start it, with a file of the bytes to answer with."""
    uvicorn = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.bare_asgi:app", "--host", HOST]
    options = [
        "--port",
        str(port),
        "--http",
        "httptools",
        "--no-access-log",
        "--log-level",
        "warning",
        "--lifespan",
        "off",
    ]
    root = str(Path(__file__).resolve().parents[1])
    return Command([*uvicorn, *options], answer.parent, "/", {ANSWER: str(answer), "PYTHONPATH": root})


def app() -> Callable[..., Awaitable[None]]:
    """The app, for uvicorn."""
    body = Path(os.environ[ANSWER]).read_bytes()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    end = {"type": "http.response.body", "body": body}

    async def answer(_: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        # A client's next request must not meet the rest of this one: the body is taken, whatever it says.
        while (await receive()).get("more_body"):
            pass
        await send(start)
        await send(end)

    return answer
