"""What the service counts, for Prometheus."""

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from fact_infer.service.jobs import Job

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one engine, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: Any = {"registry": self.registry}
        self.responses = Counter("fact_responses", "HTTP responses", ("path", "status"), **more)
        self.jobs = Counter("fact_jobs", "finished requests", ("kind", "state"), **more)
        self.refused = Counter("fact_refused", "requests that found the queue full", **more)
        self.pictures = Counter("fact_pictures", "pictures drawn", ("kind",), **more)
        self.seconds = Histogram(
            "fact_drawing_seconds", "time that a request was drawn", buckets=_SECONDS, **more
        )
        self.unfinished = Gauge("fact_unfinished", "requests now", ("state",), **more)

    def count(self, job: "Job") -> None:
        """A job that has finished."""
        self.jobs.labels(job.kind, job.state).inc()
        self.pictures.labels(job.kind).inc(len(job.pictures))
        if job.started:
            self.seconds.observe(job.finished - job.started)

    def text(self, counts: dict[str, int]) -> bytes:
        """All of them as Prometheus reads them, with how many requests there are now."""
        for state, count in counts.items():
            self.unfinished.labels(state).set(count)
        return generate_latest(self.registry)
