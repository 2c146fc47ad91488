"""Requests drawn in one batch, where that gives each the bits that it has alone.

A processor may add up in another order for another size of a batch, and the pictures then differ in
the last bit. Whether it does depends on backend, hardware and shapes. So the first batches of every
kind are drawn both ways: the pictures drawn alone are handed out, and requests of that kind are
merged from then on only if all bits were equal.
"""

from collections.abc import Hashable

import numpy as np

from fact_infer.pipeline import Pipeline
from fact_infer.service.jobs import Job, SharedProgress
from fact_infer.service.work import GenerateWork, Picture

TRIALS = 2
"""Batches of a kind that must be equal before it is trusted."""
_KINDS = 64


class Merger:
    """Chooses and draws what goes together, at most ``most`` requests, a power of two of them."""

    def __init__(self, most: int):
        self.most = most
        self._trials: dict[Hashable, int] = {}  # equal batches so far, or -1 for a different one

    def choose(self, queue: list[Job]) -> list[Job]:
        """The first job of a queue that is not empty, and those that go with it."""
        first = queue[0]
        key = first.work.merge_key if first.work else None
        if self.most < 2 or key is None:
            return [first]
        alike = [job for job in queue if job.work and job.work.merge_key == key]
        count = 1 << (min(len(alike), self.most).bit_length() - 1)
        while count > 1 and self._trials.get((key, count), 0) < 0:
            count //= 2
        return alike[:count]

    def draw(self, pipeline: Pipeline, jobs: list[Job]) -> list[Picture]:
        """A picture for each job, as it would be alone."""
        works = [job.work for job in jobs if isinstance(job.work, GenerateWork)]
        kind, bar = (works[0].merge_key, len(works)), SharedProgress(jobs)
        equal = self._trials.get(kind, 0)
        if equal < TRIALS:
            for job in jobs:
                job.progress.total *= 2
        images = self._together(pipeline, works, bar)
        if equal < TRIALS:
            alone = np.concatenate([self._together(pipeline, [work], bar) for work in works])
            if len(self._trials) >= _KINDS:
                self._trials.clear()
            self._trials[kind] = equal + 1 if np.array_equal(images, alone) else -1
            images = alone
        drawn = []
        for work, image in zip(works, images, strict=True):
            ((prompt, seed),) = work.request.pictures()
            (checked,) = work.check_safety(image[None])
            drawn.append(work.picture(pipeline, checked, prompt, seed))
        return drawn

    def _together(
        self, pipeline: Pipeline, works: list[GenerateWork], bar: SharedProgress
    ) -> np.ndarray:
        pictures = [work.request.pictures()[0] for work in works]
        crops = [work.crops for work in works if work.crops is not None]
        return pipeline.generate(
            [prompt for prompt, _ in pictures],
            [seed for _, seed in pictures],
            np.stack(crops) if crops else None,
            works[0].request,
            bar=bar,  # type: ignore[arg-type]
        )
