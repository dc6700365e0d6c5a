r"""SAU's inner attack (Wei et al., NeurIPS 2023, arXiv 2307.10562): adversarial examples that two models share.

With p and q the class probabilities of the model and of its frozen reference on x + d, clamped from below by 1e-8, the
attack takes T signed steps down

.. math::

    \ell(d) = \frac1N \sum_i \Bigl( \beta_2 [\text{not shared}_i] \, \mathrm{JS}(p_i, q_i)
        - \frac{\beta_1}{2} \bigl( [\text{p keeps its label}]_i \, \mathrm{CE}(p_i, y_i)
        + [\text{q keeps its label}]_i \, \mathrm{CE}(q_i, y_i) \bigr) \Bigr),

where a sample is shared when both models leave their clean predictions for the same class, and projects d after each.
It stops after the step at whose start all samples were shared.

What the usual loop spends and this one does not: clean predictions of both models anew in every step, gradients of all
weights, the automatic derivative of the loss (in closed form, :math:`\partial\,\mathrm{JS}/\partial p =
\tfrac12 \log(p / \tfrac12(p + q))`), a wait for each of five conditions a step, and a loop over the
images of a batch to project them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.projection import plain_project_, project_
from bdfast.integrations.backdoorbench.accelerated.switch import reference_requested, switchable

SMALLEST = 1e-8  # probabilities are clamped from below

_ATTACK, _PROJECTION = "Shared_PGD.attack", "Shared_PGD.projection"
_INITIAL = ("zero", "random", "max", "min")


class Shared_PGD:
    """The attack, with the arguments of the usual one.

    Args:
        model: images to logits; in eval mode, on the device of the images.
        model_ref: the reference, in eval mode.
        beta_1: weight of the adversarial loss.
        beta_2: weight of the shared loss.
        norm_bound: radius of the ball, in the units of the perturbation.
        norm_type: ``"L_inf"``, ``"L1"``, ``"L2"``, or ``"Reg"`` for no projection.
        step_size: of a signed step.
        num_steps: T, at least 1.
        init_type: where d starts before its first projection: ``"max"`` (+bound everywhere), ``"min"``, ``"zero"`` or
            ``"random"`` (uniform in [0, 1)).
        loss_func: unused, as in the usual attack.
        pert_func: (images, d) to perturbed images, differentiable in d; None adds them.
        verbose: print what was reached.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        model_ref: nn.Module,
        beta_1: float = 0.01,
        beta_2: float = 1,
        norm_bound: float = 0.2,
        norm_type: str = "L_inf",
        step_size: float = 0.2,
        num_steps: int = 5,
        init_type: str = "max",
        loss_func: Any = None,
        pert_func: Callable[[Tensor, Tensor], Tensor] | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.model_ref = model_ref
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.norm_bound = norm_bound
        self.norm_type = norm_type
        self.step_size = step_size
        self.num_steps = num_steps
        self.init_type = init_type
        self.loss_func = loss_func
        self.pert_func = pert_func if pert_func is not None else torch.add
        self.verbose = verbose

    def projection(self, pert: Tensor) -> Tensor:
        """``pert``, projected in place on the ball of the norm."""
        return shared_pgd_projection(self, pert)

    def attack(self, images: Tensor, labels: Tensor, max_eps: Any = 1, min_eps: Any = 0) -> Tensor:
        """The perturbation of each image, ``[N, C, H, W]``, detached. See :func:`shared_pgd_attack`."""
        return shared_pgd_attack(self, images, labels, max_eps, min_eps)


def plain_shared_pgd_projection(self: Any, pert: Tensor) -> Tensor:
    """The usual loop."""
    return plain_project_(pert, self.norm_bound, self.norm_type, _PROJECTION)


@switchable(plain_shared_pgd_projection)
def shared_pgd_projection(self: Any, pert: Tensor) -> Tensor:
    """``Shared_PGD.projection`` for any attacker with ``norm_bound`` and ``norm_type``: in place, without a loop."""
    return project_(pert, self.norm_bound, self.norm_type, _PROJECTION)


