"""CLIP's byte-pair tokenizer without transformers: reading and writing its files, token ids."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from fact_convert.io.json_io import read_json, read_text, write_json
from fact_jax.utils.errors import UserError, error_context
from fact_jax.utils.files import atomic_write

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token beside the byte pairs, found in the prompt as it stands; as transformers has them.

    ``normalized`` is looked for in the lowercased prompt, ``single_word`` only between words;
    ``lstrip`` and ``rstrip`` take the spaces on that side along. ``special`` ones are the
    tokenizer's own, not words.
    """

    content: str
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise UserError(f"tokenizer: {field.name} of an added token is no {field.type}")
        if not self.content or not 0 <= self.id < 2**31:
            raise UserError(f"tokenizer: no token can be {self.content!r} with the id {self.id}")

    @classmethod
    def from_dict(cls, said: Mapping, **beside) -> "AddedToken":
        """Read what transformers' files say of a token; ``beside`` is what they say elsewhere."""
        if not isinstance(said, Mapping):
            raise UserError(f"tokenizer: an added token is described by {said!r:.80}")
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: said[name] for name in names & set(said)} | beside
        if not {"content", "id"} <= set(known):
            raise UserError("tokenizer: an added token has no content or no id")
        return cls(**{"normalized": not known.get("special", False), **known})

    def to_dict(self) -> dict[str, Any]:
        """Write transformers' ``added_tokens_decoder``, where the id stands before."""
        said = dataclasses.asdict(self)
        del said["id"]
        return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Vocabulary and merges of a CLIP tokenizer, with its added tokens; ``tokenize`` uses it.

    ``added_tokens`` are those of textual inversion, say, with the special tokens among them: these
    are added where they are not given.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    model_max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"
    unk_token: str = "<|endoftext|>"
    added_tokens: Sequence[AddedToken] = ()

    def __post_init__(self):
        ids = {token.content: token.id for token in self.added_tokens}
        specials = dict.fromkeys(getattr(self, name) for name in _SPECIALS)
        if absent := sorted({t for t in specials if t not in self.vocab and t not in ids}):
            raise UserError(f"tokenizer: the vocabulary lacks the special tokens {absent}")
        if not 2 < self.model_max_length < 2**16:
            raise UserError(f"tokenizer: model_max_length is {self.model_max_length}")
        added = [
            *self.added_tokens,
            *(_special(token, self.vocab[token]) for token in specials if token not in ids),
        ]
        added.sort(key=lambda token: token.id)
        _check_ids(self.vocab, added)
        object.__setattr__(self, "added_tokens", tuple(added))
        try:
            _ = self.engine
        except Exception as err:  # the library raises plain Exception for merges outside the vocab
            raise UserError(f"tokenizer: vocabulary and merges do not fit ({err})") from err

    @functools.cached_property
    def engine(self) -> tokenizers.Tokenizer:
        """The tokenizer of the library ``tokenizers``."""
        engine = self._build(self.vocab)
        if any(engine.token_to_id(token.content) != token.id for token in self.added_tokens):
            # The library counts on from the vocabulary, whatever the files say.
            engine = self._build(self.ids)
        return engine

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of every token."""
        return {**self.vocab, **{token.content: token.id for token in self.added_tokens}}

    @functools.cached_property
    def vectors(self) -> dict[str, str]:
        """Tokens learned as several vectors, spelled out: ``<cat> <cat>_1 <cat>_2``."""
        names = {token.content for token in self.added_tokens}
        found = {}
        for name in sorted(names):
            rows = [name]
            while f"{name}_{len(rows)}" in names:
                rows.append(f"{name}_{len(rows)}")
            if len(rows) > 1:
                found[name] = " ".join(rows)
        return found

    @property
    def size(self) -> int:
        """One more than the largest id: how many rows a text encoder needs."""
        return max(self.ids.values()) + 1

    def with_tokens(self, tokens: Iterable[AddedToken]) -> "Tokenizer":
        """This tokenizer with more added tokens. UserError if an id or a name is taken."""
        known = {(token.content, token.id) for token in self.added_tokens}
        more = [token for token in tokens if (token.content, token.id) not in known]
        if not more:
            return self
        return dataclasses.replace(self, added_tokens=(*self.added_tokens, *more))

    def _build(self, vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer(
            models.BPE(
                vocab=dict(vocab),
                merges=list(self.merges),
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                unk_token=self.unk_token,
            )
        )
        engine.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        engine.decoder = decoders.ByteLevel()
        engine.add_tokens([tokenizers.AddedToken(**t.to_dict()) for t in self.added_tokens])
        engine.post_processor = processors.RobertaProcessing(
            (self.eos_token, self.ids[self.eos_token]),
            (self.bos_token, self.ids[self.bos_token]),
            trim_offsets=False,
            add_prefix_space=False,
        )
        return engine


def _special(content: str, number: int) -> AddedToken:
    return AddedToken(content=content, id=number, normalized=False, special=True)


def _check_ids(vocab: Mapping[str, int], added: Sequence[AddedToken]) -> None:
    """Every added token has one id, and an id of its own."""
    names = {number: token for token, number in vocab.items()}
    seen: set[str] = set()
    for token in added:
        other = names.setdefault(token.id, token.content)
        if other != token.content or vocab.get(token.content, token.id) != token.id:
            raise UserError(f"tokenizer: {token.content!r} has the id {token.id}, as {other!r} has")
        if token.content in seen:
            raise UserError(f"tokenizer: {token.content!r} is added twice")
        seen.add(token.content)


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[Int[np.ndarray, "b n"], list[str | None]]:
    """Token ids (int32), begun, ended and padded to ``model_max_length``, and what did not fit.

    A token of textual inversion that has several rows becomes all of them, as in diffusers'
    pipelines. The second list has, for each prompt, the end of it that was cut off, or None.
    """
    length = tokenizer.model_max_length
    ids = np.full((len(prompts), length), tokenizer.ids[tokenizer.pad_token], np.int32)
    cut: list[str | None] = []
    prompts = [_with_all_rows(tokenizer, prompt) for prompt in prompts]
    encodings = tokenizer.engine.encode_batch(prompts)
    for row, prompt, encoding in zip(ids, prompts, encodings, strict=True):
        found = encoding.ids
        if len(found) <= length:
            row[: len(found)] = found
            cut.append(None)
        else:
            row[:-1], row[-1] = found[: length - 1], found[-1]
            cut.append(prompt[encoding.offsets[length - 1][0] :].strip())
    return ids, cut


def _with_all_rows(tokenizer: Tokenizer, prompt: str) -> str:
    vectors = tokenizer.vectors
    for token in dict.fromkeys(tokenizer.engine.encode(prompt).tokens) if vectors else ():
        prompt = prompt.replace(token, vectors.get(token, token))
    return prompt


def read_tokenizer(
    folder: str | os.PathLike,
    longest: int = 77,
    rows: int | None = None,
    added: Iterable[AddedToken] = (),
) -> Tokenizer:
    """A tokenizer from ``vocab.json`` and ``merges.txt``, or from ``tokenizer.json``.

    ``longest`` is how many tokens the text encoder takes: what the files say is held to it.
    ``rows`` is how many there are that it knows. Added tokens are read from wherever transformers
    of any version keeps them; ``added`` are more of them. Raises UserError for other tokenizers,
    and where an id or a name is taken.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    with error_context(folder):
        try:
            if (folder / "vocab.json").exists():
                vocab = read_json(folder / "vocab.json")
                lines = read_text(folder / "merges.txt").splitlines()
                merges = [
                    line.split() for line in lines if line and not line.startswith("#version")
                ]
            elif (folder / "tokenizer.json").exists():
                model = read_json(folder / "tokenizer.json").get("model")
                if not isinstance(model, dict) or not {"vocab", "merges"} <= set(model):
                    raise UserError(f"{folder / 'tokenizer.json'}: holds no byte-pair vocabulary")
                vocab = dict(model["vocab"])
                merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            else:
                raise UserError(f"{folder}: no vocab.json with merges.txt and no tokenizer.json")
            known = {name: _plain(settings[name]) for name in _SPECIALS if name in settings}
            tokenizer = Tokenizer(
                vocab=vocab,
                merges=[(a, b) for a, b in merges],
                # No limit is written as infinity, or as a very large number.
                model_max_length=int(min(settings.get("model_max_length", longest), longest)),
                added_tokens=_read_added(folder, settings, vocab),
                **known,
            )
            tokenizer = tokenizer.with_tokens(added)
        except (TypeError, ValueError, AttributeError, OverflowError) as err:
            raise UserError(f"{folder}: not a CLIP tokenizer ({err})") from err
    if rows is not None and tokenizer.size > rows:
        raise UserError(
            f"{folder}: the tokenizer has more tokens ({tokenizer.size}) than the text encoder's "
            f"{rows}"
        )
    return tokenizer


