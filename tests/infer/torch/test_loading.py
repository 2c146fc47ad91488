"""FACT in the style of diffusers' IP-Adapter, and beside the features its users mix."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from fact_infer import load_fact, unload_fact, with_fact
from fact_infer.request import Photo
from fact_infer.torch.attention_processors import installed
from fact_infer.torch.loading import FactAdapter, block_factors
from fact_jax.utils.errors import UserError

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def stock(files):
    """What the pipes of this file are made of."""
    return StableDiffusionPipeline.from_pretrained(files.base, safety_checker=None)


@pytest.fixture
def pipe(stock, files):
    made = with_fact(StableDiffusionPipeline).from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    made.load_fact_adapter(files.adapter, image_encoder=files.encoder)
    yield made
    if installed(made.unet):
        made.unload_fact_adapter()


def draw(pipe, **more) -> np.ndarray:
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | more
    return pipe("a man", generator=torch.Generator().manual_seed(0), **settings).images


def test_the_call_is_that_of_load_fact(pipe, stock, files):
    """Photo, embeddings and the other interface give the same bits; no face: the base's."""
    by_photo = draw(pipe, fact_adapter_image=files.photo)
    embeds = pipe.prepare_fact_adapter_image_embeds(files.photo)
    by_embeds = draw(pipe, fact_adapter_image_embeds=embeds)
    np.testing.assert_array_equal(by_photo, by_embeds)
    plain = draw(pipe)
    pipe.set_fact_adapter_scale(0.5)
    half = draw(pipe, fact_adapter_image_embeds=embeds)
    pipe.unload_fact_adapter()
    np.testing.assert_array_equal(plain, draw(pipe))
    fact = load_fact(stock, files.adapter, files.encoder)
    with fact.face(fact.tokens(files.photo)):
        np.testing.assert_array_equal(by_photo, draw(stock))
    with fact.face(fact.tokens(files.photo), scale=0.5):
        np.testing.assert_array_equal(half, draw(stock))
    unload_fact(stock)
    assert np.abs(by_photo - plain).mean() > 0.01
    assert np.abs(by_photo - half).mean() > 0.001


def test_pictures_in_memory_with_their_points(pipe, files):
    """The same as the file with the points beside it."""
    points = json.loads(files.photo.with_suffix(".points.json").read_text())["points"]
    with Image.open(files.photo) as photo:
        found = pipe.prepare_fact_adapter_image_embeds([photo, photo], [points, points])
    twice = pipe.prepare_fact_adapter_image_embeds([files.photo, str(files.photo)])
    torch.testing.assert_close(found, twice, rtol=0, atol=0)
    by_file = draw(pipe, fact_adapter_image=files.photo)
    for pictures, own in ((photo, [points]), ([[photo]], [[points]])):
        by_picture = draw(pipe, fact_adapter_image=pictures, fact_adapter_points=own)
        np.testing.assert_array_equal(by_file, by_picture)
    with pytest.raises(UserError, match="2 people need as many lists of points"):
        pipe.encode_fact_adapter_images([[photo], [photo]], [[points]])
    with pytest.raises(UserError, match="but no face"):
        draw(pipe, fact_adapter_points=[points])


def test_folders_are_found_as_files_are(stock, files, tmp_path):
    """The encoder lies within the adapter's folder or beside it, also where no file is named."""
    (tmp_path / "adapter").mkdir()
    shutil.copy(files.adapter, tmp_path / "adapter")
    shutil.copytree(files.encoder, tmp_path / "encoder")
    for name, more in (
        (tmp_path / "adapter", {}),
        (tmp_path, {"subfolder": "adapter"}),
        (tmp_path, {"subfolder": "adapter", "weight_name": "adapter.safetensors"}),
    ):
        assert FactAdapter.from_pretrained(name, **more).files.encoder == tmp_path / "encoder"
    with pytest.raises(UserError, match="one face adapter"):
        FactAdapter.from_pretrained(tmp_path, weight_name=["adapter.safetensors"])
    for wrong in (stock, object):
        with pytest.raises(UserError, match="takes a pipeline class"):
            with_fact(wrong)


def test_unload_fact_is_seen(pipe, files):
    unload_fact(pipe)
    assert not pipe.has_fact_adapter()
    pipe.load_fact_adapter(files.adapter, image_encoder=files.encoder)
    assert pipe.has_fact_adapter()


