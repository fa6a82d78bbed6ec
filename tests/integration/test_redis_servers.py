"""The local Redis servers that tests and developers start: they are what they say, and none outlives who started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
import redis
import yaml
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.redis import servers
from infra.redis.groups import Cluster, RedisServers, SingleServer
from infra.redis.node import PortTaken, ServerNotStarted, connect
from infra.redis.ports import HOST, free_ports
from infra.redis.programs import ProgramMissing, find
from infra.redis.waiting import comes_true

ROOT = Path(__file__).resolve().parents[2]
#: Another address of this machine: a server that is bound to all addresses listens there too.
OTHER_ADDRESS = "127.0.0.2"
#: For clients that shall not try again for seconds what must fail.
ONCE = {"retry": Retry(NoBackoff(), 0)}


def listens(port: int, host: str = HOST) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def set_and_get(server: RedisServers, value: str) -> str:
    with closing(server.client(decode_responses=True)) as client:
        client.set("key", value)
        return client.get("key")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as other:
        other.bind((HOST, free_ports(1)[0]))
        other.listen()
        yield other.getsockname()[1]


def test_feast_reaches_each_by_its_connection_string(redis_servers: RedisServers) -> None:
    redis_servers.flush()
    assert set_and_get(redis_servers, "one") == "one"
    config = {"connection_string": redis_servers.connection_string, "redis_type": redis_servers.redis_type}
    if redis_servers.sentinel_master:
        config["sentinel_master"] = redis_servers.sentinel_master
    with closing(RedisOnlineStore()._get_client(RedisOnlineStoreConfig(**config))) as client:
        assert client.get("key") == b"one"
        redis_servers.flush()
        assert client.get("key") is None


def test_each_is_there_for_this_machine_only(redis_servers: RedisServers) -> None:
    for node in redis_servers.nodes:
        assert listens(node.port)
        assert not listens(node.port, OTHER_ADDRESS)


def test_killed_it_comes_back_with_its_data(redis_single: SingleServer) -> None:
    assert set_and_get(redis_single, "kept") == "kept"
    before = redis_single.nodes[0].pid
    redis_single.kill()
    assert not listens(redis_single.port)
    redis_single.restart()
    assert redis_single.nodes[0].pid != before
    with closing(redis_single.client()) as client:
        assert client.get("key") == b"kept"


def test_one_that_crashed_by_itself_is_started_again(redis_single: SingleServer) -> None:
    (node,) = redis_single.nodes
    os.kill(node.pid, signal.SIGKILL)
    assert comes_true(lambda: not node.runs(), 5)
    redis_single.start()
    assert set_and_get(redis_single, "here") == "here"


def test_paused_it_takes_connections_and_does_not_answer(redis_single: SingleServer) -> None:
    redis_single.pause()
    try:
        assert listens(redis_single.port)
        with closing(redis_single.client(socket_timeout=0.2, **ONCE)) as client, pytest.raises(redis.TimeoutError):
            client.ping()
    finally:
        redis_single.resume()
    assert set_and_get(redis_single, "awake") == "awake"


def test_options_reach_the_server_and_it_evicts_nothing() -> None:
    with servers.single(maxmemory="3mb", directives=["hash-max-listpack-entries 7", "save 60 1"]) as server:
        with closing(server.client(decode_responses=True)) as client:
            settings = client.config_get("*")
            too_much = client.pipeline(transaction=False)
            for number in range(100):
                too_much.set(number, "x" * 100_000)
            with pytest.raises(redis.OutOfMemoryError):
                too_much.execute()
        assert settings["hash-max-listpack-entries"] == "7"
        assert settings["save"] == "60 1"
        assert settings["appendonly"] == "no"


def test_cluster_has_all_slots_and_uses_all_masters(redis_cluster: Cluster) -> None:
    redis_cluster.flush()
    with closing(redis_cluster.client()) as client:
        owners = [
            port
            for (first, last), slots in client.cluster_slots().items()
            for port in [slots["primary"][1]] * (last - first + 1)
        ]
        assert len(owners) == 16_384
        assert {*owners} == {*redis_cluster.ports}
        for number in range(100):
            client.set(f"key{number}", number)
    sizes = [node.command("DBSIZE") for node in redis_cluster.nodes]
    assert sum(sizes) == 100
    assert min(sizes) > 0


def test_cluster_goes_on_beside_a_killed_node_and_is_whole_again(redis_cluster: Cluster) -> None:
    redis_cluster.flush()
    lost, other, _ = redis_cluster.nodes
    keys = {node: key_of(redis_cluster, node.port) for node in (lost, other)}
    with closing(redis_cluster.client()) as client:
        client.mset_nonatomic({keys[lost]: 1, keys[other]: 2})
        lost.kill()
        assert client.get(keys[other]) == b"2"
    redis_cluster.start()
    with closing(redis_cluster.client()) as client:
        assert client.mget_nonatomic(keys[lost], keys[other]) == [b"1", b"2"]


def key_of(cluster: Cluster, port: int) -> str:
    """A key whose slot the node at that port has."""
    with closing(cluster.client()) as client:
        return next(key for key in map(str, range(1000)) if client.get_node_from_key(key).port == port)


def test_tls_server_refuses_plain_text_and_strangers_certificates(redis_tls: SingleServer) -> None:
    with closing(connect(redis_tls.port)) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    with (
        closing(connect(redis_tls.port, ssl=True)) as client,
        pytest.raises(redis.ConnectionError, match="CERTIFICATE"),
    ):
        client.ping()


@pytest.mark.parametrize(
    "credentials",
    [
        {"password": "wrong"},
        {"username": None, "password": None},
        {"username": "default", "password": ""},
    ],
)
def test_tls_server_refuses_wrong_passwords_and_the_default_user(
    redis_tls: SingleServer, credentials: dict[str, str | None]
) -> None:
    with closing(redis_tls.client(**credentials, **ONCE)) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_its_user_may_do_what_a_store_needs_and_no_more(redis_tls: SingleServer) -> None:
    with closing(redis_tls.client(decode_responses=True)) as client:
        script = client.register_script("redis.call('HSET', KEYS[1], 'a', ARGV[1]); return redis.call('TIME')")
        script(["key"], [1])
        with client.pipeline(transaction=True) as pipe:
            pipe.hgetall("key").expire("key", 60).unlink("key")
            assert pipe.execute() == [{"a": "1"}, True, 1]
        assert client.info("memory")["maxmemory_policy"] == "noeviction"
        assert [*client.scan_iter("*")] == []
        for words in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["ACL", "LIST"], ["SHUTDOWN"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)


def test_sentinel_makes_the_replica_master_when_the_master_is_killed() -> None:
    with servers.sentinel(down_after=1.0) as nodes:
        assert set_and_get(nodes, "before") == "before"
        killed, heir = nodes.master, nodes.replica
        killed.kill()
        assert comes_true(lambda: nodes.master is heir, 15)
        assert set_and_get(nodes, "after") == "after"


def test_three_sentinels_know_each_other() -> None:
    with servers.sentinel(sentinels=3) as nodes:
        assert len(nodes.ports) == 3
        for node in nodes.sentinels:
            with closing(node.connect()) as client:
                state = client.sentinel_master(nodes.sentinel_master)
                assert (state["quorum"], state["num-other-sentinels"]) == (2, 2)


@pytest.mark.parametrize("kind", [servers.single, servers.cluster, servers.sentinel, servers.tls])
def test_no_process_and_no_folder_is_left(
    kind: Callable[[], AbstractContextManager[RedisServers]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with kind() as nodes:
        pids = [node.pid for node in nodes.nodes]
        nodes.nodes[-1].pause()
        assert [*tmp_path.iterdir()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [*tmp_path.iterdir()] == []


def test_none_outlives_a_killed_starter(tmp_path: Path) -> None:
    with command("infra.redis.servers", "single", "--folder", str(tmp_path)) as starter:
        (port,) = ports_told_by(starter)
        with closing(connect(port)) as client:
            os.kill(client.info()["process_id"], signal.SIGSTOP)
        starter.kill()
    assert comes_true(lambda: not listens(port), 5)


@pytest.mark.parametrize("wish", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_its_servers(wish: signal.Signals) -> None:
    with command("infra.redis.servers", "single") as starter:
        (port,) = ports_told_by(starter)
        assert listens(port)
        starter.send_signal(wish)
        assert starter.wait(10) == 0
        assert not listens(port)


def command(module: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", module, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def ports_told_by(starter: subprocess.Popen[str]) -> list[int]:
    told = yaml.safe_load(starter.stdout.readline() + starter.stdout.readline())
    return [int(address.split(":")[1]) for address in told["connection_string"].split(",")]


def test_a_server_that_ends_at_its_start_says_why() -> None:
    with pytest.raises(ServerNotStarted, match=r"(?s)ended at its start\. Its last words.*no-such-directive"):
        servers.single(directives=["no-such-directive 1"]).__enter__()


def test_a_taken_port_is_named_and_another_found_where_any_will_do(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PortTaken, match=f"{taken} found its port taken by another process"):
        servers.single(port=taken).__enter__()
    offered = iter([[taken], free_ports(1)])
    monkeypatch.setattr(servers, "free_ports", lambda number: next(offered))
    with servers.single() as server:
        assert server.port != taken
        assert set_and_get(server, "here") == "here"


def test_ports_that_are_offered_are_free(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (other,) = free_ports(1)
    monkeypatch.setattr("infra.redis.ports._RANGE", [taken, other])
    assert free_ports(2) == [other]


def test_a_missing_program_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match=r"redis-server is not on this machine\..*apt-get install redis-server,"):
        find("redis-server", tmp_path)


def test_an_unpacked_program_is_found_with_its_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unpacked = [
        tmp_path / "usr" / "bin" / "redis-server",
        tmp_path / "usr" / "lib" / "x86_64-linux-gnu" / "liblzf.so.1",
    ]
    for file in unpacked:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    found = find("redis-server", tmp_path)
    assert found.path == str(unpacked[0])
    assert found.environment["LD_LIBRARY_PATH"] == f"{unpacked[1].parent}{os.pathsep}/mine"


def development(verb: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    """What `make redis-up` and `make redis-down` run."""
    words = [sys.executable, "-m", "infra.redis.development", verb, "--folder", str(folder), "--port", str(port)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def developers(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Folder and port of a server that is up as developers have it."""
    place = tmp_path / "redis", free_ports(1)[0]
    started = development("up", *place)
    assert started.returncode == 0, started.stderr
    yield place
    assert development("down", *place).returncode == 0
    assert not listens(place[1])


