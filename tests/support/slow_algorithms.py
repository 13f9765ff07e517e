"""The online algorithms a second time, slowly: plain Python loops over floats, written from the papers' definitions.

Shares no code with flowrl. Rows are lists of floats, masks lists of 0 and 1; a step or micro-batch is a list of rows.
What should carry no gradient is passed on its own (`frozen`), so that `gradient` can differentiate by differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

Row = list[float]
Rows = list[Row]
Mask = list[int]


def sampled(mask: Mask) -> list[int]:
    return [t for t, m in enumerate(mask) if m]


def kl(lp: float, ref: float, estimator: str) -> float:
    d = lp - ref
    return {"k1": d, "k2": d**2 / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def overlong(length: int, max_tokens: int, buffer: int, factor: float) -> float:
    threshold = max_tokens - buffer
    if length <= threshold:
        return 0.0
    if length > max_tokens:
        return -factor
    return (threshold - length) / buffer * factor


def token_rewards(score: float, kls: Row, mask: Mask, coef: float) -> Row:
    rewards = [-coef * k if m else 0.0 for k, m in zip(kls, mask, strict=True)]
    tokens = sampled(mask)
    if tokens:
        rewards[tokens[-1]] += score
    return rewards


def gae(rewards: Row, values: Row, mask: Mask, gamma: float, lam: float) -> tuple[Row, Row]:
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    next_value = next_advantage = 0.0
    for t in reversed(sampled(mask)):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
        advantages[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages, returns


def discounted(rewards: Row, mask: Mask, gamma: float) -> Row:
    tokens = sampled(mask)
    found = [0.0] * len(mask)
    for i, t in enumerate(tokens):
        found[t] = sum(gamma ** (j - i) * rewards[tokens[j]] for j in range(i, len(tokens)))
    return found


def whiten(rows: Rows, masks: list[Mask]) -> Rows:
    flat = [row[t] for row, mask in zip(rows, masks, strict=True) for t in sampled(mask)]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    return [
        [(x - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for x, m in zip(row, mask, strict=True)]
        for row, mask in zip(rows, masks, strict=True)
    ]


def baseline(kind: str, rewards: Row) -> Row:
    n = len(rewards)
    mean = sum(rewards) / n
    if kind == "centred":
        return [r - mean for r in rewards]
    if kind == "standardised":
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
        return [(r - mean) / (std + 1e-6) for r in rewards]
    return [r - (sum(rewards) - r) / (n - 1) for r in rewards]


@dataclass(frozen=True)
class Policy:
    """What distinguishes one policy loss from another."""

    low: float = 0.2
    high: float = 0.2
    dual: float = 0.0
    ratio: str = "token"  # or "sequence" (GSPO), "weight" (CISPO), "soft" (SAPO), "geometric" (GMPO)
    mean: str = "token"  # or "sequence", "constant"
    constant: int = 1024
    correction: str = "behaviour"
    cap: float = 2.0
    floor: float = 0.5
    max_drift: float = 0.1
    limit: float = math.inf  # second_moment
    max_divergence: float = 0.05
    kl_coef: float = 0.0
    estimator: str = "k3"
    kl_is_weighted: bool = False
    entropy_coef: float = 0.0
    taus: tuple[float, float] = (1.0, 1.05)
    width: float = 0.4


@dataclass(frozen=True)
class Columns:
    """A micro-batch."""

    proximal: Rows
    behaviour: Rows
    advantages: Rows
    reference: Rows
    entropy: Rows
    age: Rows
    masks: list[Mask]


FROM_OLD = ("behaviour", "second_moment", "divergence")


def correction_weight(p: Policy, token: float, mean: float) -> float:
    """The weight of a token whose log ratio is `token` in a sequence whose mean log ratio is `mean`."""
    ratio = math.exp(mean if p.ratio == "sequence" else token)
    if p.correction in FROM_OLD:
        return 1.0
    if p.correction == "truncated":
        return min(ratio, p.cap)
    if p.correction == "clamped":
        return max(p.floor, min(ratio, p.cap))
    if p.correction == "icepop":
        return ratio if p.floor <= ratio <= p.cap else 0.0
    if p.correction == "sequence":
        return 1.0 if abs(mean) <= p.max_drift else 0.0
    if p.correction == "geometric":
        return min(ratio, p.cap) if abs(mean) <= p.max_drift else 0.0
    return ratio


def is_left_out(p: Policy, lp: float, old: float, a: float) -> bool:
    """Whether a token is outside the trust region and would be taken further out."""
    ratio = math.exp(lp - old)
    if not ((a > 0 and ratio > 1) or (a < 0 and ratio < 1)):
        return False
    if p.correction == "second_moment":
        return abs(lp - old) > p.limit
    q, now = math.exp(old), math.exp(lp)
    divergence = q * math.log(q / now) + (1 - q) * math.log((1 - q) / (1 - now))
    return divergence > p.max_divergence


def second_moment_limit(log_ratios: Row, advantages: Row, threshold: float) -> float:
    """M2PO's algorithm as it is told: while the mean square is too great, drop the token of the greatest one."""
    kept = [d for d, a in zip(log_ratios, advantages, strict=True) if (a > 0 and d > 0) or (a < 0 and d < 0)]
    dropped = False
    while kept and sum(d * d for d in kept) / len(kept) > threshold:
        kept.remove(max(kept, key=abs))
        dropped = True
    return (max(map(abs, kept)) if kept else 0.0) if dropped else math.inf


