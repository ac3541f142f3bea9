"""What an evaluation has found so far, kept job by job, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manifold_defense.evaluation import Defence, Job, Outcome
from pipelines.files import whole


@dataclass
class JobStore:
    """Finished jobs, a file each, so that an interrupted evaluation goes on where it stopped.

    The first process reads and writes; the others are told, lest they disagree on what is still to do.
    """

    folder: Path
    fabric: Fabric
    digest: str

    def __post_init__(self) -> None:
        if self.fabric.is_global_zero:
            self.folder.mkdir(exist_ok=True)

    def _path(self, job: Job) -> Path:
        facts = f"{self.digest} {job.name} {job.threat!r} {job.attack!r}"
        return self.folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"

    def get(self, job: Job, met: Tensor) -> Outcome | None:
        """What an interrupted run found for the job; one damaged or of other images is done again."""
        return self.fabric.broadcast(self._read(job, met) if self.fabric.is_global_zero else None)

    def _read(self, job: Job, met: Tensor) -> Outcome | None:
        try:
            outcome = Outcome(**load_file(self._path(job)))
        except (FileNotFoundError, SafetensorError, TypeError):
            return None
        return outcome if torch.equal(outcome.met, met) else None

    def put(self, job: Job, outcome: Outcome) -> None:
        if not self.fabric.is_global_zero:
            return
        with whole(self._path(job)) as partial:
            save_file({name: value.contiguous() for name, value in outcome._asdict().items()}, partial)


def digest_of(defences: list[Defence], x: Tensor) -> str:
    """Of all weights and settings of filters, and of the answers to images x (N, C, H, W) and some like them.

    Results of others are not these defences': a user's code may change under the same weights. Answers
    and their gradients count by a random projection to four digits, lest the rounding of a GPU, which
    differs from call to call, be taken for another model.
    """
    digest = hashlib.sha256()
    noisy = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    asked = torch.cat([x, 1 - x, (x + x.flip(0)) / 2, noisy.clamp(0, 1)]).detach()

    def answered(value: Tensor) -> None:
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(f"{float((weights * value.detach().cpu().double()).sum()):.4g} ".encode())

    for defence in defences:
        if isinstance(defence.model, nn.Module):
            for value in defence.model.state_dict().values():
                if isinstance(value, Tensor) and value.layout == torch.strided:  # else its answers tell
                    plain = value.dequantize() if value.is_quantized else value
                    raw = plain.detach().cpu().contiguous().flatten().view(torch.uint8)
                    digest.update(raw.numpy().tobytes())
        filter = getattr(defence.model, "filter", None)
        digest.update(repr((getattr(filter, "config", None), defence.draws)).encode())
        images = asked.clone().requires_grad_(True)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # for models that draw
            logits = defence.strongest(images)
        answered(logits)
        if logits.requires_grad:
            (slope,) = torch.autograd.grad(logits.square().sum(), images, allow_unused=True)
            answered(torch.zeros_like(images) if slope is None else slope)
    return digest.hexdigest()[:16]
