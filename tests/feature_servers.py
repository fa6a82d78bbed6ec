"""Feature servers for tests: in this process with a clock moved by hand, or in one of their own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from feature_store.clock import ManualClock
from feature_store.layer import FeatureLayer
from serving.features import FeatureServer
from serving.server import running
from tests.processes import BIN


@dataclass
class Served:
    """A running server and what is behind it."""

    client: httpx.Client
    url: str
    layer: FeatureLayer
    clock: ManualClock
    app: FeatureServer

    def ask(self, body: Any, accept: str = "application/json") -> httpx.Response:
        return self.client.post("/get-online-features", json=body, headers={"accept": accept})

    def columns(self, body: Any) -> dict[str, list[Any]]:
        """The values of an answer by name."""
        told = self.ask(body).raise_for_status().json()
        return {n: r["values"] for n, r in zip(told["metadata"]["feature_names"], told["results"], strict=True)}


@contextmanager
def serving(repo: Path, now: int, **options: Any) -> Iterator[Served]:
    """A server in this process, its clock at `now`; `options` are FeatureServer's."""
    clock = ManualClock(now)
    with ExitStack() as stack:
        layer = stack.enter_context(FeatureLayer(repo, clock=clock))
        stack.callback(layer.store.backend.close)
        app = FeatureServer(layer, clock, **options)
        url = stack.enter_context(running(app))
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
        yield Served(client, url, layer, clock, app)


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def started(repo: Path, folder: Path, *options: str) -> Iterator[Process]:
    """`isochron serve-features`, from its first answer on."""
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        port = plug.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as output:
        command = [str(BIN / "isochron"), "serve-features", "--repo", str(repo), "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        server = Process(process, port, log)
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(f"{server.url}/metrics", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()
