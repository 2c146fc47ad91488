"""A pipeline that draws at once, and work for it: the engine without models."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np

from fact_infer.request import GenerationRequest
from fact_infer.service.work import GenerateWork

SIZE = 16


class StubPipeline:
    """Its pictures are a function of prompt and seed. ``gate`` holds each call; ``calls`` counts.

    With ``rounding`` a batch of several differs in one bit from pictures drawn alone.
    """

    def __init__(self, steps=3, rounding=False):
        self.steps, self.rounding = steps, rounding
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.calls, self.batches = 0, []
        self.parts = SimpleNamespace(check_photos=lambda count: None)
        self.base = StubBase()
        self.face = None

    def generate(self, prompts, seeds, crops, params, *, bar=None, **inputs):
        self.batches.append(len(prompts))
        pictures = np.stack([picture_of(p, s) for p, s in zip(prompts, seeds, strict=True)])
        for _ in range(self.steps):
            self.began.set()
            self.gate.wait(20)
            self.calls += 1
            if bar is not None:
                bar.update()
                if hasattr(bar, "show"):
                    bar.show(lambda: pictures)
        if self.rounding and len(prompts) > 1:
            pictures[0, 0, 0, 0] ^= 1
        return pictures


class StubBase:
    """Says what a base says of pictures' sizes."""

    name = "stub"

    def check(self, params):
        pass

    def picture_size(self, params):
        return SIZE, SIZE


def picture_of(prompt, seed):
    """What the stub draws."""
    draw = np.random.default_rng([seed, *prompt.encode()])
    return draw.integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def work_of(prompt, seed=0, count=1, **changes):
    request = GenerationRequest(prompts=(prompt,), seeds=range(seed, seed + count), steps=3)
    request = dataclasses.replace(request, sampler="ddim", **changes)
    return GenerateWork(batch=4, request=request, crops=None, record={"backend": "stub"})
