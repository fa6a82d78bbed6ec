"""Training sets: rows with their features in Parquet, and a manifest from which the same bytes are made again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.definitions.erasure import Erasure, Erasures, LoadErasures, no_erasures, values_in
from feature_store.definitions.repository import Definitions, Request
from feature_store.definitions.view import FeatureRef
from feature_store.engines.engine import DistributedEngine, Engine
from feature_store.errors import TrainingSetError, UnknownName
from feature_store.plan.historical import plan_historical
from feature_store.retrieval.historical import HistoricalFeatures, write_parquet
from feature_store.stores.offline.parquet import open_source
from feature_store.timestamps import iso

FORMAT = 1
DATA, SPINE, MANIFEST = "data.parquet", "spine.parquet", "manifest.json"

#: Rows of a row group: fixed, so that equal rows make equal bytes.
_GROUP_ROWS = 131_072
_PACKAGES = ("isochron-features", "duckdb", "pyarrow", "numpy", "pandas")


class FileVersion(msgspec.Struct, frozen=True):
    """A file of a source as it was read: its path (relative to the repository where it lies in it) and content."""

    path: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a training set was made of.

    `features` are the references in column order (`service` names the service that listed them); `definitions` is the
    fingerprint of every view behind them, `plan` that of the stages; `commit` is the repository's git commit (None
    where it is not under git) and `uncommitted` whether its tracked files differed; `sources` holds the files read of
    each source; `spine` and `data` are the SHA-256 of the two Parquet files beside the manifest. `erasures` counts
    those that left out records of these features' views.
    """

    format: int = FORMAT
    project: str
    service: str | None
    features: tuple[FeatureRef, ...]
    full_feature_names: bool
    knowledge_time: bool
    definitions: str
    plan: str
    commit: str | None
    uncommitted: bool
    sources: dict[str, tuple[FileVersion, ...]]
    spine: str
    data: str
    rows: int
    columns: tuple[str, ...]
    engine: str
    versions: dict[str, str]
    made_at: str
    erasures: int = 0

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a manifest file; raises TrainingSetError when it is none, or of another format."""
        try:
            loaded = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise TrainingSetError(f"{path} is no manifest of a training set ({error}).") from error
        if loaded.format != FORMAT:
            raise TrainingSetError(f"{path} has format {loaded.format}, this version reads {FORMAT}.")
        return loaded


class TrainingSet(msgspec.Struct, frozen=True):
    """A written training set: the folder, and what it was made of."""

    path: Path
    manifest: Manifest

    @property
    def data(self) -> Path:
        """The Parquet file with the rows."""
        return self.path / DATA

    def to_arrow(self) -> pa.Table:
        return pq.read_table(self.data)

    def to_df(self) -> Any:
        return self.to_arrow().to_pandas()


def write_training_set(
    request: Request,
    spine: pa.Table,
    engine: Engine | DistributedEngine,
    root: Path,
    path: Path,
    made_at: int,
    knowledge_time: bool = False,
    expected: Manifest | None = None,
    erasures: LoadErasures = no_erasures,
) -> TrainingSet:
    """Writes the folder `path` with the rows, the spine and the manifest; it is there whole or not at all. `erasures`
    are the engine's.

    Raises TrainingSetError where the folder exists already, where a source's file changed or an entity was erased while
    it was read, or where the bytes are not those of the `expected` manifest.
    """
    commit, uncommitted = _git_state(root)
    with _new_folder(path) as folder:
        # Read back, so that a rebuild, which has this file only, begins with the same types.
        spine = pq.read_table(write_parquet(spine, folder / SPINE))
        sources, erased = _snapshot(request, root), _touching(request, erasures())
        rows, columns = _write_rows(HistoricalFeatures(request, spine, engine, knowledge_time), folder / DATA)
        if (after := _snapshot(request, root)) != sources:
            changed = [name for name in sources if after[name] != sources[name]]
            raise TrainingSetError(f"source '{changed[0]}' changed while it was read; run it again.")
        if _touching(request, erasures()) != erased:
            raise TrainingSetError("an entity of these features was erased while they were read; run it again.")
        manifest = Manifest(
            project=request.definitions.project,
            service=request.service,
            features=request.refs,
            full_feature_names=request.full_names,
            knowledge_time=knowledge_time,
            definitions=request.fingerprint,
            plan=plan_historical(request, knowledge_time).fingerprint,
            commit=commit,
            uncommitted=uncommitted,
            sources=sources,
            spine=_sha256(folder / SPINE),
            data=_sha256(folder / DATA),
            rows=rows,
            columns=columns,
            engine=type(engine).__name__,
            versions=_versions(),
            made_at=iso(made_at),
            erasures=len(erased),
        )
        if expected is not None:
            _check_same(expected, manifest, erased[expected.erasures :])
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return TrainingSet(path, manifest)


def _touching(request: Request, erasures: Erasures) -> list[Erasure]:
    """The erasures that leave out records of a request's views, in order."""
    views = [view.keys for view, _ in request.by_view()]
    return [e for e in erasures.log if any(values_in(e.keys, keys) is not None for keys in views)]


