"""What is attacked: a model whose predictions count, and the views of it that an attacker may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from manifold_defense.attacks import Expectation
from manifold_defense.evaluation.baselines import Preprocessed, RandomNoise
from manifold_defense.filter import DefendedClassifier
from manifold_defense.modes import writes
from manifold_defense.randomised import RandomisedFilter
from manifold_defense.rejection import RejectingClassifier
from manifold_defense.types import Classifier, Threat

ViewName = Literal[
    "unaware",
    "start",
    "identity",
    "soft",
    "sharp",
    "tangent",
    "gauss_newton",
    "implicit",
    "exact",
    "deployed",
]
# In which order they are met: from what knows nothing of the defence to what knows all of it.
ORDER: tuple[ViewName, ...] = get_args(ViewName)
NO_GRADIENT: ViewName = "deployed"  # for an attack that asks the deployed model for its answers alone
CHECKED = "checks"  # in place of a view, for what the checks for masked gradients broke


class ModelError(ValueError):
    """A model that cannot be evaluated; the message names its defence and says what was expected of it."""


@dataclass(frozen=True)
class Defence:
    """A model whose predictions count, and the models that an attacker may differentiate instead.

    trained     the threats that it was trained for: a figure for one that none of them holds is of an
                unseen threat
    draws       of a randomised model: how often each image is judged, on fresh draws; an image counts
                by the share of them that are right
    predict     labels (N,) of the deployed model if they are not those of its logits: −1 for an image
                that it refuses, which counts as right if the image was attacked
    surrogates  the views that do not answer as the deployed model does: an image that fools one of
                them need not fool it
    """

    name: str
    model: Classifier
    attacked: Mapping[str, Classifier]  # view -> model handed to the attack
    trained: tuple[Threat, ...] = ()
    draws: int = 1
    predict: Callable[[Tensor], Tensor] | None = None
    surrogates: frozenset[str] = frozenset({"unaware"})

    def __post_init__(self) -> None:
        if not self.attacked:
            raise ValueError(f"attacked: expected at least one view of {self.name}, got none")

    def presses(self, view: str) -> bool:
        """Whether an attack goes on after it fooled this view: another model judges, or other draws."""
        return view in self.surrogates or self.draws > 1

    @property
    def strongest(self) -> Classifier:
        """What the strongest attack differentiates."""
        return self.attacked[self.strongest_view]

    @property
    def strongest_view(self) -> str:
        """The exact view, or the last that there is; of one that knows the defence, if there is one."""
        knowing = [view for view in self.attacked if view != "unaware"] or list(self.attacked)
        return "exact" if "exact" in knowing else knowing[-1]

    @property
    def answering(self) -> Classifier:
        """What attacks ask for answers alone: of a model that draws, the mean that is attacked."""
        return self.strongest if self.draws > 1 else self.model

    def asked(self, model: Classifier, x: Tensor) -> Tensor:
        """`model(x)` for one of its models; ModelError if that changes the images (N, C, H, W) in place."""
        before = writes(x)
        logits = model(x)
        if writes(x) != before:
            raise ModelError(
                f"{self.name}: expected a model that leaves its images alone, it changed them in place"
            )
        return logits

    def averaged(self, attacked: int = 20, judged: int = 100) -> Defence:
        """Of a model that draws: the mean over `attacked` draws is attacked, the share of `judged` counts."""

        def mean(model: Classifier) -> Classifier:  # of one that is a mean already, another mean
            return Expectation(model.model if isinstance(model, Expectation) else model, attacked)

        views = {
            view: model if view in self.surrogates else mean(model) for view, model in self.attacked.items()
        }
        return replace(self, attacked=views, draws=judged)

    @classmethod
    def of(cls, name: str, model: Classifier, trained: tuple[Threat, ...] = ()) -> Defence:
        """A model in every view that its kind has; `averaged` if it draws by a filter or a step of ours."""
        if isinstance(model, Preprocessed):
            return cls.preprocessed(name, model, trained)
        if isinstance(model, (DefendedClassifier, RejectingClassifier)):
            return cls.filtered(name, model, trained)
        return cls.bare(name, model, trained)

    @classmethod
    def bare(cls, name: str, classifier: Classifier, trained: tuple[Threat, ...] = ()) -> Defence:
        """A classifier without a filter: its own gradient is the exact one."""
        return cls(name, classifier, {"exact": classifier}, trained)

    @classmethod
    def filtered(
        cls,
        name: str,
        defended: DefendedClassifier | RejectingClassifier,
        trained: tuple[Threat, ...] = (),
    ) -> Defence:
        """A classifier behind a filter, in every view that the filter has; it may refuse images, or draw.

        It was trained for what its filter was, besides `trained`.
        """
        views = sorted(defended.filter.views(), key=ORDER.index)
        attacked: dict[str, Classifier] = {view: defended.view(view) for view in views}
        predict = defended.predict if isinstance(defended, RejectingClassifier) else None
        trained = tuple(dict.fromkeys((*trained, *defended.filter.trained)))
        made = cls(name, defended, {"unaware": defended.classifier, **attacked}, trained, predict=predict)
        return made.averaged() if isinstance(defended.filter, RandomisedFilter) else made

    @classmethod
    def preprocessed(cls, name: str, model: Preprocessed, trained: tuple[Threat, ...] = ()) -> Defence:
        """A classifier behind another preprocessing step, in every view of it."""
        views: dict[str, Classifier] = {view: model.view(view) for view in ORDER if view in model.views()}
        made = cls(name, model, {"unaware": model.classifier, **views}, trained)
        return made.averaged() if isinstance(model.preprocess, RandomNoise) else made
