"""The boosted model: what it learns, what it keeps of its training, and what loading refuses."""

from __future__ import annotations

import datetime as dt
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from feature_store.errors import ModelError
from models.booster import FraudModel, ModelCard, feature_matrix, load, load_card, train, version_of
from models.metrics import auc_roc

NAMES = ("card:amount_mean_7d", "terminal:risk", "at night", "nøise")
TRAINED_AT = dt.datetime(2018, 8, 7, 6, 30, tzinfo=dt.UTC)


def drawn(seed: int, rows: int = 4_000) -> tuple[pa.Table, np.ndarray]:
    """Features and labels: the first two features speak for fraud, the others do not; one in ten risks is missing."""
    random = np.random.default_rng(seed)
    amount, risk = random.normal(0, 1, rows), random.normal(0, 1, rows)
    night = random.random(rows) < 0.3
    label = (amount + risk + random.normal(0, 0.5, rows) > 2).astype(np.int64)
    missing = random.random(rows) < 0.1
    columns = [pa.array(amount), pa.array(risk, mask=missing), pa.array(night), pa.array(random.integers(0, 9, rows))]
    return pa.table(columns, names=list(NAMES)), label


@pytest.fixture(scope="module")
def model() -> FraudModel:
    return train(*drawn(seed=1), NAMES, fingerprint="f00d")


@pytest.fixture
def folder(model: FraudModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "model", {"auc_roc": 0.875}, TRAINED_AT)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return feature_matrix(drawn(seed=2)[0], NAMES)


class TestTrain:
    def test_what_speaks_for_fraud_is_learned(self, model: FraudModel, matrix: np.ndarray) -> None:
        probability = model.predict(matrix)
        label = drawn(seed=2)[1]
        assert probability.dtype == np.float64
        assert ((probability >= 0) & (probability <= 1)).all()
        assert auc_roc(probability, label) > 0.93
        # A probability, not only a ranking: on average it is the share of frauds.
        assert probability.mean() == pytest.approx(label.mean(), rel=0.15)
        assert auc_roc(train(drawn(1)[0], drawn(1)[1], NAMES[2:], fingerprint="").predict(matrix[:, 2:]), label) < 0.6

    def test_same_arguments_give_the_same_model_on_any_number_of_threads(
        self, model: FraudModel, matrix: np.ndarray
    ) -> None:
        for threads in (1, 2):
            again = train(*drawn(seed=1), NAMES, fingerprint="f00d", num_threads=threads)
            assert again.version == model.version
            assert again.predict(matrix).tobytes() == model.predict(matrix).tobytes()

    def test_other_rows_or_another_seed_give_another_version(self, model: FraudModel) -> None:
        assert train(*drawn(seed=3), NAMES, fingerprint="f00d").version != model.version
        assert train(*drawn(seed=1), NAMES, seed=1, fingerprint="f00d").version != model.version

    def test_arrow_and_pandas_give_the_same_model_and_columns_are_found_by_name(self, model: FraudModel) -> None:
        features, label = drawn(seed=1)
        frame = features.to_pandas()[list(reversed(NAMES))].assign(other="text")
        assert train(frame, pd.Series(label), NAMES, fingerprint="f00d").version == model.version

    def test_it_carries_its_names_and_fingerprint(self, model: FraudModel) -> None:
        assert (model.feature_names, model.fingerprint) == (NAMES, "f00d")
        assert model.version == version_of(model.booster.model_to_string())
        assert len(model.version) == 16

    @pytest.mark.parametrize(
        ("labels", "problem"),
        [
            ([0, 1], "4,000 rows of features need as many labels"),
            ([0] * 4_000, "labels are 0 and 1, with some of each"),
            ([0, 1, 2] + [0] * 3_997, "labels are 0 and 1, with some of each"),
            ([0, 1, None] + [0] * 3_997, "labels are 0 and 1, with some of each"),
            (["no"] * 4_000, "labels are 0 and 1; these are no numbers"),
        ],
    )
    def test_labels_that_are_none_are_refused(self, labels: list[object], problem: str) -> None:
        with pytest.raises(ModelError, match=problem):
            train(drawn(seed=1)[0], labels, NAMES, fingerprint="")


