"""How far people agree with each other and with the reward model, against numbers from elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labels import judged

from rlhf_tasks.agreement import Agreement, Share, agreement, nominal_alpha

# The example of Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve
# units, missing values as dots. Nominal alpha is 0.743.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")


def test_alpha_is_the_one_of_krippendorffs_example() -> None:
    units = [[values[unit] for values in OBSERVERS if values[unit] != "."] for unit in range(12)]
    assert nominal_alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.743, abs=0.0005)


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=2, max_size=4), min_size=1, max_size=8))
def test_alpha_is_what_its_definition_says(units: list[list[str]]) -> None:
    """1 - D_o / D_e by pairs of values: within units, weighted by 1 / (m - 1), and among all values."""
    values = [value for unit in units for value in unit]
    n = len(values)
    observed = sum(
        (a != b) / (len(unit) - 1) for unit in units for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j
    )
    expected = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    alpha = nominal_alpha(units)
    if expected == 0:
        assert alpha is None
    else:
        assert alpha == pytest.approx(1 - (observed / n) / (expected / (n * (n - 1))))


def test_two_who_saw_the_answers_in_another_order_agree_on_the_same_text() -> None:
    answers = (" x", " y")
    said = [judged("first", "ada", answers=answers), judged("second", "bob", answers=answers[::-1])]
    other = [judged("tie", rater, prompt="q") for rater in ("ada", "bob")]
    assert agreement([*said, *other]) == Agreement(2, Share(2, 2), 1.0, Share(0, 0), Share(0, 0))
    apart = [said[0], said[1]._replace(choice="first")]
    found = agreement([*apart, *other])
    assert found.raters == Share(1, 2)
    assert found.alpha is not None
    assert found.alpha < 1


def test_who_skips_neither_agrees_nor_disagrees() -> None:
    found = agreement([judged("first"), judged("skip", "bob"), judged("first", "eve", prompt="q")])
    assert (found.pairs, found.raters, found.alpha) == (0, Share(0, 0), None)


def test_the_reward_model_agrees_where_it_scored_what_was_chosen_higher() -> None:
    both = ("sft", "actor")
    said = [
        judged("first", prompt="1", scores=(2.0, 1.0), models=both),
        judged("second", prompt="2", scores=(2.0, 1.0), models=both),
        judged("second", prompt="3", scores=(2.0, 2.0), models=("mine", "yours")),
        judged("tie", prompt="4", scores=(2.0, 1.0), models=both),
        judged("first", prompt="5"),
    ]
    found = agreement(said)
    assert found.reward == Share(1, 3)
    assert found.actor == Share(1, 2)
