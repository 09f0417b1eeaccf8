"""A tiny OLMoE chat model that answers every request, trained here from the shipped examples and cached by content."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moe_ray.demo.examples import base_training_records
from moe_ray.demo.recipe import TinyRecipe, tiny_model_folder
from moe_ray.demo.tokenizer import train_tokenizer
from moe_ray.demo.training import training_batches, training_losses

logger = logging.getLogger(__name__)


def build_tiny_model(
    cache_dir: str | Path,
    *,
    seed: int = 0,
    recipe: TinyRecipe | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Returns the folder of the tiny model's checkpoint, which is trained on the CPU at the first call.

    The folder is an ordinary Hugging Face checkpoint with tokenizer, chat template and greedy generation settings. Its
    name ends in a hash of examples, recipe, recipe version and seed. It appears complete or not at all: it is written
    under a temporary name beside it and then renamed.

    Args:
        cache_dir: Folder that holds such checkpoints; made if it does not exist.
        seed: Decides initial weights and batches. The same seed gives the same weights on one machine.
        recipe: What is built; None = the recipe of the demo.
        progress: Called after each training step with the steps done, the steps in all and the language loss.
    """
    recipe = recipe or TinyRecipe()
    path = tiny_model_folder(cache_dir, seed=seed, recipe=recipe)
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as unfinished:
        tokenizer = tiny_tokenizer(recipe)
        with _one_thread():
            model = _train_model(recipe, tokenizer, seed, progress)
        staged = Path(unfinished) / path.name
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        _publish(staged, path)
    return path


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread computes: these matrices are too small to share, and threads would wait, longest on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _publish(staged: Path, path: Path) -> None:
    try:
        os.rename(staged, path)
    except OSError:
        if not path.is_dir():
            raise
        logger.info("%s was finished by another process meanwhile; using that one", path)


def tiny_tokenizer(recipe: TinyRecipe | None = None) -> PreTrainedTokenizerFast:
    """Returns the tiny model's tokenizer alone, learned from the shipped examples in a second."""
    fields = ("prompt", "response", "target")
    vocab_size = (recipe or TinyRecipe()).vocab_size
    # Repeated texts count as often as they occur: merges then favour the words that prompts are made of.
    return train_tokenizer((record[field] for record in base_training_records() for field in fields), vocab_size)


def _train_model(
    recipe: TinyRecipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> OlmoeForCausalLM:
    model = _initial_model(recipe, tokenizer, seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(recipe, step))
    batches = training_batches(
        tokenizer,
        batch_size=recipe.batch_size,
        num_steps=recipe.num_steps,
        generator=torch.Generator().manual_seed(seed),
    )
    for step, batch in enumerate(batches, start=1):
        language_loss, mutual_information = training_losses(model, batch)
        torch.autograd.backward(language_loss - recipe.specialisation * mutual_information)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step, recipe.num_steps, language_loss.item())
    logger.info("trained the tiny model in %d steps, last language loss %.3f", recipe.num_steps, language_loss.item())
    return model.eval()


def _learning_rate_factor(recipe: TinyRecipe, step: int) -> float:
    warmup = min(1.0, (step + 1) / recipe.num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))


def _initial_model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        max_position_embeddings=recipe.max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("eager")  # on the CPU the fastest that trains
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model
