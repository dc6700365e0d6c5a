"""What a defence is judged by. Every rate is a fraction in [0, 1], never a percentage.

* ACC: accuracy on clean test images.
* ASR: fraction of triggered test images classified as the attack label, among those of another true class.
* RA: fraction of the same images classified as their true class, hence ASR + RA <= 1.
* DER = (max(0, ASR0 - ASR1) - max(0, ACC0 - ACC1) + 1) / 2, from before (0) to after (1) a defence (D3, Eq. 5).
* RIR = (max(0, RA1 - RA0) - max(0, ACC0 - ACC1) + 1) / 2, the same for RA.

A row of logits that holds a NaN or an infinity is classified as -1, so that it counts as wrong everywhere; equal logits
go to the lowest class. Where nothing counts, a rate is NaN and a warning says so.
"""

from __future__ import annotations

from bdfast.metrics.evaluation import Predictions, evaluate, predict
from bdfast.metrics.rates import accuracy, attack_success_rate, robust_accuracy
from bdfast.metrics.ratings import Metrics, defense_effectiveness_rating, robust_improvement_rating

__all__ = [
    "Metrics",
    "Predictions",
    "accuracy",
    "attack_success_rate",
    "defense_effectiveness_rating",
    "evaluate",
    "predict",
    "robust_accuracy",
    "robust_improvement_rating",
]
