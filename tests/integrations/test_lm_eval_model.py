"""Our model for lm-eval scores continuations as the definition says, whatever is batched or shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from small_models import byte_tokenizer
from tiny_models import tiny_model

pytest.importorskip("lm_eval")

from microscale.integrations.lm_eval_model import EvaluatedModel


@pytest.fixture(scope="module")
def subject() -> Any:
    return EvaluatedModel(tiny_model("llama", vocab_size=300), byte_tokenizer(), batch=2)


def by_definition(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        scores = functional.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), -1)
    last = scores[len(context) - 1 : -1]
    chosen = last[range(len(continuation)), continuation]
    return float(chosen.sum()), bool((last.argmax(-1) == torch.tensor(continuation)).all())


def test_continuations_are_scored_by_definition(subject: Any) -> None:
    """Of different lengths, with shared contexts and an answer that the model would give itself."""
    context = [1, 40, 41, 42]
    with torch.no_grad():
        greedy = int(subject.model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1].argmax())
    asked = [(context, [50]), (context, [greedy]), ([1, 60], [7, 8, 9]), (list(range(1, 30)), [5, 6]), ([1], [3])]
    seen: list[tuple[int, int]] = []
    subject._progress = lambda done, total: seen.append((done, total))
    found = subject._loglikelihood_tokens([(None, *pair) for pair in asked])
    for (value, is_greedy), pair in zip(found, asked, strict=True):
        expected = by_definition(subject.model, *pair)
        assert value == pytest.approx(expected[0], rel=1e-5) and is_greedy == expected[1]
    assert found[1][1] and seen[-1] == (5, 5)


def test_a_sequence_longer_than_the_model_loses_its_beginning(subject: Any) -> None:
    context = [1, *([9, 8, 7] * 100)]
    ((value, _),) = subject._loglikelihood_tokens([(None, context, [5])])
    assert value == pytest.approx(by_definition(subject.model, context[-subject.max_length :], [5])[0], rel=1e-5)


def test_texts_begin_with_bos(subject: Any) -> None:
    bos = subject.tokenizer.bos_token_id
    plain = subject.tok_encode("ab", add_special_tokens=False)
    if bos is None:
        pytest.skip("the tokenizer has none")
    assert subject.tok_encode("ab") == [bos, *plain] and plain[0] != bos
    ids, _ = subject.tok_batch_encode(["ab", subject.tokenizer.bos_token + "ab"])
    assert ids.tolist()[0] == ids.tolist()[1] and ids[0].tolist().count(bos) == 1
