"""Means over subjects and seeds, their spread, and where a curve reaches a quality. Knows no model."""

import math
import statistics


def subject_means(contents, subjects):
    """Seed -> milestone -> metric -> mean over subjects, of one method.

    A seed counts once all subjects are there, so that all means are over the same ones.
    """
    by_seed = {}
    for content in contents:
        by_seed.setdefault(content["settings"]["seed"], {})[content["settings"]["subject"]] = content["curve"]
    means = {}
    for seed, curves in by_seed.items():
        if set(curves) == set(subjects):
            means[seed] = {
                points[0]["milestone"]: {
                    name: statistics.fmean(point[name] for point in points)
                    for name in points[0]
                    if name != "milestone"
                }
                for points in zip(*curves.values())
            }
    return means


def over_seeds(means):
    """A list of points, metric -> [mean, standard deviation over seeds (None of one seed)], by milestone."""
    curves = list(means.values())
    return [
        {
            name: [
                statistics.fmean(curve[milestone][name] for curve in curves),
                statistics.stdev(curve[milestone][name] for curve in curves) if len(curves) > 1 else None,
            ]
            for name in curves[0][milestone]
        }
        for milestone in curves[0]
    ]


def forwards_to_reach(curve, metric, target):
    """Forwards at which the mean curve first is as good as `target`, between milestones by log-linear interpolation.

    A loss is to fall to it, any other metric to rise to it. None if it never does; within the first milestone that has
    the metric counts as that milestone.
    """
    sign, before = (1 if metric == "loss" else -1), None
    for point in (point for point in curve if metric in point):
        forwards, gap = point["forwards"][0], sign * (point[metric][0] - target)
        if gap <= 0:
            if before is None or gap == before[1]:
                return forwards
            share = before[1] / (before[1] - gap)
            return math.exp(math.log(before[0]) + share * (math.log(forwards) - math.log(before[0])))
        before = forwards, gap
    return None


def spread_over_seeds(values, subjects):
    """Standard deviation of the seeds' means; None unless two seeds have all subjects.

    Args:
        values: (subject, seed) -> value.
        subjects: names.
    """
    by_seed = {}
    for (_, seed), value in values.items():
        by_seed.setdefault(seed, []).append(value)
    means = [statistics.fmean(found) for found in by_seed.values() if len(found) == len(subjects)]
    return statistics.stdev(means) if len(means) > 1 else None
