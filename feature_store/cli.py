"""The `isochron` command. Each subcommand turns arguments into one library call; heavy imports wait until it runs.

Exit codes: 0 well, 1 refused or failed (one line says why; `--debug` shows the trace), 2 wrong usage, 3 values differ.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_store.errors import ConfigError, IsochronError, ValuesDiffer

if TYPE_CHECKING:
    import pyarrow as pa

app = typer.Typer(
    name="isochron",
    help="Windowed features that mean the same in training and in serving, for Feast repositories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DIFFERENT = 3

Repo = Annotated[Path, typer.Option("--repo", help="Folder of an applied Feast repository.")]
Sources = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="NAME=PATH", help="Read a declared file source from another path. Repeatable."),
]
#: Inside a Feast repository that one, as Feast's own command has it; else the example's folder.
DEFAULT_REPO = Path() if Path("feature_store.yaml").is_file() else Path("feature_repo")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False) -> None:
    """Windowed features that mean the same in training and in serving, for Feast repositories."""


@app.command()
def apply(repo: Repo = DEFAULT_REPO) -> None:
    """Check and apply a Feast repository: what `feast apply` does, and services and on-demand views checked too.

    Example: isochron apply --repo feature_repo
    """
    from feature_store.adapters.feast.apply import apply as apply_repository

    definitions = apply_repository(repo)
    typer.echo(
        f"applied {len(definitions.views)} views and {len(definitions.services)} services of {definitions.project}"
    )


Knowledge = Annotated[
    bool, typer.Option("--knowledge-time", help="Count only what was created by each row's time, late data not.")
]


@app.command()
def historical(
    features: Annotated[str, typer.Argument(help="A feature service's name, or view:feature,view:feature.")],
    out: Annotated[
        Path | None, typer.Option(help="Parquet file to write (a folder on Spark): the rows with their features.")
    ] = None,
    spine: Annotated[
        Path | None, typer.Option(help="Parquet file of the rows to fill: keys, event_timestamp, request values.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="TIME", help="Without a spine: every row of the views from this time on.")
    ] = None,
    end: Annotated[
        str | None, typer.Option(metavar="TIME", help="Without a spine: up to this time; now if absent.")
    ] = None,
    knowledge_time: Knowledge = False,
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
    explain: Annotated[bool, typer.Option("--explain", help="Print the plan and stop.")] = False,
) -> None:
    """Fill a file of rows with features, each as of its event_timestamp; or, without one, every row of a time range.

    Example: isochron historical fraud_v1 --spine rows.parquet --out filled.parquet

    Example: isochron historical fraud_v1 --spine rows.parquet --explain

    Example: isochron historical customer_recent:last_amounts --start 2018-05-01 --end 2018-05-02 --out all.parquet
    """
    import pyarrow.parquet as pq

    if spine is None and start is None:
        raise typer.BadParameter("give --spine, or --start (and --end) to ask for every row of the views")
    if out is None and not explain:
        raise typer.BadParameter("give --out, or --explain")

    from feature_store import FeatureLayer
    from feature_store.timestamps import moment

    with FeatureLayer(repo, sources=_paths(source)) as layer:
        first, last = (None if text is None else moment(_time(text)) for text in (start, end))
        asked = features.split(",") if ":" in features else features
        retrieval = layer.get_historical_features(
            spine, asked, knowledge_time=knowledge_time, start_date=first, end_date=last
        )
        if explain:
            typer.echo(retrieval.explain())
            return
        assert out is not None
        written = retrieval.to_parquet(out)
    files = [written] if written.is_file() else sorted(written.glob("*.parquet"))
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    typer.echo(f"{rows:,} rows, {len(retrieval.request.refs)} features -> {out}")


@app.command("training-set")
def training_set(
    service: Annotated[str, typer.Argument(help="A feature service's name.")],
    spine: Annotated[Path, typer.Option(help="Parquet file of the rows: keys, event_timestamp, request values.")],
    out: Annotated[Path, typer.Option(help="Folder to write: data.parquet, spine.parquet, manifest.json.")],
    knowledge_time: Knowledge = False,
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Write a training set with a manifest from which `isochron rebuild` makes the same bytes again.

    Example: isochron training-set fraud_v1 --spine rows.parquet --out sets/2018-07
    """
    from feature_store import FeatureLayer

    with FeatureLayer(repo, sources=_paths(source)) as layer:
        made = layer.training_set(spine, service, out, knowledge_time=knowledge_time)
    typer.echo(f"{made.manifest.rows:,} rows -> {made.data}\nsha256 {made.manifest.data}")


