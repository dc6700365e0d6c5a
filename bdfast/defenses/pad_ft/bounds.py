r"""Step 2 of PAD-FT: upper bounds on activations, trained on the selected samples (MM-BD's activation clipping).

.. math::

    L(Z) = \mathbb{E}\,(f_Z(x) - f(x))^2 + \lambda \sum_l \lVert z_l \rVert_2
           \;[\,- \gamma\, \mathbb{E}_{\mathrm{suspects}} \log(1 - p_y)\,]

Only Z is trained; f(x) is constant and computed once; backward ends at the first bound. lambda grows while the selected
samples stay correct and shrinks where they do not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdfast.defenses.pad_ft.config import PadFTConfig
from bdfast.errors import message
from bdfast.nn import ClippedReLU
from bdfast.runtime.cpu_graph import for_cpu
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.folding import fold
from bdfast.runtime.graphed import Replayed
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.progress import Record
from bdfast.runtime.resident import ResidentData

MOST_ABOVE_OBSERVED = 1000.0  # Adam moves a bound by about clip_lr a step: from further up it never comes down


class Suspects(NamedTuple):
    """The samples whose labels are to be unlearned."""

    inputs: Tensor  # [S, ...], images in [0, 1] for step 2, features for step 3
    labels: Tensor  # [S] int64

    def shares(self, steps: int, seed: int) -> Iterator[Suspects]:
        """All of them, shuffled and spread over the steps of an epoch.

        Example:
            >>> [len(share.labels) for share in Suspects(torch.zeros(5, 2), torch.zeros(5).long()).shares(2, 0)]
            [3, 2]
        """
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        for index in torch.split(order.to(self.labels.device), -(-len(order) // steps)):
            yield Suspects(self.inputs[index], self.labels[index])


def observe(
    forward: nn.Module, sites: Mapping[str, ClippedReLU], data: ResidentData, batch_size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The largest activation of each channel, float32 ``[C]`` by site, and the logits ``[N, K]``, without bounds."""
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            here = output.detach().float().transpose(0, 1).flatten(1).amax(1)
            largest[name] = torch.maximum(largest[name], here) if name in largest else here

        return watch

    handles = [site.register_forward_hook(hook(name)) for name, site in sites.items()]  # type: ignore[arg-type]
    try:
        logits = predict(forward, data, batch_size)
    finally:
        for handle in handles:
            handle.remove()
    return {name: largest[name] for name in sites if name in largest}, logits


@torch.no_grad()
def predict(forward: nn.Module, data: ResidentData, batch_size: int) -> Tensor:
    """Logits of all samples in index order."""
    batches = data.batches(batch_size, shuffle=False, epoch_seed=0)
    return torch.cat([logits_of("pad_ft", forward(x), len(x)) for x, _, _ in batches])


def starting_bounds(observed: Mapping[str, Tensor], init: object) -> dict[str, Tensor]:
    """z before training, float32 ``[C]`` by site; see :attr:`PadFTConfig.init`.

    Raises:
        ValueError: a number more than 1000 times the largest activation of a site.

    Example:
        >>> starting_bounds({"relu": torch.tensor([1.0, 4.0])}, "observed")
        {'relu': tensor([4., 4.])}
    """
    if init == "channel":
        return {name: z.clone() for name, z in observed.items()}
    if init == "observed":
        return {name: z.max().expand_as(z).clone() for name, z in observed.items()}
    assert isinstance(init, (int, float))
    for name, z in observed.items():
        most = MOST_ABOVE_OBSERVED * float(z.max())
        if init > most:
            expected = f"at most {MOST_ABOVE_OBSERVED:g} times the largest activation of `{name}`, {most:g}"
            raise ValueError(message("pad_ft", "init", expected, f"{init:g}", 'pass "observed"'))
    return {name: torch.full_like(z, float(init)) for name, z in observed.items()}


def frozen_copy(
    forward: nn.Module,
    bounds: Mapping[str, Tensor],
    example: Tensor,  # [n, C, H, W]
) -> nn.Module:
    """The clipped network in eval mode, rewritten to run fast; it shares the bounds, and nothing else.

    Batch norms are folded into the convolutions before them where that is exact (:mod:`bdfast.runtime.folding`), and
    convolutions run channels_last, on a CPU as :mod:`bdfast.runtime.winograd` has them.
    """
    work = copy.deepcopy(forward, {id(z): z for z in bounds.values()})
    frozen, _ = fold(nn.Sequential(_ChannelsLast(), work).eval(), example)
    frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return for_cpu(frozen, example)[0] if example.is_cpu else frozen


