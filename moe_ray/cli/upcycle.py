"""`moe-ray upcycle`: a dense Llama-type checkpoint as a MoE, checked against the dense model's logits."""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeSharedForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_ray.errors import InputError
from moe_ray.experts import EXPERTS_ARE_COPIES
from moe_ray.prompts.examples import read_examples
from moe_ray.upcycling.calibration import embedded_prompts, own_answers
from moe_ray.upcycling.choose_k import choose_k
from moe_ray.upcycling.dense_checkpoint import fingerprint, load_dense
from moe_ray.upcycling.dense_weights import check_expert_numbers
from moe_ray.upcycling.source import RECORD
from moe_ray.upcycling.split import plan_split, route_to_all, size_of_slice, split
from moe_ray.upcycling.upcycle import max_logit_difference, upcycle

logger = logging.getLogger("moe_ray.upcycle")

MAX_LOGIT_DIFFERENCE = 1e-3  # float32; 7e-5 was seen on a 135 M model
MAX_ROUNDED_LOGIT_DIFFERENCE = (
    1.0  # of a split whose weights were rounded to bfloat16 after the dense model was compared
)
QUESTIONS = ("What is the capital of France?", "Write a haiku about autumn rain.", "How do I boil an egg? Use 3 steps.")


def run(arguments: argparse.Namespace) -> None:
    """Writes and checks the upcycle, or finds it finished."""
    set_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    set_progress_bar()
    settings = settings_of(arguments)
    finished = is_finished(arguments.out, settings)
    if finished and not arguments.check:
        logger.info("%s already holds this upcycle; nothing to do", arguments.out)
        return
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{arguments.out.name}.", dir=arguments.out.parent) as work:
        # A split is fitted in float32, and rounded when it is written.
        dtype = "float32" if arguments.method == "split" else arguments.dtype
        dense, tokenizer = load_dense(arguments.source, dtype=getattr(torch, dtype), extract_dir=Path(work) / "source")
        if finished:
            check(arguments.out, dense)
            return
        staged = Path(work) / "checkpoint"
        record = {"source": Path(arguments.source).name, **settings}
        record |= write(staged, dense, tokenizer, arguments, settings)
        record |= {"max_abs_logit_difference": check(staged, dense), "versions": versions()}
        (staged / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        staged.replace(arguments.out)
    logger.info("wrote %s: %.0f M parameters", arguments.out, record["num_parameters"] / 1e6)
    if arguments.method == "copies":
        logger.warning("%s", EXPERTS_ARE_COPIES)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the upcycle depends on, as its record has it; the numbers that are left open are filled in, but for split's k."""
    is_split = arguments.method == "split"
    settings = {
        "source_hash": fingerprint(arguments.source),
        "method": arguments.method,
        "num_experts": arguments.num_experts or (16 if is_split else 8),
        "seed": arguments.seed,
        "dtype": arguments.dtype,
    }
    if not is_split:
        return settings | {"num_experts_per_tok": arguments.num_experts_per_tok or 2}
    settings["shared"] = arguments.shared
    settings["calibration_hash"] = "" if arguments.calibrate_on is None else fingerprint(arguments.calibrate_on)
    if arguments.num_experts_per_tok:
        return settings | {"num_experts_per_tok": arguments.num_experts_per_tok}
    return settings | {"max_rise": arguments.max_rise}


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether ``out`` holds the upcycle with these settings.

    Raises:
        InputError: Something else is there, which is never overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    record = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    if record:
        record = {"method": "copies"} | record  # the only one there was when records did not name it
    differing = [name for name, value in settings.items() if record.get(name) != value]
    if differing:
        raise InputError(
            f"out: {out} holds something else (differs in {', '.join(differing)}), expected nothing or this upcycle; "
            "remove it or choose another folder"
        )
    return True


def write(
    folder: Path,
    dense: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Saves the upcycled model with its tokenizer; returns what the record says of it beside the settings."""
    if arguments.method == "split":
        moe, found = made_split(dense, tokenizer, arguments, settings["num_experts"])
    else:
        numbers = {name: settings[name] for name in ("num_experts", "num_experts_per_tok", "seed")}
        moe, found = upcycle(dense, **numbers), {}
    moe.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {**found, "num_parameters": int(moe.num_parameters())}


def made_split(
    dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace, num_experts: int
) -> tuple[GraniteMoeSharedForCausalLM, dict[str, Any]]:
    """The split model, and what was measured: k, and nats per token of the dense model and of each k that was tried."""
    size_of_slice(dense.config, num_experts, arguments.shared)
    check_expert_numbers(num_experts, arguments.num_experts_per_tok or 1)
    if arguments.calibrate_on is None:
        prompts = embedded_prompts()
    else:
        prompts = [list(example.messages) for example in read_examples(arguments.calibrate_on, paired_records="goal")]
    logger.info("%d prompts are answered by the dense model, to fit the split on", len(prompts))
    fitted_on, held_out = own_answers(dense, tokenizer, prompts)
    logger.info("neurons are grouped and routers fitted, layer by layer")
    plan = plan_split(
        dense,
        [[*row.prompt_ids, *row.answer_ids] for row in fitted_on],
        num_experts=num_experts,
        shared=arguments.shared,
        seed=arguments.seed,
    )
    k = arguments.num_experts_per_tok
    tried = None if k is None else (k,)
    k, measured = choose_k(dense, tokenizer, plan, held_out, max_rise=arguments.max_rise, tried=tried)
    moe = split(dense, plan, num_experts_per_tok=k)
    # Of fewer than five prompts none is held out, and what was not measured is left out.
    shown = {
        "dense" if number == 0 else str(number): {
            name: value for name, value in nats._asdict().items() if not math.isnan(value)
        }
        for number, nats in measured.items()
    }
    return moe.to(getattr(torch, arguments.dtype)), {"num_experts_per_tok": k, "nats_per_token": shown}


def check(folder: Path, dense: PreTrainedModel) -> float:
    """Returns the largest logit difference between the checkpoint in ``folder`` and ``dense``, in float32.

    Of a split checkpoint every token uses all experts for it, which only then are the dense model.

    Raises:
        InputError: It is above ``MAX_LOGIT_DIFFERENCE``.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    moe = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    limit = MAX_LOGIT_DIFFERENCE
    if isinstance(moe, GraniteMoeSharedForCausalLM):
        route_to_all(moe)
        stored: Any = AutoConfig.from_pretrained(folder).dtype
        limit = MAX_LOGIT_DIFFERENCE if stored == torch.float32 else MAX_ROUNDED_LOGIT_DIFFERENCE
    reference: Any = dense
    difference = max_logit_difference(reference.float(), moe, tokenizer, texts(tokenizer))
    logger.info("largest logit difference to the dense model: %.1e", difference)
    if not difference <= limit:
        raise InputError(
            f"upcycle: got logits {difference:.1e} away from the dense model's, expected at most "
            f"{limit:.0e}; the dense model has a part that the MoE computes differently, use another"
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
