"""ComfyUI's nodes, on a stub of ComfyUI, against our torch adapter on the same weights."""

import copy
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.models.adapter import read_adapter
from fact_infer.request import Photo
from fact_infer.torch.adapter import load_fact, unload_fact
from fact_infer.torch.pipeline import TorchPipeline
from fact_jax.face import prepare_photo
from fact_jax.fact import Guidance
from tests.infer.comfyui import stub
from tests.infer.conftest import POINTS

pytestmark = pytest.mark.heavy

STEPS, CELLS = 4, 16


@pytest.fixture(scope="module")
def torch_side(files):
    """Our torch adapter in a pipe, and a twin of its UNet that stays without."""
    pipe = TorchPipeline.load(files.base).pipe
    twin = UNet2DConditionModel.from_pretrained(files.base / "unet").eval()
    fact = load_fact(pipe, files.adapter, files.encoder)
    yield pipe, fact, stub.ComfyUNet(twin)
    unload_fact(pipe)


@pytest.fixture(scope="module")
def loaded(comfy):
    return comfy.nodes.LoadFact.execute("adapter.safetensors", "encoder/model.safetensors").args[0]


def picture(path) -> torch.Tensor:
    """As ComfyUI's LoadImage gives it."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")) / np.float32(255))[None]


def prepared(comfy, loaded, path, combine="concat"):
    text = json.dumps(POINTS)
    return comfy.nodes.PrepareFace.execute(loaded, picture(path), text, combine)


APPLY = {
    "strength": 1.0,
    "start_at": 0.0,
    "end_at": 1.0,
    "schedule": "",
    "block_strengths": "",
    "cap": 0.0,
    "adain": False,
    "negative_face": "null",
}


def applied(comfy, loaded, unet, faces, **more):
    model = stub.ModelPatcher(types.SimpleNamespace(diffusion_model=unet), "cpu", "cpu")
    return model, comfy.nodes.ApplyFact.execute(model, loaded, faces, **(APPLY | more)).args[0]


def noises(unet, patched, scheduler, inputs) -> list[torch.Tensor]:
    """What a sampler of ComfyUI gets in each step: negative and positive in one batch."""
    x, text = inputs
    sigmas = torch.cat([scheduler.timesteps.float() / 100, torch.zeros(1)])
    found = []
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        options = copy.deepcopy(patched.model_options["transformer_options"])
        options |= {"cond_or_uncond": [1, 0], "sample_sigmas": sigmas}
        options["sigmas"] = sigma.expand(1)
        with torch.inference_mode():
            found.append(unet.predict(torch.cat([x, x]), t, text, options))
    return found


@pytest.fixture(scope="module")
def inputs():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, CELLS, CELLS, generator=draw)
    return x, torch.randn(2, 7, 24, generator=draw)


@pytest.mark.parametrize(
    ("more", "guidance", "several"),
    [
        ({}, {}, False),
        ({"strength": 0.6, "schedule": "0.5, 1"}, {"face_scale": (0.3, 0.6)}, False),
        ({"start_at": 0.3, "end_at": 0.7}, {"start": 0.3, "stop": 0.7}, False),
        ({"block_strengths": "up_blocks=0.5, mid=0"}, {"block_scales": "given"}, False),
        ({"cap": 0.05, "negative_face": "same"}, {"cap": 0.05, "negative_face": "same"}, False),
        ({"adain": True}, {"adain": True}, True),
        ({}, {}, True),
    ],
    ids=["plain", "schedule", "window", "blocks", "cap", "adain", "people"],
)
def test_noise_of_our_torch_adapter(
    comfy, loaded, torch_side, files, inputs, more, guidance, several
):
    pipe, fact, unet = torch_side
    faces = prepared(comfy, loaded, files.photo).args[0]
    own, masks, scale = [fact.tokens(files.photo)], None, 1.0
    if several:
        left = np.zeros((40, 24), np.float32)
        left[:, :15] = 1.0
        right = np.zeros((40, 24), np.float32)
        right[5:33, 11:] = 1.0
        second = prepared(comfy, loaded, files.other_photo).args[0]
        places = [torch.from_numpy(mask)[None] for mask in (left, right)]
        faces = comfy.nodes.CombineFaces.execute(faces, 0.8, second, 0.5, *places).args[0]
        own.append(fact.tokens(files.other_photo))
        masks, scale = [left, right], [[0.8, 0.5]]
    if "block_scales" in guidance:
        guidance = {"block_scales": (("up_blocks", 0.5), ("mid", 0.0))}
    model, patched = applied(comfy, loaded, unet, faces, **more)
    assert model.model_options == {"transformer_options": {}}
    pipe.scheduler.set_timesteps(STEPS)
    ours = noises(unet, patched, pipe.scheduler, inputs)
    plain = noises(unet, model, pipe.scheduler, inputs)
    with fact.face(own, Guidance(text=3.0, **guidance), regions=masks, scale=scale):
        for i, t in enumerate(pipe.scheduler.timesteps):
            with torch.no_grad():
                x, text = inputs
                wanted = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample
            torch.testing.assert_close(ours[i], wanted, atol=2e-5, rtol=0)
            acts = guidance.get("start", 0.0) * STEPS <= i < guidance.get("stop", 1.0) * STEPS
            assert ((ours[i] - plain[i]).abs().max() > 0.01) == acts


def test_the_batch_is_read_from_the_call(comfy, loaded, torch_side, files, inputs):
    """Branches in any order, alone, and several pictures."""
    _, _, unet = torch_side
    faces = prepared(comfy, loaded, files.photo).args[0]
    _, patched = applied(comfy, loaded, unet, faces)
    x, text = inputs

    def predict(x, text, branches):
        options = copy.deepcopy(patched.model_options["transformer_options"])
        options |= {"cond_or_uncond": branches}
        with torch.inference_mode():
            return unet.predict(x, torch.tensor(500), text, options)

    negative, positive = predict(torch.cat([x, x]), text, [1, 0]).chunk(2)
    for rows, branches, wanted in (
        ([1, 0], [0, 1], [positive, negative]),
        ([1], [0], [positive]),
        ([0], [1], [negative]),
        ([0, 0, 1, 1], [1, 0], [negative, negative, positive, positive]),
    ):
        found = predict(x.expand(len(rows), -1, -1, -1), text[rows], branches)
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=0)


def test_a_copied_norm_wins(comfy, torch_side, files, inputs, tmp_path):
    """Released files may hold the blocks' ``norm2`` again, and it counts."""
    pipe, _, unet = torch_side
    adapter = read_adapter(files.adapter)
    state, draw = dict(adapter.state()), np.random.default_rng(0)
    for block, own in adapter.blocks.items():
        width = len(own["linear.bias"])
        for name in ("weight", "bias"):
            values = draw.normal(size=width).astype(np.float32)
            state[f"{block}.attn2.processor.ln.{name}"] = values
    about = {k: v if isinstance(v, str) else json.dumps(v) for k, v in adapter.metadata.items()}
    write_safetensors(tmp_path / "fact" / "copied.safetensors", state, about)
    resampler, blocks = comfy.models.read_adapter(str(tmp_path / "fact" / "copied.safetensors"))
    encoder = comfy.models.read_encoder(str(files.encoder / "model.safetensors"))
    patchers = [stub.ModelPatcher(m, torch.device("cpu"), "cpu") for m in (encoder, resampler)]
    copied = comfy.nodes.Model(resampler, encoder, comfy.patches.Adapters(blocks), *patchers)
    faces = prepared(comfy, copied, files.photo).args[0]
    _, patched = applied(comfy, copied, unet, faces, end_at=0.5)
    fact = load_fact(
        TorchPipeline.load(files.base).pipe, tmp_path / "fact" / "copied.safetensors", files.encoder
    )
    pipe.scheduler.set_timesteps(STEPS)
    fact.pipe.scheduler.set_timesteps(STEPS)
    found = noises(unet, patched, pipe.scheduler, inputs)
    x, text = inputs
    with fact.face(fact.tokens(files.photo), Guidance(text=3.0, stop=0.5)), torch.no_grad():
        for noise, t in zip(found, fact.pipe.scheduler.timesteps, strict=True):
            wanted = fact.pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample
            torch.testing.assert_close(noise, wanted, atol=1e-4, rtol=0)