def test_the_developers_server_stays_up_and_keeps_its_data(developers: tuple[Path, int]) -> None:
    _, port = developers
    with closing(connect(port)) as client:
        client.set("key", "kept")
    assert "is up already" in development("up", *developers).stdout
    assert "is stopped" in development("down", *developers).stdout
    assert not listens(port)
    assert "is not up" in development("down", *developers).stdout
    assert "is up\n" in development("up", *developers).stdout
    with closing(connect(port)) as client:
        assert client.get("key") == b"kept"


def test_another_at_the_developers_port_is_left_alone(redis_single: SingleServer, tmp_path: Path) -> None:
    refused = development("up", tmp_path, redis_single.port)
    assert refused.returncode == 1
    assert "REDIS_PORT" in refused.stderr
    assert "is not up" in development("down", tmp_path, redis_single.port).stdout
    assert redis_single.nodes[0].answers()


def test_compose_starts_what_developers_have(developers: tuple[Path, int]) -> None:
    service = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]["redis"]
    program, *flags = service["command"]
    assert program == "redis-server"
    told = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    with closing(connect(developers[1], decode_responses=True)) as client:
        assert {name: client.config_get(name)[name] for name in told} == told
    assert {*told} == {"save", "appendonly", "maxmemory-policy"}
    assert service["ports"] == [f"{HOST}:6379:6379"]
