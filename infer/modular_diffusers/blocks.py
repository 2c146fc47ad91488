"""FACT as blocks of Modular Diffusers, for Stable Diffusion 1.5.

``ModularPipeline.from_pretrained`` of this folder with ``trust_remote_code=True`` opens it; the
package ``fact_infer`` must be installed. The blocks hand over embeddings and latents, so that each
can be replaced or run alone.
"""

from abc import abstractmethod
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import (
    ComponentSpec,
    InputParam,
    OutputParam,
)
from transformers import CLIPTextModel, CLIPTokenizer

from fact_infer.torch.loading import FactAdapter, FactAdapterMixin, with_fact

_PARTS = [
    ComponentSpec("unet", UNet2DConditionModel),
    ComponentSpec("vae", AutoencoderKL),
    ComponentSpec("text_encoder", CLIPTextModel),
    ComponentSpec("tokenizer", CLIPTokenizer),
    ComponentSpec("scheduler", DDIMScheduler),
    ComponentSpec("fact_adapter", FactAdapter),
]
_EMBEDS = "fact_adapter_image_embeds"


def _pipe(components: Any) -> FactAdapterMixin:
    """The components as a pipeline, with the adapter in the UNet."""
    missing = [spec.name for spec in _PARTS if getattr(components, spec.name) is None]
    if missing:
        raise ValueError(f"no {', '.join(missing)}: call load_components first")
    parts = {spec.name: getattr(components, spec.name) for spec in _PARTS[:-1]}
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = with_fact(StableDiffusionPipeline)(**parts, **more)
    pipe.set_progress_bar_config(disable=True)
    if pipe.has_fact_adapter() and not pipe.is_fact_adapter(components.fact_adapter):
        pipe.unload_fact_adapter()
    if not pipe.has_fact_adapter():
        pipe.load_fact_adapter(components.fact_adapter)
    return pipe


class _Step(ModularPipelineBlocks):
    """A block that changes its state by :meth:`run`."""

    model_name = "stable-diffusion"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return _PARTS

    @abstractmethod
    def run(self, pipe: Any, state: Any) -> None:
        """Read the block's inputs from ``state`` and set its outputs there."""

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block = self.get_block_state(state)
        self.run(_pipe(components), block)
        self.set_block_state(state, block)
        return components, state


class FactFaceStep(_Step):
    description = "Face tokens from one person's photos, or from each of several people's."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("fact_adapter_image", description="a photo, a list, or a list for a person"),
            InputParam("fact_adapter_points", description="five points of each photo in memory"),
            InputParam(_EMBEDS, description="face tokens that were computed before"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(_EMBEDS)]

    def run(self, pipe: Any, state: Any) -> None:
        photos, tokens = state.fact_adapter_image, getattr(state, _EMBEDS)
        if (photos is None) == (tokens is None):
            raise ValueError(f"give fact_adapter_image or {_EMBEDS}, one of the two")
        if tokens is None:
            tokens = pipe.encode_fact_adapter_images(photos, state.fact_adapter_points)
        setattr(state, _EMBEDS, tokens)


class FactTextStep(_Step):
    description = "Prompt and negative prompt to the text's states."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", required=True),
            InputParam("negative_prompt"),
            InputParam("num_images_per_prompt", default=1),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("prompt_embeds"), OutputParam("negative_prompt_embeds")]

    def run(self, pipe: Any, state: Any) -> None:
        state.prompt_embeds, state.negative_prompt_embeds = pipe.encode_prompt(
            state.prompt,
            pipe.device,
            state.num_images_per_prompt,
            True,
            negative_prompt=state.negative_prompt,
        )


class FactDenoiseStep(_Step):
    description = "Latents of pictures with the face, by the pipeline's scheduler."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt_embeds", required=True),
            InputParam("negative_prompt_embeds", required=True),
            InputParam(_EMBEDS, required=True),
            InputParam("fact_adapter_scale", default=1.0, description="a number, or by block"),
            InputParam("fact_adapter_masks", description="where each of several people is drawn"),
            InputParam("fact_adapter_kwargs", description="start, stop, schedule, cap, adain, ..."),
            InputParam("num_inference_steps", default=50),
            InputParam("guidance_scale", default=5.0),
            InputParam("height"),
            InputParam("width"),
            InputParam("generator"),
            InputParam("latents"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents")]

    def run(self, pipe: Any, state: Any) -> None:
        pipe.set_fact_adapter_scale(state.fact_adapter_scale)
        own = {"fact_adapter_scale", "inputs"}
        names = [param.name for param in self.inputs if param.name not in own]
        state.latents = pipe(
            **{name: getattr(state, name) for name in names}, output_type="latent"
        ).images


class FactDecodeStep(_Step):
    description = "Latents to pictures."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True), InputParam("output_type", default="pil")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images")]

    def run(self, pipe: Any, state: Any) -> None:
        pixels = pipe.vae.decode(state.latents / pipe.vae.config.scaling_factor).sample
        state.images = pipe.image_processor.postprocess(pixels, output_type=state.output_type)


class FactBlocks(SequentialPipelineBlocks):
    """A portrait, from photos and prompt to pictures."""

    model_name = "stable-diffusion"
    block_classes = [FactFaceStep, FactTextStep, FactDenoiseStep, FactDecodeStep]  # noqa: RUF012
    block_names = ["face", "text", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Portraits of a person from photos: FACT in Stable Diffusion 1.5."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("images")]
