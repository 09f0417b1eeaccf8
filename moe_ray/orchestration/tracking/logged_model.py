"""A model in MLflow that its figures belong to, so that models can be compared as runs are."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import mlflow
import requests
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from moe_ray.orchestration.tracking.mlflow_run import MlflowTracker
from moe_ray.run_directory import FINETUNE

logger = logging.getLogger(__name__)

_PREFIX = "repaired"


def link_figures(tracker: MlflowTracker, model_id: str | None, figures: Mapping[str, Any], *, base: str) -> str | None:
    """Logs the repaired model's figures with the model that they are of.

    A server that knows no logged models, or does not answer now, costs only the link: the run has its figures already.

    Args:
        tracker: of the parent run.
        model_id: of the model that the run has logged; None = it logged none, so one is made that stands for the learned
            experts, whose files are the run's artifacts.
        figures: values by name; those that are None are left out.
        base: name of the base model.

    Returns:
        the id of the model; None, after a line that says why, where there is none.
    """
    client = mlflow.MlflowClient(tracking_uri=tracker.uri)
    now = int(time.time() * 1000)
    try:
        if model_id is None:
            tags = {"base_model": base, "artifacts": f"runs:/{tracker.run_id}/{FINETUNE}"}
            model = client.create_logged_model(
                tracker.experiment_id, "learned_experts", source_run_id=tracker.run_id, tags=tags, model_type="adapter"
            )
            model_id = str(model.model_id)
            client.finalize_logged_model(model_id, "READY")
        metrics = [
            Metric(f"{_PREFIX}/{name}", float(value), now, 0, model_id=model_id)
            for name, value in figures.items()
            if value is not None and abs(float(value)) < float("inf")
        ]
        client.log_batch(tracker.run_id, metrics=metrics)
    except (MlflowException, requests.RequestException) as error:
        logger.info("MLflow has no model that the figures belong to: %s", " ".join(str(error).split())[:200])
        return None
    return model_id
