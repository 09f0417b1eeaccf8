"""Experts as codes against the same experts as they are: memory while loading and after, choices, losses.

    python benchmarks/quantised.py                    # random, 3 layers of OLMoE-1B-7B's shape, a small vocabulary
    python benchmarks/quantised.py --layers 1         # to see that it works
    python benchmarks/quantised.py --model FOLDER     # any checkpoint

Every row is a process of its own. `loading` is the most anonymous memory of it while the model was read, above what it held
before: what it has of its own, without files that are mapped, read from /proc fifty times a second. Choices are those of
experts over 512 random tokens, without the first MoE layer, which chooses before any expert was asked. Losses are of three
steps of masked training on two experts a layer, and their largest difference from those of the plain model.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_ray.config.finetune import FinetuneConfig
from moe_ray.config.model import ModelConfig
from moe_ray.experts import Expert, masks_from_experts
from moe_ray.finetuning.trainable_experts import trainable_experts
from moe_ray.finetuning.trainer import MaskedTrainer
from moe_ray.models.loading import load_model
from moe_ray.models.moe_layers import find_moe_layers, routing_of_call
from moe_ray.models.tokenization import TokenizedRow

GB = 1e9


def anonymous() -> int:
    """Bytes that this process holds of its own."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def measure(model_path: str, quantisation: Any, out: Path) -> None:
    """Loads the model, runs and trains it, and writes what was found."""
    torch.manual_seed(0)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(ModelConfig(path=model_path, dtype="bfloat16", quantisation=quantisation), device="cpu")
    done.set()
    watcher.join()
    layers = find_moe_layers(model)
    ids = torch.randint(3, model.config.vocab_size, (8, 64))
    choices: list[torch.Tensor] = []
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: choices.append(routing_of_call(layer, args, kwargs)[1].sort().values),
            with_kwargs=True,
        )
        for layer in layers
    ]
    with torch.inference_mode():
        logits = model(ids).logits.float()
    for hook in hooks:
        hook.remove()
    chosen = {0: [Expert(layer.layer, expert) for layer in layers for expert in (0, 1)]}
    masks = masks_from_experts(chosen, layers=layers.layers, num_experts=layers.num_experts)
    rows = {0: [TokenizedRow(row[:12], row[12:16], is_unsafe=n % 2 == 0) for n, row in enumerate(ids[:4].tolist())]}
    config = FinetuneConfig(routing="masked", epochs=3, learning_rate=1e-3, schedule="constant")
    with trainable_experts(model, masks.union) as trainable:
        losses = [step.loss for step in MaskedTrainer(model, trainable, rows, masks, config, pad_id=0, seed=0).run()]
    stored = {id(t): t.numel() * t.element_size() for layer in layers for t in layer.experts.parameters()}
    found = {"experts": sum(stored.values()), "loading": peak[0] - before, "logits": logits, "choices": choices}
    torch.save(found | {"losses": torch.tensor(losses)}, out)


def write_random(config: OlmoeConfig, path: str) -> None:
    """A checkpoint with normal weights, drawn in float32: many times as fast as the library does in bfloat16."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            for part in parameter if parameter.dim() == 3 else (parameter,):
                part.copy_(
                    torch.randn(part.shape, generator=random) * 0.02 if part.dim() > 1 else torch.ones(part.shape)
                )
    model.save_pretrained(path)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], arguments.measure[1], Path(arguments.measure[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or str(Path(folder, "model"))
        if arguments.model is None:
            config = OlmoeConfig(
                hidden_size=2048, intermediate_size=1024, num_hidden_layers=arguments.layers, num_attention_heads=16,
                num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, vocab_size=1024, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, dtype="bfloat16",
            )  # fmt: skip
            write_random(config, path)
        results = {}
        for method in ("none", "int8", "4bit"):
            out = Path(folder, method)
            subprocess.run([sys.executable, __file__, "--measure", path, method, str(out)], check=True)
            results[method] = torch.load(out, weights_only=True)
    print("| experts as | their bytes, GB | of plain | loading, GB | logits moved | choices moved | losses moved |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = results["none"]
    for method, found in results.items():
        moved = total = 0
        for one, other in zip(found["choices"][1:], plain["choices"][1:], strict=True):
            moved += sum(len(set(a) - set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True))
            total += one.numel()
        off = ((found["logits"] - plain["logits"]).pow(2).mean().sqrt() / plain["logits"].std()).item()
        cells = (
            f"{found['experts'] / GB:.3f}", f"{found['experts'] / plain['experts']:.3f}", f"{found['loading'] / GB:.2f}",
            f"{off:.4f}", f"{moved} of {total}", f"{(found['losses'] - plain['losses']).abs().max().item():.4f}",
        )  # fmt: skip
        print(f"| {method} | {' | '.join(cells)} |")
    print(json.dumps({method: found["losses"].tolist() for method, found in results.items()}))


if __name__ == "__main__":
    main()
