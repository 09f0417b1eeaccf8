"""Configuration: one frozen dataclass per stage, with every setting explained and checked.

The tree has the shape of the pipeline, so `identify.threshold` names the same thing in a YAML file, on the command line
and in a sweep's search space. Values are checked when they are built. `config_io` reads and writes the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.fields import _setting, require
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.config.studies import CompareConfig, RoundsConfig, SweepConfig


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = _setting("", "MLflow tracking URI; empty = an SQLite file in the run directory")
    experiment: str = _setting("moe-ray", "MLflow experiment")
    register: str = _setting(
        "",
        "name under which the repaired model, base and learned experts merged, goes to MLflow's registry; empty = not",
    )

    def __post_init__(self) -> None:
        require(bool(self.experiment), "tracking.experiment", self.experiment, "a name")
        require(not set(self.register) & set("/:"), "tracking.register", self.register, "a name without / or :")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The HTML report."""

    batches: int = _setting(24, "heat maps of single batches, spread evenly over all; keeps the page small")
    examples: int = _setting(6, "held-out examples of each kind with their answers; 0 = none")

    def __post_init__(self) -> None:
        require(self.batches > 0, "report.batches", self.batches, "1 or more")
        require(self.examples >= 0, "report.examples", self.examples, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray."""

    address: str = _setting("", "a running cluster's address; empty = RAY_ADDRESS if set, else a local Ray of its own")
    num_cpus: int = _setting(4, "logical CPUs of a local Ray; at least the sum of actors and workers, plus 2")

    def __post_init__(self) -> None:
        require(self.num_cpus >= 2, "cluster.num_cpus", self.num_cpus, "2 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = _setting("runs/default", "folder or fsspec URL that holds everything the run writes")
    cache_dir: str = _setting("~/.cache/moe-ray", "folder for the embedded model, built once")
    seed: int = _setting(0, "seed of splits, batches, the embedded model and the training order")
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    identify: IdentifyConfig = field(default_factory=IdentifyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder or URL")
