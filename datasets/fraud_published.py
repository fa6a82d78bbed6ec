"""Card transactions in the published shape of the Fraud Detection Handbook, read from a parquet file of yours.

The data is published at https://github.com/Fraud-Detection-Handbook/simulated-data-raw as one pickle per day; written
to one parquet file it is what `load_published` reads. `datasets.fraud_generator` makes tables of the same shape.
Times are UTC throughout; the published times carry no zone and are read as UTC.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import SourceError
from feature_store.timestamps import micros

TRANSACTIONS_FILE = "transactions.parquet"
CUSTOMERS_FILE = "customers.parquet"

#: One row per card transaction; TX_AMOUNT in currency units, TX_TIME_SECONDS and TX_TIME_DAYS since the first midnight.
TRANSACTIONS = pa.schema(
    [
        ("TRANSACTION_ID", pa.int64()),
        ("TX_DATETIME", pa.timestamp("us")),
        ("CUSTOMER_ID", pa.int64()),
        ("TERMINAL_ID", pa.int64()),
        ("TX_AMOUNT", pa.float64()),
        ("TX_TIME_SECONDS", pa.int64()),
        ("TX_TIME_DAYS", pa.int64()),
        ("TX_FRAUD", pa.int64()),
        ("TX_FRAUD_SCENARIO", pa.int64()),
    ]
)

#: One row per customer: where they live, what and how often they spend. PROFILE_TIME is when the profile is known from.
CUSTOMERS = pa.schema(
    [
        ("CUSTOMER_ID", pa.int64()),
        ("x_customer_id", pa.float64()),
        ("y_customer_id", pa.float64()),
        ("mean_amount", pa.float64()),
        ("std_amount", pa.float64()),
        ("mean_nb_tx_per_day", pa.float64()),
        ("PROFILE_TIME", pa.timestamp("us")),
    ]
)

#: One row per terminal: where it stands.
TERMINALS = pa.schema(
    [("TERMINAL_ID", pa.int64()), ("x_terminal_id", pa.float64()), ("y_terminal_id", pa.float64())],
)

_TRANSACTIONS_NEEDED = ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT", "TX_FRAUD")
_CUSTOMERS_NEEDED = tuple(name for name in CUSTOMERS.names if name != "PROFILE_TIME")

#: Types that each published type can be read from. Not every cast that Arrow allows: an integer is no time.
_READABLE_AS: Mapping[pa.DataType, Sequence[Callable[[pa.DataType], bool]]] = {
    pa.int64(): (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string),
    pa.float64(): (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal),
    pa.timestamp("us"): (pa.types.is_timestamp,),
}


def load_published(path: str | Path) -> pa.Table:
    """The transactions of a parquet file, or of the `transactions.parquet` in a folder, in the file's row order.

    Columns are those of `TRANSACTIONS` that the file has, in its order and types; other columns are left out. The
    published pickles hold identifiers as text: digits are read as numbers. Times with a zone become naive UTC.

    Raises SourceError when the file is missing or is no parquet, when a column that features or labels need
    (TRANSACTION_ID, TX_DATETIME, CUSTOMER_ID, TERMINAL_ID, TX_AMOUNT, TX_FRAUD) is missing or holds nulls, or when a
    column cannot be read as the published type without loss.
    """
    file = _file_in(Path(path), TRANSACTIONS_FILE)
    if not file.is_file():
        raise SourceError(
            f"no transactions at '{file}': there is no such file. Give the path of a parquet file, or of a folder "
            f"that holds {TRANSACTIONS_FILE}."
        )
    return _conform(_read(file), TRANSACTIONS, _TRANSACTIONS_NEEDED, file)


def load_customers(folder: str | Path, profile_time: dt.datetime) -> pa.Table | None:
    """The `customers.parquet` of a folder with the columns of `CUSTOMERS`, or None when there is no such file.

    `folder` may also be the path of a transactions file: the customers are looked for beside it. `profile_time` is
    the event time given to every profile: the file carries no date, so the caller says from when on the profiles
    were known; a naive one is UTC. Raises SourceError as `load_published` does.
    """
    given = Path(folder)
    file = _file_in(given if given.is_dir() else given.parent, CUSTOMERS_FILE)
    if not file.is_file():
        return None
    profiles = _conform(_read(file), CUSTOMERS, _CUSTOMERS_NEEDED, file)
    known_from = pa.repeat(pa.scalar(micros(profile_time), pa.int64()), profiles.num_rows)
    column = CUSTOMERS.field("PROFILE_TIME")
    return profiles.select(_CUSTOMERS_NEEDED).append_column(column, known_from.view(column.type))


def _file_in(given: Path, name: str) -> Path:
    """The file of that name when a folder is given, else the path itself."""
    return given / name if given.is_dir() else given


def _read(file: Path) -> pa.Table:
    """The parquet file as it is; what the file system or the format refuses becomes a SourceError."""
    try:
        # Without this, folder names such as `day=3` would turn into columns.
        return pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException) as cause:
        raise SourceError(
            f"'{file}' cannot be read as parquet: {cause}. Write it again or give another file."
        ) from cause


def _conform(table: pa.Table, shape: pa.Schema, needed: Sequence[str], file: Path) -> pa.Table:
    """The columns of `shape` that the table has, in its types; `needed` ones are all there and without nulls."""
    _check_present(table, needed, file)
    fields = [field for field in shape if field.name in table.column_names]
    columns = [_column_as(table.column(field.name), field, file) for field in fields]
    conformed = pa.table(columns, schema=pa.schema(fields))
    _check_no_nulls(conformed, needed, file)
    return conformed


def _check_present(table: pa.Table, needed: Sequence[str], file: Path) -> None:
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise SourceError(
            f"'{file}' lacks {', '.join(missing)}; its columns are: {', '.join(table.column_names) or 'none'}. Rename "
            f"the columns to the published names ({', '.join(needed)}), or give another file."
        )


def _check_no_nulls(table: pa.Table, needed: Sequence[str], file: Path) -> None:
    counts = {name: table.column(name).null_count for name in needed}
    holes = [f"{name} ({count:,} of {table.num_rows:,} rows)" for name, count in counts.items() if count]
    if holes:
        raise SourceError(f"'{file}' has nulls in {', '.join(holes)}. Leave those rows out, or fill them in.")


def _column_as(column: pa.ChunkedArray, field: pa.Field, file: Path) -> pa.ChunkedArray:
    """The column in the field's type; refused when its type means something else or a value would change."""
    problem = f"column {field.name} of '{file}' has type {column.type}, which cannot be read as {field.type}"
    fix = f"Write the column as {field.type}."
    if not any(readable(column.type) for readable in _READABLE_AS[field.type]):
        raise SourceError(f"{problem}. {fix}")
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as cause:
        raise SourceError(f"{problem} without loss: {cause}. {fix}") from cause