def test_embeddings_saved_and_loaded(pipe, files, tmp_path):
    embeds = pipe.prepare_fact_adapter_image_embeds(Photo(path=files.photo))
    pipe.save_fact_adapter_image_embeds(embeds, tmp_path / "anna.safetensors")
    loaded = pipe.load_fact_adapter_image_embeds(tmp_path / "anna.safetensors")
    torch.testing.assert_close(loaded, embeds, rtol=0, atol=0)
    with torch.no_grad():
        pipe.unet._fact_adapter.resampler.norm_out.bias[0] += 1.0
    with pytest.raises(UserError, match="of another adapter"):
        pipe.load_fact_adapter_image_embeds(tmp_path / "anna.safetensors")
    with pytest.raises(UserError, match="one person are a tensor, got list"):
        pipe.save_fact_adapter_image_embeds([embeds], tmp_path / "list.safetensors")
    for wrong in (tmp_path / "none.safetensors", files.photo):
        with pytest.raises(UserError, match="no face tokens can be read"):
            pipe.load_fact_adapter_image_embeds(wrong)


def test_saved_as_the_base_and_as_a_folder_of_its_own(pipe, files, tmp_path):
    face = draw(pipe, fact_adapter_image=files.photo)
    pipe.save_fact_adapter(tmp_path / "hub" / "fact")
    pipe.save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    again = with_fact(StableDiffusionPipeline).from_pretrained(tmp_path / "base")
    again.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="no face adapter is loaded"):
        again.set_fact_adapter_scale(0.5)
    again.load_fact_adapter(tmp_path / "hub", subfolder="fact", weight_name="adapter.safetensors")
    np.testing.assert_array_equal(draw(again, fact_adapter_image=files.photo), face)


SD15 = [
    *(f"down_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in range(3) for j in range(2)),
    "mid_block.attentions.0.transformer_blocks.0",
    *(f"up_blocks.{i}.attentions.{j}.transformer_blocks.0" for i in (1, 2, 3) for j in range(3)),
]


def test_scales_by_block_are_those_of_ip_adapter(stock):
    """diffusers' own reading of the same dict, over the same UNet."""
    paths = ["down_blocks.0.attentions.0.transformer_blocks.0"]
    paths += [f"up_blocks.1.attentions.{i}.transformer_blocks.0" for i in range(2)]
    scale = {"down": {"block_0": 0.3}, "up": {"block_1": [0.0, 1.0]}}
    theirs = _maybe_expand_lora_scales(stock.unet, [scale], default_scale=0.0)[0]
    ours = block_factors(scale, paths)
    assert ours == {path: theirs[path.partition(".transformer_blocks")[0]] for path in paths}
    found = block_factors({"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": 0.2}, SD15)
    assert list(found.values()) == [0.0] * 5 + [1.0, 0.5] + [0.2] * 9


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({"left": 1.0}, "the parts of a UNet are down, mid, up"),
        ({"down": {"block_9": 1.0}}, "no such attention"),
        ({"down": {"first": 1.0}}, "they are as 'block_0'"),
        ({"down": {"block_0": {"block_0": 1.0}}}, "they are as 'block_0'"),
        ({"down": [1.0, 0.5]}, "a list is for the attentions of one block"),
        ({"down": {"block_2": [1.0]}}, "1 numbers, 2 attentions"),
        ({"mid": 7.0}, "must lie in 0..2"),
        ({"mid": "much"}, "must be a number"),
    ],
)
def test_wrong_scales_by_block(scale, words):
    with pytest.raises(UserError, match=words):
        block_factors(scale, SD15)


def test_scales_by_block_in_the_picture_and_on_the_way(pipe, files):
    embeds = pipe.prepare_fact_adapter_image_embeds(files.photo)
    pipe.set_fact_adapter_scale({"down": 1.0})
    by_block = draw(pipe, fact_adapter_image_embeds=embeds)
    pipe.set_fact_adapter_scale(1.0)
    patterns = {"block_scales": {"down": 1.0, ".": 0.0}}
    np.testing.assert_array_equal(
        by_block, draw(pipe, fact_adapter_image_embeds=embeds, fact_adapter_kwargs=patterns)
    )

    def from_now_on(pipe, step, t, values):
        pipe.set_fact_adapter_scale({"down": 1.0} if step else 0.0)
        return values

    changed = draw(pipe, fact_adapter_image_embeds=embeds, callback_on_step_end=from_now_on)
    pipe.set_fact_adapter_scale(1.0)
    window = {"stop": 0.5}
    first_step = draw(pipe, fact_adapter_image_embeds=embeds, fact_adapter_kwargs=window)
    np.testing.assert_array_equal(changed, first_step)


def test_people_with_masks(pipe, files):
    """In the call or where IP-Adapter has them."""
    left = np.zeros((32, 32), np.float32)
    left[:, :16] = 1.0
    two = {"fact_adapter_image": [[files.photo], [files.other_photo]]}
    masks = [Image.fromarray((255 * m).astype(np.uint8)) for m in (left, 1 - left)]
    one = draw(pipe, **two, fact_adapter_masks=masks)
    other = draw(pipe, **two, cross_attention_kwargs={"fact_adapter_masks": [left, 1 - left]})
    np.testing.assert_array_equal(one, other)
    processed = IPAdapterMaskProcessor().preprocess(masks, height=32, width=32)  # (2, 1, h, w)
    for same in (processed, [processed.reshape(1, 2, 32, 32)]):
        np.testing.assert_array_equal(one, draw(pipe, **two, fact_adapter_masks=same))
    with pytest.raises(UserError, match=r"a mask must be .*got \(32, 32, 3\)"):
        draw(pipe, **two, fact_adapter_masks=[np.ones((32, 32, 3)), left])
    swapped = draw(pipe, **two, fact_adapter_masks=masks[::-1])
    assert np.abs(one - swapped).mean() > 0.01


