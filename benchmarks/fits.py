"""What fits where: released models on some machines, computed by the function that a run decides with.

    python benchmarks/fits.py

Models are built on the meta device from the numbers of their released configurations, in bfloat16, so nothing is downloaded
or loaded. `copies` are processes that hold the model, and the GPUs of each; `most trained` is how many experts one of them
can learn at once (16 bytes a learned number beside the weights), of all that there are. Every figure is computed.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import AutoConfig

from moe_ray.config.io import with_settings
from moe_ray.config.model import ModelConfig
from moe_ray.config.run import Config
from moe_ray.errors import InputError
from moe_ray.resources.decide import decide
from moe_ray.resources.fitting import RESERVED
from moe_ray.resources.model_size import ModelSize, size_of
from moe_ray.resources.nodes import GB, Node
from moe_ray.resources.process_memory import largest_union

MODELS = {
    "OLMoE-1B-7B": ("olmoe", {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 1024, "vocab_size": 50304}),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        },
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        {
            "num_hidden_layers": 36, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", {}),
}  # fmt: skip
MACHINES = {
    "2 cores, 24 GiB": Node(cpus=2, memory=24 << 30),
    "64 cores, 512 GB": Node(cpus=64, memory=512 * GB),
    "1 x L4 (24 GB)": Node(cpus=16, memory=64 * GB, gpus=1, gpu_memory=24 * GB, gpu_name="L4"),
    "1 x H100 (80 GB)": Node(cpus=26, memory=200 * GB, gpus=1, gpu_memory=80 * GB, gpu_name="H100"),
    "8 x H100 (80 GB)": Node(cpus=192, memory=2000 * GB, gpus=8, gpu_memory=80 * GB, gpu_name="H100"),
    "8 x H200 (141 GB)": Node(cpus=192, memory=2000 * GB, gpus=8, gpu_memory=141 * GB, gpu_name="H200"),
}


def released_size(name: str) -> ModelSize:
    """The numbers of a released model, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    kind, numbers = MODELS[name]
    config = AutoConfig.for_model(kind, **numbers, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return size_of(model, ModelConfig(path=f"hub/{name}"))


def cells(model: ModelSize, node: Node) -> tuple[str, str, str]:
    """Type, copies and the largest union on a machine."""
    try:
        decision = decide(Config(), model, [node])
    except InputError:
        return "–", "does not fit", "–"
    capture = decision.config.capture
    gpus = decision.gpus_per_copy
    copies = f"{capture.num_actors} x {gpus} GPU{'s' * (gpus > 1)}" if gpus else "1 x CPU"
    # A training may take all GPUs of the node for its one worker.
    room = node.gpus * (node.gpu_memory or 0) if gpus else node.memory - RESERVED
    most = largest_union(model, with_settings(decision.config, {"finetune.dtype": "float32"}), room)
    return decision.dtype, copies, f"{most} of {model.experts}"


def main() -> None:
    """Prints the tables."""
    print("| model | parameters | experts | an expert, MB | weights in bfloat16, GB |\n| --- | --- | --- | --- | --- |")
    sizes = {name: released_size(name) for name in MODELS}
    for name, model in sizes.items():
        weights = model.bytes_in("bfloat16") / GB
        expert = model.expert_parameters * 2 / 1e6
        print(f"| {name} | {model.parameters / 1e9:.1f} B | {model.experts:,} | {expert:.1f} | {weights:.1f} |")
    print("\n| model, GB | bfloat16 | experts in int8 | experts in 4bit |\n| --- | --- | --- | --- |")
    for name, model in sizes.items():
        of_all = [replace(model, quantisation=method).bytes_in("bfloat16") / GB for method in ("none", "int8", "4bit")]
        print(f"| {name} | {' | '.join(f'{size:.1f}' for size in of_all)} |")
    print("\n| model | machine | type | copies | most trained at once |\n| --- | --- | --- | --- | --- |")
    for name, model in sizes.items():
        for machine, node in MACHINES.items():
            print(f"| {name} | {machine} | {' | '.join(cells(model, node))} |")


if __name__ == "__main__":
    main()
