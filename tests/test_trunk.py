"""A frozen trunk: what is known of a text is what is worked out again, in numbers, gradients, files and resumption."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import SHAPES, write_shape
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_tasks import chain, config, keying
from rlhf_tasks.data.batching import Line
from rlhf_tasks.digests import digest_file
from rlhf_tasks.doctor import _OF_MODELS
from rlhf_tasks.doctor.first_batch import FirstBatch
from rlhf_tasks.errors import UserError
from rlhf_tasks.forward import hidden_and_trunk_states, hidden_states
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.head import Head
from rlhf_tasks.models import freeze, load_actor, load_tokenizer, new_scorer, save_model
from rlhf_tasks.ppo.experience import Episodes
from rlhf_tasks.ppo.functional import FixedKL
from rlhf_tasks.ppo.iteration import Fixed, PPOState, evaluate, experience_of, roll_out
from rlhf_tasks.ppo.optimization import Learner, actor_gradient, critic_gradient, gradients, optimize
from rlhf_tasks.ppo.rollout import Sampling
from rlhf_tasks.ppo_stage import Trainer
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import DamagedEntry
from rlhf_tasks.training import adamw, load_training_state, optimizer_tensors, save_training_state
from rlhf_tasks.trunk import freeze_trunk, frozen_names, learning, same_trunk, share_trunk
from rlhf_tasks.workspace import Workspace

CPU = torch.device("cpu")
PROMPTS = [[9, 30], [17, 40, 60, 21, 33, 45, 50, 71, 72, 73, 74], [25], [80, 81, 82, 83]]
SAMPLING = Sampling(12, 0.9, None, None, tuple(range(200, 230)))  # many stops: answers of different lengths
LAYERS, TOP = 3, 1
OF_DATA = {"prompts", "disk", "reward sign", "reward scale"}  # these tiny runs are not to learn anything


def close(actual: Tensor, expected: Tensor, gap: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=gap, atol=gap)


@pytest.fixture(scope="module", params=SHAPES)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Actor, Ref, Reward and Critic of a shape, on one trunk; above it, each is another, as training leaves them."""
    folder = tmp_path_factory.mktemp("base")
    write_shape(request.param, folder, layers=LAYERS)
    tokenizer = load_tokenizer(folder)
    models = [load_actor(folder, CPU), load_actor(folder, CPU)]
    models += [new_scorer(folder, tokenizer, 0, purpose, CPU) for purpose in ("reward", "critic")]
    random = torch.Generator().manual_seed(3)
    for model in models:
        freeze_trunk(model, TOP, "here")
        with torch.no_grad():
            for weight in learning(model).values():
                weight += 0.05 * torch.randn(weight.shape, generator=random)
        assert same_trunk(model, models[0])
        share_trunk(model, models[0])
    return request.param, models


@pytest.fixture
def four(cut: tuple[str, list[Any]]) -> list[Any]:
    return copy.deepcopy(cut[1])


def start(four: list[Any], **settings: Any) -> tuple[PPOState, Fixed, config.PPO]:
    actor, ref, reward, critic = four
    ppo = config.PPO(**({"batch": 4, "minibatches": 2, "micro_batch_tokens": 24} | settings))
    learners = [Learner(model, adamw(learning(model).values(), 1e-3)) for model in (actor, critic)]
    fixed = Fixed(freeze(ref), freeze(reward), PROMPTS, SAMPLING, (0.0, 1.0))
    return PPOState(*learners, FixedKL(0.1)), fixed, ppo


def plainly(episodes: Episodes) -> Episodes:
    """The same, of which nothing is known."""
    return replace(episodes, drawn=None)


def test_what_learns_is_above_the_cut(cut: tuple[str, list[Any]]) -> None:
    name, models = cut
    for model in models:
        kept, learned = frozen_names(model), learning(model).keys()
        assert not kept & learned
        assert kept | learned == dict(model.named_parameters()).keys()
        below, top = (f".{layer}." for layer in ("1", "2"))
        assert any(below in weight for weight in kept)
        assert not any(top in weight for weight in kept)
        assert not any(".0." in weight or below in weight or "emb" in weight or "wte" in weight for weight in learned)
        head = model.get_output_embeddings() or model.score
        assert head.weight.requires_grad is not (SHAPES[name].tied and model.get_output_embeddings() is not None)
    assert [len(frozen_names(model)) for model in models] == [len(frozen_names(models[0]))] * 4


