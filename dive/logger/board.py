"""What a TensorBoard of a run holds beside the curves: hyperparameters, tables as text, figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from dive.logger import keys
from dive.logger.tables import markdown, tables
from dive.results import Results, flatten


def finish(board: TensorBoardLogger, results: Results, directory: Path, settings: Mapping[str, Any]) -> None:
    """Settings with the summary beside them, tables and figures of a finished run.

    Args:
        directory: of the run's outputs, with ``plots/``.
    """
    from matplotlib.image import imread

    board.log_hyperparams(flatten(settings), keys.summary(results), step=results.tokens)
    writer = board.experiment
    for name, table in tables(results).items():
        writer.add_text(name, markdown(table), results.tokens)
    for file in sorted((directory / "plots").glob("*.png")):
        picture = imread(file)[..., :3]
        writer.add_image(f"figures/{file.stem}", picture, results.tokens, dataformats="HWC")
    board.finalize("success")
