"""A gradient-boosted fraud model on a feature service's features: trained, kept in a folder, and loaded to serve.

A model is only as good as the features it is fed, so it carries their names in order and the fingerprint of their
definitions; whoever serves it compares both with what the service delivers.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from feature_store.errors import ModelError
from feature_store.files import replacing

MODEL_FILE, CARD_FILE = "model.txt", "model.json"

#: Small trees with well-filled leaves, few of them: a training week holds some hundred frauds, and larger trees
#: (31 leaves of 20 rows, LightGBM's defaults) learn them by heart.
ROUNDS = 100
_PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 50,
    "verbosity": -1,
    # Equal input gives equal trees: without these the sums of a histogram depend on threads and on measured speed.
    "deterministic": True,
    "force_row_wise": True,
}

#: Arrow types that a feature may have; a column of nulls only has the type null.
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)


@dataclass(frozen=True)
class ModelCard:
    """What is written beside a model's trees.

    `feature_names` in the order of the matrix' columns, `fingerprint` of the features' definitions, `version` of the
    trees (see `version_of`), `metrics` by name on rows that the training did not see, `trained_at` in UTC.
    """

    feature_names: tuple[str, ...]
    fingerprint: str
    version: str
    metrics: Mapping[str, float]
    trained_at: dt.datetime


@dataclass(frozen=True, eq=False)
class FraudModel:
    """Trees, and what they were trained on: names of the features in order, and the fingerprint of their definitions.

    `version` names the trees: equal versions give equal predictions. Safe to use from several threads.
    """

    booster: lgb.Booster
    feature_names: tuple[str, ...]
    fingerprint: str
    version: str

    def predict(self, matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """The probability of fraud, float64[n] in [0, 1], of each row of a float[n, features] matrix.

        Columns are in the order of `feature_names`. NaN is a missing value; in a feature that was never missing in
        training it counts as 0, as LightGBM has it. Raises ModelError for another shape.
        """
        if matrix.ndim != 2 or matrix.shape[1] != len(self.feature_names):
            raise ModelError(
                f"model {self.version} scores rows of {len(self.feature_names)} features; got a matrix of shape "
                f"{matrix.shape}. Give the columns {', '.join(self.feature_names)}, in this order."
            )
        if len(matrix) == 0:
            return np.empty(0, dtype=np.float64)
        # Waking a pool of threads costs more than scoring one row; 0 is all cores.
        return self.booster.predict(matrix, num_threads=1 if len(matrix) == 1 else 0)

    def save(self, folder: str | Path, metrics: Mapping[str, float], trained_at: dt.datetime) -> None:
        """Write the trees and the card into the folder, which is made when it is not there.

        `metrics` are finite numbers by name; a naive `trained_at` is UTC. Each file appears whole or not at all, the
        card last: a crash between the two leaves a folder that `load` refuses, so give each model a folder of its own.

        Raises ModelError when a metric is not finite or the folder cannot be written.
        """
        card = ModelCard(self.feature_names, self.fingerprint, self.version, dict(metrics), _in_utc(trained_at))
        files = {MODEL_FILE: self.booster.model_to_string(), CARD_FILE: _card_text(card)}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                _write(Path(folder) / name, text)
        except OSError as cause:
            raise ModelError(
                f"model {self.version} cannot be saved in '{folder}': {cause}. Give another folder."
            ) from cause


def train(
    features: pa.Table | pd.DataFrame,
    labels: npt.ArrayLike,
    feature_names: Sequence[str],
    seed: int = 0,
    *,
    fingerprint: str,
    num_threads: int = 1,
) -> FraudModel:
    """A model trained on the named columns of the features and their labels, 0 or 1, [n], row by row.

    `fingerprint` is that of the definitions the features were computed from. Nulls are missing values, which the
    trees handle. Equal arguments give an equal model, whatever `num_threads` is.

    Raises ModelError when a column is missing or named twice or holds no numbers, or when the labels are not 0 and 1,
    both of them, one per row.
    """
    matrix = feature_matrix(features, feature_names)
    truth = _truth(labels, len(matrix))
    data = lgb.Dataset(matrix, truth, feature_name=_names_for_lightgbm(feature_names))
    booster = lgb.train({**_PARAMETERS, "seed": seed, "num_threads": num_threads}, data, num_boost_round=ROUNDS)
    kept = lgb.Booster(model_str=_without_threads(booster.model_to_string()))
    return FraudModel(kept, tuple(feature_names), fingerprint, version_of(kept.model_to_string()))


def load(folder: str | Path) -> FraudModel:
    """The model that `FraudModel.save` wrote into the folder.

    Raises ModelError when a file is missing or cannot be read, or when the trees and the card are not of one model.
    """
    card = load_card(folder)
    file = Path(folder) / MODEL_FILE
    text = _text(file)
    found = version_of(text)
    if found != card.version:
        raise ModelError(
            f"'{file}' is model {found} but {CARD_FILE} beside it is of model {card.version}: the save was broken off "
            "or a file was changed. Save the model again."
        )
    booster = _booster(text, file)
    if booster.feature_name() != _names_for_lightgbm(card.feature_names):
        raise ModelError(
            f"'{file}' was trained on {', '.join(booster.feature_name())}, but {CARD_FILE} beside it names "
            f"{', '.join(card.feature_names)}. Save the model again."
        )
    return FraudModel(booster, card.feature_names, card.fingerprint, card.version)


def load_card(folder: str | Path) -> ModelCard:
    """The card of the model in the folder, without its trees. Raises ModelError when it is missing or incomplete."""
    file = Path(folder) / CARD_FILE
    try:
        held = json.loads(_text(file))
        return ModelCard(
            feature_names=tuple(held["feature_names"]),
            fingerprint=held["fingerprint"],
            version=held["version"],
            metrics=held["metrics"],
            trained_at=dt.datetime.fromisoformat(held["trained_at"]),
        )
    except (ValueError, KeyError, TypeError) as cause:
        raise ModelError(
            f"'{file}' is no model card ({type(cause).__name__}: {cause}). Save the model again."
        ) from cause


def version_of(model_text: str) -> str:
    """The version that names a model: the first 16 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(model_text.encode()).hexdigest()[:16]


