"""Win rates of one model over another as AlpacaEval computes them, raw and controlled for length.

A preference is 1 where the baseline's answer is better, 2 where the model's is, 1.5 for a tie, or anything between; the
raw win rate is the mean of preference - 1 (Li et al. 2023, alpaca_eval.metrics.winrate). Length-controlled (Dubois et
al. 2024, 2404.04475, section 3.2; version length_controlled_v1) is what a logistic regression predicts for equal
lengths:

    P(model better) = sigmoid(a tanh((len_baseline - len_model) / std) + b difficulty(instruction) + c)

fitted with an L1 penalty that 5-fold cross-validation chooses, beside answers that were gamed by length (`df_gamed.csv`
of tatsu-lab/alpaca_eval, weighted 0.1 each), which also hold the instructions' difficulty.

Invariant: on recorded annotations the numbers are upstream's own to 1e-6.

Called by runs/alpaca_eval.py.

Tests: tests/unit/runs/test_win_rates.py
"""

from __future__ import annotations

import csv
import statistics
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FOLDS = 5
SEED = 123  # of upstream's solver
GAMED_WEIGHT = 0.2 / 2  # of a row of one of the two gamed baselines


class Gamed(msgspec.Struct, frozen=True):
    """Answers gamed by length that the regression is held by, and how difficult each instruction is."""

    features: list[list[float]]  # tanh of the standardised length, difficulty, whether it is a model of its own
    preferences: list[float]  # 0 to 1
    difficulties: dict[int, float]  # by the instruction's place


