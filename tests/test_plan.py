"""`rlhf plan`: tensors without data need what real ones need; sizes, fits and GPUs are told truly."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import with_params
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flows import cli
from flows.plan import duration, in_units, say_plan, warnings
from rlhf_tasks import keying
from rlhf_tasks.config import changed_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.machine import GPUS, Machine, gpu_of, named_gpu, this_machine, within_container
from rlhf_tasks.meter import Meter, Need, without_data
from rlhf_tasks.plan import (
    Amounts,
    Phase,
    _ppo,
    amounts_of,
    largest_micro_batch,
    most_that_fit,
    phases,
    settings_of,
    sizes_of,
)
from rlhf_tasks.stages import STAGES
from rlhf_tasks.training import adamw
from rlhf_tasks.workspace import Workspace

TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
AMOUNTS = Amounts(1000, 500, 5.0, 20.0, 40, 5, known=True)


def train(meter: Meter) -> Need:
    """Two steps of a small model on ragged rows; what the second one needs."""
    model = LlamaForCausalLM(TINY)
    optimizer = adamw(model.parameters(), 1e-3)
    ids, mask = torch.ones(8, 24, dtype=torch.long), torch.ones(8, 24, dtype=torch.long)
    mask[0, :5] = 0
    for _ in range(2):
        with meter.measure() as found:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del logits
    return found[0]


def test_tensors_without_data_need_what_real_ones_need() -> None:
    with Meter() as meter:
        real = train(meter)
    with without_data() as meter:
        pretended = train(meter)
    assert (pretended.peak, pretended.flops) == (real.peak, real.flops)
    assert pretended.moved == pytest.approx(real.moved, rel=0.01)
    assert pretended.operations == pytest.approx(real.operations, rel=0.05)
    assert real.flops > 6 * 18e3 * 8 * 24  # six for every weight of a matrix and every token


def test_what_is_counted() -> None:
    with without_data() as meter, meter.measure() as found:
        a, b = torch.zeros(10, 20), torch.zeros(20, 30)
        c = a @ b
        del a, b
        d = c + c
    assert found[0] == Need(
        peak=4 * (200 + 600 + 300), flops=2 * 10 * 20 * 30, moved=4 * (200 + 600 + 900), operations=4
    )
    assert meter.held == 4 * 600
    assert d.shape == (10, 30)


def test_sizes_are_those_of_the_models() -> None:
    sizes = sizes_of(TINY, None)
    model = LlamaForCausalLM(TINY)
    assert sizes.actor == sum(p.numel() for p in model.parameters())
    assert sizes.scorer == sizes.actor + TINY.hidden_size
    assert sizes.learning == sizes.actor + sizes.scorer
    assert sizes.embeddings == 300 * 32


def test_every_stage_that_works_is_planned(sketch: Workspace) -> None:
    found = list(phases(sketch.params, TINY, AMOUNTS))
    assert {phase.stage for phase in found} == {"sft", "reward", "ppo", "evaluate"}
    by_name = {(phase.stage, phase.name): phase for phase in found}
    weights = 4 * sizes_of(TINY, None).actor
    assert by_name["sft", "training"].need.peak > 4 * weights  # weights, gradient, two moments
    assert by_name["ppo", "optimization"].need.peak > 9 * weights
    assert by_name["ppo", "optimization"].need.flops > by_name["ppo", "evaluation"].need.flops
    more = with_params(sketch, f"ppo.iterations={2 * sketch.params.ppo.iterations}").params
    assert next(_ppo(more, TINY, AMOUNTS, 100)).need.flops == 2 * by_name["ppo", "rollout"].need.flops


@pytest.mark.slow
def test_a_trunk_for_four_is_planned(sketch: Workspace) -> None:
    """Memory for one trunk and what is above it, work for the layers that are run and learn."""
    settings = settings_of(sketch.root, sketch.params)
    top = with_params(sketch, "ppo.trainable_layers=1", "reward.trainable_layers=1").params
    whole, cut = (
        {(phase.stage, phase.name): phase.need for phase in phases(params, settings, AMOUNTS)}
        for params in (sketch.params, top)
    )
    assert cut["ppo", "saving"].peak < 0.8 * whole["ppo", "saving"].peak
    for name in ("evaluation", "optimization"):
        assert cut["ppo", name].flops < 0.8 * whole["ppo", name].flops
    assert cut["ppo", "rollout"].flops == whole["ppo", "rollout"].flops
    assert cut["reward", "training"].flops < 0.9 * whole["reward", "training"].flops
    assert cut["sft", "training"] == whole["sft", "training"]
    more = with_params(sketch, "ppo.trainable_layers=1", "reward.trainable_layers=1", "ppo.batch=64").params
    larger = {(phase.stage, phase.name): phase.need for phase in phases(more, settings, AMOUNTS)}
    states = 4 * settings.hidden_size * (5 + more.generation.max_new_tokens)  # of an episode, which the rollout keeps
    grown = larger["ppo", "saving"].peak - cut["ppo", "saving"].peak
    assert grown == states * (64 - top.ppo.batch)


def test_a_rollouts_cache_is_as_long_as_the_longest_prompt(sketch: Workspace) -> None:
    settings = settings_of(sketch.root, sketch.params)
    usual, skewed = (
        next(phase.need for phase in phases(sketch.params, settings, amounts) if phase.name == "rollout")
        for amounts in (AMOUNTS, replace(AMOUNTS, longest_prompt=1505))
    )
    heads = settings.num_key_value_heads * settings.head_dim
    cache = 1500 * 2 * 4 * heads * settings.num_hidden_layers * sketch.params.ppo.batch
    assert skewed.peak - usual.peak == pytest.approx(cache, rel=0.02)


def test_the_largest_micro_batch_is_the_largest(sketch: Workspace) -> None:
    params = with_params(sketch, "ppo.batch=64", "generation.max_new_tokens=20").params

    def peak(budget: int) -> float:
        return max(
            p.need.memory for p in phases(params, TINY, AMOUNTS, budget) if p.stage == "ppo" and p.name != "rollout"
        )

    room = (peak(25) + peak(64 * 25)) / 2
    largest = largest_micro_batch(params, TINY, AMOUNTS, room)
    assert largest
    assert peak(largest) <= room * 1.001
    assert peak(largest + 2 * 25) > room
    batch = params.model_copy(update={"ppo": params.ppo.model_copy(update={"micro_batch_tokens": 64 * 25})})
    known = list(phases(batch, TINY, AMOUNTS))
    for enough in (room, 2 * peak(64 * 25)):  # the shorter way comes to the same
        assert largest_micro_batch(batch, TINY, AMOUNTS, enough, known) == largest_micro_batch(
            batch, TINY, AMOUNTS, enough
        )


@given(rows=st.integers(1, 300), most=st.integers(0, 400))
def test_the_most_that_fit_are_found(rows: int, most: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= most

    assert most_that_fit(rows, fits) == min(rows, most)
    assert all(1 <= count <= rows for count in asked)
    assert len(asked) <= 10


@settings(deadline=None)
@given(name=st.sampled_from(sorted(GPUS)), count=st.integers(1, 64), lower=st.booleans())
def test_gpus_by_name(name: str, count: int, lower: bool) -> None:
    text = f"{count}x{name.lower() if lower else name}"
    assert named_gpu(text) == (count, named_gpu(name)[1])
    assert named_gpu(name)[1].memory == GPUS[name][0] * 1e9


def test_gpus_by_size_and_what_is_none() -> None:
    assert named_gpu("24GB")[1].memory == 24e9
    assert named_gpu("24GB")[1].baseline == named_gpu("H100")[1].baseline > 1e8
    assert named_gpu("24GB")[1].seconds(Need(flops=1.0)) is None
    with pytest.raises(UserError, match="did you mean H100"):
        named_gpu("H10O")
    for wrong in (
        "",
        "0xH100",
        "2x",
        "-1xH100",
        "1.2.3GB",
        ".GB",
        "0GB",
        "0.0GB",
        "1025GB",
        "1025xH100",
        "9" * 400 + "GB",
    ):
        with pytest.raises(UserError, match=r"--gpu"):
            named_gpu(wrong)


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0, "H100"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "A100"),
        ("NVIDIA GeForce RTX 4090", 25.2, "RTX4090"),
        ("NVIDIA L40S", 47.7, "L40S"),
        ("Tesla T4", 15.6, "T4"),
        ("NVIDIA RTX A1000", 8.3, None),
        ("Somebody's GH200 480GB", 97.9, None),
    ],
)
def test_a_gpu_that_is_here_is_known_by_its_drivers_name(name: str, memory: float, known: str | None) -> None:
    found = gpu_of(name, memory * 1e9, 3e9)
    assert (found.name, found.memory, found.free) == (name, memory * 1e9, 3e9)
    assert found.baseline > 1e8
    assert found.estimated
    assert found.flops == (named_gpu(known)[1].flops if known else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_gpu_that_is_not_here_asks_which(sketch: Workspace) -> None:
    params = with_params(sketch, "runtime.device=cuda").params
    with pytest.raises(
        UserError, match=r"torch sees no GPU here; say which one the plan is for, as in `rlhf plan --gpu"
    ):
        say_plan(sketch.root, params, "", as_json=True)


def control_groups(root: Path, files: dict[str, str]) -> Path:
    """A tree of `proc` and `sys` with these files in it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(group: str, limit: str, used: int, cached: int) -> dict[str, str]:
    base = f"sys/fs/cgroup/{group}"
    return {
        f"{base}memory.max": f"{limit}\n",
        f"{base}memory.current": f"{used}\n",
        f"{base}memory.stat": f"anon 1\ninactive_file {cached}\n",
    }


