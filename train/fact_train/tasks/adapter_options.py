"""Options of the adapter task."""

import dataclasses
from typing import Annotated, Literal

from fact_jax.curriculum import Drop, Stage
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.utils.ranges import (
    CheckedFields,
    CountOrZero,
    Length,
    Name,
    NonNegative,
    Positive,
    Probability,
)
from fact_train.data.portraits import Photos, people_of
from fact_train.tasks.identity_loss import IdentityOptions

MINI_RESAMPLER = ResamplerConfig.mini()
DEFAULT_DROP = Drop()
NO_IDENTITY_LOSS = IdentityOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(CheckedFields):
    """What is trained on what, and how.

    ``start`` is how the adapter begins as exactly nothing: ``zero_gates`` as released, or
    ``zero_projections``, whose gates stand at ``gate`` and whose two output projections are zero.
    ``region`` is where FAIR lets the adapter work; ``face_weight`` is that region's extra weight
    in the error, ``point_weight`` that of what lies near eyes, nose and the mouth's corners. With
    ``weights``, an adapter file, training goes on from its adapters and its resampler instead;
    blocks of the base that it has no adapter for start as said.

    ``pretrain_resampler`` is a number of steps, of 64 photos each, in which the resampler is
    trained alone before step 1, until its face tokens tell the encoder's embedding
    (``fact_train.tasks.adapter_init.pretrain_resampler``). A run that goes on does it again.

    ``form`` is FACT's, or for comparisons the parallel one, see
    ``fact_jax.models.adapter.FaceControls``, or ``coupled``: FACT's, and the base's text
    cross-attention learns with it. ``min_snr`` is the gamma of Min-SNR weighting
    (arXiv 2303.09556 takes 5; 0: every timestep weighs the same), ``noise_offset`` how much a
    picture's mean is noised beside its cells (0.05 is usual), ``generic_caption_probability`` how
    often ``generic_caption`` takes the place of a sample's own.

    Photos are drawn from the portrait world, ``people`` x ``photos`` of them, or come from the
    folder ``records`` and are encoded in every step, or from the folder ``cache``, which holds
    them encoded (``fact-train cache``). Drawn ones are kept encoded in the folder
    ``portrait_cache``, if there is one, for the next run; of these the share ``edited`` is noised
    and drawn again by the base, under the caption of another photo (after DreamIdentity's
    self-augmented pairs, arXiv 2307.00300). Sample pictures are of people of the portrait world, or
    of the records in the folder ``validation``. A ``judge``, a folder with the miniature's
    ``recogniser.safetensors``, says beside the face encoder whom they show; by ``best_by`` the best
    checkpoints are known.
    """

    base: Name = "miniature/base"
    encoder: Name = "miniature/encoder"
    resampler: ResamplerConfig = MINI_RESAMPLER
    pretrain_resampler: CountOrZero = 0
    people: Annotated[int, people_of("adapter")] = 2000
    photos: Photos = 4
    records: Name | None = None
    cache: Name | None = None
    portrait_cache: Name | None = None
    edited: Probability = 0.0
    validation: Name | None = None
    judge: Name | None = None
    best_by: Literal["similarity", "judge_target", "judge_over_wrong"] = "similarity"
    stages: Annotated[tuple[Stage, ...], Length(1)]
    drop: Drop = DEFAULT_DROP
    form: Literal["sequential", "parallel", "coupled"] = "sequential"
    start: Literal["zero_gates", "zero_projections"] = "zero_projections"
    gate: Positive = 1.0
    weights: Name | None = None
    region: Literal["head", "face"] = "head"
    face_weight: NonNegative = 0.0
    point_weight: NonNegative = 0.0
    min_snr: NonNegative = 0.0
    noise_offset: NonNegative = 0.0
    generic_caption_probability: Probability = 0.0
    generic_caption: Name = "a portrait of a person"
    identity: IdentityOptions = NO_IDENTITY_LOSS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_by != "similarity" and self.judge is None:
            raise ValueError(f"best_by={self.best_by} takes a judge: name its folder")
        for name, asked, taken in (
            ("identity.encoder", self.identity.encoder is not None, "points and masks"),
            ("point_weight", self.point_weight > 0, "points"),
            ("pretrain_resampler", self.pretrain_resampler > 0, "photos"),
        ):
            if asked and self.cache is not None:
                raise ValueError(
                    f"{name} takes the {taken} of records, which a cache does not hold: leave "
                    "cache away"
                )
        resampler = self.resampler
        if self.cache is not None and (resampler.embedding or resampler.encoder_blocks):
            raise ValueError(
                "a cache holds the tokens of the encoder's last block: leave it away where the "
                "resampler has encoder_blocks or embedding"
            )
        drawn = self.records is None and self.cache is None
        if not drawn and (self.edited or self.portrait_cache):
            raise ValueError(
                "edited and portrait_cache are of made-up portraits: leave them away with records "
                "or a cache. Edits of photos are records too: put them beside the person's photos"
            )
        if drawn and self.photos == 1 and any(max(stage.shuffle) for stage in self.stages):
            raise ValueError(
                "photos must be at least 2 where a stage shuffles: with 1 there is no other photo "
                "of the person"
            )
