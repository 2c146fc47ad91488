"""The nodes: load an adapter, prepare faces, combine people, apply them to a model."""

import dataclasses
import importlib.util
import os
import uuid
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io

from .faces import detect_points, prepare_crop, read_points, to_bytes
from .models import (
    WEIGHTS,
    FaceEncoder,
    Resampler,
    combine_photos,
    null_tokens,
    read_adapter,
    read_encoder,
)
from .patches import (
    MAX_STRENGTH,
    Adapters,
    CopiedNorm,
    FacePatch,
    Middle,
    Person,
    Settings,
    parse_blocks,
    parse_schedule,
    unet_blocks,
)

FOLDER = "fact"
folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
FactModel, FactFaces = io.Custom("FACT_MODEL"), io.Custom("FACT_FACES")
_CATEGORY = "FACT"
_PACK = "buffalo_l"


@dataclasses.dataclass(frozen=True)
class Model:
    """An adapter and its encoder, each as ComfyUI's memory management moves it."""

    resampler: Resampler
    encoder: FaceEncoder
    adapters: Adapters
    faces: Any
    """The patcher of encoder and resampler; ``blocks`` is that of the adapters."""
    blocks: Any


class LoadFact(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [f for f in folder_paths.get_filename_list(FOLDER) if f.endswith(WEIGHTS)]
        return io.Schema(
            node_id="FactLoad",
            display_name="Load FACT adapter",
            category=_CATEGORY,
            description="An adapter and its face encoder from models/fact.",
            inputs=[
                io.Combo.Input(
                    "adapter", options=files, tooltip="adapter.safetensors, or the released .ckpt"
                ),
                io.Combo.Input(
                    "encoder",
                    options=files,
                    tooltip="encoder/model.safetensors with its config.json, or the released .pt",
                ),
            ],
            outputs=[FactModel.Output(display_name="fact")],
        )

    @classmethod
    def execute(cls, adapter: str, encoder: str) -> io.NodeOutput:
        paths = [folder_paths.get_full_path_or_raise(FOLDER, name) for name in (adapter, encoder)]
        ops = comfy.ops.manual_cast
        resampler, adapters = read_adapter(paths[0], ops)
        found = read_encoder(paths[1], ops)
        taken, given = resampler.proj_in.weight.shape[1], found.pos_embed.shape[2]
        if taken != given:
            raise ValueError(
                f"{adapter} was trained with another encoder: it takes tokens of width {taken}, "
                f"{encoder} gives {given}"
            )
        blocks = Adapters(adapters).to(_dtype())
        faces = _patcher(torch.nn.ModuleList([found, resampler]))
        return io.NodeOutput(Model(resampler, found, blocks, faces, _patcher(blocks)))


class PrepareFace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FactPrepareFace",
            display_name="FACT face",
            category=_CATEGORY,
            description="One person's face from a photo, or from several in a batch.",
            inputs=[
                FactModel.Input("fact"),
                io.Image.Input("image"),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    tooltip="[[x, y], ...] in pixels: left eye, right eye, nose tip, mouth "
                    "corners, as the viewer sees them; a list of such for a batch. "
                    "Empty: insightface.",
                ),
                io.Combo.Input("combine", options=["concat", "average", "normalized"]),
                io.Mask.Input("head_mask", optional=True, tooltip="white on the head"),
            ],
            outputs=[
                FactFaces.Output(display_name="faces"),
                io.Image.Output(display_name="crop"),
            ],
        )

    @classmethod
    def execute(
        cls, fact: Model, image: Any, points: str, combine: str, head_mask: Any = None
    ) -> io.NodeOutput:
        photos = [to_bytes(one.cpu()) for one in image]
        places = read_points(points, len(photos))
        if places is None:
            places = [detect_points(photo, _packs()) for photo in photos]
        masks = [None] * len(photos) if head_mask is None else list(head_mask.cpu().numpy())
        masks = masks * len(photos) if len(masks) == 1 else masks
        if len(masks) != len(photos):
            raise ValueError(f"{len(masks)} masks for {len(photos)} photos: give one for each")
        size = fact.encoder.crop_size
        crops = [
            prepare_crop(photo, place, size, mask)
            for photo, place, mask in zip(photos, places, masks, strict=True)
        ]
        stacked = torch.from_numpy(np.stack(crops)).float()
        comfy.model_management.load_models_gpu([fact.faces])
        device = fact.faces.load_device
        with torch.no_grad():
            pixels = stacked.permute(0, 3, 1, 2).to(device) / 127.5 - 1
            tokens = combine_photos(fact.resampler(fact.encoder(pixels)), combine)
            null = null_tokens(fact.resampler, fact.encoder, device)
        null = null.repeat(1, tokens.shape[1] // null.shape[1], 1)
        return io.NodeOutput([Person(tokens.cpu(), null.cpu())], stacked / 255.0)


class CombineFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs: list[Any] = []
        for name in ("first", "second"):
            inputs += [
                FactFaces.Input(name),
                io.Float.Input(
                    f"{name}_strength", default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05
                ),
            ]
        inputs += [
            io.Mask.Input(f"{name}_region", optional=True, tooltip="white where this person is")
            for name in ("first", "second")
        ]
        return io.Schema(
            node_id="FactCombineFaces",
            display_name="FACT people",
            category=_CATEGORY,
            description="Several people in one picture, each in a region; chain it for more.",
            inputs=inputs,
            outputs=[FactFaces.Output(display_name="faces")],
        )

    @classmethod
    def execute(
        cls,
        first: list[Person],
        first_strength: float,
        second: list[Person],
        second_strength: float,
        first_region: Any = None,
        second_region: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            [
                *_placed(first, first_strength, first_region),
                *_placed(second, second_strength, second_region),
            ]
        )


class ApplyFact(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def fraction(name: str, default: float, most: float = 1.0, **more: Any) -> Any:
            return io.Float.Input(name, default=default, min=0.0, max=most, step=0.05, **more)

        return io.Schema(
            node_id="FactApply",
            display_name="Apply FACT",
            category=_CATEGORY,
            description="A model that draws these faces.",
            inputs=[
                io.Model.Input("model"),
                FactModel.Input("fact"),
                FactFaces.Input("faces"),
                fraction("strength", 1.0, MAX_STRENGTH),
                fraction("start_at", 0.0, tooltip="share of the steps before the face acts"),
                fraction("end_at", 1.0, tooltip="share of the steps after which it is silent"),
                io.String.Input(
                    "schedule", default="", tooltip="factors over the steps, as 0.2, 1"
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    tooltip="PATTERN=FACTOR, by diffusers' paths, as up_blocks=0.5",
                ),
                fraction("cap", 0.0, 10.0, tooltip="most that is added, by its norm; 0: no cap"),
                io.Boolean.Input("adain", default=False, tooltip="keep more of the style"),
                io.Combo.Input(
                    "negative_face", options=["null", "same"], tooltip="what the negative sees"
                ),
            ],
            outputs=[io.Model.Output(display_name="patched")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        fact: Model,
        faces: list[Person],
        strength: float,
        start_at: float,
        end_at: float,
        schedule: str,
        block_strengths: str,
        cap: float,
        adain: bool,
        negative_face: str,
    ) -> io.NodeOutput:
        settings = Settings(
            strength=strength,
            start=start_at,
            stop=end_at,
            schedule=parse_schedule(schedule),
            blocks=parse_blocks(block_strengths, fact.adapters.paths),
            cap=cap or None,
            adain=adain,
            negative=negative_face,
        )
        places = unet_blocks(model.get_model_object("diffusion_model"))
        patch = FacePatch(fact.adapters, places, faces, settings)
        patched = model.clone()
        patched.set_model_patch(Middle(patch), "middle_patch")
        if any(adapter.ln is not None for adapter in fact.adapters.blocks):
            patched.set_model_attn2_patch(CopiedNorm(patch))
        # ComfyUI loads and frees the adapters with the model that they are in.
        patched.set_additional_models(f"fact-{uuid.uuid4()}", [fact.blocks.clone()])
        return io.NodeOutput(patched)


def _patcher(module: torch.nn.Module) -> Any:
    return comfy.model_patcher.ModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _dtype() -> torch.dtype:
    """What ComfyUI computes a UNet in here; the adapters follow it where a model has another."""
    dtype = comfy.model_management.unet_dtype()
    return dtype if dtype in (torch.float32, torch.bfloat16) else torch.float16


def _placed(people: list[Person], strength: float, region: Any) -> list[Person]:
    changed = []
    for person in people:
        where = person.region if region is None else region.cpu().numpy()[0]
        own = person.strength * strength
        changed.append(dataclasses.replace(person, region=where, strength=own))
    return changed


def _packs() -> list[str]:
    roots = [os.path.join(folder_paths.models_dir, "insightface"), "~/.insightface"]
    return [os.path.join(os.path.expanduser(root), "models", _PACK) for root in roots]


def _own_pipeline() -> list[type[io.ComfyNode]]:
    """The node that draws by FACT-JAX's own pipeline, where that is installed."""
    if importlib.util.find_spec("fact_infer") is None:
        return []
    from .generate import GenerateFact

    return [GenerateFact]


class FactExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadFact, PrepareFace, CombineFaces, ApplyFact, *_own_pipeline()]


async def comfy_entrypoint() -> FactExtension:
    return FactExtension()
