"""The tokenizer against transformers' CLIPTokenizer."""

import json

import numpy as np
import pytest
from transformers import CLIPTokenizer

from fact_convert import Tokenizer, tokenize
from fact_convert.models.tokenizer import read_tokenizer, write_tokenizer
from fact_jax.utils.errors import UserError

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


ADDED = [
    "<cat-toy>",
    {"content": "Sks", "single_word": True, "normalized": False},
    {"content": "<L>", "lstrip": True, "rstrip": True},
    {"content": "<r>", "rstrip": True, "normalized": False},
    {"content": "<spec>", "special": True, "normalized": False},
    "cat</w>",
    "über-Haus",
]
ADDED_PROMPTS = [
    *PROMPTS,
    "a <cat-toy>, two <CAT-TOY>s and<cat-toy>the",
    "Sks sks Skse xSks (Sks)! Sks",
    "the  <L>  cat <l>cat <r>  the <R> cat",
    "<spec> a<spec>b cat</w> the ÜBER-haus u\u0308ber-haus",
    "<|ENDOFTEXT|> the <|endoftext|>",
]


def with_added(peer):
    from transformers import AddedToken

    peer.add_tokens([AddedToken(**t) if isinstance(t, dict) else t for t in ADDED])
    return peer


def peer_ids(peer, prompts=ADDED_PROMPTS):
    return peer(prompts, padding="max_length", truncation=True)["input_ids"]


def test_added_tokens_of_fast_files(peer, tmp_path):
    theirs = with_added(peer(24))
    theirs.save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "vocab.json").exists()
    read = read_tokenizer(tmp_path / "fast", 24)
    assert tokenize(read, ADDED_PROMPTS)[0].tolist() == peer_ids(theirs)
    # And what we write is read by them and by us.
    write_tokenizer(read, tmp_path / "ours")
    again = read_tokenizer(tmp_path / "ours", 24)
    assert again == read
    assert peer_ids(CLIPTokenizer.from_pretrained(tmp_path / "ours")) == peer_ids(theirs)


@pytest.mark.parametrize("special", ["<|startoftext|>", {"content": "<|startoftext|>"}])
def test_added_tokens_of_older_files(ours, tmp_path, special):
    write_tokenizer(ours(24), tmp_path)
    count = len(ours(24).vocab)
    added = {"<cat-toy>": count, "<cat-toy>_1": count + 1, "<s>": count + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    flags = {"normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    special = special | flags if isinstance(special, dict) else special
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    names |= {"bos_token": special, "additional_special_tokens": ["<s>", "<new>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    prompts = ["a <cat-toy>  <CAT-toy>_1 <s> <S> <new> <|STARTOFTEXT|>x"]
    read = read_tokenizer(tmp_path, 24)
    expanded = prompts[0].replace("<cat-toy>", "<cat-toy> <cat-toy>_1")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenize(read, prompts)[0].tolist() == peer_ids(theirs, [expanded])
    write_tokenizer(read, tmp_path / "copy")
    assert read_tokenizer(tmp_path / "copy", 24) == read


def test_ids_are_those_that_the_files_say(ours, tmp_path):
    write_tokenizer(ours(24), tmp_path)
    count = len(ours(24).vocab)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": count + 7, "<a>": count + 2}))
    read = read_tokenizer(tmp_path, 24, count + 8)
    wanted = tokenize(read, ["<a> <b>"])[0]
    assert wanted[0, :4].tolist() == [0, count + 2, count + 7, 1]
    write_tokenizer(read, tmp_path / "copy")
    assert np.array_equal(tokenize(read_tokenizer(tmp_path / "copy", 24), ["<a> <b>"])[0], wanted)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "copy")
    assert peer_ids(theirs, ["<a> <b>"]) == wanted.tolist()
    with pytest.raises(UserError, match=rf"more tokens \({count + 8}\) than the text encoder's"):
        read_tokenizer(tmp_path, 24, count + 7)


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        ({"<a>": 3}, "'<a>' has the id 3, as '.*' has"),
        ({"cat</w>": 3}, "has the id 3"),
        ({"<a>": -1}, "no token can be '<a>' with the id -1"),
        ({"<a>": "x"}, "id of an added token is no"),
        ({"<a>": True}, "id of an added token is no"),
        ({"": 600}, "no token can be ''"),
        ({"<a>": 600, "<b>": 600}, "has the id 600"),
    ],
)
def test_added_tokens_that_make_no_sense(ours, tmp_path, added, reason):
    write_tokenizer(ours(24), tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match=reason):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer_config.json", '{"model_max_length": Infinity}', None),
        ("tokenizer_config.json", '{"model_max_length": 1e999}', None),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"model_max_length": -Infinity}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"model_max_length": [1]}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"pad_token": {"content": [1]}}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"pad_token": "\\ud800"}', "lacks the special tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "not a CLIP tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"600": 5}}', "is described by 5"),
        ("tokenizer_config.json", '{"additional_special_tokens": [5]}', "of an added token is no"),
        ("tokenizer_config.json", "[" * 10**5, "not valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("merges.txt", b"\xff\xfe", "not UTF-8 text"),
        ("vocab.json", '{"a": 1e999}', "lacks the special tokens"),
        ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": Infinity}', "id of an added token"),
        ("vocab.json", '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": []}', "not a CLIP"),
    ],
)
def test_settings_that_make_no_sense(ours, tmp_path, name, text, reason):
    write_tokenizer(ours(24), tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if reason is None:
        assert read_tokenizer(tmp_path, 24).model_max_length == 24
    else:
        with pytest.raises(UserError, match=reason) as caught:
            read_tokenizer(tmp_path)
        assert str(caught.value).isprintable()
