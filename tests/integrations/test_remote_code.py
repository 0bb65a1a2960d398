"""Code that lies in a model's directory: refused by name, run where it is trusted, and nobody is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import microscale
from command_line import fail, succeed
from microscale.errors import ModelError
from microscale.integrations.remote_code import is_trusted, said_of, trusting
from small_models import edit_config, logits, save_two_layers


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_two_layers(tmp_path_factory.mktemp("models") / "odd")
    names = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    edit_config(path, model_type="odd_for_tests", architectures=["OddForCausalLM"], auto_map=names)
    (path / "configuration_odd.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd_for_tests'\n"
    )
    (path / "modeling_odd.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_odd import OddConfig\n\n\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    return path


def test_it_is_refused_with_the_switch_that_allows_it(odd: Path, tmp_path: Path) -> None:
    message = fail("quantize", odd, "-f", "mxfp4", "-o", tmp_path / "out")
    assert "holds code of its own" in message and "--trust-remote-code" in message
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        microscale.load(odd)


def test_it_runs_where_it_is_trusted(odd: Path, tmp_path: Path) -> None:
    succeed("quantize", odd, "-f", "mxfp8", "--trust-remote-code", "-o", tmp_path / "out", "--json")
    assert {"modeling_odd.py", "configuration_odd.py"} <= {file.name for file in (tmp_path / "out").iterdir()}
    model = microscale.load(odd, trust_remote_code=True)
    assert type(model).__name__ == "OddForCausalLM" and bool(torch.isfinite(logits(model)).all())
    again = microscale.load(tmp_path / "out", trust_remote_code=True)
    assert float((logits(again) - logits(model)).abs().max()) < 2


def test_trust_ends_where_it_was_given() -> None:
    assert not is_trusted()
    with trusting(True):
        assert is_trusted()
        with trusting(False):
            assert is_trusted()
    assert not is_trusted()
    assert said_of(ValueError("no"), "x") is None and "x holds code" in str(
        said_of(ValueError("trust_remote_code"), "x")
    )
