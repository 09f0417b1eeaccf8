"""The text of a chat is what was said, in order, with nothing in between that could join two words."""

from moe_ray.chat_messages import prompt_text


def test_the_contents_follow_each_other_as_paragraphs():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?\nTell me."}]
    assert prompt_text(messages) == "Be brief.\n\nHow?\nTell me."


def test_one_message_is_its_content_to_the_letter():
    assert prompt_text([{"role": "user", "content": "  {{ x }}\n"}]) == "  {{ x }}\n"


def test_roles_are_no_text():
    assert prompt_text({"role": role, "content": "a"} for role in ("user", "assistant")) == "a\n\na"


def test_without_messages_there_is_no_text():
    assert prompt_text([]) == ""
