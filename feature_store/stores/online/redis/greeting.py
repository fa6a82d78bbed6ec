"""What is said first on every connection to a server that holds data, and what its answers must be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import hiredis

from feature_store.errors import ConfigError
from feature_store.stores.online.redis.failures import NotNow, failure_of
from feature_store.stores.online.redis.packing import pack
from feature_store.stores.online.redis.settings import Address, Connection

logger = logging.getLogger(__name__)

#: The policy under which Redis throws no values away by itself; what begins with the other spares keys that have no
#: expiry, and ours have none.
_POLICY, _SPARING = "noeviction", "volatile-"


@dataclass
class Greeting:
    """Who we are, which database is meant, and a look at how the server is.

    On every connection, not once: after a failover or a restart the server behind an address may be another one.
    `master` says that a replica will not do: what it holds may be old.
    """

    connection: Connection
    master: bool = False
    _unchecked: set[Address] = field(default_factory=set)

    @cached_property
    def _commands(self) -> list[bytes]:
        commands = []
        if credentials := self.connection.credentials:
            commands.append(pack("AUTH", *credentials))
        if database := self.connection.options.get("db"):
            commands.append(pack("SELECT", database))
        return [*commands, pack("INFO")]

    @cached_property
    def data(self) -> bytes:
        return b"".join(self._commands)

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self._commands)

    def check(self, answers: Sequence[Any], address: Address) -> str:
        """The server's run id, "" where it may not be asked. Raises Failure, or ConfigError for its policy."""
        *before, info = answers
        for answer in before:
            if isinstance(answer, hiredis.ReplyError):
                raise failure_of(str(answer))
        if isinstance(info, hiredis.ReplyError):
            if not str(info).startswith("NOPERM"):
                raise failure_of(str(info))
            self._note_unchecked(address)
            return ""
        told = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        self._check_policy(told.get("maxmemory_policy", _POLICY), address)
        if self.master and told.get("role", "master") != "master":
            raise NotNow("DEMOTED a replica is named as the master")
        return told.get("run_id", "")

    def _check_policy(self, policy: str, address: Address) -> None:
        """A value that was thrown away would be read as none."""
        if policy != _POLICY and not policy.startswith(_SPARING):
            raise ConfigError(
                f"Redis at {address[0]}:{address[1]} has maxmemory-policy {policy} and would throw features away when "
                f"it is full; set maxmemory-policy {_POLICY} (or one of {_SPARING}..., which spares them)."
            )

    def _note_unchecked(self, address: Address) -> None:
        if address not in self._unchecked:
            self._unchecked.add(address)
            logger.warning("the user may not ask Redis at %s:%d for INFO: maxmemory-policy is unchecked", *address)
