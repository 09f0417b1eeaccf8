"""Settings of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.auto import Auto
from moe_ray.config.fields import setting
from moe_ray.config.section import Section

TrainingRouting = Literal[
    "masked", "masked_unsafe", "masked_prompt", "masked_response", "boosted", "annealed", "natural"
]
"""Where a batch's tokens may go while it trains."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    """Fine-tuning of the unsafe experts, each batch through its own mask."""

    group: ClassVar[str] = "finetune"

    num_workers: int = setting(
        1,
        "workers that train together; several are Ray Train's; one trains in a model process that is there already; 0 = "
        "train in the process of the command. How many batches a step has depends on it (batches_per_step), so it is never "
        "decided by the machine",
        affects="speed",
        at_least=0,
    )
    gpus_per_worker: float | Auto = setting(  # noqa: RUF009
        "auto",
        "GPUs of one worker; with 2 or more the model is spread over them, layer by layer; auto = as many as the model's "
        "weights need, where the cluster has GPUs; 0 = CPU",
        affects="speed",
        at_least=0,
    )
    max_workers: int = setting(
        0,
        "more workers join, up to this many, while the cluster has room, and fewer go on, down to num_workers, when a node "
        "goes away: training then goes on from its last checkpoint; needs batches_per_step, so that a step is the same "
        "however many share it; 0 = always num_workers",
        affects="speed",
        at_least=0,
    )
    shard: Literal["none", "fsdp"] = setting(
        "none",
        "none = every worker holds all of the model; fsdp = FSDP2 spreads the frozen model over the workers, each of which "
        "reads and holds its part only, so that a model may be larger than one worker's memory; trained experts are on "
        "every worker; needs num_workers of 2 or more, and routers stay frozen",
        affects="speed",
    )
    epochs: int = setting(4, "passes over all batches", affects="weights", at_least=1)
    learning_rate: float = setting(  # between ESFT's 1e-5 (its configs/base.yaml) and the 5e-5 of transformers' Trainer
        2e-5,
        "AdamW's step size; 1e-5 to 5e-5 suit experts of real models; a tiny one takes steps a hundred times as large",
        affects="weights",
        above=0,
    )
    weight_decay: float = setting(
        0.0, "AdamW's decay, applied only to the experts of the batch being trained", affects="weights", at_least=0
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear",
        "learning rate after the warm-up: constant = stays; linear, cosine = falls to 0 until the end of the run, along a "
        "straight line or a cosine",
        affects="weights",
    )
    warmup: float = setting(
        0.05,
        "fraction of all steps over which the learning rate rises evenly from 0",
        affects="weights",
        at_least=0,
        below=1,
    )
    routing: TrainingRouting = setting(  # noqa: RUF009
        "natural",
        "which experts a batch's tokens may use while it trains: masked = only its unsafe experts; masked_unsafe = so for "
        "its unsafe prompts, while safe ones go where the router chooses; masked_prompt, masked_response = so for the "
        "tokens of prompts, or of responses, only; natural = those the router chooses; boosted = those the router chooses "
        "with finetune.boost added to the logits of the unsafe experts; annealed = boosted at first and natural in the end; "
        "in all of them only the batch's unsafe experts learn",
        affects="weights",
    )
    boost: float = setting(
        0.0,
        "routing boosted and annealed: added to the router logits of the batch's unsafe experts, with annealed at the first "
        "step; some 30 is as good as a mask",
        affects="weights",
        at_least=0,
    )
    anneal_share: float = setting(
        0.75,
        "routing annealed: the share of all steps over which finetune.boost falls evenly to 0; then routing is natural",
        affects="weights",
        above=0,
        at_most=1,
    )
    learn_from: Literal["all", "unsafe"] = setting(
        "all",
        "which examples of a batch it trains on: all = safe and unsafe ones; unsafe = only its unsafe ones",
        affects="weights",
    )
    router: Literal["frozen", "alternating"] = setting(
        "frozen",
        "whether the routers of the MoE layers learn too: frozen = only experts do; alternating = after every "
        "finetune.router_every steps of the experts the routers take one, under natural routing and with all experts fixed",
        affects="weights",
    )
    router_every: int = setting(
        1, "router alternating: steps of the experts between two of the routers", affects="weights", at_least=1
    )
    router_learning_rate: float = setting(
        2e-5,
        "router alternating: AdamW's step size for the routers, without decay; it follows the same schedule",
        affects="weights",
        above=0,
    )
    router_consistency: float = setting(
        1.0,
        "router alternating: factor of the KL divergence (nats, mean over tokens and layers) that keeps the routing of safe "
        "prompts at the base model's, beside the loss of the target responses",
        affects="weights",
        at_least=0,
    )
    router_drift: float = setting(
        0.0,
        "router alternating: the same for unsafe prompts",
        affects="weights",
        at_least=0,
    )
    patience: int = setting(
        0,
        "stop after this many epochs in a row without a lower validation loss; 0 = always train all epochs",
        affects="weights",
        at_least=0,
    )
    max_grad_norm: float = setting(
        1.0,
        "gradients are scaled down so that their norm over the step's experts is at most this; 0 = no clipping",
        affects="weights",
        at_least=0,
    )
    short_layers: Literal["allowed_only", "natural"] = setting(
        "allowed_only",
        "what a layer does that has fewer unsafe experts than a token uses (num_experts_per_tok): allowed_only = tokens "
        "use only those few; natural = the router chooses among all its experts, and the unsafe ones learn from the tokens "
        "that reach them. A layer with no unsafe expert always routes naturally",
        affects=("weights", "answers"),
    )
    rows_per_forward: int = setting(
        16,
        "examples of a batch that run at once, at most, those of like length together; changes memory, not the result",
        affects="speed",
        at_least=1,
    )
    tokens_per_forward: int = setting(
        4096,
        "tokens of a batch that run at once, padding included; changes memory, not the result; a longer example runs alone; "
        "0 = no limit",
        affects="speed",
        at_least=0,
    )
    tokens_of_a_pass: int = setting(
        128,
        "what it costs to run the rows of a batch in one pass more, in tokens: a batch of rows of unlike length is cut into "
        "as many as save more padding than they cost; changes time, not the result",
        affects="speed",
        at_least=0,
    )
    batches_per_step: int = setting(
        0,
        "batches of one optimiser step, shared among the workers; an expert's gradient is the mean over those batches in "
        "which it is unsafe; 0 = one batch for each worker",
        affects="weights",
        at_least=0,
    )
    length_window: int = setting(
        50,
        "steps whose batches are drawn together, sorted by length and cut into steps, so that workers that share a step "
        "finish together; at most a quarter of an epoch's steps; 0 = the batches of a step are drawn without regard to "
        "their length. No matter where a step has one batch",
        affects="weights",
        at_least=0,
    )
    batch_weights: tuple[str, ...] = setting(
        (),
        "NAME=WEIGHT entries, where NAME is a batch_idx or a category: the optimiser step of that batch's experts is "
        "multiplied by WEIGHT; 1 for all others",
        affects="weights",
    )
    dtype: Literal["float32", "model"] = setting(
        "float32",
        "number type of the trained copies of experts and of their optimiser state; model = the model's own",
        affects="weights",
    )
    activation_checkpointing: bool = setting(
        False,
        "compute each layer's forward pass again during the backward pass instead of keeping its activations: less "
        "memory, more time",
        affects="speed",
    )
    monitor: bool = setting(
        True,
        "check at every step that each batch trained under its own mask and no token was routed outside it",
        affects="speed",
    )
    log_every: int = setting(
        10,
        "steps between two lines of finetune/training.log; the first and the last step have one, and every step is in "
        "the history beside it",
        affects="presentation",
        at_least=1,
    )
    checkpoint_every: int = setting(
        0,
        "steps between checkpoints, from which an interrupted training goes on; 0 = at the end of every epoch",
        affects="speed",
        at_least=0,
    )

    @property
    def needs_ray_train(self) -> bool:
        """Whether several workers train, or may."""
        return max(self.num_workers, self.max_workers) > 1

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the boost, the routers' training, the batches of a step and their weights."""
        if (self.boost > 0) != (self.routing in ("boosted", "annealed")):
            yield self.wrong("boost", "a positive number with finetune.routing=boosted or annealed, 0 otherwise")
        yield from self._faults_of_sharding()
        if self.router == "alternating" and self.activation_checkpointing:
            yield self.wrong(
                "activation_checkpointing", "false with finetune.router=alternating, whose loss sees logits"
            )
        if self.router == "alternating" and self.learn_from == "unsafe" and self.router_consistency > 0:
            yield self.wrong("router_consistency", "0 with finetune.learn_from=unsafe, as no safe prompt is seen")
        if self.max_workers and not 0 < self.num_workers <= self.max_workers:
            yield self.wrong("max_workers", f"0, or at least finetune.num_workers={max(1, self.num_workers)}")
        elif self.max_workers > self.num_workers and self.batches_per_step < self.max_workers:
            yield self.wrong(
                "batches_per_step",
                f"a number, and at least one batch for each of finetune.max_workers={self.max_workers}: a step must not "
                "depend on how many workers there happen to be",
            )
        elif 0 < self.batches_per_step < self.num_workers:
            yield self.wrong("batches_per_step", f"0, or at least one batch for each of the {self.num_workers} workers")
        for entry in self.batch_weights:
            if not _is_weight(entry):
                yield self.wrong("batch_weights", "entries such as 3=2.0 or fraud=0.5, none negative", entry)

    def _faults_of_sharding(self) -> Iterator[str]:
        if self.shard == "none":
            return
        if self.num_workers < 2:
            yield self.wrong(
                "shard", f"none with finetune.num_workers={self.num_workers}, as fsdp spreads over several"
            )
        if self.max_workers > self.num_workers:
            yield self.wrong(
                "shard", f"none with finetune.max_workers={self.max_workers}: a part is of so many workers"
            )
        if self.router == "alternating":
            yield self.wrong("shard", "none with finetune.router=alternating, whose routers would be sharded too")
        if self.gpus_per_worker != "auto" and self.gpus_per_worker > 1:
            yield self.wrong(
                "shard", f"none with finetune.gpus_per_worker={self.gpus_per_worker}: a worker's part is on one"
            )


def _is_weight(entry: str) -> bool:
    name, _, weight = entry.rpartition("=")
    try:
        return bool(name) and 0 <= float(weight) < math.inf
    except ValueError:
        return False
