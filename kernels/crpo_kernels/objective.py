"""The mathematics of every policy term and KL estimator, written once for torch and for Triton.

Each function is plain arithmetic on per-token values over one name, ``ops`` (``ops.exp``,
``ops.where``). Here ``ops`` is torch; a Triton twin is made by rebuilding all functions of this
module in one scope in which ``ops`` is ``triton.language``. That is why there is

* no import besides ``ops``, no tensor method, no keyword argument of torch;
* no minimum, maximum or clamp: on a GPU ``tl.minimum(nan, 1)`` is 1, so a NaN would silently become
  a clip edge. Every bound is ``where(bound < x, bound, x)``: the comparison is false for NaN and x
  stays.

Each term returns its value (minimised, per token, before ``token_weights``) and its slope, which is
d value / d logprob. Where a paper puts a stop-gradient, the slope says so and not the value. At a
clip edge itself (ratio == 1 + clip_high) the unclipped slope holds: the edges are inclusive.

    r = exp(clamp(log_ratio, +-20))          the slope of r is 0 where the clamp is active
    clip    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)             PPO, GRPO (2402.03300)
    gspo    the same on the sequence's mean log ratio: r_t = sg[s] exp(lp - sg[lp])  (2507.18071)
    cispo   -sg[min(r, 1 + clip_high)] A lp                                         (2506.13585)
    sft     -lp
    k1      lp - ref          k2  (lp - ref)^2 / 2          k3  e^x - 1 - x with x = ref - lp
"""

# ruff: noqa: ANN001, ANN201  (a value is a tensor in torch and a block of registers in Triton)
import torch as ops

LOG_RATIO_BOUND = 20.0  # nats; e^20 = 4.9e8 still squares within fp32
SERIES_BOUND = 0.5  # |x| below which e^x - 1 - x is summed as a series, because there it cancels


def at_most(x, bound):
    """min(x, bound) that keeps a NaN in ``x``."""
    return ops.where(bound < x, bound, x)


def at_least(x, bound):
    """max(x, bound) that keeps a NaN in ``x``."""
    return ops.where(x < bound, bound, x)


def bounded_exp(log_ratio):
    """exp(clamp(log_ratio, +-20)): finite for whatever a stale policy produces."""
    return ops.exp(at_least(at_most(log_ratio, LOG_RATIO_BOUND), -LOG_RATIO_BOUND))


def clip_term(log_ratio, advantages, clip_low, clip_high):
    """PPO's pessimistic clip; returns value, slope, ratio, is_clipped.

    The minimum of r A and clip(r) A differs from r A only where the ratio has moved beyond the edge
    in the direction that the advantage rewards; there the value is constant.
    """
    ratio = bounded_exp(log_ratio)
    upper = 1.0 + clip_high
    lower = 1.0 - clip_low
    is_above = (advantages > 0) & (ratio > upper)
    is_below = (advantages < 0) & (ratio < lower)
    is_clipped = is_above | is_below
    is_out_of_bounds = (log_ratio > LOG_RATIO_BOUND) | (log_ratio < -LOG_RATIO_BOUND)
    clipped_ratio = ops.where(is_above, upper, ops.where(is_below, lower, ratio))
    moving_ratio = ops.where(is_clipped | is_out_of_bounds, 0.0, ratio)
    return -clipped_ratio * advantages, -moving_ratio * advantages, ratio, is_clipped


def cispo_term(logprob, log_ratio, advantages, clip_high):
    """REINFORCE with a capped constant weight; returns value, slope, ratio, is_clipped."""
    ratio = bounded_exp(log_ratio)
    slope = -at_most(ratio, 1.0 + clip_high) * advantages
    return slope * logprob, slope, ratio, ratio > 1.0 + clip_high


def sft_term(logprob, log_ratio):
    """Negative log-likelihood; returns value, slope, ratio, is_clipped (nowhere)."""
    return -logprob, 0.0 * logprob - 1.0, bounded_exp(log_ratio), logprob > logprob


def policy_term(policy, logprob, log_ratio, advantages, clip_low, clip_high):
    """The term that ``policy`` names; returns value, slope, ratio, is_clipped."""
    if policy == "sft":
        return sft_term(logprob, log_ratio)
    if policy == "cispo":
        return cispo_term(logprob, log_ratio, advantages, clip_high)
    return clip_term(log_ratio, advantages, clip_low, clip_high)  # clip; gspo by its log ratio


def exp_remainder(x):
    """e^x - 1 - x, accurate where it cancels; exp's argument, and only that, is bounded by 20."""
    series = 1.0 + x / 12.0
    series = 1.0 + x / 11.0 * series
    series = 1.0 + x / 10.0 * series
    series = 1.0 + x / 9.0 * series
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    is_small = (x < SERIES_BOUND) & (x > -SERIES_BOUND)
    return ops.where(is_small, 0.5 * x * x * series, bounded_exp_above(x) - 1.0 - x)


def bounded_exp_above(x):
    """exp(min(x, 20))."""
    return ops.exp(at_most(x, LOG_RATIO_BOUND))


def kl_term(estimator, logprob, ref_logprob):
    """Estimate of KL(policy || reference) from the sampled token; returns value and slope.

    The slope of k3 is 1 - e^x = -(x + k3). With exp's argument bounded it stays at 1 - e^20 beyond:
    a policy that has left the reference altogether is still pulled back toward it.
    """
    x = ref_logprob - logprob
    if estimator == "k1":
        return -x, 0.0 * x + 1.0
    if estimator == "k2":
        return 0.5 * x * x, -x
    value = exp_remainder(x)
    return value, -(value + x)


def rho_term(rho_mode, log_rho, rho_cap, rho_floor):
    """Constant weight against sampling by another engine: exp(log_rho), truncated or masked."""
    rho = ops.exp(log_rho)
    if rho_mode == "truncate":
        return at_most(rho, rho_cap)
    return ops.where((rho_cap < rho) | (rho < rho_floor), 0.0, rho)


def weighted(weight, x):
    """Weight * x, but 0 where the weight is 0, whatever garbage (an unset logprob) made ``x``."""
    return ops.where(weight == 0, 0.0, weight * x)
