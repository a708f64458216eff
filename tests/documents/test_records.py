"""Records: which form each one is, and a line for each that is none."""

import json

import pytest

from infctx.documents.document import Reading
from infctx.documents.records import document_of, needed_columns
from infctx.errors import InputError

from chats import prepared

ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}
CHAT = [ASKED, ANSWERED]


def text_of(record, **reading):
    """The text of a record, with | between parts and [] around what is learned."""
    document = document_of(record, "a.jsonl:1", Reading(**reading))
    parts = [("".join(part.pieces), part.is_learned) for part in document.parts]
    return "|".join(f"[{text}]" if learned else text for text, learned in parts)


@pytest.mark.parametrize(
    ("record", "form", "text"),
    [
        ({"text": "a\n\nb"}, "text", "[a\n\nb]"),
        ({"text": "a", "messages": None, "prompt": "b"}, "text", "[a]"),
        ({"prompt": "a ", "completion": " b"}, "prompt", "a |[ b]"),
        ({"prompt": "", "response": "b", "id": 1}, "prompt", "[b]"),
        ({"instruction": "a", "output": "b"}, "instruction", "Instruction:| a\n\n|Response:|[ b\n\n]"),
        ({"instruction": "a", "context": "c", "response": "b"}, "instruction", None),
        ({"messages": CHAT, "prompt": "a", "prompt_id": "1"}, "messages", "User:| a\n\n|Assistant:|[ b\n\n]"),
        ({"messages": [ASKED]}, "messages", "User:| a\n\n"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", None),
        ({"system": "s", "conversations": CHAT}, "conversations", "System:| s\n\n|User:| a\n\n|Assistant:|[ b\n\n]"),
        ({"messages": [{"role": "developer", "content": "s"}, *CHAT]}, "messages", None),
        ({"messages": [{**ASKED, "tool_calls": None, "name": "x"}, {**ANSWERED, "reasoning": None}]}, "messages", None),
    ],
)
def test_a_form_is_recognized_by_its_keys(record, form, text):
    found = document_of(record, "a.jsonl:1", Reading())
    assert found.form == form
    assert found.learns_end == (record.get("messages") != [ASKED])
    if text is not None:
        assert text_of(record) == text


def test_a_form_can_be_forced():
    record = {"text": "t", "messages": CHAT, "prompt": "p", "completion": "c", "instruction": "i", "output": "o"}
    texts = [text_of(record, form=form) for form in ("text", "prompt", "instruction", "messages")]
    assert texts[:2] == ["[t]", "p|[c]"]
    assert [text.split(":")[0] for text in texts[2:]] == ["Instruction", "User"]
    assert text_of(record, text_column="prompt") == "[p]"
    assert text_of(record, form="prompt", template="world") == "User:| p\n\n|Assistant:|[ c\n\n]"


def test_a_role_of_a_template_of_ones_own_may_come_between_answers(tmp_path):
    template = tmp_path / "tools.yaml"
    template.write_text(
        "roles: {user: {body: 'U{content}'}, assistant: {body: 'A{content}'}, tool: {body: 'T{content}'}}"
    )
    tool = {"role": "tool", "content": "1"}
    record = {"messages": [ASKED, ANSWERED, tool, tool, ANSWERED, ASKED, ANSWERED]}
    assert text_of(record, template=str(template)) == "Ua|[Ab]|T1|T1|[Ab]|Ua|[Ab]"


def wrong(**message):
    return {"messages": [ASKED, message]}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"body": "a"}, "no key `text` (keys: 'body')"),
        ({"prompt": "a"}, "no key `text` (keys: 'prompt')"),
        ({"text": None}, "`text` is null, not a string"),
        ({"text": ["a"]}, "`text` is list, not a string"),
        ({"text": "a", "messages": CHAT}, "can be read as text or as messages; choose --form text or --form messages"),
        ({"instruction": "a", "output": "b", "text": "c"}, "choose --form text or --form instruction"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty, so there is nothing to learn"),
        ({"prompt": "a", "completion": " \n"}, "`completion` is empty"),
        ({"prompt": "a", "completion": None}, "`completion` is null, not a string"),
        ({"completion": "a"}, "no key `prompt` (keys: 'completion')"),
        ({"prompt": CHAT, "completion": CHAT}, "`prompt` is list, not a string"),
        ({"instruction": "a"}, "no key `output` (keys: 'instruction')"),
        ({"instruction": "a", "output": ""}, "`output` is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "`input` is int, not a string"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "has both `input` and `context`"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "`history` is not read"),
        ({"messages": None}, "`messages` is null, not a list of turns"),
        ({"messages": "[]"}, "`messages` is str, not a list of turns"),
        ({"messages": []}, "`messages` is empty"),
        ({"conversations": ["a", "b"]}, "turn 1: is str, not an object with role and content"),
        ({"messages": [ANSWERED]}, "turn 1: is an answer, and nobody has asked"),
        ({"messages": [*CHAT, ANSWERED]}, "turn 3: two turns of assistant in a row"),
        ({"messages": [ASKED, {"role": "system", "content": "s"}, ASKED]}, "turn 3: two turns of user in a row"),
        (wrong(role="tool", content="b"), "turn 2: role 'tool', not system, user, assistant, instruction, input"),
        (wrong(role="bot\n", content="b"), r"turn 2: role 'bot\n', not system"),
        (wrong(role=None, content="b"), "turn 2: `role` is null, no name of a role"),
        ({"messages": [ASKED, None]}, "turn 2: is null, not an object with role and content"),
        (wrong(content="b", name="x"), "turn 2: no `role` (keys: 'content', 'name')"),
        (wrong(role="assistant", text="b"), "turn 2: no `content` (keys: 'role', 'text')"),
        ({"conversations": [{"from": "human", "text": "b"}]}, "turn 1: no `value` (keys: 'from', 'text')"),
        (wrong(role="assistant", content=None), "turn 2: `content` is null, not a string"),
        (wrong(role="assistant", content=4), "turn 2: `content` is int, not a string"),
        (wrong(role="assistant", content="b\ud800"), "turn 2: `content` holds a lone surrogate, U+D800"),
        (wrong(role="assistant", content=[{"type": "image_url"}]), "turn 2: holds a part of type image_url"),
        (wrong(role="assistant", content=["b"]), "turn 2: holds a part of type str, and only text is read"),
        (wrong(role="assistant", content=None, tool_calls=[{}]), "turn 2: has `tool_calls`, and calls are not read"),
        (wrong(**ANSWERED, reasoning_content="r"), "turn 2: has reasoning, for which template world has no place"),
    ],
)
def test_a_record_that_is_none_is_named_with_its_turn(record, problem):
    with pytest.raises(InputError) as caught:
        document_of(record, "a.jsonl:7", Reading())
    line = str(caught.value)
    assert line.startswith("a.jsonl:7: ")
    assert problem in line
    assert ";" in line.split(problem)[-1] or "choose" in problem, "no remedy"
    assert line.isprintable()


