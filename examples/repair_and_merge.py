"""Finds the unsafe experts, repairs only those, measures it, and writes a plain checkpoint.

    python examples/repair_and_merge.py OUT [MODEL [PROMPTS]]

OUT is a new folder: OUT/adapter gets the learned experts, OUT/repaired the checkpoint, which needs no moe-ray.
MODEL and PROMPTS as in find_experts.py.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_ray
from moe_ray.organisms import build_embedded

out = Path(sys.argv[1])
model_path = sys.argv[2] if len(sys.argv) > 2 else str(build_embedded(".cache"))
prompts_path = sys.argv[3] if len(sys.argv) > 3 else f"{model_path}/prompts.jsonl"

model = AutoModelForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path)
prompts = moe_ray.prepare(moe_ray.read_examples(prompts_path), model=model, tokenizer=tokenizer)
found = moe_ray.identify(moe_ray.capture(model, tokenizer, prompts.batches))


class PrintsEpochs(moe_ray.Callback):
    """One line an epoch; `trainer.stop()` would end the training here."""

    def on_epoch_end(self, trainer, reports):
        """The mean loss of the epoch's steps."""
        print(f"epoch {reports[-1].epoch}: loss {sum(report.loss for report in reports) / len(reports):.3f}")


before = moe_ray.evaluate(model, tokenizer, prompts.test, max_new_tokens=24)
tuned = moe_ray.fine_tune(
    model,
    tokenizer,
    prompts.batches,
    found.masks,
    adapter=out / "adapter",
    base=model_path,
    checkpoints=out / "checkpoints",
    callbacks=[PrintsEpochs()],
    learning_rate=3e-3,  # for a tiny model; the default is for real ones
)
after = moe_ray.evaluate(model, tokenizer, prompts.test, before=before, max_new_tokens=24)
print(before, tuned, after, sep="\n")

adapter = moe_ray.Adapter.from_pretrained(out / "adapter")
adapter.merge(out / "repaired")
# To share the learned experts: adapter.push_to_hub("USER/NAME", base="HUB/NAME-OF-THE-BASE")
print(f"from_pretrained('{out / 'repaired'}') loads it")
