"""clu's `MetricWriter` interface, without TensorFlow.

`import clu.metric_writers.interface` runs the package's `__init__`, which imports TensorFlow. The
interface itself does not need it, so its file is loaded under its own name, and a program that
does have TensorFlow still sees one and the same class.
"""

import importlib.util
import pathlib
import sys
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_NAME = "clu.metric_writers.interface"


def _load_interface() -> ModuleType:
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    package = importlib.util.find_spec("clu")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the package clu is not installed; run `pip install clu`")
    file = pathlib.Path(package.submodule_search_locations[0], "metric_writers", "interface.py")
    spec = importlib.util.spec_from_file_location(_NAME, file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"clu's metric writer interface is not at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    return module


if typing.TYPE_CHECKING:
    from clu.metric_writers.interface import MetricWriter
else:
    MetricWriter = _load_interface().MetricWriter


class VideoFreeWriter(MetricWriter):
    """A writer that refuses what it has no means for, and says what to write instead."""

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Not supported: the back end has no raw tensor summaries."""
        raise NotImplementedError("raw tensor summaries; write scalars, histograms or images")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Not supported: it would need moviepy."""
        raise NotImplementedError("videos; write their frames with write_images")
