import random
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infctx.data.tokenizer import WorldTokenizer, get_tokenizer, tokenizer_for_vocab
from infctx.documents.example_documents import python_documents
from infctx.errors import InputError

NAMES = ("world", "bytes")
TEXTS = [
    "",
    " ",
    "Hello, world!\n",
    "\r\n\r\n\n\r \t\x0b\x0c",
    "\x00",
    "a\x00\x00b\x00",
    "".join(map(chr, range(0x250))),
    "naïve café, Ærøskøbing, Žižek",
    "Съешь же ещё этих мягких французских булок",
    "我能吞下玻璃而不伤身体。吾輩は猫である。다람쥐 헌 쳇바퀴에",
    "שלום עולם, مرحبا بالعالم, नमस्ते दुनिया, สวัสดีชาวโลก",
    "🙂👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿🇩🇪 \U0001f9d1\u200d\U0001f52c e\u0301\u0323",
    "€½→∘⌀♂❌❤" * 40,
    " " * 1000 + "\n" * 1000 + "=" * 1000 + "-" * 300,
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n\n" * 20,
    "\ufeff\ufffd\uffff\U0010ffff\ue000",
]


def random_text(rng: random.Random, length: int) -> str:
    """Returns characters of all planes, and sequences of World tokens."""
    world = get_tokenizer("world")
    parts = []
    for _ in range(length):
        if rng.random() < 0.5:
            top = rng.choice([0x80, 0x800, 0x3000, 0xA000, 0x10000, 0x110000])
            code = rng.randrange(top)
            parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        else:
            parts.append(world.decode([rng.randrange(1, 65530)]).decode("utf-8", "ignore") * rng.choice([1, 1, 1, 3]))
    return "".join(parts)


@pytest.fixture(scope="module")
def judge():
    """The tokenizer of the rwkv package."""
    import rwkv.rwkv_tokenizer as module

    path = module.__file__.replace("rwkv_tokenizer.py", "rwkv_vocab_v20230424.txt")
    return module.TRIE_TOKENIZER(path)


@pytest.mark.parametrize("text", TEXTS)
def test_world_equals_the_rwkv_package(judge, text):
    assert get_tokenizer("world").encode(text).tolist() == judge.encode(text)


def test_world_equals_the_rwkv_package_on_random_texts(judge):
    rng = random.Random(1)
    for _ in range(300):
        text = random_text(rng, rng.randrange(60))
        ids = get_tokenizer("world").encode(text)
        assert ids.tolist() == judge.encode(text)
        assert get_tokenizer("world").decode(ids) == judge.decodeBytes(ids.tolist())


