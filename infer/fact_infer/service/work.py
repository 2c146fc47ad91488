"""What is drawn for one request, whoever asks: the command line, the API and the page alike."""

import abc
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from fact_infer.evaluation.ranking import IdentityRanking, best_first
from fact_infer.img2img import first_step
from fact_infer.output_images import (
    Source,
    parameters,
    picture_path,
    recorded,
    save_image,
    save_picture,
)
from fact_infer.pipeline import Pipeline, generate_batches
from fact_infer.request import GenerationParams, GenerationRequest
from fact_infer.templates import InpaintParams, InpaintRequest, inpaint_faces
from fact_jax.diffusion.samplers import num_model_calls
from fact_jax.utils.contact_sheet import contact_sheet

SafetyCheck = Callable[[UInt8[np.ndarray, "b h w 3"]], UInt8[np.ndarray, "b h w 3"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A finished picture and everything that its file will say.

    ``name`` is the file's, without its ending; None: made of prompt and seed.
    """

    image: UInt8[np.ndarray, "h w 3"]
    values: dict[str, Any]
    source: Source
    name: str | None = None
    profile: bytes | None = None

    def save(self, folder: str | os.PathLike, suffix: str) -> Path:
        """Write it to ``folder`` under a name that is free; gives its path."""
        if self.name is None:
            return save_picture(self.image, folder, self.values, suffix=suffix, source=self.source)
        path = picture_path(folder, self.name, suffix)
        return save_image(self.image, path, recorded(self.values), self.source, self.profile)


class Sheet(Picture):
    """All pictures of a request on one; its ``values`` are the prompts."""

    def save(self, folder: str | os.PathLike, suffix: str) -> Path:
        path = picture_path(folder, "sheet", suffix)
        prompts = {"prompts": "\n".join(self.values["prompts"])}
        return save_image(self.image, path, prompts, self.source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(abc.ABC):
    """A request that was checked, with its files read: ready for a pipeline.

    ``batch`` pictures are drawn at a time. ``check_safety`` sees each before anyone else does.
    """

    batch: int
    check_safety: SafetyCheck = lambda pictures: pictures

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Calls of the UNet in all, by which a bar moves."""

    @abc.abstractmethod
    def draw(self, pipeline: Pipeline, bar: tqdm | None = None) -> Iterator[Picture]:
        """The pictures, in their order; a sheet of them comes last."""

    @property
    def merge_key(self) -> Hashable | None:
        """Requests of equal keys could be drawn in one batch; None: this one with no other."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateWork(Work):
    """Every prompt with every seed. ``record`` is what ``parameters`` is told of the models.

    Of each prompt's pictures the ``best`` by ``ranking`` are kept, the best first. A ``sheet`` has
    a row for each prompt.
    """

    request: GenerationRequest
    crops: UInt8[np.ndarray, "p s s 3"] | None
    record: dict[str, str | None]
    ranking: IdentityRanking | None = None
    best: int | None = None
    sheet: bool = False

    @property
    def steps(self) -> int:
        request = self.request
        start = first_step(request.strength, request.steps) if request.image else 0
        batches = -(-len(request.pictures()) // self.batch)
        return batches * num_model_calls(request.sampler, request.steps, start)

    @property
    def merge_key(self) -> Hashable | None:
        request = self.request
        if len(request.pictures()) > 1 or request.regions or request.image or request.control:
            return None
        if self.sheet:
            return None
        return request.generation_params(), None if self.crops is None else self.crops.shape

    def draw(self, pipeline: Pipeline, bar: tqdm | None = None) -> Iterator[Picture]:
        drawn = []
        for picture in self._draw(pipeline, bar):
            yield picture
            if self.sheet:
                drawn.append(picture)
        if self.sheet:
            yield self._sheet(drawn)

    def _draw(self, pipeline: Pipeline, bar: tqdm | None) -> Iterator[Picture]:
        todo, group = iter(self.request.pictures()), []
        for pictures in generate_batches(
            pipeline, self.request, self.crops, batch=self.batch, bar=bar
        ):
            for image in self.check_safety(pictures):
                picture = self.picture(pipeline, image, *next(todo))
                if self.ranking is None:
                    yield picture
                    continue
                group.append(picture)
                if len(group) == len(self.request.seeds):
                    likeness = [picture.values["similarity"] for picture in group]
                    yield from [group[i] for i in best_first(likeness)[: self.best]]
                    group.clear()

    def picture(self, pipeline: Pipeline, image: np.ndarray, prompt: str, seed: int) -> Picture:
        """A drawn picture with its record."""
        values = parameters(self.request, prompt, seed, pipeline.base, **self.record)
        if self.ranking is not None:
            values["similarity"] = self.ranking.similarity(image)
        # Where a mask keeps pixels of a picture, a model has drawn a part only.
        source: Source = "trainedAlgorithmicMedia"
        if self.request.image_mask is not None:
            source = "compositeWithTrainedAlgorithmicMedia"
        return Picture(image=image, values=values, source=source)

    def _sheet(self, drawn: list[Picture]) -> Sheet:
        captions = []
        for picture in drawn:
            likeness = picture.values.get("similarity")
            seed = f"seed {picture.values['seed']}"
            captions.append(seed + ("" if likeness is None else f"  {likeness:.2f}"))
        images = np.stack([picture.image for picture in drawn])
        columns = self.best or len(self.request.seeds)
        image = contact_sheet(images, columns, gap=6, border=6, captions=captions)
        prompts = {"prompts": list(self.request.prompts)}
        return Sheet(image=image, values=prompts, source=drawn[0].source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RedrawWork(Work):
    """Faces of templates as other people; ``names`` and ``records`` are those of the pictures."""

    requests: Sequence[InpaintRequest]
    params: GenerationParams
    how: InpaintParams
    names: Sequence[str]
    records: Sequence[dict[str, Any]]

    @property
    def steps(self) -> int:
        targets = sum(len(request.targets) for request in self.requests)
        start = first_step(self.how.strength, self.params.steps)
        calls = num_model_calls(self.params.sampler, self.params.steps, start)
        return -(-targets // min(self.batch, targets)) * calls

    def draw(self, pipeline: Pipeline, bar: tqdm | None = None) -> Iterator[Picture]:
        pictures = inpaint_faces(
            pipeline, self.requests, self.params, self.how, batch=self.batch, bar=bar
        )
        for request, name, values, picture in zip(
            self.requests, self.names, self.records, pictures, strict=True
        ):
            (picture,) = self.check_safety(picture[None])
            yield Picture(
                image=picture,
                values=values,
                source="compositeWithTrainedAlgorithmicMedia",
                name=name,
                profile=request.template.profile,
            )
