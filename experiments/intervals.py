"""What a few seeds and one set of test images can tell: spreads, 95 % intervals, and verdicts that rest on them."""

from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95


def mean_std(values: list[float]) -> str:
    """Mean and sample standard deviation (ddof = 1) as text; of one value the value, of none nothing."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def seeds_half_width(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean over n seeds, by Student's t with n - 1 degrees of freedom; None
    for fewer than two seeds, whose spread is unknown."""
    from scipy import stats

    if len(values) < 2:
        return None
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def images_half_width(accuracy: float, num_images: int) -> float:
    """Half the width of the 95 % interval of an accuracy over test images (binomial; Wilson 1927): the larger side."""
    from scipy import stats

    result = stats.binomtest(round(accuracy * num_images), num_images)
    interval = result.proportion_ci(CONFIDENCE, method="wilson")
    return float(max(accuracy - interval.low, interval.high - accuracy))


def ratio_images_half_width(numerator: float, denominator: float, num_images: int) -> float:
    """Half the width of the 95 % interval of a ratio of two accuracies over test images (binomial; the interval of the
    logarithm by Katz et al. 1978): the larger side. Takes the two as measured on different images. On the same ones,
    where both mostly give the same answers, the true interval is narrower.

    Args:
        numerator, denominator: Fractions in [0, 1] of `num_images` images; a mean over seeds and orders counts as one
            model's.
    """
    from scipy.stats.contingency import relative_risk

    counts = round(numerator * num_images), num_images, round(denominator * num_images), num_images
    result = relative_risk(*counts)
    interval = result.confidence_interval(CONFIDENCE)
    return float(max(result.relative_risk - interval.low, interval.high - result.relative_risk))


@dataclass(frozen=True)
class Estimate:
    """A number with half the widths of its two 95 % intervals.

    Args:
        value: The mean over seeds.
        seeds: Over seeds; None for one seed.
        images: Over test images; None where no such interval is made.
    """

    value: float
    seeds: float | None
    images: float | None = None

    def verdict(self, target: float, at_most: bool = False) -> str:
        """Says "reached" or "missed" where all intervals lie on one side of the target, otherwise "not decided", and
        behind that what the interval over seeds alone would say."""
        if self.seeds is None:
            return "not decided (one seed)"
        side = "reached" if (self.value <= target if at_most else self.value >= target) else "missed"
        distance = abs(self.value - target)
        if distance <= self.seeds:
            return "not decided"
        return side if distance > (self.images or 0) else f"not decided (over seeds {side})"

    def text(self, digits: int = 4) -> str:
        """The value ± over seeds ± over images; a dash for an interval over one seed."""
        seeds = "–" if self.seeds is None else f"{self.seeds:.{digits}f}"
        images = "" if self.images is None else f" ± {self.images:.{digits}f}"
        return f"{self.value:.{digits}f} ± {seeds}{images}"


def ratio(numerators: dict[int, float], denominators: dict[int, float], num_images: int) -> Estimate:
    """Mean over seeds of the ratio of two accuracies, each a fraction in [0, 1] by seed. Only seeds that both have
    count, so that a model and the one it started from are compared with each other."""
    seeds = sorted(numerators.keys() & denominators.keys())
    ratios = [numerators[seed] / denominators[seed] for seed in seeds]
    means = [float(np.mean([values[seed] for seed in seeds])) for values in (numerators, denominators)]
    return Estimate(float(np.mean(ratios)), seeds_half_width(ratios), ratio_images_half_width(*means, num_images))
