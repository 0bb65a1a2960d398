"""Every backend, every operation of the registry that it takes: the result of the contract."""

from __future__ import annotations

import pytest

from kernel_conformance import CASES, Case, check
from microscale.kernels import BACKENDS, Backend


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_an_operation_does_what_its_contract_says(backend: Backend, case: Case) -> None:
    if not check(backend, case):
        pytest.skip(f"{backend.name}: {backend.refusal(case.request())}")