def test_one_trunk_is_in_memory(four: list[Any]) -> None:
    actor, *others = four
    for model in others:
        weights = dict(model.named_parameters())
        assert all(weights[name] is actor.get_parameter(name) for name in frozen_names(actor))
        if head := model.get_output_embeddings():
            tied = actor.get_output_embeddings().weight is actor.get_input_embeddings().weight
            assert (head.weight is actor.get_output_embeddings().weight) is tied


@torch.no_grad()
def test_known_states_give_the_models_own_numbers(four: list[Any]) -> None:
    """In a line of texts, by the top layers alone, against the classes of transformers on each text."""
    texts = [[*prompt, 70, 31, 52] for prompt in PROMPTS]
    _, trunk = hidden_and_trunk_states(four[0], Line.of(texts, CPU))
    assert trunk is not None
    line = Line.of(texts, CPU, trunk.split([len(text) for text in texts]))
    for model in four:
        head = Head.of(model).logits if model.get_output_embeddings() else model.score
        own = [model.base_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0] for text in texts]
        close(hidden_states(model, line), torch.cat(own))
        close(head(hidden_states(model, line)), head(hidden_states(model, replace(line, trunk=None))))


def test_the_layers_below_are_not_run_where_the_trunk_is_known(four: list[Any]) -> None:
    state, fixed, ppo = start(four)
    episodes = roll_out(state, fixed, 4, seed=1)
    with torch.no_grad():
        for model in four:
            for name in frozen_names(model):
                if ".0." in name or ".1." in name:
                    model.get_parameter(name).fill_(torch.nan)
    assert torch.isfinite(evaluate(state, fixed, ppo, episodes).raw_scores).all()
    assert torch.isnan(evaluate(state, fixed, ppo, plainly(episodes)).raw_scores).all()


