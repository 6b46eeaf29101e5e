"""The tensor maths of PPO from human feedback: pure functions on torch alone, in the order an iteration uses them.

Shapes: B episodes, T response tokens, V vocabulary. Place t of a [B, T] tensor belongs to response token t:
`logprobs[:, t]` is log π(token t | all before it), `values[:, t]` the value of the state *before* token t.

A mask is [B, T], of any dtype, non-zero where a token counts. What lies outside it influences nothing, not even as NaN
or inf: no result and no gradient. Results outside it are 0. (So `torch.where`; multiplying by the mask leaves 0·NaN.)

Results have the dtype of the inputs, the widest where they differ, and that of floats where all are integers. Half
precision is widened to float32 inside: sums over thousands of tokens do not fit it. Log-probabilities, entropies and KL
of half-precision logits stay float32.

`response_logprobs` and `entropy` are the plain definitions: training and sampling work them out piece by piece and in
place (rlhf_tasks/head.py, rollout.py), which tests hold to these, and these to the numbers of TRL and OpenAI.

Sources, cited below by name:
- PPO: Schulman et al. 2017, arXiv:1707.06347. GAE: Schulman et al. 2015, arXiv:1506.02438.
- Ziegler: Ziegler et al. 2019, arXiv:1909.08593. KL-approx: Schulman 2020, joschu.net/blog/kl-approx.html.
- Dual clip: Ye et al. 2020, arXiv:1912.09729. 37 details: Huang et al. 2022, "The 37 Implementation Details of PPO".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

#: e^80 fits float32 with room to multiply; a ratio of that size is divergence anyhow, but must not become inf·0 = NaN
LOG_RATIO_LIMIT = {torch.float32: 80.0, torch.float64: 700.0}
#: iterations in which the slow part of `LengthControl` moves by as much as the fast one
SLOW_ITERATIONS = 15


def _wide(function: Callable[P, R]) -> Callable[P, R]:
    """Compute in float32 at least, and give the result back in the widest dtype that came."""

    @wraps(function)
    def widened(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        floats = [a.dtype for a in tensors if a.is_floating_point()]
        dtype = reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()
        inside = torch.promote_types(dtype, torch.float32)

        def widen(x: Any) -> Any:
            return x.to(inside) if isinstance(x, Tensor) and x.dtype != torch.bool else x

        wide: Any = function
        result = wide(*(widen(a) for a in args), **{name: widen(a) for name, a in kwargs.items()})
        if isinstance(result, Tensor):
            return result.to(dtype)  # type: ignore[return-value]
        parts = [x.to(dtype) for x in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)  # type: ignore[return-value]

    return widened


# --- Tokens: which count, how likely they are -----------------------------------------------------------------------


def response_mask(tokens: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """True up to and including the first EOS or stop token of each row; everywhere where there is none.

    Args: tokens: [B, T] response tokens. stop_ids: the tokens that end a response, EOS among them; may be empty.
    Returns: [B, T] bool.
    """
    stops = torch.isin(tokens, torch.tensor(list(stop_ids), dtype=tokens.dtype, device=tokens.device))
    stops_before = stops.cumsum(dim=1) - stops.long()  # exclusive, so that the stop token itself stays in
    return stops_before == 0


def last_index(mask: Tensor) -> Tensor:
    """Index of the last counted place of each row, -1 where a row has none. mask: [B, T]. Returns: [B] int64."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), places, -1).amax(dim=1)


