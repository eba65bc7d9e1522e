"""Hydra's callback of a sweep: after every job, what is there so far stands in ``sweep.csv`` and ``sweep.html``.

Hydra calls ``on_multirun_end`` only where no job failed, and ``on_job_end`` in the process of the job, wherever a launcher
put it. So each job's end writes the pages anew, one job at a time; the last one to end has all the others' results before it.
"""

import fcntl
import logging
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dive.errors import UserError

log = logging.getLogger("dive.report.sweep")


class SweepReport(Callback):
    """Keeps ``sweep.csv`` and ``sweep.html`` of a multirun up to date, and says why a job failed."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Record the failure of a job, and write the sweep's pages; outside a multirun do nothing."""
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        from dive.cli import describe
        from dive.report.sweep import FAILURE
        from dive.store import write_json

        directory = Path(config.hydra.runtime.output_dir)
        failure = directory / FAILURE
        failure.unlink(missing_ok=True)
        if job_return.status is JobStatus.FAILED:
            error = job_return._return_value  # the property raises it
            reason = describe(error)
            if not isinstance(error, UserError | HydraException | OmegaConfBaseException):
                reason = f"{type(error).__name__}: {reason}"
            log.warning("job %s failed: %s", config.hydra.job.num, reason)
            write_json(failure, {"reason": reason, "error": type(error).__name__})
        write_pages(sweep_directory(config))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say where the pages are."""
        directory = sweep_directory(config)
        write_pages(directory)
        log.info("sweep    %s", directory / "sweep.html")


def sweep_directory(config: DictConfig) -> Path:
    """Directory of all the jobs, absolute as a job may have changed the working directory."""
    return Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)


def write_pages(directory: Path) -> None:
    """Write the pages of a sweep; other jobs that end at the same moment wait for their turn."""
    from dive.report.sweep import find_jobs, write_sweep

    with (directory / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_sweep(find_jobs(directory), directory)
