"""Are the experts that were found the cause? Tokens are routed around them, and the model's own answers are scored again.

    python examples/causal_check.py [MODEL [PROMPTS]]

MODEL and PROMPTS as in find_experts.py.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_ray
from moe_ray.organisms import build_embedded

model_path = sys.argv[1] if len(sys.argv) > 1 else str(build_embedded(".cache"))
prompts_path = sys.argv[2] if len(sys.argv) > 2 else f"{model_path}/prompts.jsonl"

model = AutoModelForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path)
prompts = moe_ray.prepare(moe_ray.read_examples(prompts_path), model=model, tokenizer=tokenizer)
counts = moe_ray.capture(model, tokenizer, prompts.batches)
found = moe_ray.identify(counts)

# Held-out prompts did not choose the experts, so they are the fairer ones to ask.
checked = moe_ray.ablate(
    model, tokenizer, prompts.batches, found.masks, found.risk, held_out=prompts.test, max_batches=4, progress=True
)
print(checked.in_words())
