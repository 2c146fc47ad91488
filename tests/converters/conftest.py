"""Tiny models saved by the real peers, built once."""

import json
from pathlib import Path

import numpy as np
import pytest

from fact_convert.cli.main import main
from tests.pipelines import pndm_scheduler, save_pipeline, small_parts

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def released_checkpoint() -> Path:
    """A pickled checkpoint in the released layout, with ``.processor.ln.*``."""
    return GOLDEN / "fact_release_layout.ckpt"


@pytest.fixture(scope="session")
def miniature() -> Path:
    """The models that ship with the project."""
    return Path(__file__).parents[2] / "miniature"


@pytest.fixture(scope="session")
def peers():
    """diffusers and transformers models with random weights: unet, vae, clip_text."""
    import torch

    torch.manual_seed(0)
    parts = small_parts(vocab_size=600, special=(0, 1))
    return {"unet": parts["unet"], "vae": parts["vae"], "clip_text": parts["text_encoder"]}


@pytest.fixture(scope="session")
def peer_state(peers):
    """A peer's state dict as numpy, and its configuration as a dict."""

    def get(kind: str) -> tuple[dict[str, np.ndarray], dict]:
        peer = peers[kind]
        config = peer.config.to_dict() if kind == "clip_text" else dict(peer.config)
        return {key: tensor.numpy().copy() for key, tensor in peer.state_dict().items()}, config

    return get


@pytest.fixture(scope="session")
def vocabulary():
    """A small byte-pair vocabulary with a few merges."""
    from tokenizers import pre_tokenizers

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    merges = [("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return vocab, merges


@pytest.fixture(scope="session")
def pipeline_folder(peers, vocabulary, tmp_path_factory) -> Path:
    """A pipeline folder that diffusers itself wrote."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary
    parts = {("text_encoder" if kind == "clip_text" else kind): m for kind, m in peers.items()}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    return save_pipeline(tmp_path_factory.mktemp("base"), parts, tokenizer, pndm_scheduler())


def run(*words, status: int = 0) -> None:
    """fact-convert in this process."""
    assert main(list(map(str, words))) == status


@pytest.fixture
def refused(capsys):
    """Run with bad input: exit status 2 and one line, which is given without its beginning."""

    def call(*words) -> str:
        capsys.readouterr()
        run(*words, status=2)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").removesuffix("\n")

    return call


@pytest.fixture
def same_bits():
    """Assert that two states hold the same keys, shapes, dtypes and bits."""

    def check(one: dict, other: dict) -> None:
        assert set(one) == set(other)
        for key, array in one.items():
            assert (array.dtype, array.shape) == (other[key].dtype, other[key].shape), key
            assert array.tobytes() == other[key].tobytes(), key

    return check


@pytest.fixture(scope="session")
def resampler_config(golden) -> dict:
    return json.loads(golden("resampler", "state.")[1]["config"])


@pytest.fixture(scope="session")
def unet_config(golden) -> dict:
    return json.loads(golden("unet_adapter", "unet.")[1]["unet_config"])