def test_the_rollout_writes_as_without_a_trunk_and_knows_all_that_was_read(four: list[Any]) -> None:
    state, fixed, _ = start(four)
    episodes = roll_out(state, fixed, 4, seed=1)
    assert len({len(r) for r in episodes.responses}) > 1
    assert episodes.drawn
    assert episodes.drawn.trunk
    whole = copy.deepcopy(four[0])
    for layer in [m for m in whole.modules() if type(m).__mro__[1].__name__ in ("_Below", "_Last")]:
        layer.__class__ = type(layer).__mro__[2]
    state.actor.model = whole
    again = roll_out(state, fixed, 4, seed=1)
    assert again.drawn
    assert again.drawn.trunk is None
    assert again.responses == episodes.responses
    for one, other in zip(again.drawn.logprobs, episodes.drawn.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for prompt, response, known in zip(episodes.prompts, episodes.responses, episodes.drawn.trunk, strict=True):
        _, trunk = hidden_and_trunk_states(four[0], Line.of([[*prompt, *response]], CPU))
        assert trunk is not None
        close(known, trunk)


def test_gradients_are_those_of_the_plain_path(four: list[Any]) -> None:
    state, fixed, ppo = start([model.double() for model in four], entropy_coef=0.01)
    episodes = roll_out(state, fixed, 4, seed=1)
    experience = experience_of(state, fixed, ppo, episodes, evaluate(state, fixed, ppo, episodes))
    for model, learn in (
        (four[0], partial(actor_gradient, four[0], ppo=ppo, temperature=0.9)),
        (four[3], partial(critic_gradient, four[3], ppo=ppo)),
    ):
        found = []
        for known in (episodes, plainly(episodes)):
            gradients([0, 1, 2, 3], known, experience, ppo.micro_batch_tokens, learn)
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        assert found[0].keys() == found[1].keys() == learning(model).keys()
        for name in found[0]:
            close(found[0][name], found[1][name], 1e-8)


def test_an_iterations_weights_are_those_of_the_plain_path(four: list[Any]) -> None:
    """Responses fixed, all else worked out again by all layers: evaluation, experience, and two epochs of updates."""
    found = []
    for known in (True, False):
        state, fixed, ppo = start(copy.deepcopy(four))
        episodes = roll_out(state, fixed, 4, seed=1)
        episodes = episodes if known else plainly(episodes)
        evaluation = evaluate(state, fixed, ppo, episodes)
        optimize(
            episodes, experience_of(state, fixed, ppo, episodes, evaluation), actor=state.actor, critic=state.critic,
            ppo=ppo, temperature=0.9, update_actor=True, seed_names=(0, "ppo", 1), memory=GradientMemory(),
        )  # fmt: skip
        found.append([learning(learner.model) for learner in (state.actor, state.critic)])
    for one, other, before in zip(*found, (four[0], four[3]), strict=True):
        for name in one:
            close(one[name], other[name], 2e-5)
        assert any(not torch.equal(one[name], before.get_parameter(name)) for name in one)


def test_unfinished_training_is_saved_without_the_trunk(four: list[Any], tmp_path: Path) -> None:
    _, _, reward, critic = four  # which differ above the trunk
    one, other = (adamw(learning(model).values(), 1e-3) for model in (reward, critic))
    for weight in learning(reward).values():
        weight.grad = torch.ones_like(weight)
    one.step()
    save_training_state(tmp_path, reward, one, 3)
    assert load_file(tmp_path / "step-00000003/model.safetensors").keys() == learning(reward).keys()
    assert load_training_state(tmp_path, critic, other, 9) == 3
    assert all(torch.equal(weight, learning(reward)[name]) for name, weight in learning(critic).items())
    moments = optimizer_tensors(other)
    assert all(torch.equal(tensor, moments[name]) for name, tensor in optimizer_tensors(one).items())


@torch.no_grad()
def test_folders_of_all_models_have_the_same_trunk_file(four: list[Any], tmp_path: Path) -> None:
    ids, trunks = torch.tensor([[3, 14, 15]]), set[str]()
    for number, model in enumerate(four):
        folder = tmp_path / str(number)
        save_model(model, folder)
        trunks.add(digest_file(folder / "model-00001-of-00002.safetensors"))
        kind = AutoModelForCausalLM if number < 2 else AutoModelForSequenceClassification
        again = kind.from_pretrained(folder).eval()
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not (folder / "model.safetensors").exists()
    assert len(trunks) == 1


@pytest.mark.parametrize("top", [LAYERS, LAYERS + 1])
def test_there_must_be_a_layer_below(tmp_path: Path, top: int) -> None:
    write_shape("llama", tmp_path, layers=LAYERS)
    text = f"here: found {top}, but the model has 3 layers; expected fewer than that, or null to train all of it"
    with pytest.raises(UserError, match=text):
        freeze_trunk(load_actor(tmp_path, CPU), top, "here")


def test_a_model_whose_layers_are_no_plain_chain_is_refused(tmp_path: Path) -> None:
    """As one whose third layer also reads what happens within the first."""
    write_shape("llama", tmp_path, layers=LAYERS)
    actor, seen = load_actor(tmp_path, CPU), list[Tensor]()
    first, _, third = actor.model.layers
    first.mlp.register_forward_hook(lambda module, given, out: seen.append(out))
    third.register_forward_pre_hook(lambda module, given: (given[0] + seen.pop(),) if seen else None)
    with pytest.raises(UserError, match="here: llama models cannot be cut between layers: its top layers need more"):
        freeze_trunk(actor, TOP, "here")


@pytest.mark.parametrize(
    ("reward", "ppo", "text"),
    [
        (None, 1, "the Reward learns everywhere; expected `reward.trainable_layers` of at most 1"),
        (2, 1, "the Reward learns in its top 2 layers; expected `reward.trainable_layers` of at most 1"),
    ],
)
def test_the_reward_must_have_kept_the_trunk(
    workspace: Callable[..., Workspace], reward: int | None, ppo: int, text: str
) -> None:
    with pytest.raises(UserError, match=f"^params.yaml: `ppo.trainable_layers: {ppo}` shares one trunk .*{text}"):
        workspace(f"ppo.trainable_layers={ppo}", f"reward.trainable_layers={'null' if reward is None else reward}")


@pytest.fixture(scope="module", params=SHAPES)
def trained(request: pytest.FixtureRequest, workspace: Callable[..., Workspace], run_stages: Callable[..., Any]) -> Any:
    """A project of each shape whose Reward and PPO have been trained on SFT's trunk."""
    template = "chat" if "chat_template" in SHAPES[request.param].named else "none"
    top = ("reward.trainable_layers=1", "ppo.trainable_layers=1")
    few = ("reward.statistics_samples=8", "ppo.iterations=1")
    project = workspace("model.base=base", f"data.template={template}", *few, *top)
    ratings = project.root / "data/raw/ratings.jsonl"
    ratings.write_text("".join(ratings.open(encoding="utf-8").readlines()[:200]), encoding="utf-8")
    write_shape(request.param, project.root / "base")
    run_stages(project, "prepare", "sft", "reward", "ppo")
    return project


def test_every_shape_is_trained_on_one_trunk(trained: Workspace) -> None:
    """SFT's, in one file for all; and PPO's invariants hold."""
    checkpoints = trained.root / "checkpoints"
    files = (checkpoints / model / "model-00001-of-00002.safetensors" for model in ("reward", "actor", "critic"))
    assert len({digest_file(file) for file in files}) == 1
    sft, actor = (freeze_trunk(load_actor(checkpoints / model, CPU), 1, "here") for model in ("sft", "actor"))
    assert same_trunk(actor, sft)
    assert all(not torch.equal(sft.get_parameter(name), weight) for name, weight in learning(actor).items())
    batch = FirstBatch.load(trained.root, trained.params)
    found = [look(trained.root, batch) for name, look in _OF_MODELS.items() if name not in OF_DATA]
    assert not [finding for finding in found if not finding.ok]


def load(project: Workspace, reward: Path | None = None, parent: Path | None = None) -> Trainer:
    root, params = project.root, project.params
    return Trainer.load(
        seed=0,
        runtime=params.runtime,
        generation=params.generation,
        reward_function=params.reward_function,
        ppo=params.ppo,
        prompts=root / "data/prepared/prompts",
        sft=root / "checkpoints/sft",
        reward=reward or root / "checkpoints/reward",
        parent=parent,
    )


def test_an_iteration_from_disk_is_the_one_from_memory(trained: Workspace, tmp_path: Path) -> None:
    """To the bit; what is on disk of Actor and Critic is what they learned."""
    trainer = load(trained)
    trainer.step()
    trainer.save(tmp_path)
    assert load_file(tmp_path / "actor.safetensors").keys() == learning(trainer.state.actor.model).keys()
    again = load(trained, parent=tmp_path)
    assert again.step()[0] == trainer.step()[0]
    for one, other in ((t.state.actor.model.state_dict() for t in (trainer, again)),):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_last_state_of_another_model_is_forgotten(trained: Workspace) -> None:
    """Its digests are right: somebody else on the same store wrote it."""
    (known,) = chain.known(trained)
    record = {name: known.manifest[name] for name in ("metrics", "series", "perf")}
    with trained.store.writing(known.manifest["key"]) as out:
        shutil.copytree(known.payload, out, dirs_exist_ok=True)
        save_file({"weight": torch.ones(2)}, out / "actor.safetensors")
        trained.store.discard(known.manifest["key"])
        trained.store.commit(known.manifest["key"], out, known.manifest["identity"], **record)
    job = keying.plan(trained, STAGES["ppo"])
    with pytest.raises(DamagedEntry, match="not a state to go on from"):
        chain.finish(trained, job, chain.usable(chain.known(trained)))
    assert not chain.usable(chain.known(trained))  # so the next try makes it again


def test_a_reward_that_learned_below_the_cut_is_refused(trained: Workspace, tmp_path: Path) -> None:
    reward = tmp_path / "reward"
    shutil.copytree(trained.root / "checkpoints/reward", reward)
    shard = reward / "model-00001-of-00002.safetensors"
    weights = load_file(shard)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] + 1e-6 + weights[name].abs() * 1e-3}, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"ppo\.trainable_layers: found 1, but the Reward has learned below its top 1"):
        load(trained, reward=reward)
