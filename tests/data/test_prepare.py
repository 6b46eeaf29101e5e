"""The prepare stage on the shipped ratings and on small files of every kind."""

import ast
import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from test_encoding import chat_tokenizer
from transformers import LlamaConfig

from rlhf_tasks.config import parse_params
from rlhf_tasks.data.encoding import encode_prompt, encode_response, load_tokenizer
from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.prepare import run
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import LabelFile

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "sources": [{"kind": "ratings", "path": str(ROOT / "data" / "raw" / "movie_reviews.jsonl.gz")}],
    "template": "none",
    "max_prompt_tokens": 32,
    "max_response_tokens": 48,
}
TABLES = [f"{kind}/{side}" for kind in ("sft", "pairs", "prompts") for side in ("train", "heldout")]
FIVE = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected", "margin")


def prepare(out, data, model=None, seed=0, progress=lambda **values: None):
    params = parse_params({"data": data, "model": model or {}})
    return run(seed=seed, data=params.data, model=params.model, out=out, progress=progress)


def save_base(tokenizer, folder):
    """A base as far as `prepare` looks at it: nobody here reads its weights."""
    tokenizer.save_pretrained(folder)
    shape = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, architectures=["LlamaForCausalLM"])
    shape.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(bytes(1000))


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(out, table):
    return read_table(out / f"{table}.arrow").to_pylist()


def write(path, lines):
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    out, calls = tmp_path_factory.mktemp("shipped"), []
    counts = prepare(out, SHIPPED, progress=lambda **values: calls.append(values))
    return out, counts, calls


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """40 preference rows, one prompt each."""
    lines = [
        {"prompt": f"Question {i}", "chosen": f" yes {i}", "rejected": f" no {i} no", "margin": i} for i in range(40)
    ]
    return write(tmp_path_factory.mktemp("raw") / "preferences.jsonl", lines)


def test_the_shipped_ratings_give_enough_of_everything(shipped):
    out, counts, calls = shipped
    assert counts.keys() == {table.replace("/", "_") for table in TABLES}
    assert 4700 < counts["pairs_train"] < 5700
    assert 1000 < counts["pairs_heldout"] < 1500
    assert counts["prompts_heldout"] > 512
    assert counts["sft_train"] + counts["sft_heldout"] > 10_500
    done = [call["done"] for call in calls]
    assert done == sorted(done)
    assert all(call["done"] <= call["total"] for call in calls)
    total = 10605 + sum(counts.values()) + counts["sft_train"] + counts["pairs_train"]
    assert calls[-1] == {"done": total, "total": total}
    assert calls[0]["done"] < 1500 < 30_000 < calls[0]["total"] < 90_000, "while it reads, it guesses what is to come"
    assert {path.name for path in out.iterdir()} == {"sft", "pairs", "prompts", "tokenizer", "metrics.json"}


def test_the_splits_of_the_shipped_ratings_share_no_text(shipped):
    out, _, _ = shipped
    texts = {}
    for side in ("train", "heldout"):
        sft = {row["prompt"] + row["response"] for row in rows(out, f"sft/{side}")}
        pairs = {row["prompt"] + row[name] for row in rows(out, f"pairs/{side}") for name in ("chosen", "rejected")}
        texts[side] = sft | pairs
    assert texts["train"].isdisjoint(texts["heldout"])
    with gzip.open(SHIPPED["sources"][0]["path"], "rt", encoding="utf-8") as file:
        original = {json.loads(line)["text"] for line in file}
    assert texts["train"] | texts["heldout"] <= original, "every text is one that people rated"
    asked = [{row["prompt"] for row in rows(out, f"prompts/{side}")} for side in ("train", "heldout")]
    assert asked[0].isdisjoint(asked[1])


def test_pairs_of_the_shipped_ratings_are_what_people_preferred(shipped):
    out, _, _ = shipped
    with gzip.open(SHIPPED["sources"][0]["path"], "rt", encoding="utf-8") as file:
        rated = [json.loads(line) for line in file]
    mean = {row["text"]: sum(row["ratings"]) / len(row["ratings"]) for row in rated}
    uses = {}
    for row in rows(out, "pairs/heldout"):
        best, worst = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        assert mean[best] - mean[worst] == pytest.approx(row["margin"], abs=1e-6)
        assert row["margin"] >= 1
        assert len(row["prompt"].split()) in (1, 2)
        for text in (best, worst):
            uses[text] = uses.get(text, 0) + 1
    assert max(uses.values()) == 2


