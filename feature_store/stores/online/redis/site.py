"""What the requests to one store share: where it is, who we are there, which node has what, how long they may take."""

from __future__ import annotations

from feature_store.config import OnlineConfig
from feature_store.errors import ConfigError, StoreError
from feature_store.stores.online.redis.failures import Failure, casts_doubt, refusal
from feature_store.stores.online.redis.greeting import Greeting
from feature_store.stores.online.redis.patience import Patience
from feature_store.stores.online.redis.settings import Address, Connection
from feature_store.stores.online.redis.topology import Cluster, Sentinels, Single, Topology


class Site:
    """One store, as its configuration says. Raises ConfigError for what cannot be used."""

    def __init__(self, config: OnlineConfig) -> None:
        self.connection = Connection.parse(config.connection_string)
        self.timeout = config.timeout
        self.clustered = config.redis_type == "redis_cluster"
        self.watched = config.redis_type == "redis_sentinel"
        if self.clustered and self.connection.options.get("db"):
            raise ConfigError("online_store connection_string: a Redis Cluster has no database but 0; leave 'db' out.")
        self.greeting = Greeting(self.connection, master=self.watched)
        self._sentinel_master = config.sentinel_master
        self.begin()

    def begin(self) -> None:
        """As if nothing were known yet."""
        self.topology: Topology
        if self.watched:
            self.topology = Sentinels(self.connection.hosts, self._sentinel_master)
        elif self.clustered:
            self.topology = Cluster(self.connection.hosts)
        else:
            self.topology = Single(self.connection.hosts)

    @property
    def deadline(self) -> float:
        """That of a request which begins now."""
        return Patience(self.timeout).deadline

    def doubted(self, node: Address, failure: Failure) -> Failure:
        """A failure of a node, noted where another node may have taken its place."""
        if casts_doubt(failure):
            self.topology.doubt(node)
        return failure

    def pause(self, patience: Patience, failure: Failure) -> float:
        """Seconds to wait before the next try. Raises StoreError where there is none."""
        pause = patience.pause(failure)
        if pause is None:
            raise self.refusal(patience.reason(failure)) from failure
        return pause

    def refusal(self, failure: Failure) -> StoreError:
        """The error of ours that a failure is."""
        return refusal(self.connection.where, failure, self.timeout)