def interpolated(lp: float, old: float, age: float) -> float:
    alpha = 1.0 / age if age >= 1 else 1.0
    return alpha * old + (1.0 - alpha) * lp


def surrogate(p: Policy, ratio: float, a: float, lp: float, frozen_ratio: float) -> float:
    if p.ratio == "weight":
        return min(max(frozen_ratio, 1 - p.low), 1 + p.high) * a * lp
    if p.ratio == "soft":
        tau = p.taus[0] if a > 0 else p.taus[1]
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * a
    value = min(ratio * a, min(max(ratio, 1 - p.low), 1 + p.high) * a)
    return max(value, p.dual * a) if p.dual and a < 0 else value


def geometric_ratio(p: Policy, log_ratios: Row, a: float) -> float:
    """GMPO's ratio of a sequence: the geometric mean of ratios that are clipped on the side they are pushed to."""
    product = 1.0
    for d in log_ratios:
        clipped = max(-p.width, min(p.width, d))
        product *= math.exp(min(d, clipped) if a > 0 else max(d, clipped))
    return product ** (1 / len(log_ratios))


def policy_loss(p: Policy, lp: Rows, frozen: Rows, c: Columns) -> tuple[float, float]:
    """The total and the count; `frozen` is `lp` where no gradient flows."""
    total = num_tokens = num_sequences = 0.0
    for i, mask in enumerate(c.masks):
        tokens = sampled(mask)
        if not tokens:
            continue
        proximal = c.proximal[i]
        if p.correction == "interpolated":
            proximal = [interpolated(*token) for token in zip(frozen[i], c.behaviour[i], c.age[i], strict=True)]
        anchor = c.behaviour[i] if p.correction in FROM_OLD else proximal
        mean_ratio = sum(lp[i][t] - anchor[t] for t in tokens) / len(tokens)
        mean_drift = sum(proximal[t] - c.behaviour[i][t] for t in tokens) / len(tokens)
        row = 0.0
        for t in tokens:
            a = c.advantages[i][t]
            ratio = math.exp(mean_ratio if p.ratio == "sequence" else lp[i][t] - anchor[t])
            weight = correction_weight(p, proximal[t] - c.behaviour[i][t], mean_drift)
            frozen_ratio = math.exp(frozen[i][t] - anchor[t])
            if p.correction in ("second_moment", "divergence"):
                row -= 0.0 if is_left_out(p, frozen[i][t], c.behaviour[i][t], a) else ratio * a
            elif p.ratio == "geometric":
                row -= weight * geometric_ratio(p, [lp[i][u] - anchor[u] for u in tokens], a) * a
            else:
                row -= weight * surrogate(p, ratio, a, lp[i][t], frozen_ratio)
            importance = math.exp(lp[i][t] - c.behaviour[i][t]) if p.kl_is_weighted else 1.0
            row += p.kl_coef * importance * kl(lp[i][t], c.reference[i][t], p.estimator)
            row -= p.entropy_coef * c.entropy[i][t]
        num_tokens += len(tokens)
        num_sequences += 1
        total += row / {"token": 1, "sequence": len(tokens), "constant": p.constant}[p.mean]
    return total, num_tokens if p.mean == "token" else num_sequences


def value_loss(values: Rows, old: Rows, returns: Rows, masks: list[Mask], clip: float) -> tuple[float, float]:
    total = count = 0.0
    for i, mask in enumerate(masks):
        for t in sampled(mask):
            v, v_old, r = values[i][t], old[i][t], returns[i][t]
            errors = [(v - r) ** 2]
            if clip:
                errors.append((min(max(v, v_old - clip), v_old + clip) - r) ** 2)
            total += 0.5 * max(errors)
            count += 1
    return total, count


def gradient(function: Callable[[Rows], float], at: Rows, step: float = 1e-5) -> Rows:
    """The gradient of `function` at `at` by central differences."""

    def moved(i: int, t: int, by: float) -> Rows:
        return [[x + by if (j, s) == (i, t) else x for s, x in enumerate(row)] for j, row in enumerate(at)]

    return [
        [(function(moved(i, t, step)) - function(moved(i, t, -step))) / (2 * step) for t in range(len(row))]
        for i, row in enumerate(at)
    ]


def adaptive_coefs(coef: float, kls: Row, num_samples: int, target: float, horizon: float) -> Row:
    """Ziegler's controller: the coefficient of each step, and of the one after the last."""
    found = [coef]
    for kl in kls:
        error = max(-0.2, min(0.2, kl / target - 1))
        found.append(found[-1] * (1 + error * num_samples / horizon))
    return found
