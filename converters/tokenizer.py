"""CLIP's byte-pair tokenizer without transformers: the files it reads and the ids it gives."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from converters.readers import check_file, read_json
from converters.writers import write_json
from fact_jax.errors import UserError
from fact_jax.files import atomic_write

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Vocabulary and merges of a CLIP tokenizer, with its special tokens; ``tokenize`` uses it."""

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    model_max_length: int = 77
    bos_token: str = "<|startoftext|>"
    eos_token: str = "<|endoftext|>"
    pad_token: str = "<|endoftext|>"
    unk_token: str = "<|endoftext|>"

    def __post_init__(self):
        specials = (self.bos_token, self.eos_token, self.pad_token, self.unk_token)
        if absent := sorted({token for token in specials if token not in self.vocab}):
            raise UserError(f"tokenizer: the vocabulary lacks the special tokens {absent}")
        if not 2 < self.model_max_length < 2**16:
            raise UserError(f"tokenizer: model_max_length is {self.model_max_length}")
        try:
            engine = self._build(specials)
        except Exception as err:  # the library raises plain Exception for merges outside the vocab
            raise UserError(f"tokenizer: vocabulary and merges do not fit ({err})") from err
        object.__setattr__(self, "_engine", engine)

    def _build(self, specials: Sequence[str]) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer(
            models.BPE(
                vocab=dict(self.vocab),
                merges=[tuple(merge) for merge in self.merges],
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
        engine.post_processor = processors.RobertaProcessing(
            (self.eos_token, self.vocab[self.eos_token]),
            (self.bos_token, self.vocab[self.bos_token]),
            trim_offsets=False,
            add_prefix_space=False,
        )
        engine.add_special_tokens(sorted(set(specials)))
        return engine


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[Int[np.ndarray, "b n"], list[str | None]]:
    """Token ids (int32), begun, ended and padded to ``model_max_length``, and what did not fit.

    The second list has, for each prompt, the end of it that was cut off, or None.
    """
    length = tokenizer.model_max_length
    ids = np.full((len(prompts), length), tokenizer.vocab[tokenizer.pad_token], np.int32)
    cut: list[str | None] = []
    for row, prompt, encoding in zip(
        ids, prompts, tokenizer._engine.encode_batch(list(prompts)), strict=True
    ):
        found = encoding.ids
        if len(found) <= length:
            row[: len(found)] = found
            cut.append(None)
        else:
            row[:-1], row[-1] = found[: length - 1], found[-1]
            cut.append(prompt[encoding.offsets[length - 1][0] :].strip())
    return ids, cut


def read_tokenizer(folder: str | os.PathLike, longest: int = 77) -> Tokenizer:
    """A tokenizer from ``vocab.json`` and ``merges.txt``, or from ``tokenizer.json``.

    ``longest`` is how many tokens the text encoder takes: what the files say is held to it.
    """
    folder = Path(folder)
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    if (folder / "vocab.json").exists():
        vocab = read_json(folder / "vocab.json")
        check_file(folder / "merges.txt")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model")
        if not isinstance(model, dict) or not {"vocab", "merges"} <= set(model):
            raise UserError(f"{folder / 'tokenizer.json'}: holds no byte-pair vocabulary")
        vocab = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    else:
        raise UserError(f"{folder}: no vocab.json with merges.txt and no tokenizer.json")
    fields = {field.name for field in dataclasses.fields(Tokenizer)} - {"vocab", "merges"}
    known = {key: _plain(settings[key]) for key in fields & set(settings)}
    try:
        known["model_max_length"] = min(int(known.get("model_max_length", longest)), longest)
        return Tokenizer(vocab=vocab, merges=[(a, b) for a, b in merges], **known)
    except (TypeError, ValueError, AttributeError) as err:
        raise UserError(f"{folder}: not a CLIP tokenizer ({err})") from err


def _plain(token):
    return token.get("content") if isinstance(token, dict) else token


def write_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """The files that ``CLIPTokenizer.from_pretrained`` of any transformers version reads."""
    folder = Path(folder)
    specials = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    with atomic_write(folder / "vocab.json") as temporary:
        temporary.write_text(json.dumps(dict(tokenizer.vocab), ensure_ascii=False), "utf-8")
    with atomic_write(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in tokenizer.merges)]
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(folder / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": tokenizer.model_max_length,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            **specials,
        },
    )
