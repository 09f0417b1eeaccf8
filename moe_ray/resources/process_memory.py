"""What a process takes, computed before it is there: weights, what is learned, and about what passes through.

Weights and training state are exact. Activations are rules of thumb: for a token 16 numbers as wide as the hidden state
while a layer is computed, and 34 bytes for each layer and unit of that width which a backward pass keeps (Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", without its attention term).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from moe_ray.config.run import Config
from moe_ray.resources.model_size import BYTES, ModelSize
from moe_ray.resources.training import training_bytes, worker_weights

_NUMBERS_WHILE_COMPUTING = 16
_KEPT_BYTES = 34
_LOGIT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Bytes of one process.

    Attributes:
        what: it does.
        weights: of the model.
        learned: copies, gradients and optimiser state.
        activations: about.
    """

    what: str
    weights: int
    learned: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.learned + self.activations


def process_memory(model: ModelSize, config: Config, *, union: int, row_tokens: int) -> list[ProcessMemory]:
    """What the processes of each stage take.

    Args:
        model: which one.
        config: with the type that was decided.
        union: experts that are learned.
        row_tokens: of the longest prompt with its answer, about.
    """
    dtype = config.model.dtype
    # Of a sharded model a process has its part, beside a layer or two that are whole while they compute.
    weights, number = model.bytes_in(dtype) // config.model.num_shards, BYTES[dtype]
    answers = config.evaluate.tokens_per_forward
    settings = config.finetune
    batch = config.prompts.safe_per_batch + config.prompts.unsafe_per_batch
    # A micro-batch: limited by tokens or by rows, else all rows of a batch.
    rows = min(batch, settings.rows_per_forward or batch)
    trained = min(settings.tokens_per_forward or rows * row_tokens, rows * row_tokens)
    layers_kept = 1 if settings.activation_checkpointing else model.layers
    return [
        ProcessMemory(
            what="capture", weights=weights, activations=_computing(model, config.capture.tokens_per_forward, number)
        ),
        ProcessMemory(
            what="answers",
            weights=weights,
            # Keys and values of all layers, as wide as the hidden state at most.
            activations=_computing(model, answers, number) + answers * model.layers * 2 * model.hidden * number,
        ),
        ProcessMemory(
            what=f"training of {union} experts",
            weights=worker_weights(model, config),
            learned=training_bytes(model, union, dtype=dtype, config=settings),
            activations=trained * (layers_kept * model.hidden * _KEPT_BYTES + 2 * model.vocabulary * _LOGIT_BYTES),
        ),
    ]


def _computing(model: ModelSize, tokens: int, number: int) -> int:
    return tokens * model.hidden * _NUMBERS_WHILE_COMPUTING * number


def largest_union(model: ModelSize, config: Config, room: int) -> int:
    """The most experts whose training has room in so many bytes beside the weights; 0 = none.

    Args:
        model: which one.
        config: with the type that was decided.
        room: bytes for weights and training state of one worker.
    """
    left = room - worker_weights(model, config)
    return bisect_right(
        range(1, model.experts + 1),
        left,
        key=lambda union: training_bytes(model, union, dtype=config.model.dtype, config=config.finetune),
    )
