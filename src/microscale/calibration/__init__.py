"""Text in, statistics out: token windows and one-pass statistics of layer inputs. Knows no algorithm."""

from microscale.calibration.histogram import HistogramSketch
from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.calibration.windows import DEFAULT_SAMPLES, DEFAULT_WINDOW, calibration_windows

__all__ = [
    "DEFAULT_SAMPLES",
    "DEFAULT_WINDOW",
    "HistogramSketch",
    "InputStatistics",
    "StatisticsCollector",
    "Wanted",
    "calibration_windows",
]
