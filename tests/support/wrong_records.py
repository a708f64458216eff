"""Wrong records, templates and chats at the command line: more rows for the table of tests/test_wrong_inputs.py."""

import json

from wrong_inputs import read_table

ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [ASKED, ANSWERED]}
LINES = {
    "both": [{**CHAT, "text": "a"}],
    "change": [CHAT, {"text": "a"}],
    "answer-first": [CHAT, {"messages": [ANSWERED]}],
    "two-answers": [{"messages": [ASKED, ANSWERED, ANSWERED]}],
    "two-users": [{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}],
    "tool": [{"messages": [ASKED, {"role": "tool", "content": "b"}]}],
    "calls": [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]}],
    "null": [{"messages": [ASKED, {"role": "assistant", "content": None}]}],
    "image": [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}],
    "no-role": [{"messages": [{"content": "a"}]}],
    "no-content": [{"messages": [{"role": "user", "text": "a"}]}],
    "no-value": [{"conversations": [{"from": "human", "text": "a"}]}],
    "empty-list": [{"messages": []}],
    "no-list": [{"messages": "User: a"}],
    "strings": [{"conversations": ["a", "b"]}],
    "empty-completion": [{"prompt": "a", "completion": " "}],
    "no-prompt": [{"completion": "b", "question": "a"}],
    "no-output": [{"instruction": "a", "input": "b"}],
    "two-inputs": [{"instruction": "a", "input": "b", "context": "c", "output": "d"}],
    "history": [{"instruction": "a", "output": "b", "history": [["c", "d"]]}],
    "reasoning": [{"messages": [ASKED, {**ANSWERED, "reasoning_content": "c"}]}],
    "surrogate": [{"messages": [ASKED, {"role": "assistant", "content": "b\ud800"}]}],
    "unanswered": [{"messages": [ASKED]}],
    "chats": [CHAT],
}
RECORD_FILES = {
    **{f"records/{name}.jsonl": "".join(json.dumps(line) + "\n" for line in lines) for name, lines in LINES.items()},
    "records/mine.yaml": 'roles:\n  user: {heading: "U:", body: "x"}\n  bot: {head: "B:", body: "{content}"}\n',
    "records/asks.yaml": 'roles: {user: {body: "{content}"}}\n',
}
PREPARE = "prepare records/"