def test_every_row_is_written_in_the_one_encoding(shipped):
    out, _, _ = shipped
    tokenizer = load_tokenizer(out / "tokenizer")

    def prompt(text):
        return encode_prompt(tokenizer, text, 32, markup=False)

    def response(text):
        return encode_response(tokenizer, text, 48)

    for row in rows(out, "sft/heldout")[:200]:
        assert (row["prompt_ids"], row["response_ids"]) == (prompt(row["prompt"]), response(row["response"]))
    for row in rows(out, "pairs/heldout")[:200]:
        for side in ("chosen", "rejected"):
            assert row[f"input_ids_{side}"] == prompt(row["prompt"]) + response(row[side])
            assert row[f"attention_mask_{side}"] == [1] * len(row[f"input_ids_{side}"])
    for row in rows(out, "prompts/heldout")[:200]:
        assert row["input_ids"] == prompt(row["prompt"])
    assert set(FIVE) < set(read_table(out / "pairs" / "train.arrow").column_names)


def test_the_summary_counts_what_was_written(shipped):
    out, counts, _ = shipped
    document = json.loads((out / "metrics.json").read_text())
    summary = document.pop("details")
    assert summary["rows"] == {"movie_reviews.jsonl.gz": 10605}
    assert document == counts
    assert summary["dropped"]["sft"] == {"duplicates": 2, "contradictions": 0, "leaks": 0}
    assert summary["vocabulary"] == 2048
    responses = TokenColumn(read_table(out / "sft" / "train.arrow"), "response_ids")
    lengths, ends = responses.lengths(), [row[-1] for row in responses]
    numbers = summary["tokens"]["sft_train"]["response"]
    assert (numbers["max"], numbers["mean"]) == (lengths.max(), pytest.approx(lengths.mean()))
    assert numbers["share_cut"] == pytest.approx(sum(end != 1 for end in ends) / len(ends))
    assert 0.3 < summary["balance"]["pairs_train"]["share_chosen_longer"] < 0.6
    assert str(ROOT) not in (out / "metrics.json").read_text()


def test_two_processes_write_the_same_bytes(shipped, tmp_path):
    out, _, _ = shipped
    code = (
        "import sys, json; sys.path[:0] = sys.argv[3:]; from pathlib import Path; from test_prepare import prepare;"
        "prepare(Path(sys.argv[1]), json.loads(sys.argv[2]))"
    )
    paths = [str(ROOT), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, tmp_path, json.dumps(SHIPPED), *paths], check=True, env=environment)
    assert digests(tmp_path) == digests(out)


def test_another_seed_moves_nothing_across_the_split(preferences, tmp_path):
    for seed in (0, 1):
        prepare(tmp_path / str(seed), {"sources": [{"kind": "preference", "path": preferences}]}, seed=seed)
    assert digests(tmp_path / "0") == digests(tmp_path / "1")


@pytest.mark.parametrize("template", ["none", "alpaca"])
def test_labels_change_the_pairs_and_nothing_else(tmp_path, preferences, template):
    """What SFT, the tokenizer and PPO's prompts are made of stays to the bit: only the reward model learns anew."""
    file = LabelFile(tmp_path / "labels.jsonl")
    for number in range(20):
        file.add(Compared(f"Question {number}", (f" so {number}", f" or {number}"), None, None), "second", "ada")
        file.add(Compared(f"Question {number}", (f" or {number}", f" so {number}"), None, None), "tie", "bob")
    own = {"kind": "preference", "path": preferences}
    made = {}
    for name, sources in {"own": [own], "both": [{"kind": "labels", "path": str(file.path)}, own]}.items():
        prepare(tmp_path / name, {"sources": sources, "template": template, "heldout": 0.5})
        found = digests(tmp_path / name)
        made[name] = {file: digest for file, digest in found.items() if not file.startswith(("pairs/", "metrics"))}
    assert made["own"] == made["both"]
    both, own = (
        {(r["chosen"], r["margin"]) for t in TABLES[2:4] for r in rows(tmp_path / n, t)} for n in ("both", "own")
    )
    assert both - own == {(f" or {number}", 0.5) for number in range(20)}
    for side in ("train", "heldout"):
        asked = {row["prompt"] for row in rows(tmp_path / "both", f"prompts/{side}")}
        assert {row["prompt"] for row in rows(tmp_path / "both", f"pairs/{side}")} <= asked


def test_labels_alone_have_nothing_for_sft(tmp_path):
    file = LabelFile(tmp_path / "labels.jsonl")
    for number in range(40):
        file.add(Compared(f"Question {number}", ("a", "b"), None, None), "first", "ada")
    with pytest.raises(UserError, match=r"no rows are left for sft/train: .* add data"):
        prepare(tmp_path / "out", {"sources": [{"kind": "labels", "path": str(file.path)}]})


