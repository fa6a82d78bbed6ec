"""Requests and answers of Feast's feature server, as JSON."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.online_data import KEY, Truth, View
from feature_store.timestamps import moment


def request(view: View, keys: list[int]) -> bytes:
    """The body that asks for all features of these keys, in Feast's column form."""
    features = [f"{view.name}:{name}" for name in view.names]
    return json.dumps({"features": features, "entities": {KEY: keys}}).encode()


def answer(truth: Truth, keys: list[int]) -> bytes:
    """What the server must answer for stored keys: as long as Feast's, byte for byte, but for the order of features."""
    values = truth.answer(keys)
    times = [_text(truth.time_of(key)) for key in keys]
    results = [
        {
            "values": column,
            "statuses": ["PRESENT"] * len(keys),
            "event_timestamps": [_text(0)] * len(keys) if name == KEY else times,
        }
        for name, column in values.items()
    ]
    told = {"results": results, "metadata": {"feature_names": list(values)}}
    return json.dumps(told, separators=(",", ":")).encode()


def difference(ours: bytes, right: bytes) -> str | None:
    """Where two answers disagree, in words; None where they are equal. Features may come in any order."""
    one, other = (_by_feature(text) for text in (ours, right))
    if sorted(one) != sorted(other):
        return f"features {sorted(one)} against {sorted(other)}"
    for name, column in other.items():
        for part, wanted in column.items():
            if one[name].get(part) != wanted:
                return f"{name}, {part}: {one[name].get(part)} against {wanted}"
    return None


def _by_feature(text: bytes) -> dict[str, dict[str, Any]]:
    told = json.loads(text)
    return dict(zip(told["metadata"]["feature_names"], told["results"], strict=True))


def _text(time: int) -> str:
    """A time as protobuf's JSON writes it: with three or six digits of a second, or none."""
    at = moment(time)
    micros = at.microsecond
    digits = "" if not micros else f".{micros // 1_000:03d}" if micros % 1_000 == 0 else f".{micros:06d}"
    return f"{at:%Y-%m-%dT%H:%M:%S}{digits}Z"
