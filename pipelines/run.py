"""Run stages in order: skip what is finished, refuse what is stale, resume what was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipelines.config import Config
from pipelines.context import Context, Workshop, make_fabric, on_first
from pipelines.locking import alone
from pipelines.own import load_own, load_own_classifier, load_own_filter
from pipelines.stage import RUNS, Plan, StageError, StageFolder, Status, figures, make_plans, weights_of
from pipelines.stages import STAGES, in_order


def upstream(target: str, config: Config) -> list[str]:
    """`target` and all it needs, in order."""
    return _with_inputs({target}, config)


def everything(config: Config) -> list[str]:
    """The whole pipeline, without what nothing else needs: a GAN beside a finished filter."""
    return _with_inputs({"report", "export"}, config)


def _with_inputs(wanted: set[str], config: Config) -> list[str]:
    stages = in_order(config)
    for stage in reversed(stages.values()):
        if stage.name in wanted:
            wanted |= set(stage.inputs(config))
    return [name for name in stages if name in wanted]


def statuses(config: Config) -> dict[str, tuple[StageFolder, Plan, Status]]:
    """Every stage's folder, plan and state under this configuration."""
    found = {}
    for name, plan in make_plans(in_order(config), config).items():
        folder = StageFolder(RUNS / config.run, name)
        found[name] = (folder, plan, folder.status(plan))
    return found


def intentions(
    names: Sequence[str], found: Mapping[str, tuple[StageFolder, Plan, Status]], force: bool
) -> list[tuple[str, str]]:
    """What a run would do with the stages `names`, in words; raises StageError where it would refuse."""
    doing = []
    for name in names:
        folder, plan, status = found[name]
        doing.append((name, _intention(name, folder, plan, status, force or STAGES[name].derived)))
        for needed in plan.inputs:
            if needed not in names and found[needed][2] != "cached":
                raise StageError(
                    f"{name} needs {needed}, which is {found[needed][2]} in {folder.run}: first run "
                    f"`manifold-defense {needed}` or `manifold-defense run {name}`, with the same options"
                )
    return doing


def _intention(name: str, folder: StageFolder, plan: Plan, status: Status, force: bool) -> str:
    if status == "cached":
        return "cached"
    if status == "stale" and not force:
        facts = folder.facts()
        assert facts is not None
        raise _outdated(name, folder, plan, facts)
    begun = folder.begun()
    if folder.fits(plan, begun):
        return "resume"
    if begun is not None and not force:
        raise folder.unfinished(plan, begun)
    return {"stale": "make anew", "unfinished": "start again", "missing": "run"}[status]


def _outdated(name: str, folder: StageFolder, plan: Plan, facts: Mapping[str, Any]) -> StageError:
    return StageError(
        f"{name}: {folder.done} was made with {folder.difference(plan, facts)}; "
        "--force makes it anew, --run NAME keeps both"
    )


def run_stages(
    config: Config, names: Sequence[str], console: Console, *, force: bool = False, remake: bool = False
) -> None:
    """Bring the stages `names` up to date, in order.

    `force` replaces results of other settings, as is done unasked with what is derived; `remake` makes even
    an equal, finished stage again, as is done unasked with one that does not last.
    All refusals come before any work is done.
    """

    def look() -> tuple[dict[str, tuple[StageFolder, Plan, Status]], list[str]]:
        """The state of all stages, and which of `names` there is work in; or a refusal."""
        found = statuses(config)
        intentions(names, found, force)
        return found, [n for n in names if found[n][2] != "cached" or remake or not STAGES[n].lasts(config)]

    before, todo = look()
    if not todo and all(folder.settled for folder, _, _ in before.values()):
        for name in names:
            console.print(f"{name}: cached", highlight=False)
        return
    fabric = make_fabric(config.fabric)
    if not fabric.is_global_zero:
        console.quiet = True
    shop = Workshop(config, fabric, console)
    if fabric.world_size > 1:
        on_first(fabric, lambda: shop.data)  # one of them may have to download it
    _try_weights(shop, (before[name][1] for name in todo))
    if "evaluate" in todo and config.evaluate.classifier:
        load_own(config.evaluate.classifier, shop.data, torch.device("cpu"))
    if "train-encoder" in todo and config.encoder.own_classifier:
        load_own(config.encoder.own_classifier, shop.data, torch.device("cpu"), "encoder.classifier")
    run = RUNS / config.run
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(alone(run, StageError))
            for folder, _, _ in before.values():
                folder.settle()

        on_first(fabric, hold)
        before, todo = look()  # another command may have been at work until now
        fabric.barrier()
        for name in names:
            folder, plan, status = before[name]
            replace = force or STAGES[name].derived
            facts = folder.facts() or {}
            remade = folder.made_anew(plan, facts)  # perhaps by this very command
            if remade and not replace:
                raise _outdated(name, folder, plan, facts)
            if name in todo or remade:
                # What is finished and current is made anew, parts of what is stale may still hold.
                anew = status == "cached"
                previous = None if anew or remade else folder.done
                _run_stage(shop, name, folder, plan, previous, force=replace, remake=remake or anew)
            else:
                console.print(f"{name}: cached", highlight=False)


def _try_weights(shop: Workshop, plans: Iterable[Plan]) -> None:
    """Raise for a folder of weights that a setting of these plans names and that does not fit the data."""
    named = {key: folder for plan in plans for key, folder in weights_of(plan.config).items()}
    for key, folder in named.items():
        if key.endswith("filter"):
            load_own_filter(folder, shop.data.image_shape, torch.device("cpu"))
        else:
            load_own_classifier(folder, shop.data, torch.device("cpu"))


def _run_stage(
    shop: Workshop,
    name: str,
    folder: StageFolder,
    plan: Plan,
    previous: Path | None,
    *,
    force: bool,
    remake: bool,
) -> None:
    fabric, console = shop.fabric, shop.console
    if on_first(fabric, lambda: folder.open(plan, force=force, remake=remake)) is False:
        console.print(f"{name}: {STAGES[name].summary} …", highlight=False)
    inputs = {needed: folder.run / needed for needed in plan.inputs}
    context = Context(shop, name, folder.part, inputs, previous)
    started = time.perf_counter()
    try:
        metrics = STAGES[name].run(context)
    except OSError as error:
        if error.filename is not None:
            raise
        # A full disk, for one: whoever wrote knew no name.
        raise StageError(f"{folder.part}: {error.strerror or error}") from None
    finally:
        context.close()
        if fabric.is_global_zero:
            seconds = folder.spent(time.perf_counter() - started)
    fabric.barrier()

    def commit() -> None:
        devices = {
            "device": str(fabric.device),
            "processes": fabric.world_size,
            "precision": shop.config.fabric.precision,
        }
        folder.commit(plan, metrics, seconds, devices)
        console.print(", ".join([f"{name}: done in {seconds:.0f} s", *figures(metrics)]), highlight=False)

    on_first(fabric, commit)
