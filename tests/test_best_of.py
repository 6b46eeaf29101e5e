"""Best of n, from more answers than n: the mean over all choices, by counting them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from rlhf_tasks.best_of import Draws, best_of, expected_best, sizes

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("draws", "n"), [(4, 4), (5, 1), (6, 2), (7, 4)])
def test_it_is_the_mean_over_all_choices(draws: int, n: int) -> None:
    scores, values = RANDOM.normal(size=(2, draws, 3))
    for prompt in range(3):
        choices = [list(choice) for choice in combinations(range(draws), n)]
        picked = [values[choice[int(scores[choice, prompt].argmax())], prompt] for choice in choices]
        assert expected_best(scores, values, n)[prompt] == pytest.approx(np.mean(picked))


def test_the_best_of_normal_scores_gains_what_order_statistics_say() -> None:
    """The greatest of 4 and of 16 normal numbers is 1.029 and 1.766 in the mean (Harter 1961)."""
    scores = RANDOM.normal(size=(16, 20_000))
    found = best_of(Draws(3 * scores, -scores, np.full((16, 20_000), 7.0)), 3.0, 200, 0)
    assert found["best_of_4_score_gain"] == pytest.approx(1.029, abs=0.01)
    assert found["best_of_16_score_gain"] == pytest.approx(1.766, abs=0.01)
    assert found["best_of_16_score_gain_low"] < 1.766 < found["best_of_16_score_gain_high"]
    assert found["best_of_16_judge_gain"] == pytest.approx(-found["best_of_16_score_gain"])
    assert found["best_of_4_length_ratio"] == pytest.approx(1)
    assert (found["best_of_4_kl_bound"], found["best_of_16_kl_bound"]) == pytest.approx((0.636, 1.835), abs=1e-3)


@pytest.mark.parametrize(("draws", "told"), [(1, []), (3, []), (4, [4]), (15, [4]), (16, [4, 16]), (70, [4, 16, 64])])
def test_which_sizes_so_many_draws_tell_of(draws: int, told: list[int]) -> None:
    assert sizes(draws) == told
    found = best_of(Draws(np.ones((draws, 2)), None, np.ones((draws, 2))), 1.0, 100, 0)
    assert {name.split("_")[2] for name in found} == {str(n) for n in told}
