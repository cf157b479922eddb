"""Computes on rows of logits in Triton kernels, which `triton_launch` starts.

They say what `divergences.py` and `softmax.py` do: float32, log-probabilities of at least LOWEST_LOGPROB. Divergences
need no mixture of probabilities, which could underflow: with d = log q - log p, at most 80 in size, p / m and q / m are
functions of exp(d). A table has one column per row of logits; parameters in capitals are known as a kernel is compiled.
"""

import triton
import triton.language as tl

from learner.loss.divergences import LOWEST_LOGPROB

FAR = tl.constexpr(-1e38)  # in place of -inf: differences of two stay finite, and their exponential is 0
LOWEST = tl.constexpr(LOWEST_LOGPROB)
# Fields of the tables that `statistics_kernel` and `compare_kernel` fill; a peak's logarithm of the sum, and a
# loss's mean, follow it.
PEAK, ENTROPY, SHARED_PEAK = tl.constexpr(0), tl.constexpr(2), tl.constexpr(3)
TARGET_PEAK, LOSS = tl.constexpr(5), tl.constexpr(7)
STATISTICS_FIELDS, COMPARISON_FIELDS = 3, 9
# The names that `_value_and_slope` has a branch for.
KNOWN = frozenset({"reverse_kl", "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"})
COUNTS = ["count", "tiles"]  # change from one micro-batch to the next, which should not have Triton compile anew


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    logits: tl.tensor, table: tl.tensor, stride: tl.tensor, count: tl.tensor, vocabulary: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Find each row's normaliser and entropy; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    peak, total, energy = _nothing(BLOCK)
    peak, total, energy = _read_on(logits + row * stride, 0, vocabulary, peak, total, energy, BLOCK)
    _store_statistics(table + row, count, peak, total, energy)


