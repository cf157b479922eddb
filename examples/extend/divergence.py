"""Adds Amari's alpha-divergence, which lies between the reverse KL (alpha 0) and the forward KL (alpha 1).

[objective]
support = "full"

[objective.terms.main]
loss = "divergence"
divergence = "examples.extend.divergence:ALPHA"
parameter = 0.5
"""

from torch import Tensor

from learner.loss.divergences import Divergence


def alpha_divergence(d: Tensor, alpha: float) -> Tensor:
    """Return phi of (sum of p^(1 - alpha) q^alpha - 1) / (alpha (alpha - 1)), where d = log q - log p."""
    return (alpha * d).expm1() / (alpha * (alpha - 1))


# At both ends the formula divides 0 by 0; its limits have a name in the table.
ALPHA = Divergence(alpha_divergence, ends={0.0: "reverse_kl", 1.0: "forward_kl"})
