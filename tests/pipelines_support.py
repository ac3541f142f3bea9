"""The command line in a test, and settings that make a whole run small."""

import json

from click.testing import CliRunner

from pipelines.cli import main

SMALL = (
    "data.train_images=300",
    "data.test_images=40",
    "gan.images=640",
    "gan.network.latent_dim=8",
    "gan.network.generator_width=4",
    "gan.network.critic_width=4",
    "gan.network.encoder_width=4",
    "encoder.images=640",
    "classifier.architecture.width=8",
    "classifier.training.images=3_200",
    "harden.training.images=1_280",
    "harden.objective.steps=2",
    "projection.steps=3",
    "certify.images=6",
    "certify.smoothing.draws=20",
    "certify.smoothing.selection=10",
    "evaluate.images=20",
    "evaluate.batch_size=7",
    "evaluate.checks=4",
    # Not noise: of what draws at each call checks take longest; tests/pipelines/test_own.py has it.
    'evaluate.baselines=["binarise","encoder"]',
    'evaluate.attacks=[{name="noise",steps=2},{name="fgsm"},{name="pgd",steps=3,loss="both",restarts=2,'
    'views=["unaware","start","identity","tangent","exact"]},'
    '{name="window_pgd",steps=2,restarts=4,tries=2,rounds=3,views=["exact"]},'
    '{name="cw",steps=3,restarts=1,views=["exact"]},{name="square",steps=5}]',
)

# Of an evaluation that is made several times.
FEWER = (
    "evaluate.baselines=[]",
    "evaluate.mixed=0",
    "evaluate.reject=0",
    'evaluate.threats=[{norm="linf",eps=0.15}]',
)


def settings(*more, without=None):
    """Options of the small settings and of `more`; those of one table are left out for a file to give."""
    kept = [s for s in SMALL if without is None or not s.startswith(without)]
    return [part for setting in (*kept, *more) for part in ("--set", setting)]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def rows(folder):
    """Of the table that a run in this folder ended with."""
    return json.loads((folder / "evaluate" / "stage.json").read_text())["metrics"]["rows"]
