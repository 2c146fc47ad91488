"""Stable Diffusion pipelines with random weights, made and saved by the real peers."""

from pathlib import Path


def small_parts(
    *, vocab_size: int, special: tuple[int, int], unet=None, vae=None, text=None
) -> dict:
    """UNet of two levels, VAE that halves once, text encoder 24 wide, by the names of a pipeline.

    ``special`` are the ids of the first and the last token; ``unet``, ``vae`` and ``text`` hold
    settings that differ from those here.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    first, last = special
    return {
        "unet": UNet2DConditionModel(
            **{
                "sample_size": 8,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "cross_attention_dim": 24,
                "attention_head_dim": 2,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                **(unet or {}),
            }
        ),
        "vae": AutoencoderKL(
            **{
                "block_out_channels": (8, 16),
                "norm_num_groups": 4,
                "sample_size": 16,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                **(vae or {}),
            }
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                **{
                    "vocab_size": vocab_size,
                    "hidden_size": 24,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 77,
                    "bos_token_id": first,
                    "eos_token_id": last,
                    "pad_token_id": last,
                    **(text or {}),
                }
            )
        ),
    }


def pndm_scheduler():
    """The scheduler that Stable Diffusion 1.5 comes with."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
    )


def save_pipeline(folder: Path, parts: dict, tokenizer, scheduler) -> Path:
    """Let diffusers write a Stable Diffusion pipeline of these parts; gives the folder."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
