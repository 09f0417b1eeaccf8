"""Tracking: one MLflow run per moe-ray run, with the configuration, metrics by step, and masks as artifacts."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag

from moe_ray.artifacts import Folder
from moe_ray.config import TrackingConfig
from moe_ray.errors import InputError

logger = logging.getLogger(__name__)

_MAX_PARAM_CHARACTERS = 500
_METRICS_PER_CALL = 500


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


class MlflowTracker:
    """Writes to one MLflow run, which `end` closes.

    Args:
        config: where to.
        run_name: the run's name in MLflow.
        folder: holds the SQLite file and the artifacts where the configuration names no server.

    Raises:
        InputError: the tracking server does not answer.
    """

    def __init__(self, config: TrackingConfig, run_name: str, folder: Folder) -> None:
        self.uri = config.uri or f"sqlite:///{folder.sub('mlflow').file('mlflow.db')}"
        # Its level is set anew when the module is first used; a filter stays.
        logging.getLogger("mlflow.store.db.utils").addFilter(_is_warning)
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        artifacts = None if config.uri else folder.sub("mlflow").sub("artifacts").url
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.getLogger("alembic").setLevel(logging.WARNING)
                experiment = self.client.get_experiment_by_name(config.experiment)
                experiment_id = (
                    experiment.experiment_id
                    if experiment is not None
                    else self.client.create_experiment(config.experiment, artifact_location=artifacts)
                )
                self.run_id: str = self.client.create_run(experiment_id, run_name=run_name).info.run_id
        except mlflow.exceptions.MlflowException as error:
            raise InputError(f"MLflow at {self.uri} does not work: {error}; check tracking.uri") from error

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, as text."""
        entities = [Param(key, str(value)[:_MAX_PARAM_CHARACTERS]) for key, value in params.items()]
        for start in range(0, len(entities), 100):
            self.client.log_batch(self.run_id, params=entities[start : start + 100])

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Facts that are not settings."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_metrics(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Metrics by step; values that are not finite numbers are left out."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), now, step)
            for step, values in rows
            for key, value in values.items()
            if value is not None and value == value
        ]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def log_file(self, path: str, folder: str = "") -> None:
        """A local file as an artifact."""
        self.client.log_artifact(self.run_id, path, artifact_path=folder or None)

    def end(self, status: str = "FINISHED") -> None:
        """Closes the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status=status)
