"""The repaired model in MLflow's registry: base and learned experts merged, loadable without moe-ray."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import requests
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Pipeline, pipeline

from moe_ray.config.model import ModelConfig
from moe_ray.finetuning.adapter_files import local_adapter
from moe_ray.finetuning.merge import write_repaired
from moe_ray.orchestration.tracking.mlflow_run import MlflowTracker
from moe_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

_REQUIREMENTS = ("torch", "transformers")


@dataclass(frozen=True)
class Registered:
    """A model in the registry.

    Attributes:
        uri: `models:/NAME/VERSION`.
        model_id: MLflow's, of the logged model.
    """

    uri: str
    model_id: str


def register_repaired(tracker: MlflowTracker, model: ModelConfig, adapter: Folder, name: str) -> Registered | None:
    """Logs the merged model to the tracker's run and registers it.

    Args:
        tracker: of the parent run.
        model: the base.
        adapter: folder of learned experts.
        name: in the registry.

    Returns:
        what it is called there; None, after a warning that names it, where the server did not take it.
    """
    before = mlflow.get_tracking_uri()
    try:
        with tempfile.TemporaryDirectory() as folder, local_adapter(adapter) as local:
            write_repaired(model, local, Path(folder))
            logged = _log(tracker, folder, name)
    except (mlflow.exceptions.MlflowException, requests.RequestException, OSError) as error:
        logger.warning("the repaired model was not registered as %s: %s; run again in this run_dir", name, error)
        return None
    finally:
        mlflow.set_tracking_uri(before)
    uri = f"models:/{name}/{logged.registered_model_version}"
    logger.info("registered the repaired model as %s", uri)
    return Registered(uri=uri, model_id=str(logged.model_id))


def _log(tracker: MlflowTracker, folder: str, name: str) -> Any:
    """Logs a checkpoint as files; no weight is read."""
    described = _without_weights(folder)
    mlflow.set_tracking_uri(tracker.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mlflow.start_run(run_id=tracker.run_id):
            return mlflow.transformers.log_model(
                described,
                name="repaired_model",
                task="text-generation",
                registered_model_name=name,
                # Given, since MLflow would else start the model once more to find them out.
                pip_requirements=[f"{package}=={_public_version(package)}" for package in _REQUIREMENTS],
            )


def _without_weights(folder: str) -> Pipeline:
    """What stands for a checkpoint: a model whose tensors hold nothing, and which is saved by the checkpoint's own files.

    MLflow describes a model by what it sees in memory: from a folder alone, 3.17 fails with transformers 5, which gives it
    the name of a pipeline's class where it expects the class.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)

    def save(save_directory: Path, **_: Any) -> None:
        shutil.copytree(folder, save_directory, copy_function=_link)

    model.save_pretrained = save
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device="meta")


def _link(source: str, target: str) -> None:
    """A second name for a file, as its disk may have no room for a second copy; a copy where it is on another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _public_version(package: str) -> str:
    """The version without a local part such as +cpu, which no index holds."""
    return importlib.metadata.version(package).partition("+")[0]
