"""The usual and the replaced form of each function, on random images: see :mod:`benchmarks.replaced`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.integrations.backdoorbench.accelerated import abl, clp, entropy, evaluation, nad, npd, sau
from bdfast.testing.timing import Step
from benchmarks.replaced.part import Setting

MEAN, STD = bdfast.data.normalization("cifar10")
CLASSES = 10


def network(setting: Setting) -> nn.Module:
    """In eval mode, with batch norms that are no identities."""
    side = setting.sizes.side
    net = bdfast.models.build(setting.sizes.network, num_classes=CLASSES, image_size=(side, side), channels=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.to(setting.device, setting.dtype).eval()


def triggered(setting: Setting) -> TensorDataset:
    """5-tuples on the host, as BackdoorBench's data sets yield them."""
    count, side = setting.sizes.images, setting.sizes.side
    labels = torch.randint(1, CLASSES, (count,))
    images = torch.rand(count, 3, side, side).to(setting.dtype)
    return TensorDataset(images, torch.zeros_like(labels), torch.arange(count), torch.ones(count), labels)


# --- ABL -------------------------------------------------------------------------------------------------------------


def ranking(setting: Setting) -> tuple[Step, Step]:
    """The isolation order."""
    net, data, args = network(setting), triggered(setting), SimpleNamespace(device=setting.device)
    return partial(abl.plain_compute_loss_value, args, data, net), partial(abl.compute_loss_value, args, data, net)


def loss(usual: Callable[..., Tensor], ours: Callable[..., Tensor], setting: Setting) -> tuple[Step, Step]:
    """Value and gradient of one of the two losses."""
    logits = setting.randn(setting.sizes.batch, CLASSES).requires_grad_()
    target = torch.randint(CLASSES, (setting.sizes.batch,)).to(setting.device)
    module = SimpleNamespace(criterion=nn.CrossEntropyLoss(), gamma=0.5, flooding=0.5)

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        value = function(module, logits, target)
        return [value.detach(), *torch.autograd.grad(value, logits)]

    return partial(both, usual), partial(both, ours)


# --- CLP -------------------------------------------------------------------------------------------------------------


def sweep(setting: Setting) -> tuple[Step, Step]:
    """CLP at every threshold, each on a copy, as its script does; nothing is kept from the sweep before."""
    net = network(setting)

    def prune_all(prune: Callable[[nn.Module, float], None]) -> list[list[Tensor]]:
        clp.clear_cache()
        scales = []
        for u in thresholds(setting):
            pruned = copy.deepcopy(net)
            prune(pruned, u)
            scales.append([m.weight.detach() for m in pruned.modules() if isinstance(m, nn.BatchNorm2d)])
        return scales

    return partial(prune_all, clp.plain_CLP_prune), partial(prune_all, clp.CLP_prune)


def sweep_at_once(setting: Setting) -> tuple[Step, Step]:
    """The same channels, by the function that is there for a sweep."""
    state = torch.get_rng_state()
    usual, _ = sweep(setting)
    torch.set_rng_state(state)
    net = network(setting)

    def ours() -> list[dict[str, Tensor]]:
        clp.clear_cache()
        return clp.clp_sweep(net, thresholds(setting))

    return usual, ours


def thresholds(setting: Setting) -> list[float]:
    """From 0 to 10."""
    last = setting.sizes.thresholds - 1
    return [10 * i / max(last, 1) for i in range(last + 1)]


# --- EP --------------------------------------------------------------------------------------------------------------


def entropies(setting: Setting) -> tuple[Step, Step]:
    """The measure of a layer of 256 channels over two batches."""
    x = setting.randn(256, 2 * setting.sizes.batch)
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return partial(entropy.plain_batch_entropy, z), partial(entropy.batch_entropy, z)


def pruning(setting: Setting) -> tuple[Step, Step]:
    """The whole defense on one batch; what it prunes a first time it prunes again."""
    sizes, args = setting.sizes, SimpleNamespace(device=setting.device)
    batch = [(torch.rand(sizes.batch, 3, sizes.side, sizes.side).to(setting.dtype),)]
    first = network(setting)
    second = copy.deepcopy(first)

    def prune(function: Callable[..., None], net: nn.Module) -> list[list[Tensor]]:
        function(net, 3.0, batch, args)
        return [[m.weight.detach() for m in net.modules() if isinstance(m, nn.BatchNorm2d)]]

    return partial(prune, entropy.plain_EP_defense, first), partial(prune, entropy.EP_defense, second)


# --- SAU, NPD, NAD ---------------------------------------------------------------------------------------------------


def attack(setting: Setting) -> tuple[Step, Step]:
    """The inner loop on a batch; one that does not stop early."""
    model, reference, side = network(setting), network(setting), setting.sizes.side
    images = setting.rand(setting.sizes.attacked, 3, side, side)
    labels = model(images).argmax(1)
    attacker = sau.Shared_PGD(model, reference, step_size=0.01, init_type="zero")

    def usual() -> Tensor:
        pert = torch.zeros_like(images)
        sau.plain_steps(attacker, images, labels, pert)
        return pert

    return usual, partial(attacker.attack, images, labels)


