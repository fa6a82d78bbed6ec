"""Where a view's rows come from."""

from __future__ import annotations

import msgspec


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A Parquet file, folder or glob with an event-time column, as a Feast FileSource declares it.

    `path` is as declared (relative to the repository). `field_mapping` maps physical column names to the names the
    views use; `timestamp_field` and `created_field` are physical names. `delay` (microseconds) is added to the time
    column: a row becomes an event that much later, as a fraud label does. `reads` names the source whose file this
    one reads, so that giving that source another path gives it to this one too. `push_source` is the name under which
    events are pushed.
    """

    name: str
    path: str
    timestamp_field: str
    created_field: str | None = None
    field_mapping: dict[str, str] = {}
    delay: int = 0
    reads: str | None = None
    push_source: str | None = None

    def physical(self, name: str) -> str:
        """The column in the file behind a name, which may be given mapped or as it stands in the file."""
        for raw, mapped in self.field_mapping.items():
            if mapped == name:
                return raw
        return name

    def identity(self) -> dict:
        """What of this source makes a view's values what they are: everything but where the file lies."""
        return {
            "timestamp_field": self.timestamp_field,
            "created_field": self.created_field,
            "field_mapping": dict(sorted(self.field_mapping.items())),
            "delay": self.delay,
        }
