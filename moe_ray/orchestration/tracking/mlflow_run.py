"""Tracking: MLflow runs with nested runs, whose server may be lost without loss of training or of what was measured."""

from __future__ import annotations

import json
import logging
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import mlflow
import pandas as pd
import requests
from mlflow.exceptions import MlflowException

from moe_ray.config.tracking import TrackingConfig
from moe_ray.errors import OutsideFailed
from moe_ray.orchestration.tracking.mlflow_connection import Connection
from moe_ray.orchestration.tracking.outbox import SPOOL
from moe_ray.storage.damage import reading
from moe_ray.storage.fingerprint import content_hash
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

RECORD = "mlflow_run.json"
"""File of the run directory that names the last MLflow run of this directory."""

_GENERATED = ".mlflow_unsent"
_PREVIOUS_TAG = "moe_ray.previous_run"
_MAX_PARAM_CHARACTERS = 500
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 500


class Tracker:
    """One MLflow run. What the server does not take now waits in the run directory, see `Outbox`.

    As a context it ends as FINISHED, FAILED, or KILLED when it was interrupted.

    Args:
        connection: to the server.
        key: the run's id, or a name of our own while the server does not know the run yet.
    """

    def __init__(self, connection: Connection, key: str) -> None:
        self._connection, self._key = connection, key

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; starts with `pending` while the server does not know it."""
        return self._connection.ids.get(self._key, self._key)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment."""
        return self._connection.experiment_id

    def child(self, name: str, tags: Mapping[str, Any] | None = None) -> Tracker:
        """A new run nested under this one: a stage, a trial, a round."""
        key = f"pending-{uuid.uuid4().hex}"
        plain = {name: str(value) for name, value in (tags or {}).items()}
        self._send("create", key, name=name, tags=plain, parent=self.run_id, time=_now())
        return Tracker(self._connection, key)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, as text."""
        texts = [(key, str(value)[:_MAX_PARAM_CHARACTERS]) for key, value in params.items()]
        for start in range(0, len(texts), _PARAMS_PER_CALL):
            self._send("params", params=dict(texts[start : start + _PARAMS_PER_CALL]))

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Facts that are not settings."""
        self._send("tags", tags={key: str(value) for key, value in tags.items()})

    def log_metrics(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Metrics by step; values that are not finite numbers are left out."""
        now = _now()
        metrics = [
            (key, float(value), now, int(step))
            for step, values in rows
            for key, value in values.items()
            if value is not None and abs(float(value)) < float("inf")
        ]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self._send("metrics", metrics=metrics[start : start + _METRICS_PER_CALL])

    def log_stored(self, source: Folder, name: str, folder: str = "") -> None:
        """A file of the run directory as an artifact; it must stay there until the run has ended."""
        self._send("file", source=source.url, name=name, folder=folder, remove=False)

    def log_bytes(self, name: str, data: bytes, folder: str = "") -> None:
        """A generated artifact, such as a figure."""
        stored = self._connection.folder.sub(f"{_GENERATED}/{uuid.uuid4().hex}")
        stored.write_bytes(name, data)
        self._send("file", source=stored.url, name=name, folder=folder, remove=True)

    def log_dataset(
        self, frame: pd.DataFrame, *, name: str, source: str, context: str, num_rows: int | None = None
    ) -> None:
        """A table as an MLflow dataset: name, digest, schema and size, not its rows.

        Args:
            frame: the table, or its first rows.
            name: of the data set.
            source: where the table is stored.
            context: what the run uses it for, such as `training`.
            num_rows: of the whole table, where the frame is its first rows.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on integer columns, which cannot hold missing values
            about = mlflow.data.from_pandas(frame, source=source, name=name).to_dict()
        if num_rows is not None:
            about["profile"] = json.dumps({"num_rows": num_rows, "num_elements": num_rows * frame.shape[1]})
        self._send("dataset", dataset=about, context=context)

    def end(self, status: str = "FINISHED") -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        self._send("end", status=status, time=_now())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(_status(kind))

    def _send(self, kind: str, run: str | None = None, **payload: Any) -> None:
        self._connection.outbox.send({"kind": kind, "run": run or self.run_id, **payload})


class MlflowTracker(Tracker):
    """The parent run of a run directory.

    A run that was killed or failed is gone on with by the next one that has the same settings, and what it left running
    below it is ended as KILLED. After a finished one, or with other settings, a new parent is made, whose tag
    `moe_ray.previous_run` names the one before.

    Args:
        config: where to.
        run_name: the run's name in MLflow.
        folder: the run directory; holds what waits for a server that does not answer. Where the configuration names none,
            the SQLite file and the artifacts are beside it.
        settings: dotted settings as text, logged as parameters.

    Raises:
        OutsideFailed: the tracking server does not answer now, before any work was done.
    """

    def __init__(
        self, config: TrackingConfig, run_name: str, folder: Folder, *, settings: Mapping[str, str] | None = None
    ) -> None:
        connection = Connection(config, folder)
        self.uri, self._settings = connection.uri, content_hash(dict(settings or {}))
        previous = _read_record(folder) if folder.exists(RECORD) else None
        try:
            connection.open_experiment(config.experiment)
            if connection.outbox:
                logger.info("sending %d items to MLflow that an earlier run could not send", len(connection.outbox))
                connection.outbox.flush()
            super().__init__(connection, self._resume_or_create(connection, run_name, previous))
        except (MlflowException, requests.RequestException) as error:
            raise OutsideFailed(
                f"MLflow at {self.uri} does not work: {error}; start it, or check tracking.uri"
            ) from error
        self._record("RUNNING")
        if settings:
            self.log_params(settings)

    def _resume_or_create(self, connection: Connection, run_name: str, previous: dict[str, str] | None) -> str:
        tags = {}
        if previous is not None and previous["uri"] == self.uri:
            is_unfinished = previous["status"] != "FINISHED"
            if is_unfinished:
                connection.end_children(previous["run_id"])
            if is_unfinished and previous["settings"] == self._settings and connection.reopen(previous["run_id"]):
                return previous["run_id"]
            if previous["status"] == "RUNNING":
                connection.end(previous["run_id"])
            tags[_PREVIOUS_TAG] = previous["run_id"]
        run = connection.client.create_run(connection.experiment_id, run_name=run_name, tags=tags)
        return str(run.info.run_id)

    def _record(self, status: str) -> None:
        about = {"uri": self.uri, "run_id": self.run_id, "status": status, "settings": self._settings}
        self._connection.folder.write_json(RECORD, about)

    def end(self, status: str = "FINISHED") -> None:
        """Closes the run, and says what the server did not take."""
        super().end(status)
        self._record(status)
        outbox = self._connection.outbox
        if not outbox.flush():
            logger.warning(
                "MLflow at %s did not answer: %d items wait in %s; the next run in this directory sends them",
                *(self.uri, len(outbox), self._connection.folder.file(SPOOL)),
            )
        elif self._connection.folder.exists(_GENERATED) and not outbox.num_foreign:
            self._connection.folder.sub(_GENERATED).delete()
        if outbox.refused:
            logger.warning("MLflow refused %d items: %s", len(outbox.refused), "; ".join(outbox.refused[:5]))
        if outbox.num_foreign:
            logger.warning("%d items in %s wait for another tracking.uri", outbox.num_foreign, SPOOL)


def _now() -> int:
    """Milliseconds since 1970, MLflow's unit."""
    return int(time.time() * 1000)


def _read_record(folder: Folder) -> dict[str, str]:
    """What `RECORD` says of the last run here.

    Raises:
        InputError: it is damaged.
    """
    record = folder.read_json(RECORD)
    cure = "remove it, and the next run begins a new run in MLflow"
    with reading(folder.file(RECORD), expected="the MLflow run of this directory", cure=cure):
        if not all(isinstance(record[name], str) for name in ("uri", "run_id", "status", "settings")):
            raise TypeError("an entry is no text")
    known: dict[str, str] = record
    return known


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "FAILED" if issubclass(kind, Exception) else "KILLED"
