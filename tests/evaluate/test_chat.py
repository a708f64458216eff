"""Chats: a model reads at inference, token by token, what it read in training, and its answers end where theirs do."""

import io
import signal
import sys

import pytest
import torch

import infctx
from infctx.__main__ import main
from infctx.data.tokenizer import get_tokenizer
from infctx.documents.templates import get_template
from infctx.errors import InputError
from infctx.evaluate import generate as generate_module
from infctx.evaluate.chat import Chat
from infctx.evaluate.generate import Sampling

from chats import prepared, random_chats
from tiny_models import random_model

END = 0
VOCABULARY = {"bytes": 257, "world": 65536}


class Scripted:
    """A model whose draws are given, and that keeps what it has read."""

    def __init__(self, monkeypatch, tokenizer):
        self.tokenizer = get_tokenizer(tokenizer)
        self.model = random_model(6, vocab_size=VOCABULARY[tokenizer], with_state=True, width=8)
        self.model.register_forward_pre_hook(lambda _, arguments: self.tokens.extend(arguments[0][0].tolist()))
        self.tokens, self.draws = [], []
        monkeypatch.setattr(generate_module, "draw", lambda *_: self.draws.pop(0))

    def chat(self, template="world", **options):
        return Chat(self.model, get_template(template), Sampling(max_tokens=400), **options)

    def encoded(self, *texts):
        return [token for text in texts for token in self.tokenizer.encode(text).tolist()]

    def answer(self, pieces, draws):
        """The answer, when these tokens are drawn."""
        self.draws[:] = draws
        return "".join(pieces)


@pytest.fixture(params=["bytes", "world"])
def scripted(request, monkeypatch):
    return Scripted(monkeypatch, request.param)


@pytest.mark.parametrize("template", ["world", "g1"])
@pytest.mark.parametrize("ending", ["stop", "document", "beyond"])
def test_what_a_chat_reads_is_what_training_read(tmp_path, scripted, template, ending):
    """ending: what the model draws after an answer: its end, the end of the document, or a token with more in it."""
    if ending == "beyond" and scripted.tokenizer.name == "bytes":
        pytest.skip("a token is one byte")
    conversations = random_chats(3, words=(1, 10))
    store = prepared(
        tmp_path, [{"messages": chat} for chat in conversations], scripted.tokenizer.name, template=template
    )
    for i, messages in enumerate(conversations):
        trained = store.tokens(i, 0, store.length(i) - 1).tolist()
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        chat = scripted.chat(template, system=system)
        scripted.tokens.clear()
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            pieces = chat.say(asked["content"])
            before = len(scripted.tokens)
            assert scripted.tokens == trained[:before]  # the prompt of this answer
            body = scripted.encoded(get_template(template).turn("assistant", answered["content"]).body)
            two_newlines = scripted.encoded("\n\n")
            assert body[-len(two_newlines) :] == two_newlines
            ends = {"stop": two_newlines, "document": [END], "beyond": scripted.encoded("\n\n   ")}
            said = scripted.answer(pieces, body[: -len(two_newlines)] + ends[ending])
            assert said == answered["content"]
            assert not scripted.draws
        if ending == "document":  # the end of an answer is read with the next message
            assert scripted.tokens == trained[: len(scripted.tokens)]
            assert trained[len(scripted.tokens) :] == two_newlines
        else:
            assert scripted.tokens == trained


