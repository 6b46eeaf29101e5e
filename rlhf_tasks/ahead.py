"""What a run would be refused for, looked at before it begins: no hour is spent on what its last stage cannot use.

What is slow to import is imported where it is needed: a run that finds everything done looks here too.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_tasks.base import base_at_hand, check_layers, check_lengths, known_positions, load_settings
from rlhf_tasks.config import Params
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.keying import check_sources, parameters
from rlhf_tasks.limits import check_heldout_prompts
from rlhf_tasks.stages import STAGES, Stage
from rlhf_tasks.store import canonical_json

#: learning rates for a pretrained model, those of profiles/smollm2.yaml
PRETRAINED = {
    "sft.learning_rate": 5e-5,
    "reward.learning_rate": 4e-5,
    "ppo.actor_learning_rate": 2e-5,
    "ppo.critic_learning_rate": 2e-5,
}
FAR = 5  # times as high


def check_before(params: Params, root: Path, stages: list[Stage]) -> None:
    """See that nothing speaks against running these stages, of what is known before the first of them.

    Args:
        root: the checkout, which is the working folder.

    Raises:
        UserError: something does.
    """
    check_sources(params, root, stages)
    if any("runtime" in stage.sections for stage in stages):
        check_model(params)
        if params.runtime.device == "cuda":
            from rlhf_tasks.models import check_device

            check_device(params.runtime)
    if params.reward_function.name and STAGES["ppo"] in stages:
        from rlhf_tasks.reward_function import try_reward_function

        try_reward_function(params.reward_function)


def check_preparable(params: Params, stages: list[Stage]) -> None:
    """See what `prepare` sees before it reads data, of a base that takes no minute to load.

    Raises:
        UserError: it would refuse the kinds of the sources, the template, or the base's tokenizer.
    """
    if STAGES["prepare"] in stages and params.model.revision is None and not Path(params.model.base).is_file():
        from rlhf_tasks.data.prepare import check_kinds, open_tokenizer

        check_kinds(params.data)
        open_tokenizer(params.data, params.model)


def check_model(params: Params) -> None:
    """See that the base has room for the texts and, if only top layers are to learn, can be cut below them.

    What only the network knows is taken to be right.

    Raises:
        UserError: it is not so.
    """
    check_layers(params)
    check_lengths(params.model.base, known_positions(params.model), params.data, params.generation.max_new_tokens)
    top, base = params.reward.trainable_layers, base_at_hand(params.model)
    if top and base and base.is_dir():
        from transformers import AutoModelForSequenceClassification

        from rlhf_tasks.meter import without_data
        from rlhf_tasks.trunk import freeze_trunk

        with without_data():
            scorer = AutoModelForSequenceClassification.from_config(load_settings(base)).eval()
            freeze_trunk(scorer, top, "reward.trainable_layers")


def prepared_so(root: Path, params: Params) -> bool:
    """Whether the data that lies there was prepared with these parameters, as its lineage tells."""
    stage = STAGES["prepare"]
    try:
        made_of = json.loads((root / stage.lineage).read_text())["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(made_of == json.loads(canonical_json(parameters(params, stage))))


def check_prepared(params: Params, root: Path, stages: list[Stage]) -> None:
    """See that what `prepare` left is enough for these stages, and fits the base, which is here by then.

    Raises:
        UserError: it is not, or does not.
    """
    if any("runtime" in stage.sections for stage in stages):
        check_model(params)
    if params.generation.stop is not None and any("generation" in stage.sections for stage in stages):
        from rlhf_tasks.models import load_tokenizer, stop_id

        stop_id(load_tokenizer(root / STAGES["prepare"].outs["tokenizer"]), params.generation.stop)
    if STAGES["evaluate"] in stages:
        heldout = read_table(root / STAGES["prepare"].outs["prompts"] / "heldout.arrow", ["input_ids"])
        check_heldout_prompts(params.evaluate.prompts, len(TokenColumn(heldout, "input_ids")))


def high_rates(params: Params, stages: list[Stage]) -> str | None:
    """A warning where a pretrained base learns, in one of these stages, at rates that suit a model from scratch."""
    if params.model.base == "scratch":
        return None
    used = {stage.name for stage in stages}
    rates = {name: rate for name, rate in PRETRAINED.items() if name.partition(".")[0] in used}
    high = {name: rate for name, rate in rates.items() if params.section(name) >= FAR * rate}
    if not high:
        return None
    found = ", ".join(f"{name}: {params.section(name):g}" for name in high)
    instead = ", ".join(f"{rate:g}" for rate in high.values())
    return f"{found}: high for a pretrained model, which may lose what it knows; profiles/smollm2.yaml has {instead}"
