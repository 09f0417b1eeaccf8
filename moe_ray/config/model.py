"""Settings of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe_ray.config.fields import EMBEDDED, setting
from moe_ray.config.section import Section
from moe_ray.errors import InputError

_SET_BY_MOE_RAY = {
    *("model", "revision", "dtype", "trust_remote_code", "tensor_parallel_size", "skip_tokenizer_init"),
    *("generation_config", "enable_return_routed_experts", "enable_prefix_caching"),
}
"""Arguments of vllm.LLM that other settings say, or that results would be wrong without."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which model is analysed and repaired."""

    group: ClassVar[str] = "model"

    path: str = setting(
        EMBEDDED,
        "checkpoint folder, its URL in an object store such as s3://BUCKET/MODEL, or name on the Hugging Face hub; what is "
        "not here is fetched once by each node. 'embedded' builds the tiny OLMoE that ships with moe-ray",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    revision: str = setting(
        "main",
        "branch, tag or commit of a checkpoint from the hub; no effect on a folder",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "number type that the weights are loaded in, by every process of a run; auto = the checkpoint's own type on GPUs; "
        "without them float32, or the checkpoint's own where that has no room in memory. What auto was is kept in "
        "resources.json, and holds for whatever is done in the same run directory",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    quantisation: Literal["none", "int8", "4bit"] = setting(
        "none",
        "what the experts are kept as, quantised while the checkpoint is read, so that the model is never whole: int8 = a "
        "byte a number, with a scale for each row; 4bit = NF4, half a byte, needs moe-ray[quantised]. Everything else, "
        "and what is learned, stays in dtype. An adapter belongs to the model it was learned over, quantised or not",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    experts_implementation: Literal["auto", "eager", "grouped_mm", "batched_mm"] = setting(
        "auto",
        "how transformers computes the experts; auto = eager on CPU, the library's default on GPU",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    num_shards: int = setting(
        1,
        "over how many processes FSDP2 spreads each copy of the model that captures, answers or checks causes: each reads "
        "and holds its part only, on one GPU or on the CPU, so that a model may be larger than one process's memory; they "
        "work as one, no faster than one, and numbers of actors are of copies. Fine-tuning needs finetune.shard=fsdp then",
        # Gathered weights are the same numbers.
        affects="speed",
        at_least=1,
    )
    chat_template_options: Mapping[str, Any] = setting(
        {},
        "values for variables of the checkpoint's chat template, such as {enable_thinking: false} for Qwen3 and GLM-4.5, "
        "{thinking: true} for DeepSeek-V3.1 or {reasoning_effort: low} for gpt-oss; they hold wherever a prompt is rendered",
        affects=("targets", "counts", "weights", "answers", "ablation"),
    )
    vllm_options: Mapping[str, Any] = setting(
        {},
        "more arguments of vllm.LLM, where an engine is vllm, such as {gpu_memory_utilization: 0.8, enforce_eager: true}",
        affects=("counts", "answers"),
    )
    trust_remote_code: bool = setting(
        False,
        "run Python code that comes with the checkpoint; only for sources you trust",
        # Without it such a checkpoint is refused; what it computes is its content's business.
        affects="speed",
    )

    def __hash__(self) -> int:
        return hash(
            (
                self.path,
                self.revision,
                self.dtype,
                self.quantisation,
                self.experts_implementation,
                self.trust_remote_code,
            )
        )

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the options of the chat template, or of vLLM."""
        wrong = [name for name in self.chat_template_options if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII)]
        if wrong:
            yield self.wrong("chat_template_options", "names of variables, each with a value")
        if taken := _SET_BY_MOE_RAY & self.vllm_options.keys():
            yield self.wrong("vllm_options", f"no {', '.join(sorted(taken))}, which moe-ray sets itself")

    @property
    def is_url(self) -> bool:
        """Whether `path` is of an object store."""
        return "://" in self.path

    def local_folder(self) -> Path | None:
        """The checkpoint's folder, or None where `path` names a hub repository; a store's is fetched first.

        Raises:
            InputError: `path` is a local path or a URL without a checkpoint.
            OutsideFailed: the store does not answer.
        """
        if self.is_url:
            from moe_ray.storage.fetched_folder import fetched_folder  # imports what settings alone do without

            return fetched_folder(self.path)
        folder = Path(self.path).expanduser()
        if not folder.is_dir() and not self.path.startswith((".", "/", "~")):
            return None
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.path: {self.path!r} is not a checkpoint folder (no config.json); give a folder written by "
                "save_pretrained, or a hub name"
            )
        return folder