def test_a_file_whose_records_change_form_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"jsonl:2: is of form text, and those before it in the file of form messages"):
        prepared(tmp_path, [{"messages": CHAT}, {"text": "a"}])


def test_columns_of_a_table_are_those_that_its_form_reads():
    reading = Reading()
    assert needed_columns(["id", "text", "url"], "a.csv", reading) == ["text"]
    assert needed_columns(["prompt", "id", "messages"], "a.csv", reading) == ["messages"]
    assert needed_columns(["output", "id", "input", "instruction"], "a.csv", reading) == [
        "output",
        "input",
        "instruction",
    ]
    assert needed_columns(["text", "messages"], "a.csv", Reading(form="text")) == ["text"]
    assert needed_columns(["text", "body"], "a.csv", Reading(text_column="body")) == ["body"]
    for columns, other, problem in [
        (["id"], reading, "a.csv: no key `text`"),
        (["id"], Reading(text_column="text"), "a.csv: no key `text`"),
        (["id"], Reading(form="messages"), "a.csv: no key `messages`"),
        (["text", "messages"], reading, "choose --form text or --form messages"),
    ]:
        with pytest.raises(InputError, match=problem):
            needed_columns(columns, "a.csv", other)


def test_the_summary_names_forms_turns_template_and_what_is_learned(tmp_path):
    from infctx.prepare.prepare import prepare

    sources = []
    for name, records in [
        ("chats", [{"messages": CHAT * 2}, {"messages": [ASKED]}]),
        ("pairs", [{"prompt": "a", "completion": "b"}]),
        ("texts", [{"text": "a"}]),
    ]:
        sources.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = str(prepare(sources, tmp_path / "out", tokenizer="bytes")).splitlines()
    assert [line.removeprefix(f"{tmp_path}/") for line in lines[1:]] == [
        "1 document with nothing to learn left out",
        "chats.jsonl: 2 records (jsonl): messages",
        "pairs.jsonl: 1 record (jsonl): prompt",
        "texts.jsonl: 1 record (jsonl): text",
        "messages: 3 user turns, 2 assistant turns; template world; learned: answers",
        "prompt: 1 user turn, 1 assistant turn; template none; learned: answers",
    ]
