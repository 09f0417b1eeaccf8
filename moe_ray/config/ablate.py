"""Settings of the causal check: which experts are taken away, on which prompts, and what is called a cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_ray.config.auto import Auto
from moe_ray.config.fields import setting
from moe_ray.config.section import Section


@dataclass(frozen=True, kw_only=True)
class AblateConfig(Section):
    """Whether a batch's unsafe experts are what its unsafe answers come from: tokens are routed around them."""

    group: ClassVar[str] = "ablate"

    run: Literal["auto", "true", "false"] = setting(
        "auto",
        "whether the full workflow does the check; the ablate workflow always does; auto = where it costs at most a tenth "
        "of the run, in tokens, else without the single experts and coalitions where that does",
        affects="ablation",
    )
    max_batches: int = setting(
        12,
        "most batches that are checked, spread evenly over the categories; 0 = all",
        affects="ablation",
        at_least=0,
    )
    prompts: int = setting(8, "most prompts of each label that a batch is asked", affects="ablation", at_least=1)
    source: Literal["held_out", "batch"] = setting(
        "held_out",
        "whose prompts those are: held_out = of the batch's category, held out (the validation split, or the test split "
        "where there is none), and the batch's own where there are fewer than 4 of a label; batch = the batch's own, "
        "which chose the experts",
        affects="ablation",
    )
    max_new_tokens: int = setting(
        32, "longest answer of the model's own that is scored, in tokens", affects="ablation", at_least=1
    )
    draws: int = setting(
        5,
        "how many sets of other experts, as many of each layer and with the nearest share of tokens, each batch is "
        "compared with",
        affects="ablation",
        at_least=1,
    )
    others: int = setting(
        3, "how many batches of other categories lend each batch their experts", affects="ablation", at_least=0
    )
    forced: bool = setting(
        True, "also have tokens use the selected experts only, and as many others only", affects="ablation"
    )
    leave_one_out: int = setting(
        8,
        "how many of a batch's experts, the strongest first, are also taken away alone, and also left in place alone while "
        "the rest of the selection is away: two sets for each; 0 = none",
        affects="ablation",
        at_least=0,
    )
    curve: int = setting(
        5,
        "how many sizes of coalitions of the strongest experts are also taken away: 1, 2, 4, 8 and so on; 0 = none",
        affects="ablation",
        at_least=0,
    )
    generate: bool = setting(
        True,
        "also let the model answer without the selected experts, and count refusals by their wording",
        affects="ablation",
    )
    min_effect: float = setting(
        0.25,
        "smallest difference that is called an effect, in nats per token: 0.25 = an answer's tokens keep 78% of their "
        "probability; 0.1 = 90%",
        affects="ablation",
        at_least=0,
    )
    alpha: float = setting(0.05, "largest p that is called significant", affects="ablation", above=0, below=1)
    relabellings: int = setting(
        20_000,
        "relabellings that each p comes from: all there are of one batch's prompts if there are no more than this, else "
        "this many at random",
        affects="ablation",
        at_least=100,
    )
    tokens_per_forward: int = setting(
        8192,
        "tokens that are scored or answered at once, padding included; halved by a process whose GPU runs out of memory",
        affects="speed",
        at_least=1,
    )
    num_actors: int | Auto = setting(  # noqa: RUF009
        "auto",
        "processes that check batches at the same time, each with a copy of the model; auto = as many as the GPUs "
        "have room for, and without GPUs one on each node",
        affects="speed",
        at_least=1,
    )
    gpus_per_actor: float | Auto = setting(  # noqa: RUF009
        "auto",
        "GPUs of one process; auto = as many as the model's weights need, where the cluster has GPUs; 0 = CPU",
        affects="speed",
        at_least=0,
    )

    def faults(self) -> Iterator[str]:
        """Yields whether so few relabellings could never reach alpha."""
        if self.relabellings * self.alpha < 1:
            yield self.wrong("relabellings", f"at least 1 / ablate.alpha = {1 / self.alpha:.0f}")