def test_clones_share_the_weights_and_keep_their_own_faces(comfy, loaded, torch_side, files):
    _, _, unet = torch_side
    faces = prepared(comfy, loaded, files.photo).args[0]
    model, once = applied(comfy, loaded, unet, faces)
    twice = comfy.nodes.ApplyFact.execute(once, loaded, faces, **APPLY).args[0]

    def patches(of):
        return of.model_options["transformer_options"].get("patches", {}).get("middle_patch", [])

    assert [len(patches(of)) for of in (model, once, twice)] == [0, 1, 2]
    assert patches(twice)[0] is patches(once)[0]
    assert [len(of.additional_models) for of in (model, once, twice)] == [0, 1, 2]
    kept = [one for models in twice.additional_models.values() for one in models]
    assert all(one.model is loaded.adapters for one in kept)
    assert "attn2_patch" not in twice.model_options["transformer_options"]["patches"]
    assert loaded.faces in comfy.management.loaded


@pytest.mark.parametrize("combine", ["concat", "average", "normalized"])
def test_tokens_of_photos(comfy, loaded, torch_side, files, combine):
    _, fact, _ = torch_side
    both = torch.cat([picture(path) for path in (files.photo, files.other_photo)])
    output = comfy.nodes.PrepareFace.execute(loaded, both, json.dumps([POINTS] * 2), combine)
    (person,), crops = output.args
    wanted = fact.tokens(files.photo, files.other_photo, combine=combine)
    torch.testing.assert_close(person.tokens, wanted, atol=1e-5, rtol=0)
    photos = 2 if combine == "concat" else 1
    torch.testing.assert_close(person.null, fact.null_tokens(photos), atol=1e-5, rtol=0)
    for path, crop in zip((files.photo, files.other_photo), crops, strict=True):
        np.testing.assert_array_equal(crop * 255, prepare_photo(path, crop_size=32).crop)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("masked", [False, True], ids=["ellipse", "mask"])
