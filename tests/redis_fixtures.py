"""Real Redis servers for tests: each is started when a test first asks for it and serves until the session ends.

Without Redis on the machine such a test fails, and says how to get it. Tests share the servers of their process: flush
before you count on an empty one, and put back what you killed or paused. To set a server up otherwise, start your own
with `infra.redis.servers`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feature_store.config import OnlineConfig
from infra.redis import servers
from infra.redis.groups import Cluster, RedisServers, SentinelServers, SingleServer

#: Fixtures by name, to parametrize with: `@pytest.mark.parametrize("redis_servers", [...], indirect=True)`.
REDIS_FIXTURES = ("redis_single", "redis_cluster", "redis_sentinel", "redis_tls")


@pytest.fixture(scope="session")
def redis_single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleServer]:
    """One server that keeps its data when it is killed and restarted."""
    with servers.single(tmp_path_factory.mktemp("redis_single"), appendonly=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters that keep their data."""
    with servers.cluster(tmp_path_factory.mktemp("redis_cluster"), appendonly=True) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def redis_sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelServers]:
    """A master and a replica that keep their data, and a Sentinel."""
    with servers.sentinel(tmp_path_factory.mktemp("redis_sentinel"), appendonly=True) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleServer]:
    """One server that speaks TLS only, to its user `isochron`; it keeps its data."""
    with servers.tls(tmp_path_factory.mktemp("redis_tls"), appendonly=True) as server:
        yield server


@pytest.fixture(scope="session", params=REDIS_FIXTURES)
def redis_servers(request: pytest.FixtureRequest) -> RedisServers:
    """Each of the above in turn; for some of them parametrize it with their names, `indirect=True`."""
    return request.getfixturevalue(request.param)


def config_of(servers: RedisServers, timeout: float = 10.0) -> OnlineConfig:
    """What a repository's configuration says of these servers."""
    return OnlineConfig(
        "redis",
        redis_type=servers.redis_type,
        connection_string=servers.connection_string,
        sentinel_master=servers.sentinel_master or OnlineConfig.sentinel_master,
        timeout=timeout,
    )
