"""Templates: what a turn becomes, and a line for each mistake in a file of one."""

import pytest

from infctx.documents.templates import BUILT_IN, get_template
from infctx.errors import InputError

MINE = """
collapse_newlines: true
roles:
  user: {heading: "<|user|>", body: "\\n{content}", end: "<|end|>\\n"}
  assistant: {heading: "<|bot|>", body: "\\n{content}", end: "<|end|>\\n"}
"""


def mine(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    get_template.cache_clear()
    return get_template(str(path))


@pytest.mark.parametrize(
    ("content", "body"),
    [
        ("hi", " hi\n\n"),
        ("", "\n\n"),
        (" \r\n ", "\n\n"),
        ("\n a\r\n\r\n\nb \n", " a\nb\n\n"),
        ("a\n \nb", " a\n \nb\n\n"),
        ("{content} {reasoning} {x}", " {content} {reasoning} {x}\n\n"),
    ],
)
def test_a_turn_of_world(content, body):
    for role, heading in (("user", "User:"), ("assistant", "Assistant:"), ("system", "System:")):
        assert get_template("world").turn(role, content) == (heading, body)


def test_plain_leaves_contents_as_they_are():
    assert get_template("plain").turn("user", " a\r\n\n ") == ("", " a\r\n\n ")


def test_g1_answers_at_once_or_after_reasoning():
    g1 = get_template("g1")
    assert g1.turn("user", "a") == get_template("world").turn("user", "a")
    assert g1.turn("assistant", "a") == ("Assistant: <think>\n</think", ">\na\n\n")
    assert g1.turn("assistant", "") == ("Assistant: <think>\n</think", ">\n\n")
    assert g1.turn("assistant", "a {x}", "{content}\n\nb") == ("Assistant: <think", ">{content}\nb</think>\na {x}\n\n")
    assert g1.turn("assistant", "a", " \n") == g1.turn("assistant", "a")


def test_a_file_of_ones_own(tmp_path):
    template = mine(tmp_path, MINE)
    assert template.turn("assistant", "a\n\nb ") == ("<|bot|>", "\na\nb<|end|>\n")
    assert template.turn("user", "") == ("<|user|>", "<|end|>\n")
    assert template.answer_lead("assistant") == "\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "mine.yaml: no template in it; it needs the key roles"),
        ("- a", "mine.yaml: no template in it"),
        ("strip: true", "mine.yaml: roles: is missing"),
        ("roles: {}", "mine.yaml:1: roles: has no role"),
        ("roles: user", "roles: 'user' does not fit; write keys below it"),
        (MINE + "end: x", "mine.yaml:6: end: no template has this key; known: strip, collapse_newlines, roles"),
        (MINE.replace("heading", "head", 1), "mine.yaml:4: roles.user.head: no template has this key; known: heading"),
        (MINE.replace("{content}", "", 1), "mine.yaml:4: roles.user.body: '\\n' has {content} 0 times; write it once"),
        (MINE.replace("{content}", "{content}{content}", 1), "has {content} 2 times; write it once"),
        (MINE.replace('"<|user|>"', "3"), "mine.yaml:4: roles.user.heading: 3 does not fit; give text in quotes"),
        (MINE.replace("true", "2", 1), "mine.yaml:2: collapse_newlines: 2 does not fit; give true or false"),
        (MINE.replace('"}', '", reasoning: {body: "{content}"}}', 1), "mine.yaml:4: roles.user.reasoning.body: "),
        (MINE.replace(', body: "\\n{content}"', "", 1), "mine.yaml:4: roles.user.body: is missing; write it"),
        ("roles: [", "mine.yaml: "),
        ("roles:\n  user: &a {body: '{content}'}\n  x: *a", "mine.yaml:3: aliases (*name) are not read"),
    ],
)
def test_a_mistake_in_a_file_names_line_and_key(tmp_path, text, problem):
    with pytest.raises(InputError) as caught:
        mine(tmp_path, text)
    assert problem in str(caught.value)
    assert ";" in str(caught.value)


def test_several_mistakes_are_reported_together(tmp_path):
    with pytest.raises(InputError) as caught:
        mine(tmp_path, MINE.replace("heading", "head"))
    assert len(caught.value.lines) == 3


def test_a_name_that_is_none_lists_those_there_are(tmp_path):
    for name in ("chatml", str(tmp_path / "gone.yaml")):
        with pytest.raises(InputError, match="choose world, g1, plain, or name a .yaml file"):
            get_template(name)
    assert list(BUILT_IN) == ["world", "g1", "plain"]
