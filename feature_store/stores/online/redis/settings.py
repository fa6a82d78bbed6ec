"""What a connection string says, in the format of Feast's own Redis store."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from feature_store.errors import ConfigError

#: What a connection string may carry beside hosts, with the type of each value.
_OPTIONS: dict[str, type] = {
    "db": int,
    "username": str,
    "password": str,
    "ssl": bool,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "ssl_cert_reqs": str,
    "ssl_check_hostname": bool,
    "max_connections": int,
}
_DEFAULT_PORT = 6379
_MOST_PORT = 65_535


@dataclass(frozen=True)
class Connection:
    """Where Redis (or its Sentinels) listens, and how it is spoken to. Its text shows no secret."""

    hosts: tuple[tuple[str, int], ...]
    options: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Connection:
        """From `host:port,host:port,db=0,username=...,password=...,ssl=true,ssl_ca_certs=path`.

        Raises ConfigError that names the part which is wrong, but no value: it may be a password.
        """
        hosts, options = [], {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = part.partition("=")
            if equals:
                options[name] = _option(name, value)
            else:
                hosts.append(_host(part))
        if not hosts:
            raise ConfigError("online_store connection_string names no host; write it like localhost:6379,db=0.")
        return cls(tuple(hosts), options)

    @property
    def where(self) -> str:
        """The hosts, for messages."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context to connect with; None for plain connections. Raises ConfigError for unreadable files."""
        if not self.options.get("ssl"):
            return None
        required = self.options.get("ssl_cert_reqs", "required")
        try:
            context = ssl.create_default_context(cafile=self.options.get("ssl_ca_certs"))
            context.check_hostname = self.options.get("ssl_check_hostname", True) and required != "none"
            context.verify_mode = ssl.CERT_NONE if required == "none" else ssl.CERT_REQUIRED
            if certificate := self.options.get("ssl_certfile"):
                context.load_cert_chain(certificate, self.options.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigError(f"online_store connection_string: a TLS file cannot be used: {error}.") from error
        return context


def _host(part: str) -> tuple[str, int]:
    host, colon, port = part.rpartition(":")
    if not colon:
        return part, _DEFAULT_PORT
    if not host or not port.isdigit() or not 0 < int(port) <= _MOST_PORT:
        raise ConfigError(f"online_store connection_string: '{part}' is no host:port.")
    return host.strip("[]"), int(port)


def _option(name: str, value: str) -> Any:
    wanted = _OPTIONS.get(name)
    if wanted is None:
        raise ConfigError(
            f"online_store connection_string: '{name}' is no option; there are: {', '.join(sorted(_OPTIONS))}."
        )
    if wanted is str:
        return value
    try:
        read = json.loads(value.lower())
    except ValueError:
        read = None
    if type(read) is not wanted:
        raise ConfigError(f"online_store connection_string: '{name}' is no {wanted.__name__}.")
    return read
