"""params.yaml: what is refused, in which words, and what `--set` leaves as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_tasks.config import changed_params, flatten, load_params, parse_assignments, parse_params, set_params
from rlhf_tasks.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = "data: {sources: [{kind: ratings, path: ratings.jsonl}]}\n"
COMMENTED = f"""\
# why this file is here
seed: 3  # any number
{DATA}
ppo:
  # how far an iteration may go
  clip: 0.2      # epsilon
  kl:
    coef: 0.05
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def commented(tmp_path: Path) -> Path:
    return written(tmp_path, COMMENTED)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(UserError) as caught:
        load_params(written(folder, text))
    return str(caught.value)


def test_the_shipped_file_loads_and_states_every_parameter() -> None:
    """Nothing that the default run uses may come from defaults in the code, which are in no git diff of params.yaml."""
    params = load_params(REPOSITORY / "params.yaml")
    text = (REPOSITORY / "params.yaml").read_text()
    unstated = [key for key in flatten(params) if f"{key.rpartition('.')[2]}:" not in text and not key[-1].isdigit()]
    assert set(unstated) <= {f"data.sources.0.{name}" for name in ("hub", "revision", "split", "rows")}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pppo: {}", ["unknown key `pppo`", "did you mean `ppo`?", "Allowed here: seed, runtime"]),
        ("ppo: {kl: {coeff: 0.1}}", ["unknown key `ppo.kl.coeff`", "did you mean `ppo.kl.coef`?"]),
        ("register: {gate: {maxkl: 1}}", ["unknown key `register.gate.maxkl`", "`register.gate.max_kl`"]),
        ("reward: {minibatches: 2}", ["unknown key `reward.minibatches`", "did you mean `ppo.minibatches`?"]),
        ("sft: {zzzzzz: 2}", ["unknown key `sft.zzzzzz`; Allowed here: epochs, learning_rate"]),
        ("seed: '1'", ["`seed`: found '1' (text)", "integer"]),
        ("seed: true", ["`seed`: found True (yes or no)", "integer"]),
        ("ppo: {batch: 8.0}", ["`ppo.batch`: found 8.0", "integer"]),
        ("ppo: {whiten_rewards: 1}", ["`ppo.whiten_rewards`: found 1", "boolean"]),
        ("ppo: [1, 2]", ["`ppo`: found [1, 2]"]),
        ("ppo: {gamma: 1.5}", ["`ppo.gamma`: found 1.5", "less than or equal to 1"]),
        ("ppo: {kl: {coef: .nan}}", ["`ppo.kl.coef`: found nan", "finite"]),
        ("ppo: {kl: {target: .inf}}", ["`ppo.kl.target`: found inf", "finite"]),
        ("ppo: {kl: {estimator: k4}}", ["`ppo.kl.estimator`: found 'k4'", "'k1', 'k2', 'k3', 'abs' or 'full'"]),
        ("ppo: {minibatches: 9, batch: 8}", ["`minibatches: 9`", "`batch: 8`"]),
        ("ppo: {batch: 50, kl: {controller: adaptive, horizon: 10}}", ["`kl.horizon: 10`", "expected more than 10"]),
        ("ppo: {schedule: {kind: linear}}", ["`ppo.schedule`", "needs `total`"]),
        ("model: {scratch: {hidden_size: 30, heads: 4}}", ["`hidden_size: 30`", "multiple of 2 x `heads: 4`"]),
        ("sft: {epochs: 0, batch_tokens: x}", ["`sft.epochs`: found 0", "`sft.batch_tokens`: found 'x'"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found_and_what_is_allowed(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    message = refusal(tmp_path, DATA + text)
    for part in said:
        assert part in message
    assert all(line.startswith("params.yaml: ") for line in message.splitlines())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{kind: ratings}", "give either `path`"),
        ("{kind: ratings, path: a, hub: b}", "give either `path`"),
        ("{kind: ratings, hub: somebody/something}", "needs a `revision`"),
        ("{kind: rating, path: a}", "`data.sources.0.kind`: found 'rating'"),
        (
            "{kind: sft, path: a, fields: {instuction: q}}",
            "did you mean `instruction`? Expected one of prompt, completion",
        ),
        (
            "{kind: sft, path: a, fields: {question: prompt}}",
            "`question: prompt` is the wrong way round; write `prompt: question`, our name first",
        ),
        ("{kind: sft, path: a, rows: 0}", "`data.sources.0.rows`: found 0"),
        ("{kind: ratings, file: a}", "unknown key `data.sources.0.file`"),
        ("{kind: ratings, location: a}", "unknown key `data.sources.0.location`; Allowed here: kind, path"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, source: str, said: str) -> None:
    assert said in refusal(tmp_path, f"data: {{sources: [{source}]}}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1", "`data` is missing"),
        ("data: {sources: []}", "`data.sources`"),
        (DATA.replace("]}", "], ratings: {scale: [4, -4]}}"), "must run from low to high"),
        (DATA.replace("]}", "], ratings: {scale: [1, 2, 3]}}"), "`data.ratings.scale`"),
        ("ppo: {kl: [}", "not readable as YAML"),
        ("seed: 1\nseed: 2", "not readable as YAML"),
        ("- ppo", "expected sections such as"),
        ("", "expected sections such as"),
    ],
)
def test_a_file_that_is_no_set_of_parameters_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    lines = refusal(tmp_path, DATA + "seed: -1\nppo: {lamb: 1, clip: 0}\n").splitlines()
    assert len(lines) == 3
    assert {key for key in ("`seed`", "`ppo.lamb`", "`ppo.clip`") if any(key in line for line in lines)} == {
        "`seed`",
        "`ppo.lamb`",
        "`ppo.clip`",
    }


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: not found; run from the project's folder"):
        load_params(tmp_path / "params.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"seed: \xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_params(tmp_path / "params.yaml")


def test_two_spellings_of_a_number_are_one_value(tmp_path: Path) -> None:
    """So they give one key: a user who writes 1 for 1.0 or 1e-4 for 0.0001 retrains nothing."""
    spelled = [
        load_params(written(tmp_path, f"{DATA}ppo: {{clip: {one}, actor_learning_rate: {small}}}"))
        for one, small in (("1", "1e-4"), ("1.0", "0.0001"))
    ]
    assert repr(flatten(spelled[0])) == repr(flatten(spelled[1]))


def test_loaded_values_cannot_be_changed(commented: Path) -> None:
    params = load_params(commented)
    with pytest.raises(ValidationError):
        params.ppo.kl.coef = 1.0  # type: ignore[misc]


def test_a_wrong_part_is_named_once(tmp_path: Path) -> None:
    """What it makes of the whole is no second mistake."""
    text = "data: {sources: [{kind: preferences, path: data/mine.jsonl}]}"
    said = refusal(tmp_path, text)
    assert "`data.sources.0.kind`: found 'preferences'" in said
    assert len(said.splitlines()) == 1


def test_set_changes_one_line_and_keeps_comments(commented: Path) -> None:
    assert set_params(commented, parse_assignments(["ppo.clip=0.3"])) == ["ppo.clip: 0.2 -> 0.3"]
    assert commented.read_text() == COMMENTED.replace("clip: 0.2 ", "clip: 0.3 ")
    assert load_params(commented).ppo.clip == 0.3


@pytest.mark.parametrize("assignment", ["ppo.kl.coef=0.3", "data.heldout=0.25", "ppo.clip=", "sft.learning_rate=1e-4"])
def test_set_changes_one_line_of_the_shipped_file(tmp_path: Path, assignment: str) -> None:
    path = written(tmp_path, (REPOSITORY / "params.yaml").read_text())
    before = path.read_text().splitlines()
    assert len(set_params(path, parse_assignments([assignment]))) == 1
    changed = [line for line, old in zip(path.read_text().splitlines(), before, strict=True) if line != old]
    assert len(changed) == 1


def test_set_adds_a_key_that_the_file_leaves_to_its_default(commented: Path) -> None:
    assert set_params(commented, parse_assignments(["evaluate.prompts=5", "register.name=mine"])) == [
        "evaluate.prompts: null -> 5",
        "register.name: null -> mine",
    ]
    assert load_params(commented).evaluate.prompts == 5
    assert "# epsilon" in commented.read_text()


def test_set_reaches_entries_of_lists(tmp_path: Path) -> None:
    path = written(tmp_path, (REPOSITORY / "params.yaml").read_text())
    before = path.read_text().splitlines()
    values = parse_assignments(["data.sources.0.rows=700", "data.ratings.scale.1=5"])
    assert set_params(path, values) == ["data.sources.0.rows: null -> 700", "data.ratings.scale.1: 4 -> 5"]
    params = load_params(path)
    assert (params.data.sources[0].rows, params.data.ratings.scale) == (700, (-4, 5))
    after = path.read_text().splitlines()
    assert [line for line in after if line not in before] == ["      rows: 700", "    scale: [-4, 5]"]


def test_what_would_be_set_is_known_without_writing(commented: Path) -> None:
    assert changed_params(commented, {"ppo.kl.coef": 0.5, "evaluate.prompts": 3}).ppo.kl.coef == 0.5
    with pytest.raises(UserError, match=r"`ppo\.clip`: found -1"):
        changed_params(commented, {"ppo.clip": -1})
    assert commented.read_text() == COMMENTED


def test_set_to_the_same_value_touches_nothing(commented: Path) -> None:
    before = commented.stat()
    assert set_params(commented, parse_assignments(["ppo.clip=0.20", "seed=3"])) == []
    assert commented.stat().st_mtime_ns == before.st_mtime_ns
    assert commented.stat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("ppo.clip", "expected KEY=VALUE"),
        ("ppo.clipp=1", "did you mean `ppo.clip`?"),
        ("pppo.kl.coef=1", "did you mean `ppo`?"),
        ("ppo.clip=-1", "`ppo.clip`: found -1"),
        ("ppo.clip=a lot", "`ppo.clip`: found 'a lot'"),
        ("ppo=3", "`ppo`: found 3"),
        ("seed.more=1", "inside a plain value"),
        ("ppo.clip=[1", "ppo.clip"),
        ("ppo.clip=2026-01-02", "`ppo.clip`: found "),
        ("data.sources.1.rows=5", "cannot set `data.sources.1.rows`: found '1' for an entry of a list that has 1; exp"),
        ("data.sources.first.rows=5", "found 'first' for an entry of a list"),
        ("data.sources.0.row=5", "unknown key `data.sources.0.row`; did you mean `data.sources.0.rows`?"),
    ],
)
def test_set_refuses_and_leaves_the_file_alone(commented: Path, assignment: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        set_params(commented, parse_assignments(["seed=4", assignment]))
    assert said in str(caught.value)
    assert commented.read_text() == COMMENTED
    assert list(commented.parent.iterdir()) == [commented]


def test_flatten_names_every_parameter(commented: Path) -> None:
    flat = flatten(load_params(commented))
    assert flat["ppo.kl.coef"] == 0.05
    assert flat["data.sources.0.path"] == "ratings.jsonl"
    assert (flat["data.ratings.scale.0"], flat["data.ratings.scale.1"]) == (-4, 4)
    assert flat["register.gate.max_kl"] == 12.0
    assert not any(isinstance(value, dict | list | tuple) for value in flat.values())


def test_sections_go_by_their_name_in_the_file(commented: Path) -> None:
    params = load_params(commented)
    assert params.section("ppo.kl") is params.ppo.kl
    assert params.section("register") is params.register_
    assert params.section("seed") == 3


def test_a_document_that_was_parsed_elsewhere_is_checked_alike() -> None:
    with pytest.raises(UserError, match=r"^here: unknown key `x`"):
        parse_params({"data": {"sources": [{"kind": "sft", "path": "a"}]}, "x": 1}, "here")


def test_reading_parameters_takes_no_torch() -> None:
    """An error in params.yaml must be told within a second."""
    code = "import sys, rlhf_tasks.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert set(loaded.stdout.split()).isdisjoint({"torch", "transformers", "mlflow", "prefect", "dvc", "numpy"})