def response_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the tokens, as `gather - logsumexp`: no [B, T, V] log-softmax is kept.

    Rollout, Ref and update must use one temperature, or the ratio of the first step is not 1.

    Args: logits: [B, T, V], place t predicting token t. tokens: [B, T] int64.
    Returns: [B, T], float32 for half-precision logits.
    """
    _check_shape("tokens", tokens, logits.shape[:-1])
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(dim=-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """-Σ_v p log p of p = softmax(logits / temperature), in nats. Excluded tokens (-inf logits) contribute 0, not NaN.

    Args: logits: [B, T, V]. Returns: [B, T], float32 for half-precision logits.
    """
    logp = _scaled(logits, temperature).log_softmax(dim=-1)
    return -(logp.exp() * torch.where(logp == -torch.inf, 0, logp)).sum(dim=-1)


# --- KL to the reference --------------------------------------------------------------------------------------------


@_wide
def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(Actor ‖ Ref) at each token that the Actor sampled, with d = logprob - ref_logprob (KL-approx).

    k1 = d: unbiased, and as a reward the only one whose policy gradient is the KL's. k2 = d²/2: biased, low variance.
    k3 = exp(-d) - 1 + d: unbiased, never negative. abs = |d|: a peer's option, no KL.

    Args: logprobs, ref_logprobs: [B, T]. estimator: "k1", "k2", "k3" or "abs".
    Returns: [B, T] nats, unmasked. Raises: ValueError for any other estimator.
    """
    _check_shape("ref_logprobs", ref_logprobs, logprobs.shape)
    d = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0
        case "abs":
            return d.abs()
    raise ValueError(f"Unknown KL estimator {estimator!r}: use one of 'k1', 'k2', 'k3', 'abs'.")


