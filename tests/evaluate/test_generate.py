"""Generation: token by token from the state gives the same text as reading everything again for every token."""

import pytest
import torch

from infctx.data.tokenizer import get_tokenizer
from infctx.errors import InputError
from infctx.evaluate import generate as generate_module
from infctx.evaluate.generate import draw, generate

from tiny_models import random_model

BYTES = get_tokenizer("bytes")


def bytes_model(version=6, ends=False, **options):
    """Returns a model over bytes that always (`ends`) or never ends a document."""
    model = random_model(version, dtype=torch.float64, vocab_size=257, with_state=True, **options)
    logits = model.logits

    def without_end(hidden):
        found = logits(hidden).clone()
        found[..., 0] = 1e3 if ends else -1e3
        return found

    model.logits = without_end
    return model


@torch.no_grad()
def most_likely(model, tokens, count):
    """The judge: computes each token from all tokens before it."""
    tokens = list(tokens)
    for _ in range(count):
        hidden, _ = model(torch.tensor([tokens]))
        tokens.append(int(model.logits(hidden)[0, -1].argmax()))
    return bytes(token - 1 for token in tokens[-count:])


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("prompt", ["", "d", "def f(x):\n", "naïve \N{SNOWMAN}"])
def test_temperature_zero_picks_the_most_likely_token(version, prompt):
    model = bytes_model(version)
    begin = BYTES.encode(prompt).tolist() or [0]  # an empty prompt starts after the end of another document
    found = b"".join(generate(model, prompt, max_tokens=25, temperature=0))
    assert found == most_likely(model, begin, 25)
    assert len(set(found)) > 3


def test_a_long_prompt_is_read_in_segments(monkeypatch):
    model, prompt = bytes_model(), "0123456789" * 7
    whole = b"".join(generate(model, prompt, max_tokens=5, temperature=0))
    monkeypatch.setattr(generate_module, "PROMPT_SEGMENT_TOKENS", 16)
    assert b"".join(generate(model, prompt, max_tokens=5, temperature=0)) == whole
    assert whole == most_likely(model, BYTES.encode(prompt).tolist(), 5)


def test_the_text_depends_on_the_seed_alone():
    model = bytes_model()
    first, again, other = (b"".join(generate(model, "a", max_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    before = torch.get_rng_state()
    list(generate(model, "a", max_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_stops_at_the_end_of_the_document():
    assert list(generate(bytes_model(ends=True), "a", max_tokens=30)) == []
    assert len(list(generate(bytes_model(), "a", max_tokens=30))) == 30


def test_tokens_are_yielded_one_by_one_without_gradients():
    model = bytes_model()
    pieces = generate(model, "a", max_tokens=3)
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    with torch.enable_grad():
        next(generate(model, "a", max_tokens=1))
        assert torch.is_grad_enabled()


def drawn(logits, temperature=1.0, top_p=1.0, count=4000):
    random = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw(logits, temperature, top_p, random) for _ in range(count)])
    return torch.bincount(draws, minlength=len(logits)) / count


LOGITS = torch.tensor([0.3, 0.05, 0.4, 0.05, 0.2], dtype=torch.float64).log() + 5


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0.3, 0.05, 0.4, 0.05, 0.2]),
        (0.85, [0.3, 0, 0.4, 0, 0.2]),
        (0.71, [0.3, 0, 0.4, 0, 0.2]),
        (0.69, [0.3, 0, 0.4, 0, 0]),
        (0.41, [0.3, 0, 0.4, 0, 0]),
        (0.39, [0, 0, 0.4, 0, 0]),
        (1e-9, [0, 0, 0.4, 0, 0]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    found, kept = drawn(LOGITS, top_p=top_p), torch.tensor(kept)
    assert torch.equal(found > 0, kept > 0)
    assert torch.allclose(found, kept / kept.sum(), atol=0.03)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    wanted = torch.softmax(LOGITS / temperature, dim=0).float()
    assert torch.allclose(drawn(LOGITS, temperature), wanted, atol=0.03)
    for tiny in (0, 1e-320):
        assert drawn(LOGITS, tiny, count=5)[2] == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature: -0.1 does not fit; give 0 or more"),
        ({"top_p": 0}, r"top_p: 0 does not fit"),
        ({"top_p": 1.5}, r"top_p: 1.5 does not fit"),
        ({"max_tokens": 0}, "max_tokens: 0 does not fit; give at least 1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_p": float("nan")}, "top_p: nan"),
        ({"prompt": "lone \ud800"}, "lone surrogate"),
    ],
)
def test_values_out_of_range_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        list(generate(bytes_model(), **({"prompt": "a"} | options)))


def test_a_vocabulary_without_tokenizer_is_refused():
    with pytest.raises(InputError, match="no tokenizer here has the model's 19 ids; take a model of 257"):
        list(generate(random_model(5), "a"))


def test_damaged_weights_are_reported():
    model = random_model(5, vocab_size=257)
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        list(generate(model, "a"))
