"""A classifier by distance to a manifold a class, kept so simple that the distance is exact.

`d_c(x) = min ‖x − m‖₂` over the points m of class c is 1-Lipschitz, whatever the points are: the answer
`argmin_c d_c` cannot change within `(d₂ − d₁) / 2`. This holds wherever d is the true minimum, which the
inversion of a generator does not promise. Here each class is a union of affine patches, points of a bank
if they have no directions, and the minimum is a matrix product.
"""

from __future__ import annotations

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from manifold_defense.certification.certificates import Certificates

_CHUNK = 500  # images whose distances to all patches are held at once


class PatchClassifier(nn.Module):
    """Images (N, C, H, W) to logits `−d_c(x)` (N, K) over M affine patches `mean + span(basis)`."""

    means: Tensor  # (M, P)
    bases: Tensor  # (M, D, P), orthonormal rows, or zeros; D = 0 for points
    labels: Tensor  # (M,)

    def __init__(self, means: Tensor, bases: Tensor, labels: Tensor) -> None:
        super().__init__()
        if bases.dim() != 3 or bases.shape[0] != len(means) or bases.shape[2:] != means.shape[1:]:
            raise ValueError(
                f"bases: expected (M, D, P) for means {tuple(means.shape)}, got {tuple(bases.shape)}"
            )
        if len(labels) != len(means) or sorted(set(labels.tolist())) != list(range(int(labels.max()) + 1)):
            raise ValueError(f"labels: expected one for each of {len(means)} patches, every class among them")
        products = bases @ bases.mT
        rows = torch.diag_embed(products.diagonal(dim1=1, dim2=2) > 0.5).to(bases)
        if not torch.allclose(products, rows, atol=1e-4):
            raise ValueError("bases: expected rows of length 1 (or 0: none), at right angles to one another")
        if not labels.any():
            raise ValueError("labels: expected patches of at least two classes")
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("bases", bases.detach().clone())
        self.register_buffer("labels", labels.detach().clone())

    def distances(self, x: Tensor) -> Tensor:
        """Of each image (N, C, H, W) to each class, (N, K), in L2, in the type of the patches."""
        return torch.cat([self._distances(part) for part in x.flatten(1).to(self.means).split(_CHUNK)])

    def _distances(self, flat: Tensor) -> Tensor:
        patches, directions, _ = self.bases.shape
        squares = flat.square().sum(1, keepdim=True) + self.means.square().sum(1)
        squares = torch.addmm(squares, flat, self.means.T, alpha=-2)
        if directions:
            along = (flat @ self.bases.flatten(0, 1).T).view(-1, patches, directions)
            along = along - (self.bases @ self.means.unsqueeze(2)).squeeze(2)
            squares = squares - along.square().sum(2)
        nearest = [squares[:, self.labels == c].amin(1) for c in range(int(self.labels.max()) + 1)]
        return torch.stack(nearest, 1).clamp(min=1e-12).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return -self.distances(x)

    @torch.no_grad()
    def certify(self, x: Tensor) -> Certificates:
        """L2 radii `(d₂ − d₁) / 2`, of distances in the type of the patches; float64 leaves no doubt."""
        distance, order = self.distances(x).topk(2, largest=False)
        return Certificates(order[:, 0], (distance[:, 1] - distance[:, 0]) / 2)


def fit_patches(
    images: Tensor, labels: Tensor, *, patches: int = 0, directions: int = 0, seed: int = 0
) -> PatchClassifier:
    """A union of `patches` affine pieces for each class: k-means, then the principal directions of each.

    Of images (M, C, H, W) with labels (M,), in float64. 0 patches keeps every image as a point.
    """
    flat = images.detach().flatten(1).double().cpu()
    labels = labels.cpu()
    if not patches:
        return PatchClassifier(flat, flat.new_zeros(len(flat), 0, flat.shape[1]), labels)
    means, bases, owners = [], [], []
    for label in labels.unique().tolist():
        own = flat[labels == label]
        _, member = kmeans2(own.numpy(), min(patches, len(own)), minit="++", seed=seed)
        for cluster in sorted(set(member.tolist())):
            points = own[torch.from_numpy(member == cluster)]
            mean = points.mean(0)
            _, _, rows = torch.linalg.svd(points - mean, full_matrices=False)
            basis = flat.new_zeros(directions, flat.shape[1])
            kept = min(directions, len(points) - 1, len(rows))
            basis[:kept] = rows[:kept]
            means.append(mean)
            bases.append(basis)
            owners.append(label)
    return PatchClassifier(torch.stack(means), torch.stack(bases), torch.tensor(owners))
