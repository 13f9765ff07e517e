"""The offline objectives a second time, slowly: plain Python loops over floats, written from the papers' definitions.

Shares no code with flowrl. Rows are lists of floats, masks lists of 0 and 1. Losses are totals and counts; pairs are
(chosen row, rejected row) indices into the rows.
"""

from __future__ import annotations

import math

Row = list[float]
Rows = list[Row]
Mask = list[int]
Pairs = list[tuple[int, int]]


def sampled(mask: Mask) -> list[int]:
    return [t for t, m in enumerate(mask) if m]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def summed(row: Row, mask: Mask) -> float:
    return sum(row[t] for t in sampled(mask))


def gap(lp: Row, ref: Row, mask: Mask) -> float:
    return summed(lp, mask) - summed(ref, mask)


def complete(pairs: Pairs, masks: list[Mask]) -> Pairs:
    return [(a, b) for a, b in pairs if sampled(masks[a]) and sampled(masks[b])]


def sft(lp: Rows, masks: list[Mask]) -> tuple[float, float]:
    return -sum(summed(row, mask) for row, mask in zip(lp, masks, strict=True)), sum(map(sum, masks))


def dpo(
    lp: Rows, ref: Rows, masks: list[Mask], pairs: Pairs, *, beta: float, e: float = 0.0, nll: float = 0.0
) -> tuple[float, float]:
    total = 0.0
    kept = complete(pairs, masks)
    for good, bad in kept:
        h = beta * (gap(lp[good], ref[good], masks[good]) - gap(lp[bad], ref[bad], masks[bad]))
        total += -(1 - e) * math.log(sigmoid(h)) - e * math.log(sigmoid(-h))
        total -= nll * summed(lp[good], masks[good]) / len(sampled(masks[good]))
    return total, len(kept)


def pairwise_kin(kind: str, lp: Rows, ref: Rows, masks: list[Mask], pairs: Pairs, **p: float) -> tuple[float, float]:
    """The further losses over pairs, each as its paper writes it."""
    total = 0.0
    kept = complete(pairs, masks)
    for good, bad in kept:
        won, lost = (p.get("beta", 1.0) * gap(lp[i], ref[i], masks[i]) for i in (good, bad))
        sums = [summed(lp[i], masks[i]) for i in (good, bad)]
        means = [total_lp / len(sampled(masks[i])) for total_lp, i in zip(sums, (good, bad), strict=True)]
        if kind == "hinge":
            total += max(0.0, 1 - (won - lost))
        elif kind == "robust":
            e = p["e"]
            total += (-(1 - e) * math.log(sigmoid(won - lost)) + e * math.log(sigmoid(lost - won))) / (1 - 2 * e)
        elif kind == "simpo":
            total -= math.log(sigmoid(p["beta"] * means[0] - p["beta"] * means[1] - p["gamma"]))
        elif kind == "cpo":
            total -= math.log(sigmoid(p["beta"] * (sums[0] - sums[1]))) + p["nll"] * means[0]
        elif kind == "orpo":
            odds = [math.exp(m) / (1 - math.exp(m)) for m in means]
            total -= means[0] + p["lam"] * math.log(sigmoid(math.log(odds[0] / odds[1])))
        elif kind == "apo_zero":
            total += 1 - sigmoid(won) + sigmoid(lost)
        elif kind == "apo_down":
            total += sigmoid(won) + 1 - sigmoid(won - lost)
        elif kind == "normalised":
            sizes = [len(sampled(masks[i])) for i in (good, bad)]
            total -= math.log(sigmoid(won / sizes[0] - lost / sizes[1]))
    return total, len(kept)


def jsd(teacher: Row, student: Row, share: float) -> float:
    """Of two distributions over a vocabulary, given as probabilities."""
    mixture = [share * t + (1 - share) * s for t, s in zip(teacher, student, strict=True)]
    to_teacher = sum(t * math.log(t / m) for t, m in zip(teacher, mixture, strict=True))
    return share * to_teacher + (1 - share) * sum(s * math.log(s / m) for s, m in zip(student, mixture, strict=True))


def ipo(lp: Rows, ref: Rows, masks: list[Mask], pairs: Pairs, *, beta: float, reduction: str) -> tuple[float, float]:
    total = 0.0
    kept = complete(pairs, masks)
    for good, bad in kept:
        sizes = [len(sampled(masks[i])) if reduction == "mean" else 1 for i in (good, bad)]
        sides = [gap(lp[i], ref[i], masks[i]) / size for i, size in zip((good, bad), sizes, strict=True)]
        total += (sides[0] - sides[1] - 1 / (2 * beta)) ** 2
    return total, len(kept)


def kto(
    lp: Rows, ref: Rows, masks: list[Mask], labels: Row, *, beta: float, z: float, good: float, bad: float
) -> tuple[float, float]:
    total = count = 0.0
    for row, frozen, mask, label in zip(lp, ref, masks, labels, strict=True):
        if sampled(mask):
            lr = gap(row, frozen, mask)
            total += good * (1 - sigmoid(beta * (lr - z))) if label > 0 else bad * (1 - sigmoid(beta * (z - lr)))
            count += 1
    return total, count


def bradley_terry(
    values: Rows, masks: list[Mask], pairs: Pairs, margins: Row, *, centre: float = 0.0
) -> tuple[float, float]:
    total = 0.0
    kept = complete(pairs, masks)
    for good, bad in kept:
        r_w, r_l = (values[i][sampled(masks[i])[-1]] for i in (good, bad))
        total += -math.log(sigmoid(r_w - r_l - margins[good])) + centre * (r_w + r_l) ** 2
    return total, len(kept)


def process(values: Rows, labels: Rows, masks: list[Mask], *, threshold: float | None) -> tuple[float, float]:
    total = count = 0.0
    for row, marks, mask in zip(values, labels, masks, strict=True):
        for t in sampled(mask):
            if not math.isnan(marks[t]):
                y = marks[t] if threshold is None else float(marks[t] > threshold)
                p = sigmoid(row[t])
                total -= y * math.log(p) + (1 - y) * math.log(1 - p)
                count += 1
    return total, count


def divergence_gradient(student: Row, teacher: Row, direction: str) -> Row:
    """The gradient of a KL with respect to the student's logits, both distributions given as log-probs.

    Forward: q_i - p_i with teacher p and student q. Reverse: q_i (log(q_i / p_i) - KL).
    """
    q, p = [math.exp(x) for x in student], [math.exp(x) for x in teacher]
    if direction == "forward":
        return [qi - pi for qi, pi in zip(q, p, strict=True)]
    kl = sum(qi * (a - b) for qi, a, b in zip(q, student, teacher, strict=True))
    return [qi * (a - b - kl) for qi, a, b in zip(q, student, teacher, strict=True)]


def divergence(student: Row, teacher: Row, direction: str) -> float:
    of, to = (teacher, student) if direction == "forward" else (student, teacher)
    return sum(math.exp(a) * (a - b) for a, b in zip(of, to, strict=True))
