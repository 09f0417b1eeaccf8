"""A causal check of the model that is written by hand, for tests in any folder."""

from __future__ import annotations

import causal_model

import moe_ray
from moe_ray.ablation.plan import plan_batches, prompts_of_batches
from moe_ray.config.ablate import AblateConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.prompts.example_tables import batches_to_frame

CONFIG = AblateConfig(relabellings=200, max_new_tokens=4)


def causal_plans(number: int = 4):
    """What is measured of so many batches."""
    model, tokenizer, batches = causal_model.build("causal"), causal_model.tokenizer(), causal_model.batches(number)
    masks = masks_from_experts(
        {batch.batch_idx: [Expert(0, causal_model.OWN_EXPERT[batch.category])] for batch in batches},
        layers=(0,),
        num_experts=causal_model.NUM_EXPERTS,
    )
    risk = moe_ray.identify(moe_ray.capture(model, tokenizer, batches), permutations=0, resamples=0).risk
    categories = {batch.batch_idx: batch.category for batch in batches}
    prompts = prompts_of_batches(categories, batches_to_frame(batches), None, CONFIG, seed=0)
    return plan_batches(prompts, masks, risk, categories, CONFIG, num_experts_per_tok=1, seed=0)
