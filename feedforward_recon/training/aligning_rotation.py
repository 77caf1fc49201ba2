"""The rotation that aligns points best, with a gradient that is bounded while it is determined."""

from __future__ import annotations

from typing import Any

import torch

LEAST_SUM = 1e-6  # of two singular values, relative to the largest


def aligning_rotation(M: torch.Tensor) -> torch.Tensor:
    """Rotations R [..., 3, 3] with the largest tr(R^T M) (Kabsch 1976)."""
    return _AligningRotation.apply(M)


class _AligningRotation(torch.autograd.Function):
    """R of M = R H with H symmetric.

    From dM = dR H + R dH, the turn R^T dR solves W H + H W = R^T dM - dM^T R.
    """

    @staticmethod
    def forward(ctx: Any, M: torch.Tensor) -> torch.Tensor:
        U, S, Vt = torch.linalg.svd(M)
        signs = torch.ones_like(S)
        signs[..., 2] = torch.det(U @ Vt).sign()
        R = (U * signs[..., None, :]) @ Vt
        ctx.save_for_backward(R, S * signs, Vt)
        return R

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        R, S, Vt = ctx.saved_tensors
        least = LEAST_SUM * S[..., :1, None]
        sums = torch.maximum(S[..., :, None] + S[..., None, :], least)
        turn = R.mT @ gradient
        return R @ Vt.mT @ (Vt @ (turn - turn.mT) @ Vt.mT / sums) @ Vt
