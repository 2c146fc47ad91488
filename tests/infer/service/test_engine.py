"""The engine with a pipeline that draws at once: queue, order, cancelling, ending, merging."""

import gc
import threading
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fact_infer.service.engine import BusyError, DrainingError, Engine, Limits
from fact_jax.utils.errors import UserError
from tests.infer.service.stubs import StubPipeline, picture_of, work_of


@pytest.fixture
def stub():
    return StubPipeline()


@pytest.fixture
def engine(stub):
    with Engine(lambda: stub, Limits(queue=4, seconds=60.0)) as engine:
        yield engine


def submit(engine, prompt, seed=0, **more):
    job = engine.reserve("generate")
    engine.enqueue(job, work_of(prompt, seed, **more))
    return job


def test_pictures_are_those_of_the_request(engine):
    job = submit(engine, "a cat", 7, count=5)
    assert engine.wait(job, 20)
    said = engine.snapshot(job)
    assert said["state"] == "done"
    # Two batches of three calls.
    assert said["progress"] == {"step": 6, "steps": 6, "phase": "done"}
    for seed, picture in enumerate(job.pictures, start=7):
        np.testing.assert_array_equal(Image.open(picture.path), picture_of("a cat", seed))
        assert (picture.values["prompt"], picture.values["seed"]) == ("a cat", seed)


def test_one_too_many_is_busy_until_one_has_left(engine, stub):
    stub.gate.clear()
    jobs = [submit(engine, f"picture {i}") for i in range(4)]
    with pytest.raises(BusyError) as error:
        engine.reserve("generate")
    assert error.value.retry_after >= 1
    assert stub.began.wait(20)
    assert [engine.position(job) for job in jobs] == [None, 0, 1, 2]
    engine.cancel(jobs[2])
    assert jobs[2].state == "cancelled"
    last = submit(engine, "last")
    stub.gate.set()
    assert all(engine.wait(job, 20) for job in (*jobs, last))
    assert [job.state for job in (*jobs, last)] == ["done", "done", "cancelled", "done", "done"]
    assert not jobs[2].folder.exists()


def test_a_dropped_reservation_frees_its_place(engine):
    jobs = [engine.reserve("generate") for _ in range(4)]
    jobs[1].receive("photo", b"bytes")
    assert jobs[1].folder.exists()
    engine.drop(jobs[1])
    assert not jobs[1].folder.exists()
    assert engine.reserve("generate")


def test_cancelled_between_two_steps(engine, stub):
    stub.gate.clear()
    job = submit(engine, "a cat")
    assert stub.began.wait(20)
    engine.cancel(job)
    stub.gate.set()
    assert engine.wait(job, 20)
    assert (job.state, stub.calls) == ("cancelled", 1)
    assert engine.wait(submit(engine, "after it"), 20)


def test_errors_end_the_job_alone(engine, stub, capsys):
    def fail(*args, **options):
        raise ValueError("the device is gone")

    draw, stub.generate = stub.generate, fail
    job = submit(engine, "a cat")
    assert engine.wait(job, 20)
    # What went wrong inside is for the operator.
    assert (job.state, job.error) == ("failed", "it could not be drawn (ValueError)")
    assert "the device is gone" in capsys.readouterr().err
    stub.generate = draw
    job = submit(engine, "a dog")
    assert engine.wait(job, 20)
    assert job.state == "done"


def test_time_is_limited(stub):
    with Engine(lambda: stub, Limits(seconds=0.0)) as engine:
        job = submit(engine, "a cat")
        assert engine.wait(job, 20)
        assert (job.state, job.error) == (
            "failed",
            "it took longer than the 0 s that are allowed",
        )


def test_draining_finishes_what_is_drawn_and_refuses_the_rest(engine, stub):
    stub.gate.clear()
    running, waiting = submit(engine, "running"), submit(engine, "waiting")
    reserved = engine.reserve("generate")
    assert stub.began.wait(20)
    ending = threading.Thread(target=engine.drain)
    ending.start()
    assert engine.wait(waiting, 20)
    assert (waiting.state, running.state) == ("refused", "running")
    with pytest.raises(DrainingError):
        engine.reserve("generate")
    with pytest.raises(DrainingError):
        engine.enqueue(reserved, work_of("too late"))
    stub.gate.set()
    ending.join(20)
    assert (running.state, reserved.state) == ("done", "refused")
    assert len(running.pictures) == 1


def test_results_expire(stub):
    with Engine(lambda: stub, Limits(keep=0.0)) as engine:
        job = submit(engine, "a cat")
        assert engine.wait(job, 20)
        assert engine.find(job.id) is None
        assert not job.folder.exists()
    assert not engine.root.exists()


def test_a_pipeline_that_cannot_be_loaded():
    def load():
        raise UserError("no such folder")

    with Engine(load, Limits()) as engine:
        engine._thread.join(20)
        assert str(engine.failed) == "no such folder"
        assert not engine.ready


@pytest.mark.parametrize("rounding", [False, True])
def test_merged_only_where_no_bit_changes(rounding):
    stub = StubPipeline(rounding=rounding)
    stub.gate.clear()
    with Engine(lambda: stub, Limits(queue=16, merge=4)) as engine:
        first = submit(engine, "first")
        assert stub.began.wait(20)
        # A negative prompt of its own, and two pictures: neither goes with the others.
        others = [submit(engine, "other", negative="blurred"), submit(engine, "two", count=2)]
        jobs = [submit(engine, f"picture {i}", seed=i) for i in range(12)]
        stub.gate.set()
        assert all(engine.wait(job, 30) for job in (first, *others, *jobs))
    # Two batches of four are drawn both ways before the third is trusted; where a bit differs, four
    # and then two are tried once.
    trial = [1, 1, 1, 1]
    wanted = [4, *trial, 4, *trial, 4] if not rounding else [4, *trial, 2, 1, 1, *[1] * 6]
    assert stub.batches == [1, 1, 2, *wanted]


def test_merged_pictures_are_their_own(stub):
    stub.rounding = True
    stub.gate.clear()
    with Engine(lambda: stub, Limits(queue=16, merge=4)) as engine:
        jobs = [submit(engine, f"picture {i}", seed=i) for i in range(9)]
        engine.cancel(jobs[3])
        stub.gate.set()
        for i, job in enumerate(jobs):
            assert engine.wait(job, 30)
            if i == 3:
                assert job.state == "cancelled"
                continue
            np.testing.assert_array_equal(
                Image.open(job.pictures[0].path), picture_of(f"picture {i}", i)
            )


@pytest.mark.slow
def test_memory_over_a_thousand_requests(stub):
    with Engine(lambda: stub, Limits(kept=8)) as engine:

        def draw(count):
            for i in range(count):
                assert engine.wait(submit(engine, "a cat", i), 20)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = draw(50)
            after = draw(1000)
        finally:
            tracemalloc.stop()
        assert len(list(engine.root.iterdir())) <= 9
    assert after - before < 200_000