class TestFeatureMatrix:
    def test_columns_are_in_the_order_of_the_names_with_nulls_as_nan(self) -> None:
        features = pa.table(
            {
                "b": pa.array([1, None, 3]),
                "a": pa.array([True, False, None]),
                "c": pa.array([0.5, 1.5, float("nan")], pa.float32()),
                "d": pa.nulls(3),
            }
        )
        expected = np.array([[1, 1, 0.5, np.nan], [0, np.nan, 1.5, np.nan], [np.nan, 3, np.nan, np.nan]])
        for table in (features, features.to_pandas(), features.to_pandas().convert_dtypes()):
            matrix = feature_matrix(table, ["a", "b", "c", "d"])
            assert matrix.dtype == np.float64
            np.testing.assert_array_equal(matrix, expected)

    def test_what_is_missing_doubled_or_no_number_is_named(self) -> None:
        features = pa.table({"a": [1.0], "t": ["1.5"], "when": pa.array([0], pa.timestamp("us"))})
        with pytest.raises(ModelError, match="the features lack b, c; their columns are: a, t, when"):
            feature_matrix(features, ["b", "a", "c"])
        with pytest.raises(ModelError, match="each named once; named twice: a"):
            feature_matrix(features, ["a", "a"])
        with pytest.raises(ModelError, match="each named once; named twice: none"):
            feature_matrix(features, [])
        for table in (features, features.to_pandas()):
            with pytest.raises(ModelError, match="feature t holds no numbers but string"):
                feature_matrix(table, ["t"])
            with pytest.raises(ModelError, match="feature when holds no numbers but timestamp"):
                feature_matrix(table, ["when"])
        with pytest.raises(ModelError, match="feature a holds no numbers"):
            feature_matrix(pd.DataFrame({"a": [1.0, "x"]}), ["a"])


class TestPredict:
    def test_one_row_scores_as_it_does_among_many(self, model: FraudModel, matrix: np.ndarray) -> None:
        together = model.predict(matrix[:50])
        alone = np.concatenate([model.predict(matrix[row : row + 1]) for row in range(50)])
        assert alone.tobytes() == together.tobytes()

    def test_no_rows_score_as_none(self, model: FraudModel) -> None:
        scores = model.predict(np.empty((0, len(NAMES))))
        assert (scores.shape, scores.dtype) == ((0,), np.float64)

    @pytest.mark.parametrize("shape", [(4,), (3, 3), (3, 5), (1, 1, 4)])
    def test_another_shape_is_refused_with_the_names(self, model: FraudModel, shape: tuple[int, ...]) -> None:
        with pytest.raises(ModelError, match=f"rows of 4 features; got a matrix of shape .*{shape[-1]}.*terminal:risk"):
            model.predict(np.zeros(shape))

    def test_a_null_in_a_feature_never_missing_in_training_counts_as_zero(self, model: FraudModel) -> None:
        null, zero = np.array([[np.nan, 1, 0, 3]]), np.array([[0.0, 1, 0, 3]])
        assert model.predict(null) == model.predict(zero)

    def test_threads_scoring_at_once_get_the_scores_of_one(self, model: FraudModel, matrix: np.ndarray) -> None:
        rows = [matrix[row : row + 1] for row in range(400)]
        with ThreadPoolExecutor(8) as pool:
            at_once = np.concatenate(list(pool.map(model.predict, rows)))
        assert at_once.tobytes() == model.predict(matrix[:400]).tobytes()