def version_1(group: str, limit: str, used: int, cached: int) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory/{group}"
    return {
        f"{base}memory.limit_in_bytes": f"{limit}\n",
        f"{base}memory.usage_in_bytes": f"{used}\n",
        f"{base}memory.stat": f"inactive_file 0\ntotal_inactive_file {cached}\n",
    }


OWN_2, OWN_1 = {"proc/self/cgroup": "0::/job/step\n"}, {"proc/self/cgroup": "4:cpu,memory:/job\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (32e9, 20e9)),
        (OWN_2, (32e9, 20e9)),  # of the group itself nothing is there
        (OWN_2 | version_2("job/step/", "max", 3, 0), (32e9, 20e9)),
        (OWN_2 | version_2("job/step/", "4000000000", 3_000_000_000, 1_000_000_000), (4e9, 2e9)),
        (OWN_2 | version_2("job/step/", "max", 3, 0) | version_2("job/", "5000000000", 0, 0), (5e9, 5e9)),
        (OWN_2 | version_2("", "6000000000", 1_000_000_000, 0), (6e9, 5e9)),  # as a container sees its own
        (OWN_2 | version_2("job/step/", "64000000000", 50_000_000_000, 0), (32e9, 14e9)),
        (OWN_1 | version_1("job/", "4000000000", 9_000_000_000, 0), (4e9, 0)),
        (OWN_1 | version_1("job/", "9223372036854771712", 0, 0) | version_1("", "7000000000", 0, 0), (7e9, 7e9)),
        (OWN_2 | version_2("job/step/", "gibberish", 3, 0), (32e9, 20e9)),
    ],
)
def test_a_containers_memory_is_its_limit(tmp_path: Path, files: dict[str, str], expected: tuple[float, float]) -> None:
    assert within_container(32e9, 20e9, control_groups(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("number", "unit", "said"),
    [
        (0, "B", "0 B"),
        (453, "", "453"),
        (26_240, "", "26.2 k"),
        (1_090_000_000, "B", "1.09 GB"),
        (25.28e9, "B", "25.3 GB"),
        (134.5e6, "", "134 M"),
        (3.2e15, "", "3.20 P"),
        (4.5e18, "", "4,500 P"),
    ],
)
def test_numbers_are_told_in_units_that_fit(number: float, unit: str, said: str) -> None:
    assert in_units(number, unit) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.012, "12 ms"), (5, "5 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_units_that_fit(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_what_speaks_against_a_run_that_could_be_made(sketch: Workspace) -> None:
    found = [Phase("ppo", "rollout", Need(peak=2_000_000_000, held=2_000_000_000), 1)]
    for free, warned in ((1.5e9, True), (3e9, False), (None, False)):
        said = warnings(sketch.params, Machine("x", 4e9, free=free), found)
        assert bool(said) is warned
    assert warnings(sketch.params, Machine("x", 1e9, free=0.5e9), found) == []  # it does not fit at all, which is said
    assert said == []
    base = with_params(sketch, "model.base=base", "sft.learning_rate=2e-3").params
    assert warnings(base, Machine("x", 4e9), found)[0].startswith("sft.learning_rate: 0.002, ")


def test_values_that_are_set_for_the_plan_are_planned_and_not_written(
    sketch: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sketch.root)
    (sketch.root / "metrics/prepare.json").unlink()
    before = (sketch.root / "params.yaml").read_bytes()
    cli.plan("T4", ["ppo.iterations=7", "model.scratch.hidden_size=64"], as_json=True)
    document = json.loads(capsys.readouterr().out)
    larger = changed_params(sketch.root / "params.yaml", {"model.scratch.hidden_size": 64})
    assert document["weights"] == asdict(sizes_of(settings_of(sketch.root, larger), None))
    with pytest.raises(
        UserError, match=r"generation\.max_new_tokens: 4096 make 4112 tokens, but .* has 2048 positions"
    ):
        cli.plan("T4", ["generation.max_new_tokens=4096"], as_json=True)
    with pytest.raises(UserError, match=r"reward\.trainable_layers: found 2, but the model has 2 layers"):
        cli.plan("T4", ["reward.trainable_layers=2"], as_json=True)
    with pytest.raises(UserError, match=r"did you mean `ppo\.iterations`"):
        cli.plan("T4", ["ppo.iteration=7"], as_json=True)
    assert (sketch.root / "params.yaml").read_bytes() == before


def test_this_machine_is_measured() -> None:
    machine = this_machine(1)
    assert machine.baseline > 1e8
    assert machine.flops
    assert machine.bandwidth
    more = Need(flops=2e12, moved=2e9, operations=2e3)
    assert machine.seconds(more) == pytest.approx(2 * (machine.seconds(Need(0, 1e12, 1e9, 1e3)) or 0))


def test_what_prepare_counted_is_used_where_it_is(sketch: Workspace) -> None:
    path = sketch.root / "metrics/prepare.json"
    tokens = {"prompt": {"mean": 3.5, "max": 7}, "response": {"mean": 20.5, "max": 24}}
    counts = {"sft_train": 10, "pairs_train": 5, "prompts_heldout": 15}
    path.write_text(json.dumps(counts | {"details": {"tokens": {"sft_train": tokens}}}))
    stage = STAGES["prepare"]
    made_of = {"parameters": keying.parameters(sketch.params, stage)}
    (sketch.root / stage.lineage).write_text(json.dumps(made_of))
    found = amounts_of(sketch.root, sketch.params)
    assert found == Amounts(10, 5, 3.5, 20.5, 31, 7, known=True, heldout_prompts=15)
    with pytest.raises(UserError, match=r"evaluate\.prompts: found 16, but the data has only 15 held-out prompts"):
        say_plan(sketch.root, sketch.params, "T4", as_json=True)
    assert not amounts_of(sketch.root, with_params(sketch, "data.max_prompt_tokens=99").params).known
    for damaged in ("{}", '{"details'):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"prepare.json: not what `prepare` writes"):
            amounts_of(sketch.root, sketch.params)
    path.unlink()
    assert not amounts_of(sketch.root, sketch.params).known


