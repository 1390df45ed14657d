"""The fingerprint by which a plan's JSON names a tensor."""

from __future__ import annotations

import hashlib

import torch


def hash_tensor(tensor: torch.Tensor) -> str:
    """Compute the SHA-256 of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
