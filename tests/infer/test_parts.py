"""Adapter and encoder by path, by folder, and by a name on the Hub."""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from fact_infer.parts import (
    find_face_models,
    has_encoder,
    read_base,
    read_face_models,
    save_face_models,
)
from fact_jax.utils.errors import UserError


@pytest.fixture
def saved(files, tmp_path) -> Path:
    """Both in one folder, as they are published."""
    opened = read_face_models(files.adapter, files.encoder)
    save_face_models(opened, tmp_path / "saved", opened.metadata["config"])
    return tmp_path / "saved"


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> dict[str, list[str]]:
    """A Hub with the repository ``someone/face``; in its folder ``half`` the same once more."""
    remote, asked = tmp_path / "remote", {}
    shutil.copytree(saved, remote)
    shutil.copytree(saved, remote / "half")

    def fetch(repository, allow_patterns, ignore_patterns):
        if repository != "someone/face":
            raise OSError("404\nnot found")
        local = tmp_path / "cache"
        for path in remote.rglob("*"):
            name = path.relative_to(remote).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / name)
        asked[repository] = sorted(
            p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()
        )
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


def test_saved_folder_holds_the_same(files, saved):
    found = find_face_models(saved)
    assert found == (saved / "adapter.safetensors", saved / "encoder")
    assert find_face_models(files.adapter, files.encoder) == (files.adapter, files.encoder)
    assert find_face_models(saved, files.encoder) == (found[0], files.encoder)
    assert [has_encoder(path) for path in (saved, found[0], "someone/face")] == [True] * 3
    assert not has_encoder(shutil.copy(files.adapter, saved.parent))
    before, after = (read_face_models(*pair) for pair in ((files.adapter, files.encoder), found))
    assert after.metadata["config"] == before.metadata["config"]
    assert after.encoder_config == before.encoder_config
    for name in ("adapter_state", "encoder_state"):
        old, new = getattr(before, name), getattr(after, name)
        assert old.keys() == new.keys()
        for key in old:
            np.testing.assert_array_equal(np.asarray(new[key]), np.asarray(old[key]))


@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        (
            "someone/face",
            ["adapter.safetensors", "encoder/config.json", "encoder/model.safetensors"],
        ),
        (
            "someone/face/half",
            [f"half/{n}" for n in ("adapter.safetensors", "encoder/config.json")]
            + ["half/encoder/model.safetensors"],
        ),
    ],
)
def test_a_repository_gives_what_is_needed_and_no_more(hub, files, tmp_path, name, fetched):
    adapter, encoder = find_face_models(name)
    assert hub["someone/face"] == fetched
    read_face_models(adapter, encoder)
    shutil.rmtree(tmp_path / "cache")
    adapter, encoder = find_face_models(f"{name}/adapter.safetensors", f"{name}/encoder")
    assert hub["someone/face"] == fetched
    read_face_models(adapter, encoder)


def test_what_is_nowhere_is_said_in_one_line(hub, files, tmp_path):
    for name, error in {
        "someone/else": r"the Hub does not give it \(404\)",
        "someone/face/third": "the repository someone/face holds no third",
        str(tmp_path / "absent"): "no such file or folder$",
        "no such name": "no such file or folder$",
    }.items():
        with pytest.raises(UserError, match=error) as caught:
            find_face_models(name)
        assert "\n" not in str(caught.value)
    alone = shutil.copy(files.adapter, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"alone.safetensors: no encoder/model.safetensors beside"):
        find_face_models(alone)
    with pytest.raises(UserError, match=r"holds no adapter.safetensors"):
        find_face_models(tmp_path, files.encoder)


def test_the_weights_of_a_base_are_fetched_only_to_be_loaded(files, tmp_path, monkeypatch):
    def fetch(repository, allow_patterns, ignore_patterns):
        for path in files.base.rglob("*"):
            name = path.relative_to(files.base).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    base = read_base("someone/base")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(list(base.weights_folder().rglob("*.safetensors"))) == 3
