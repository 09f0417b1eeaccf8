"""The whole configuration: one group of settings per stage, and what belongs to no stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moe_ray.config.ablate import AblateConfig
from moe_ray.config.attack import AttackConfig
from moe_ray.config.capture import CaptureConfig
from moe_ray.config.cluster import ClusterConfig
from moe_ray.config.compare import CompareConfig
from moe_ray.config.evaluate import EvaluateConfig
from moe_ray.config.fields import setting
from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.harness import HarnessConfig
from moe_ray.config.identify import IdentifyConfig
from moe_ray.config.model import ModelConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.config.report import ReportConfig
from moe_ray.config.rounds import RoundsConfig
from moe_ray.config.section import Section
from moe_ray.config.sweep import SweepConfig
from moe_ray.config.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """A whole run."""

    run_dir: str = setting(
        "runs/default",
        "folder or fsspec URL (such as s3://bucket/run) that holds everything the run writes",
        affects="presentation",
    )
    cache_dir: str = setting(
        "~/.cache/moe-ray", "folder for the embedded model, which is built once", affects="presentation"
    )
    seed: int = setting(
        0,
        "seed of every random choice: splits, batches, the embedded model, sampled answers, p-values, training order and "
        "sweep",
        affects=("examples", "counts", "masks", "weights", "ablation", "attacks", "search"),
        at_least=0,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    identify: IdentifyConfig = field(default_factory=IdentifyConfig)
    ablate: AblateConfig = field(default_factory=AblateConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def faults(self) -> Iterator[str]:
        """Yields whether there is nowhere to write, or further rounds would go on from shards."""
        if not self.run_dir:
            yield self.wrong("run_dir", "a folder or URL")
        if self.finetune.shard != "none" and self.rounds.max_rounds > 1:
            yield self.finetune.wrong("shard", f"none with rounds.max_rounds={self.rounds.max_rounds}")
        if self.finetune.shard != "none" and self.model.quantisation != "none":
            yield self.finetune.wrong("shard", f"none with model.quantisation={self.model.quantisation}")
        if self.sweep.run and self.cluster.node_labels:
            yield self.cluster.wrong(
                "node_labels",
                "{} with sweep.run=true, as Ray Tune places trials without labels; cluster.accelerator_type "
                "is for them too",
            )
        if self.model.quantisation != "none":
            # They write weights that are codes here. No names are all of them.
            if "full" in self.compare.names or (self.compare.run and not self.compare.names):
                yield self.compare.wrong("names", f"names, full not among them, as {self._codes}")
            if "abliteration" in self.attack.names or (self.attack.run and not self.attack.names):
                yield self.attack.wrong("names", f"names, abliteration not among them, as {self._codes}")

    @property
    def _codes(self) -> str:
        return f"model.quantisation={self.model.quantisation} keeps experts as codes that nothing writes"
