"""Stages and their folders: what is finished, what is stale, and how a result comes into being whole.

`runs/NAME/STAGE/` holds a finished stage, `runs/NAME/STAGE.part/` one at work. A stage's identity is
its fingerprint: name, version, the config sections that it declares, and its inputs' fingerprints. It is
current as long as that stands and its inputs hold what it was made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.config import Config
from pipelines.data import data_digest
from pipelines.files import write_json

if TYPE_CHECKING:
    from pipelines.context import Context

RUNS = Path("runs")
FACTS, PLAN, STATE = "stage.json", "plan.json", "state.ckpt"
# Settings that may name a folder of weights, which are then part of what a stage is made of.
_WEIGHTS = re.compile(r"(evaluate\.)?filter|encoder\.(body|classifier)|harden\.\d+\.start")
Status = Literal["cached", "stale", "unfinished", "missing"]


class StageError(Exception):
    """A stage cannot be run as asked; one line that says why and what to do."""


@dataclass(frozen=True)
class Stage:
    """`run(context)` does the work in `context.folder` and returns the metrics for `stage.json`.

    `lasts` says whether its result stands as long as its settings and inputs do. Not where code of the
    user's has a part in it, which may change without either. One that is `derived` holds nothing that its
    inputs do not hold: once stale it is made anew unasked.
    """

    name: str
    version: int
    summary: str
    sections: tuple[str, ...] | Callable[[Config], tuple[str, ...]]
    inputs: Callable[[Config], tuple[str, ...]]
    run: Callable[[Context], dict[str, Any]]
    lasts: Callable[[Config], bool] = lambda config: True
    derived: bool = False


@dataclass(frozen=True)
class Plan:
    """What a stage would be made of under one configuration."""

    stage: str
    version: int
    config: Mapping[str, Any]  # dotted key -> value, of the declared sections
    inputs: Mapping[str, str]  # input stage -> fingerprint

    @property
    def fingerprint(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, facts: Mapping[str, Any]) -> str:
        """The first thing in which a finished (or begun) stage differs from this plan, in words."""
        if facts.get("version") != self.version:
            return f"it was made by version {facts.get('version')} of the stage, this is {self.version}"
        before = facts.get("config", {})
        wanted = json.loads(json.dumps(dict(self.config), default=str))
        for key in (*(key for key in before if key not in wanted), *wanted):
            if key not in before or key not in wanted:
                return f"{key} is {'new' if key in wanted else 'no longer there'}"
            if before[key] != wanted[key]:
                return f"{key} was {before[key]!r}, is {wanted[key]!r}"
        known = facts.get("inputs", {})
        for name in (*self.inputs, *known):
            if name not in known or name not in self.inputs:
                return f"its input {name} is {'new' if name in self.inputs else 'no longer there'}"
            if known[name] != self.inputs[name]:
                return f"its input {name} has changed"
        return "its inputs have changed"


def make_plans(stages: Mapping[str, Stage], config: Config) -> dict[str, Plan]:
    """The plan of every stage; input stages stand before their users."""
    digest = data_digest(config.data)
    plans: dict[str, Plan] = {}
    for stage in stages.values():
        inputs = {name: plans[name].fingerprint for name in stage.inputs(config)}
        sections = stage.sections(config) if callable(stage.sections) else stage.sections
        plans[stage.name] = Plan(stage.name, stage.version, settings_of(config, sections, digest), inputs)
    return plans


def settings_of(config: Config, sections: Sequence[str], digest: str) -> dict[str, Any]:
    """Dotted key -> value of `sections`; `digest` stands for what the data are."""
    values: dict[str, Any] = {}
    for section in sections:
        values |= _flatten(section, getattr(config, section))
        if section == "data":
            # Where the data lies is no part of what they are.
            values.pop("data.root", None)
            values["data.digest"] = digest
    for key, name in weights_of(values).items():
        folder = Path(name)
        weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")])
        content = b"".join(path.read_bytes() for path in weights)
        values[f"{key}.digest"] = hashlib.sha256(content).hexdigest()[:16]
    return values


def weights_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The settings, dotted key -> value, that name a folder of weights: not those that name a variant."""
    named = {key: value for key, value in values.items() if _WEIGHTS.fullmatch(key) and value}
    return {key: value for key, value in named.items() if key.endswith("filter") or "/" in value}


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for i, entry in enumerate(value):
            flat |= _flatten(f"{prefix}.{i}", entry)
        return flat
    if not dataclasses.is_dataclass(value):
        return {prefix: value}
    for item in dataclasses.fields(value):
        flat |= _flatten(f"{prefix}.{item.name}", getattr(value, item.name))
    return flat


