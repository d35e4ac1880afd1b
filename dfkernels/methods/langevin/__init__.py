"""Langevin dynamics at one noise level, plain or preconditioned by the curvature of log q.

With the score s = grad log q and a positive definite M, a step of size h is

    x' = x + h M(x) s(x) + sqrt(2 h) M(x)^(1/2) xi,   xi ~ N(0, I)

In the unit of the noise, with the Fisher information F of log q, alpha, sigma and the posterior
covariance C at x, S = sigma^2 F = I - (alpha/sigma)^2 C, whose eigenvalues are at most 1 and may be
negative:

    preconditioner   M(x)/sigma^2                     a step costs
    "none"           I                                the score
    "gibbs"          2 I - S = I + (alpha/sigma)^2 C  the score, and products with F
    "damped"         (|S| + damping I)^(-1)           the score, and products with F
    "rank-one"       ((1 + damping) I - (alpha/sigma)^2 r r^T)^(-1), r = x0 - mean   the score
    "paper"          I, with the drift of the published code of LML                  the score

"gibbs" is the covariance of one sweep of Gibbs sampling, x' = alpha y + sigma xi with an atom y
drawn from its posterior at x; as a preconditioner it needs no parameter, and is positive definite
at every x. The sweep itself, which is exact and faster where there is a data set, is `gibbs`. |S|
has the moduli of the eigenvalues of S: a fixed small damping does not make S itself positive
definite. "rank-one" is the Levenberg-Marquardt step with the covariance that one endpoint x0
suggests. "paper" is LML as published (`printed_correction`): in exact arithmetic, "none".

Every M but "none" and "paper" depends on x, and the step leaves out the drift div M that this
asks for; so the law of long chains is off by more than that of plain Langevin. Only the Metropolis
step, which a data set allows, since its log q is exact, makes it right, at any step size.

Sources: Levenberg-Marquardt-Langevin (arXiv 2505.24222) and its code, whose correction this module
derives anew; Roberts & Stramer, Langevin diffusions and Metropolis-Hastings algorithms (2002), for
the position-dependent proposal and its ratio.
"""

from __future__ import annotations

from .chains import Chains
from .gibbs import gibbs
from .langevin import PRECONDITIONERS, langevin
from .printed_correction import printed_correction

__all__ = ["PRECONDITIONERS", "Chains", "gibbs", "langevin", "printed_correction"]
