"""The safety checker of a base: said where it is left out, at work where it is asked for."""

import fnmatch
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from fact_infer.parts import read_base
from fact_infer.torch.safety_checker import SafetyChecker


@pytest.fixture(scope="module")
def checked(base_folder, tmp_path_factory):
    """The base with a small checker that marks everything, or nothing."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    folder = shutil.copytree(base_folder, tmp_path_factory.mktemp("checked") / "base")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))

    def marking(everything: bool):
        with torch.no_grad():
            # A cosine above its threshold marks a picture.
            checker.concept_embeds_weights.fill_(-2.0 if everything else 2.0)
            checker.special_care_embeds_weights.fill_(2.0)
        checker.save_pretrained(folder / "safety_checker")
        return folder

    return marking


def words(base, out, *options) -> list[str]:
    line = ["generate", "--base", base, "--prompt", "a woman", "--sampler", "ddim", "--steps", 1]
    return [str(word) for word in (*line, "--guidance", 1, "--backend", "torch", "--out", out)] + [
        *options
    ]


def drawn(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.heavy
def test_left_out_is_said_and_kept_on_request(checked, tmp_path, capsys):
    base = checked(True)
    assert main(words(base, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert f"note: the safety checker of {base} is left out (--safety-checker keeps it)" in err
    plain = drawn(out.strip())
    assert plain.any()
    assert main(words(base, tmp_path, "--safety-checker")) == 0
    out, err = capsys.readouterr()
    assert "warning: the safety checker marked 1 of 1 pictures: they are black" in err
    assert "left out" not in err
    assert not drawn(out.strip()).any()
    assert main(words(checked(False), tmp_path, "--safety-checker")) == 0
    out, err = capsys.readouterr()
    assert "marked" not in err
    np.testing.assert_array_equal(drawn(out.strip()), plain)


def test_the_checker_of_a_repository(checked, tmp_path, monkeypatch):
    """It is fetched where it is asked for, and nowhere else."""
    remote = checked(True)

    def fetch(repository, allow_patterns, ignore_patterns):
        for path in remote.rglob("*"):
            name = path.relative_to(remote).as_posix()
            wanted, not_wanted = (
                any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            if path.is_file() and wanted and not not_wanted:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    base = read_base("someone/base")
    base.weights_folder()
    assert not (tmp_path / "safety_checker").exists()
    pictures, marked = SafetyChecker(base)(np.full((2, 32, 32, 3), 255, np.uint8))
    assert marked.all()
    assert not pictures.any()


def test_a_base_without_one(base_folder, tmp_path, capsys):
    assert main(words(base_folder, tmp_path, "--safety-checker")) == 2
    assert "no safety_checker in" in capsys.readouterr().err.splitlines()[-1]
    assert main(words(base_folder, tmp_path)) == 0
    assert "safety" not in capsys.readouterr().err


def test_no_memory_is_one_line(base_folder, tmp_path, capsys, monkeypatch):
    def full(*files, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes\nand more")

    monkeypatch.setattr("fact_infer.cli.generate.load_pipeline", full)
    assert main(words(base_folder, tmp_path)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: not enough memory: draw fewer pictures at a time (--batch)")
