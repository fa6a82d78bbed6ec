"""The Spark session of an engine: started on first use, shared within a process, stopped by its last user."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from feature_store.engines.spark.failures import first_reason
from feature_store.errors import ConfigError

if TYPE_CHECKING:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

#: What values depend on; a configuration that says otherwise is refused.
FIXED = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.ansi.enabled": "true",
    # pandas writes nanoseconds, which Spark gives as whole numbers; no calendar but the proleptic Gregorian one.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.binaryAsString": "false",
    "spark.sql.parquet.int96AsTimestamp": "true",
    "spark.sql.parquet.inferTimestampNTZ.enabled": "true",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.execution.arrow.useLargeVarTypes": "false",
}

#: Unless told otherwise.
DEFAULTS = {
    "spark.app.name": "isochron",
    "spark.ui.enabled": "false",
    # We keep no tables; without this the working directory gets an empty folder for them.
    "spark.sql.warehouse.dir": f"{tempfile.gettempdir()}/isochron-spark-warehouse",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "FATAL",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
}
LOCAL_DEFAULTS = {
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "2g",
}


class _Shared:
    """The Spark context that was started here, if one was, and how many sessions use it."""

    lock = threading.Lock()
    context: SparkContext | None = None
    users = 0


class Session:
    """A Spark session on `master` (`local[*]` unless told) with further settings `conf`.

    Where Spark already runs in this process, its context is shared and the session is one of its own: settings of the
    context itself must then be as asked. A context that was started here stops when its last user closes.
    """

    def __init__(self, master: str | None, conf: Mapping[str, Any]) -> None:
        self._master = master
        self._conf = {name: _text(value) for name, value in conf.items()}
        self._session: SparkSession | None = None
        for name, value in FIXED.items():
            if self._conf.get(name, value).lower() != value.lower():
                raise ConfigError(f"spark_conf sets {name} to {self._conf[name]}, but values depend on {value}.")

    def get(self) -> SparkSession:
        """The session, started if it is not running. Raises ConfigError that says what is missing."""
        with _Shared.lock:
            if self._session is None or not _runs(self._session.sparkContext):
                self._forget()
                self._session = self._start()
                _Shared.users += self._session.sparkContext is _Shared.context
            return self._session

    def close(self) -> None:
        """Gives the session up; stops Spark if it was started here and nobody else here uses it."""
        with _Shared.lock:
            self._forget()

    def _forget(self) -> None:
        session, self._session = self._session, None
        if session is None or session.sparkContext is not _Shared.context:
            return
        _Shared.users -= 1
        if not _Shared.users:
            _Shared.context = None
            session.sparkContext.stop()

    def _start(self) -> SparkSession:
        try:
            from pyspark import SparkContext, __version__
        except ImportError as error:
            raise ConfigError(
                "engine 'spark' needs PySpark 4.2; install the extra: pip install 'isochron-features[spark]'."
            ) from error
        if int(__version__.split(".")[0]) < 4 or __version__.startswith("4.0"):
            raise ConfigError(f"engine 'spark' needs PySpark 4.2, and {__version__} is installed; update it.")
        running = SparkContext._active_spark_context
        if running is None:
            _check_java()
            session = self._new()
            _Shared.context, _Shared.users = session.sparkContext, 0
        else:
            self._check_same(running)
            session = self._beside(running)
        for name, value in FIXED.items():
            session.conf.set(name, value)
        return session

    def _new(self) -> SparkSession:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession

        local = self._master is None or self._master.startswith("local")
        conf: dict[str, Any] = {**DEFAULTS, **(LOCAL_DEFAULTS if local else {}), **FIXED, **self._conf}
        builder = SparkSession.builder.master(self._master or "local[*]").config(map=conf)
        try:
            with _environment(self._conf.get("spark.pyspark.python"), local):
                return builder.getOrCreate().newSession()
        except (PySparkException, Py4JError) as error:
            raise ConfigError(
                f"Spark did not start ({first_reason(str(error))}). It needs Java 17 or later, and master and settings "
                "(spark_master, spark_conf) as it takes them; what it printed says more."
            ) from error

    def _check_same(self, running: SparkContext) -> None:
        if self._master is not None and running.master != self._master:
            raise ConfigError(
                f"Spark already runs in this process on {running.master}, not on {self._master}; stop it first, or "
                "name that master."
            )

    def _beside(self, running: SparkContext) -> SparkSession:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession

        session = SparkSession(running).newSession()
        for name, value in {**DEFAULTS, **self._conf}.items():
            if running.getConf().get(name) == value:
                continue
            try:
                session.conf.set(name, value)
            except PySparkException as error:
                if name in self._conf:
                    raise ConfigError(
                        f"spark_conf sets {name} to {value}, which a running Spark does not take; stop it first."
                    ) from error
        return session


def _runs(context: SparkContext) -> bool:
    return context._jsc is not None and not context._jsc.sc().isStopped()


def _check_java() -> None:
    home = os.environ.get("JAVA_HOME")
    if not (shutil.which("java") or (home and os.access(os.path.join(home, "bin", "java"), os.X_OK))):
        raise ConfigError(
            "engine 'spark' needs Java 17 or later, and there is no java on the PATH nor in JAVA_HOME; install it: "
            "apt-get install default-jre-headless, dnf install java-17-openjdk-headless, or brew install openjdk@17."
        )


@contextmanager
def _environment(python: str | None, local: bool) -> Iterator[None]:
    """What Spark takes from the environment while it starts: which Python its workers run (on this machine the one
    that runs here) and the address it binds to.
    """
    told = {"PYSPARK_PYTHON": python} if python else {}
    default = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"} if local else {}
    before = dict(os.environ)
    os.environ.update({name: value for name, value in default.items() if name not in before} | told)
    try:
        yield
    finally:
        for name in default.keys() | told.keys():
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def _text(value: Any) -> str:
    """A setting as Spark writes it: YAML's true is `true`."""
    return str(value).lower() if isinstance(value, bool) else str(value)
