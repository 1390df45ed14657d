"""The shared subspace: one narrow map for several heads, each reading it in its own way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Relative to the largest: below it, a direction is taken as never used.
FLOOR = 1e-10
FLOOR_FP32 = 1e-6  # where sums are no wider (MPS)
# Noise that the shared features are found under, relative to the largest second moment. Directions
# that hardly vary would else be given large weights that explain little and bring nothing on other
# text (measured: less noise is worse there, and leaves gradient steps nothing to improve).
NOISE = 1e-3
# Below this share of what is read nothing is lost: sharing is exact, and no noise is due.
EXACT = 1e-9
CG_STEPS = 40
NOTHING = 1e-30
# Conjugate gradients stop once the loss above its least is this share of what it was.
CG_LEFT = 1e-4
# Of the preconditioner alone, which need not be exact.
CG_FLOOR = 1e-6


def find_top_subspace(weight: torch.Tensor, covariance: torch.Tensor, width: int) -> torch.Tensor:
    """Find the map M [width, n] that loses least where all heads share one covariance.

    Minimises tr(weight (I - P) covariance (I - P)^H) over projections P of rank `width` that are
    orthogonal in the covariance's metric: the top eigenvectors of C^1/2 W C^1/2, taken back.

    Args:
        weight: [n, n] Hermitian; what the heads make of the stacked features, summed.
        covariance: [n, n] Hermitian; second moments of the stacked features.
    """
    values, vectors = torch.linalg.eigh(covariance)
    floor = _get_floor(values.dtype) * _replace_zero(values.abs().max())
    roots = values.clamp_min(floor).sqrt()
    root = (vectors * roots) @ vectors.mH
    inverse = (vectors / roots) @ vectors.mH
    best = torch.linalg.eigh(root @ weight @ root).eigenvectors[:, -width:]
    return best.mH @ inverse


def _replace_zero(size: torch.Tensor) -> torch.Tensor:
    """Replace zero by one, so that it can be divided by."""
    return torch.where(size > NOTHING, size, torch.ones_like(size))


def _get_floor(dtype: torch.dtype) -> float:
    return FLOOR if torch.finfo(dtype).bits == 64 else FLOOR_FP32


def compute_least_loss(half: torch.Tensor, covariance: torch.Tensor, width: int) -> float:
    """Compute the loss of `find_top_subspace` alone: the eigenvalues below the top `width`.

    Args:
        half: A [m, n], with A^H A = weight.
    """
    size = half @ covariance @ half.mH
    values = torch.linalg.eigvalsh((size + size.mH) / 2)
    return float(values[:-width].clamp_min(0).sum())


def solve_readers(
    shared: torch.Tensor, covariances: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Find per head the map [out, width] that best rebuilds its target from shared features.

    Least squares: R = T C M^H (M C M^H)^-1 for target T [out, n] and covariance C [n, n].
    """
    found = []
    for covariance, target in zip(covariances, targets, strict=True):
        half = covariance @ shared.mH
        found.append(solve_right(target @ half, shared @ half))
    return found


