"""What the columns of a source are read as, whichever engine reads them, and which are refused."""

from __future__ import annotations

import pyarrow as pa

from feature_store.definitions.types import ValueType, of_arrow
from feature_store.definitions.view import StoredView, WindowedView
from feature_store.errors import SourceError
from feature_store.stores.offline.parquet import ParquetFiles


def time_field(files: ParquetFiles, physical: str, needed_by: str) -> pa.Field:
    """A time column by its name in the files. Raises SourceError where it is missing or holds no times."""
    field = files.physical_column(physical, needed_by)
    if of_arrow(field.type) is not ValueType.TIMESTAMP:
        raise SourceError(
            f"{needed_by}: time column '{field.name}' of source '{files.source.name}' ({files.source.path}) is "
            f"{field.type}, not a timestamp. Write it as a timestamp."
        )
    return field


def type_read(view: StoredView, name: str, field: pa.Field, wanted: ValueType | None) -> ValueType:
    """The type that a column is read as: the wanted one, or else that of its file (64 bits wide, if a number).

    Raises SourceError where that is the type of no feature, or one on which an aggregation over it is not defined.
    """
    if wanted is not None:
        return wanted
    place = f"view '{view.name}': column '{field.name}' of source '{view.source.name}' ({view.source.path})"
    if (found := of_arrow(field.type)) is None:
        raise SourceError(f"{place} is {field.type}, which has no equal as a feature. Write it as another type.")
    if isinstance(view, WindowedView) and (unfit := view.unfit(name, found)):
        raise SourceError(
            f"{place} is {field.type}, on which {unfit.function.kind} (aggregation '{unfit.name}') is not defined. "
            "Leave that aggregation out, or write the column as another type."
        )
    return found.widened


def check_readable(files: ParquetFiles, field: pa.Field, wanted: ValueType, needed_by: str) -> None:
    """Raises SourceError where a column cannot be read as its declared type."""
    if not _readable(of_arrow(field.type), wanted):
        raise SourceError(
            f"{needed_by}: column '{field.name}' of source '{files.source.name}' ({files.source.path}) is "
            f"{field.type}, but is declared as {wanted.feast_name}. Correct the declaration, or the file."
        )


def _readable(found: ValueType | None, wanted: ValueType) -> bool:
    """Whether a physical type can be read as a declared one without losing anything but float precision."""
    if found is None or found.is_list != wanted.is_list:
        return False
    have, want = found.element, wanted.element
    if have is want:
        return True
    if want.is_float:
        return have.is_numeric
    return have.is_integer and want.is_integer
