"""Every setting: explained, checked, read from YAML and dotted overrides.

The tree has the shape of the pipeline, so `identify.threshold` names the same thing in a YAML file, on the command line and
in a sweep's search space.
"""

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.compare import BASELINES, CompareConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.fields import EMBEDDED
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.config.report import ReportConfig
from moe_ray.config.rounds import RoundsConfig
from moe_ray.config.run import Config
from moe_ray.config.sweep import SweepConfig
from moe_ray.config.tracking import TrackingConfig

__all__ = [
    "BASELINES",
    "EMBEDDED",
    "CaptureConfig",
    "ClusterConfig",
    "CompareConfig",
    "Config",
    "EvaluateConfig",
    "FinetuneConfig",
    "IdentifyConfig",
    "ModelConfig",
    "PromptsConfig",
    "ReportConfig",
    "RoundsConfig",
    "SweepConfig",
    "TrackingConfig",
]
