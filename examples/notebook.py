# %% [markdown]
# # Find, check and repair the unsafe experts of a model
#
# This file is a notebook as a script: Jupyter (with Jupytext), VS Code and PyCharm open it with its cells, and
# `jupytext --to ipynb notebook.py` makes an `.ipynb` of it. It also runs as it is: `python examples/notebook.py`.
#
# It runs on the demo's tiny model, which is built in `.cache/` (a minute or two, once). Set `MODEL` and `PROMPTS` in the
# environment, or here, for your own: a checkpoint's folder or hub name, and a CSV, JSONL, JSON or Parquet file with `prompt`
# and `label` (safe or unsafe), better with `category` too.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_ray
from moe_ray.organisms import build_embedded

MODEL = os.environ.get("MODEL") or str(build_embedded(".cache"))
PROMPTS = os.environ.get("PROMPTS") or f"{MODEL}/prompts.jsonl"
OUT = Path("notebook")

model = AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)

# %% [markdown]
# ## Prompts and batches
#
# A batch holds safe and unsafe prompts of one category, so that what differs is harm and not the topic.

# %%
prompts = moe_ray.prepare(moe_ray.read_examples(PROMPTS), model=model, tokenizer=tokenizer)
print(prompts)

# %% [markdown]
# ## Which experts answer?
#
# `progress=True` is a bar: rich's in a notebook, tqdm's in a terminal, and a line now and then in a file.

# %%
counts = moe_ray.capture(model, tokenizer, prompts.batches, progress=True)
found = moe_ray.identify(counts)
print(found)
found.masks.to_frame().head()

# %%
batch = prompts.batches[0]
risk = found.risk[found.risk["batch_idx"] == batch.batch_idx]
grid = risk.pivot_table(index="layer", columns="expert", values="risk_diff_activation")
limit = grid.abs().to_numpy().max()
figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
image = axes.imshow(grid, cmap="cividis", vmin=-limit, vmax=limit, aspect="auto")
experts = found.masks.selected[batch.batch_idx]
axes.plot([e.expert for e in experts], [grid.index.get_loc(e.layer) for e in experts], "o", mfc="white", mec="black")
axes.set(xlabel="expert", ylabel="layer", title=f"Risk differences of batch {batch.batch_idx} ({batch.category})")
figure.colorbar(image, label="unsafe - safe")
OUT.mkdir(exist_ok=True)
figure.savefig(OUT / "risk.png")

# %% [markdown]
# ## Are they the cause?

# %%
checked = moe_ray.ablate(
    model, tokenizer, prompts.batches, found.masks, found.risk, held_out=prompts.test, max_batches=2, progress=True
)
print(checked.in_words())

# %% [markdown]
# ## Repair only those
#
# The rate is for a tiny model; leave `learning_rate` out for a real one.

# %%
before = moe_ray.evaluate(model, tokenizer, prompts.test, max_new_tokens=24, progress=True)
tuned = moe_ray.fine_tune(
    model,
    tokenizer,
    prompts.batches,
    found.masks,
    adapter=OUT / "adapter",
    base=MODEL,
    learning_rate=3e-3,
    progress=True,
)
after = moe_ray.evaluate(model, tokenizer, prompts.test, before=before, max_new_tokens=24, progress=True)
print(before, tuned, after, sep="\n")

# %%
both = before.to_frame().merge(after.to_frame(), on="id", suffixes=("", "_after"))
both.loc[both["label"] == "unsafe", ["category", "answer", "answer_after"]].head()

# %% [markdown]
# ## Keep it
#
# `OUT/adapter` holds the learned experts alone. `moe_ray.Adapter.from_pretrained(OUT / "adapter").merge(OUT / "repaired")`
# writes a plain checkpoint. A run of `moe-ray full` has figures ready: `moe_ray.open_run("runs/first").plot_masks()`.

# %%
adapter = moe_ray.Adapter.from_pretrained(OUT / "adapter")
print(adapter)
