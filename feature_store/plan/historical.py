"""What a historical retrieval has to do, as data: engines run it, explain prints it."""

from __future__ import annotations

from dataclasses import dataclass

from feature_store.definitions.aggregation import Aggregation
from feature_store.definitions.repository import Request
from feature_store.definitions.view import FeatureRef, OnDemandView, PlainView, WindowedView, digest
from feature_store.timestamps import duration_text


@dataclass(frozen=True)
class AsOfStage:
    """Point-in-time join of a plain view: its newest row at or before each time. `key_columns` maps keys to columns.

    With `knowledge_time` only rows whose created time (event time where there is none) is at or before that time.
    With `expired` the time of a row is told also where its ttl is over (its values are null); else such rows need not
    be read.
    """

    view: PlainView
    features: tuple[str, ...]
    key_columns: dict[str, str]
    outputs: tuple[tuple[str, str], ...]
    knowledge_time: bool = False
    expired: bool = False

    def __str__(self) -> str:
        ttl = f", no older than {duration_text(self.view.ttl)}" if self.view.ttl else ""
        known = " and known by then" if self.knowledge_time else ""
        wanted = ", ".join(self.features)
        return f"as-of join {self.view.name}: newest row at or before event_timestamp{known}{ttl} -> {wanted}"


@dataclass(frozen=True)
class WindowStage:
    """Windowed aggregation of a view's event log, as of each time.

    With `knowledge_time` only events whose created time (event time where there is none) is at or before that time.
    """

    view: WindowedView
    aggregations: tuple[Aggregation, ...]
    key_columns: dict[str, str]
    outputs: tuple[tuple[str, str], ...]
    knowledge_time: bool = False

    def __str__(self) -> str:
        known = " (events known by then)" if self.knowledge_time else ""
        return f"windows {self.view.name}{known}: {', '.join(f'{a.name} = {a}' for a in self.aggregations)}"


@dataclass(frozen=True)
class OnDemandStage:
    """Row-wise functions over the columns fetched so far and those of the spine."""

    view: OnDemandView

    def __str__(self) -> str:
        return f"on demand {self.view.name} ({self.view.mode})"


@dataclass(frozen=True)
class HistoricalPlan:
    """The stages of one retrieval, in order, and the columns it gives, in the request's order.

    `outputs` of a stage pairs each of its values (feature, or join key) with the name it gets in the working table.
    """

    joins: tuple[AsOfStage | WindowStage, ...]
    on_demand: tuple[OnDemandStage, ...]
    request: Request

    @property
    def fingerprint(self) -> str:
        """Identity of the stages: what is computed, from which columns, in which order."""
        stages = [str(stage) for stage in (*self.joins, *self.on_demand)]
        return digest([stages, [sorted(j.key_columns.items()) for j in self.joins], self.request.fingerprint])


def plan_historical(request: Request, knowledge_time: bool = False) -> HistoricalPlan:
    """The stages that fetch a request's stored features and then run its on-demand views.

    With `knowledge_time` every stage sees only what was known (created) at the time a row asks for.
    """
    joins = tuple(_join(request, view, refs, knowledge_time) for view, refs in request.by_view())
    return HistoricalPlan(joins, tuple(OnDemandStage(v) for v in request.on_demand), request)


def _join(
    request: Request, view: PlainView | WindowedView, refs: list[FeatureRef], knowledge_time: bool
) -> AsOfStage | WindowStage:
    key_columns = {key.name: refs[0].key_column(key.name) for key in view.keys}
    outputs = tuple((ref.feature, working_name(ref)) for ref in refs)
    wanted = [ref.feature for ref in refs if ref.feature not in key_columns]
    if isinstance(view, WindowedView):
        return WindowStage(view, tuple(map(view.aggregation, wanted)), key_columns, outputs, knowledge_time)
    return AsOfStage(view, tuple(wanted), key_columns, outputs, knowledge_time)


def working_name(ref: FeatureRef) -> str:
    """A stored feature's column while a retrieval works: one for each view, alias, feature and mapping of keys."""
    return ref.column(full_names=True) + "".join(f"@{key}={column}" for key, column in ref.join_key_map)