def read_added_tokens(folder: str | os.PathLike) -> list[AddedToken]:
    """The tokens in a tokenizer's folder that were added to CLIP's own: no special ones."""
    tokenizer = read_tokenizer(folder)
    specials = {getattr(tokenizer, name) for name in _SPECIALS}
    return [token for token in tokenizer.added_tokens if token.content not in specials]


def _read_settings(folder: Path) -> dict:
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            said = read_json(folder / name)
            # The older file says more of a token than its name.
            kept = {key for key, value in settings.items() if _plain(value) == said.get(key)}
            settings |= {key: value for key, value in said.items() if key not in kept}
    return settings


def _read_added(folder: Path, settings: Mapping, vocab: Mapping[str, int]) -> list[AddedToken]:
    """Added tokens by what says the most of them, as transformers takes them."""
    others = [settings.get(f"{name}_special_tokens") for name in ("extra", "additional")]
    extra, additional = (other if isinstance(other, list) else [] for other in others)
    named = [settings[name] for name in _SPECIALS if name in settings]
    special = {_plain(token) for token in (*named, *extra)}  # not the older list, as transformers
    found: dict[str, AddedToken] = {}

    def add(token: AddedToken) -> None:
        found.setdefault(token.content, token)

    for number, said in settings.get("added_tokens_decoder", {}).items():
        add(AddedToken.from_dict(said, id=int(number)))
    if (folder / "tokenizer.json").exists():
        for said in read_json(folder / "tokenizer.json").get("added_tokens", []):
            add(AddedToken.from_dict(said))
    if (folder / "added_tokens.json").exists():
        for content, number in read_json(folder / "added_tokens.json").items():
            add(AddedToken.from_dict({}, content=content, id=number, special=content in special))
    for token in named:
        if isinstance(token, dict) and token.get("content") in vocab:
            add(AddedToken.from_dict(token, id=vocab[token["content"]], special=True))
    for token in (*extra, *additional):  # those that are nowhere else come last
        last = max([-1, *vocab.values(), *(token.id for token in found.values())])
        said = token if isinstance(token, dict) else {"content": token}
        number = vocab.get(said.get("content", ""), last + 1)
        add(AddedToken.from_dict(said, id=number, special=True))
    return list(found.values())


def _plain(token):
    return token.get("content") if isinstance(token, dict) else token


def write_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """The files that ``CLIPTokenizer.from_pretrained`` of any transformers version reads."""
    folder = Path(folder)
    specials = {name: getattr(tokenizer, name) for name in _SPECIALS}
    added = {
        token.content: token.id
        for token in tokenizer.added_tokens
        if token.content not in tokenizer.vocab
    }
    vocab = dict(tokenizer.vocab)
    if sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        vocab |= added  # or transformers would give them other ids
    said = {}
    if any(token != _special(token.content, token.id) for token in tokenizer.added_tokens):
        said["added_tokens_decoder"] = {str(t.id): t.to_dict() for t in tokenizer.added_tokens}
    with atomic_write(folder / "vocab.json") as temporary:
        temporary.write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    with atomic_write(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges)]
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(folder / "special_tokens_map.json", specials)
    if added:
        write_json(folder / "added_tokens.json", added)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokenizer.model_max_length,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **specials,
            **said,
        },
    )
