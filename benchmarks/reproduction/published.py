"""Figures of the papers, in percent, as published: ACC, ASR and, where it is given, DER.

====== ==================================================== =======================================================
table  source                                               setting
====== ==================================================== =======================================================
d3     arXiv 2411.09585, Table 1                            PreAct-ResNet18, 10 % poison, target 0, 5 % reserve
pad-ft arXiv 2409.12072, Tables I and II                    PreAct-ResNet18; 10 % and 5 % by comparison with
                                                            BackdoorBench's figures, the text leaves it blank
advrbd arXiv 2405.12719, Tables II to IV                    ResNet18, 5 % poison, target 1
====== ==================================================== =======================================================

The text of GIC (arXiv 2502.07231) that is available has no table.
"""

from __future__ import annotations

Figures = tuple[float, ...]  # ACC, ASR[, DER]

D3: dict[str, dict[str, Figures]] = {
    "badnets": {"none": (91.32, 95.03), "ft": (89.96, 1.48), "ft-sam": (91.49, 2.28), "d3": (90.77, 0.74, 96.87)},
    "blended": {"none": (93.47, 99.92), "ft": (92.78, 96.11), "ft-sam": (92.67, 11.61), "d3": (92.29, 0.22, 99.26)},
    "wanet": {"none": (91.25, 89.73), "ft": (93.48, 17.10), "ft-sam": (93.66, 1.31), "d3": (93.31, 0.04, 94.84)},
    "sig": {"none": (84.48, 98.27), "ft": (90.80, 2.37), "ft-sam": (91.13, 0.57), "d3": (89.99, 0.00, 99.13)},
    "input_aware": {"none": (90.67, 98.26), "ft": (93.12, 1.72), "ft-sam": (93.50, 1.54), "d3": (92.96, 0.06, 99.10)},
    "ssba": {"none": (92.88, 97.86), "ft": (92.14, 74.79), "ft-sam": (92.12, 3.20), "d3": (91.85, 0.81, 98.01)},
    "lf": {"none": (93.19, 99.28), "ft": (92.37, 78.44), "ft-sam": (92.68, 6.89), "d3": (92.37, 1.31, 98.57)},
}

PAD_FT: dict[float, dict[str, dict[str, Figures]]] = {
    0.1: {
        "badnets": {"none": (91.82, 93.79), "pad": (83.28, 28.13), "pad-ft": (85.34, 6.62)},
        "blended": {"none": (93.69, 99.76), "pad": (82.97, 28.47), "pad-ft": (83.40, 6.56)},
        "wanet": {"none": (90.57, 96.93), "pad": (84.84, 20.18), "pad-ft": (86.86, 8.92)},
    },
    0.05: {
        "badnets": {"none": (92.35, 89.52), "pad": (85.73, 12.40), "pad-ft": (82.46, 8.36)},
        "blended": {"none": (93.76, 99.31), "pad": (85.09, 9.55), "pad-ft": (81.09, 7.44)},
        "wanet": {"none": (91.45, 99.98), "pad": (86.36, 13.11), "pad-ft": (86.03, 10.50)},
    },
}

ADVRBD: dict[str, dict[str, Figures]] = {
    "badnets": {"none": (92.00, 95.20), "advrbd": (85.72, 0.00), "advrbd+relabel": (86.81, 0.00)},
    "blended": {"none": (84.50, 99.90), "advrbd": (85.71, 0.00), "advrbd+relabel": (87.03, 0.00)},
    "sig": {"none": (84.70, 95.40), "advrbd": (87.69, 2.64), "advrbd+relabel": (86.59, 0.22)},
    "wanet": {"none": (82.80, 51.30), "advrbd": (83.63, 0.00), "advrbd+relabel": (86.92, 0.00)},
    "physical_ba": {"none": (91.60, 100.0), "advrbd": (82.97, 0.00), "advrbd+relabel": (83.52, 0.00)},
    "tact": {"none": (82.10, 63.20), "advrbd": (82.42, 0.00), "advrbd+relabel": (86.92, 0.00)},
    "adaptive_blend": {"none": (84.00, 53.30), "advrbd": (83.30, 0.00), "advrbd+relabel": (89.12, 0.00)},
    "adaptive_patch": {"none": (84.80, 37.30), "advrbd": (82.86, 0.00), "advrbd+relabel": (86.26, 0.00)},
}
