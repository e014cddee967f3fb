"""Optimal transport of a picture's patches to concepts, in batches of pictures.

Patches x[m] of weight a[m] are carried to the variants z[i, n] of categories i at the cost
1 - cos(x[m], z[i, n]).  GuardAlign (arXiv:2602.24027, section 3.1) solves one balanced problem for
every category (Eq. 8) and scores a patch by what carrying it costs, summed over all categories
(Eq. 9); a low score is unsafe (Eq. 10).  By the row marginal of Eq. 8 that sum is a[m] times C
costs that are nearly alike, so it ranks patches by a[m], which by Eq. 7 is their entropy: hardly by
what they show.  What remains if the weight is divided out is hardly more than a cosine.

Ours lets harmless concepts compete in one joint problem and scores by the mass that goes to them
against the mass that goes to unsafe ones, which no weight enters.  It also drops the marginal of
the concepts (``column_penalty`` 0): a balanced plan must use every concept as often as the others,
in a picture that shows one of them.  The plan then is a softmax of the costs, and a good part of
what was gained over the paper is gained by leaving its transport.  Stage ``measure_detection``
repeats the comparison on the lab's pool ``calibration``, from 2 x 2 patches on, and the report
shows it: a joint problem without the marginal ranks toxic patches before harmless ones more often
than the equations as printed do, a balanced one less often once patches are many.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hauberk.concepts import ConceptBank

Weights = Literal["as_printed", "low_entropy", "uniform"]
Problem = Literal["per_category", "joint"]
Score = Literal["raw", "per_mass_mean", "per_mass_min", "log_odds"]
Solver = Literal["bmm", "pot"]
Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class Transport:
    """How patches are scored.  The defaults are ours.

    Raises
    ------
    ValueError
        If a number is out of range, or the solver cannot solve the problem.
    """

    weights: Weights = "uniform"
    """a[m]: ``as_printed`` (Eq. 7: exp of the entropy, so that unsure patches weigh more),
    ``low_entropy`` (the sentence below Eq. 7, of the opposite sign), or all alike."""
    problem: Problem = "joint"
    """One problem for every category (Eq. 8), or one with all of them."""
    score: Score = "log_odds"
    """``raw``: Eq. 9.  ``per_mass_mean``: divided by the mass.  ``per_mass_min``: that of the
    nearest category.  ``log_odds``: harmless against unsafe; the reference concepts compete in it,
    and in it alone."""
    column_penalty: float = 0.0
    """How much the concepts' marginal counts, as the weight of its Kullback-Leibler divergence
    (Chizat et al., "Scaling algorithms for unbalanced optimal transport problems", 2018): inf for
    balanced as in Eq. 8, 0 for not at all."""
    epsilon: float = 0.02
    """Of the entropic term; the paper has one and does not give it.  At 0.1, as in AWT, whose code
    has the same structure, a plan is nearly the product of its marginals."""
    iterations: int = 200
    """Of Sinkhorn's algorithm; without a column penalty none are needed."""
    solver: Solver = "bmm"
    """Ours, or POT's ``log_sinkhorn`` (balanced problems only)."""
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_words(
            self, weights=Weights, problem=Problem, score=Score, solver=Solver, precision=Precision
        )
        if not self.epsilon > 0 or not self.column_penalty >= 0 or self.iterations < 1:
            raise ValueError(
                f"epsilon {self.epsilon}, column_penalty {self.column_penalty}, iterations "
                f"{self.iterations}: more than 0, 0 or more, and 1 or more are right."
            )
        if self.solver == "pot" and self.column_penalty != math.inf:
            raise ValueError(
                f"solver 'pot' solves balanced problems, column_penalty is {self.column_penalty}; "
                "set it to inf, or take solver 'bmm'."
            )


def check_words(setting: Any, **kinds: Any) -> None:
    """Raise ValueError, naming the field, where one is none of the words of its kind."""
    for name, kind in kinds.items():
        if getattr(setting, name) not in get_args(kind):
            raise ValueError(
                f"{name}: {getattr(setting, name)!r} is not one of {', '.join(get_args(kind))}."
            )


def entropy_weights(
    features: Tensor, concepts: Tensor, *, mode: Weights, logit_scale: float
) -> Tensor:
    """Weigh the patches of every picture by how sure the model is of them (Eq. 7).

    Parameters
    ----------
    features : (pictures, M, d), unit rows
    concepts : (categories, N, d), unit rows; a category is the mean of its variants
    mode : see :class:`Transport`
    logit_scale : multiplies cosines before the softmax over categories

    Returns
    -------
    Tensor (pictures, M), of the dtype of ``features``; each row has the sum 1
    """
    if mode == "uniform":
        return torch.full_like(features[..., 0], 1 / features.shape[1])
    entropy = entropies(features, concepts, logit_scale)
    return (entropy if mode == "as_printed" else -entropy).softmax(dim=-1)


def entropies(features: Tensor, concepts: Tensor, logit_scale: float) -> Tensor:
    """h(x) of Eq. 7 in nats: (pictures, M, d) and (categories, N, d) -> (pictures, M)."""
    logits = logit_scale * features @ concepts.mean(dim=1).to(features).T
    entropy: Tensor = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    return entropy


