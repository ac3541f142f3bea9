"""What attacks inside a threat share: of each image the version that fools the model most."""

from __future__ import annotations

from torch import Tensor

from manifold_defense.attacks.objective import clearly, margins


class Highest:
    """Of each image x (N, C, H, W) the version of the highest margin so far, x itself included.

    `image` is that version, `margin` (N,) its margin for the label y, or for the target if `targeted`. An
    image that clearly fools the model, by more than another batch's rounding can undo, is sought no more
    with `stop_early`.
    """

    def __init__(self, x: Tensor, y: Tensor, logits: Tensor, *, targeted: bool, stop_early: bool) -> None:
        """`logits` (N, K) are those of x."""
        self.image, self.margin = x.clone(), margins(logits, y, targeted)
        self._labels, self._targeted, self._stop_early = y, targeted, stop_early
        self._found = clearly(self.margin, logits) & stop_early

    def sought(self) -> Tensor:
        """The indices of the images that are worth another pass."""
        return (~self._found).nonzero().squeeze(1)

    def going(self, rows: Tensor) -> Tensor:
        """Whether each of the images `rows` (M,) is, (M,)."""
        return ~self._found[rows]

    def keep(self, rows: Tensor, at: Tensor, logits: Tensor) -> Tensor:
        """Take what is better of the versions `at` (M, C, H, W) of the images `rows`; their margins (M,)."""
        margin = margins(logits, self._labels[rows], self._targeted)
        better = margin > self.margin[rows]
        chosen = rows[better]
        self.image[chosen], self.margin[chosen] = at[better], margin[better].to(self.margin.dtype)
        self._found[rows] |= clearly(margin, logits) & self._stop_early
        return margin
