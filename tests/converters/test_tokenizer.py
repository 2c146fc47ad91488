"""The tokenizer against transformers' CLIPTokenizer."""

import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from converters import Tokenizer, tokenize
from converters.tokenizer import read_tokenizer, write_tokenizer
from fact_jax.errors import UserError

PROMPTS = [
    "",
    "a cat and the hat",
    "A  CAT\tand\nthe  dog's 42 tails, they're we've I'll I'd can't",
    "Ünïcödé émigré ﬁ ½ 漢字 🙂 naïve é",
    "the cat<|endoftext|>and <|startoftext|> the",
    "!!! ... --- (the) [cat] {and}",
    "the cat " * 60,
]


@pytest.fixture
def peer(vocabulary, tmp_path):
    vocab, merges = vocabulary

    def make(length: int) -> CLIPTokenizer:
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)

    return make


@pytest.fixture
def ours(vocabulary):
    return lambda length: Tokenizer(
        vocab=vocabulary[0], merges=vocabulary[1], model_max_length=length
    )


@pytest.mark.parametrize("length", [5, 16, 77])
def test_ids_are_those_of_transformers(peer, ours, length):
    ids, _ = tokenize(ours(length), PROMPTS)
    wanted = peer(length)(PROMPTS, padding="max_length", truncation=True)["input_ids"]
    assert ids.dtype == np.int32
    assert ids.tolist() == wanted


def test_values_by_hand(vocabulary, ours):
    vocab, _ = vocabulary
    ids, cut = tokenize(ours(6), ["Cat  x"])
    assert ids.tolist() == [[0, vocab["cat</w>"], vocab["x</w>"], 1, 1, 1]]
    assert cut == [None]


def test_what_is_cut_is_said(ours):
    ids, cut = tokenize(ours(5), ["the cat and", "the cat and Zz, the  Hat"])
    assert cut == [None, "Zz, the  Hat"]
    assert ids[1, -1] == 1
    # Just inside and just outside.
    assert tokenize(ours(77), ["the " * 75])[1] == [None]
    assert tokenize(ours(77), ["the " * 76])[1] == ["the"]


def test_a_word_in_the_middle_of_which_the_room_ends(ours):
    assert tokenize(ours(5), ["the cat xyz end"])[1] == ["yz end"]


def test_files_of_transformers_are_read(peer, ours, tmp_path):
    peer(16).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    read = read_tokenizer(tmp_path, 77)
    assert read.model_max_length == 16
    assert np.array_equal(tokenize(read, PROMPTS)[0], tokenize(ours(16), PROMPTS)[0])


def test_our_files_are_read_by_transformers_and_by_us(ours, tmp_path):
    write_tokenizer(ours(16), tmp_path)
    again = read_tokenizer(tmp_path, 77)
    assert again == ours(16)
    wanted = tokenize(again, PROMPTS)[0].tolist()
    peer = CLIPTokenizer.from_pretrained(tmp_path)
    assert peer(PROMPTS, padding="max_length", truncation=True)["input_ids"] == wanted


def test_another_pad_token(vocabulary, tmp_path):
    vocab, merges = vocabulary
    write_tokenizer(Tokenizer(vocab=vocab, merges=merges, pad_token="!"), tmp_path)
    ids, _ = tokenize(read_tokenizer(tmp_path), ["cat"])
    assert ids[0, 3:].tolist() == [vocab["!"]] * 74


@pytest.mark.parametrize("said", [10**30, None, 512])
def test_never_longer_than_the_text_encoder_takes(ours, tmp_path, said):
    write_tokenizer(ours(16), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    settings |= {"model_max_length": said} if said else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(tmp_path, 20).model_max_length == 20


def test_bad_files(ours, tmp_path):
    with pytest.raises(UserError, match=r"no vocab\.json"):
        read_tokenizer(tmp_path)
    write_tokenizer(ours(16), tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nqq zz\n")
    with pytest.raises(UserError, match="vocabulary and merges do not fit"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("one two three\n")
    with pytest.raises(UserError, match="not a CLIP tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="lacks the special tokens"):
        read_tokenizer(tmp_path)
