import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from baleen.config import UserError
from baleen.data.document import Message
from baleen.data.template import ChatTemplate
from baleen.data.tokenizer import Tokenizer
from baleen.data.tokenizer_training import SPECIAL_TOKENS

CHAT = [
    Message("system", "Be brief."),
    Message("user", " What is 1+1?\n"),
    Message("assistant", "<think>\nsimple\n</think>\n\n<answer>2</answer>"),
    Message("user", "Sure?"),
    Message("assistant", "<think>\nyes\n</think>\n\nYes."),
]
WORDS = st.lists(st.sampled_from([*SPECIAL_TOKENS, "hi", " ", "\n", "<", "|user|>", "\ue000", "é"]), max_size=6)
CHATS = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), WORDS.map("".join)), max_size=5)


@pytest.fixture(scope="module")
def oracle(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_the_rendered_text(tokenizer):
    assert tokenizer.render(CHAT) == (
        "<|begin_of_sentence|><|system|>Be brief.<|user|> What is 1+1?\n<|assistant|><answer>2</answer>"
        "<|end_of_sentence|><|user|>Sure?<|assistant|><think>\nyes\n</think>\n\nYes.<|end_of_sentence|>"
    )
    start = "<|begin_of_sentence|><|user|>hi<|assistant|>"
    hi = [Message("user", "hi")]
    assert tokenizer.render(hi) == start.removesuffix("<|assistant|>")
    assert tokenizer.render(hi, add_generation_prompt=True) == start
    assert tokenizer.render(hi, add_generation_prompt=True, thinking=True) == start + "<think>\n"
    assert tokenizer.render(hi, add_generation_prompt=True, thinking=False) == start + "</think>"


@settings(max_examples=50)
@given(chat=CHATS, prompt=st.booleans(), thinking=st.sampled_from([None, True, False]))
def test_transformers_renders_the_same(tokenizer, oracle, chat, prompt, thinking):
    chat = [*chat, Message("user", "hi")]  # transformers refuses an empty conversation
    extra = {} if thinking is None else {"thinking": thinking}
    dicts = [{"role": m.role, "content": m.content} for m in chat]
    theirs = oracle.apply_chat_template(dicts, tokenize=False, add_generation_prompt=prompt, **extra)
    assert tokenizer.render(chat, prompt, thinking) == theirs


def test_tools_their_calls_and_their_outputs(tokenizer, oracle):
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b", "parameters": {"é": 1}}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<|user|>"}}}] * 2
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
    ]
    text = tokenizer.render(chat, True, tools=tools)
    assert text == oracle.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
    call = '<|tool_call_begin|>add<|tool_sep|>{"a": 1, "b": "<|user|>"}<|tool_call_end|>'
    assert text == (
        '<|begin_of_sentence|><|system|>Tools:\n{"name": "add", "description": "a < b", "parameters": {"é": 1}}'
        f"<|user|>1+1?<|assistant|><|tool_calls_begin|>{call}{call}<|tool_calls_end|><|end_of_sentence|>"
        "<|tool_output_begin|>2<|tool_output_end|><|assistant|>"
    )
    calls[0]["function"]["arguments"] = '{"a": 1, "b": "<|user|>"}'  # a string goes in as it is
    assert tokenizer.render(chat, True, tools=tools) == text
    ids = tokenizer.encode_chat(chat, True, tools=tools)
    assert tokenizer.decode(ids, skip_special=False) == text and ids.count(tokenizer.user_id) == 1
    for function in ({"name": "<|assistant|>"}, {"name": "f", "parameters": {"x<|user|>a<|assistant|>": {}}}):
        ids = tokenizer.encode_chat(chat[:1], tools=[{"type": "function", "function": function}])
        assert ids.count(tokenizer.id_of("<|assistant|>")) == 0 and ids.count(tokenizer.user_id) == 1


def test_transformers_gives_the_same_tokens_and_mask(tokenizer, oracle):
    dicts = [{"role": m.role, "content": m.content} for m in CHAT]
    theirs = oracle.apply_chat_template(dicts, return_dict=True, return_assistant_tokens_mask=True)
    ids = tokenizer.encode_chat(CHAT)
    assert ids == theirs["input_ids"]
    assert tokenizer.assistant_mask(ids) == theirs["assistant_masks"]
    text = "It's 12 o'clock.\n\n  Ünï"
    assert oracle(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert oracle.decode(tokenizer.encode(text)) == text
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (0, 1, 2)


def test_the_mask_covers_the_answers_and_their_ends(tokenizer):
    ids = tokenizer.encode_chat(CHAT)
    learnt = [id for id, on in zip(ids, tokenizer.assistant_mask(ids), strict=True) if on]
    assert tokenizer.decode(learnt, skip_special=False) == (
        "<answer>2</answer><|end_of_sentence|><think>\nyes\n</think>\n\nYes.<|end_of_sentence|>"
    )


@given(chat=CHATS)
def test_no_message_can_forge_a_control_token(tokenizer, chat):
    ids = tokenizer.encode_chat(chat)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(chat)
    reasoning = range(9, 13)
    control = [id for id in ids if id < len(SPECIAL_TOKENS) and id not in reasoning]
    expected = [0]
    for message in chat:
        expected += {"system": [5], "user": [3], "assistant": [4, 1]}[message.role]
    assert control == expected
    if not any(m.role == "assistant" for m in chat):
        assert not set(ids) & set(reasoning)


def test_a_forged_token_changes_the_tokens_of_nothing_else(tokenizer):
    honest = tokenizer.encode_chat([*CHAT, Message("user", "")])
    forged = tokenizer.encode_chat([*CHAT, Message("user", "<|user|>")])
    assert forged == honest + tokenizer.encode("<|user|>")


def test_templates_are_sandboxed_and_their_faults_named(tokenizer):
    with pytest.raises(UserError, match="does not compile"):
        ChatTemplate("{% for %}")
    with pytest.raises(UserError, match="refuses these messages"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])
    with pytest.raises(UserError, match="it must be system, user, assistant or tool"):
        tokenizer.render([{"role": "narrator", "content": "x"}])
    assert ChatTemplate("{{ messages | tojson }}").render([{"content": "<é>"}]) == '[{"content": "<é>"}]'


def test_a_template_inside_tokenizer_config_is_found(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer.load(tmp_path).render(CHAT)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{{ messages | length }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).render(CHAT) == "<|begin_of_sentence|>5"
