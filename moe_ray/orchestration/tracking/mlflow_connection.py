"""The connection to an MLflow server or SQLite file, and how each kind of item is delivered."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from moe_ray.config.tracking import TrackingConfig
from moe_ray.errors import InputError
from moe_ray.orchestration.tracking.outbox import Item, Outbox, Refused, Unreachable
from moe_ray.storage.folder import Folder

_DATABASE, _ARTIFACTS = "mlflow.db", "mlflow_artifacts"
_PARENT_TAG = "mlflow.parentRunId"
_KEY_TAG = "moe_ray.key"

_ENVIRONMENT = {
    # MLflow's own limits, 7 retries of 120 s, would hold a training run for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_TEMPORARY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED"}
"""MLflow's error codes after which the same request may succeed; no answer at all is INTERNAL_ERROR."""

_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
"""Error codes where a run was deleted."""


class Connection:
    """A server or SQLite file, with the experiment and the outbox that the runs share.

    Args:
        config: where the server is.
        folder: the run directory; where the configuration names no server, the SQLite file is beside it.

    Raises:
        InputError: no server is named, and a SQLite file cannot be in this run directory, since that is not local.
    """

    def __init__(self, config: TrackingConfig, folder: Folder) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Its level is set anew when the module is first used; a filter stays.
        logging.getLogger("mlflow.store.db.utils").addFilter(_is_news)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        if not config.uri and "file" not in folder.fs.protocol:
            raise InputError(
                f"tracking.uri: got none, and run_dir is {folder.url}; SQLite needs a local folder, so give the address of "
                "an MLflow server, or sqlite:////PATH/mlflow.db"
            )
        self.folder = folder
        store = None if config.uri else _own_store(folder)
        self.uri = config.uri if store is None else f"sqlite:///{store / _DATABASE}"
        self._artifacts = None if store is None else (store / _ARTIFACTS).as_uri()
        self._lock_file = None if store is None else store / f".{_DATABASE}.lock"
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self.experiment_id = ""
        self.ids: dict[str, str] = {}
        self._deliveries: dict[str, Callable[[Item], None]] = {
            "create": self._deliver_create,
            "params": self._deliver_params,
            "tags": self._deliver_tags,
            "metrics": self._deliver_metrics,
            "dataset": self._deliver_dataset,
            "file": self._deliver_file,
            "end": self._deliver_end,
        }
        self.outbox = Outbox(folder, self.uri, self._deliver)

    def open_experiment(self, name: str) -> None:
        """Makes this experiment that of the runs; it is made in MLflow where there is none of the name."""
        with _alone(self._lock_file), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experiment = self.client.get_experiment_by_name(name)
            self.experiment_id = (
                experiment.experiment_id
                if experiment is not None
                else self.client.create_experiment(name, artifact_location=self._artifacts)
            )

    def reopen(self, run_id: str) -> bool:
        """Marks a run as running again; False where it was deleted meanwhile."""
        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code in _GONE:
                return False
            raise
        return True

    def end_children(self, run_id: str) -> None:
        """Ends the runs below this one that still count as running, since the process that ran them was killed."""
        for child in self.client.search_runs([self.experiment_id], f"tags.`{_PARENT_TAG}` = '{run_id}'"):
            self.end_children(child.info.run_id)
            if child.info.status == "RUNNING":
                self.end(child.info.run_id)

    def end(self, run_id: str) -> None:
        """Ends a run that was killed; one that was deleted meanwhile needs no end."""
        try:
            self.client.set_terminated(run_id, status="KILLED")
        except MlflowException as error:
            if error.error_code not in _GONE:
                raise

    def _deliver(self, item: Item) -> None:
        try:
            self._deliveries[item["kind"]](item)
        except (KeyError, TypeError) as error:
            # An item of another version, or of a spool that somebody changed; it must not hold up those behind it.
            is_known = item["kind"] in self._deliveries
            raise Refused(_in_short(error) if is_known else "no item of this kind is known") from error
        except MlflowException as error:
            raise (Unreachable if error.error_code in _TEMPORARY else Refused)(_in_short(error)) from error
        except requests.HTTPError as error:
            is_refused = error.response is not None and 400 <= error.response.status_code < 500
            raise (Refused if is_refused else Unreachable)(_in_short(error)) from error
        except requests.RequestException as error:
            raise Unreachable(_in_short(error)) from error

    def _deliver_create(self, item: Item) -> None:
        run_id = self._find(item["run"]) if item.get("attempted") else None
        item["attempted"] = True
        if run_id is None:
            tags = {**item["tags"], _PARENT_TAG: item["parent"], _KEY_TAG: item["run"]}
            run = self.client.create_run(self.experiment_id, start_time=item["time"], tags=tags, run_name=item["name"])
            run_id = run.info.run_id
        self.ids[item["run"]] = run_id
        self.outbox.rename(item["run"], run_id)

    def _find(self, key: str) -> str | None:
        """The run that an earlier request made although its answer never came."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _deliver_params(self, item: Item) -> None:
        params = [Param(key, value) for key, value in item["params"].items()]
        self.client.log_batch(item["run"], params=params)

    def _deliver_tags(self, item: Item) -> None:
        tags = [RunTag(key, value) for key, value in item["tags"].items()]
        self.client.log_batch(item["run"], tags=tags)

    def _deliver_metrics(self, item: Item) -> None:
        self.client.log_batch(item["run"], metrics=[Metric(*metric) for metric in item["metrics"]])

    def _deliver_dataset(self, item: Item) -> None:
        used = DatasetInput(Dataset(**item["dataset"]), tags=[InputTag("mlflow.data.context", item["context"])])
        self.client.log_inputs(item["run"], datasets=[used])

    def _deliver_file(self, item: Item) -> None:
        source = Folder.open(item["source"])
        if not source.exists(item["name"]):
            raise Refused(f"{source.file(item['name'])} is not there any more")
        if "file" in source.fs.protocol:
            self.client.log_artifact(item["run"], source.file(item["name"]), artifact_path=item["folder"] or None)
        else:
            with tempfile.TemporaryDirectory() as local:
                path = Path(local, item["name"])
                path.write_bytes(source.read_bytes(item["name"]))
                self.client.log_artifact(item["run"], str(path), artifact_path=item["folder"] or None)
        if item["remove"]:
            source.delete()

    def _deliver_end(self, item: Item) -> None:
        self.client.set_terminated(item["run"], status=item["status"], end_time=item["time"])


def _own_store(folder: Folder) -> Path:
    """The local folder with the SQLite file: that which holds the run directory, so that runs there can be compared.

    Where this cannot be written to, or everybody can write to it, as `/tmp`, the run directory has a store of its own.
    """
    beside = Path(folder.path).parent
    database = beside / _DATABASE
    is_mine = os.access(beside, os.W_OK) and not beside.stat().st_mode & stat.S_IWOTH
    if is_mine and (not database.exists() or os.access(database, os.W_OK)):
        return beside
    own = Path(folder.path) / "mlflow"
    own.mkdir(exist_ok=True)
    return own


@contextmanager
def _alone(lock_file: Path | None) -> Iterator[None]:
    """Holds a SQLite store that may not be there yet: two processes that make its tables at once damage it for good."""
    if lock_file is None:
        yield
        return
    with lock_file.open("a") as file:
        with suppress(OSError):  # a shared disk without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_news(record: logging.LogRecord) -> bool:
    # Every error there is raised as well, and said in one sentence by who catches it; logged, it is a hundred lines.
    return record.levelno == logging.WARNING


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
