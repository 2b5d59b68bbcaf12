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


def remainder_series(x):
    """e^x - 1 - x by its series, for |x| < 0.5."""
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
    return 0.5 * x * x * series


def is_near_zero(x):
    """Where e^x - 1 cancels and the series holds."""
    return (x < SERIES_BOUND) & (x > -SERIES_BOUND)


def exp_remainder(x):
    """e^x - 1 - x, accurate where it cancels; exp's argument, and only that, is bounded by 20."""
    return ops.where(is_near_zero(x), remainder_series(x), bounded_exp_above(x) - 1.0 - x)


def expm1(x):
    """e^x - 1, accurate where it cancels; x is a logprob, at most 0 up to rounding."""
    return ops.where(is_near_zero(x), x + remainder_series(x), ops.exp(x) - 1.0)


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


def token_terms(
    policy,
    kl_estimator,
    rho_mode,
    uses_kl,
    logprob,
    log_ratio,
    log_rho,
    advantages,
    ref_logprob,
    clip_low,
    clip_high,
    kl_coef,
    rho_cap,
    rho_floor,
):
    """Rho * policy term + kl_coef * KL; returns value, slope, ratio, kl, rho, is_clipped.

    ``log_rho`` and ``ref_logprob`` are None without a correction and without a reference, and
    ``uses_kl`` says whether the KL takes part or is only told.
    """
    value, slope, ratio, is_clipped = policy_term(
        policy, logprob, log_ratio, advantages, clip_low, clip_high
    )
    rho = 0.0 * logprob + 1.0
    if rho_mode is not None:
        rho = rho_term(rho_mode, log_rho, rho_cap, rho_floor)
        value = rho * value
        slope = rho * slope
    kl = 0.0 * logprob
    if ref_logprob is not None:
        kl, kl_slope = kl_term(kl_estimator, logprob, ref_logprob)
        if uses_kl:
            value = value + kl_coef * kl
            slope = slope + kl_coef * kl_slope
    return value, slope, ratio, kl, rho, is_clipped


def row_loss(value, token_weight, entropy, entropy_weight, lse, z_weight):
    """What a row adds to the loss; the weights of entropy and lse^2 may be None."""
    loss = weighted(token_weight, value)
    if entropy_weight is not None:
        loss = loss + weighted(entropy_weight, entropy)
    if z_weight is not None:
        loss = loss + weighted(z_weight, lse * lse)
    return loss


def lse_slope(lse, z_weight):
    """The derivative of z_weight * lse^2."""
    return 2.0 * z_weight * lse


def row_factors(g, q, l, logprob, entropy, mean_shift):  # noqa: E741  (the names of the formula)
    """How g, q, l (d loss / d logprob, entropy, lse) reach a row's logits; q and l may be None.

        dz_j = p_j (a - q (z_j - m))        a = l - g + q t/s
        dz_y = g (1 - p_y) - p_y (q (logprob + H) - l)      1 - p_y = -expm1(logprob): no cancelling

    Returns a and dz_y; t/s is ``mean_shift``, the mean of z_j - m.
    """
    minus_p = -ops.exp(logprob)
    a = -g
    label_grad = -g * expm1(logprob)
    if q is not None:
        a = a + q * mean_shift
        label_grad = label_grad + minus_p * q * (logprob + entropy)
    if l is not None:
        a = a + l
        label_grad = label_grad - minus_p * l
    return a, label_grad
