"""Rotations to start from: Hadamard matrices with random signs where the size is a power of two, else random ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.kernels.transform import hadamard_matrix


def start_rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """Return an orthogonal matrix in float64: diag(signs) H for a power of two, else Q of a normal matrix."""
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1) == 0:
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        return signs.to(torch.float64).unsqueeze(1) * hadamard_matrix(size, torch.empty(0, dtype=torch.float64))
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()