def test_crops_are_those_of_training(comfy, tmp_path, large, masked):
    """To the bit; a mask that is made smaller with its photo may round one level away."""
    draw, factor = np.random.default_rng(2), 25 if large else 1
    small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
    photo = small.resize((64 * factor, 72 * factor), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.png")
    points = [[x * factor, y * factor] for x, y in POINTS]
    (tmp_path / "a.points.json").write_text(json.dumps({"points": points}))
    mask = np.linspace(0, 255, 64 * factor).astype(np.uint8)
    mask = np.broadcast_to(mask, (72 * factor, 64 * factor))
    Image.fromarray(mask).save(tmp_path / "m.png")
    given = {"mask_file": tmp_path / "m.png"} if masked else {}
    wanted = prepare_photo(tmp_path / "a.png", crop_size=112, **given).crop
    where = np.float32(mask) / 255 if masked else None
    crop = comfy.faces.prepare_crop(np.asarray(photo), np.float32(points), 112, where)
    away = np.abs(crop.astype(int) - wanted)
    assert away.max() <= (1 if masked and large else 0)
    assert away.mean() < 1e-3
    assert crop.std() > 20


def test_files_of_every_sort(comfy, files, tmp_path):
    """The released layout: a pickle of tensors, which does not tell its heads."""
    resampler, adapters = comfy.models.read_adapter(str(files.adapter))
    state = {f"local_fac_prj.{k}": v for k, v in resampler.state_dict().items()}
    for block, adapter in adapters.items():
        own = adapter.state_dict().items()
        state |= {f"{block}.attn2.processor.{k}": v for k, v in own}
    state["fact_jax.resampler.dim_head"] = torch.tensor(8)
    torch.save(state, tmp_path / "adapter.ckpt")
    again, twins = comfy.models.read_adapter(str(tmp_path / "adapter.ckpt"))
    assert again.heads == resampler.heads == 2
    assert list(twins) == list(adapters)
    for one, other in zip(
        again.state_dict().values(), resampler.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    for wrong, words in (
        ({"a.weight": torch.zeros(1)}, "is no FACT adapter: a.weight is unknown"),
        ({"local_fac_prj.a": torch.zeros(1)}, "is no FACT adapter: no local_fac_prj"),
        ({k: v for k, v in state.items() if "to_q" not in k}, "is no whole FACT adapter"),
    ):
        torch.save(wrong, tmp_path / "wrong.ckpt")
        with pytest.raises(ValueError, match=words):
            comfy.models.read_adapter(str(tmp_path / "wrong.ckpt"))
    with pytest.raises(ValueError, match="is no whole TransFace encoder"):
        comfy.models.read_encoder(str(files.adapter))

    class Code:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"a": Code()}, tmp_path / "code.ckpt")
    with pytest.raises(Exception, match="it is not opened"):
        comfy.models.read_adapter(str(tmp_path / "code.ckpt"))


