"""The page of analyze: its cells, its pictures, and what a browser makes of it (marker `browser`)."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from microscale.report.analysis import Advice, AnalysisRow, HeatRow, analysis_html
from microscale.report.analysis_pictures import ChannelPicture, HistogramPicture

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.<b>odd</b>")
SHARES = (0.1, 0.2, 0.4, 0.2, 0.1)


def page(**changes: Any) -> str:
    rows = [
        AnalysisRow(
            name=name,
            side=side,
            role="mlp.down",
            numbers={"max": value * scale, "kurtosis": None if side == "inputs" else 3.0},
            qsnr={"mxfp4": 20.0 + value, "mxint8": float("inf")},
        )
        for name, value in zip(LAYERS, (2.0, 10.0, 1.0), strict=True)
        for side, scale in (("weights", 1.0), ("inputs", -100.0))
    ]
    heat = [
        HeatRow(name=name, errors={"mxfp4": error, "mxint8": 1e-4}, hints={"mxfp4": "QSNR: weight 20.0 dB"})
        for name, error in zip(LAYERS, (0.02, 0.04, 0.01), strict=True)
    ]
    given: dict[str, Any] = {
        "heat": heat,
        "facts": {"model": "tiny"},
        "curve": [("mxfp4", 4.25, 0.02), ("nvfp4", 4.5, 0.01), ("mxfp8", 8.25, 0.02), ("mxint8", 8.25, 1e-4)],
        "histograms": [HistogramPicture(title="mlp.down, inputs", shares=SHARES, format="e2m1/16:e8m0")],
        "grids": ["mxfp4", "mxfp6_e3m2", "mxint8"],
        "channels": [ChannelPicture(title="input", values=(1.0, 50.0, 0.0), num_channels=96, words="one stands out")],
        "advice": [Advice(title="mlp.down, inputs", format="mxfp4", parts="E2M1", reason="Because.")],
        "massive": [("inputs of x", "-655.6 at token 0 ('<s>')")],
    }
    return analysis_html("A <model>", rows, **(given | changes))


def test_cells_hold_the_numbers_and_their_order() -> None:
    text = page()
    assert "A &lt;model&gt;" in text and "<b>odd</b>" not in text and "(&#39;&lt;s&gt;&#39;)" in text
    assert '<td data-sort="-1000.0">-1000</td>' in text and '<td data-sort="22.0">22.0</td>' in text
    assert '<td data-sort="1e308">–</td>' in text and '<td data-sort="1e300">∞</td>' in text
    assert 'title="model.layers.0.mlp.up_proj, mxfp4: 2 %; QSNR: weight 20.0 dB"' in text
    shares = re.findall(r"--share: (\d+)%", text)
    assert max(shares, key=int) == "100" and shares.count("0") == 3  # all mxint8 are the least
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://""", text)


def test_nothing_to_show() -> None:
    text = page(heat=[], curve=[], histograms=[], grids=[], channels=[], advice=[], massive=[])
    assert "Bits against error" not in text and "Output error of" not in text and 'id="grid"' not in text


PROBE = """<script>{
const click = (table, column) => document.querySelectorAll(`table.${table} thead button`)[column].click();
const order = (table) => [...document.querySelectorAll(`table.${table} tbody tr`)].map((row) => row.cells[0].textContent);
const found = {};
found.count = document.getElementById("count").textContent;
click("heat", 1); found.heat = order("heat");
click("heat", 1); found.heatDown = order("heat");
click("all", 3); found.all = order("all");
click("all", 0); found.back = order("all");
const grid = document.getElementById("grid");
grid.value = "mxfp6_e3m2"; grid.dispatchEvent(new Event("change"));
found.ticks = [...document.querySelectorAll("[data-grid]")].filter((one) => one.style.display !== "none").map((one) => one.dataset.grid);
const side = document.getElementById("side");
side.value = "inputs"; side.dispatchEvent(new Event("change"));
document.getElementById("search").value = "up_proj"; document.getElementById("search").dispatchEvent(new Event("input"));
found.filtered = document.getElementById("count").textContent;
found.visible = [...document.querySelectorAll("table.all tbody tr")].filter((row) => row.offsetHeight > 0).length;
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
found.bars = [...document.querySelectorAll(".bar")].filter((bar) => bar.getBoundingClientRect().height > 1).length;
found.colours = new Set([...document.querySelectorAll("table.heat td[style]")].map((one) => getComputedStyle(one).backgroundColor)).size;
document.body.insertAdjacentHTML("beforeend", `<pre id="probe">${btoa(JSON.stringify(found))}</pre>`);
}</script>"""  # noqa: E501


def browse(folder: Path, file: Path, *options: str) -> str:
    """Open a page in headless Chromium; returns what it prints."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(BROWSERS)})")
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [binary, *fixed, "--virtual-time-budget=2000", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 500])
def test_scripts_run_in_a_browser(tmp_path: Path, width: int) -> None:
    file = tmp_path / "page.html"
    file.write_text(page().replace("</body>", f"{PROBE}</body>"), "utf-8")
    dom = browse(tmp_path, file, "--dump-dom", f"--window-size={width},3000")
    match = re.search(r'<pre id="probe">([\w+/=]+)</pre>', dom)
    assert match is not None, "a script failed"
    found = json.loads(base64.b64decode(match[1]))
    up, down, odd = LAYERS
    assert found["count"] == "6 of 6 tensors" and found["heat"] == [odd, up, down]
    assert found["heatDown"] == [down, up, odd]
    assert found["all"] == [down, up, odd, odd, up, down]  # -1000 -200 -100 1 2 10: by number, not by word
    assert found["back"] == [up, up, down, down, odd, odd]
    assert found["ticks"] == ["mxfp6_e3m2"]
    assert found["filtered"] == "1 of 6 tensors" and found["visible"] == 1
    assert found["wide"] is False, "the page itself scrolls sideways"
    assert found["bars"] == 5 + 2 and found["colours"] == 4


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_paints_the_page(tmp_path: Path, scheme: str) -> None:
    image = pytest.importorskip("PIL.Image")
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page(), "utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(tmp_path, file, f"--screenshot={picture}", "--window-size=1280,2600", *dark)
    with image.open(picture) as opened:
        pixels = opened.convert("RGB")
        colours = pixels.getcolors(1 << 24)
        corner = sum(pixels.getpixel((2, 2)))
    assert pixels.size == (1280, 2600) and colours is not None and len(colours) > 100
    assert corner > 600 if scheme == "light" else corner < 150