class _ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def fit_bounds(
    forward: nn.Module,
    bounds: Mapping[str, Tensor],
    data: ResidentData,
    reference: Tensor,  # [N, K] logits without bounds
    suspects: Suspects | None,
    config: PadFTConfig,
) -> Iterator[Record]:
    """Train the bounds in place, a record an epoch; ``keep="best"`` puts the best ones in place at the end.

    Args:
        forward: the clipped network in eval mode, in which nothing but ``bounds`` requires grad.
        bounds: ``[C]`` by site, leaves.
        data, reference: the selected samples.
        suspects: their images; None where there are none, or their weight is 0.
        config: of the run.

    Yields:
        ``loss`` (the objective, mean of the epoch), ``accuracy`` (as met in training), ``kept_accuracy`` (at the end of
        the epoch, with keep="best"), ``lam``, ``norm`` by site, ``seconds``.

    Raises:
        FloatingPointError: the objective or a bound was no longer finite at the end of an epoch.
    """
    z = list(bounds.values())
    step = _clip_step(forward, z, config, data.device)
    best = _Best(forward, z, data, suspects, config) if config.keep == "best" else None
    lam = config.lam
    for epoch in range(config.clip_epochs):
        start = time.perf_counter()
        loss, accuracy = _clip_epoch(step, data, reference, suspects, lam, epoch, config)
        if not torch.isfinite(torch.cat([b.detach().flatten() for b in z])).all() or not -1e38 < loss < 1e38:
            got = f"a loss of {loss:g} or bounds that are not finite in epoch {epoch + 1} of clipping"
            raise FloatingPointError(message("pad_ft", "model", "finite numbers", got, "lower clip_lr"))
        record: Record = {"loss": loss, "accuracy": accuracy, "lr": config.clip_lr, "lam": lam}
        if best is not None:
            record["kept_accuracy"] = best.consider()
        record["norm"] = {name: float(b.detach().norm()) for name, b in bounds.items()}
        yield {**record, "seconds": time.perf_counter() - start}
        if epoch > config.lam_start and epoch % config.lam_every == 0:
            lam = lam * config.lam_factor if 100 * accuracy >= config.target_accuracy else lam / config.lam_factor
    if best is not None:
        best.restore()


def _clip_step(forward: nn.Module, z: list[Tensor], config: PadFTConfig, device: torch.device) -> Replayed:
    """A step of Adam on the bounds; on a GPU it is captured, and replayed from then on."""
    optimizer = torch.optim.Adam(z, lr=config.clip_lr, capturable=device.type == "cuda")

    def take(
        x: Tensor,  # [B, C, H, W]
        y: Tensor,  # [B]
        reference: Tensor,  # [B, K]
        lam: Tensor,  # []
        *share: Tensor,  # images and labels of suspects
    ) -> Tensor:
        """The objective and the number of correct samples, ``[2]``."""
        logits = logits_of("pad_ft", forward(x), len(x))
        loss = F.mse_loss(logits.float(), reference.float())
        loss = loss + lam * torch.stack([torch.linalg.vector_norm(b) for b in z]).sum()
        if share:
            images, labels = share
            loss = loss + config.suspect_weight * unlikelihood(forward(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for b in z:
                b.clamp_(min=0)
        return torch.stack((loss.detach(), (logits.detach().argmax(1) == y).sum().to(loss.dtype)))

    return Replayed(take, device)


def _clip_epoch(
    step: Replayed, data: ResidentData, reference: Tensor, suspects: Suspects | None, lam: float, epoch: int,
    config: PadFTConfig,
) -> tuple[float, float]:  # fmt: skip
    """Mean objective and accuracy, read back once, at the end."""
    seed = stream_seed(config.seed, f"pad_ft: clipping, epoch {epoch}")
    total = torch.zeros(2, dtype=torch.float64, device=data.device)
    weight = torch.tensor(lam, dtype=torch.float32, device=data.device)
    shares = iter(()) if suspects is None else suspects.shares(data.num_batches(config.clip_batch_size), seed)
    for x, y, index in data.batches(config.clip_batch_size, shuffle=True, epoch_seed=seed):
        loss, correct = step(x, y, reference[index], weight, *next(shares, ())).double()
        total += torch.stack((loss * len(x), correct))
    mean, accuracy = (total / len(data)).tolist()
    return mean, accuracy


def unlikelihood(
    output: object,  # logits [B, K], or with .logits
    target: Tensor,  # [B]
) -> Tensor:
    r"""Mean of :math:`-\log(1 - p_y) = \log(1 + e^{z_y - \mathrm{logsumexp}_{j \ne y} z_j})`, exact where p_y is 1.

    Example:
        >>> unlikelihood(torch.tensor([[0.0, 0.0], [200.0, 0.0]]), torch.tensor([0, 0]))
        tensor(100.3466)
    """
    logits = logits_of("pad_ft", output, len(target)).float()
    others = logits.masked_fill(F.one_hot(target, logits.shape[1]).bool(), -float("inf")).logsumexp(1)
    return F.softplus(logits.gather(1, target[:, None]).squeeze(1) - others).mean()


class _Best:
    """The bounds that suppress most while the selected samples stay correct; the start is one candidate."""

    def __init__(
        self, forward: nn.Module, z: list[Tensor], data: ResidentData, suspects: Suspects | None,
        config: PadFTConfig,
    ) -> None:  # fmt: skip
        self._forward, self._z, self._data, self._config = forward, z, data, config
        self._suspects = suspects
        self._score = float("inf")
        self._bounds = [b.detach().clone() for b in z]
        self.consider()

    @torch.no_grad()
    def consider(self) -> float:
        """Accuracy on the selected samples with the bounds as they are; remembers them where they are the best."""
        logits = predict(self._forward, self._data, self._config.score_batch_size)
        accuracy = float((logits.argmax(1) == self._data.labels).double().mean())
        if 100 * accuracy >= self._config.target_accuracy:
            score = self._suppression()
            if score < self._score:
                self._score, self._bounds = score, [b.detach().clone() for b in self._z]
        return accuracy

    def _suppression(self) -> float:
        if self._suspects is None:
            return float(torch.stack([torch.linalg.vector_norm(b) for b in self._z]).sum())
        parts = torch.split(self._suspects.inputs, self._config.score_batch_size)
        logits = torch.cat([logits_of("pad_ft", self._forward(x), len(x)) for x in parts])
        return float(unlikelihood(logits, self._suspects.labels))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best bounds in place."""
        for b, value in zip(self._z, self._bounds, strict=True):
            b.copy_(value)