def test_the_plan_as_it_is_printed(sketch: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (sketch.root / "metrics/prepare.json").unlink()
    say_plan(sketch.root, sketch.params, "2x0.001GB", as_json=False)
    said = capsys.readouterr().out
    for words in (
        "On a GPU of 0.001 GB",
        "DOES NOT FIT",
        "not even one row fits",
        "The data is not prepared",
        "2 GPUs",
        "Not planned: prepare, which trains nothing",
        "600 MB are an estimate of what CUDA's context takes. Nothing here was measured on a GPU.",
    ):
        assert words in said


@pytest.mark.slow
def test_the_plan_for_machines(sketch: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    (sketch.root / "metrics/prepare.json").unlink()
    say_plan(sketch.root, sketch.params, "2xT4", as_json=True)
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["gpus"] == 2
    assert document["warnings"] == []
    assert document["weights"]["actor"] == sizes_of(settings_of(sketch.root, sketch.params), None).actor


def test_a_machine_without_rates_tells_no_time() -> None:
    assert Machine("x", 1e9).seconds(Need(1, 1.0, 1.0, 1.0)) is None


def test_a_base_folder_is_planned_by_its_settings(sketch: Workspace, write_model: Any) -> None:
    write_model(sketch.root / "base")
    project = with_params(sketch, "model.base=base")
    facts = json.loads((Path(sketch.root) / "base/config.json").read_text())
    assert settings_of(sketch.root, project.params).hidden_size == facts["hidden_size"]
