"""Every example gets a target: the refusal where it is unsafe, the model's own answer where it is safe."""

from dataclasses import replace

import pytest
from families import build
from prompt_examples import example
from word_tokenizer import TEMPLATE, make_tokenizer

from moe_ray.config.capture import CaptureConfig
from moe_ray.config.prompts import PromptsConfig
from moe_ray.errors import InputError
from moe_ray.finetuning.targets import with_targets, without_unaskable
from moe_ray.models.generation import generate_answers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.models.tokenization import encode_prompt
from moe_ray.prompts.batches import Assembly, Batch
from moe_ray.prompts.prompt_set import Prompts

CONFIG = PromptsConfig(refusal="I will not.", own_answer_tokens=3)


def asking(name, label, text="how are you", **more):
    return replace(example(name, label, **more), messages=({"role": "user", "content": text},))


def prompts_of(*examples, test=()):
    batch = Batch(batch_idx=4, category="", examples=examples)
    assembly = Assembly(batches=(batch,), left_over=())
    return Prompts(examples=[*examples, *test], assembly=assembly, validation=(), test=test, neutral=())


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(chat_template=TEMPLATE, eos_token="<end>")


def test_without_a_model_only_unsafe_examples_get_a_target():
    got = with_targets(prompts_of(asking(1, "safe"), asking(2, "unsafe"), test=(asking(3, "unsafe"),)), CONFIG)
    assert [one.target for one in got.batches[0].examples] == [None, "I will not."]
    assert [one.target for one in got.test] == ["I will not."]


def test_a_target_that_an_example_came_with_is_kept(tokenizer):
    given = replace(asking(1, "safe"), target="fine"), replace(asking(2, "unsafe"), target="thanks")
    got = with_targets(prompts_of(*given), CONFIG, build("olmoe"), tokenizer)
    assert got.batches[0].examples == given


def test_a_safe_example_gets_what_the_model_answers_and_whether_it_ended(tokenizer):
    model = build("olmoe")
    texts = ("how are you", "thanks", "fine")
    got = with_targets(prompts_of(*(asking(n, "safe", text) for n, text in enumerate(texts))), CONFIG, model, tokenizer)
    prompts = [encode_prompt(tokenizer, one.messages) for one in got.batches[0].examples]
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=3, budget=TokenBudget(20))
    given = [(one.target, one.target_complete) for one in got.batches[0].examples]
    assert given == [(answer.text, answer.ended) for answer in expected]


TOO_LONG = "how " * 100


def test_a_training_example_that_the_model_cannot_be_asked_stays_for_the_capture_to_set_aside(tokenizer):
    examples = asking(1, "safe"), asking(2, "unsafe", TOO_LONG), asking(3, "safe", TOO_LONG)
    got = with_targets(prompts_of(*examples), CONFIG, build("olmoe"), tokenizer)
    assert [one.id for one in got.batches[0].examples] == ["safe-1", "unsafe-2", "safe-3"]
    assert [one.target for one in got.batches[0].examples][1:] == ["I will not.", None]


def test_what_the_model_cannot_be_asked_is_not_trained_and_named(tokenizer, caplog):
    batches = prompts_of(asking(1, "safe"), asking(2, "unsafe", TOO_LONG)).batches
    got = without_unaskable(batches, build("olmoe"), tokenizer)
    assert [one.id for one in got[0].examples] == ["safe-1"]
    assert "1 of 2 examples cannot be asked and are not trained: 'unsafe-2'" in caplog.text


def test_a_held_out_example_that_the_model_cannot_be_asked_is_left_out_and_named(tokenizer, caplog):
    test = (asking(2, "unsafe"), asking(3, "unsafe", TOO_LONG), asking(4, "safe"))
    prompts, capture = prompts_of(asking(1, "safe"), test=test), CaptureConfig(max_bad_share=0.5)
    got = with_targets(prompts, CONFIG, build("olmoe"), tokenizer, capture)
    assert [one.id for one in got.test] == ["unsafe-2", "safe-4"]
    assert all(one.target is not None for one in got.test)
    assert "1 of 3 test examples cannot be answered and are left out: 'unsafe-3'" in caplog.text


def test_too_many_held_out_examples_that_cannot_be_asked_are_an_error(tokenizer):
    prompts = prompts_of(asking(1, "safe"), test=(asking(2, "unsafe"), asking(3, "unsafe", TOO_LONG)))
    with pytest.raises(InputError, match="1 of 2 test examples cannot be answered"):
        with_targets(prompts, CONFIG, build("olmoe"), tokenizer)


def test_the_models_training_mode_is_restored(tokenizer):
    model = build("olmoe").train()
    with_targets(prompts_of(asking(1, "safe")), CONFIG, model, tokenizer)
    assert model.training