ROWS = read_table(f"""
# Records.
a text and a chat in one = {PREPARE}both.jsonl --output out
    records/both.jsonl:1: ... choose --form text or --form messages
a change of form = {PREPARE}change.jsonl --output out
    records/change.jsonl:2: is of form text, ... split the file
an answer first = {PREPARE}answer-first.jsonl --output out
    records/answer-first.jsonl:2: turn 1: is an answer, ... fix it, or add --skip-bad
two answers in a row = {PREPARE}two-answers.jsonl --output out
    records/two-answers.jsonl:1: turn 3: ... join them, or fix it, or add --skip-bad
two questions in a row = {PREPARE}two-users.jsonl --output out
    records/two-users.jsonl:1: turn 2: ... join them, or fix it, or add --skip-bad
a role that the template does not have = {PREPARE}tool.jsonl --output out
    records/tool.jsonl:1: turn 2: role 'tool', not ... use --template or --skip-bad
a call of a tool = {PREPARE}calls.jsonl --output out
    records/calls.jsonl:1: turn 2: has `tool_calls`, ... write them as text, or fix it, or add --skip-bad
content that is null = {PREPARE}null.jsonl --output out
    records/null.jsonl:1: turn 2: `content` is null, ... fix it, or add --skip-bad
an image in a chat = {PREPARE}image.jsonl --output out
    records/image.jsonl:1: turn 1: holds a part of type image_url, ... fix it, or add --skip-bad
a turn without a role = {PREPARE}no-role.jsonl --output out
    records/no-role.jsonl:1: turn 1: no `role` (keys: 'content'); fix it, or add --skip-bad
a turn without content = {PREPARE}no-content.jsonl --output out
    records/no-content.jsonl:1: turn 1: no `content` (keys: 'role', 'text'); fix it, or add --skip-bad
a turn without a value = {PREPARE}no-value.jsonl --output out
    records/no-value.jsonl:1: turn 1: no `value` (keys: 'from', 'text'); fix it, or add --skip-bad
an empty chat = {PREPARE}empty-list.jsonl --output out
    records/empty-list.jsonl:1: `messages` is empty; fix it, or add --skip-bad
a chat that is text = {PREPARE}no-list.jsonl --output out
    records/no-list.jsonl:1: `messages` is str, ... fix it, or add --skip-bad
a chat of texts = {PREPARE}strings.jsonl --output out
    records/strings.jsonl:1: turn 1: is str, ... fix it, or add --skip-bad
an empty completion = {PREPARE}empty-completion.jsonl --output out
    records/empty-completion.jsonl:1: `completion` is empty, ... fix it, or add --skip-bad
a completion without a prompt = {PREPARE}no-prompt.jsonl --output out
    records/no-prompt.jsonl:1: no key `prompt` (keys: 'completion', 'question'); fix it, or add --skip-bad
an instruction without output = {PREPARE}no-output.jsonl --output out
    records/no-output.jsonl:1: no key `output` (keys: 'instruction', 'input'); fix it, or add --skip-bad
an input and a context = {PREPARE}two-inputs.jsonl --output out
    records/two-inputs.jsonl:1: has both `input` and `context`; fix it, or add --skip-bad
a history = {PREPARE}history.jsonl --output out
    records/history.jsonl:1: `history` is not read; ... fix it, or add --skip-bad
reasoning without a place = {PREPARE}reasoning.jsonl --output out
    records/reasoning.jsonl:1: turn 2: has reasoning, ... remove it, or add --template g1
half a character in a chat = {PREPARE}surrogate.jsonl --output out
    records/surrogate.jsonl:1: turn 2: `content` holds a lone surrogate, ... remove it, it is no text, or add --skip-bad
chats without an answer = {PREPARE}unanswered.jsonl --output out
    all documents have nothing to learn; ... or give chats with answers in them
a form that is not there = {PREPARE}chats.jsonl --output out --form instruction
    records/chats.jsonl:1: no key `instruction` (keys: 'messages'); fix it, or add --skip-bad
a form that is none = {PREPARE}chats.jsonl --output out --form sharegpt
    --form: sharegpt is not known; choose one of text, prompt, instruction, messages, conversations
a column of texts for chats = {PREPARE}chats.jsonl --output out --form messages --text-column a
    --text-column: is for texts, and --form is messages; leave one of them out
a role that nobody has = {PREPARE}chats.jsonl --output out --learn system
    --learn: no document has a turn of system; the roles there are assistant, user
a role that is none = {PREPARE}chats.jsonl --output out --learn bot
    --learn: bot is no role; choose answers, all, or ... response
# Templates and chats.
a template that is none = {PREPARE}chats.jsonl --output out --template chatml
    --template: chatml is not known; choose world, g1, plain, or name a .yaml file of your own
a template that is missing = {PREPARE}chats.jsonl --output out --template gone.yaml
    gone.yaml: no such file; choose world, g1, plain, or name a .yaml file of your own
a template with mistakes = {PREPARE}chats.jsonl --output out --template records/mine.yaml
    records/mine.yaml: 2 problems
    records/mine.yaml:2: roles.user.body: 'x' has {{content}} 0 times; write it once
    records/mine.yaml:3: roles.bot.head: no template has this key; known: heading, body, empty_body, end, reasoning
a template for a prompt = generate finch.pth --prompt a --template world
    --template: is for a chat; add --chat, or leave it out
a chat without a message = generate finch.pth --chat
    --chat: there is no message to answer; give it with --prompt
a template without answers = generate finch.pth --chat --prompt a --template records/asks.yaml
    --template: has no role assistant, which a chat takes; add it
thinking without a place for it = chat finch.pth --think
    --think: the template has no place for reasoning; take --template g1
a chat without a model = chat
    the following arguments are required: model
a chat with a temperature below zero = chat finch.pth --temperature -1
    temperature: -1.0 ... give 0 or more
""")
