"""vLLM as an engine: it gets token ids and gives token ids and routes, and nothing that it says is taken on trust.

Rendering, tokenising and decoding stay moe-ray's own, so the engine is started without a tokenizer and knows no text. What
comes back is held against what was asked, request by request. Its import takes long and takes over the process's logging,
so it is imported when an engine is started.

vLLM's form, as of 0.32: `LLM.generate` takes `{"prompt_token_ids": [...]}` and a `SamplingParams` each, and gives a
`RequestOutput` each in that order, whose `outputs[0]` has `token_ids` (an end token included) and, where the engine was
started with `enable_return_routed_experts`, `routed_experts`: an integer array (tokens, decoder layers, experts per token)
without a row for the last generated token.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_ray.config.model import ModelConfig
from moe_ray.errors import InputError

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # The process has threads by now, and a forked one would wait for locks that nobody holds.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_SHARE_OF_A_GPU = 0.9
"""Of a GPU's memory that vLLM takes, as by its own default; of a fraction of a GPU that part."""


class VllmEngine:
    """A running engine.

    Args:
        config: which model; `dtype`, `revision`, `trust_remote_code` and `vllm_options` of it are used.
        path: folder of the checkpoint that is loaded instead, such as that of a repaired model; None = `config.path`.
        gpus: of this process: a fraction of one, one, or several, over which every tensor is spread; 0 = CPU.
        returns_routes: routes are recorded.

    Raises:
        InputError: vLLM is not there, or cannot be started with this model.
    """

    def __init__(
        self, config: ModelConfig, *, path: Path | None = None, gpus: float = 0.0, returns_routes: bool = False
    ) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            # The name is not written as an import: type checks run without it.
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(
                f"vLLM cannot be imported on this node: {error}; run pip install 'moe-ray[vllm]' on every node, or set the "
                "engine to transformers"
            ) from error
        folder = path or config.local_folder()
        options: dict[str, Any] = {
            "model": str(folder or config.path),
            "revision": config.revision if folder is None else None,
            "dtype": config.dtype,
            "trust_remote_code": config.trust_remote_code,
            "tensor_parallel_size": max(1, int(gpus)),
            "skip_tokenizer_init": True,
            # Else the checkpoint's generation_config.json would say how tokens are drawn.
            "generation_config": "vllm",
            "seed": 0,
        }
        if gpus:
            options["gpu_memory_utilization"] = _SHARE_OF_A_GPU * min(1.0, gpus)
        if gpus > 1:
            # vLLM's own executor on Ray would ask Ray for GPUs that this process holds already.
            options["distributed_executor_backend"] = "mp"
        if returns_routes:
            # Rows of a prefix that was cached are another request's.
            options |= {"enable_return_routed_experts": True, "enable_prefix_caching": False}
        try:
            self._llm = self._vllm.LLM(**options | dict(config.vllm_options))
        except Exception as error:  # whatever vLLM and the libraries under it raise
            first = str(error).strip().partition("\n")[0]
            raise InputError(
                f"vLLM {self.version} cannot be started with {config.path!r}: {type(error).__name__}: {first}; see "
                "model.vllm_options, or set the engine to transformers"
            ) from error

    @property
    def version(self) -> str:
        """Of vLLM; empty where it does not say."""
        return str(getattr(self._vllm, "__version__", ""))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Collection[int],
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[list[int]]:
        """Generated token ids of each prompt, an end token included.

        Args:
            prompts: token ids.
            max_new_tokens: the most for each.
            ends: token ids that end a generation.
            temperature: 0 = the likeliest token each time; above 0 = drawn from softmax(logits / temperature).
            seeds: of each prompt's random numbers; used with a temperature only.

        Raises:
            InputError: what came back is not of the form that is known.
        """
        asked = [
            self._sampling(max_new_tokens, ends, temperature, seeds[index] if temperature else None)
            for index in range(len(prompts))
        ]
        return [_token_ids(output, max_new_tokens) for output in self._ask(prompts, asked)]

    def routes(self, texts: Sequence[Sequence[int]]) -> list[npt.NDArray[np.integer]]:
        """What is recorded of given tokens, not checked: `routing.engine_routes.read_routes` does that.

        Args:
            texts: token ids, prompts with their answers; one token less than the model takes at most, since the engine
                generates one behind them.

        Raises:
            InputError: what came back is not of the form that is known, or has no routes.
        """
        asked = [self._sampling(1, (), 0.0, None)] * len(texts)
        found = []
        for output in self._ask(texts, asked):
            _token_ids(output, 1)
            routes = getattr(output.outputs[0], "routed_experts", None)
            if not isinstance(routes, np.ndarray):
                raise _wrong(
                    f"routed_experts: got {type(routes).__name__}, expected an array; this version, or its kernels for "
                    "this model, records no routes"
                )
            found.append(routes)
        return found

    def _sampling(self, max_new_tokens: int, ends: Collection[int], temperature: float, seed: int | None) -> Any:
        return self._vllm.SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            seed=seed,
            # Which tokens end an answer is said here alone, so that it is the same under either engine.
            ignore_eos=True,
            stop_token_ids=sorted(ends),
            detokenize=False,
        )

    def _ask(self, prompts: Sequence[Sequence[int]], asked: Sequence[Any]) -> list[Any]:
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = list(self._llm.generate(requests, list(asked), use_tqdm=False))
        if len(outputs) != len(prompts):
            raise _wrong(f"got {len(outputs)} outputs, expected {len(prompts)}, one for each prompt")
        for output, prompt in zip(outputs, prompts, strict=True):
            ran = list(output.prompt_token_ids or ())
            if ran != list(prompt):
                raise _wrong(
                    f"prompt_token_ids: got {len(ran)} ids, expected the {len(prompt)} that were given; it ran another text"
                )
            if len(output.outputs) != 1:
                raise _wrong(f"outputs: got {len(output.outputs)}, expected 1 for each prompt")
        return outputs


def _token_ids(output: Any, most: int) -> list[int]:
    ids = [int(token) for token in output.outputs[0].token_ids]
    if not 1 <= len(ids) <= most:
        raise _wrong(f"token_ids: got {len(ids)}, expected 1 to {most}")
    return ids


def _wrong(what: str) -> InputError:
    return InputError(f"vLLM's answer: {what}; set the engine to transformers")
