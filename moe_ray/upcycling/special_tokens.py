"""End and pad tokens on which tokenizer, configuration and chat template agree.

Checkpoints often name the end of a text where the chat template ends a turn with another token: generation would then run
on past the answer.
"""

from __future__ import annotations

import logging

from jinja2 import TemplateError
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from moe_ray.errors import InputError
from moe_ray.models.end_tokens import end_ids

logger = logging.getLogger(__name__)

_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def settle_special_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes tokenizer, configuration and generation configuration agree on end and pad tokens.

    Raises:
        InputError: the tokenizer has more tokens than the model, or a chat template that cannot render an answer.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"tokenizer: got {len(tokenizer)} tokens, expected at most the model's {model.config.vocab_size}; "
            "use the model's own tokenizer"
        )
    turn_end = turn_end_id(tokenizer)
    ends = end_ids(model, tokenizer)
    if turn_end is not None and turn_end not in ends:
        ends.append(turn_end)
    if not ends:
        logger.warning("no end token in tokenizer or chat template: generation only stops at its length limit")
    pad_id = _pad_id(tokenizer, ends)
    if turn_end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(turn_end)
    if pad_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    for config in (model.config, model.generation_config):
        config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
        config.pad_token_id = pad_id


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that follows an assistant's answer in the chat template, or None.

    Raises:
        InputError: the template cannot render a user turn and an answer.
    """
    if tokenizer.chat_template is None:
        logger.warning("the tokenizer has no chat template; prompts will have to bring their own format")
        return None
    answer = "An answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise InputError(f"chat template: got {error} for a user turn and an answer; replace the template") from error
    ids = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def _pad_id(tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> int | None:
    """Returns a pad token that ends nothing, or an end token when the vocabulary has no other special token.

    Padding with the end token would hide real ends wherever padding is recognised by its id.
    """
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    taken = {*ends, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return int(tokenizer.pad_token_id)
    names = [*_PAD_NAMES, tokenizer.unk_token]
    chosen = next((special[name] for name in names if name in special and special[name] not in taken), None)
    if chosen is None and ends:
        logger.warning("no special token is free for padding: padding with the end token, id %d", ends[0])
        return ends[0]
    return chosen
