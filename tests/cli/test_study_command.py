"""`microscale study` and `microscale tasks`, and the tasks of `microscale eval`, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import fail, microscale_command, succeed
from small_models import save_random_model
from task_data import write_task_data

TEXT = "The harbour was quiet. " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    save_random_model(root / "tiny")
    (root / "book.txt").write_text(TEXT)
    write_task_data(root / "tasks")
    return root


def write(folder: Path, name: str, methods: str = "[rtn]", tasks: str = "{text: book.txt, window: 32}") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"models: [tiny]\nformats: [mxfp8, mxfp4]\nmethods: {methods}\ntasks: [{tasks}]\n")
    return path


def test_a_whole_study(folder: Path) -> None:
    path = write(folder, "whole")
    found = succeed("study", path, "--json").json
    assert [(row["format"], row["method"], row["state"]) for row in found] == [
        ("none", "unquantized", "done"),
        ("mxfp8", "rtn", "done"),
        ("mxfp4", "rtn", "done"),
    ]
    assert [row["bits_per_weight"] for row in found] == [16.0, 8.25, 4.25]
    assert found[0]["recovery"] == pytest.approx(100) and all(row["peak_bytes"] > 0 for row in found)
    base = succeed("eval", folder / "tiny", "--text", folder / "book.txt", "--window", "32", "--json").json
    assert found[0]["tasks"]["book"]["value"] == pytest.approx(base["perplexity"])
    succeed("quantize", folder / "tiny", "-f", "mxfp4", "-a", "mxfp4", "--layout", "microscale", "-o", folder / "q")
    by_hand = succeed("eval", folder / "q", "--text", folder / "book.txt", "--window", "32", "--json").json
    assert found[2]["tasks"]["book"]["value"] == pytest.approx(by_hand["perplexity"], rel=1e-3)
    assert (folder / "whole.sqlite").is_file() and "mxfp4" in (folder / "whole.html").read_text()
    before = (folder / "whole.sqlite").read_bytes()
    assert succeed("study", path, "--json", "--report-only").json == found
    assert (folder / "whole.sqlite").read_bytes() == before
    assert "recovery" in succeed("study", path, "--report-only").stdout


def test_what_stays_online_counts(folder: Path) -> None:
    """The two factors of a low-rank path beside 4.25 bits: the study says what `quantize` does."""
    path = write(folder, "online", methods="['rtn+lowrank:rank=8']")
    path.write_text(path.read_text() + "calibration: {text: book.txt, samples: 2, window: 32}\n")
    rows = {row["format"]: row["bits_per_weight"] for row in succeed("study", path, "--json").json}
    made = succeed(
        *("quantize", folder / "tiny", "-f", "mxfp4", "-a", "mxfp4", "--method", "rtn+lowrank:rank=8"),
        *("--calibration", folder / "book.txt", "--samples", "2", "--window", "32", "-o", folder / "online"),
        "--json",
    ).json
    assert rows["mxfp4"] == pytest.approx(made["bits_per_weight"]) and made["bits_per_weight"] > 5


def test_failures_selection_and_import(folder: Path) -> None:
    path = write(folder, "parts", methods="[rtn, gptq]")  # gptq lacks its calibration text
    done = microscale_command("study", str(path), "--only", "mxfp4", "--results", str(folder / "one.sqlite"))
    assert done.code == 1 and "failed: tiny mxfp4 gptq" in " ".join(done.stdout.split())
    answer = succeed("study", path, "--only", "none", "--import", folder / "one.sqlite", "--html", folder / "p.html")
    assert "1 run taken" in answer.stdout and (folder / "p.html").is_file()
    found = succeed("study", path, "--report-only", "--json").json
    assert [(row["format"], row["state"]) for row in found] == [("none", "done"), ("mxfp4", "done")]
    assert found[1]["recovery"] is not None


def test_attention_in_a_study(folder: Path) -> None:
    """Formats with roundings of attention are runs of their own, scored with them, and said to be simulated."""
    path = folder / "attention.yaml"
    full = "{name: full, weights: mxfp4, attention: mxfp4}"
    formats = f"[mxfp4, {{weights: mxfp4, attention: mxfp4, kv_cache: mxfp8}}, {full}]"
    path.write_text(f"models: [tiny]\nformats: {formats}\ntasks: [{{text: book.txt, window: 32}}]\n")
    rows = {row["format"]: row for row in succeed("study", path, "--json").json if row["method"] == "rtn"}
    assert list(rows) == ["mxfp4", "mxfp4, attention mxfp4, kv_cache mxfp8", "full"]
    scores = [row["tasks"]["book"]["value"] for row in rows.values()]
    assert len(set(scores)) == 3
    made = folder / "with_attention"
    succeed("quantize", folder / "tiny", "-f", "mxfp4", "-a", "mxfp4", "--attention", "mxfp4", "-o", made)
    by_hand = succeed("eval", made, "--text", folder / "book.txt", "--window", "32", "--json").json
    assert rows["full"]["tasks"]["book"]["value"] == pytest.approx(by_hand["perplexity"], rel=1e-3)
    assert rows["mxfp4"]["message"] == "" and "simulated" in rows["full"]["message"]
    assert f"note: tiny full rtn: {rows['full']['message']}" in succeed("study", path, "--report-only").stdout
    assert [row["gap_closure"] for row in rows.values()] == [pytest.approx(0.0)] * 3, "each beside its own RTN"
    page = path.with_suffix(".html").read_text()
    assert "<h2>Notes</h2>" in page and "<h2>Runs that failed</h2>" not in page
    path.write_text(path.read_text().replace("kv_cache: mxfp8", "kv_cache: mxfp9"))
    assert "mxfp9" in fail("study", path)


def test_wrong_studies(folder: Path) -> None:
    assert "cannot be read" in fail("study", folder / "absent.yaml")
    assert "does not exist" in fail("study", write(folder, "w1", tasks="{text: absent.txt}"))
    assert "unknown task" in fail("study", write(folder, "w2", tasks="{task: absent}"))
    assert "runs code" in fail("study", write(folder, "w3", tasks="{task: humaneval}"))
    assert "no run matches" in fail("study", write(folder, "w4"), "--only", "zzz")
    assert "gptqq" in fail("study", write(folder, "w5", methods="[rtn, gptqq]"))
    assert "is not a file" in fail("study", write(folder, "w5"), "--import", folder / "absent.sqlite")
    for task, least in (("tokens: -3", 1), ("window: 1", 2), ("tokens: 0", 1)):
        name, _, value = task.partition(": ")
        said = fail("study", write(folder, "w6", tasks=f"{{text: book.txt, {task}}}"))
        assert f"tasks.0.{name}: must be {least} or more, got {value} (int)" in said
    path = write(folder, "w7")
    path.write_text(path.read_text() + "task_data: absent\n")
    assert "is no folder" in fail("study", path)
    path.write_text(path.read_text().replace("task_data: absent", "batch: 0"))
    assert "batch" in fail("study", path)


def test_a_report_needs_results(folder: Path, tmp_path: Path) -> None:
    path = write(folder, "nothing")
    for options in ((), ("--results", tmp_path / "empty.sqlite")):
        message = fail("study", path, "--report-only", *options)
        assert "has no result of this study" in message and f"run `microscale study {path}` first" in message
    assert not path.with_suffix(".html").exists() and not path.with_suffix(".sqlite").exists()
    assert list(tmp_path.iterdir()) == []
    whole = write(folder, "other_study", tasks="{text: book.txt, window: 16}")
    succeed("study", whole, "--only", "none")
    path.write_text(path.read_text().replace("tiny", "{name: other, path: tiny}"))
    results = ("--results", whole.with_suffix(".sqlite"))
    assert "has no result of this study" in fail("study", path, "--report-only", *results)  # but of another
    assert not path.with_suffix(".html").exists()
    assert len(succeed("study", whole, "--report-only", "--json").json) == 1


def test_tasks_of_eval(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    options = ("--tasks", "piqa,blimp", "--task-data", folder / "tasks")
    found = succeed("eval", folder / "tiny", *options, "--json").json
    assert [one["task"] for one in found["tasks"] if one["is_main"]] == ["piqa", "blimp"] and "perplexity" not in found
    both = succeed("eval", folder / "tiny", *options, "--text", folder / "book.txt", "--window", "32", "--json").json
    assert both["tasks"] == found["tasks"] and both["perplexity"] > 1
    table = succeed("eval", folder / "tiny", *options, "--limit", "1").stdout
    assert "only the first 1 documents" in table and "blimp_plain" not in table
    assert "--allow-code-execution" in fail("eval", folder / "tiny", "--tasks", "humaneval")
    assert "unknown task" in fail("eval", folder / "tiny", "--tasks", "x")
    outcome = microscale_command("eval", folder / "tiny", "--reference", folder / "tiny", "--tasks", "piqa")
    assert outcome.code == 2 and "--text" in outcome.stderr
