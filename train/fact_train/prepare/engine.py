"""Independent pieces of work, here one after the other or on any runner of Apache Beam.

A phase is a function of a name whose result is a file. Nothing but names and small counts passes
through Beam, so its memory does not grow with the photos, and a runner may do a piece twice.
"""

import dataclasses
import logging
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from fact_jax.face.images import one_line
from fact_jax.utils.errors import UserError

_FEW = 2
"""So many pieces are done here: to start processes would take longer."""
_LOOK_EVERY = 2.0
"""Seconds between two looks at how far a pipeline is."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """``workers`` processes of this machine, or what Beam's own ``options`` name."""

    workers: int = 1
    options: tuple[str, ...] = ()
    progress: bool = False

    def map(
        self,
        what: str,
        work: Callable[[str], dict[str, int]],
        names: Sequence[str],
        done: Callable[[], int],
    ) -> None:
        """``work`` on all names; ``done`` says how many of them are there, for the progress bar.

        Counts that ``work`` gives, as ``rejected``, are shown where it runs in this process.
        """
        disable = None if self.progress else True  # None: shown on a terminal only
        with tqdm(total=len(names), desc=what, disable=disable, file=sys.stderr) as bar:
            if (self.workers == 1 and not self.options) or len(names) <= _FEW:
                self._here(work, names, bar)
            else:
                self._on_beam(what, work, names, done, bar)

    def _here(self, work: Callable, names: Sequence[str], bar: Any) -> None:
        totals: dict[str, int] = {}
        for name in names:
            for key, count in work(name).items():
                totals[key] = totals.get(key, 0) + count
            if seconds := bar.format_dict["elapsed"]:
                rate = {"photos/s": f"{totals['in'] / seconds:.1f}"} if "in" in totals else {}
                bar.set_postfix({**totals, **rate}, refresh=False)
            bar.update()

    def _on_beam(
        self, what: str, work: Callable, names: Sequence[str], done: Callable, bar: Any
    ) -> None:
        logging.disable(logging.WARNING)  # of what Beam's extra for Google's cloud lacks
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
            from apache_beam.runners.portability.fn_api_runner import FnApiRunner
            from apache_beam.transforms.environments import SubprocessSDKEnvironment
        except ImportError as error:
            raise UserError(
                f"more than one process, and runners, need Apache Beam ({one_line(error)}): "
                "pip install 'fact-jax[beam]'"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
        local = ["--direct_num_workers", str(self.workers), "--default_sdk_harness_log_level=ERROR"]
        options = PipelineOptions([*local, *self.options])
        named = options.view_as(StandardOptions).runner
        here = named in (None, "DirectRunner", "FnApiRunner")
        processes = None
        if self.workers > 1:
            # What --direct_running_mode=multi_processing starts, but quiet.
            command = f"{shlex.quote(sys.executable)} -m fact_train.prepare.beam_worker"
            processes = SubprocessSDKEnvironment.from_command_string(command_string=command)
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(_LOOK_EVERY):
                bar.n = min(done(), len(names))
                bar.refresh()

        watcher = threading.Thread(target=look, daemon=True)
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
        watcher.start()
        try:
            # Named here: what Beam takes by default may want to download another runner.
            runner = FnApiRunner(processes) if here else None
            with beam.Pipeline(runner=runner, options=options) as pipeline:
                found = pipeline | beam.Create(list(names)) | beam.Reshuffle()
                _ = found | beam.Map(work)
        except UserError:
            raise
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise UserError(f"{what}: the pipeline stopped: {_cause(error)}") from error
        finally:
            stop.set()
            watcher.join()
        bar.n = len(names)


HERE = Engine()


def _cause(error: Exception) -> str:
    """What a worker said at last, of its whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "UserError: " in line]
    text = (told or lines or [type(error).__name__])[-1]
    return text.rpartition("UserError: ")[2].split(" [while running")[0]
