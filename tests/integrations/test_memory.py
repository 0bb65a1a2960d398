"""How much resident memory grows while a packed checkpoint is loaded and laid out: mapped file pages count too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from small_models import save_random_model

SAMPLER = """
import json, sys, threading, time
import torch
import microscale
from microscale.integrations.loading import load_model
from microscale.nn.linear import QuantizedLinear

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def measure(path, dtype):
    before, peak, done = resident(), [0], threading.Event()
    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    model = load_model(path, dtype=dtype)
    loaded = max(peak[0], resident())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.set_layout("rows16")
    done.set()
    sampler.join()
    return loaded - before, max(peak[0], resident()) - before

torch.set_num_threads(1)
small, path, dtype = sys.argv[1:]
measure(small, None)  # whatever is imported or set up at the first use
print(json.dumps(measure(path, getattr(torch, dtype))))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    microscale.save(microscale.quantize(save_random_model(folder / "source"), "mxfp4"), folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 110 million parameters, the embedding and the head unquantized as usual."""
    folder = tmp_path_factory.mktemp("large")
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 7, "vocab_size": 2048}
    model = microscale.quantize(save_random_model(folder / "source", **shape), "mxfp4")
    for layout in ("microscale", "compressed-tensors"):
        microscale.save(model, folder / layout, layout=layout)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_loading_takes_little_more_than_the_file(small: Path, large: Path, layout: str, dtype: str) -> None:
    """Twice the file, as mapping and copying takes, cannot pass; float32 widens the head, which is in the bound."""
    path = large / layout
    result = subprocess.run(
        [sys.executable, "-c", SAMPLER, str(small), str(path), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    loaded, laid_out = json.loads(result.stdout)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    head = 2048 * 1024 * (torch.float32.itemsize - torch.bfloat16.itemsize) if dtype == "float32" else 0
    slack = 5_000_000
    assert loaded <= 1.05 * size + head + slack
    assert laid_out <= 1.15 * size + head + slack


ANALYZER = """
import sys
import torch
from typer.testing import CliRunner
from microscale.cli.app import app

def field(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def analyze(path):
    given = ["--calibration", text, "--samples", "2", "--window", "64", "-f", "mxfp4,nvfp4", "--json"]
    result = CliRunner().invoke(app, ["analyze", path, *given])
    assert result.exit_code == 0, result.output

torch.set_num_threads(1)
small, path, text = sys.argv[1:]
analyze(small)  # whatever is imported or set up at the first use
before = field("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
analyze(path)
print(field("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_analysis_never_has_the_whole_model(tmp_path: Path) -> None:
    """A model of 320 MB whose layers have 25 MB each, 50 MB in float32."""
    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "vocab_size": 2048,
    }
    path = save_random_model(tmp_path / "large", **shape)
    (tmp_path / "book.txt").write_text("The harbour was quiet, and the boats lay still. " * 40)
    paths = map(str, (save_random_model(tmp_path / "small"), path, tmp_path / "book.txt"))
    result = subprocess.run([sys.executable, "-c", ANALYZER, *paths], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 0.75 * (path / "model.safetensors").stat().st_size