def read_gamed(path: Path) -> Gamed:
    """Return what AlpacaEval's `df_gamed.csv` holds.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    import numpy as np

    features: list[list[float]] = []
    preferences: list[float] = []
    difficulties: dict[int, float] = {}
    number = 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                number += 1
                place, difficulty = int(row["index"]), float(row["instruction_difficulty"])
                own = float(row["not_gamed_baseline"] == "True")
                features.append([float(np.tanh(float(row["std_delta_len"]))), difficulty, own])
                preferences.append(float(row["preference"]))
                difficulties.setdefault(place, difficulty)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read ({error})", "give AlpacaEval's df_gamed.csv") from error
    except (KeyError, ValueError, TypeError) as error:
        what = f"is not as AlpacaEval's df_gamed.csv ({type(error).__name__}: {error})"
        raise DataError(f"{path}, line {number}", what, "download it from tatsu-lab/alpaca_eval") from error
    if not features:
        raise DataError(str(path), "holds no rows", "give AlpacaEval's df_gamed.csv")
    return Gamed(features, preferences, difficulties)


def raw(preferences: Sequence[float | None]) -> list[float]:
    """Return what the model won of each judged instruction: `raw([1.0, 1.5, None, 2.0])` is `[0.0, 0.5, 1.0]`."""
    return [(each or 1.5) - 1 for each in preferences if each is not None]  # 0 was once written for a tie


class LengthControl:
    """The regression over one model's annotations; `gamed` None leaves difficulty and the gamed answers out."""

    def __init__(
        self, preferences: Sequence[float | None], lengths: Sequence[tuple[int, int]], gamed: Gamed | None
    ) -> None:
        """Take each instruction's preference, and how many characters baseline and model wrote.

        Raises:
            DataError: an instruction has no difficulty, all lengths differ by the same, or all preferences are one.
        """
        import numpy as np

        self._gamed = gamed
        deltas = [float(baseline - model) for baseline, model in lengths]
        spread = statistics.stdev(deltas) if len(deltas) > 1 else 0.0
        if not spread:
            what = f"{len(deltas)} answers differ in length by the same from the baseline's"
            raise DataError("length-controlled win rate", what, "judge more instructions")
        if gamed is not None and (unknown := set(range(len(deltas))) - gamed.difficulties.keys()):
            what = f"{len(unknown)} of {len(deltas)} instructions are not among the gamed, such as {min(unknown)}"
            raise DataError("length-controlled win rate", what, "judge AlpacaEval's own instructions")
        won = raw(preferences)
        if gamed is None and len(set(won)) < 2:
            raise DataError("length-controlled win rate", f"all {len(won)} preferences are the same", "judge more")
        if len(won) < FOLDS:
            raise DataError(
                "length-controlled win rate", f"{len(won)} preferences are too few", f"give {FOLDS} or more"
            )
        leaned = np.tanh(np.array(deltas) / spread)
        self._rows = [self._row(float(each), place) for place, each in enumerate(leaned)]
        self._even = [self._row(0.0, place) for place in range(len(deltas))]
        self._preferences = [None if each is None else (each or 1.5) - 1 for each in preferences]
        self.penalty = 0.0  # C, as it was chosen

    def _row(self, leaned: float, place: int) -> list[float]:
        return [leaned, self._gamed.difficulties[place], 1.0] if self._gamed is not None else [leaned, 1.0]

    def predicted(self) -> list[float]:
        """Return the preference that is predicted for each instruction at equal lengths; it chooses the penalty."""
        import numpy as np
        import sklearn
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.metrics import make_scorer
        from sklearn.model_selection import GroupKFold

        features, labels, shares, weights = self._training([*range(len(self._rows))])
        with sklearn.config_context(enable_metadata_routing=True):
            scoring = make_scorer(_loss, response_method="predict_proba", greater_is_better=False)
            scoring = scoring.set_score_request(share=True, weight=True)
            options: dict[str, Any] = dict(scoring=scoring, l1_ratios=(1,), use_legacy_attributes=True)
            model: Any = LogisticRegressionCV(
                cv=GroupKFold(n_splits=FOLDS),
                random_state=SEED,
                solver="liblinear",
                fit_intercept=False,
                **options,
            ).set_fit_request(sample_weight=True)
            groups = np.tile(np.arange(len(labels) // 2), 2)
            model.fit(features, labels, sample_weight=shares * weights, groups=groups, share=shares, weight=weights)
        self.penalty = float(model.C_[0])
        return model.predict_proba(np.array(self._even))[:, 1].tolist()

    def drawn(self, places: Sequence[int]) -> float:
        """Return the mean prediction over instructions drawn again, at the penalty that was chosen."""
        import numpy as np
        from sklearn.linear_model import LogisticRegression

        features, labels, shares, weights = self._training(places)
        if sum(won := shares[: len(shares) // 2]) in (0, len(won)):
            return float(won[0])  # nothing to separate
        options: dict[str, Any] = dict(l1_ratio=1, C=self.penalty)
        model = LogisticRegression(solver="liblinear", random_state=SEED, fit_intercept=False, **options)
        model.fit(features, labels, sample_weight=shares * weights)
        return float(model.predict_proba(np.array([self._even[place] for place in places]))[:, 1].mean())

    def _training(self, places: Sequence[int]) -> tuple[Any, Any, Any, Any]:
        """Return every judged row twice, as won and as lost, with the share of each and the row's weight."""
        import numpy as np

        judged = [(self._rows[k], won) for k in places if (won := self._preferences[k]) is not None]
        rows, won = [row for row, _ in judged], [each for _, each in judged]
        weights = [1.0] * len(rows)
        if (gamed := self._gamed) is not None:
            rows, won = [*gamed.features, *rows], [*gamed.preferences, *won]
            weights = [1.0 if own else GAMED_WEIGHT for *_, own in rows]
        shares = np.concatenate([np.array(won), 1 - np.array(won)])
        labels = np.repeat([1, 0], len(rows))
        return np.tile(np.array(rows), (2, 1)), labels, shares, np.tile(np.array(weights), 2)


def _loss(won: Any, predicted: Any, *, share: Any, weight: Any) -> float:
    """Return the mean cross-entropy against how sure each label is."""
    import numpy as np

    predicted = np.clip(predicted, 1e-15, 1 - 1e-15)
    truth = np.where(won == 1, share, 1 - share)
    return -float(np.mean((truth * np.log(predicted) + (1 - truth) * np.log(1 - predicted)) * weight))
