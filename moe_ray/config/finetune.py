"""Settings of masked fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe_ray.config.fields import _setting, require


def _is_weight(entry: str) -> bool:
    name, _, weight = entry.rpartition("=")
    try:
        return bool(name) and 0 <= float(weight) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Masked fine-tuning of the union of unsafe experts."""

    num_workers: int = _setting(1, "Ray Train workers; 0 trains in this process without Ray Train")
    gpus_per_worker: float = _setting(
        0.0, "GPUs of one worker; 0 runs on CPU; with 2 or more the model is spread over them, layer by layer"
    )
    epochs: int = _setting(4, "passes over all batches")
    learning_rate: float = _setting(3e-3, "AdamW's step size")
    weight_decay: float = _setting(0.0, "AdamW's decay, applied to the experts of the batch being trained only")
    schedule: Literal["constant", "linear", "cosine"] = _setting(
        "linear", "learning rate after the warm-up: constant, or falling to 0 at the end of the run"
    )
    warmup: float = _setting(0.0, "share of all steps in which the learning rate rises evenly (0 to below 1)")
    routing: Literal["masked", "natural", "boosted"] = _setting(
        "masked",
        "where a batch's tokens may go while it trains: masked = to its unsafe experts only; natural = as the model "
        "routes; boosted = as the model routes with finetune.boost added to its unsafe experts' router logits; "
        "only the batch's unsafe experts learn in any case",
    )
    boost: float = _setting(0.0, "routing boosted: added to the router logits of the batch's unsafe experts")
    patience: int = _setting(
        0, "stop after this many epochs in a row without a lower validation loss; 0 = always train all epochs"
    )
    max_grad_norm: float = _setting(1.0, "gradient norm over the step's experts is clipped to this; 0 = no clipping")
    empty_layers: Literal["natural"] = _setting(
        "natural", "policy of a layer with no unsafe expert in the batch: natural = all its experts may be routed"
    )
    short_layers: Literal["allowed_only", "natural"] = _setting(
        "allowed_only",
        "policy of a layer with fewer unsafe experts than num_experts_per_tok: allowed_only = tokens use only those; "
        "natural = all its experts may be routed, and its unsafe ones learn from the tokens that reach them",
    )
    rows_per_forward: int = _setting(16, "examples of a batch run at once; changes memory, not the result")
    tokens_per_forward: int = _setting(
        0,
        "tokens of a batch run at once, padding included; changes memory, not the result; 0 = no limit but the examples",
    )
    batches_per_step: int = _setting(
        0,
        "batches in one optimiser step, shared out among the workers; an expert's gradient is averaged over those whose "
        "mask holds it; 0 = one for each worker",
    )
    batch_weights: tuple[str, ...] = _setting(
        (),
        "NAME=WEIGHT entries, NAME a batch_idx or a category: the step of the batch's experts is multiplied by WEIGHT; "
        "1 elsewhere",
    )
    dtype: Literal["float32", "model"] = _setting(
        "float32", "type of the trained copies of experts and of their optimiser state; model = the model's own"
    )
    activation_checkpointing: bool = _setting(
        False, "run each layer's forward again in the backward pass instead of keeping its activations: less memory"
    )
    monitor: bool = _setting(
        True, "check at every step that each batch trained under its own mask and no token left it"
    )
    checkpoint_every: int = _setting(0, "steps between checkpoints; 0 = at the end of every epoch")

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "finetune.num_workers", self.num_workers, "0 or more")
        require(self.gpus_per_worker >= 0, "finetune.gpus_per_worker", self.gpus_per_worker, "0 or more")
        require(self.epochs > 0, "finetune.epochs", self.epochs, "1 or more")
        require(self.learning_rate > 0, "finetune.learning_rate", self.learning_rate, "a positive number")
        require(self.weight_decay >= 0, "finetune.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "finetune.warmup", self.warmup, "a fraction from 0 to below 1")
        require(
            (self.boost > 0) == (self.routing == "boosted"),
            "finetune.boost",
            self.boost,
            "a positive number with finetune.routing=boosted, 0 otherwise",
        )
        require(self.patience >= 0, "finetune.patience", self.patience, "0 or more")
        require(self.tokens_per_forward >= 0, "finetune.tokens_per_forward", self.tokens_per_forward, "0 or more")
        require(self.max_grad_norm >= 0, "finetune.max_grad_norm", self.max_grad_norm, "0 or more")
        require(self.rows_per_forward > 0, "finetune.rows_per_forward", self.rows_per_forward, "1 or more")
        require(
            self.batches_per_step == 0 or self.batches_per_step >= self.num_workers,
            "finetune.batches_per_step",
            self.batches_per_step,
            f"0, or at least one batch for each of the {self.num_workers} workers",
        )
        for entry in self.batch_weights:
            require(
                _is_weight(entry), "finetune.batch_weights", entry, "entries such as 3=2.0 or fraud=0.5, none negative"
            )
        require(self.checkpoint_every >= 0, "finetune.checkpoint_every", self.checkpoint_every, "0 or more")