def solve_right(right: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Find X with X square = right, for a Hermitian `square` that may be close to singular."""
    size = _replace_zero(square.diagonal().real.mean())
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    ridge = _get_floor(square.dtype) * size
    solved: torch.Tensor = torch.linalg.solve(square + ridge * eye, right.mH).mH
    return solved


def find_shared_subspace(
    covariances: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    width: int,
    rounds: int = 10,
    noise: float = NOISE,
) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """Find M [width, n] and a reader R_h per head that minimise Σ_h E|T_h f_h - R_h M f_h|².

    f_h are the stacked features as head h sees them, with second moments C_h. Starts from the top
    subspace of the mean covariance, then alternates: readers by least squares, M by conjugate
    gradients on Σ_h R_h^H R_h M C_h = Σ_h R_h^H T_h C_h.

    Args:
        covariances: C_h, [n, n] each.
        targets: T_h, [out, n] each.
        noise: second moment added to every feature, relative to the largest there is; left out
            where the features can be shared exactly.

    Returns:
        M, the readers [out, width], and the loss as a share of Σ_h E|T_h f_h|².
    """
    mean = sum(covariances, torch.zeros_like(covariances[0])) / len(covariances)
    weight = sum((t.mH @ t for t in targets), torch.zeros_like(mean))
    largest = _replace_zero(mean.diagonal().real.max())
    # Never none at all: where features do not vary, M would grow without bound.
    for share in (_get_floor(mean.dtype), max(noise, _get_floor(mean.dtype))):
        added = share * largest
        eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        shared = find_top_subspace(weight, mean + added * eye, width)
        seen = [t @ c + added * t for t, c in zip(targets, covariances, strict=True)]
        found, loss = _fit_readers(shared, covariances, targets, seen, added)
        best = shared, found, loss
        total = sum(float((s * t.conj()).sum().real) for s, t in zip(seen, targets, strict=True))
        if loss <= EXACT * total:
            return shared, found, loss / total if total > 0 else 0.0
    for _ in range(rounds):
        shared = _solve_shared(shared, found, covariances, seen, mean, added)
        found, loss = _fit_readers(shared, covariances, targets, seen, added)
        if not loss < best[2]:
            break
        done = best[2] - loss < 1e-3 * loss
        best = shared, found, loss
        if done:
            break
    return best[0], best[1], best[2] / total if total > 0 else 0.0


def _fit_readers(
    shared: torch.Tensor,
    covariances: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    seen: Sequence[torch.Tensor],
    noise: torch.Tensor,
) -> tuple[list[torch.Tensor], float]:
    """Fit `solve_readers`, and Σ_h E|T_h f_h - R_h M f_h|²; `seen` are the T_h C_h."""
    found, total = [], 0.0
    for covariance, target, across in zip(covariances, targets, seen, strict=True):
        half = shared @ covariance + noise * shared
        reader = solve_right(across @ shared.mH, half @ shared.mH)
        left = target - reader @ shared
        total += float(((across - reader @ half) * left.conj()).sum().real)
        found.append(reader)
    return found, total


def _solve_shared(
    start: torch.Tensor,
    found: Sequence[torch.Tensor],
    covariances: Sequence[torch.Tensor],
    seen: Sequence[torch.Tensor],
    mean: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Solve Σ_h S_h M C_h = Σ_h R_h^H T_h C_h for M, with S_h = R_h^H R_h.

    Conjugate gradients, preconditioned by what the left side would be if all C_h were their mean.
    """
    readers, covariance = torch.cat(list(found)), torch.cat(list(covariances), dim=1)
    squares = torch.cat([reader.mH @ reader for reader in found], dim=1)  # [S_1 | S_2 | …]
    total = readers.mH @ readers

    def apply(x: torch.Tensor) -> torch.Tensor:
        turned = (x @ covariance).unflatten(1, (len(found), -1)).transpose(0, 1).flatten(0, 1)
        return squares @ turned + noise * (total @ x)

    rows, columns = _invert(total), _invert(mean)
    wanted = torch.zeros_like(start)
    for reader, across in zip(found, seen, strict=True):
        wanted.addmm_(reader.mH, across)
    x = start.clone()
    residual = wanted - apply(x)
    turned = rows @ residual @ columns
    direction = turned.clone()
    # By this much, nearly, the loss is above its least.
    size = (residual.conj() * turned).sum().real
    limit = CG_LEFT * size
    least = 1e-16 * (wanted.abs() ** 2).sum()
    for _ in range(CG_STEPS):
        if not size > limit or not (residual.abs() ** 2).sum() > least:
            break
        image = apply(direction)
        step = size / (direction.conj() * image).sum().real
        x = x + step * direction
        residual = residual - step * image
        turned = rows @ residual @ columns
        size, last = (residual.conj() * turned).sum().real, size
        direction = turned + size / last * direction
    return x


def _invert(square: torch.Tensor) -> torch.Tensor:
    """Invert, roughly, a Hermitian matrix that may be close to singular."""
    size = _replace_zero(square.diagonal().real.mean())
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    found: torch.Tensor = torch.linalg.inv(square + CG_FLOOR * size * eye)
    return (found + found.mH) / 2
