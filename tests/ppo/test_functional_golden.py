"""The maths of PPO against numbers of public peers (`tests/golden/README.md`).

Every output of every case is accounted for. It is compared (`same`), if need be after a transformation to the peer's
convention, which `CONVENTIONS` then names; or we know that we give another number (`differs`), and `DIFFERENT` says
why; or this module does not compute it, and `NOT_HERE` says who does. Anything else fails.
"""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_tasks.ppo import functional as F

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
ESTIMATOR = {"kl": "k1", "mse": "k2", "abs": "abs"}  # TRL 0.11's names

# Peers' conventions that we do not share, but reproduce from our functions by what we pass in: `same(..., via=KEY)`.
CONVENTIONS = {
    "score after the end": "TRL 1.12 puts the score one place after the last kept token, if there is one, and gives "
    "that place a value (padding_mask_p1). Ours sits on the last token. Reproduced by a mask with one place more.",
    "pad ends the response": "TRL takes the response to end before the first pad in it, so a pad that the policy drew "
    "ends it, and with pad == eos the eos does not count. Ours ends with the first stop token, which counts.",
    "eos alone": "TRL 1.12 asks whether the response holds eos, not whether it holds the stop token.",
    "padding dilutes": "TRL 1.12 averages approxkl, ratio and entropy over all places, padding included (log-ratio 0, "
    "ratio 1 there). Ours over tokens. Reproduced by count = number of places.",
    "population variance": "OpenAI divides by n, we and TRL by n - 1. Reproduced by unbiased=False.",
    "temperature epsilon": "TRL 1.12 divides logits by temperature + 1e-7.",
    "explained variance of averages": "TRL 0.11: 1 - mean(V error of minibatches) / mean(var of returns), which counts "
    "a constant offset of the Critic as unexplained. Ours: 1 - var(R - V) / var(R) over the whole batch.",
    "stop from a place on": "OpenAI can ignore stop tokens before `truncate_after`. Reproduced by masking the rest.",
}

# (case ids, outputs, why our number is another one)
DIFFERENT = [
    ("masked_stats/trl-*/one", "var_unbiased whiten whiten_keep_mean mean_axis1", "TRL: one counted element has NaN "
     "variance, and rows without any have NaN means. Here 0, as in OpenAI's code."),
    ("masked_stats/trl-*/none", "mean mean_axis1 var_biased var_unbiased whiten whiten_keep_mean", "TRL: nothing "
     "counted gives NaN or an exception. Here 0: an empty micro-batch must not stop or poison a run."),
    ("gae/trl-*/B1T1", "advantages", "TRL whitens one element to NaN, here to 0, as in OpenAI's code."),
    ("gae/trl-0.11.4/whitenrewards-right", "advantages_raw advantages returns", "peer_bug: whitened rewards are not 0 "
     "in padding and flow back into real tokens. Here what is outside the mask carries nothing."),
    ("kl_rewards/trl-0.11.4/kl-emptyrow", "*", "TRL raises IndexError; here a row without a token gets no score."),
    ("kl_controller/*/adaptive-2", "value_after", "peers turn β negative at n_steps > 5·horizon; here the factor stops "
     "at 0. Compared up to that step."),
    ("losses/trl-0.11.4/ratio-threshold", "loss_policy loss_value loss_total returned_pg_loss returned_vf_loss "
     "grad_logprobs grad_vpreds", "TRL 0.11 zeroes the losses of a batch with a large mean ratio; we have no such "
     "guard (the loop may stop the epochs by approx_kl instead). All statistics are compared."),
    ("losses/trl-*/neg-inf-logits", "policy_entropy entropy entropy_per_token", "peer_bug: a -inf logit makes their "
     "entropy NaN; here it adds 0."),
    ("logprobs/trl-1.12.0/neg-inf", "entropy", "peer_bug: as above."),
]  # fmt: skip

# (case ids, outputs, where it belongs instead)
NOT_HERE = [
    ("reward_model_loss/*", "*", "the reward model's loss: rlhf_tasks/reward.py and its own tests"),
    ("kl_controller/*/early_stop-*", "stop", "when to stop the epochs is the optimization loop's decision"),
    ("kl_rewards/trl-1.12.0/*", "scores_after_penalty", "`missing_eos` is the evaluation phase's; used as input here"),
    ("kl_rewards/trl-1.12.0/*", "logprobs_masked ref_logprobs_masked", "TRL writes 1.0 over padding; we only mask"),
    ("token_positions/trl-*/*", "attention_mask position_ids input_ids", "the model's inputs: the rollout's"),
    ("token_positions/trl-0.11.4/forward-*", "mask values", "slicing prompt + response rows: the experience's"),
    ("step_stats/lm-human-preferences/*", "val_error returns_var val_var_explained", "plain averages of given numbers"),
    ("e2e/*", "metric_lr metric_loss_*_avg metric_policy_*_avg metric_val_*", "averages over three epochs, of which "
     "the second was not captured; the per-epoch `*_stats` of the other two are compared"),
    ("e2e/*", "metric_objective_scores", "the mean of the scores that are an input here"),
]  # fmt: skip

