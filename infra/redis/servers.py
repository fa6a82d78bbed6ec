"""Redis as people run it, on this machine only: a single server, a Cluster, Sentinel, and TLS with users.

Each is a context manager: inside it the servers run, after it they are gone, as they are when this process is killed.

    with single(appendonly=True) as server:
        server.connection_string  # what Feast's feature_store.yaml takes

As a command they run until Ctrl-C: `python -m infra.redis.servers cluster --port 7000`.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from infra.redis.certificates import CertificatesNotMade, make_certificates
from infra.redis.groups import MASTER_NAME, Cluster, RedisServers, SentinelServers, SingleServer
from infra.redis.node import Node, PortTaken, ServerNotStarted
from infra.redis.ports import HOST, free_ports
from infra.redis.programs import ProgramMissing

USER = "isochron"
#: What the user may do: data, scripts and transactions, and ask how the server is; nothing that is dangerous to others.
USER_RIGHTS = (
    "~* +@read +@write +@scripting +@transaction +@connection -@dangerous "
    "+info +time +cluster|slots +cluster|shards +cluster|nodes +cluster|info +cluster|keyslot +cluster|myid"
)
MASTERS = 3
_ATTEMPTS = 5

_Servers = TypeVar("_Servers", bound=RedisServers)


@contextmanager
def single(
    folder: Path | None = None,
    port: int = 0,
    *,
    appendonly: bool = False,
    maxmemory: str | None = None,
    directives: Sequence[str] = (),
) -> Iterator[SingleServer]:
    """A single server at `port` (0: any free one), its data in `folder` (None: one that is removed afterwards).

    It keeps nothing on disk unless `appendonly`; `maxmemory` is as redis.conf writes it ("100mb"). `directives` are
    more lines of redis.conf, and win. Raises ServerNotStarted, ProgramMissing.
    """
    lines = (*_storage(appendonly, maxmemory), *directives)
    with _running(lambda home, ports: SingleServer(Node(home, ports[0], lines)), folder, port, 1) as server:
        yield server


@contextmanager
def cluster(
    folder: Path | None = None,
    port: int = 0,
    *,
    appendonly: bool = False,
    maxmemory: str | None = None,
    directives: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Three masters at `port` and the two after it (the nodes' own bus at the next three); options as of `single`.

    A node that does not answer counts as down after 5 s; then the whole Cluster refuses, as Redis' default is.
    """

    def make(home: Path, ports: Sequence[int]) -> Cluster:
        clients, buses = ports[:MASTERS], ports[MASTERS:]
        nodes = [
            Node(home / f"node{place}", own, (*_clustered(bus), *_storage(appendonly, maxmemory), *directives))
            for place, (own, bus) in enumerate(zip(clients, buses, strict=True))
        ]
        return Cluster(nodes, buses)

    with _running(make, folder, port, 2 * MASTERS) as servers:
        yield servers


