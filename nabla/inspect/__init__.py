"""What people look at: masks, what a model keeps and what that costs, the machine it runs on."""

from nabla.inspect.calibration import Calibration, Curves, calibrate
from nabla.inspect.density import DensityReport, density_report
from nabla.inspect.environment import environment
from nabla.inspect.picture import draw_mask
from nabla.inspect.recall import recall

__all__ = [
    "Calibration",
    "Curves",
    "DensityReport",
    "calibrate",
    "density_report",
    "draw_mask",
    "environment",
    "recall",
]
