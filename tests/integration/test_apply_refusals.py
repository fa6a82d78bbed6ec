"""What an apply refuses: one clean line, exit code 1, and the registry as it was, byte for byte."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import run

REFUSALS = {
    "hop that does not divide": (
        'aggregate("max", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH])',
        'aggregate("max", "amount", Float64, windows=[HOUR], slide=timedelta(minutes=7))',
        "hop 7m does not divide its window 1h",
    ),
    "unknown function": (
        'aggregate("max", "amount"',
        'aggregate("median", "amount"',
        "unknown function 'median'",
    ),
    "function that the online store does not keep": (
        'aggregate("max", "amount"',
        'aggregate("approx_quantile_95", "amount"',
        "'approx_quantile_95' is not kept by the online store yet",
    ),
    "a percent beyond 100": (
        'aggregate("max", "amount"',
        'aggregate("approx_quantile_101", "amount"',
        "'approx_quantile_101' asks for more than 100 percent",
    ),
    "schema names another feature": (
        'features=[\n        *aggregate("last"',
        'features=[\n        (aggregate("count", "amount", Int64)[0][0], Field(name="other", dtype=Int64)),\n'
        '        *aggregate("last"',
        "aggregation 'count_amount': is not in the schema",
    ),
    "two aggregations of one name": (
        'name="last_amounts"),',
        'name="last_amounts"),\n'
        '        *aggregate("first", "TX_DATETIME", UnixTimestamp, name="last_transaction_time"),',
        "aggregation 'last_transaction_time': is the name of two aggregations",
    ),
    "windowed view with a ttl": (
        'name="terminal_risk",',
        'name="terminal_risk",\n    ttl=DAY,',
        "a windowed view ends with its windows",
    ),
    "a hop too fine to hold online": (
        'aggregate("std", "amount", Float64, windows=[HOUR, DAY, WEEK, MONTH])',
        'aggregate("std", "amount", Float64, windows=[MONTH], slide=timedelta(seconds=1))',
        "more than the 9,000 an online view may have",
    ),
    "a type the function does not give": (
        'aggregate("mean", "fraud", Float64',
        'aggregate("mean", "fraud", Int64',
        "mean does not give Int64",
    ),
}


def _refused(repo: Path, case: str, *command: str) -> None:
    before, after, reason = REFUSALS[case]
    fraud = repo / "fraud.py"
    text = fraud.read_text()
    assert before in text, case
    fraud.write_text(text.replace(before, after))
    registry = (repo / "data" / "registry.db").read_bytes()
    done = run(repo, *command)
    errors = [line for line in done.stderr.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert done.returncode == 1, (case, done.stdout, done.stderr)
    assert len(errors) == 1, (case, errors)
    assert reason in errors[0], (case, errors)
    assert (repo / "data" / "registry.db").read_bytes() == registry, case


def test_a_bad_view_is_refused_by_feast_apply(fraud_repo: Path, tmp_path: Path) -> None:
    copies = [(case, Path(shutil.copytree(fraud_repo, tmp_path / str(i)))) for i, case in enumerate(REFUSALS)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: _refused(pair[1], pair[0], "feast", "apply"), copies))


def test_a_bad_view_is_refused_by_isochron_apply(repo: Path) -> None:
    _refused(repo, "unknown function", "isochron", "apply", "--repo", ".")


@pytest.mark.parametrize("command", [("feast", "plan"), ("isochron", "apply", "--repo", ".")])
def test_a_bad_service_is_refused_where_feast_shows_it(repo: Path, command: tuple[str, ...]) -> None:
    services = repo / "services.py"
    clash = 'clash = FeatureService(name="clash", features=[customer_spend, customer_spend.with_name("again")])'
    services.write_text(f"{services.read_text()}\n{clash}\n")
    registry = (repo / "data" / "registry.db").read_bytes()
    done = run(repo, *command)
    assert done.returncode == 1, done.stdout
    assert "is the name of two requested features" in done.stderr.splitlines()[-1]
    assert (repo / "data" / "registry.db").read_bytes() == registry
