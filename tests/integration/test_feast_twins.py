"""Random definitions on Feast's own Redis store and on ours: the same answers, but for listed differences.

`ISOCHRON_TWINS_SEED` chooses other definitions, rows and requests than those that every run compares. Differences and
their reasons are in twins/reasons.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
from click.testing import CliRunner
from feast import FeatureStore
from feast.cli.cli import cli

from feature_store import FeatureLayer
from feature_store.clock import SystemClock
from feature_store.timestamps import HOUR
from infra.redis.groups import SingleServer
from tests.integration.twins.answers import Answer, Cell, answer_of, json_answer, same
from tests.integration.twins.asks import Asked, inputs_of, random_asks
from tests.integration.twins.definitions import MUCH, REQUEST, OnDemand, Shown, random_definitions
from tests.integration.twins.reasons import COMPUTED, REASONS, Case, Computed, computed_reason_of, reason_of
from tests.integration.twins.rows import random_keys, random_rows
from tests.integration.twins.twins import Twins, feast_servers, make_repositories, wait_for, write_config
from tests.processes import output_of

pytestmark = pytest.mark.filterwarnings("ignore")

#: Every reason occurs with this one.
_DEFAULT_SEED = "46"
SEED = int(os.environ.get("ISOCHRON_TWINS_SEED", _DEFAULT_SEED))
_KNOWN, _UNKNOWN = 6, 2


@dataclass(frozen=True)
class World:
    """Both repositories, filled, the URLs of their servers, and what is asked of them."""

    repos: dict[str, Path]
    urls: dict[str, str]
    twins: Twins
    asks: list[Asked]


@dataclass(frozen=True)
class Answered:
    """A request with both answers; Feast's is none where it fails."""

    asked: Asked
    ours: Answer
    feast: Answer | None