def test_what_does_not_go_together(pipe, files):
    embeds = pipe.prepare_fact_adapter_image_embeds(files.photo)
    picture = Image.new("RGB", (64, 64))
    for words, more in {
        "not both": {"fact_adapter_image": files.photo, "fact_adapter_image_embeds": embeds},
        "but no face": {"fact_adapter_masks": [np.ones((8, 8))]},
        "give regions": {"fact_adapter_image": [[files.photo], [files.photo]]},
        "are all files": {"fact_adapter_image": [files.photo, picture]},
    }.items():
        with pytest.raises(UserError, match=words):
            draw(pipe, **more)
    with pytest.raises(UserError, match="five \\[x, y\\]"):
        pipe.prepare_fact_adapter_image_embeds(picture, [[[1, 2]]])
    with pytest.raises(UserError, match="as many lists"):
        pipe.prepare_fact_adapter_image_embeds(picture, [])
    with pytest.raises(UserError, match="a file has them beside it"):
        pipe.prepare_fact_adapter_image_embeds(files.photo, [[]])
    with pytest.raises(UserError, match="must lie in"):
        pipe.set_fact_adapter_scale(9.0)


def ip_adapter(pipe) -> dict:
    """A random IP-Adapter that fits the UNet, as its file has it."""
    draw = torch.Generator().manual_seed(4)
    text, image = pipe.unet.config.cross_attention_dim, 12

    def rand(*shape):
        return torch.randn(shape, generator=draw)

    projection = {
        "proj.weight": rand(4 * text, image),
        "proj.bias": rand(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    layers, number = {}, 1
    for name, processor in pipe.unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            layers |= {f"{number}.to_{kind}_ip.weight": rand(width, text) for kind in "kv"}
            number += 2
        del processor
    return {"image_proj": projection, "ip_adapter": layers}


def lora(unet) -> dict[str, torch.Tensor]:
    """A random one for the text's queries, as diffusers has it."""
    draw, state = torch.Generator().manual_seed(5), {}
    for path, module in unet.named_modules():
        if path.endswith("attn2.to_q"):
            width = len(module.weight)
            state[f"unet.{path}.lora_A.weight"] = torch.randn(3, width, generator=draw)
            state[f"unet.{path}.lora_B.weight"] = torch.randn(width, 3, generator=draw)
    return state


def test_beside_ip_adapter_lora_controlnet_and_freeu(files, steered):
    """Each of them changes the picture with the face in it, and the face changes theirs."""
    pytest.importorskip("peft")
    _, controlnet, _ = steered
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=12,
    )
    torch.manual_seed(0)
    assert isinstance(controlnet, ControlNetModel)
    pipe = with_fact(StableDiffusionControlNetPipeline).from_pretrained(
        files.base,
        controlnet=controlnet,
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=8, crop_size=8),
        safety_checker=None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_fact_adapter(files.adapter, image_encoder=files.encoder)
    pipe.load_ip_adapter(ip_adapter(pipe), subfolder=None, weight_name=None)
    pipe.set_ip_adapter_scale(0.7)
    pipe.load_lora_weights(lora(pipe.unet))
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")

    def pictures(**more):
        settings = {"image": picture, "ip_adapter_image": picture, "height": 32, "width": 32}
        return draw(pipe, **(settings | more))

    embeds = pipe.prepare_fact_adapter_image_embeds(files.photo)
    together = pictures(fact_adapter_image_embeds=embeds)
    others = [pictures()]
    others.append(pictures(fact_adapter_image_embeds=embeds, controlnet_conditioning_scale=0.0))
    pipe.set_ip_adapter_scale(0.0)
    others.append(pictures(fact_adapter_image_embeds=embeds))
    pipe.set_ip_adapter_scale(0.7)
    pipe.disable_lora()
    others.append(pictures(fact_adapter_image_embeds=embeds))
    pipe.enable_lora()
    pipe.disable_freeu()
    others.append(pictures(fact_adapter_image_embeds=embeds))
    for other in others:
        assert np.abs(together - other).mean() > 1e-4
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    np.testing.assert_array_equal(together, pictures(fact_adapter_image_embeds=embeds))
    # The order of loading is the user's: first the others, then the face.
    pipe.unload_fact_adapter()
    pipe.load_fact_adapter(files.adapter, image_encoder=files.encoder)
    np.testing.assert_allclose(pictures(fact_adapter_image_embeds=embeds), together, atol=1e-5)