def test_files_of_every_kind_together(tmp_path, preferences):
    alpaca = [{"instruction": f"介绍一下 {i}", "input": "", "output": f"答案 {i} 🎬"} for i in range(30)]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    with (tmp_path / "ratings.csv").open("w", newline="", encoding="utf-8") as file:
        lines = [(f"Ask {i % 8}", f"answer {i}", i % 5) for i in range(40)]
        csv.writer(file).writerows([("prompt", "text", "rating"), *lines])
    sources = [
        {"kind": "sft", "path": str(tmp_path / "alpaca.json")},
        {"kind": "preference", "path": preferences},
        {"kind": "preference", "path": preferences},
        {"kind": "ratings", "path": str(tmp_path / "ratings.csv")},
    ]
    model = {"scratch": {"vocab_size": 400}}
    counts = prepare(tmp_path / "out", {"sources": sources, "template": "auto", "heldout": 0.3}, model)
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["details"]
    read = {"alpaca.json": 30, "preferences.jsonl": 40, "preferences.jsonl (2)": 40, "ratings.csv": 40}
    assert summary["rows"] == read
    assert summary["dropped"]["pairs"]["duplicates"] == 40
    assert counts["sft_train"] + counts["sft_heldout"] == 70
    assert counts["prompts_train"] + counts["prompts_heldout"] == 78
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    for row in rows(tmp_path / "out", "sft/train"):
        assert row["prompt"].startswith("Below is an instruction")
        assert len(row["prompt_ids"]) < 40, "the template's strings are single tokens"
        assert tokenizer.decode(row["prompt_ids"] + row["response_ids"][:-1]) == row["prompt"] + row["response"]
    by_side = [{row["prompt"] for row in rows(tmp_path / "out", f"pairs/{side}")} for side in ("train", "heldout")]
    assert by_side[0].isdisjoint(by_side[1])


def test_a_local_model_brings_its_tokenizer_and_chat_template(tmp_path, preferences):
    save_base(chat_tokenizer(pad_token=None), tmp_path / "base")
    data = {"sources": [{"kind": "preference", "path": preferences}], "max_prompt_tokens": 20, "max_response_tokens": 6}
    prepare(tmp_path / "out", data, {"base": str(tmp_path / "base")})
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer.chat_template
    row = rows(tmp_path / "out", "sft/train")[0]
    assert row["prompt"].startswith("<|im_start|>user\nQuestion")
    assert row["prompt"].endswith(tokenizer.decode(row["prompt_ids"]))
    assert len(row["prompt_ids"]) == 20
    assert row["prompt_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1, "cut on the left"
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["details"]
    assert summary["tokens"]["sft_train"]["prompt"] == {"max": 20, "mean": 20, "p95": 20, "share_cut": 1}
    assert summary["tokens"]["pairs_train"]["rejected"]["share_cut"] == 1


def test_a_refused_conversation_is_named_by_its_place(tmp_path, preferences):
    refusing = chat_tokenizer(chat_template="{{ raise_exception('Roles must alternate') }}")
    save_base(refusing, tmp_path / "base")
    data = {"sources": [{"kind": "preference", "path": preferences}]}
    with pytest.raises(
        UserError, match=r"preferences\.jsonl:1: the tokenizer's chat template refuses .*: Roles must alter"
    ):
        prepare(tmp_path / "out", data, {"base": str(tmp_path / "base")})


def test_pairs_that_became_the_same_by_being_cut_are_left_out(tmp_path):
    lines = [{"prompt": f"q {i}", "chosen": f"same {i} a", "rejected": f"same {i} b"} for i in range(40)]
    lines += [{"prompt": f"r {i}", "chosen": f"{i} a", "rejected": f"{i} b"} for i in range(40)]
    save_base(chat_tokenizer(chat_template=None), tmp_path / "base")
    data = {"sources": [{"kind": "preference", "path": write(tmp_path / "p.jsonl", lines)}], "max_response_tokens": 5}
    counts = prepare(
        tmp_path / "out", data | {"template": "none", "max_prompt_tokens": 4}, {"base": str(tmp_path / "base")}
    )
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["details"]
    assert sum(summary["same_after_cut"].values()) == 40
    assert summary["tokens"]["prompts_train"]["prompt"]["max"] == 4
    assert summary["tokens"]["prompts_train"]["prompt"]["share_cut"] == 0, "as long as may be is not cut"
    assert counts["pairs_train"] + counts["pairs_heldout"] == 40
    assert len(rows(tmp_path / "out", "pairs/train")) == counts["pairs_train"]


ERRORS = [
    (
        {"sources": [{"kind": "sft", "path": "x.jsonl"}]},
        {},
        r"`data\.sources`: no source of kind preference, ratings or labels",
    ),
    ({"heldout": 0.000001}, {}, r"no rows are left for sft/heldout: raise `data\.heldout` \(1e-06\), or add data$"),
    ({"heldout": 0.999999}, {}, r"no rows are left for sft/train: lower `data\.heldout` \(0\.999999\), or add data$"),
    ({"template": "chat"}, {}, r"`data\.template: chat`: the tokenizer has no chat template; set `data\.template` to"),
    (
        {},
        {"base": "no/such/folder"},
        r"`model\.base: no/such/folder`: no such folder or file; expected `scratch`, a local",
    ),
]


@pytest.mark.parametrize(("data", "model", "message"), ERRORS)
def test_what_cannot_be_prepared_is_refused_in_a_sentence(tmp_path, preferences, data, model, message):
    sources = {"sources": [{"kind": "preference", "path": preferences}]}
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", sources | data, model)


def rated(*ratings, heads=("It's a",)):
    rows = ((heads[i % len(heads)], ratings[i % len(ratings)]) for i in range(40))
    return [{"text": f"{head} film number {i}", "rating": rating} for i, (head, rating) in enumerate(rows)]


SAME = [{"prompt": f"q {i}", "chosen": f"so it is, {i}", "rejected": f"so it is, {i}, no"} for i in range(40)]
TURNED = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in SAME]