def shared_pgd_attack(self: Any, images: Tensor, labels: Tensor, max_eps: Any = 1, min_eps: Any = 0) -> Tensor:
    """``Shared_PGD.attack`` for any attacker with the attributes of :class:`Shared_PGD`.

    Takes the steps of the usual attack in the same order. In float64 the perturbation is the same but where a gradient
    is 0 up to rounding, of which the sign is arbitrary; in float32 rounding decides more signs, and they feed back.
    Gradients of the models' parameters are neither made nor touched (the usual attack leaves some behind). Models in
    training mode, whose clean predictions differ from step to step, get the plain form.

    Args:
        self: the attacker.
        images: ``[N, C, H, W]``, as the models take them.
        labels: ``[N]`` int64.
        max_eps: unused, as in the usual attack.
        min_eps: unused, as in the usual attack.

    Raises:
        ValueError: an option of the attacker is unknown, or ``num_steps`` is less than 1.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> attacker = Shared_PGD(model, model, num_steps=2)
        >>> attacker.attack(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0])).abs().max() <= 0.2
        tensor(True)
    """
    _check(self)
    training = self.model.training or self.model_ref.training
    steps = plain_steps if training or reference_requested() else _steps
    pert = _initial(self, images)
    last = steps(self, images, labels, pert)
    if self.verbose:
        _report(last, pert)
    return pert


class Outcome(NamedTuple):
    """What a step saw before it changed the perturbation."""

    fooled: Tensor  # [N] bool
    fooled_ref: Tensor
    shared: Tensor
    loss: Tensor  # scalar


# --- the plain form --------------------------------------------------------------------------------------------------


def plain_steps(self: Any, images: Tensor, labels: Tensor, pert: Tensor) -> Outcome:
    """The usual loop: four forward passes and two whole backward passes a step."""
    for _ in range(self.num_steps):
        d = pert.clone().requires_grad_()
        clean, clean_ref = self.model(images).argmax(dim=1), self.model_ref(images).argmax(dim=1)
        logits, logits_ref = (m(self.pert_func(images, d)) for m in (self.model, self.model_ref))
        fooled, fooled_ref, shared = _conditions(logits, logits_ref, clean, clean_ref)
        p, q = (F.softmax(z, dim=1).clamp(min=SMALLEST) for z in (logits, logits_ref))
        mix = 0.5 * (p + q)
        js = 0.5 * (p * (p.log() - mix.log()) + q * (q.log() - mix.log())).sum(dim=1)
        kept = F.cross_entropy(logits, labels, reduction="none")[~fooled].sum()
        kept_ref = F.cross_entropy(logits_ref, labels, reduction="none")[~fooled_ref].sum()
        loss = (self.beta_2 * js[~shared].sum() - self.beta_1 / 2 * (kept + kept_ref)) / len(images)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            pert.sub_(self.step_size * cast(Tensor, d.grad).sign())
        plain_project_(pert, self.norm_bound, self.norm_type, _ATTACK)
        if bool(shared.all()):
            break
    return Outcome(fooled, fooled_ref, shared, loss.detach())


# --- the fast form ---------------------------------------------------------------------------------------------------


def _steps(self: Any, images: Tensor, labels: Tensor, pert: Tensor) -> Outcome:
    with _no_weight_gradients(self.model, self.model_ref):
        with torch.no_grad():
            clean, clean_ref = self.model(images).argmax(dim=1), self.model_ref(images).argmax(dim=1)
        for _ in range(self.num_steps):
            with torch.enable_grad():
                d = pert.detach().requires_grad_()
                perturbed = self.pert_func(images, d)
                logits, logits_ref = self.model(perturbed), self.model_ref(perturbed)
            outcome, grads = _loss_and_gradients(self, logits.detach(), logits_ref.detach(), labels, clean, clean_ref)
            (grad,) = torch.autograd.grad((logits, logits_ref), d, grads)
            pert.add_(grad.sign_(), alpha=-self.step_size)
            project_(pert, self.norm_bound, self.norm_type, _ATTACK)
            if bool(outcome.shared.all()):  # the one wait of a step
                break
    return outcome


