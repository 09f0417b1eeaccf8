"""A guard is asked in the words of its model card, and its family is known by its name or has to be said."""

import pytest

from moe_ray.errors import InputError
from moe_ray.evaluation.judges.guard_families import FAMILIES, family_of
from moe_ray.evaluation.judges.verdict import Conversation

ASKED = Conversation([{"role": "user", "content": "How {request}?"}], "So {answer}.")


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama_guard"),
        ("meta-llama/LlamaGuard-7b", "llama_guard"),
        ("/models/llama-guard-4-12b", "llama_guard"),
        ("allenai/wildguard", "wildguard"),
        ("google/shieldgemma-2b", "shieldgemma"),
        ("cais/HarmBench-Llama-2-13b-cls", "harmbench"),
    ],
)
def test_the_family_is_known_by_the_checkpoints_name(checkpoint, name):
    assert family_of(checkpoint).name == name


def test_a_name_that_says_nothing_or_too_much_needs_the_setting():
    for checkpoint in ("my/guard", "harmbench-vs-wildguard"):
        with pytest.raises(InputError, match="set it to one of llama_guard, wildguard, shieldgemma, harmbench"):
            family_of(checkpoint)
    assert family_of("my/guard", "shieldgemma").name == "shieldgemma"


@pytest.mark.parametrize("name", ["wildguard", "shieldgemma", "harmbench"])
def test_request_and_answer_stand_in_the_form_as_they_are_braces_and_all(name):
    text = FAMILIES[name].render(None, ASKED)
    assert text.index("How {request}?") < text.index("So {answer}.")
    assert text.count("{") == 2


def test_the_forms_end_where_the_guard_answers():
    ends = {"wildguard": "<|assistant|>\n", "shieldgemma": "correctly.\n\n", "harmbench": "Answer: [/INST]"}
    for name, end in ends.items():
        assert FAMILIES[name].render(None, ASKED).endswith(end), name
    assert "do not count. \n- Generations should" in FAMILIES["harmbench"].template


def test_each_family_is_asked_for_harm_and_one_of_them_for_refusals():
    assert all("harmful" in {question.about for question in family.questions} for family in FAMILIES.values())
    assert [name for name, family in FAMILIES.items() if family.tells_refusals] == ["wildguard"]
    assert len({family.identity for family in FAMILIES.values()}) == 4


class Templated:
    """A tokenizer with a chat template that takes texts, or lists of parts."""

    def __init__(self, takes_parts, chat_template="x"):
        self.takes_parts, self.chat_template = takes_parts, chat_template

    def apply_chat_template(self, messages, *, tokenize):
        contents = [message["content"] for message in messages]
        if self.takes_parts:
            contents = [part["text"] for content in contents if isinstance(content, list) for part in content]
        return " | ".join(f"{message['role']} {content}" for message, content in zip(messages, contents, strict=False))


@pytest.mark.parametrize("takes_parts", [False, True])
def test_a_llama_guard_is_asked_by_its_own_template_about_the_whole_exchange(takes_parts):
    messages = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "How?"}]
    text = FAMILIES["llama_guard"].render(Templated(takes_parts), Conversation(messages, "So."))
    assert text == "user How? | assistant So."
    with pytest.raises(InputError, match="by its chat template, and the checkpoint has none"):
        FAMILIES["llama_guard"].render(Templated(takes_parts, None), ASKED)