@app.command()
def rebuild(
    manifest: Annotated[Path, typer.Argument(help="The manifest.json of a training set, its spine.parquet beside it.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Make a training set again from its manifest; fails, saying what changed, unless the bytes are the same.

    Example: isochron rebuild sets/2018-07/manifest.json --out again
    """
    from feature_store import FeatureLayer

    with FeatureLayer(repo, sources=_paths(source)) as layer:
        made = layer.rebuild_training_set(manifest, out)
    typer.echo(f"{made.manifest.rows:,} rows -> {made.data}, the same bytes\nsha256 {made.manifest.data}")


@app.command()
def online(
    service: Annotated[str, typer.Argument(help="A feature service's name.")],
    keys: Annotated[Path, typer.Option(help="Parquet file of entity keys and request values, a row each.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: the same rows with their features.")],
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="ISO 8601 time to read as of (UTC unless told); now if absent.")
    ] = None,
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Read a service's features from the online store. A time it no longer holds exactly is answered from history.

    Example: isochron online fraud_v1 --keys keys.parquet --out values.parquet --as-of 2018-08-01T12:00:00Z
    """
    from feature_store import FeatureLayer
    from feature_store.retrieval.historical import write_parquet
    from feature_store.retrieval.spine import read_spine

    with FeatureLayer(repo, sources=_paths(source)) as layer:
        rows = read_spine(keys)
        answer = layer.get_online_features(service, _lists(rows), as_of)
        table = rows
        for name, column in answer.columns.items():
            if name in table.column_names:
                raise ConfigError(f"{keys} already has a column '{name}', the name of a requested feature; rename it.")
            table = table.append_column(name, column)
        write_parquet(table, out)
    typer.echo(f"{table.num_rows:,} rows, {len(answer.columns)} features -> {out}")


@app.command()
def bootstrap(
    views: Annotated[list[str] | None, typer.Argument(help="Views to fill; all online ones if none is named.")] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Fold events before this ISO 8601 time only; all if absent.")
    ] = None,
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Fill the online store from the event logs, replacing what it holds of the views.

    Example: isochron bootstrap customer_spend terminal_risk
    """
    from feature_store import FeatureLayer
    from feature_store.timestamps import END

    with FeatureLayer(repo, sources=_paths(source)) as layer, _progress() as show:
        end = END if until is None else _time(until)
        filled = layer.bootstrap(views or (), end, show)
    for view, entities in filled.items():
        hint = "" if entities or until else " (no event is in a window that ends now; --until fills as of a past time)"
        typer.echo(f"{view}: {entities:,} entities{hint}")


@app.command()
def erase(
    key: Annotated[
        list[str],
        typer.Option(metavar="NAME=VALUE", help="A join key of the entity and its value. Repeat it for several keys."),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Erase an entity from every view that has these join keys: its records known by now count nowhere any more, for
    ever, and what the online store holds of it goes. Whole numbers are written as such, Bool as true or false, Bytes
    as hex digits. The files of the sources, and what was made of them before, stay as they are.

    Exits with 1 where nothing was erased, or where the online store still holds something: the text says which.

    Example: isochron erase --repo feature_repo --key customer_id=42

    Example: isochron erase --key customer_id=42 --key terminal_id=7 --yes
    """
    from feature_store import FeatureLayer
    from feature_store.timestamps import iso

    keys = _pairs(key, "--key", "NAME=VALUE")
    if len(keys) < len(key):
        raise typer.BadParameter("--key names a join key twice; erase one entity at a time")
    with FeatureLayer(repo) as layer:
        views = ", ".join(view.name for view in layer.definitions.keyed_by(keys))
        if not yes:
            entity = ", ".join(f"{name} {value}" for name, value in keys.items())
            typer.confirm(f"Erase {entity} from {views} of {layer.config.project}? It cannot be undone", abort=True)
        erased = layer.erase(keys)
    for view, entities in erased.views.items():
        typer.echo(f"{view}: left out of history; entities that the online store held: {entities:,}")
    typer.echo(f"erased as of {iso(erased.erased_at)}")


@app.command()
def train(
    transactions: Annotated[Path, typer.Option(help="Transactions file with labels, of the published shape.")],
    start: Annotated[str, typer.Option(metavar="DAY", help="First day of training, such as 2018-07-25.")],
    service: Annotated[str, typer.Option(help="Feature service the model reads.")] = "fraud_v1",
    out: Annotated[Path, typer.Option(help="Folder for models; each gets one of its own.")] = Path("models_out"),
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Train the fraud model on a week, wait a week for labels, test on the next, and keep it.

    Example: isochron train --transactions feature_repo/data/transactions.parquet --start 2018-05-11
    """
    import datetime as dt

    from datasets.fraud_published import load_published
    from feature_store import FeatureLayer
    from feature_store.clock import SystemClock
    from feature_store.timestamps import moment
    from models.study import StudySplit
    from pipelines.train import save, train_model

    try:
        days = StudySplit(dt.date.fromisoformat(start))
    except ValueError as error:
        raise typer.BadParameter(f"--start: {error}") from error
    paths = {"transactions": str(transactions), **_paths(source)}
    with FeatureLayer(repo, sources=paths) as layer:
        trained = train_model(layer, load_published(transactions), days, service)
    folder = save(trained, out, moment(SystemClock().now()))
    _table(
        [
            ("trained on", trained.train_rows),
            ("tested on", trained.test_rows),
            *_scores(trained.scores),
            ("model", folder),
        ]
    )


@app.command()
def study(
    source: Sources = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Reproduce the published fraud study through the layer; fails if a figure is too low, or too good (a leak).

    Example: isochron study --source transactions=transactions.parquet
    """
    from datasets.fraud_published import load_published
    from feature_store import FeatureLayer
    from models.study import PUBLISHED, check_scores
    from pipelines.study import run_study, study_features

    paths = _paths(source)
    if "transactions" not in paths:
        raise typer.BadParameter("--source transactions=PATH names the published file")
    with FeatureLayer(repo, sources=paths) as layer:
        frame = study_features(layer, load_published(Path(paths["transactions"])))
    for name, scores in run_study(frame).items():
        _table([("model", name), *_scores(scores)])
        check_scores(name, scores, PUBLISHED[name])
    typer.echo("every figure is within the tolerance of the published one")


@app.command()
def serve(
    model: Annotated[Path, typer.Option(help="A model's folder, or a folder that holds one model's.")] = Path(
        "demo/models"
    ),
    log: Annotated[Path, typer.Option(help="Decision log to append to.")] = Path("demo/decisions.jsonl"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Serve fraud scores over HTTP from the online store, and log every decision.

    Example: isochron serve --model demo/models --port 8000
    """
    from feature_store import FeatureLayer
    from feature_store.clock import SystemClock
    from models.booster import load
    from serving.app import create_app
    from serving.decision_log import DecisionLog
    from serving.server import run

    clock = SystemClock()
    with FeatureLayer(repo, clock=clock) as layer:
        application = create_app(layer, load(_model_folder(model)), DecisionLog(log), clock)
        typer.echo(f"http://{host}:{port}/")
        run(application, host, port)


@app.command("serve-features")
def serve_features(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any free one.")] = 6566,
    max_entities: Annotated[int, typer.Option(min=1, help="Most entity rows in one request.")] = 10_000,
    max_body: Annotated[int, typer.Option(min=1, metavar="MIB", help="Longest body of a request, in MiB.")] = 16,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """Serve features over HTTP as Feast's server does, on Feast's port; new definitions are taken up as it runs.

    Ends when it gets SIGTERM or SIGINT, after the requests under way. Exit codes: 0 ended so, 1 no applied repository
    or the port is taken, 2 wrong usage.

    Example: isochron serve-features --repo feature_repo --host 0.0.0.0 --port 6566
    """
    from serving.feature_requests import Limits
    from serving.start import serve_features as run_server

    run_server(repo, host, port, Limits(body=max_body << 20, entities=max_entities))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the model, the decision log and the report.")] = Path("demo"),
    transactions: Annotated[
        Path | None, typer.Option(help="A published transactions file to use instead of generated ones.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="Days to generate.")] = 62,
    customers: Annotated[int, typer.Option(min=1, help="Customers to generate.")] = 5_000,
    terminals: Annotated[int, typer.Option(min=1, help="Terminals to generate.")] = 10_000,
    decisions: Annotated[int, typer.Option(min=1, help="Transactions of the last days to score.")] = 8_000,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
    repo: Repo = DEFAULT_REPO,
) -> None:
    """From raw transactions to a served fraud score; every served value is compared with its historical value.

    Example: isochron demo --report demo/report.json
    """
    import orjson

    from datasets.fraud_generator import FraudProcess
    from pipelines.demo import DemoSettings, run_demo

    process = FraudProcess(customers=customers, terminals=terminals, days=days, seed=seed)
    settings = DemoSettings(repo, folder, transactions, process, decisions, seed)
    with _progress() as show:
        result = run_demo(settings, show)
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_bytes(orjson.dumps(result.as_json(), option=orjson.OPT_INDENT_2))
    _table(result.rows())
    if result.mismatches:
        raise ValuesDiffer(
            f"{result.mismatches:,} of {result.values_compared:,} values differ: {'; '.join(result.examples)}"
        )


def _paths(sources: list[str] | None) -> dict[str, str]:
    paths = _pairs(sources or [], "--source", "NAME=PATH")
    if empty := [name for name, path in paths.items() if not path]:
        raise typer.BadParameter(f"--source '{empty[0]}=' is not of the form NAME=PATH")
    return paths


def _pairs(texts: list[str], option: str, form: str) -> dict[str, str]:
    """Options of the form NAME=VALUE."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{option} '{text}' is not of the form {form}")
        pairs[name] = value
    return pairs


def _time(text: str) -> int:
    from feature_store.timestamps import parse_time

    try:
        return parse_time(text)
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is no ISO 8601 time") from error


def _lists(table: pa.Table) -> dict[str, list]:
    return {name: table[name].to_pylist() for name in table.column_names}


def _model_folder(folder: Path) -> Path:
    """The folder of a model, or the one model's folder inside it."""
    if (folder / "model.json").is_file():
        return folder
    found = sorted(folder.glob("*/model.json"))
    if len(found) != 1:
        raise ConfigError(
            f"{folder} holds {len(found)} models; name one with --model, or train one with `isochron demo`."
        )
    return found[0].parent


def _scores(scores: Any) -> list[tuple[str, str]]:
    return [
        ("AUC ROC", f"{scores.auc_roc:.4f}"),
        ("average precision", f"{scores.average_precision:.4f}"),
        ("card precision@100", f"{scores.card_precision_100:.4f}"),
    ]


def _table(rows: list[tuple[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    Console(highlight=False, soft_wrap=True).print(table)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one a step; where it is no terminal, a line when a step is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, of: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=of)
            bars.update(tasks[step], completed=done, total=of)

        yield show


def main() -> None:
    """Runs the command; an error of ours is one line and exit code 1 (3 where values differ)."""
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"feast\..*")
    # Feast sets the root logger to INFO, at which httpx writes a line a request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except IsochronError as error:
        if "--debug" in sys.argv[1:]:
            raise
        typer.echo(f"isochron: {error}", err=True)
        sys.exit(DIFFERENT if isinstance(error, ValuesDiffer) else 1)


if __name__ == "__main__":
    main()