def _check_same(expected: Manifest, made: Manifest, erased: Sequence[Erasure]) -> None:
    """Raises TrainingSetError where the rebuilt bytes differ, with what was used then and is not now, and what was
    `erased` since.
    """
    if (made.data, made.rows, made.plan) == (expected.data, expected.rows, expected.plan):
        return
    then, now = {"engine": expected.engine, **expected.versions}, {"engine": made.engine, **made.versions}
    other = [f"{name} {value} (now {now.get(name)})" for name, value in then.items() if now.get(name) != value]
    since = f"; {_said(erased)}" if erased else ""
    raise TrainingSetError(
        f"the rebuilt rows are not the manifest's bytes{since}; what made them then: "
        f"{', '.join(other) or 'the same as now'}."
    )


def _said(erased: Sequence[Erasure]) -> str:
    """Erasures in words, without whom they erased."""
    keys = ", ".join(sorted({" and ".join(erasure.keys) for erasure in erased}))
    last = iso(max(erasure.erased_at for erasure in erased))
    return f"erased since: {len(erased)} by {keys}, the last at {last}, whose records no training set has any more"


def _versions() -> dict[str, str]:
    """What computes and writes the rows, on-demand views included."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def rebuild_training_set(
    manifest_file: Path,
    definitions: Definitions,
    engine: Engine | DistributedEngine,
    root: Path,
    path: Path,
    made_at: int,
    erasures: LoadErasures = no_erasures,
) -> TrainingSet:
    """Makes a training set again from its manifest (the spine lies beside it) and checks that the bytes are the same.

    Raises TrainingSetError that says what differs: the definitions, a source's file, the spine, or at last the bytes
    (then with what was erased since, and the packages whose versions differ).
    """
    manifest_file = manifest_file / MANIFEST if manifest_file.is_dir() else manifest_file
    manifest = Manifest.load(manifest_file)
    spine_file = manifest_file.with_name(SPINE)
    if not spine_file.is_file() or _sha256(spine_file) != manifest.spine:
        raise TrainingSetError(f"the spine {spine_file} is not the one the manifest names; put it back.")
    request = _same_request(manifest, definitions)
    _check_sources(manifest, _snapshot(request, root))
    return write_training_set(
        request, pq.read_table(spine_file), engine, root, path, made_at, manifest.knowledge_time, manifest, erasures
    )


def _same_request(manifest: Manifest, definitions: Definitions) -> Request:
    commit = f"commit {manifest.commit}" if manifest.commit else "the definitions of that time"
    changed = TrainingSetError(
        f"the definitions behind {manifest.service or 'the features'} changed since; check out {commit} and apply."
    )
    try:
        request = definitions.request(manifest.features, manifest.full_feature_names, manifest.service)
    except UnknownName as error:
        raise changed from error
    if request.fingerprint != manifest.definitions:
        raise changed
    return request


def _check_sources(manifest: Manifest, now: dict[str, tuple[FileVersion, ...]]) -> None:
    for name, files in manifest.sources.items():
        then, present = {f.path: f for f in files}, {f.path: f for f in now.get(name, ())}
        for path in sorted(then.keys() | present.keys()):
            if then.get(path) != present.get(path):
                what = "is new" if path not in then else "is gone" if path not in present else "has other content"
                raise TrainingSetError(f"source '{name}': {path} {what}; give the files that the manifest names.")


def _snapshot(request: Request, root: Path) -> dict[str, tuple[FileVersion, ...]]:
    """The files behind each source of a request, by content."""
    sources = {view.source.name: view.source for view, _ in request.by_view()}
    files = {name: open_source(source, root).files for name, source in sorted(sources.items())}
    known = {file: _version(file, root) for file in sorted({file for every in files.values() for file in every})}
    return {name: tuple(known[file] for file in every) for name, every in files.items()}


def _version(file: str, root: Path) -> FileVersion:
    return FileVersion(_named(file, root), os.path.getsize(file), _sha256(Path(file)))


def _named(file: str, root: Path) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(root.resolve())) if path.is_relative_to(root.resolve()) else str(path)


def _write_rows(features: HistoricalFeatures, path: Path) -> tuple[int, tuple[str, ...]]:
    """Writes the rows in row groups of a fixed size; how many there are, and their columns."""
    writer = None
    for group in _groups(features.batches()):
        writer = writer or pq.ParquetWriter(path, group.schema, compression="zstd")
        writer.write_table(group, row_group_size=_GROUP_ROWS)
    assert writer is not None, "batches() gives one batch at least"
    writer.close()
    return pq.read_metadata(path).num_rows, tuple(writer.schema.names)


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        while sum(map(len, held)) >= _GROUP_ROWS:
            table = pa.Table.from_batches(held)
            yield table.slice(0, _GROUP_ROWS).combine_chunks()
            held = table.slice(_GROUP_ROWS).to_batches()
    if held:
        yield pa.Table.from_batches(held).combine_chunks()


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and goes otherwise."""
    if path.exists():
        raise TrainingSetError(f"{path} exists already; a training set is never overwritten. Choose another folder.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError as error:
            raise TrainingSetError(f"{path} was made by somebody else meanwhile, or cannot be ({error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_state(root: Path) -> tuple[str | None, bool]:
    """The commit of the repository's folder and whether its tracked files differ from it; (None, False) without git."""
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None, False
    return run[0].strip(), bool(run[1].strip())
