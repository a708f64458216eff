"""Chats for the tests, and the judge of what is learned of them: it finds the turns in the text, not in the records."""

import json
import random
import re

import numpy as np

from infctx.data.token_store import TokenStore
from infctx.documents.document import Reading
from infctx.prepare.prepare import prepare

HEADINGS = {
    "system": "System:",
    "user": "User:",
    "assistant": "Assistant:",
    "instruction": "Instruction:",
    "input": "Input:",
    "response": "Response:",
}
TURN = re.compile(rf"({'|'.join(HEADINGS.values())})((?: .*?)?\n\n)", re.DOTALL)
WORDS = [
    "hi",
    "yes",
    "no.",
    "好的",
    "naïve",
    "🙂",
    "User:",
    "x=1",
    "-",
    "a,b",
    "the",
    "of",
    "Assistant:",
    "{content}",
    "☃",
]


def random_chats(count, seed=0, words=(1, 60)):
    """Chats of one to three questions with their answers, some with a system turn."""
    chosen = random.Random(seed)

    def content():
        return " ".join(chosen.choices(WORDS, k=chosen.randint(*words)))

    chats = []
    for _ in range(count):
        chat = [{"role": "system", "content": content()}] if chosen.random() < 0.3 else []
        for _ in range(chosen.randint(1, 3)):
            chat += [{"role": "user", "content": content()}, {"role": "assistant", "content": content()}]
        chats.append(chat)
    return chats


def prepared(folder, records, tokenizer="bytes", workers=1, **reading):
    """The store of records, each a document."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    prepare(
        [str(source)],
        folder / "out",
        tokenizer=tokenizer,
        reading=Reading(**reading),
        workers=workers,
        overwrite=True,
        progress=False,
    )
    return TokenStore(folder / "out" / "train")


def tidied(content):
    """Content as it is in a turn of RWKV World."""
    return re.sub(r"\n+", "\n", content.replace("\r\n", "\n")).strip()


def world_text(turns):
    """The text of (role, content) turns in RWKV World's form, written without a template."""
    contents = [(role, tidied(content)) for role, content in turns]
    return "".join(f"{HEADINGS[role]}{' ' if content else ''}{content}\n\n" for role, content in contents)


def judged_parts(text, roles):
    """(piece, whether it is learned) for the turns that a text in RWKV World's form shows; roles: None for all."""
    names = {heading: role for role, heading in HEADINGS.items()}
    parts, place = [], 0
    while place < len(text):
        found = TURN.match(text, place)
        role = names[found[1]]
        parts += [(found[1], roles is None), (found[2], roles is None or role in roles)]
        place = found.end()
    return parts


def judged(parts, tokenizer):
    """The tokens of (piece, is learned) and the end, and which are targets: by the place of their bytes."""
    tokens = np.concatenate([*(tokenizer.encode(piece) for piece, _ in parts), np.array([0], np.uint16)])
    learned = np.concatenate([np.full(len(piece.encode()), is_learned) for piece, is_learned in parts])
    begins = np.cumsum(tokenizer.byte_lengths[tokens]) - tokenizer.byte_lengths[tokens]
    targets = np.append(learned, learned[-1])[begins]
    targets[0] = False  # nothing comes before it
    return tokens, targets
