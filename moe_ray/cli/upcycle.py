"""`moe-ray upcycle`: a dense Llama-type checkpoint as a Mixtral-format one, checked against the dense model's logits."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import fingerprint, load_dense
from moe_ray.upcycling.source import RECORD
from moe_ray.upcycling.upcycle import max_logit_difference, upcycle

logger = logging.getLogger("moe_ray.upcycle")

MAX_LOGIT_DIFFERENCE = 1e-3  # float32; 7e-5 was seen on a 135 M model
QUESTIONS = ("What is the capital of France?", "Write a haiku about autumn rain.", "How do I boil an egg? Use 3 steps.")


def run(arguments: argparse.Namespace) -> None:
    """Writes and checks the upcycle, or finds it finished."""
    set_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    set_progress_bar()
    settings = {
        "source_hash": fingerprint(arguments.source),
        "num_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.num_experts_per_tok,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
    }
    finished = is_finished(arguments.out, settings)
    if finished and not arguments.check:
        logger.info("%s already holds this upcycle; nothing to do", arguments.out)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{arguments.out.name}.", dir=arguments.out.parent) as work:
        dense, tokenizer = load_dense(
            arguments.source, dtype=getattr(torch, arguments.dtype), extract_dir=Path(work) / "source"
        )
        if finished:
            check(arguments.out, dense)
            return
        staged = Path(work) / "checkpoint"
        num_parameters = write(staged, dense, tokenizer, arguments)
        record = {"source": Path(arguments.source).name, **settings, "num_parameters": num_parameters}
        record |= {"max_abs_logit_difference": check(staged, dense), "versions": versions()}
        (staged / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        staged.replace(arguments.out)
    logger.info("wrote %s: %.0f M parameters", arguments.out, num_parameters / 1e6)


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds the upcycle with these settings.

    Raises:
        InputError: Something else is there, which is never overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    record = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    differing = [name for name, value in settings.items() if record.get(name) != value]
    if differing:
        raise InputError(
            f"out: {out} holds something else (differs in {', '.join(differing)}), expected nothing or this upcycle; "
            "remove it or choose another folder"
        )
    return True


def write(
    folder: Path, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> int:
    """Saves the upcycled model with its tokenizer and returns its number of parameters."""
    moe = upcycle(
        dense, num_experts=arguments.num_experts, num_experts_per_tok=arguments.num_experts_per_tok, seed=arguments.seed
    )
    moe.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(moe.num_parameters())


def check(folder: Path, dense: PreTrainedModel) -> float:
    """Returns the largest logit difference between the checkpoint in ``folder`` and ``dense``, in float32.

    Raises:
        InputError: It is above ``MAX_LOGIT_DIFFERENCE``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference: Any = dense
    difference = max_logit_difference(reference.float(), moe, tokenizer, texts(tokenizer))
    logger.info("largest logit difference to the dense model: %.1e", difference)
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise InputError(
            f"upcycle: got logits {difference:.1e} away from the dense model's, expected at most "
            f"{MAX_LOGIT_DIFFERENCE:.0e}; the dense model has a part that Mixtral computes differently, use another"
        )
    return difference


def texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the questions the logits are compared on, as chat prompts where the tokenizer has a template."""
    if tokenizer.chat_template is None:
        return list(QUESTIONS)
    return [
        str(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False))
        for q in QUESTIONS
    ]


def versions() -> dict[str, str]:
    """Returns the versions that wrote the checkpoint."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
