"""What a connection string says, in the format of Feast's own Redis store."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from feature_store.errors import ConfigError

Address = tuple[str, int]

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
    # Feast's own example has it; there is nothing to skip here.
    "skip_full_coverage_check": bool,
}
_LEAST = {"db": 0, "max_connections": 1}
_VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
_DEFAULT_PORT = 6379
_MOST_PORT = 65_535
_WHAT = "online_store connection_string"


@dataclass(frozen=True)
class Connection:
    """Where Redis (or its Sentinels) listens, and how it is spoken to. Its text shows no secret."""

    hosts: tuple[Address, ...]
    options: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Connection:
        """From `host:port,host:port,db=0,username=...,password=...,ssl=true,ssl_ca_certs=path`.

        Raises ConfigError that tells which part is wrong by its place or name, and shows nothing behind the first
        option: a password that holds a comma goes on there.
        """
        if not isinstance(text, str):
            raise ConfigError(f"{_WHAT} must be text like localhost:6379,db=0.")
        hosts: list[Address] = []
        options: dict[str, Any] = {}
        for place, part in enumerate(text.split(","), 1):
            name, equals, value = part.strip().partition("=")
            if equals:
                options[name.rstrip()] = _option(name.rstrip(), value.lstrip(), place, shown="password" not in options)
            elif name:
                hosts.append(_host(name, place, shown=not options))
        if not hosts:
            raise ConfigError(f"{_WHAT} names no host; write it like localhost:6379,db=0.")
        _check_together(options)
        return cls(tuple(hosts), options)

    @property
    def where(self) -> str:
        """The hosts, for messages."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)

    @property
    def credentials(self) -> list[str]:
        """What AUTH is told; empty where nobody has to say who they are."""
        user, password = self.options.get("username"), self.options.get("password")
        if user:
            return [user, password or ""]
        return [password] if password else []

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context to connect with; None for plain connections. Raises ConfigError for files it cannot use."""
        if not self.options.get("ssl"):
            return None
        verify = _VERIFY[self.options.get("ssl_cert_reqs", "required")]
        try:
            context = ssl.create_default_context(cafile=self.options.get("ssl_ca_certs"))
            context.check_hostname = self.options.get("ssl_check_hostname", True) and verify is not ssl.CERT_NONE
            context.verify_mode = verify
            if certificate := self.options.get("ssl_certfile"):
                context.load_cert_chain(certificate, self.options.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigError(f"{_WHAT}: a file of the ssl options cannot be used: {error}.") from error
        return context


def _host(part: str, place: int, shown: bool) -> Address:
    host, colon, port = part.rpartition(":")
    if not colon or part.endswith("]"):
        host, port = part, str(_DEFAULT_PORT)
    bare = host.removeprefix("[").removesuffix("]")
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not bare or (":" in bare and bare == host) or not 0 < number <= _MOST_PORT:
        # A URL, which this is not, would have a password before the @.
        named = f"'{part}'" if shown and "@" not in part else _unnamed(place)
        raise ConfigError(f"{_WHAT}: {named} is no host:port.")
    return bare, number


def _unnamed(place: int) -> str:
    return f"part {place} (no value can hold a comma; a URL is not taken)"


def _option(name: str, value: str, place: int, shown: bool) -> Any:
    wanted = _OPTIONS.get(name)
    if wanted is None:
        named = f"'{name}'" if shown else _unnamed(place)
        raise ConfigError(f"{_WHAT}: {named} is no option; there are: {', '.join(sorted(_OPTIONS))}.")
    read = _text(value) if wanted is str else _json(value.lower())
    if type(read) is not wanted or (isinstance(read, int) and read < _LEAST.get(name, 0)):
        raise ConfigError(f"{_WHAT}: '{name}' is no {_named(name, wanted)}.")
    return read


def _named(name: str, wanted: type) -> str:
    if wanted is int:
        return f"whole number from {_LEAST[name]} on"
    return "true or false" if wanted is bool else wanted.__name__


def _text(value: str) -> str:
    """A text as it stands, or as JSON where it is in quotes: Feast reads both. Other JSON stays text: `0123`, `1e5`."""
    read = _json(value)
    return read if isinstance(read, str) else value


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return None


def _check_together(options: Mapping[str, Any]) -> None:
    if options.get("ssl_cert_reqs", "none") not in _VERIFY:
        raise ConfigError(f"{_WHAT}: 'ssl_cert_reqs' is not one of: {', '.join(_VERIFY)}.")
    if options.get("ssl_keyfile") and not options.get("ssl_certfile"):
        raise ConfigError(f"{_WHAT}: 'ssl_keyfile' needs 'ssl_certfile'.")
    asked = sorted(name for name in options if name.startswith("ssl_"))
    if asked and "ssl" not in options:
        raise ConfigError(f"{_WHAT}: '{asked[0]}' has no effect without ssl=true (or ssl=false); say which.")
