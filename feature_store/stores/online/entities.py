"""Entities of tables: the bytes of each row's join keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from feature_store.definitions.view import Field
from feature_store.stores.online.keys import entity_key, integer_keys
from feature_store.stores.online.values import from_arrow


def entity_keys(table: pa.Table, keys: Sequence[Field]) -> list[bytes]:
    """The entity key of each row of a table that has no null keys; of a view without keys all are the same."""
    if not keys:
        return [b""] * table.num_rows
    if len(keys) == 1 and keys[0].type.is_integer:
        return integer_keys(np.asarray(table[keys[0].name].combine_chunks()))
    columns = [from_arrow(table[key.name].combine_chunks(), key.type) for key in keys]
    return [entity_key(values) for values in zip(*columns, strict=True)]
