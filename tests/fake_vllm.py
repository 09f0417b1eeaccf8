"""What moe-ray uses of vLLM 0.32, over a transformers model on the CPU; shipped to Ray's workers by value.

Signatures and forms are those of vLLM's documentation and source: unknown arguments are refused, a prompt that leaves no
room for a token is refused, `token_ids` has the end token, `routed_experts` has every decoder layer and no row for the last
token. `FAULTS` are the wrong forms that releases of vLLM are known to have given.
"""

from __future__ import annotations

import os
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

KNOWN = {
    *("model", "revision", "dtype", "trust_remote_code", "tensor_parallel_size", "skip_tokenizer_init", "seed"),
    *("generation_config", "gpu_memory_utilization", "distributed_executor_backend", "enable_return_routed_experts"),
    *("enable_prefix_caching", "enforce_eager", "max_model_len"),
}


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)
    detokenize: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    routed_experts: np.ndarray | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


class LLM:
    fault = ""
    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        if unknown := options.keys() - KNOWN:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        assert options["skip_tokenizer_init"]
        LLM.asked.append({"model": model, **options})
        dtype = "float32" if options["dtype"] == "auto" else options["dtype"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, experts_implementation="eager").eval()
        text = self.model.config.get_text_config()
        self.max_model_len = options.get("max_model_len") or text.max_position_embeddings
        self.returns_routes = options.get("enable_return_routed_experts", False)
        self.num_experts_per_tok, self.num_layers = text.num_experts_per_tok, text.num_hidden_layers
        self.experts = {
            number: module
            for name, module in self.model.named_modules()
            if name.endswith(".experts")
            for number in [int(name.split(".layers.")[1].split(".")[0])]
        }

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert len(sampling_params) == len(prompts)
        found = [
            self._one(str(number), prompt["prompt_token_ids"], asked)
            for number, (prompt, asked) in enumerate(zip(prompts, sampling_params, strict=True))
        ]
        return found[:-1] if LLM.fault == "lost_output" else found

    def _one(self, name: str, prompt: list[int], asked: SamplingParams) -> RequestOutput:
        if len(prompt) >= self.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) plus the number of requested output tokens "
                             f"(at least 1) is longer than the maximum model length of {self.max_model_len}.")  # fmt: skip
        assert asked.ignore_eos
        assert not asked.detokenize
        generator = None if asked.seed is None else torch.Generator().manual_seed(asked.seed)
        ids, generated, stop = list(prompt), [], None
        while len(generated) < asked.max_tokens and len(ids) < self.max_model_len and stop is None:
            with torch.inference_mode():
                logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            if asked.temperature:
                probabilities = torch.softmax(logits / asked.temperature, dim=0)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            else:
                token = int(logits.argmax())
            generated.append(token)
            ids.append(token)
            stop = token if token in asked.stop_token_ids else None
        routes = self._routes(ids[:-1]) if self.returns_routes else None
        if LLM.fault == "other_text":
            prompt = prompt[1:]
        done = CompletionOutput(
            index=0,
            text="",
            token_ids=generated,
            cumulative_logprob=None,
            logprobs=None,
            routed_experts=None if routes is None else spoiled(routes, LLM.fault),
            finish_reason="length" if stop is None else "stop",
            stop_reason=stop,
        )
        return RequestOutput(name, None, list(prompt), None, [done], True)

    def _routes(self, ids: list[int]) -> np.ndarray:
        routes = np.zeros((len(ids), self.num_layers, self.num_experts_per_tok), dtype=np.uint8)

        def hook_of(layer):
            def hook(module, args):
                routes[:, layer] = args[1].numpy().reshape(len(ids), -1)

            return hook

        hooks = [module.register_forward_pre_hook(hook_of(layer)) for layer, module in self.experts.items()]
        with torch.inference_mode():
            self.model(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return routes


def spoiled(routes: np.ndarray, fault: str) -> np.ndarray | None:
    """Routes as a release with this fault gives them."""
    changed = routes.copy()
    if fault == "zero_rows":
        changed[-1] = 0
    elif fault == "last_row_missing":
        changed = changed[:-1]
    elif fault == "physical_ids":
        changed[0, -1, 0] = 250
    elif fault == "shifted_rows":
        changed = np.roll(changed, 1, axis=0)
    elif fault == "floats":
        return changed.astype(np.float32)
    elif fault == "none":
        return None
    return changed


def module(fault: str = "") -> types.ModuleType:
    """The package, as `import vllm` finds it."""
    LLM.fault = fault
    LLM.asked = []
    package = types.ModuleType("vllm")
    package.__version__ = "0.32.0+fake"
    package.LLM, package.SamplingParams = LLM, SamplingParams
    return package


def holder(model, num_processes, *, fault="", asked_file="", **options):
    """An `EngineHolder` in whose process `import vllm` finds this."""
    from moe_ray.orchestration.cluster.engine_process import EngineHolder

    sys.modules["vllm"] = module(fault)
    try:
        made = EngineHolder(model, num_processes, **options)
    finally:
        del sys.modules["vllm"]
    if asked_file:
        with open(asked_file, "a") as file:
            file.write(f"{os.getpid()} {LLM.asked[-1]}\n")
    return made