def sinkhorn(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    epsilon: float,
    iterations: int = 200,
    column_penalty: float = math.inf,
) -> Tensor:
    """Solve a batch of entropic transport problems by matrix scaling.

    The number of iterations is fixed, so that nothing waits for the device and no problem depends
    on the others of its batch.  In float32 take an epsilon of 0.01 or more for costs up to 2.

    Parameters
    ----------
    cost : (problems, n, m), float32 or float64
    rows, columns : (problems, n) and (problems, m) marginals; a row may weigh 0
    column_penalty : see :class:`Transport`; the marginal of the rows always holds

    Returns
    -------
    Tensor (problems, n, m)
        Plans; rows have their sums to rounding, columns as far as the iterations got.
    """
    cost = cost - cost.amin(dim=2, keepdim=True)
    balanced = column_penalty == math.inf
    if balanced:  # a constant a row or a column changes no plan whose marginals are fixed
        cost = cost - cost.amin(dim=1, keepdim=True)
    kernel = (-cost / epsilon).exp()
    softened = 1.0 if balanced else column_penalty / (column_penalty + epsilon)

    # Row times matrix: on a CPU, torch multiplies a matrix by a column several times as slowly.
    turned, rows, columns = kernel.transpose(1, 2), rows.unsqueeze(1), columns.unsqueeze(1)
    right = torch.ones_like(columns)
    left = rows / torch.bmm(right, turned)
    for _ in range(iterations if column_penalty else 0):
        right = (columns / torch.bmm(left, kernel)) ** softened
        left = rows / torch.bmm(right, turned)
    return left.transpose(1, 2) * kernel * right


def _pot(cost: Tensor, rows: Tensor, columns: Tensor, setting: Transport) -> Tensor:
    from ot.batch import solve_batch  # takes a second to import

    plan: Tensor = solve_batch(
        cost, setting.epsilon, rows, columns, max_iter=setting.iterations, tol=0.0,
        method="log_sinkhorn", grad="detach",
    ).plan  # fmt: skip
    return plan


def _solved(cost: Tensor, rows: Tensor, setting: Transport) -> Tensor:
    """Plans (problems, n, m) with all columns alike, as b is uniform."""
    columns = torch.full_like(cost[:, 0], 1 / cost.shape[2])
    if setting.solver == "pot":
        return _pot(cost, rows, columns, setting)
    return sinkhorn(
        cost,
        rows,
        columns,
        epsilon=setting.epsilon,
        iterations=setting.iterations,
        column_penalty=setting.column_penalty,
    )


def _transported(
    features: Tensor, concepts: Tensor, rows: Tensor, setting: Transport
) -> tuple[Tensor, Tensor]:
    """Plan and cost, both (pictures, categories, M, N)."""
    cost = 1 - torch.einsum("pmd,cnd->pcmn", features, concepts)
    pictures, categories, patches, variants = cost.shape
    if setting.problem == "per_category":
        masses = rows.unsqueeze(1).expand(-1, categories, -1).flatten(0, 1)
        plan = _solved(cost.flatten(0, 1), masses, setting)
        return plan.view_as(cost), cost
    joint = cost.transpose(1, 2).flatten(2)
    plan = _solved(joint, rows, setting).view(pictures, patches, categories, variants)
    return plan.transpose(1, 2), cost


@torch.no_grad()
def patch_scores(features: Tensor, bank: ConceptBank, setting: Transport) -> Tensor:
    """Score the patches of pictures; the lower, the more unsafe.

    Parameters
    ----------
    features : (pictures, M, d), unit rows, any float dtype
    bank : what they are carried to; ``log_odds`` needs reference concepts in it

    Returns
    -------
    Tensor (pictures, M), float32 or float64 as ``setting.precision`` says
        What Eq. 9 and 10 call d_OT, or what takes its place.

    Raises
    ------
    ValueError
        If ``log_odds`` are asked of a bank without reference concepts.
    """
    odds = setting.score == "log_odds"
    if odds and not bank.reference:
        raise ValueError(
            "score 'log_odds' compares with harmless concepts and the bank has none; build it with "
            "`reference`, or take another score."
        )
    dtype = getattr(torch, setting.precision)
    features = features.to(dtype)
    concepts = (bank.all_features if odds else bank.features).to(features)
    rows = entropy_weights(features, concepts, mode=setting.weights, logit_scale=bank.logit_scale)
    plan, cost = _transported(features, concepts, rows, setting)
    spent, mass = (plan * cost).sum(dim=-1), plan.sum(dim=-1)
    if setting.score == "raw":
        return spent.sum(dim=1)
    if setting.score == "per_mass_mean":
        return spent.sum(dim=1) / mass.sum(dim=1)
    smallest = torch.finfo(dtype).tiny  # of a category that gets no mass nothing is known
    each = torch.where(mass > smallest, spent / mass.clamp_min(smallest), math.inf)
    if setting.score == "per_mass_min":
        return each.amin(dim=1)
    joint = setting.problem == "joint"
    evidence = mass.clamp_min(smallest).log() if joint else -each / setting.epsilon
    unsafe = evidence[:, : len(bank.categories)].logsumexp(dim=1)
    return evidence[:, len(bank.categories) :].logsumexp(dim=1) - unsafe
