"""The HTTP interface: what is asked for becomes jobs of the engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from fact_infer.service.engine import BusyError, DrainingError
from fact_infer.service.http import documentation
from fact_infer.service.http.bodies import LingeringClose, read_body
from fact_infer.service.http.guard import Guard
from fact_infer.service.jobs import FINISHED, Job
from fact_infer.service.operations import Service, png
from fact_jax.utils.errors import UserError, printable

_TICK = 0.05


def build_app(service: Service, *, token: str | None = None, loopback: bool = True) -> FastAPI:
    """The application, whose engine runs while it does."""
    engine = service.engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    app = FastAPI(
        title="FACT-JAX", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(Guard, token=token, loopback=loopback, metrics=engine.metrics)
    app.add_middleware(LingeringClose, limits=engine.limits)

    @app.exception_handler(UserError)
    async def bad_input(request: Request, error: UserError) -> Response:
        return JSONResponse({"detail": printable(str(error))}, 422)

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        line = f"{first['loc'][-1]}: {first['msg'][0].lower()}{first['msg'][1:]}"
        return JSONResponse({"detail": printable(line)}, 422)

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> Response:
        return JSONResponse({"detail": str(error)}, 429, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(DrainingError)
    async def draining(request: Request, error: DrainingError) -> Response:
        return JSONResponse({"detail": "the service is about to end"}, 503, {"Retry-After": "10"})

    def job_of(number: str) -> Job:
        job = engine.find(number)
        if job is None:
            raise HTTPException(404, "no such job: it never was, or its results have expired")
        return job

    async def finished(request: Request, job: Job, seconds: float, *, owned: bool) -> None:
        """Wait for a job; one that is ``owned`` ends with the connection of who asked for it."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while job.state not in FINISHED and loop.time() < until:
            if await request.is_disconnected():
                if owned:
                    engine.cancel(job)
                return
            await asyncio.sleep(_TICK)

    def answer(job: Job, status: int) -> Response:
        job.fetched = job.fetched or job.state in FINISHED
        place = {"Location": f"/v1/jobs/{job.id}"}
        return JSONResponse(engine.snapshot(job), status, place)

    async def draw(kind: str, request: Request, wait: float, preview: bool) -> Response:
        job = engine.reserve(kind, preview)
        try:
            given = await read_body(request, engine.limits)
        except BaseException:
            engine.drop(job)
            raise
        await asyncio.to_thread(service.submit, kind, job, given)
        if wait:
            await finished(request, job, wait, owned=True)
        if job.state == "done" and prefers_png(request.headers.get("accept", "")):
            job.fetched = True
            alone = job.pictures[0] if len(job.pictures) == 1 else job.sheet
            if alone is not None:
                return FileResponse(alone.path, media_type="image/png")
        return answer(job, 200 if job.state in FINISHED else 202)

    seconds = Query(0.0, ge=0.0, le=3600.0, description="seconds to wait for the pictures")
    showing = Query(False, description="keep a picture of what is there on the way")

    def add(kind: str) -> None:
        async def endpoint(
            request: Request, wait: float = seconds, preview: bool = showing
        ) -> Response:
            return await draw(kind, request, wait, preview)

        app.post(f"/v1/{kind}", **documentation.of_operation(service.operations[kind]))(endpoint)

    for kind in service.operations:
        if kind != "faces":
            add(kind)

    @app.post("/v1/faces", **documentation.of_faces(service.operations["faces"]))
    async def faces(request: Request) -> Response:
        job = engine.reserve("faces")
        try:
            given = await read_body(request, engine.limits)
            return JSONResponse(await asyncio.to_thread(service.faces, job, given))
        except UserError as error:
            raise UserError(job.plain(str(error))) from None
        finally:
            engine.drop(job)

    @app.get("/v1/jobs/{number}", **documentation.of_job("state, progress and pictures of a job"))
    async def look(number: str, request: Request, wait: float = seconds) -> Response:
        job = job_of(number)
        await finished(request, job, wait, owned=False)
        return answer(job, 200)

    @app.delete("/v1/jobs/{number}", **documentation.of_job("cancel a job, forget its pictures"))
    async def delete(number: str) -> Response:
        job = job_of(number)
        engine.cancel(job)
        if job.state in FINISHED:
            engine.drop(job)
        return JSONResponse(engine.snapshot(job))

    @app.get("/v1/jobs/{number}/pictures/{index}", **documentation.of_picture("a picture"))
    async def picture(number: str, index: int) -> Response:
        pictures = job_of(number).pictures
        if not 0 <= index < len(pictures):
            raise HTTPException(404, f"no picture {index}: there are {len(pictures)}")
        return FileResponse(pictures[index].path, media_type="image/png")

    @app.get("/v1/jobs/{number}/sheet", **documentation.of_picture("all pictures on one sheet"))
    async def sheet(number: str) -> Response:
        found = job_of(number).sheet
        if found is None:
            raise HTTPException(404, "no sheet: not asked for, or not there yet")
        return FileResponse(found.path, media_type="image/png")

    @app.get("/v1/jobs/{number}/preview", **documentation.of_picture("what is there so far"))
    async def preview(number: str) -> Response:
        pixels = job_of(number).preview
        if pixels is None:
            raise HTTPException(404, "no preview: not asked for, not there yet, or not any more")
        return Response(await asyncio.to_thread(png, pixels), media_type="image/png")

    @app.get("/healthz", summary="the process lives")
    async def alive() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="models are loaded and requests are taken")
    async def ready() -> Response:
        fine = engine.ready and not engine.draining
        state = "ready" if fine else "ending" if engine.draining else "loading"
        return JSONResponse({"status": state}, 200 if fine else 503)

    @app.get("/metrics", summary="counters for Prometheus", response_class=Response)
    async def metrics() -> Response:
        text = engine.metrics.text(engine.counts())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(documentation.page(app.openapi()))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    return app


def prefers_png(accept: str) -> bool:
    """Whether an Accept header prefers ``image/png`` to JSON, by RFC 9110, section 12.5.1.

    For each of the two its most exact range counts. Of equal weights the more exactly named wins,
    then the first; JSON where neither is wanted.
    """
    ranges, unwanted = [parse_options_header(text) for text in accept.split(",")], (0.0, 0, 0)

    def rank(kind: str) -> tuple[float, int, int]:
        for distance, name in enumerate((kind, f"{kind.partition('/')[0]}/*", "*/*")):
            for place, (found, options) in enumerate(ranges):
                if found == name.encode():
                    weight = _weight(options.get(b"q", b"1"))
                    return (weight, -distance, -place) if weight else unwanted
        return unwanted

    return rank("image/png") > rank("application/json")


def _weight(text: bytes) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0.0 <= weight <= 1.0 else 0.0
