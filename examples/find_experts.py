"""Which experts answer for unsafe prompts of your own? Nothing is trained.

    python examples/find_experts.py [MODEL [PROMPTS]]

MODEL is a checkpoint's folder or hub name; without one the demo's tiny model is built in .cache/ (a minute, once), and its
own prompts are taken. PROMPTS is a CSV, JSONL, JSON or Parquet file with `prompt` and `label` (safe or unsafe), better with
`category` too.
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
counts = moe_ray.capture(model, tokenizer, prompts.batches, progress=True)
found = moe_ray.identify(counts)

print(found)
for batch in prompts.batches:
    experts = found.masks.selected[batch.batch_idx]
    print(f"batch {batch.batch_idx} ({batch.category}): {' '.join(map(str, experts)) or 'none'}")