def projections(norm: str, setting: Setting) -> tuple[Step, Step]:
    """A batch of perturbations outside a ball that shrinks with every call, so that all are scaled each time."""
    pert = setting.randn(setting.sizes.batch, 3, setting.sizes.side, setting.sizes.side)

    def step(function: Callable[[Any, Tensor, Any], Tensor]) -> Step:
        own, args = pert.clone(), SimpleNamespace(norm_type=norm, trigger_norm=1.0)

        def project() -> Tensor:
            args.trigger_norm *= 0.99
            return function(None, own, args)

        return project

    return step(npd.plain_projection), step(npd.projection)


class Normalize:
    """torchvision's transform of a batch: constants made anew for each."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (self.mean, self.std))
        return images.clone().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


class Compose:
    """Transforms one after the other."""

    def __init__(self, *transforms: Normalize) -> None:
        self.transforms = transforms

    def __call__(self, images: Tensor) -> Tensor:
        for transform in self.transforms:
            images = transform(images)
        return images


def perturbed(setting: Setting) -> tuple[Step, Step]:
    """Perturbed images, and the gradient of the perturbation."""
    images, pert, grad = (
        setting.randn(setting.sizes.batch, 3, setting.sizes.side, setting.sizes.side) for _ in range(3)
    )
    pert = (0.1 * pert).requires_grad_()
    to_pixels = Compose(Normalize([0] * 3, [1 / s for s in STD]), Normalize([-m for m in MEAN], [1] * 3))
    module = SimpleNamespace(denormalization=to_pixels, normalization=Normalize(MEAN, STD))

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(module, images, pert)
        return [y.detach(), *torch.autograd.grad(y, pert, grad)]

    return partial(both, npd.plain_get_perturbed_image), partial(both, npd.get_perturbed_image)


def attention(setting: Setting) -> tuple[Step, Step]:
    """The map of a stage of the network, forward and backward."""
    count, side = setting.sizes.batch // 4, setting.sizes.side // 2
    features = setting.randn(count, 256, side, side).requires_grad_()
    grad = setting.randn(count, 1, side, side)

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(SimpleNamespace(p=2), features)
        return [y.detach(), *torch.autograd.grad(y, features, grad)]

    return partial(both, nad.plain_attention_map), partial(both, nad.attention_map)


# --- the evaluation of all defenses ----------------------------------------------------------------------------------


def tested(setting: Setting) -> tuple[Step, Step]:
    """One pass over a test set."""
    net, loader, criterion = network(setting), DataLoader(triggered(setting), batch_size=100), nn.CrossEntropyLoss()

    def numbers(function: Callable[..., evaluation.Tested]) -> list[Tensor]:
        return [torch.tensor(list(function(net, loader, criterion, device=setting.device)[0].values()))]

    return partial(numbers, evaluation.plain_given_dataloader_test), partial(numbers, evaluation.given_dataloader_test)


def asr_and_ra(setting: Setting) -> tuple[Step, Step]:
    """ASR and RA of a triggered set: two passes, or one."""
    net, data, criterion = network(setting), triggered(setting), nn.CrossEntropyLoss()
    loader, swapped = DataLoader(data, batch_size=100), DataLoader(_by_true_class(data), batch_size=100)

    def numbers(metrics: Sequence[evaluation.Metrics]) -> list[Tensor]:
        return [torch.tensor([list(m.values()) for m in metrics])]

    def usual() -> list[Tensor]:
        test = evaluation.plain_given_dataloader_test
        return numbers([test(net, one, criterion, device=setting.device)[0] for one in (loader, swapped)])

    def ours() -> list[Tensor]:
        return numbers(evaluation.given_dataloader_test_asr_ra(net, loader, criterion, device=setting.device))

    return usual, ours


def evaluated(setting: Setting) -> tuple[Step, Step]:
    """ACC, ASR and RA after an epoch: three passes, or two."""
    net, data = network(setting), triggered(setting)
    clean, bd = (DataLoader(data, batch_size=100) for _ in range(2))
    swapped = DataLoader(_by_true_class(data), batch_size=100)
    args = SimpleNamespace(non_blocking=False, device=setting.device)

    def usual() -> list[Tensor]:
        criterion, test = nn.CrossEntropyLoss(), evaluation.plain_given_dataloader_test
        metrics = [test(net, loader, criterion, device=setting.device)[0] for loader in (clean, bd, swapped)]
        return [torch.tensor([m[name] for name in ("test_loss_avg_over_batch", "test_acc") for m in metrics])]

    def ours() -> list[Tensor]:
        return [torch.tensor(evaluation.eval_step(SimpleNamespace(args=args), net, clean, bd, args))]

    return usual, ours


def _by_true_class(data: TensorDataset) -> TensorDataset:
    """The same 5-tuples with the original labels in the attack labels' place: RA is the accuracy on these."""
    return TensorDataset(*(data.tensors[i] for i in (0, 4, 2, 3, 1)))