@contextmanager
def sentinel(
    folder: Path | None = None,
    port: int = 0,
    *,
    sentinels: int = 1,
    down_after: float = 2.0,
    appendonly: bool = False,
    maxmemory: str | None = None,
    directives: Sequence[str] = (),
) -> Iterator[SentinelServers]:
    """So many Sentinels at `port` and those after it, then a master and its replica; options as of `single`.

    More than half of the Sentinels must agree that the master is down; each thinks so when it got no answer for
    `down_after` seconds. Failing over takes some 2 s more; a killed master that is started again follows after 10 s.
    """

    def make(home: Path, ports: Sequence[int]) -> SentinelServers:
        master, replica = ports[sentinels:]
        lines = (*_storage(appendonly, maxmemory), "repl-diskless-sync-delay 0", *directives)
        watching = _watching(master, sentinels // 2 + 1, down_after)
        return SentinelServers(
            [
                Node(home / "data0", master, lines),
                Node(home / "data1", replica, (f"replicaof {HOST} {master}", *lines)),
            ],
            [Node(home / f"sentinel{place}", ports[place], watching, sentinel=True) for place in range(sentinels)],
        )

    with _running(make, folder, port, sentinels + 2) as servers:
        yield servers


@contextmanager
def tls(
    folder: Path | None = None,
    port: int = 0,
    *,
    appendonly: bool = False,
    maxmemory: str | None = None,
    directives: Sequence[str] = (),
) -> Iterator[SingleServer]:
    """A single server that speaks TLS only and lets in user `isochron` with a new password; options as of `single`.

    The default user is off. `options` of the server tell a client all it needs. Raises CertificatesNotMade too.
    """
    # With a letter in front: Feast reads options as JSON, and hexadecimal digits may be a number there.
    password, administrator = (f"p{secrets.token_hex(16)}" for _ in range(2))

    def make(home: Path, ports: Sequence[int]) -> SingleServer:
        files = make_certificates(home)
        lines = (
            "port 0",
            f"tls-port {ports[0]}",
            f'tls-ca-cert-file "{files.authority}"',
            f'tls-cert-file "{files.certificate}"',
            f'tls-key-file "{files.key}"',
            "tls-auth-clients no",
            "user default off",
            f"user administrator on {_hashed(administrator)} ~* &* +@all",
            f"user {USER} on {_hashed(password)} {USER_RIGHTS}",
        )
        trust = {"ssl": True, "ssl_ca_certs": str(files.authority)}
        node = Node(
            home,
            ports[0],
            (*lines, *_storage(appendonly, maxmemory), *directives),
            access={**trust, "username": "administrator", "password": administrator},
        )
        return SingleServer(node, {**trust, "username": USER, "password": password})

    with _running(make, folder, port, 1) as server:
        yield server


def _storage(appendonly: bool, maxmemory: str | None) -> list[str]:
    return [f"appendonly {'yes' if appendonly else 'no'}", *([f"maxmemory {maxmemory}"] if maxmemory else [])]


def _clustered(bus_port: int) -> list[str]:
    return [
        "cluster-enabled yes",
        f"cluster-port {bus_port}",
        f"cluster-announce-ip {HOST}",
        "cluster-node-timeout 5000",
    ]


def _watching(master: int, quorum: int, down_after: float) -> list[str]:
    return [
        f"sentinel monitor {MASTER_NAME} {HOST} {master} {quorum}",
        f"sentinel down-after-milliseconds {MASTER_NAME} {round(down_after * 1000)}",
        f"sentinel failover-timeout {MASTER_NAME} 5000",
    ]


def _hashed(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


@contextmanager
def _running(
    make: Callable[[Path, Sequence[int]], _Servers], folder: Path | None, port: int, ports: int
) -> Iterator[_Servers]:
    """Servers at so many ports, `port` and those after it or (0) any, until the end of the context."""
    with _home(folder) as home:
        servers = _started(make, home, range(port, port + ports)) if port else _started_anywhere(make, home, ports)
        try:
            yield servers
        finally:
            servers.stop()


@contextmanager
def _home(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="isochron-redis-") as made:
        yield Path(made).resolve()


def _started(make: Callable[[Path, Sequence[int]], _Servers], home: Path, ports: Sequence[int]) -> _Servers:
    home.mkdir(parents=True, exist_ok=True)
    servers = make(home, ports)
    servers.start()
    return servers


def _started_anywhere(make: Callable[[Path, Sequence[int]], _Servers], home: Path, ports: int) -> _Servers:
    """Another process may take a free port before we do: then with others."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return _started(make, home, free_ports(ports))
        except PortTaken:
            continue
    return _started(make, home, free_ports(ports))


def main(words: Sequence[str]) -> int:
    """Runs servers until Ctrl-C or SIGTERM; prints what feature_store.yaml says of them. The exit code."""
    told = _parser().parse_args(words)
    options = {"appendonly": told.appendonly, "maxmemory": told.maxmemory, "directives": told.directive}
    if told.kind is sentinel:
        options["sentinels"] = told.sentinels
    # As Ctrl-C does: through the end of the context.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with told.kind(told.folder, told.port, **options) as servers:
            print(_described(servers), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except (ServerNotStarted, ProgramMissing, CertificatesNotMade) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.redis.servers", description="Redis until Ctrl-C")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for kind in (single, cluster, sentinel, tls):
        command = kinds.add_parser(kind.__name__, help=(kind.__doc__ or "").splitlines()[0])
        command.set_defaults(kind=kind)
        command.add_argument("--port", type=int, default=0, help="the first one; 0: any free ones")
        command.add_argument("--folder", type=Path, help="where data stays; without it, nowhere")
        command.add_argument("--appendonly", action="store_true", help="keep data on disk")
        command.add_argument("--maxmemory", help="as redis.conf writes it: 100mb")
        command.add_argument("--directive", action="append", default=[], help="a line of redis.conf; may be repeated")
        if kind is sentinel:
            command.add_argument("--sentinels", type=int, default=1, help="how many")
    return parser


def _described(servers: RedisServers) -> str:
    lines = [f"redis_type: {servers.redis_type}", f'connection_string: "{servers.connection_string}"']
    if servers.sentinel_master:
        lines.append(f"sentinel_master: {servers.sentinel_master}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