@triton.jit(do_not_specialize=COUNTS)
def probabilities_kernel(
    logits: tl.tensor,
    table: tl.tensor,
    stride: tl.tensor,
    count: tl.tensor,
    vocabulary: tl.tensor,
    tiles: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrite logits by probabilities times the row's factor; one program per tile."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    columns = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    places, inside = logits + row * stride + columns, columns < vocabulary
    table += row
    logprobs = _logprobs(_load(places, inside), tl.load(table), tl.load(table + count))
    tl.store(places, tl.exp(logprobs) * tl.load(table + 2 * count), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def compare_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    table: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    count: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    parameter: tl.tensor,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Find what the gradient needs to know of each row; one program per row, width is the target's."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    target += row * target_stride
    table += row
    peak, total, energy, goal, goal_total, gap, lowest = _read_both(logits, target, width, NAME, BLOCK)
    log_sum, goal_log_sum = tl.log(tl.sum(total, 0)), tl.log(tl.sum(goal_total, 0))
    _store_pair(table, SHARED_PEAK, count, peak, log_sum)
    _store_pair(table, TARGET_PEAK, count, goal, goal_log_sum)
    # A Kullback-Leibler divergence comes out of the one pass, unless the clamp changes it.
    loss, end = 0.0, width
    if NAME == "reverse_kl":
        loss = tl.sum(gap, 0) / tl.sum(total, 0) - (log_sum - goal_log_sum)
        end = tl.where((lowest - goal) - goal_log_sum < LOWEST, width, 0)
    if NAME == "forward_kl":
        loss = tl.sum(gap, 0) / tl.sum(goal_total, 0) - (goal_log_sum - log_sum)
        end = tl.where((lowest - peak) - log_sum < LOWEST, width, 0)
    summed, mean = _read_again(logits, target, width, end, peak, log_sum, goal, goal_log_sum, parameter, NAME, BLOCK)
    loss = tl.where(end > 0, summed, loss)
    if NAME == "reverse_kl":  # the slope is the logarithm whose mean is the loss
        mean = loss
    _store_pair(table, LOSS, count, loss, mean)
    peak, total, energy = _read_on(logits, width, vocabulary, peak, total, energy, BLOCK)
    _store_statistics(table, count, peak, total, energy)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    table: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    count: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    parameter: tl.tensor,
    tiles: tl.tensor,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrite the student's logits by the gradient, which is 0 beyond the target's width; one program per tile."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    columns = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    logits += row * logits_stride
    target += row * target_stride
    table += row
    peak, log_sum = tl.load(table), tl.load(table + count)
    goal, goal_log_sum = tl.load(table + 2 * count), tl.load(table + 3 * count)
    mean, weight = tl.load(table + 4 * count), tl.load(table + 5 * count)
    p, log_ratio, q = _pair(logits, target, columns, width, peak, log_sum, goal, goal_log_sum)
    if NAME == "forward_kl":
        gradient = weight * (p - q)
    else:
        _value, slope = _value_and_slope(p, q, log_ratio, parameter, NAME)
        gradient = weight * p * (slope - mean)
    tl.store(logits + columns, tl.where(columns < width, gradient, 0.0), mask=columns < vocabulary)


@triton.jit
def _value_and_slope(p: tl.tensor, q: tl.tensor, d: tl.tensor, parameter: tl.tensor, NAME: tl.constexpr) -> tl.tuple:
    """Return each token's p phi(d), and the slope phi(d) - phi'(d) up to a constant."""
    if NAME == "reverse_kl":
        value, slope = -p * d, -d
    elif NAME == "forward_kl":
        value, slope = q * d, d  # `gradient_kernel` writes p - q
    elif NAME == "jsd":
        log_mixture = tl.log(parameter * tl.exp(d) + (1.0 - parameter))  # log(m / p)
        slope = (parameter - 1.0) * log_mixture
        value = parameter * q * (d - log_mixture) + p * slope
    elif NAME == "skewed_forward_kl":
        ratio = tl.exp(d)
        mixture = parameter * ratio + (1.0 - parameter)  # m / p
        value, slope = q * (d - tl.log(mixture)), (parameter - 1.0) * (ratio / mixture)
    elif NAME == "skewed_reverse_kl":
        mixture = parameter + (1.0 - parameter) * tl.exp(d)  # m / p
        value = -p * tl.log(mixture)
        slope = -tl.log(mixture) - parameter / mixture
    else:
        tl.static_assert(False, "no branch of _value_and_slope computes this divergence")
    return value, slope


@triton.jit
def _pair(
    logits: tl.tensor,
    target: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    peak: tl.tensor,
    log_sum: tl.tensor,
    goal: tl.tensor,
    goal_log_sum: tl.tensor,
) -> tl.tuple:
    """Return p, log q - log p and q; outside of the width, next to nothing."""
    log_p = _logprobs(_load(logits + columns, columns < width), peak, log_sum)
    log_q = _logprobs(_load(target + columns, columns < width), goal, goal_log_sum)
    return tl.exp(log_p), log_q - log_p, tl.exp(log_q)


@triton.jit
def _read_both(
    logits: tl.tensor, target: tl.tensor, width: tl.tensor, NAME: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tuple:
    """Return the running sums of both rows over the width.

    Those of `_nothing` for the student, the first two for the target, `gap` = sum of exp(z - peak) times the logits'
    difference (of Kullback-Leibler divergences), and the lowest of the logits that the clamp could change it by.
    """
    peak, total, energy = _nothing(BLOCK)
    goal, goal_total, gap = _nothing(BLOCK)
    lowest = tl.full([BLOCK], -FAR, tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z, u = _load(logits + columns, inside), _load(target + columns, inside)
        peak, rise, below = _advance(peak, z)
        goal, goal_rise, goal_below = _advance(goal, u)
        if NAME == "reverse_kl":
            gap = _moment(gap, total, rise, below, rise - goal_rise, below - goal_below)
            lowest = tl.minimum(lowest, tl.where(inside, u, -FAR))
        if NAME == "forward_kl":
            gap = _moment(gap, goal_total, goal_rise, goal_below, goal_rise - rise, goal_below - below)
            lowest = tl.minimum(lowest, tl.where(inside, z, -FAR))
        energy = _moment(energy, total, rise, below, rise, below)
        total = tl.exp(-rise) * total + tl.exp(below)
        goal_total = tl.exp(-goal_rise) * goal_total + tl.exp(goal_below)
    return peak, total, energy, goal, goal_total, gap, tl.min(lowest, 0)


@triton.jit
def _read_again(
    logits: tl.tensor,
    target: tl.tensor,
    width: tl.tensor,
    end: tl.tensor,
    peak: tl.tensor,
    log_sum: tl.tensor,
    goal: tl.tensor,
    goal_log_sum: tl.tensor,
    parameter: tl.tensor,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """Return the divergence and its slope's mean, from log-probabilities; `end` is the width, or 0 for neither."""
    values, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p, log_ratio, q = _pair(logits, target, columns, width, peak, log_sum, goal, goal_log_sum)
        value, slope = _value_and_slope(p, q, log_ratio, parameter, NAME)
        values += value
        slopes += p * slope
    return tl.sum(values, 0), tl.sum(slopes, 0)


@triton.jit
def _read_on(
    logits: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    energy: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    for start in range(first, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        peak, rise, below = _advance(peak, _load(logits + columns, columns < end))
        energy = _moment(energy, total, rise, below, rise, below)
        total = tl.exp(-rise) * total + tl.exp(below)
    return peak, total, energy


@triton.jit
def _nothing(BLOCK: tl.constexpr) -> tl.tuple:
    """Return the running sums of no logits: peak, sum of exp(z - peak), sum of the same times (z - peak).

    The sums are kept per lane of a tile, and added up at the end.
    """
    return tl.full([], FAR, tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def _advance(peak: tl.tensor, values: tl.tensor) -> tl.tuple:
    """Return the new peak, how far it rose, and how far above it (at most 0) each logit is."""
    higher = tl.maximum(peak, tl.max(values, 0))
    return higher, higher - peak, values - higher


@triton.jit
def _moment(
    moment: tl.tensor, total: tl.tensor, rise: tl.tensor, below: tl.tensor, shift: tl.tensor, distance: tl.tensor
) -> tl.tensor:
    """Return the sum of exp(z - peak) times a distance for a peak that rose, by which the old distances shifted."""
    return tl.exp(-rise) * (moment - shift * total) + tl.exp(below) * distance


@triton.jit
def _load(places: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Read logits in float32; FAR below stands for what is outside, and for -inf."""
    values = tl.load(places, mask=inside, other=FAR).to(tl.float32)
    return tl.where(values < FAR, FAR, values)


@triton.jit
def _logprobs(values: tl.tensor, peak: tl.tensor, log_sum: tl.tensor) -> tl.tensor:
    """Return log-probabilities; not by `maximum`, which would hide that a logit is not a number."""
    logprobs = (values - peak) - log_sum
    return tl.where(logprobs < LOWEST, LOWEST, logprobs)


@triton.jit
def _store_statistics(table: tl.tensor, count: tl.tensor, peak: tl.tensor, total: tl.tensor, energy: tl.tensor) -> None:
    log_sum = tl.log(tl.sum(total, 0))
    _store_pair(table, PEAK, count, peak, log_sum)
    tl.store(table + ENTROPY * count, log_sum - tl.sum(energy, 0) / tl.sum(total, 0))


@triton.jit
def _store_pair(table: tl.tensor, field: tl.tensor, count: tl.tensor, first: tl.tensor, second: tl.tensor) -> None:
    tl.store(table + field * count, first)
    tl.store(table + (field + 1) * count, second)