@dataclass(frozen=True)
class StageFolder:
    """The two folders of a stage in a run, and the moves between them."""

    run: Path
    name: str

    @property
    def done(self) -> Path:
        return self.run / self.name

    @property
    def part(self) -> Path:
        return self.run / f"{self.name}.part"

    def facts(self) -> dict[str, Any] | None:
        """What `stage.json` of the finished stage says, also before `settle`; None if there is none."""
        return _read(self.part / FACTS) or _read(self.done / FACTS)

    def begun(self) -> dict[str, Any] | None:
        """What `plan.json` of unfinished work says; None if there is none, or nothing came of it yet."""
        return (self._plan() or None) if self.settled and self._has_something else None

    def _plan(self) -> dict[str, Any]:
        return _read(self.part / PLAN) or {}

    @property
    def _has_something(self) -> bool:
        """Whether the work folder holds more than a plan and an empty board."""
        found = (path for path in self.part.rglob("*") if path.is_file())
        return any(path != self.part / PLAN and path.parent.name != "events" for path in found)

    def fits(self, plan: Plan, facts: Mapping[str, Any] | None) -> bool:
        """Whether what these facts tell of, finished or begun, is what the plan would make now."""
        if facts is None or facts.get("fingerprint") != plan.fingerprint:
            return False
        return not self.made_anew(plan, facts)

    def made_anew(self, plan: Plan, facts: Mapping[str, Any]) -> str:
        """The first input that no longer holds what these facts say it held; empty if all do."""
        known, now = facts.get("made_of", {}), self._made_of(plan)
        changed = (name for name in known if name in now and known[name] != now[name])
        return next(changed, "")

    def _made_of(self, plan: Plan) -> dict[str, str]:
        """Of the inputs that are finished, what their folders hold."""
        found = {name: StageFolder(self.run, name).facts() or {} for name in plan.inputs}
        return {name: facts["content"] for name, facts in found.items() if "content" in facts}

    def difference(self, plan: Plan, facts: Mapping[str, Any]) -> str:
        """Why these facts do not fit the plan, in words."""
        if facts.get("fingerprint") == plan.fingerprint:
            return f"an input that has been made anew since: {self.made_anew(plan, facts)}"
        return f"other settings: {plan.difference(facts)}"

    def status(self, plan: Plan) -> Status:
        facts, begun = self.facts(), self.begun()
        if facts is not None:
            if self.fits(plan, facts):
                return "cached"
            if not self.fits(plan, begun):
                return "stale"
        return "unfinished" if begun is not None or self.part.exists() else "missing"

    def open(self, plan: Plan, *, force: bool, remake: bool = False) -> bool:
        """Make the work folder ready; True if work that was begun under the same plan is resumed.

        `force` discards begun work of other settings, `remake` any.
        """
        begun, force = self.begun(), force or remake
        if begun is not None and not remake and self.fits(plan, begun):
            return True
        if begun is not None and not force:
            raise self.unfinished(plan, begun)
        remove(self.part)
        self.part.mkdir(parents=True)
        facts = {**dataclasses.asdict(plan), "fingerprint": plan.fingerprint, "made_of": self._made_of(plan)}
        write_json(self.part / PLAN, facts)
        return False

    def unfinished(self, plan: Plan, begun: Mapping[str, Any]) -> StageError:
        return StageError(
            f"{self.part}: unfinished work with {self.difference(plan, begun)}; --force discards it"
        )

    def spent(self, seconds: float) -> float:
        """Add `seconds` to what unfinished work has cost so far, and return the sum."""
        plan = self._plan()
        total = float(plan.get("seconds", 0.0)) + seconds
        write_json(self.part / PLAN, {**plan, "seconds": total})
        return total

    def commit(
        self, plan: Plan, metrics: Mapping[str, Any], seconds: float, fabric: Mapping[str, Any]
    ) -> None:
        """Turn the work folder into the finished stage, in one rename."""
        made_of = self._plan().get("made_of", {})
        facts = {
            **dataclasses.asdict(plan),
            "fingerprint": plan.fingerprint,
            "made_of": made_of,
            "content": _content(self.part, metrics),
            "versions": _versions(),
            "fabric": dict(fabric),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 2),
            "metrics": dict(metrics),
        }
        write_json(self.part / FACTS, facts)
        self.settle()

    @property
    def settled(self) -> bool:
        """Whether no complete work folder waits to be put in its place."""
        return not (self.part / FACTS).exists()

    def settle(self) -> None:
        """Put a complete work folder in its place: the end of `commit`, also one that was cut short.

        Only for who has the run to itself.
        """
        if self.settled:
            return
        for leftover in (STATE, PLAN):
            (self.part / leftover).unlink(missing_ok=True)
        shutil.rmtree(self.part / "jobs", ignore_errors=True)
        old = self.run / f"{self.name}.old"
        remove(old)
        if self.done.exists():
            os.replace(self.done, old)
        os.replace(self.part, self.done)
        with suppress(OSError):
            remove(old)


def figures(metrics: Mapping[str, Any]) -> list[str]:
    """The few scalars of a stage that are worth a line, in words."""
    shown = (
        "encoder_error",
        "test_accuracy",
        "quick_accuracy",
        "proved_accuracy",
        "clean_error",
        "accuracy_on_projection",
    )
    known = {name: metrics[name] for name in shown if metrics.get(name) is not None}
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in known.items()]


def remove(folder: Path) -> None:
    """The folder, if there is one; of a link to another one the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _content(folder: Path, metrics: Mapping[str, Any]) -> str:
    """Of the metrics, and of all files but pictures, the board and what work in progress needs."""
    digest = hashlib.sha256(json.dumps(dict(metrics), sort_keys=True, default=str).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        if path.suffix == ".png" or {"events", "jobs", PLAN, STATE} & {*inside.parts}:
            continue
        digest.update(inside.as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StageError(f"{path}: damaged ({error}); delete {path.parent} to make it anew") from None
    if not isinstance(value, dict):
        raise StageError(f"{path}: expected a JSON object; delete {path.parent} to make it anew")
    return value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("manifold-defense", "torch", "torchvision", "lightning-fabric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