@pytest.mark.parametrize(
    ("kind", "lines", "data", "message"),
    [
        ("ratings", rated(1, 1.5), {}, r"far enough apart; lower `data\.ratings\.min_gap` \(1\), or add data$"),
        ("ratings", rated(1), {}, r"no two rated texts share a prompt, or an opening, and differ in their rating; add"),
        (
            "ratings",
            rated(1, 3, heads=[f"{i}th one" for i in range(40)]),
            {},
            r"no two rated texts share a prompt, or an opening, and differ in their rating; add data$",
        ),
        ("ratings", rated(1, 3), {"heldout": 1e-9}, r"heldout: raise `data\.heldout` \(1e-09\), or add data$"),
        (
            "preference",
            [*SAME, *TURNED],
            {},
            r"pairs/train: all \d\d were left out \(80 contradictions on both sides together\); `rlhf data check`",
        ),
        (
            "preference",
            SAME,
            {"max_response_tokens": 1},
            r"pairs/train: the two answers of all \d\d became the same by being cut; raise `data\.max_response_tok",
        ),
    ],
)
def test_what_leaves_no_rows_is_said_by_its_cause(tmp_path, kind, lines, data, message):
    lessons = [{"prompt": f"p {i}", "completion": "x"} for i in range(40)]
    sources = [
        {"kind": kind, "path": write(tmp_path / "rows.jsonl", lines)},
        {"kind": "sft", "path": write(tmp_path / "sft.jsonl", lessons)},
    ]
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "out", {"sources": sources, "template": "none", **data})
    assert ("min_gap" in str(caught.value)) == ("min_gap" in message), "it is not what is wrong"


@pytest.mark.parametrize(
    ("answer", "prompt", "said"),
    [
        (256, 256, ""),
        (
            2,
            256,
            r"100 % of the answers lose their end and EOS \(`data\.max_response_tokens: 2`\); `rlhf data check` says",
        ),
        (256, 2, r"100 % of the prompts lose their beginning \(`data\.max_prompt_tokens: 2`\); `rlhf data check` says"),
        (2, 2, r"100 % of the answers lose .* and 100 % of the prompts lose .*; `rlhf data check` says which$"),
        (25, 256, r"2\.5 % of the answers lose their end"),
        (256, 25, ""),
    ],
)
def test_a_run_says_in_a_line_what_is_cut(tmp_path, caplog, answer, prompt, said):
    """Any answer, because training then sees no end of it; prompts where it is most of them."""
    lines = [{"prompt": f"{i} is odd, isn't it?", "chosen": f"{i} is so", "rejected": f"no {i}"} for i in range(40)]
    lines[0] = {name: text + "".join(map(chr, range(33, 123))) for name, text in lines[0].items()}
    data = {"sources": [{"kind": "preference", "path": write(tmp_path / "p.jsonl", lines)}], "template": "none"}
    limits = {"max_response_tokens": answer, "max_prompt_tokens": prompt}
    prepare(tmp_path / "out", data | limits, {"scratch": {"vocab_size": 300}})
    assert len(caplog.messages) == bool(said)
    assert all(re.match(f"prepare: {said}", line) for line in caplog.messages), caplog.messages


