"""Which thresholds and numbers of experts? The routing is captured once, and every setting is read off the same table.

    python examples/sweep.py [MODEL [PROMPTS]]

MODEL and PROMPTS as in find_experts.py. Nothing is trained; `moe-ray sweep` also trains and scores each setting.
"""

import sys
from dataclasses import replace

from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_ray
from moe_ray.identification.overlap import sweep_union
from moe_ray.identification.selection import difference_column, select
from moe_ray.organisms import build_embedded

model_path = sys.argv[1] if len(sys.argv) > 1 else str(build_embedded(".cache"))
prompts_path = sys.argv[2] if len(sys.argv) > 2 else f"{model_path}/prompts.jsonl"

model = AutoModelForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path)
prompts = moe_ray.prepare(moe_ray.read_examples(prompts_path), model=model, tokenizer=tokenizer)
counts = moe_ray.capture(model, tokenizer, prompts.batches, progress=True)

# The differences, intervals and p-values do not depend on the threshold: they are computed once.
found = moe_ray.identify(counts)
table = sweep_union(
    found.risk,
    thresholds=[0.02, 0.05, 0.1, 0.2],
    top_ks=[2, 5, 50],
    reference=found.masks,
    column=difference_column(found.config),
)
print("kept and added: experts of the union beside those of the default settings")
print(table.to_string(index=False, float_format="{:.3f}".format))

# The masks of another setting, from the same table.
few = select(found.risk, replace(found.config, top_k=2))
print(f"top_k=2: {len(few.union_experts)} experts in all: {' '.join(map(str, few.union_experts))}")
