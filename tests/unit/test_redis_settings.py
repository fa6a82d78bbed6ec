"""Connection strings as Feast writes them, and the entries around them: what is read, what refused, what hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from feast.infra.online_stores.redis import RedisOnlineStore

from feature_store.config import OnlineConfig, online_config
from feature_store.errors import ConfigError
from feature_store.stores.online.open import open_backend
from feature_store.stores.online.redis.settings import Connection

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost:6379", [("localhost", 6379)]),
        ("localhost", [("localhost", 6379)]),
        ("a:1,b:65535, c:3", [("a", 1), ("b", 65535), ("c", 3)]),
        ("[::1]:7000,[fe80::1]", [("::1", 7000), ("fe80::1", 6379)]),
        ("db=1,late:7", [("late", 7)]),
        ("a:1,,b:2,", [("a", 1), ("b", 2)]),
    ],
)
def test_hosts_are_read(text: str, hosts: list[tuple[str, int]]) -> None:
    assert Connection.parse(text).hosts == tuple(hosts)


def test_options_are_read_with_their_types() -> None:
    text = (
        "h:1,db=3,username=u,password=a=b:c,ssl=True,ssl_ca_certs=/x y/ca.crt,ssl_check_hostname=false,"
        "ssl_cert_reqs=optional,max_connections=7,skip_full_coverage_check=true"
    )
    assert Connection.parse(text).options == {
        "db": 3,
        "username": "u",
        "password": "a=b:c",
        "ssl": True,
        "ssl_ca_certs": "/x y/ca.crt",
        "ssl_check_hostname": False,
        "ssl_cert_reqs": "optional",
        "max_connections": 7,
        "skip_full_coverage_check": True,
    }


@pytest.mark.parametrize(
    "text", ["h:1,password=secret", 'h:1,password="secret"', "h:1,db=2,ssl=true", "h:1,username=u,password=x=y"]
)
def test_what_feast_reads_is_read_the_same(text: str) -> None:
    nodes, options = RedisOnlineStore._parse_connection_string(text)
    assert Connection.parse(text).options == options
    assert [(node["host"], int(node["port"])) for node in nodes] == [*Connection.parse(text).hosts]


@pytest.mark.parametrize("password", ["0123", "1e5", "true", "null", "12345678901234567890123", '"', "[1]"])
def test_a_password_that_looks_like_json_is_what_was_written(password: str) -> None:
    """Feast makes numbers of them, and another password of some."""
    assert Connection.parse(f"h:1,password={password}").credentials == [password]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h:1", []),
        ("h:1,password=p", ["p"]),
        ("h:1,username=u,password=p", ["u", "p"]),
        ("h:1,username=u", ["u", ""]),
        ("h:1,username=,password=", []),
    ],
)
def test_credentials_are_what_auth_is_told(text: str, words: list[str]) -> None:
    assert Connection.parse(text).credentials == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("db=0", "names no host"),
        ("h:x", "'h:x' is no host:port"),
        ("h:0", "'h:0' is no host:port"),
        ("h:65536", "is no host:port"),
        ("h:-1", "is no host:port"),
        ("h:٣", "is no host:port"),
        (":6379", "is no host:port"),
        ("::1", "is no host:port"),
        ("h:1,db=x", "'db' is no whole number from 0 on"),
        ("h:1,db=-1", "'db' is no whole number from 0 on"),
        ("h:1,db=1.0", "'db' is no whole number"),
        ("h:1,db=true", "'db' is no whole number"),
        ("h:1,max_connections=0", "'max_connections' is no whole number from 1 on"),
        ("h:1,ssl=1", "'ssl' is no true or false"),
        ("h:1,ssl=", "'ssl' is no true or false"),
        ("h:1,sll=true", "'sll' is no option; there are: db, max_connections, password"),
        ("h:1,socket_timeout=3", "'socket_timeout' is no option"),
        ("h:1,ssl=true,ssl_cert_reqs=maybe", "'ssl_cert_reqs' is not one of: none, optional, required"),
        ("h:1,ssl=true,ssl_keyfile=k", "'ssl_keyfile' needs 'ssl_certfile'"),
        ("h:1,ssl_ca_certs=ca.crt", "'ssl_ca_certs' has no effect without ssl=true"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Connection.parse(text)
    assert str(refused.value).startswith("online_store connection_string")


@pytest.mark.parametrize(
    "text",
    [
        f"h:1,password=a,{SECRET}:x",
        f"h:1,password=a,{SECRET}=x",
        f"h:1,username=u,password=a,b:{SECRET}",
        f"redis://user:{SECRET}@h:6379/0",
        f"redis://user:{SECRET}@h:6379",
        f"h:1,db={SECRET}",
        f"h:1,ssl={SECRET}",
        f"h:1,passwd={SECRET}",
    ],
)
def test_no_secret_is_shown_where_one_was_written_wrongly(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Connection.parse(text)
    assert SECRET not in str(refused.value)


def test_no_secret_is_shown_by_what_holds_one() -> None:
    config = OnlineConfig("redis", connection_string=f"h:1,username=u,password={SECRET}")
    connection = Connection.parse(config.connection_string)
    backend = open_backend(config)
    shown = [repr(config), str(config), repr(connection), str(connection), connection.where, repr(backend)]
    assert SECRET not in "".join(shown)
    assert (connection.where, "'h', 1" in repr(connection)) == ("h:1", True)


@pytest.mark.parametrize("option", ["ssl_ca_certs=/no/such.crt", f"ssl_certfile={__file__}"])
def test_tls_files_that_cannot_be_used_are_refused_at_once(option: str) -> None:
    backend = open_backend(OnlineConfig("redis", connection_string=f"127.0.0.1:1,ssl=true,{option}", timeout=60.0))
    with pytest.raises(ConfigError, match="a file of the ssl options cannot be used"):
        backend.get([b"{00}key"])


def test_a_cluster_has_one_database() -> None:
    with pytest.raises(ConfigError, match="no database but 0"):
        open_backend(OnlineConfig("redis", redis_type="redis_cluster", connection_string="h:1,db=1"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"backend": "dynamo"}, "backend 'dynamo' is not one of: embedded, redis"),
        ({"backend": "redis", "redis_type": "redis_ring"}, "redis_type 'redis_ring' is not one of: redis, redis_cl"),
        ({"backend": "redis", "timeout": 0}, "timeout must be a number of seconds, above 0"),
        ({"backend": "redis", "timeout": -1}, "timeout must be"),
        ({"backend": "redis", "timeout": "2"}, "timeout must be"),
        ({"backend": "redis", "timeout": True}, "timeout must be"),
        ({"backend": "redis", "timeout": None}, "timeout must be"),
        ({"backend": "redis", "timeout": float("nan")}, "timeout must be"),
        ({"backend": "redis", "timeout": float("inf")}, "timeout must be"),
        ({"path": 5}, "path must be text, not 5"),
        ({"backend": "redis", "sentinel_master": ["m"]}, "sentinel_master must be text"),
    ],
)
def test_entries_that_cannot_be_used_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        online_config(Path("/repo"), entries)


@pytest.mark.parametrize("value", [6379, ["localhost:6379"], {"host": "h"}])
def test_a_connection_string_that_is_no_text_is_refused(value: Any) -> None:
    config = online_config(Path("/repo"), {"backend": "redis", "connection_string": value})
    with pytest.raises(ConfigError, match="must be text like"):
        open_backend(config)


def test_entries_are_read_as_feast_names_them() -> None:
    entries = {
        "backend": "redis",
        "redis_type": "redis_sentinel",
        "sentinel_master": "features",
        "connection_string": "s1:26379,s2:26379,password=p",
        "timeout": 1,
    }
    read = online_config(Path("/repo"), entries)
    assert (read.redis_type, read.sentinel_master, read.timeout) == ("redis_sentinel", "features", 1.0)
    assert Connection.parse(read.connection_string).hosts == (("s1", 26379), ("s2", 26379))
    assert online_config(Path("/repo"), {"backend": "redis"}).connection_string == "localhost:6379"
