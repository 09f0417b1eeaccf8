"""A tokenizer of ten words, with and without a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<end>", "<start>", "<user>", "<assistant>", "how", "are", "you", "fine", "thanks"]
MESSAGES = [{"role": "user", "content": "how are you"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Words split at spaces; like many real ones, it starts plain text with a token of its own."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)