def test_the_state_is_carried(scripted):
    """The state after two turns is that of reading their text at once."""
    chat = scripted.chat()
    for asked, answered in (("hi", " 好 you\n\n"), ("and?", " yes\n\n")):
        scripted.answer(chat.say(asked), scripted.encoded(answered))
    whole = scripted.encoded(
        "User:", " hi\n\n", "Assistant:", " 好 you\n\n", "User:", " and?\n\n", "Assistant:", " yes\n\n"
    )
    assert scripted.tokens == whole
    with torch.no_grad():
        _, state = scripted.model(torch.tensor([whole]))
    for found, wanted in zip(chat._answer.reached.state, state, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_retry_answers_the_same_message_again(scripted):
    chat = scripted.chat()
    assert scripted.answer(chat.say("hi"), scripted.encoded(" one\n\n")) == "one"
    before = chat._asked
    assert scripted.answer(chat.retry(), scripted.encoded(" two\n\n")) == "two"
    assert chat._asked is before
    scripted.tokens.clear()
    scripted.answer(chat.say("and?"), scripted.encoded(" three\n\n"))
    assert scripted.tokens == scripted.encoded("User:", " and?\n\n", "Assistant:", " three\n\n")
    with torch.no_grad():
        whole = scripted.encoded("User:", " hi\n\n", "Assistant:", " two\n\n", "User:", " and?\n\n", "Assistant:")
        hidden, _ = scripted.model(torch.tensor([whole]))
    torch.testing.assert_close(chat._asked.hidden, hidden[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("said", ["", " he"])
def test_an_answer_that_is_left_is_ended_before_the_next_turn(scripted, said):
    chat = scripted.chat()
    pieces = chat.say("hi")
    never = scripted.encoded(" never\n\n")
    if said:
        scripted.draws[:] = scripted.encoded(said) + never
        while len(scripted.draws) > len(never):
            next(pieces)
        pieces.close()
    scripted.answer(chat.say("so?"), scripted.encoded("\n\n"))
    answered = scripted.encoded("User:", " hi\n\n", "Assistant:", said, "\n\n")
    assert scripted.tokens == answered + scripted.encoded("User:", " so?\n\n", "Assistant:", "\n\n")


def test_half_an_end_is_completed(scripted):
    chat = scripted.chat()
    assert scripted.answer(chat.say("hi"), [*scripted.encoded(" yes", "\n"), END]) == "yes\n"
    scripted.tokens.clear()
    scripted.answer(chat.say("so?"), scripted.encoded("\n\n"))
    assert scripted.tokens == scripted.encoded("\n", "User:", " so?\n\n", "Assistant:", "\n\n")


def test_plain_ends_with_the_document_and_reset_starts_again(scripted):
    chat = scripted.chat("plain")
    assert scripted.answer(chat.say("a\n\n"), [*scripted.encoded(" b\n\nc"), END]) == " b\n\nc"
    chat.reset()
    assert not chat.has_answer
    scripted.tokens.clear()
    scripted.answer(chat.say("a"), [END])
    assert scripted.tokens == scripted.encoded("a")


def test_thinking_comes_first(scripted):
    chat = scripted.chat("g1", thinks=True)
    assert scripted.answer(chat.say("a"), scripted.encoded(">hm</think>\nyes\n\n")) == "<think>hm</think>\nyes"
    assert scripted.tokens == scripted.encoded("User:", " a\n\n", "Assistant: <think", ">hm</think>\nyes\n\n")


def test_answers_come_in_whole_characters(monkeypatch):
    scripted = Scripted(monkeypatch, "bytes")
    scripted.draws = scripted.encoded(" 好🙂.\n\n")
    assert list(scripted.chat().say("a")) == ["好", "🙂", "."]


def test_generate_stops_before_the_stop(monkeypatch):
    scripted = Scripted(monkeypatch, "bytes")
    for text, stop, wanted in [
        ("abcab", b"ab", b""),
        ("xaab!", b"ab", b"xa"),
        ("x\n\ny", b"\n\n", b"x"),
        ("x\ny", b"\n\n", b"x\ny"),
        ("aaab", b"aab", b"a"),
        ("好", "好".encode(), b""),
        ("xa", b"ab", b"xa"),
    ]:
        scripted.draws = [*scripted.encoded(text), END]
        assert b"".join(infctx.generate(scripted.model, "a", stop=stop)) == wanted


def test_a_template_that_has_not_what_a_chat_takes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('roles: {user: {body: "{content}"}}')
    for name, options, problem in [
        (str(path), {}, "--template: has no role assistant, which a chat takes"),
        ("world", {"thinks": True}, "--think: the template has no place for reasoning; take --template g1"),
    ]:
        with pytest.raises(InputError, match=problem):
            Chat(random_model(6, vocab_size=257), get_template(name), Sampling(), **options)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Runs `infctx chat` or `generate --chat` on a tiny model, with lines as standard input and draws as given."""
    infctx.save_weights(random_model(6, vocab_size=257, width=8), tmp_path / "tiny.pth")
    tokenizer = get_tokenizer("bytes")

    def run(command, *words, lines="", draws=""):
        tokens = tokenizer.encode(draws).tolist()
        monkeypatch.setattr(generate_module, "draw", lambda *_: tokens.pop(0))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        return main([command, str(tmp_path / "tiny.pth"), *words])

    return run


def test_chat_reads_lines_and_writes_answers(answers, capfdbinary):
    lines = "hi\n\n/retry\n/what\n/reset\n/retry\nyou\n"
    assert answers("chat", "--system", "s", lines=lines, draws=" hello 好\n\n hey\nyou\n\n me\n\n") == 0
    output, errors = capfdbinary.readouterr()
    assert output.decode().splitlines() == ["hello 好", "hey", "you", "me"]
    first, second, *rest = errors.decode().splitlines()
    assert first.endswith("tiny.pth, template world")
    assert second == "/retry: another answer, /reset: start again, Ctrl-C: stop an answer, Ctrl-D: leave"
    assert [line.partition(";")[0] for line in rest] == [
        "/what: no such command",
        "started again",
        "there is no answer yet",
    ]


def test_ctrl_c_stops_an_answer_and_not_the_chat(answers, capfdbinary, monkeypatch):
    read = generate_module.read
    count = iter(range(100))

    def interrupted(*arguments):
        if next(count) == 3:  # the prompt, and two tokens of the answer
            signal.raise_signal(signal.SIGINT)
        return read(*arguments)

    monkeypatch.setattr(generate_module, "read", interrupted)
    monkeypatch.setattr("infctx.evaluate.chat.read", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert answers("chat", lines="hi\nyou\n", draws=" abc\n\n") == 0
    finally:
        signal.signal(signal.SIGINT, before)
    output, errors = capfdbinary.readouterr()
    assert output == b"a\nc\n"  # b was drawn and not read
    assert b"(stopped)" in errors


def test_generate_chat_prints_the_answer_alone(answers, capfdbinary):
    assert answers("generate", "--chat", "--prompt", "hi", draws=" hello\nyou\n\n") == 0
    assert capfdbinary.readouterr().out == b"hello\nyou\n"