@pytest.fixture(scope="module")
def world(redis_single: SingleServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    rng = random.Random(SEED)
    root = tmp_path_factory.mktemp("twins")
    definitions = random_definitions(rng)
    repos = make_repositories(root, definitions, redis_single.connection_string)
    with feast_servers(repos) as urls:
        twins = Twins(FeatureStore(str(repos["feast"])), FeatureStore(str(repos["ours"])), root / "data")
        now, keys = SystemClock().now(), {}
        for view in definitions.views:
            keys[view.name] = random_keys(rng, view, _KNOWN + _UNKNOWN) if view.keys else [()]
            twins.fill(view, random_rows(rng, view, keys[view.name][:_KNOWN], now), now)
        yield World(repos, urls, twins, random_asks(rng, definitions, keys))


@pytest.fixture(scope="module")
def answers(world: World) -> list[Answered]:
    ours, feast = world.twins.ours, world.twins.feast
    return [
        Answered(a, answer_of(a.ask.response(ours)), None if a.feast_fails else answer_of(a.ask.response(feast)))
        for a in world.asks
    ]


def _expected(world: World, asked: Asked, shown: Shown, feature: str, row: int, now: int) -> list[list[Any]]:
    """What the contract says of a cell: value, status and time; more than one where no rule tells rows apart."""
    rows = world.twins.newest(shown.view, asked.key(shown, row), now)
    if not rows:
        return [[None, "NOT_FOUND", 0]]
    if shown.view.ttl and rows[0].time < now - shown.view.ttl * HOUR:
        return [[None, "OUTSIDE_MAX_AGE", 0]]
    values = [r.values[feature] for r in rows]
    return [[v, "NULL_VALUE" if v is None else "PRESENT", rows[0].time] for v in values]


def _equal(one: Cell, other: Cell) -> bool:
    return same(one.value, other.value) and one.status == other.status and one.time == other.time


# -- the SDK ------------------------------------------------------------------------------------------------------


def test_our_answers_are_what_the_contract_says(world: World, answers: list[Answered]) -> None:
    now = SystemClock().now()
    for one in answers:
        for column, (shown, feature) in one.asked.stored.items():
            for row, cell in enumerate(one.ours[column]):
                wanted = _expected(world, one.asked, shown, feature, row, now)
                told = any(same([cell.value, cell.status, cell.time], cells) for cells in wanted)
                assert told, (column, one.asked.key(shown, row), cell, wanted)


def test_columns_are_the_entities_as_given_then_the_features_as_asked(answers: list[Answered]) -> None:
    """Feast's come in the order of a set: another one in every process."""
    for one in answers:
        given = [name for name in one.asked.ask.entities if name not in {c.name for c in REQUEST}]
        assert list(one.ours) == [*given, *one.asked.stored, *one.asked.computed]
        for name in given:
            assert [c.value for c in one.ours[name]] == list(one.asked.ask.entities[name])
        if one.feast is not None:
            assert list(one.feast)[: len(given)] == given
            assert set(one.ours) - set(one.feast) == one.asked.lost_by_feast
            assert set(one.feast) <= set(one.ours)
            assert all(one.ours[name] == one.feast[name] for name in given)


def test_every_difference_to_feasts_store_has_its_reason(world: World, answers: list[Answered]) -> None:
    now, seen, cells = SystemClock().now(), Counter(), 0
    for one in answers:
        for column, (shown, feature) in one.asked.stored.items() if one.feast else ():
            for row, (ours, feast) in enumerate(zip(one.ours[column], one.feast[column], strict=True)):
                cells += 1
                if not _equal(ours, feast):
                    key, confused = one.asked.key(shown, row), one.asked.confused(shown, row)
                    rows = world.twins.rows(shown.view, key)
                    case = Case(shown.view, shown.view.columns[feature], rows, ours, feast, now, confused)
                    reason = reason_of(case)
                    assert reason, (shown, feature, key, case)
                    seen[reason] += 1
    print(f"\n{len(answers)} requests, {cells} stored cells, {cells - seen.total()} equal, others: {dict(seen)}")
    if str(SEED) == _DEFAULT_SEED:
        assert set(seen) == set(REASONS)


def test_computed_values_differ_where_their_inputs_do(world: World, answers: list[Answered]) -> None:
    seen, cells = Counter(), 0
    for one in answers:
        for column, (view, output) in one.asked.computed.items():
            ask = inputs_of(one.asked, view)
            read = [answer_of(ask.response(store)) for store in (world.twins.ours, world.twins.feast)]
            for row, cell in enumerate(one.ours[column]):
                inputs = [[answer[c.name][row] for c in view.inputs] for answer in read]
                _check_computed(view, output, one.asked, row, inputs[0], cell)
                if one.feast and column in one.feast:
                    cells += 1
                    feast = one.feast[column][row]
                    if not _equal(cell, feast):
                        reason = computed_reason_of(Computed(inputs[0], inputs[1], cell, feast))
                        assert reason, (view, one.asked, row, inputs, cell, feast)
                        seen[reason] += 1
    print(f"\n{cells} computed cells, {cells - seen.total()} equal, others: {dict(seen)}")
    if str(SEED) == _DEFAULT_SEED:
        assert set(seen) == set(COMPUTED)


def _check_computed(view: OnDemand, output: int, asked: Asked, row: int, inputs: list[Cell], cell: Cell) -> None:
    """Our value is the view's function of our inputs."""
    amount, text = (asked.ask.entities[c.name][row] for c in REQUEST)
    wanted: Any = f"{text}!"
    if output == 0:
        values = [c.value for c in inputs]
        wanted = None
        if None not in values and view.mode == "python":
            wanted = float("nan") if amount == MUCH else float(sum([*values, amount]))
        elif None not in values:
            wanted = sum(map(float, values), amount)
            wanted = None if wanted != wanted else wanted  # noqa: PLR0124 pandas' NaN is null
    assert same([cell.value, cell.time], [wanted, 0]), (view, row, inputs, amount)
    assert cell.status == ("NULL_VALUE" if wanted is None else "PRESENT")


def test_where_feast_loses_an_on_demand_views_input_it_fails_and_we_do_not(
    world: World, answers: list[Answered]
) -> None:
    for one in answers:
        if one.asked.feast_fails:
            with pytest.raises((KeyError, ValueError)):
                one.asked.ask.response(world.twins.feast)


def test_frames_have_feasts_types(world: World, answers: list[Answered]) -> None:
    for one in answers:
        if one.feast is not None:
            ours, feast = (one.asked.ask.response(s).to_df() for s in (world.twins.ours, world.twins.feast))
            assert list(ours) == list(one.ours)
            alike = [n for n in one.feast if all(map(_equal, one.ours[n], one.feast[n]))]
            pd.testing.assert_frame_equal(ours[alike], feast[alike])


def test_async_reads_and_the_layer_say_the_same(world: World, answers: list[Answered]) -> None:
    ours = world.twins.ours

    async def ask(asked: Asked) -> Answer:
        features, entities = asked.ask.features_of(ours), dict(asked.ask.entities)
        return answer_of(await ours.get_online_features_async(features, entities, asked.ask.full_names))

    async def ask_all() -> list[Answer]:
        return await asyncio.gather(*(ask(one.asked) for one in answers))

    with FeatureLayer(world.repos["ours"]) as layer:
        for one, soon in zip(answers, asyncio.run(ask_all()), strict=True):
            assert list(soon) == list(one.ours)
            ask_of = one.asked.ask
            straight = layer.get_online_features(ask_of.features, ask_of.entities, full_feature_names=ask_of.full_names)
            values = straight.to_dict()
            for name, cells in one.ours.items():
                assert all(map(_equal, soon[name], cells))
                assert same(values[name], [cell.value for cell in cells])
        layer.store.backend.close()


# -- the server, its remote client, the command -------------------------------------------------------------------


def _asked_by_json(world: World, answers: list[Answered]) -> list[Answered]:
    """Those that JSON can carry: it has no bytes."""
    for url in world.urls.values():
        wait_for(url)
    return [
        one
        for one in answers
        if one.feast is not None
        and not any(isinstance(v, bytes) for values in one.asked.ask.entities.values() for v in values)
    ]


def _differs(one: Answered, column: str, row: int) -> bool:
    """Whether the SDK's answers differ in a cell."""
    return not _equal(one.ours[column][row], one.feast[column][row])  # type: ignore[index]


def test_feasts_server_says_on_our_store_what_it_says_on_feasts(world: World, answers: list[Answered]) -> None:
    some = _asked_by_json(world, answers)
    assert len(some) > 5
    with httpx.Client(trust_env=False, timeout=60) as client:
        for one in some:
            told = {
                name: client.post(f"{url}/get-online-features", json=one.asked.ask.body())
                for name, url in world.urls.items()
            }
            assert [t.status_code for t in told.values()] == [200, 200], told["ours"].text
            ours, feast = json_answer(told["ours"].text), json_answer(told["feast"].text)
            assert list(ours) == list(one.ours)
            for name, cells in feast.items():
                for row, (mine, theirs) in enumerate(zip(ours[name], cells, strict=True)):
                    assert same(list(mine), list(theirs)) or _differs(one, name, row), (name, row, mine, theirs)
                    assert mine[1] == one.ours[name][row].status


def test_feasts_remote_client_reads_from_feasts_server_on_our_store(
    world: World, answers: list[Answered], tmp_path: Path
) -> None:
    """It infers types from JSON, and fails where a text or list is empty: both servers' answers are read alike."""
    remote = {}
    for name, url in world.urls.items():
        store = {"online_store": {"type": "remote", "path": url}, "offline_store": {"type": "file"}}
        write_config(tmp_path / name, store | {"registry": str(world.repos[name] / "registry.db")})
        remote[name] = FeatureStore(str(tmp_path / name))
    read = 0
    for one in _asked_by_json(world, answers):
        told = {name: _dict_or_error(one.asked, store) for name, store in remote.items()}
        if isinstance(told["ours"], str) or isinstance(told["feast"], str):
            errors = [text for text in told.values() if isinstance(text, str)]
            assert all(text.startswith(_NOT_INFERRED) for text in errors), errors
            continue
        read += 1
        assert list(told["ours"]) == list(one.ours)
        for name, values in told["feast"].items():
            for row, (mine, theirs) in enumerate(zip(told["ours"][name], values, strict=True)):
                assert same(mine, theirs) or _differs(one, name, row), (name, row, mine, theirs)
    assert read > 2


_NOT_INFERRED = ("Couldn't infer value type from empty value", "List value type for field  is inconsistent")


def _dict_or_error(asked: Asked, store: FeatureStore) -> dict[str, list[Any]] | str:
    try:
        return asked.ask.response(store).to_dict()
    except (TypeError, ValueError) as error:
        return str(error)


def test_the_command_reads_both_stores_alike(world: World) -> None:
    rows = pd.DataFrame({"k_user": [901, 902], "x": [1.5, None], "n": [3, 4], **_times(2)})
    for store in (world.twins.ours, world.twins.feast):
        store.push("one_pushed", rows)
    command = ["get-online-features", "-e", "k_user=901", "-e", "k_user=902", "-e", "k_user=-903"]
    command += ["-f", "one:n", "-f", "one:x"]
    said = [
        output_of(world.repos["ours"], "feast", *command),
        CliRunner().invoke(cli, ["--chdir", str(world.repos["feast"]), *command]).output,
    ]
    ours, feast = (json.loads(text[text.index("{") :]) for text in said)
    assert ours == feast == {"k_user": [901, 902, -903], "n": [3, 4, None], "x": [1.5, None, None]}
    assert list(ours) == ["k_user", "n", "x"]


def _times(rows: int) -> dict[str, list[pd.Timestamp]]:
    now = pd.Timestamp.now(tz="UTC").floor("s")
    return {"event_timestamp": [now] * rows, "created": [now] * rows}


def test_pushes_and_the_remote_clients_writes_reach_our_store_by_feasts_server(world: World, tmp_path: Path) -> None:
    wait_for(url := world.urls["ours"])
    times = {name: [t.isoformat() for t in column] for name, column in _times(1).items()}
    body = {"push_source_name": "one_pushed", "df": {"k_user": [911], "x": [2.5], "n": [7], **times}, "to": "online"}
    assert httpx.post(f"{url}/push", json=body, trust_env=False, timeout=60).status_code == 200
    store = {"online_store": {"type": "remote", "path": url}, "offline_store": {"type": "file"}}
    write_config(tmp_path / "remote", store | {"registry": str(world.repos["ours"] / "registry.db")})
    remote = FeatureStore(str(tmp_path / "remote"))
    remote.write_to_online_store("one", pd.DataFrame({"k_user": [912], "x": [3.5], "n": [8], **_times(1)}))
    for reader in (remote, world.twins.ours):
        answer = reader.get_online_features(["one:x", "one:n"], {"k_user": [911, 912, 913]}).to_dict()
        assert answer == {"k_user": [911, 912, 913], "x": [2.5, 3.5, None], "n": [7, 8, None]}
