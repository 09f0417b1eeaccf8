"""Steers a model at inference: tokens are routed around the experts that were found. Nothing is trained.

    python examples/steer.py [MODEL [PROMPTS]]

MODEL and PROMPTS as in find_experts.py.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_ray
from moe_ray.organisms import build_embedded
from moe_ray.routing.steering import Steering, steered

model_path = sys.argv[1] if len(sys.argv) > 1 else str(build_embedded(".cache"))
prompts_path = sys.argv[2] if len(sys.argv) > 2 else f"{model_path}/prompts.jsonl"

model = AutoModelForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path)
prompts = moe_ray.prepare(moe_ray.read_examples(prompts_path), model=model, tokenizer=tokenizer)
found = moe_ray.identify(moe_ray.capture(model, tokenizer, prompts.batches))

# The batches of one category, and what the model says to a held-out prompt of it.
category = prompts.batches[0].category
experts = {e for batch in prompts.batches if batch.category == category for e in found.masks.selected[batch.batch_idx]}
asked = next(example for example in prompts.test if example.label == "unsafe" and example.category == category)


def answer() -> str:
    """The model's greedy answer."""
    rendered = tokenizer.apply_chat_template(
        list(asked.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**rendered, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(ids[0, rendered["input_ids"].shape[1] :], skip_special_tokens=True)


print("as it is:      ", answer())
with steered(model, Steering(experts=tuple(sorted(experts)), manner="around")):
    print("routed around: ", answer())
