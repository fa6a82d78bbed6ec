"""How a refusal reaches a person through Feast's command: one line, exit 1, the registry untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from feature_store.errors import IsochronError


class Refused(click.ClickException):
    """What Feast's command prints as one line; the reason is its cause."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns our errors into refusals for the length of a block."""
    try:
        yield
    except IsochronError as error:
        raise Refused(str(error)) from error