def test_a_run_says_what_is_read_as_something_else(tmp_path, caplog):
    lines = [{"prompt": f"Is {i} odd?", "chosen": f"Is {i} odd? yes", "rejected": f"Is {i} odd? no"} for i in range(40)]
    lines[7]["margin"] = float("nan")
    data = {"sources": [{"kind": "preference", "path": write(tmp_path / "p.jsonl", lines)}], "template": "none"}
    prepare(tmp_path / "out", data)
    assert caplog.messages == [
        "prepare: 40 rows repeat their prompt in front of every answer; it is taken off there",
        "prepare: 1 margins are NaN, and count as none",
    ]
    details = json.loads((tmp_path / "out/metrics.json").read_text())["details"]
    assert details["noted"] == {"repeated prompts": 40, "no margin": 1}
    for side in ("train", "heldout"):
        assert {(row["chosen"], row["rejected"]) for row in rows(tmp_path / "out", f"pairs/{side}")} == {
            (" yes", " no")
        }


def test_a_malformed_row_is_named_by_file_and_line(tmp_path):
    lines = [{"text": "It's a film", "rating": 1}, {"text": "It's a film", "rating": 11}]
    data = {"sources": [{"kind": "ratings", "path": write(tmp_path / "r.jsonl", lines)}]}
    with pytest.raises(UserError, match=r"r\.jsonl:2: `rating` is 11, expected -4 to 4"):
        prepare(tmp_path / "out", data)


def test_datasets_opens_what_was_prepared(shipped):
    out, counts, _ = shipped
    for table in TABLES:
        assert len(datasets.Dataset.from_file(str(out / f"{table}.arrow"))) == counts[table.replace("/", "_")]


def test_the_training_side_needs_none_of_the_heavy_readers():
    """What SFT, reward and PPO import of this package runs where there is only torch, transformers and pyarrow."""
    for name in ("encoding", "formats", "prompts", "tables"):
        tree = ast.parse((ROOT / "rlhf_tasks" / "data" / f"{name}.py").read_text(encoding="utf-8"))
        imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert imported.isdisjoint({"datasets", "prefect", "mlflow", "dvc", "pydantic"})


CHINESE = {
    "instruction": "保持健康的三个提示。",
    "input": "",
    "output": "以下是保持健康的三个提示：\n\n1. 保持身体活动。\n\n2. 均衡饮食。\n\n3. 睡眠充足。",
}
TALK = {
    "messages": [
        {"role": "system", "content": "Отвечай коротко 🎬"},
        {"role": "user", "content": "שלום, מה שלומך?"},
        {"role": "assistant", "content": "مرحبا"},
        {"role": "user", "content": "👩‍👩‍👧‍👦 e\u0301"},
        {"role": "assistant", "content": "بخير\u2028شكرا"},
    ]
}


def test_rows_of_every_script_and_length_survive(tmp_path, preferences):
    """The classic Chinese alpaca row, a conversation from right to left with emoji, a very long answer."""
    long = {"prompt": "Go on", "completion": " на " * 500_000}
    for name, row in (("zh.json", [CHINESE]), ("talk.json", [TALK]), ("long.json", [long])):
        (tmp_path / name).write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    sources = [{"kind": "sft", "path": str(tmp_path)}, {"kind": "preference", "path": preferences}]
    more = [{"instruction": f"题 {i}", "input": "", "output": f"答 {i}"} for i in range(40)]
    (tmp_path / "more.jsonl").write_bytes("\n".join(json.dumps(row) for row in more).encode())
    prepare(tmp_path / "out", {"sources": sources, "template": "alpaca"}, {"scratch": {"vocab_size": 400}})
    tokenizer = load_tokenizer(tmp_path / "out/tokenizer")
    found = {row["response"]: row for side in ("train", "heldout") for row in rows(tmp_path / "out", f"sft/{side}")}
    chinese, talk, cut = (found[text] for text in (CHINESE["output"], "بخير\u2028شكرا", " на " * 500_000))
    assert chinese["prompt"].endswith("### Instruction:\n保持健康的三个提示。\n\n### Response:")
    assert "### Input" not in chinese["prompt"]
    for row in (chinese, talk):
        assert tokenizer.decode(row["response_ids"][:-1]) == row["response"]
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
    assert all(message["content"] in talk["prompt"] for message in TALK["messages"][:-1])
    assert len(cut["response_ids"]) == 256
    assert cut["response_ids"][-1] != tokenizer.eos_token_id
