"""fact-infer as a person meets it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fact_infer.cli.main import main
from fact_infer.parts import read_face_models, save_face_models
from fact_jax.diffusion.samplers import SAMPLERS
from tests.infer.conftest import read_text

pytestmark = pytest.mark.heavy


@pytest.fixture
def arguments(files, tmp_path):
    """A whole command line for one small picture."""
    return [
        "generate",
        *("--base", str(files.base)),
        *("--adapter", str(files.adapter)),
        *("--encoder", str(files.encoder)),
        *("--photo", str(files.photo)),
        *("--prompt", "a smiling woman"),
        *("--sampler", "ddim"),
        *("--steps", "2"),
        *("--guidance", "3"),
        *("--out", str(tmp_path / "out")),
    ]


def replaced(arguments: list[str], option: str, value: str | None) -> list[str]:
    at = arguments.index(option)
    return arguments[:at] + ([] if value is None else [option, value]) + arguments[at + 2 :]


@pytest.mark.parametrize("command", ["", "generate", "face"])
def test_help_imports_nothing_slow(command):
    code = (
        "import sys; from fact_infer.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'torch', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    words = [command, "--help"] if command else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: fact-infer" in done.stdout
    if command == "generate":
        assert ", ".join(SAMPLERS) in " ".join(done.stdout.split())


@pytest.mark.parametrize("backend", ["flax", "torch"])
def test_generate(arguments, backend, files, tmp_path, capsys):
    words = " ".join(["smiling"] * 90)
    changed = replaced(arguments, "--prompt", words)
    options = ["--backend", backend, "--count", "2", "--seed", "5", "--face-scale", "0.5"]
    options += ["--block-scale", "up=0.5", "--image", str(files.photo), "--strength", "0.5"]
    mask = np.zeros((72, 64), np.uint8)
    mask[20:50, 10:41] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options += ["--image-mask", str(tmp_path / "mask.png")]
    assert main([*changed, *options, "--width", "64", "--height", "72"]) == 0
    out, err = capsys.readouterr()
    paths = [tmp_path / "out" / name.rsplit("/")[-1] for name in out.split()]
    assert [str(path) for path in paths] == out.split()
    assert len(paths) == 2
    cut = " ".join(["smiling"] * 15)
    assert f"warning: prompt longer than 77 tokens: cut '{cut}'" in err.splitlines()
    assert f"note: {files.photo}: head from an ellipse fitted to the points" in err.splitlines()
    with Image.open(paths[1]) as picture:
        assert picture.size == (64, 72)
        values, drawn = json.loads(picture.text["fact_jax"]), np.asarray(picture)
    assert (values["seed"], values["backend"], values["prompt"]) == (6, backend, words)
    assert values["face"]["face_scale"] == 0.5
    assert values["face"]["block_scales"] == [["up", 0.5]]
    with Image.open(files.photo) as photo:
        changed = (np.asarray(photo) != drawn).any(-1)
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.9
    assert (values["image"], values["image mask"]) == ("one.png", "mask.png")
    assert values["strength"] == 0.5
    assert read_text(paths[1])["source"] == "compositeWithTrainedAlgorithmicMedia"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in paths}


def test_base_alone(arguments, tmp_path, capsys):
    for option in ("--adapter", "--encoder", "--photo"):
        arguments = replaced(arguments, option, None)
    assert main([*arguments, "--backend", "torch"]) == 0
    (path,) = capsys.readouterr().out.split()
    with Image.open(path) as picture:
        assert "face" not in json.loads(picture.text["fact_jax"])


def test_an_adapter_with_its_own_encoder(arguments, files, tmp_path, capsys):
    opened = read_face_models(files.adapter, files.encoder)
    save_face_models(opened, tmp_path / "both", opened.metadata["config"])
    drawn = []
    for out, adapter in (("one", files.adapter), ("two", tmp_path / "both")):
        words = replaced([*arguments, "--backend", "torch"], "--adapter", str(adapter))
        words = replaced(words, "--out", str(tmp_path / out))
        assert main(words if out == "one" else replaced(words, "--encoder", None)) == 0
        (picture,) = (tmp_path / out).glob("*.png")
        drawn.append(np.asarray(Image.open(picture)))
    np.testing.assert_array_equal(*drawn)
    alone = shutil.copy(files.adapter, tmp_path / "alone.safetensors")
    words = replaced(replaced(arguments, "--adapter", str(alone)), "--encoder", None)
    capsys.readouterr()
    assert main(words) == 2
    assert "beside it: name the encoder too" in capsys.readouterr().err


def test_face_picture(files, tmp_path, capsys):
    out = tmp_path / "face.png"
    assert main(["face", str(files.photo), "--out", str(out), "--size", "48"]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    with Image.open(out) as picture:
        assert picture.size == (64 + 72, 72)
        assert len(np.unique(np.asarray(picture)[:, :64].reshape(-1, 3), axis=0)) > 100


def spoilt(tmp_path, files) -> dict[str, str]:
    """Bad files by what is wrong with them."""
    made = {name: tmp_path / name for name in ("text.png", "cut.png", "lonely.png")}
    made["text.png"].write_text("hello")
    photo = files.photo.read_bytes()
    made["cut.png"].write_bytes(photo[: len(photo) // 2])
    made["lonely.png"].write_bytes(photo)
    made["cut.safetensors"] = tmp_path / "cut.safetensors"
    adapter = files.adapter.read_bytes()
    made["cut.safetensors"].write_bytes(adapter[: len(adapter) // 2])
    return {name: str(path) for name, path in made.items()}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--photo", "/nowhere/a.png", "no such file: /nowhere/a.png"),
        ("--photo", "text.png", "is not an image that Pillow can read"),
        ("--photo", "cut.png", "is truncated or damaged"),
        ("--photo", "lonely.png", "points.json"),
        ("--photo", None, "whose face shall it be?"),
        ("--adapter", "/nowhere/a.safetensors", "/nowhere/a.safetensors: no such file"),
        ("--adapter", "cut.safetensors", "not a whole safetensors file"),
        ("--adapter", "ENCODER", "not a FACT adapter"),
        ("--adapter", "BASE", "holds no adapter.safetensors"),
        ("--adapter", None, "--encoder is for an adapter: give --adapter too"),
        ("--encoder", "ADAPTER", "not a TransFace model"),
        ("--base", "ADAPTER", "not a folder"),
        ("--base", "/nowhere/base", "no such folder"),
        ("--base", "EMPTY", "not a whole diffusers pipeline"),
        ("--sampler", "heun", "no sampler 'heun'; known are ddim"),
        ("--steps", "0", "steps must be at least 1"),
        ("--steps", "many", "argument --steps: invalid int value: 'many'"),
        ("--guidance", "0", "guidance must lie in 1..50"),
        ("--out", "FILE", "is not a folder"),
    ],
)
def test_bad_input_is_one_line(arguments, files, tmp_path, option, value, message, capsys):
    places = spoilt(tmp_path, files) | {
        "ENCODER": str(files.encoder / "model.safetensors"),
        "ADAPTER": str(files.adapter),
        "BASE": str(files.base),
        "EMPTY": str(tmp_path),
        "FILE": str(files.photo),
    }
    before = sorted(tmp_path.iterdir())
    assert status(replaced(arguments, option, places.get(value, value))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--face-start", "0.8", "--face-stop", "0.2"], "0 <= start <= stop <= 1"),
        (["--face-scale", "-1"], "face scale must lie in 0..2"),
        (["--face-scale", "0.2,3"], "face scale must lie in 0..2, got 3"),
        (["--face-scale", "1,"], "'1,' is not a number, or several: X,X"),
        (["--face-cap", "0"], "cap of the face's increment must be above 0"),
        (["--image-mask", "PHOTO"], "no image to draw over"),
        (
            ["--image-mask", "MASK", "--image", "PHOTO", "--width", "64", "--height", "72"],
            "mask.png is black: it must be white where",
        ),
        (["--control", "PHOTO"], "--control and --controlnet belong together"),
        (["--face-guidance", "2", "--negative-face", "same"], "give one of the two"),
        (["--strength", "2", "--image", "PHOTO", "--width", "64", "--height", "72"], "strength"),
        (["--block-scale", "up"], "'up': a name, = and a number are wanted"),
        (["--lora", "x=nan"], "'x=nan': a name, = and a number are wanted"),
        (["--block-scale", "top=1"], "'top': found in the path of no block: down_blocks.0"),
        (["--person", "1"], "photos must be of person 0, then 1 and so on"),
        (["--region", "PHOTO"], "has colours: a mask is grey"),
        (["--height", "20"], "height 20: with this base it must be a multiple of 8"),
        (["--points", "a", "--points", "b"], "--points was given 2 times for 1 photos"),
        (["--count", "0"], "--count must lie in 1..1,000,000, got 0"),
        (["--count", "1" + "0" * 30], "--count must lie in"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--best", "1", "--person", "1"], "the photos of one person, not of several"),
        (["--prompt", "a\udcff"], "is not valid text"),
        (["--region", "DARK"], "region 1 has no place in the picture"),
        (["--controlnet", "/nowhere/net", "--control", "DARK"], "/nowhere/net: no such folder"),
        (["--backend", "numpy"], "invalid choice: 'numpy'"),
    ],
)
def test_bad_options_are_one_line(arguments, files, options, message, capsys, tmp_path):
    Image.new("L", (64, 72)).save(tmp_path / "mask.png")
    Image.new("L", (32, 32)).save(tmp_path / "dark.png")
    places = {"PHOTO": str(files.photo), "MASK": str(tmp_path / "mask.png")}
    places["DARK"] = str(tmp_path / "dark.png")
    options = [places.get(option, option) for option in options]
    assert status(arguments + options) == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert message in err


def test_bases_that_cannot_be_used(arguments, files, tmp_path, capsys):
    """Made for inpainting; or whole to look at, but its weights are cut off."""
    base = shutil.copytree(files.base, tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    arguments = replaced(arguments, "--base", str(base))
    assert main(arguments) == 2
    assert "its UNet takes 9 channels, its latents have 4" in capsys.readouterr().err
    (base / "unet" / "config.json").write_text(json.dumps(config))
    (weights,) = (base / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    for backend in ("flax", "torch"):
        assert main([*arguments, "--backend", backend]) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"error: {base}")


def test_adapter_for_another_base(arguments, files, tmp_path, capsys):
    from fact_convert.io.weight_files import read_file
    from fact_convert.models.adapter import write_adapter

    state, about = read_file(files.adapter)
    kept = {k: np.array(v) for k, v in state.items() if not k.startswith("down_blocks.0.")}
    other = tmp_path / "other.safetensors"
    write_adapter(other, kept, json.loads(about["config"]))
    changed = replaced(arguments, "--adapter", str(other))
    for backend in ("flax", "torch"):
        assert status([*changed, "--backend", backend]) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
        assert "for another base model" in last


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stopped:  # argparse's way
        return stopped.code