def feature_matrix(features: pa.Table | pd.DataFrame, feature_names: Sequence[str]) -> npt.NDArray[np.float64]:
    """float64[n, features] of the named columns in the given order, nulls as NaN: the input of train and predict.

    Raises ModelError when a column is missing, named twice, or holds no numbers.
    """
    _check_names(features, feature_names)
    matrix = np.empty((len(features), len(feature_names)), dtype=np.float64)
    for position, name in enumerate(feature_names):
        matrix[:, position] = _numbers(features[name], name)
    return matrix


def _check_names(features: pa.Table | pd.DataFrame, feature_names: Sequence[str]) -> None:
    columns = list(features.column_names if isinstance(features, pa.Table) else features.columns)
    missing = [name for name in feature_names if name not in columns]
    if missing:
        raise ModelError(f"the features lack {', '.join(missing)}; their columns are: {', '.join(map(str, columns))}.")
    twice = sorted({name for name in feature_names if feature_names.count(name) > 1 or columns.count(name) > 1})
    if twice or not feature_names:
        raise ModelError(f"a model needs features, each named once; named twice: {', '.join(twice) or 'none'}.")


def _numbers(column: pa.ChunkedArray | pd.Series, name: str) -> npt.NDArray[np.float64]:
    """float64[n] of a column of numbers or booleans, nulls as NaN."""
    try:
        values = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([pa.Array.from_pandas(column)])
    except pa.ArrowException as cause:
        raise ModelError(f"feature {name} holds no numbers: {cause}.") from cause
    if not any(is_number(values.type) for is_number in _NUMBERS):
        raise ModelError(f"feature {name} holds no numbers but {values.type}; leave it out, or encode it as a number.")
    # Unsafe only in that an integer beyond 2**53 is rounded: a tree's threshold could not tell it apart either.
    return values.cast(pa.float64(), safe=False).to_numpy()


def _truth(labels: npt.ArrayLike, rows: int) -> npt.NDArray[np.float64]:
    """Labels as float64[n], as many as rows, with both kinds among them."""
    try:
        truth = np.asarray(labels, dtype=np.float64)
    except (TypeError, ValueError) as cause:
        raise ModelError(f"labels are 0 and 1; these are no numbers: {cause}.") from cause
    if truth.shape != (rows,):
        raise ModelError(f"{rows:,} rows of features need as many labels; got labels of shape {truth.shape}.")
    if not np.array_equal(np.unique(truth), (0, 1)):
        raise ModelError(f"labels are 0 and 1, with some of each; got {np.unique(truth)[:5]} among {rows:,} rows.")
    return truth


def _names_for_lightgbm(feature_names: Sequence[str]) -> list[str]:
    """Names for the model's text, in which LightGBM allows no `view:feature`; the position keeps them distinct."""
    return [f"{position}_{re.sub(r'[^A-Za-z0-9_]', '_', name)}" for position, name in enumerate(feature_names)]


def _without_threads(model_text: str) -> str:
    """The model's text as if trained on all cores: how many there were changes no tree, so not the version either."""
    return re.sub(r"^\[num_threads: \d+\]$", "[num_threads: 0]", model_text, flags=re.MULTILINE)


def _booster(text: str, file: Path) -> lgb.Booster:
    try:
        return lgb.Booster(model_str=text)
    except lgb.basic.LightGBMError as cause:
        raise ModelError(f"'{file}' holds no LightGBM model: {cause}. Save the model again.") from cause


def _in_utc(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.UTC) if moment.tzinfo else moment.replace(tzinfo=dt.UTC)


def _card_text(card: ModelCard) -> str:
    """The card as JSON: sorted and indented, since people compare cards."""
    unusable = [name for name, figure in card.metrics.items() if not math.isfinite(figure)]
    if unusable:
        raise ModelError(
            f"model {card.version} has metrics that are not finite: {', '.join(unusable)}. Leave them out."
        )
    held: dict[str, Any] = {
        "feature_names": list(card.feature_names),
        "fingerprint": card.fingerprint,
        "metrics": {name: float(figure) for name, figure in card.metrics.items()},
        "trained_at": card.trained_at.isoformat(),
        "version": card.version,
    }
    return json.dumps(held, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _text(file: Path) -> str:
    try:
        # newline="" keeps line ends as they are: the version is that of the bytes.
        with file.open(encoding="utf-8", newline="") as opened:
            return opened.read()
    except FileNotFoundError as cause:
        raise ModelError(f"no model in '{file.parent}': {file.name} is missing. Train and save one there.") from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise ModelError(f"'{file}' cannot be read: {cause}.") from cause


def _write(file: Path, text: str) -> None:
    """Put the text at the path whole or not at all: a neighbour is written, flushed to disk, and renamed."""
    with replacing(file) as partial, partial.open("wb") as opened:
        opened.write(text.encode())
        opened.flush()
        os.fsync(opened.fileno())