@torch.no_grad()
def _loss_and_gradients(
    self: Any,
    logits: Tensor,  # [N, K]
    logits_ref: Tensor,  # [N, K]
    labels: Tensor,  # [N]
    clean: Tensor,  # [N]
    clean_ref: Tensor,  # [N]
) -> tuple[Outcome, tuple[Tensor, Tensor]]:
    fooled, fooled_ref, shared = _conditions(logits, logits_ref, clean, clean_ref)
    s, r = F.softmax(logits, dim=1), F.softmax(logits_ref, dim=1)
    p, q = s.clamp(min=SMALLEST), r.clamp(min=SMALLEST)
    log_mix = (p + q).mul_(0.5).log_()
    dp, dq = p.log().sub_(log_mix).mul_(0.5), q.log().sub_(log_mix).mul_(0.5)
    js = (p * dp).add_(q * dq).sum(dim=1)
    ce, ce_ref = (F.cross_entropy(z, labels, reduction="none") for z in (logits, logits_ref))
    js_weight = (~shared).to(s.dtype).mul_(self.beta_2 / len(s))
    weight, weight_ref = ((~f).to(s.dtype).mul_(self.beta_1 / 2 / len(s)) for f in (fooled, fooled_ref))
    loss = (js_weight * js).sum() - (weight * ce).sum() - (weight_ref * ce_ref).sum()
    grads = tuple(
        # Through the softmax: g * (d - sum of g * d), where the clamp lets the gradient of JS through.
        js_weight[:, None] * _through_softmax(g, d.mul_(g >= SMALLEST)) - w[:, None] * _minus_one_hot(g, labels)
        for g, d, w in ((s, dp, weight), (r, dq, weight_ref))
    )
    return Outcome(fooled, fooled_ref, shared, loss), cast(tuple[Tensor, Tensor], grads)


def _through_softmax(softmax: Tensor, grad: Tensor) -> Tensor:
    product = softmax * grad
    return product - softmax * product.sum(dim=1, keepdim=True)


def _minus_one_hot(softmax: Tensor, labels: Tensor) -> Tensor:
    return softmax.scatter_add(1, labels[:, None], softmax.new_full((len(labels), 1), -1.0))


@contextmanager
def _no_weight_gradients(*models: nn.Module) -> Iterator[None]:
    """Inside, only what comes in has a gradient: a third of the work of a backward pass less."""
    parameters = {p for model in models for p in model.parameters() if p.requires_grad}
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


# --- both ------------------------------------------------------------------------------------------------------------


def _conditions(
    logits: Tensor, logits_ref: Tensor, clean: Tensor, clean_ref: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # [N] bool each
    now, now_ref = logits.argmax(dim=1), logits_ref.argmax(dim=1)
    fooled, fooled_ref = now != clean, now_ref != clean_ref
    return fooled, fooled_ref, fooled & fooled_ref & (now == now_ref)


def _initial(self: Any, images: Tensor) -> Tensor:
    if self.init_type == "random":
        start = torch.rand_like(images)
    else:
        start = torch.full_like(images, {"zero": 0.0, "max": self.norm_bound, "min": -self.norm_bound}[self.init_type])
    return project_(start, self.norm_bound, self.norm_type, _ATTACK)


def _check(self: Any) -> None:
    if self.init_type not in _INITIAL:
        expected = f"one of {', '.join(_INITIAL)}"
        raise ValueError(message(_ATTACK, "init_type", expected, repr(self.init_type), "correct it"))
    if self.num_steps < 1:
        raise ValueError(message(_ATTACK, "num_steps", "at least 1", str(self.num_steps), "pass e.g. 5"))


def _report(outcome: Outcome, pert: Tensor) -> None:
    fooled, fooled_ref, shared = outcome.fooled, outcome.fooled_ref, outcome.shared
    counts = [int(mask.sum()) for mask in (fooled, fooled_ref, fooled & fooled_ref, shared)]
    largest = float(pert.abs().amax()) if pert.numel() else 0.0
    print(
        f"shared PGD: of {len(pert)} samples {counts[0]} fool the model, {counts[1]} the reference, {counts[2]} both, "
        f"{counts[3]} in the same way; loss {float(outcome.loss):.4f}, largest change {largest:.4f}"
    )