@pytest.mark.slow
def test_world_equals_the_rwkv_package_on_20_megabytes(judge):
    """Python's sources and its help pages, and characters and tokens of all languages among them."""
    rng = random.Random(2)
    num_bytes = 0
    for _, source in cycle(python_documents(min_bytes=1000)):
        text = source + random_text(rng, len(source) // 12)
        ids = get_tokenizer("world").encode(text)
        assert ids.tolist() == judge.encode(text)
        assert get_tokenizer("world").decode(ids) == text.encode()
        num_bytes += len(text.encode())
        if num_bytes > 20_000_000:
            return


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text())
@settings(deadline=None, max_examples=60)
def test_decode_gives_the_text_back_and_no_text_holds_the_end_of_document(name, text):
    tokenizer = get_tokenizer(name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.end_of_document not in ids
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", NAMES)
def test_nul_is_a_separate_token(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.encode("a\x00b").tolist()[1] == 1
    assert tokenizer.decode([1]) == b"\x00"
    assert tokenizer.decode([0]) == b""
    assert tokenizer.end_of_document == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece_length", [1, 2, 7, 100, 127, 128, 129, 1000])
def test_pieces_give_the_ids_of_the_whole(name, piece_length):
    tokenizer = get_tokenizer(name)
    rng = random.Random(piece_length)
    texts = ["".join(TEXTS)] + [random_text(rng, 300) for _ in range(4)]
    for text in texts:
        pieces = [text[i : i + piece_length] for i in range(0, len(text), piece_length)]
        joined = np.concatenate(list(tokenizer.encode_pieces(iter(pieces))))
        assert joined.tolist() == tokenizer.encode(text).tolist()


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_pieces_of_any_lengths_give_the_ids_of_the_whole(data):
    world = get_tokenizer("world")
    text = random_text(random.Random(data.draw(st.integers(0, 2**32))), 200)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for part in world.encode_pieces(pieces) for i in part.tolist()]
    assert ids == world.encode(text).tolist()


def test_a_token_of_128_bytes_is_not_cut_at_a_seam():
    world = get_tokenizer("world")
    longest = max(range(65536), key=lambda i: world.byte_lengths[i])
    token = world.decode([longest]).decode()
    assert len(token.encode()) == WorldTokenizer.longest_token
    for shift in range(130):
        text = "x" * 200 + "\n" + token + "y" * 200
        pieces = [text[: 201 + shift], text[201 + shift :]]
        assert np.concatenate(list(world.encode_pieces(pieces))).tolist() == world.encode(text).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_encoded_as_they_come(name):
    """At most a piece and the tokens around the 128 bytes before it are held back, whatever the text."""
    tokenizer = get_tokenizer(name)
    for text in ["word and " * 100, " " * 900, "→" * 900, "🙂" * 900, "多" * 900]:
        given_bytes = 0

        def pieces(text=text):
            nonlocal given_bytes
            for _ in range(20):
                given_bytes += len(text.encode())
                yield text

        done = 0
        for ids in tokenizer.encode_pieces(pieces()):
            done += int(tokenizer.byte_lengths[ids].sum())
            assert given_bytes - done <= len(text.encode()) + 2 * 128
        assert done == 20 * len(text.encode())


def test_no_world_token_joins_the_end_of_a_character_to_the_next_one():
    """`encode_pieces` relies on this to find a cut near the end."""
    world = get_tokenizer("world")
    for i in range(1, 65530):
        token = world.decode([i])
        if token[0] & 0xC0 == 0x80:
            assert all(byte & 0xC0 == 0x80 for byte in token)


@pytest.mark.parametrize("name", NAMES)
def test_no_pieces_give_no_ids(name):
    assert [ids.tolist() for ids in get_tokenizer(name).encode_pieces(["", ""])] == []
    assert get_tokenizer(name).encode("").tolist() == []


def test_decode_of_incomplete_utf8_gives_its_bytes():
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.decode([0xE2 + 1, 0x82 + 1]) == b"\xe2\x82"
    world = get_tokenizer("world")
    incomplete = [i for i in range(1, 65530) if not is_utf8(world.decode([i]))]
    assert len(incomplete) == 486
    assert world.decode(incomplete) == b"".join(world.decode([i]) for i in incomplete)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("name, size", [("world", 65536), ("bytes", 257)])
def test_ids_outside_the_vocabulary_are_refused(name, size):
    tokenizer = get_tokenizer(name)
    assert tokenizer.vocab_size == size
    for wrong in (-1, size, 2**40):
        with pytest.raises(InputError, match=f"token id {wrong} is outside the {name} vocabulary"):
            tokenizer.decode([1, wrong])


def test_ids_without_a_token_decode_to_nothing():
    assert get_tokenizer("world").decode([98, 65530, 65535, 98]) == b"aa"


@pytest.mark.parametrize("name", NAMES)
def test_byte_lengths_are_those_of_the_tokens(name):
    tokenizer = get_tokenizer(name)
    assert tokenizer.byte_lengths.dtype == np.int64
    assert tokenizer.byte_lengths.tolist() == [len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]


@pytest.mark.parametrize("name", NAMES)
def test_lone_surrogates_are_an_input_error(name):
    with pytest.raises(InputError, match=r"character 1 of the text is a lone surrogate \(U\+D83D\)"):
        get_tokenizer(name).encode("a\ud83d")
    with pytest.raises(InputError, match="lone surrogate"):
        list(get_tokenizer(name).encode_pieces(["a", "\udfff"]))


def test_an_unknown_name_is_an_input_error():
    with pytest.raises(InputError, match="'gpt2' is not known; choose one of world, bytes"):
        get_tokenizer("gpt2")


def test_the_vocabulary_size_determines_the_tokenizer():
    assert tokenizer_for_vocab(257) == "bytes"
    assert [tokenizer_for_vocab(size) for size in (65530, 65535, 65536)] == ["world"] * 3
    assert [tokenizer_for_vocab(size) for size in (256, 258, 50277, 65529, 65537)] == [None] * 5