def test_wrong_input_is_one_line(comfy, loaded, torch_side, files, monkeypatch, tmp_path):
    _, _, unet = torch_side
    nodes, faces = comfy.nodes, prepared(comfy, loaded, files.photo).args[0]
    photo, mirrored = picture(files.photo), [[-x + 64, y] for x, y in POINTS]
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, words in (
        ("", "no face points: write them into 'points'"),
        ("[[1, 2]]", "with five points: left eye"),
        ("{", "must be JSON"),
        (json.dumps([POINTS, POINTS]), "2 faces' points for 1 photos"),
        (json.dumps(mirrored), "mirrored or out of order"),
        (json.dumps([[x + 50, y] for x, y in POINTS]), "lie outside the photo, which is 64 x 72"),
    ):
        with pytest.raises(ValueError, match=words):
            nodes.PrepareFace.execute(loaded, photo, text, "concat")
    for masks, words in (
        (torch.ones(1, 5, 5), "the mask is"),
        (torch.ones(3, 72, 64), "3 masks"),
        (torch.zeros(1, 72, 64), "mask is black"),
    ):
        with pytest.raises(ValueError, match=words):
            nodes.PrepareFace.execute(loaded, photo, json.dumps(POINTS), "concat", masks)
    with pytest.raises(ValueError, match="average or normalized, not 'sum'"):
        nodes.PrepareFace.execute(loaded, photo, json.dumps(POINTS), "sum")
    people = nodes.CombineFaces.execute(faces, 1.0, faces, 1.0).args[0]
    for given, more, words in (
        (people, {}, "give each a region"),
        (faces, {"start_at": 0.9, "end_at": 0.1}, "0 <= start <= stop"),
        (faces, {"negative_face": "all"}, "null or same, not 'all'"),
        (faces, {"schedule": "a lot"}, "a schedule is as 0.2, 1"),
        (faces, {"schedule": "1, 5"}, "strengths lie in 0..2"),
        (faces, {"block_strengths": "up_blocks"}, "are as up_blocks=0.5"),
        (faces, {"block_strengths": "up_blocks=much"}, "are as up_blocks=0.5"),
        (faces, {"block_strengths": "left=1"}, "'left' is found in no block"),
    ):
        with pytest.raises(ValueError, match=words):
            applied(comfy, loaded, unet, given, **more)
    with pytest.raises(ValueError, match="no UNet of Stable Diffusion"):
        applied(comfy, loaded, torch.nn.Linear(1, 1), faces)
    other = UNet2DConditionModel.from_config(unet.unet.config | {"block_out_channels": (16, 32)})
    with pytest.raises(ValueError, match="is for another base"):
        applied(comfy, loaded, stub.ComfyUNet(other), faces)
    black, white = torch.zeros(1, 9, 9), torch.ones(1, 9, 9)
    nobody = nodes.CombineFaces.execute(faces, 1.0, faces, 1.0, white, black).args[0]
    for given, more, words in (
        (faces, {"end_at": 0.5}, "does not say its steps"),
        (nobody, {}, f"region 2 has no place .* of {CELLS} x {CELLS} cells"),
    ):
        _, patched = applied(comfy, loaded, unet, given, **more)
        with pytest.raises(ValueError, match=words):
            unet.predict(
                torch.zeros(1, 4, CELLS, CELLS),
                torch.tensor(1),
                torch.zeros(1, 7, 24),
                patched.model_options["transformer_options"],
            )


def test_files_that_are_no_models(comfy, files, tmp_path):
    """One sentence each, nothing is run, and nobody is told to switch a protection off."""

    class Runs:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torn = files.adapter.read_bytes()[:-100]
    for name, content in (
        ("text.ckpt", b"hello"),
        ("runs.ckpt", pickle.dumps(Runs())),
        ("empty.safetensors", b""),
        ("torn.safetensors", torn),
    ):
        (tmp_path / name).write_bytes(content)
        for read in (comfy.models.read_adapter, comfy.models.read_encoder):
            with pytest.raises(ValueError, match=rf"{name} is damaged, .* not opened") as raised:
                read(str(tmp_path / name))
            assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
    shutil.copy(files.encoder / "model.safetensors", tmp_path)
    config = json.loads((files.encoder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_heads": 3}))
    with pytest.raises(ValueError, match="3 heads, its tokens are 16 wide"):
        comfy.models.read_encoder(str(tmp_path / "model.safetensors"))
    adapter, encoder = comfy.nodes.LoadFact.define_schema().inputs
    assert "encoder/model.safetensors" in encoder.said["options"] == adapter.said["options"]
    assert "encoder/config.json" not in encoder.said["options"]


def test_a_detector_where_insightface_is(comfy, loaded, torch_side, files, monkeypatch, tmp_path):
    """Its largest face; packs are looked for where users of ComfyUI put them."""
    _, fact, _ = torch_side

    class Analysis:
        def __init__(self, name, **more):
            assert name.endswith("buffalo_l")
            assert more["allowed_modules"] == ["detection"]

        def prepare(self, ctx_id):
            assert ctx_id == -1

        def get(self, image):
            small = types.SimpleNamespace(kps=np.zeros((5, 2)), bbox=[0, 0, 9, 9])
            return [small, types.SimpleNamespace(kps=np.array(POINTS), bbox=[0, 0, 40, 40])]

    app = types.ModuleType("insightface.app")
    app.FaceAnalysis = Analysis
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    monkeypatch.setenv("HOME", str(tmp_path))
    pack = tmp_path / ".insightface" / "models" / "buffalo_l"
    pack.mkdir(parents=True)
    (pack / "det.onnx").write_bytes(b"")
    (person,), _ = comfy.nodes.PrepareFace.execute(loaded, picture(files.photo), " ", "concat").args
    wanted = fact.tokens(Photo(path=files.photo))
    torch.testing.assert_close(person.tokens, wanted, atol=1e-5, rtol=0)