class TestSaveAndLoad:
    def test_a_loaded_model_is_the_saved_one(self, model: FraudModel, folder: Path, matrix: np.ndarray) -> None:
        loaded = load(folder)
        assert (loaded.feature_names, loaded.fingerprint, loaded.version) == (NAMES, "f00d", model.version)
        assert loaded.predict(matrix).tobytes() == model.predict(matrix).tobytes()

    def test_saving_a_loaded_model_writes_the_same_bytes(self, folder: Path, tmp_path: Path) -> None:
        load(folder).save(tmp_path / "again", {"auc_roc": 0.875}, TRAINED_AT)
        for name in ("model.txt", "model.json"):
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()

    def test_the_card_says_what_the_model_is(self, model: FraudModel, folder: Path) -> None:
        assert load_card(folder) == ModelCard(NAMES, "f00d", model.version, {"auc_roc": 0.875}, TRAINED_AT)
        assert json.loads((folder / "model.json").read_text()) == {
            "feature_names": list(NAMES),
            "fingerprint": "f00d",
            "metrics": {"auc_roc": 0.875},
            "trained_at": "2018-08-07T06:30:00+00:00",
            "version": model.version,
        }
        assert version_of((folder / "model.txt").read_text()) == model.version

    @pytest.mark.parametrize(
        "trained_at",
        [TRAINED_AT.replace(tzinfo=None), TRAINED_AT.astimezone(dt.timezone(dt.timedelta(hours=-5)))],
    )
    def test_trained_at_is_kept_in_utc(self, model: FraudModel, tmp_path: Path, trained_at: dt.datetime) -> None:
        model.save(tmp_path, {}, trained_at)
        assert json.loads((tmp_path / "model.json").read_text())["trained_at"] == "2018-08-07T06:30:00+00:00"

    @pytest.mark.parametrize("metric", [float("nan"), float("inf")])
    def test_a_metric_that_is_no_number_is_refused_before_anything_is_written(
        self, model: FraudModel, tmp_path: Path, metric: float
    ) -> None:
        with pytest.raises(ModelError, match="metrics that are not finite: ap"):
            model.save(tmp_path / "model", {"ap": metric}, TRAINED_AT)
        assert not (tmp_path / "model").exists()

    def test_nothing_but_the_two_files_is_left(self, folder: Path) -> None:
        assert sorted(os.listdir(folder)) == ["model.json", "model.txt"]

    def test_a_crash_while_writing_leaves_the_old_model_whole(
        self, model: FraudModel, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", broken_disk)
        other = train(*drawn(seed=3), NAMES, fingerprint="beef")
        with pytest.raises(ModelError, match=r"cannot be saved in .*: no space left. Give another folder"):
            other.save(folder, {}, TRAINED_AT)
        assert load(folder).version == model.version

    def test_a_crash_between_the_files_is_refused_by_load(
        self, model: FraudModel, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = train(*drawn(seed=3), NAMES, fingerprint="beef")
        replace = os.replace

        def replace_trees_only(source: Path, target: Path) -> None:
            if target.name == "model.json":
                raise OSError("no space left")
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_trees_only)
        with pytest.raises(ModelError, match="cannot be saved"):
            other.save(folder, {}, TRAINED_AT)
        with pytest.raises(ModelError, match=f"is model {other.version} but .* is of model {model.version}"):
            load(folder)

    @pytest.mark.parametrize("name", ["model.txt", "model.json"])
    def test_a_missing_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(ModelError, match=f"no model in '.*': {name} is missing"):
            load(folder)

    def test_changed_trees_are_refused(self, model: FraudModel, folder: Path) -> None:
        text = (folder / "model.txt").read_text()
        (folder / "model.txt").write_text(text.replace("leaf_value=", "leaf_value=-", 1))
        with pytest.raises(ModelError, match=f"but model.json beside it is of model {model.version}"):
            load(folder)

    def test_a_card_of_other_features_is_refused(self, folder: Path) -> None:
        change_card(folder, feature_names=list(reversed(NAMES)))
        with pytest.raises(
            ModelError, match=r"was trained on 0_card_amount_mean_7d, .* beside it names nøise, at night"
        ):
            load(folder)

    def test_trees_that_are_none_are_refused(self, folder: Path) -> None:
        (folder / "model.txt").write_text("tree\n")
        change_card(folder, version=version_of("tree\n"))
        with pytest.raises(ModelError, match="holds no LightGBM model"):
            load(folder)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [("{", "JSONDecodeError"), ("{}", "KeyError: 'feature_names'"), ("[]", "TypeError"), ("\udcff", "be read")],
    )
    def test_a_card_that_is_none_is_refused(self, folder: Path, text: str, problem: str) -> None:
        (folder / "model.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ModelError, match=problem):
            load(folder)


def broken_disk(_: int) -> None:
    raise OSError("no space left")


def change_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **changes}))
