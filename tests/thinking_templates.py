"""Chat templates of thinking models: small ones that write what the published ones write for plain conversations.

Sources: tokenizer configurations of Qwen3, DeepSeek-R1 and V3.1, GLM-4.5 and gpt-oss, as public repositories keep them.
"""

from __future__ import annotations

from byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken

QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)

QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "{{- '<think>\\n' }}",
)
"""The form of the checkpoints that always think: the template opens the thought."""

DEEPSEEK_R1 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}"
    "{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)

DEEPSEEK_V31 = (
    "{%- if not thinking is defined %}{%- set thinking = false %}{%- endif %}"
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '<｜User｜>' + m.content }}"
    "{%- elif m.role == 'assistant' %}"
    "{{- '<｜Assistant｜></think>' + m.content.split('</think>', 1)[-1] + '<｜end▁of▁sentence｜>' }}"
    "{%- else %}{{- m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}"
)

GLM_45 = (
    "{{- '[gMASK]<sop>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|assistant|>\\n<think></think>\\n' + m.content.split('</think>')[-1].strip() }}"
    "{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}"
    "{{- '/nothink' if m.role == 'user' and enable_thinking is defined and not enable_thinking else '' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{{- '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{%- endif %}"
)

GPT_OSS = (
    "{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium')) + '<|end|>' }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)

_NOT_SPECIAL = ("<think>", "</think>")
_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "[gMASK]", "<sop>"),
    *("<|user|>", "<|assistant|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
)

END_TOKENS = {
    QWEN3: "<|im_end|>",
    QWEN3_THINKING: "<|im_end|>",
    DEEPSEEK_R1: "<｜end▁of▁sentence｜>",
    DEEPSEEK_V31: "<｜end▁of▁sentence｜>",
    GLM_45: "<|user|>",
    GPT_OSS: "<|return|>",
}


def thinking_tokenizer(template: str):
    """One token per byte, and one for each mark; as in the published ones, `<think>` is not a special token."""
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in _NOT_SPECIAL])
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in _SPECIAL])
    tokenizer.eos_token = END_TOKENS.get(template, "<|im_end|>")
    return tokenizer
