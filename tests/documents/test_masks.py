"""What is learned of a record: the judge of tests/support/chats finds it in the text, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infctx.data.tokenizer import get_tokenizer
from infctx.errors import InputError

from chats import judged, judged_parts, prepared, random_chats, world_text

LETTERS = ["a", " ", "\n", "\n\n", "\r\n", "好", "é", "🙂", "👩‍👩‍👧", ".", "User:", "\nAssistant: ", "</s>", "\t", "0"]
CONTENT = st.lists(st.sampled_from(LETTERS), max_size=6).map("".join)
ANSWERS = {"assistant", "response"}
LEARN = {"answers": ANSWERS, "all": None, "user": {"user"}, "user,assistant": {"user", "assistant"}}


@st.composite
def chats(draw):
    """A list of (role, content): user and assistant in turn, system turns anywhere, the last word anyone's."""
    turns = []
    for number in range(draw(st.integers(1, 5))):
        turns += [("system", draw(CONTENT)) for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2])))]
        turns.append((("user", "assistant")[number % 2], draw(CONTENT)))
    return turns


def as_messages(turns):
    return {"id": 1, "messages": [{"role": role, "content": content} for role, content in turns]}


def as_parts(turns):
    cut = [[content[: len(content) // 2], content[len(content) // 2 :]] for _, content in turns]
    parts = [[{"type": "text", "text": text} for text in texts] for texts in cut]
    return {"messages": [{"role": role, "content": part} for (role, _), part in zip(turns, parts, strict=True)]}


def as_conversations(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[role], "value": content} for role, content in turns]}


def as_mixture(turns):
    return {"conversations": as_messages(turns)["messages"]}


def documents(store):
    ends = [store.length(i) for i in range(store.num_documents)]
    return [(store.tokens(i, 0, end), store.targets(i, 0, end)) for i, end in enumerate(ends)]


def check(store, expected):
    """Compares a store with (parts, whether each is learned) of its documents; those without a target are not in it."""
    tokenizer = get_tokenizer(store.tokenizer)
    wanted = [judged(parts, tokenizer) for parts in expected]
    wanted = [(tokens, targets) for tokens, targets in wanted if targets.any()]
    found = documents(store)
    assert len(found) == len(wanted)
    for (tokens, targets), (true_tokens, true_targets) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(tokens, true_tokens)
        np.testing.assert_array_equal(targets, true_targets)


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("write", [as_messages, as_parts, as_conversations, as_mixture])
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_chats(tmp_path_factory, tokenizer, write, data):
    learn = data.draw(st.sampled_from(list(LEARN)))
    some = data.draw(st.lists(chats(), min_size=1, max_size=8))
    some.append([("user", "a"), ("assistant", "好"), ("user", "🙂")])  # so that each role is there
    texts = [world_text(turns) for turns in some]
    store = prepared(tmp_path_factory.mktemp("masks"), map(write, some), tokenizer, learn=learn)
    check(store, [judged_parts(text, LEARN[learn]) for text in texts])


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_instructions(tmp_path_factory, tokenizer, data):
    learn = data.draw(st.sampled_from(["answers", "all", "input,response", "instruction"]))
    roles = None if learn == "all" else {"response"} if learn == "answers" else set(learn.split(","))
    some = data.draw(st.lists(st.tuples(CONTENT, CONTENT, CONTENT, CONTENT), min_size=1, max_size=8))
    records, texts = [], []
    for number, (system, instruction, given_input, output) in enumerate([*some, ("", "a", "b", "c")]):
        output += "."
        keys = [("input", "output"), ("context", "response")][number % 2]
        records.append({"instruction": instruction, keys[0]: given_input, keys[1]: output, "system": system})
        turns = [("system", system), ("instruction", instruction), ("input", given_input), ("response", output)]
        texts.append(world_text([turn for turn in turns if turn[1] or turn[0] == "instruction"]))
    store = prepared(tmp_path_factory.mktemp("masks"), records, tokenizer, learn=learn)
    check(store, [judged_parts(text, roles) for text in texts])


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("template", [None, "world"])
@given(
    learn=st.sampled_from(["answers", "all", "user"]),
    pairs=st.lists(st.tuples(CONTENT, CONTENT.filter(str.strip)), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=10)
def test_prompts(tmp_path_factory, tokenizer, template, learn, pairs):
    pairs.append(("a 好 a", "b"))
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    store = prepared(tmp_path_factory.mktemp("masks"), records, tokenizer, learn=learn, template=template)
    if template:
        texts = [world_text([("user", prompt), ("assistant", completion)]) for prompt, completion in pairs]
        check(store, [judged_parts(text, LEARN[learn]) for text in texts])
    else:
        learned = {"answers": (False, True), "all": (True, True), "user": (True, False)}[learn]
        check(store, [list(zip(pair, learned, strict=True)) for pair in pairs])


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("template", ["world", "g1", "plain"])
def test_the_tokens_do_not_depend_on_what_is_learned(tmp_path, tokenizer, template):
    records = [{"messages": chat} for chat in random_chats(30, words=(3, 40))]
    stores = [
        prepared(tmp_path / learn, records, tokenizer, template=template, learn=learn)
        for learn in ("answers", "all", "user", "system,user,assistant")
    ]
    assert len({store.num_targets for store in stores}) == 4 - (template == "plain")  # roles are all that plain has
    first = documents(stores[0])
    assert len(first) == 30
    for other in map(documents, stores[1:]):
        assert [tokens.tolist() for tokens, _ in other] == [tokens.tolist() for tokens, _ in first]


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_chat_is_stored_like_short_ones(tmp_path, tokenizer, workers):
    """Turns longer than a piece, and more parts than are encoded in one go."""
    long = [("user", "好 a\n" * 300_000), ("assistant", "🙂 b " * 400_000)]
    many = [turn for number in range(1500) for turn in (("user", f"{number}?"), ("assistant", f"{number}!"))]
    some = [long, many, [("user", "a"), ("assistant", "b")]]
    store = prepared(tmp_path, map(as_messages, some), tokenizer, workers=workers)
    check(store, [judged_parts(world_text(turns), ANSWERS) for turns in some])


def test_reasoning_is_learned_and_the_headings_are_those_of_g1(tmp_path):
    messages = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so", "reasoning_content": "hm\n\nwell"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nyes"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "no"},
    ]
    store = prepared(tmp_path, [{"messages": messages}], template="g1")
    parts = [
        ("User: why?\n\nAssistant: <think", False),
        (">hm\nwell</think>\nso\n\n", True),
        ("User: and?\n\nAssistant: <think", False),
        (">let me see</think>\nyes\n\n", True),
        ("User: sure?\n\nAssistant: <think>\n</think", False),
        (">\nno\n\n", True),
    ]
    check(store, [parts])


def test_an_answer_of_weight_0_is_not_learned(tmp_path):
    turns = [("user", "a"), ("assistant", "bad"), ("user", "c"), ("assistant", "good")]
    record = as_messages(turns)
    record["messages"][1]["weight"] = 0
    record["messages"][3]["weight"] = 1
    parts = judged_parts(world_text(turns), ANSWERS)
    parts[3] = (parts[3][0], False)
    check(prepared(tmp_path, [record]), [parts])


def test_a_role_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    chat = {"messages": random_chats(1)[0]}
    assert not any(turn["role"] == "system" for turn in chat["messages"])
    with pytest.raises(
        InputError, match="--learn: no document has a turn of system; the roles there are assistant, user"
    ):
        prepared(tmp_path, [chat], learn="system,user")
    with pytest.raises(InputError, match="--learn: no document has a turn of user; they are text, without roles"):
        prepared(tmp_path, [{"text": "a"}], learn="user")
    with pytest.raises(InputError, match="all documents have nothing to learn"):
        prepared(tmp_path, [{"messages": chat["messages"][:1]}])
    assert not (tmp_path / "out").exists()
