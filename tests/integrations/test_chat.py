"""Chats through a tokenizer's template: calibrated on, answered, and refused where there is none."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import fail, succeed
from microscale.errors import OptionError, QuantizationNote, TextError
from microscale.integrations.chat import chat_prompt, chat_text, has_template
from microscale.jobs.calibration import read_windows
from microscale.jobs.generate import Conversation
from microscale.jobs.shared_options import CalibrationOptions
from microscale.jobs.small_options import GenerateOptions
from small_models import save_two_layers

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('begins with an answer') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "Why is the sea salty?"}, {"role": "assistant", "content": "Rivers bring salt."}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_two_layers(tmp_path_factory.mktemp("models") / "chatty")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_the_template_writes_the_text_and_the_prompt(chatty: Path, plain: Path) -> None:
    tokenizer = microscale.load_tokenizer(chatty)
    assert has_template(tokenizer)
    assert chat_text(tokenizer, CHAT) == "<user>Why is the sea salty?\n<assistant>Rivers bring salt.\n"
    ids = chat_prompt(tokenizer, CHAT[:1])
    assert ids == tokenizer("<user>Why is the sea salty?\n<assistant>", add_special_tokens=False)["input_ids"]
    with pytest.raises(TextError, match="refuses messages of assistant: begins with an answer"):
        chat_text(tokenizer, CHAT[1:])
    with pytest.raises(TextError, match="has no chat template"):
        chat_text(microscale.load_tokenizer(plain), CHAT)


def test_chats_are_calibrated_on_as_the_template_writes_them(chatty: Path, tmp_path: Path) -> None:
    """From JSON lines in either form, and from Python; the windows are those of the text that the template makes."""
    tokenizer, model = microscale.load_tokenizer(chatty), microscale.load(chatty)
    text = chat_text(tokenizer, CHAT) * 30
    turns = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]
    lines = [json.dumps({"messages": CHAT} if i % 2 else {"conversations": turns}) for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))

    def windows(source: Any) -> torch.Tensor:
        options = CalibrationOptions(source=source, samples=4, window=32)
        return read_windows(options, tokenizer, model).windows

    ids = tokenizer(chat_text(tokenizer, CHAT), add_special_tokens=False)["input_ids"] * 30
    found = windows(tmp_path / "chats.jsonl")
    stream = torch.tensor(ids[: len(ids) // 31 * 31]).reshape(-1, 31)
    rows = {tuple(row.tolist()) for row in stream}
    assert found.shape == (4, 32) and all(tuple(row.tolist()) in rows for row in found[:, 1:])
    assert text
    out = ["-f", "mxfp4", "--method", "gptq", "--samples", "4", "--window", "32"]
    succeed("quantize", chatty, *out, "--calibration", tmp_path / "chats.jsonl", "-o", tmp_path / "out")
    from_list = microscale.quantize(str(chatty), "mxfp4", method="gptq", calibration=[CHAT] * 30, samples=4, window=32)
    packed = microscale.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, packed[name]) for name, tensor in from_list.state_dict().items())


def test_a_broken_line_is_named(chatty: Path, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + '\n{"messages": [{"role": "user"}]}\n')
    out = ["-f", "mxfp4", "--method", "gptq", "--samples", "4", "--window", "32", "-o", tmp_path / "out"]
    message = fail("quantize", chatty, *out, "--calibration", tmp_path / "chats.jsonl")
    assert "line 2" in message and "message 1" in message


def test_a_prompt_is_answered(chatty: Path) -> None:
    """The model gets the chat up to the answer; what it is told first stands before."""
    asked = ["generate", chatty, "--chat", "Why?", "-n", "5", "--json"]
    found, told = succeed(*asked).json, succeed(*asked, "--system", "Be brief.").json
    tokenizer = microscale.load_tokenizer(chatty)
    for result, text in ((found, "<user>Why?\n<assistant>"), (told, "<system>Be brief.\n<user>Why?\n<assistant>")):
        assert result["prompt"] == "Why?"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert result["prompt_tokens"] == len(ids)
        inputs = torch.tensor([ids])
        model = microscale.load(chatty, dtype=torch.float32)
        new = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=5, do_sample=False)
        assert result["text"] == tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)


def test_a_conversation_remembers_and_forgets(chatty: Path) -> None:
    pieces: list[str] = []
    talk = Conversation(GenerateOptions(model=str(chatty), chat=True, max_new_tokens=4, on_text=pieces.append))
    first = talk.reply("One")
    second = talk.reply("Two")
    assert second.prompt_tokens > first.prompt_tokens + 4 and "".join(pieces) == first.text + second.text
    assert talk.notes == ()
    last = second
    for _ in range(50):
        last = talk.reply("Once more, and at some length, so that the room is full " * 3)
    assert last.prompt_tokens + 4 <= 2048 and "first exchanges are left out" in talk.notes[0]


def test_lines_are_answered_until_an_empty_one(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microscale.cli import generate_command

    typed = iter(["One", "Two", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    shown = io.StringIO()
    monkeypatch.setattr(generate_command.sys, "stdout", shown)
    generate_command._talk(GenerateOptions(model=str(chatty), chat=True, max_new_tokens=3))
    assert shown.getvalue().count("\n") >= 2 and next(typed, None) is None


def test_what_makes_no_sense_is_refused(chatty: Path, plain: Path) -> None:
    assert "has no chat template" in fail("generate", plain, "--chat", "Why?")
    with pytest.raises(OptionError, match="--chat too"):
        microscale.generate(chatty, prompt="Why?", system="Be brief.")
    with pytest.raises(OptionError, match="needs a prompt"):
        microscale.generate(chatty)


def test_a_model_made_for_chats_that_says_nothing_gets_a_hint(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = microscale.load(chatty)
    tokenizer = microscale.load_tokenizer(chatty)
    likeliest = int(model(torch.tensor([tokenizer("The sea")["input_ids"]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    assert likeliest in model.generation_config.eos_token_id
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: "")
    with pytest.warns(QuantizationNote, match="made for chats"):
        microscale.generate(model, prompt="The sea", tokenizer=tokenizer, max_new_tokens=4)
