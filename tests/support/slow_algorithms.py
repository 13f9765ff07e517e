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
    ratio: str = "token"  # or "sequence" (GSPO), "weight" (CISPO)
    mean: str = "token"  # or "sequence", "constant"
    constant: int = 1024
    correction: str = "truncated"
    cap: float = 2.0
    floor: float = 0.5
    max_drift: float = 0.1
    kl_coef: float = 0.0
    estimator: str = "k3"
    entropy_coef: float = 0.0


@dataclass(frozen=True)
class Columns:
    """A micro-batch."""

    proximal: Rows
    behaviour: Rows
    advantages: Rows
    reference: Rows
    entropy: Rows
    masks: list[Mask]


def correction_weight(p: Policy, token: float, mean: float) -> float:
    """The weight of a token whose log ratio is `token` in a sequence whose mean log ratio is `mean`."""
    ratio = math.exp(mean if p.ratio == "sequence" else token)
    if p.correction == "none":
        return 1.0
    if p.correction == "truncated":
        return min(ratio, p.cap)
    if p.correction == "icepop":
        return ratio if p.floor <= ratio <= p.cap else 0.0
    if p.correction == "sequence":
        return 1.0 if abs(mean) <= p.max_drift else 0.0
    return ratio


def surrogate(p: Policy, ratio: float, a: float, lp: float, frozen_ratio: float) -> float:
    if p.ratio == "weight":
        return min(max(frozen_ratio, 1 - p.low), 1 + p.high) * a * lp
    value = min(ratio * a, min(max(ratio, 1 - p.low), 1 + p.high) * a)
    return max(value, p.dual * a) if p.dual and a < 0 else value


def policy_loss(p: Policy, lp: Rows, frozen: Rows, c: Columns) -> tuple[float, float]:
    """The total and the count; `frozen` is `lp` where no gradient flows."""
    total = num_tokens = num_sequences = 0.0
    for i, mask in enumerate(c.masks):
        tokens = sampled(mask)
        if not tokens:
            continue
        anchor = c.behaviour[i] if p.correction == "none" else c.proximal[i]
        mean_ratio = sum(lp[i][t] - anchor[t] for t in tokens) / len(tokens)
        mean_drift = sum(c.proximal[i][t] - c.behaviour[i][t] for t in tokens) / len(tokens)
        row = 0.0
        for t in tokens:
            ratio = math.exp(mean_ratio if p.ratio == "sequence" else lp[i][t] - anchor[t])
            weight = correction_weight(p, c.proximal[i][t] - c.behaviour[i][t], mean_drift)
            frozen_ratio = math.exp(frozen[i][t] - anchor[t])
            row -= weight * surrogate(p, ratio, c.advantages[i][t], lp[i][t], frozen_ratio)
            row += p.kl_coef * kl(lp[i][t], c.reference[i][t], p.estimator)
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
