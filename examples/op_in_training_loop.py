"""One op in a training loop of your own: hinge_cross_entropy, on every backend that runs here.

    python examples/op_in_training_loop.py

The loss counts only above a margin, so that training stops pulling where the data are fitted well enough. Prints the
loss that each backend reaches, and how far its weights are from those of the reference: rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bdfast

MARGIN = 0.1  # nats


def train(backend: str, x: Tensor, y: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """A plain loop; the backend is the only thing that differs."""
    model = nn.Linear(x.shape[1], 10, device=device)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(50):
        loss = bdfast.ops.hinge_cross_entropy(model(x), y, MARGIN, backend=backend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.weight.detach(), loss.item()


def main() -> None:
    """Every backend, in turn."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (images, labels), _, _ = bdfast.data.load("digits", limit=(256, 1))
    x, y = images.to(device).flatten(1).float() / 255, labels.to(device)

    choice = bdfast.explain("hinge_cross_entropy", device=device)
    print(choice)  # what "auto" takes, and why not the others
    reference, _ = train("reference", x, y, device)
    for backend, reason in choice.reasons.items():
        if reason is not None:
            print(f"{backend:<9} left out: {reason}")
            continue
        weight, loss = train(backend, x, y, device)
        distance = (weight - reference).norm() / reference.norm()
        print(f"{backend:<9} loss {loss:.6f}, weights {distance:.1e} from the reference")


if __name__ == "__main__":
    main()