def kl_full(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(p ‖ q) = Σ_v p log(p / q) of p = softmax(logits), q = softmax(ref_logits), over the last dimension.

    Tokens with p = 0 contribute 0, also where q = 0. Divide both by the temperature before.

    Args: logits, ref_logits: [..., V]. Returns: [...] nats, inf where q excludes what p allows.
    """
    _check_shape("ref_logits", ref_logits, logits.shape)
    logp, logq = _scaled(logits, 1.0).log_softmax(dim=-1), _scaled(ref_logits, 1.0).log_softmax(dim=-1)
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0)).sum(dim=-1)


@dataclass
class FixedKL:
    """The KL coefficient β, the same for the whole run."""

    coef: float

    def __post_init__(self) -> None:
        _check_number("kl coefficient", self.coef, self.coef >= 0, "0 or more")

    def update(self, kl: float, episodes: int) -> None:
        """Does nothing; here so that both controllers are called alike."""


@dataclass
class AdaptiveKL:
    """The KL coefficient β, steered so that the KL of an episode approaches `target` (Ziegler, section 2.2).

    `target` is in nats per episode: a sum over tokens, not their mean. `horizon` is the number of episodes over which β
    can change by about a fifth. `coef` is the whole state.
    """

    coef: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        _check_number("kl coefficient", self.coef, self.coef >= 0, "0 or more")
        _check_number("kl target", self.target, self.target > 0, "above 0 nats per episode")
        _check_number("kl horizon", self.horizon, self.horizon > 0, "above 0 episodes")

    def update(self, kl: float, episodes: int) -> None:
        """β ← β·(1 + clip(kl/target - 1, ±0.2)·episodes/horizon), once after each iteration.

        Peers let β turn negative when episodes > 5·horizon, and stay NaN after one NaN. Here a kl that is not finite
        changes nothing and the factor stops at 0, where β stays: keep the horizon well above an iteration's episodes.

        Args: kl: mean over episodes of the KL summed over tokens. episodes: how many the iteration had.
        """
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        coef = self.coef * max(1 + error * episodes / self.horizon, 0.0)
        if math.isfinite(kl) and math.isfinite(coef):
            self.coef = coef


@dataclass
class LengthControl:
    """The price of a cut answer, steered so that answers stay as long as SFT's (`ppo.missing_eos.mode: steer`).

    A Reward has seen whole texts only, so how it likes one that was cut is an accident of its training. PPO finds such
    an accident, and lets all answers run on, or end early. Here the price of being cut rises while answers are longer
    than SFT's, and falls, below 0 too, while they are shorter: a PI controller, whose slow part comes to be worth the
    accident. `price` and `slow`, which starts as the price, are the whole state.
    """

    price: float
    rate: float
    target: float
    slow: float = math.nan

    def __post_init__(self) -> None:
        self.slow = self.price if math.isnan(self.slow) else self.slow

    def update(self, length: float) -> None:
        """After each iteration, with e = length / target - 1:

            slow ← slow + rate·e / 15        price ← slow + rate·e

        Args: length: mean tokens of the iteration's answers.
        """
        error = length / self.target - 1
        self.slow += self.rate * error / SLOW_ITERATIONS
        self.price = self.slow + self.rate * error


# --- Rewards and advantages -----------------------------------------------------------------------------------------


@_wide
def assemble_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: -β·kl_t, plus the score at the last counted token of the row (Ziegler, eq. 2).

    A row without a counted token gets no score: all 0.

    Args: scores: [B]. kl, mask: [B, T]. kl_coef: β. Returns: [B, T], 0 outside the mask.
    """
    _check_shape("scores", scores, mask.shape[:1])
    is_last = torch.arange(mask.shape[1], device=mask.device) == last_index(mask).unsqueeze(1)
    return _only(-kl_coef * kl, mask) + torch.where(is_last, scores.unsqueeze(1), 0)


@_wide
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the counted places of the whole tensor, 0 where nothing counts.

    Args: x, mask: same shape. Returns: scalar.
    """
    return _only(x, mask).sum() / _count(mask)


@_wide
def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the counted places of the whole tensor, over n - 1 if unbiased, else over n (OpenAI's code).

    One counted place has variance 0. (TRL gives NaN there, and then whitens the batch to NaN.)

    Args: x, mask: same shape. Returns: scalar.
    """
    n = _count(mask)
    squares = _only(x - masked_mean(x, mask), mask).square().sum()
    return squares / ((n - 1).clamp(min=1) if unbiased else n)


@_wide
def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the counted places of the whole tensor; `shift_mean=False` adds the mean back.

    Advantages are whitened with the mean removed, rewards (a peer's option) with the mean kept.

    Args: x, mask: same shape. Returns: the same shape, 0 outside the mask.
    """
    mean = masked_mean(x, mask)
    whitened = (_only(x, mask) - mean) * torch.rsqrt(masked_var(x, mask, unbiased) + eps)
    return _only(whitened if shift_mean else whitened + mean, mask)


@_wide
def gae(values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (GAE, eq. 16), from the last place to the first, with V and A after it 0:

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    Values and rewards outside the mask are 0, so a right-padded response ends in a state of value 0. A hole *inside* a
    response still is a step of the recursion, with V = r = 0 (as in TRL 0.11).

    Args: values, rewards, mask: [B, T]. Returns: raw (not whitened) advantages and returns, [B, T], 0 outside the mask.
    """
    v, r = _only(values, mask), _only(rewards, mask)
    advantages = torch.zeros_like(v)
    next_value = next_advantage = torch.zeros_like(v[:, 0])
    for t in reversed(range(v.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = v[:, t]
        advantages[:, t] = next_advantage
    return _only(advantages, mask), _only(advantages + v, mask)


@_wide
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns): 1 perfect, 0 no better than a constant, below 0 worse.

    0 where the returns are all alike. A constant offset of the Critic does not show here, but in `CriticLoss.error`.

    Args: values, returns, mask: [B, T]. Returns: scalar.
    """
    counted = mask.bool()
    highest = torch.where(counted, returns, -torch.inf).amax()
    lowest = torch.where(counted, returns, torch.inf).amin()
    ratio = masked_var(returns - values, mask) / masked_var(returns, mask)
    return torch.where(highest > lowest, 1 - ratio, 0)  # var of equal numbers is 0 only up to rounding


# --- Losses ---------------------------------------------------------------------------------------------------------


class ActorLoss(NamedTuple):
    """Scalars: sums over the mask divided by `count`. Only `loss` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor  # how often the clipped term is strictly the larger one, so that the token has no gradient
    approx_kl: Tensor  # ½·mean((log ρ)²): k2 estimate of KL(old ‖ new), never negative; peers' "approxkl"
    policy_kl: Tensor  # mean(old - new): k1 estimate of the same, signed; TRL 0.11's "policykl"
    ratio_mean: Tensor  # mean(ρ): 1 in expectation


class CriticLoss(NamedTuple):
    """Scalars: sums over the mask divided by `count`. Only `loss` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor  # how often the clipped term is strictly the larger one
    error: Tensor  # mean((V - R)²): without the clip and the ½
    value_mean: Tensor  # mean(V)


@_wide
def actor_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float | None,
    count: float | Tensor | None = None,
    dual_clip: float | None = None,
) -> ActorLoss:
    """max(-A·ρ, -A·clip(ρ, 1-ε, 1+ε)) with ρ = exp(logprob - old_logprob) (PPO, eq. 7).

    Args:
        logprobs, old_logprobs, advantages, mask: [B, T].
        clip: ε; None is the plain ratio loss -A·ρ.
        count: tokens of the whole *minibatch*; by default those of this call. Micro-batches that are all given the
            count of their minibatch have losses, gradients and statistics that add up to its own, however it is split.
        dual_clip: c > 1 bounds the loss of a token with A < 0 by -A·c, however large ρ is (dual clip); None does not.

    log ρ is held within ±80 in float32, ±700 in float64, past which a token has no gradient: peers' ρ is inf there.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}: expected a number above 1 (such as 3), or None for no dual clip.")
    log_ratio, advantages = _only(logprobs - old_logprobs, mask), _only(advantages, mask)
    limit = LOG_RATIO_LIMIT[log_ratio.dtype]
    ratio = log_ratio.clamp(-limit, limit).exp()
    plain = -advantages * ratio
    clipped = plain if clip is None else -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    n = _count(mask, count)
    return ActorLoss(
        loss=loss.sum() / n,  # nothing to mask: A is 0 outside
        clip_fraction=(clipped > plain).sum(dtype=loss.dtype) / n,
        approx_kl=(log_ratio.detach().square() / 2).sum() / n,
        policy_kl=-log_ratio.detach().sum() / n,
        ratio_mean=_only(ratio.detach(), mask).sum() / n,
    )


@_wide
def critic_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    count: float | Tensor | None = None,
) -> CriticLoss:
    """½·max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²) (37 details, no. 9).

    Args:
        values, old_values, returns, mask: [B, T]; values are the Critic's now, old_values its values at the rollout.
        clip: ε; None is the plain ½·(V - R)².
        count: as in `actor_loss`.
    """
    values, old_values, returns = _only(values, mask), _only(old_values, mask), _only(returns, mask)
    plain = (values - returns).square()
    clipped = plain if clip is None else (values.clamp(old_values - clip, old_values + clip) - returns).square()
    n = _count(mask, count)
    return CriticLoss(
        loss=torch.maximum(plain, clipped).sum() / 2 / n,
        clip_fraction=(clipped > plain).sum(dtype=plain.dtype) / n,
        error=plain.detach().sum() / n,
        value_mean=values.detach().sum() / n,
    )


# --- Helpers --------------------------------------------------------------------------------------------------------


def _only(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask counts, 0 elsewhere, in value and in gradient: the door through which all masked input comes."""
    _check_shape("mask", mask, x.shape)
    return torch.where(mask.bool(), x, 0)


def _count(mask: Tensor, given: float | Tensor | None = None) -> Tensor:
    """Number of counted places, or the one that is given; at least 1, so that nothing counted means 0 and not 0/0."""
    count = mask.bool().sum() if given is None else torch.as_tensor(given, device=mask.device)
    return count.clamp(min=1)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, in float32 at least; no copy of [B, T, V] where neither changes anything."""
    _check_number("temperature", temperature, temperature > 0, "above 0")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def _check_shape(name: str, x: Tensor, shape: torch.Size) -> None:
    """Broadcasting is the silent bug of this trade: [N, 1] against [N] trains on [N, N]."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, but its counterpart needs {list(shape)}.")


def _check_number(name: str, value: float, valid: bool, expected: str) -> None:
    if not (valid and math.isfinite(value)):
        raise ValueError(f"{name} is {value}: expected a finite number {expected}.")
