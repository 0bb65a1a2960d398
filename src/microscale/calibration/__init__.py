"""Text in, statistics out: texts, token windows, statistics and ranges of layer inputs. Knows no algorithm."""

from microscale.calibration.cache import ActivationStore
from microscale.calibration.histogram import HistogramSketch
from microscale.calibration.observers import (
    MinMaxObserver,
    Observer,
    ObserverKind,
    ObserverSpec,
    make_observer,
    parse_observer,
)
from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.calibration.texts import pack_tokens, read_text_file, read_texts
from microscale.calibration.windows import DEFAULT_SAMPLES, DEFAULT_WINDOW, calibration_windows

__all__ = [
    "DEFAULT_SAMPLES",
    "DEFAULT_WINDOW",
    "ActivationStore",
    "HistogramSketch",
    "InputStatistics",
    "MinMaxObserver",
    "Observer",
    "ObserverKind",
    "ObserverSpec",
    "StatisticsCollector",
    "Wanted",
    "calibration_windows",
    "make_observer",
    "pack_tokens",
    "parse_observer",
    "read_text_file",
    "read_texts",
]