COVERED: set[str] = set()


@cache
def cases(topic: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{topic}.json").read_text())["cases"]


def tensor(array: dict[str, Any]) -> Tensor:
    """Exactly what the file says; float64 where it does not say another dtype."""
    return torch.tensor([float(x) for x in array["data"]], dtype=torch.float64).reshape(array["shape"]).to(
        DTYPES.get(array["dtype"], torch.float64)
    )  # fmt: skip


def listed(table: list[tuple[str, str, str]], case: str, output: str) -> bool:
    return any(fnmatch(case, ids) and any(fnmatch(output, o) for o in names.split()) for ids, names, _ in table)


class Golden:
    """One golden case, with its real inputs in `dtype`; keeps account of which outputs were looked at."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        self.id, self.name, self.params, self.dtype = case["id"], case["id"].split("/")[-1], case["params"], dtype
        self.inputs = {k: self.cast(tensor(v)) for k, v in case["inputs"].items()}
        self.expected = {k: tensor(v) for k, v in case["outputs"].items()}
        error = case.get("error") or {}
        self.errors = {"*": error} if isinstance(error, str) else error
        self.seen: set[str] = set()

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def out(self, name: str) -> Tensor:
        """A golden output that serves as an input to the next step."""
        return self.cast(self.expected[name])

    def tolerance(self, expected: Tensor) -> float:
        """README, "Suggested tolerances"."""
        if self.id.startswith(("e2e", "step_stats")) and expected.dtype == torch.float32:
            return 3e-5
        if self.dtype == torch.float64:
            return 1e-9 if expected.dtype == torch.float64 else 2e-6
        if self.id.startswith("logprobs") and self.name.endswith("-1"):
            return 1e-4  # large logits
        if self.id.startswith("masked_stats") and self.name == "constant":
            return 1e-3  # rounding divided by sqrt(eps)
        return 1e-5

    def close(self, actual: Tensor, expected: Tensor) -> Tensor:
        difference = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
        return (difference <= self.tolerance(expected)) | (actual.double() == expected.double())

    def same(self, name: str, actual: Tensor, where: Tensor | None = None, via: str | None = None) -> None:
        """The peer's output is ours, at the places `where` counts."""
        assert via is None or via in CONVENTIONS
        assert not listed(NOT_HERE, self.id, name), f"{name} is compared and in NOT_HERE"
        expected, self.seen = self.expected[name], self.seen | {name}
        if actual.is_floating_point():
            assert actual.dtype == self.dtype, f"{name} came back as {actual.dtype}"
        assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
        right = self.close(actual.detach(), expected)
        wrong = ~right if where is None else ~right & where.bool()
        assert not wrong.any(), f"{name}: {actual[wrong].tolist()} is not {expected[wrong].tolist()}"

    def differs(self, name: str, actual: Tensor, where: Tensor | None = None) -> None:
        """The peer's output (or exception) is knowingly not ours: ours is finite, theirs is another, a row says why."""
        assert listed(DIFFERENT, self.id, name), f"no row of DIFFERENT for {self.id}: {name}"
        self.seen.add(name)
        assert actual.isfinite().all()
        if name in self.expected:
            right = self.close(actual.detach(), self.expected[name])
            assert not (right if where is None else right | ~where).all(), f"{name} is the same after all"
        else:
            assert name in self.errors

    def same_or_differs(self, name: str, actual: Tensor, where: Tensor | None = None, via: str | None = None) -> None:
        """For a group of cases of which some are in DIFFERENT: those must differ, the others agree."""
        if listed(DIFFERENT, self.id, name):
            self.differs(name, actual, where)
        else:
            self.same(name, actual, where, via)

    def finish(self) -> None:
        rest = {n for n in (self.expected | self.errors).keys() - self.seen if not listed(NOT_HERE, self.id, n)}
        assert not rest, f"{self.id}: neither compared nor explained: {sorted(rest)}"


def golden(topic: str, names: str = "*") -> Callable[[Callable[[Golden], None]], Callable[..., None]]:
    """Run the test once for every case of a file whose id is `.../names`, in float64 and in float32."""
    chosen = [c for c in cases(topic) if fnmatch(c["id"].split("/", 1)[1], names)]
    assert chosen
    COVERED.update(c["id"] for c in chosen)

    def wrap(test: Callable[[Golden], None]) -> Callable[..., None]:
        @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
        @pytest.mark.parametrize("case", chosen, ids=lambda c: c["id"])
        def run(case: dict[str, Any], dtype: torch.dtype) -> None:
            g = Golden(case, dtype)
            test(g)
            g.finish()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return wrap


def ones(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()


def row_sums(x: Tensor, mask: Tensor) -> Tensor:
    """Sums over the counted tokens of each row: what a reward of -(-1)·x with no score adds up to."""
    return F.assemble_rewards(x.new_zeros(x.shape[0]), x, mask, -1.0).sum(1)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ρ of each token, read off the plain loss: with A = 1 and count 1 its gradient is -ρ."""
    logprobs = logprobs.detach().requires_grad_()
    loss = F.actor_loss(logprobs, old_logprobs, torch.ones_like(logprobs), mask, clip=None, count=1).loss
    return -gradients(loss, logprobs)[0]


# --- KL and rewards -------------------------------------------------------------------------------------------------


@golden("kl_estimators")
def test_kl_estimators(g: Golden) -> None:
    vocabulary = torch.arange(len(g["logits_p"]))
    logp, logq = (
        F.response_logprobs(g[n].expand(len(vocabulary), -1), vocabulary, 1.0) for n in ("logits_p", "logits_q")
    )
    for k in ("k1", "k2", "k3"):
        if f"expect_{k}" in g.expected:
            per_token = F.kl_per_token(logp, logq, k)
            g.same(f"{k}_per_token", per_token)
            g.same(f"expect_{k}", (logp.exp() * per_token).sum())
            g.same(f"sample_mean_{k}", per_token[g["sample_ids"]].mean())
    full = F.kl_full(g["logits_p"], g["logits_q"])
    g.same("kl_analytic_torch", full)
    if "kl_full" in g.expected:
        g.same("kl_full", full)
        g.same("abs_per_token", F.kl_per_token(logp, logq, "abs"))


@golden("kl_rewards", "trl-0.11.4/*")
def test_kl_rewards_trl_0_11(g: Golden) -> None:
    mask, beta = g["mask"], g.params["kl_coef"]
    if g.params["kl_penalty"] == "full":
        kl = F.kl_full(g["logits"], g["ref_logits"])
    else:
        kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], ESTIMATOR[g.params["kl_penalty"]])
    rewards = F.assemble_rewards(g["scores"], kl, mask, beta)
    assert (rewards[mask == 0] == 0).all()
    if g.errors:
        g.differs("*", rewards)
        return
    g.same("kl", kl)
    g.same("non_score_reward", F.assemble_rewards(torch.zeros_like(g["scores"]), kl, ones(kl), beta))
    g.same("rewards", rewards, where=mask)


@golden("kl_rewards", "trl-1.12.0/*")
def test_kl_rewards_trl_1_12(g: Golden) -> None:
    responses, pad, stop, beta = (
        g["responses"],
        g.params["pad_token_id"],
        g.params["stop_token_id"],
        g.params["kl_coef"],
    )
    truncated = response_truncated(responses, stop, pad)
    g.same("truncated", truncated)
    mask, mask_p1 = trl_masks(truncated, pad)
    g.same("sequence_lengths", F.last_index(mask), via="pad ends the response")
    g.same("padding_mask", ~mask, via="pad ends the response")
    g.same("padding_mask_p1", ~mask_p1, via="score after the end")
    g.same("contains_eos", has_stop(truncated, g.params["eos_token_id"]), via="eos alone")
    if pad != stop and not (responses == pad)[F.response_mask(responses, stop_ids(stop))].any():
        assert torch.equal(F.response_mask(responses, stop_ids(stop)), mask)

    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], g.params["kl_estimator"])
    scores, no_scores = g.out("scores_after_penalty"), torch.zeros_like(g["scores"])
    g.same("kl", kl, where=mask)
    g.same("non_score_reward", F.assemble_rewards(no_scores, kl, mask, beta))
    theirs = F.assemble_rewards(scores, torch.where(mask, kl, 0), mask_p1, beta)
    g.same("rewards", theirs, via="score after the end")
    g.same("score_place", F.last_index(mask_p1), via="score after the end")

    ours = F.assemble_rewards(scores, kl, mask, beta)  # the place differs, the episode's reward does not
    torch.testing.assert_close(ours.sum(1)[mask.any(1)], theirs.sum(1)[mask.any(1)])


@golden("kl_rewards", "lm-human-preferences/*")
def test_kl_rewards_openai(g: Golden) -> None:
    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], "k1")
    g.same("kl", kl)
    g.same("non_score_reward", F.assemble_rewards(torch.zeros_like(g["scores"]), kl, ones(kl), g.params["kl_coef"]))
    g.same("rewards", F.assemble_rewards(g["scores"], kl, ones(kl), g.params["kl_coef"]))


@golden("kl_controller", "*/fixed-*")
def test_fixed_controller(g: Golden) -> None:
    g.same("value_after", controlled(F.FixedKL(g.params["init_kl_coef"]), g))


@golden("kl_controller", "*/adaptive-*")
def test_adaptive_controller(g: Golden) -> None:
    p = g.params
    after = controlled(F.AdaptiveKL(p["init_kl_coef"], p["target"], p["horizon"]), g)
    if g.name != "adaptive-2":
        g.same("value_after", after)
        return
    positive = (g.out("value_after") > 0).cumprod(0).bool()  # up to the peers' first negative coefficient
    assert positive.any()
    g.same("value_after", after, where=positive)
    g.differs("value_after", after, where=~positive)
    assert (after[~positive] == 0).all()


def controlled(controller: F.FixedKL | F.AdaptiveKL, g: Golden) -> Tensor:
    after = []
    for kl, n in zip(g["kl"].tolist(), g["n_steps"].tolist(), strict=True):
        controller.update(kl, n)
        after.append(controller.coef)
    return torch.tensor(after, dtype=g.dtype)


# --- Statistics, advantages -----------------------------------------------------------------------------------------


@golden("masked_stats", "trl-*/*")
def test_masked_stats_trl(g: Golden) -> None:
    x, mask = g["values"], g["mask"]
    g.same_or_differs("mean", F.masked_mean(x, mask))
    g.same_or_differs("mean_axis1", torch.stack([F.masked_mean(*row) for row in zip(x, mask, strict=True)]))
    g.same_or_differs("var_unbiased", F.masked_var(x, mask))
    g.same_or_differs("var_biased", F.masked_var(x, mask, unbiased=False))
    for name, shift_mean in (("whiten", True), ("whiten_keep_mean", False)):
        whitened = F.masked_whiten(x, mask, shift_mean)
        assert (whitened[mask == 0] == 0).all()
        g.same_or_differs(name, whitened, where=mask.bool())
    if "whiten_unmasked" in g.expected:
        g.same("whiten_unmasked", F.masked_whiten(x, ones(x)))
        g.same("whiten_unmasked_keep_mean", F.masked_whiten(x, ones(x), shift_mean=False))


@golden("masked_stats", "lm-human-preference*/*")
def test_masked_stats_openai(g: Golden) -> None:
    x = g["values"]
    g.same("whiten", F.masked_whiten(x, ones(x), unbiased=False), via="population variance")
    g.same("whiten_keep_mean", F.masked_whiten(x, ones(x), False, unbiased=False), via="population variance")


@golden("gae.trl-0.11.4")
def test_gae_trl_0_11(g: Golden) -> None:
    mask, rewards = g["mask"].bool(), g["rewards"]
    if g.params["whiten_rewards"]:
        rewards = F.masked_whiten(rewards, mask, shift_mean=False)
        g.same("whitened_rewards", rewards, where=mask)
    advantages, returns = F.gae(g["values"], rewards, mask, g.params["gamma"], g.params["lam"])
    g.same("masked_values", returns - advantages)
    g.same_or_differs("advantages_raw", advantages, where=mask)
    g.same_or_differs("returns", returns, where=mask)
    g.same_or_differs("advantages", F.masked_whiten(advantages, mask), where=mask)


@golden("gae.trl-1.12.0")
def test_gae_trl_1_12(g: Golden) -> None:
    mask, mask_p1, rewards = ~g["padding_mask"], ~g["padding_mask_p1"], g["rewards"]
    if g.params["whiten_rewards"]:
        rewards = F.masked_whiten(rewards, mask_p1, shift_mean=False)
    g.same("rewards_used", rewards, via="score after the end")
    advantages, returns = F.gae(g["values"], rewards, mask_p1, g.params["gamma"], g.params["lam"])
    g.same("masked_values", returns - advantages)
    g.same("advantages_raw", advantages, via="score after the end")
    g.same("returns", returns, via="score after the end")
    g.same_or_differs("advantages", F.masked_whiten(advantages, mask))


@golden("gae.lm-human-preferences")
def test_gae_openai(g: Golden) -> None:
    rewards, everywhere = g["rewards"], ones(g["rewards"])
    if g.params["whiten_rewards"]:
        rewards = F.masked_whiten(rewards, everywhere, shift_mean=False, unbiased=False)
        g.same("rewards_used", rewards, via="population variance")
    advantages, returns = F.gae(g["values"], rewards, everywhere, g.params["gamma"], g.params["lam"])
    g.same("advantages_raw", advantages)
    g.same("returns", returns)
    g.same("advantages", F.masked_whiten(advantages, everywhere, unbiased=False), via="population variance")
    g.same("returns_mean", F.masked_mean(returns, everywhere))
    g.same("returns_var", F.masked_var(returns, everywhere, unbiased=False), via="population variance")


# --- Losses and their gradients -------------------------------------------------------------------------------------


@golden("losses.trl-0.11.4")
def test_losses_trl_0_11(g: Golden) -> None:
    mask, p = g["mask"], g.params
    logprobs, vpreds = g["logprobs"].requires_grad_(), g["vpreds"].requires_grad_()
    if g["logits"].isfinite().all():  # else the -inf was put in after logprobs had been made
        torch.testing.assert_close(F.response_logprobs(g["logits"], g["labels"], 1.0), logprobs.detach())
    actor = F.actor_loss(logprobs, g["old_logprobs"], g["advantages"], mask, p["cliprange"])
    critic = F.critic_loss(vpreds, g["values"], g["returns"], mask, p["cliprange_value"])
    total = actor.loss + p["vf_coef"] * critic.loss
    g.same_or_differs("loss_policy", actor.loss)
    g.same_or_differs("loss_value", critic.loss)
    g.same_or_differs("loss_total", total)
    g.same_or_differs("returned_pg_loss", actor.loss)
    g.same_or_differs("returned_vf_loss", p["vf_coef"] * critic.loss)
    grad_logprobs, grad_vpreds = gradients(total, logprobs, vpreds)
    g.same_or_differs("grad_logprobs", grad_logprobs)
    g.same_or_differs("grad_vpreds", grad_vpreds)

    g.same_or_differs("policy_entropy", F.masked_mean(F.entropy(g["logits"], 1.0), mask))
    g.same("policy_approxkl", actor.approx_kl)
    g.same("policy_policykl", actor.policy_kl)
    g.same("policy_clipfrac", actor.clip_fraction)
    g.same("policy_advantages_mean", F.masked_mean(g["advantages"], mask))
    g.same("ratio_mean", actor.ratio_mean)
    g.same("ratio", ratios(logprobs, g["old_logprobs"], ones(mask)))
    g.same("returns_mean", F.masked_mean(g["returns"], mask))
    g.same("returns_var", F.masked_var(g["returns"], mask))
    g.same("val_vpred", critic.value_mean)
    g.same("val_error", critic.error)
    g.same("val_clipfrac", critic.clip_fraction)
    g.same("val_mean", F.masked_mean(g["values"], mask))
    g.same("val_var", F.masked_var(g["values"], mask))


@golden("losses.trl-1.12.0")
def test_losses_trl_1_12(g: Golden) -> None:
    mask, mask_p1, p = ~g["padding_mask"], ~g["padding_mask_p1"], g.params
    logits, vpreds = g["logits"].requires_grad_(), g["vpreds"].requires_grad_()
    temperature = p["temperature"] + 1e-7
    logprobs = F.response_logprobs(logits, g["labels"], temperature)
    actor = F.actor_loss(logprobs, g["old_logprobs"], g["advantages"], mask, p["cliprange"])
    critic = F.critic_loss(vpreds, g["values"], g["returns"], mask_p1, p["cliprange_value"])
    loss = actor.loss + p["vf_coef"] * critic.loss
    g.same("logprobs", logprobs, where=mask, via="temperature epsilon")
    g.same("pg_loss", actor.loss)
    g.same("vf_loss", critic.loss, via="score after the end")
    g.same("loss", loss)
    for name, grad in zip(
        ("grad_logprobs", "grad_logits", "grad_vpreds"), gradients(loss, logprobs, logits, vpreds), strict=True
    ):
        g.same(name, grad)
    g.same("pg_clipfrac", actor.clip_fraction)
    g.same("vf_clipfrac", critic.clip_fraction)
    g.same("ratio", ratios(logprobs, g["old_logprobs"], mask), where=mask)

    diluted = F.actor_loss(logprobs, g["old_logprobs"], g["advantages"], mask, p["cliprange"], count=mask.numel())
    g.same("approxkl", diluted.approx_kl, via="padding dilutes")
    g.same("ratio_mean", diluted.ratio_mean + share(~mask), via="padding dilutes")
    entropy = F.entropy(logits, temperature)
    g.same_or_differs("entropy_per_token", entropy)
    g.same_or_differs("entropy", F.masked_mean(entropy, ones(mask)), via="padding dilutes")


@golden("losses.lm-human-preferences")
def test_losses_openai(g: Golden) -> None:
    p, everywhere = g.params, ones(g["values"])
    logits, vpreds = g["logits"].requires_grad_(), g["vpreds"].requires_grad_()
    rewards = g["rewards"]
    if p["whiten_rewards"]:
        rewards = F.masked_whiten(rewards, everywhere, shift_mean=False, unbiased=False)
        g.same("rewards_used", rewards, via="population variance")
    raw, returns = F.gae(g["values"], rewards, everywhere, p["gamma"], p["lam"])
    advantages = F.masked_whiten(raw, everywhere, unbiased=False)
    logprobs = F.response_logprobs(logits, g["labels"], p["temperature"])
    actor = F.actor_loss(logprobs, g["old_logprobs"], advantages, everywhere, p["cliprange"])
    critic = F.critic_loss(vpreds, g["values"], returns, everywhere, p["cliprange_value"])
    loss = actor.loss + p["vf_coef"] * critic.loss
    entropies = F.entropy(logits, p["temperature"])
    grad_logits, grad_vpreds = gradients(loss, logits, vpreds)
    g.same("grad_logits", grad_logits)
    g.same("grad_vpreds", grad_vpreds)
    g.same("advantages_raw", raw)
    g.same("advantages", advantages, via="population variance")
    g.same("logprobs", logprobs)
    g.same("entropies", entropies)
    g.same("loss", loss)
    g.same("loss_policy", actor.loss)
    g.same("loss_value", critic.loss)
    g.same("policy_approxkl", actor.approx_kl)
    g.same("policy_clipfrac", actor.clip_fraction)
    g.same("policy_entropy", F.masked_mean(entropies, everywhere))
    g.same("returns_mean", F.masked_mean(returns, everywhere))
    g.same("returns_var", F.masked_var(returns, everywhere, unbiased=False), via="population variance")
    g.same("val_vpred", critic.value_mean)
    g.same("val_error", critic.error)
    g.same("val_clipfrac", critic.clip_fraction)
    g.same("val_mean", F.masked_mean(g["values"], everywhere))
    g.same("val_var", F.masked_var(g["values"], everywhere, unbiased=False), via="population variance")


# --- Statistics of an update ----------------------------------------------------------------------------------------


@golden("step_stats", "trl-0.11.4/*")
def test_step_stats_trl_0_11(g: Golden) -> None:
    mask, p = g["mask"], g.params
    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], ESTIMATOR[p["kl_penalty"]])
    g.same("objective_kl_dist", row_sums(kl, mask))
    g.same("objective_kl", row_sums(kl, mask).mean())
    g.same("objective_entropy", row_sums(-g["logprobs"], mask).mean())
    g.same("mean_non_score_reward", F.masked_mean(-p["kl_coef"] * kl, mask))
    g.same("mean_scores", F.masked_mean(g["scores"], ones(g["scores"])))
    g.same("std_scores", F.masked_var(g["scores"], ones(g["scores"])).sqrt())

    batches = [(g[f"mb{k}_vpreds"], g[f"mb{k}_returns"], g[f"mb{k}_mask"]) for k in range(p["minibatches"])]
    error = torch.stack([F.critic_loss(v, v, r, m, clip=None).error for v, r, m in batches]).mean().reshape(1)
    variance = torch.stack([F.masked_var(r, m) for _, r, m in batches]).mean().reshape(1)
    g.same("val_error", error)
    g.same("returns_var", variance)
    g.same("var_explained", 1 - error / variance, via="explained variance of averages")
    for v, r, m in batches:  # the two definitions meet once the offset of the Critic is taken out
        centred = v + F.masked_mean(r - v, m)
        n = m.sum()
        unexplained = F.critic_loss(centred, v, r, m, clip=None).error * n / (n - 1) / F.masked_var(r, m)
        torch.testing.assert_close(F.explained_variance(v, r, m), 1 - unexplained)


@golden("step_stats", "trl-1.12.0/*")
def test_step_stats_trl_1_12(g: Golden) -> None:
    p = g.params
    truncated = response_truncated(g["responses"], p["stop_token_id"], p["pad_token_id"])
    mask, mask_p1 = trl_masks(truncated, p["pad_token_id"])
    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], p["kl_estimator"])
    rewards = F.assemble_rewards(g["scores"], torch.where(mask, kl, 0), mask_p1, p["kl_coef"])
    non_score = F.assemble_rewards(torch.zeros_like(g["scores"]), kl, mask, p["kl_coef"])
    g.same("objective_kl", row_sums(kl, mask).mean())
    g.same("objective_non_score_reward", non_score.sum(1).mean())
    g.same("objective_rlhf_reward", rewards.sum(1).mean(), via="score after the end")
    g.same("objective_entropy", row_sums(-g["logprobs"], mask).mean())


@golden("step_stats", "lm-human-preferences/*")
def test_step_stats_openai(g: Golden) -> None:
    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], "k1")
    rewards = F.assemble_rewards(g["scores"], kl, ones(kl), g.params["kl_coef"])
    g.same("objective_kl", row_sums(kl, ones(kl)).mean())
    g.same("objective_entropy", row_sums(-g["logprobs"], ones(kl)).mean())
    g.same("objective_score", F.masked_mean(g["scores"], ones(g["scores"])))
    g.same("objective_score_total", rewards.sum(1).mean())


# --- Tokens ---------------------------------------------------------------------------------------------------------


def stop_ids(stop: int | None) -> list[int]:
    return [] if stop is None else [stop]


def response_truncated(responses: Tensor, stop: int | None, pad: int) -> Tensor:
    return torch.where(F.response_mask(responses, stop_ids(stop)), responses, pad)


def trl_masks(truncated: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Which places TRL counts (those before the first pad), and those with one place more (`padding_mask_p1`)."""
    before_pad = F.response_mask(truncated, [pad]) & (truncated != pad)
    return before_pad, torch.arange(truncated.shape[1]) <= F.last_index(before_pad).unsqueeze(1) + 1


def has_stop(responses: Tensor, stop: int) -> Tensor:
    last = F.last_index(F.response_mask(responses, [stop]))
    return responses.gather(1, last.unsqueeze(1)).squeeze(1) == stop


@golden("logprobs")
def test_logprobs(g: Golden) -> None:
    temperature = g.params["temperature"] or 1.0
    via = None
    if g.params.get("temperature_epsilon"):
        temperature, via = temperature + g.params["temperature_epsilon"], "temperature epsilon"
    logits, labels = g["logits"], g["labels"]
    if labels.ndim == 3:  # several labels a place
        logprobs = torch.stack([F.response_logprobs(logits, k, temperature) for k in labels.unbind(-1)], dim=-1)
    else:
        logprobs = F.response_logprobs(logits, labels, temperature)
    g.same("logprobs", logprobs, via=via)
    if "entropy" in g.expected:
        g.same_or_differs("entropy", F.entropy(logits, temperature))


@golden("token_positions", "trl-*/[pns][ato]*")
def test_token_positions_trl(g: Golden) -> None:
    responses, pad, stop = g["responses"], g.params["pad_token_id"], g.params["stop_token_id"]
    ours = F.response_mask(responses, stop_ids(stop))
    truncated = response_truncated(responses, stop, pad)
    stopped = has_stop(responses, stop) if stop is not None else torch.zeros(len(responses), dtype=torch.bool)
    g.same("first_stop", torch.where(stopped, F.last_index(ours), responses.shape[1]))
    g.same("truncated", truncated)
    last = F.last_index(trl_masks(truncated, pad)[0])
    g.same("first_pad", last + 1, via="pad ends the response")
    index = g.params["context_length"] + last
    g.same("score_index", index, via="pad ends the response")
    g.same("score", g["token_scores"].gather(1, index.unsqueeze(1)).squeeze(1), via="pad ends the response")
    if stop is not None and pad != stop:
        assert torch.equal(F.last_index(ours), last)  # then the conventions agree


@golden("token_positions", "*/first_true_indices")
def test_first_true_is_last_index_from_behind(g: Golden) -> None:
    bools = g["bools"].flatten(0, 1)
    index = bools.shape[1] - 1 - F.last_index(bools.flip(1))
    g.same("index", index.reshape(g.expected["index"].shape))


@golden("token_positions", "*/forward-*")
def test_forward_logprobs(g: Golden) -> None:
    g.same("logprobs", F.response_logprobs(g["logits"][:, :-1], g["input_ids"][:, 1:], 1.0))


@golden("token_positions", "lm-human-preferences/*")
def test_token_positions_openai(g: Golden) -> None:
    responses, p = g["responses"], g.params
    first, stop = p["truncate_after"], p["stop_token_id"]
    late = responses[:, first:]
    mask = torch.cat([ones(responses[:, :first]), F.response_mask(late, stop_ids(stop))], dim=1)
    g.same("truncated", torch.where(mask, responses, p["pad_token_id"]), via="stop from a place on")
    finished = ones(g["raw_scores"]) if stop is None else has_stop(late, stop)
    g.same("score", torch.where(finished, g["raw_scores"], p["penalty_reward_value"]), via="stop from a place on")


# --- One update of a real trainer -----------------------------------------------------------------------------------


@golden("e2e")
def test_e2e_rollout_and_update(g: Golden) -> None:
    p = g.params
    pad, beta = p["pad_token_id"], p["kl_coef"]
    responses = response_truncated(g["responses"], p["stop_token_id"], pad)
    mask, mask_p1 = trl_masks(responses, pad)
    g.same("postprocessed_responses", responses)
    g.same("contain_eos_token", has_stop(responses, p["eos_token_id"]), via="eos alone")
    g.same("sequence_lengths", F.last_index(mask), via="pad ends the response")
    g.same("padding_mask", ~mask, via="pad ends the response")
    g.same("padding_mask_p1", ~mask_p1, via="score after the end")
    g.same("actual_end", F.last_index(mask_p1), via="score after the end")

    kl = F.kl_per_token(g["logprobs"], g["ref_logprobs"], p["kl_estimator"])
    non_score = F.assemble_rewards(torch.zeros_like(g["scores"]), kl, mask, beta)
    rewards = F.assemble_rewards(g["scores"], kl, mask_p1, beta)
    raw, returns = F.gae(g["values"], rewards, mask_p1, p["gamma"], p["lam"])
    advantages = F.masked_whiten(raw, mask)
    g.same("kl", kl)
    g.same("non_score_reward", non_score)
    g.same("rewards", rewards, via="score after the end")
    g.same("advantages", advantages)
    g.same("returns", returns, via="score after the end")
    g.same("metric_objective_kl", row_sums(kl, mask).mean())
    g.same("metric_objective_non_score_reward", non_score.sum(1).mean())
    g.same("metric_objective_rlhf_reward", rewards.sum(1).mean(), via="score after the end")
    g.same("metric_objective_entropy", row_sums(-g["logprobs"], mask).mean())

    captured = torch.tensor([True, False, True]).reshape(3, 1, 1)
    stats = {
        n: torch.zeros(3, 1, 1, dtype=g.dtype) for n in ("approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio")
    }
    for k in (0, 2):
        rows = g.expected[f"mb{k}_index"]
        g.seen.add(f"mb{k}_index")
        logits, m, m1 = g[f"mb{k}_logits"], mask[rows], mask_p1[rows]
        logprobs, old = F.response_logprobs(logits, responses[rows], 1.0), g["logprobs"][rows]
        actor = F.actor_loss(logprobs, old, advantages[rows], m, p["cliprange"])
        critic = F.critic_loss(g[f"mb{k}_vpred"], g["values"][rows], returns[rows], m1, p["cliprange_value"])
        g.same(f"mb{k}_new_logprobs", logprobs, where=m)
        g.same(f"mb{k}_ratio", ratios(logprobs, old, m), where=m)
        g.same(f"mb{k}_pg_loss", actor.loss)
        g.same(f"mb{k}_vf_loss", critic.loss)
        g.same(f"mb{k}_vf_clipfrac", critic.clip_fraction)
        g.same(f"mb{k}_loss", actor.loss + p["vf_coef"] * critic.loss)
        diluted = F.actor_loss(logprobs, old, advantages[rows], m, p["cliprange"], count=m.numel())
        stats["approxkl"][k] = diluted.approx_kl
        stats["ratio"][k] = diluted.ratio_mean + share(~m)
        stats["entropy"][k] = F.masked_mean(F.entropy(logits, 1.0), ones(m))
        stats["pg_clipfrac"][k], stats["vf_clipfrac"][k] = actor.clip_fraction, critic.clip_fraction
    for name, actual in stats.items():
        g.same(f"{name}_stats", actual, where=captured, via="padding dilutes")


# --- Nothing left out -----------------------------------------------------------------------------------------------


def everything() -> list[tuple[str, str]]:
    """(case id, output) of every golden file; an exception counts as an output."""
    found = []
    for path in sorted(GOLDEN.glob("*.json")):
        for case in cases(path.stem):
            error = case.get("error") or {}
            found += [(case["id"], name) for name in case["outputs"] | ({"*": 0} if isinstance(error, str) else error)]
    return found


def test_every_case_is_covered_or_belongs_elsewhere() -> None:
    assert len({case for case, _ in everything()}) >= 190
    forgotten = {c for c, output in everything() if c not in COVERED and not listed(NOT_HERE, c, output)}
    assert not forgotten


@pytest.mark.parametrize("table", [DIFFERENT, NOT_HERE], ids=["different", "not_here"])
def test_tables_hold_no_stale_row(table: list[tuple[str, str, str]]) -> None:
    for ids, names, reason in table:
        assert reason
        for name in names.split():
            assert any(listed([(ids, name, "")], *found) for found in everything()), f"{ids}: {name}"


def test_every_convention_is_used() -> None:
    source = Path(__file__).read_text()
    assert [key for key in CONVENTIONS if f'"{key}"' not in source.replace(f'"{key}":', "")] == []
