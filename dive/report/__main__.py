"""Write the pages of runs and sweeps again, or compare any runs: ``python -m dive.report DIR [DIR ...]``."""

import argparse
import sys
from pathlib import Path

from dive.errors import UserError
from dive.report.run import write_report
from dive.report.sweep import find_jobs, is_job, read_job, write_sweep


def main() -> None:
    """A run's directory gets report.html; a sweep's, or several of either, sweep.csv and sweep.html too."""
    parser = argparse.ArgumentParser(prog="python -m dive.report", description=main.__doc__)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="directory of a run or of a sweep")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where sweep.csv and sweep.html go; by default into the sweep's directory, or the current one for several",
    )
    arguments = parser.parse_args()
    directories: list[Path] = arguments.directories
    try:
        jobs = list(dict.fromkeys(job for directory in directories for job in find_jobs(directory)))
        for job in jobs:
            results = read_job(job).results
            if (results is not None and results.stages) or len(jobs) == 1:
                print(f"report   {write_report(job)}")
        alone = len(directories) == 1
        if not alone or not is_job(directories[0]):
            output: Path = arguments.output or (directories[0] if alone else Path())
            output.mkdir(parents=True, exist_ok=True)
            print(f"sweep    {write_sweep(jobs, output)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
