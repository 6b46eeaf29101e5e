"""`rlhf data check`: every fault of every row of every file, and what `prepare` would do in silence."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.config import Model, parse_params
from rlhf_tasks.data.check import Report, check
from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.near import SIMILAR, NearTexts, signed, similarity
from rlhf_tasks.data.prepare import run
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import line

ROOT = Path(__file__).resolve().parents[2]
NOUNS = ["tea", "rain", "chess", "bread", "jazz", "snow", "maps", "clocks", "rivers", "owls", "glass", "ships"]
VERBS = ["Describe", "Praise", "Explain", "Compare", "Sketch", "Recall", "Imagine", "Count"]
GOOD = [
    {"prompt": f"{verb} {noun}", "chosen": f" {noun} is lovely" + " so" * (i % 2), "rejected": f" {noun}? no, never"}
    for i, (verb, noun) in enumerate((v, n) for v in VERBS for n in NOUNS)
]


def lines(*rows, end="\n"):
    texts = (json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else row for row in rows)
    return end.join(texts).encode(errors="replace")


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


NOT_UTF8 = pa.array([b"\xff", *[b"fine"] * 30]).view(pa.string())
HUMAN = "\n\nHuman: Hello\n\nAssistant:"
P = {"prompt": "p", "chosen": " a", "rejected": " b"}
# file: (kind, content, what has to be said of it, in order: each as place and message)
BROKEN = {
    "01-syntax.jsonl": (
        "preference",
        lines(P, "{broken", P, '{"prompt": }'),
        [(":2", "broken JSON"), (":4", r"broken JSON \(Expecting value\)")],
    ),
    "02-no-objects.jsonl": (
        "preference",
        lines("[1]", P, '"text"', "3"),
        [(":1", "a list"), (":3", "a text"), (":4", "a number")],
    ),
    "03-latin1.jsonl": ("preference", b'{"prompt": "\xe9"}\n' * 2, [(":1", "not UTF-8"), (":2", "not UTF-8")]),
    "04-missing.jsonl": (
        "preference",
        lines({"prompt": "p"}, {"prompt": "p", "chosen": " a"}),
        [(":1", "no `chosen`; found `prompt`"), (":1", "no `rejected`"), (":2", "no `rejected`")],
    ),
    "05-empty-answers.jsonl": (
        "preference",
        lines(P | {"chosen": " "}, P | {"chosen": "", "rejected": "\n"}, P | {"prompt": ""}),
        [
            (":1", "`chosen` is empty"),
            (":2", "`chosen` is empty"),
            (":2", "`rejected` is empty"),
            (":3", "`prompt` is empty"),
        ],
    ),
    "06-identical.jsonl": (
        "preference",
        lines(P | {"rejected": " a"}, P, P | {"rejected": " a"}),
        [(":1", "`chosen` is the same as `rejected`"), (":3", "the same")],
    ),
    "07-margins.jsonl": (
        "preference",
        lines(
            P | {"margin": "much"},
            P | {"margin": True, "chosen": ""},
            '{"prompt":"p","chosen":"a","rejected":"b","margin":Infinity}',
        ),
        [
            (":1", '`margin` is "much", expected a finite'),
            (":2", "`chosen` is empty"),
            (":2", "`margin` is true"),
            (":3", "Infinity"),
        ],
    ),
    "08-types.jsonl": (
        "preference",
        lines(P | {"prompt": 3, "chosen": 4, "rejected": {"a": 1}}),
        [(":1", "`prompt` is 3, expected a text"), (":1", "`chosen` is 4"), (":1", "`rejected` is")],
    ),
    "09-turns.jsonl": (
        "sft",
        lines(
            {"messages": [{"role": "user", "content": "Hi"}]},
            {"messages": [{"role": "robot", "content": "Hi"}, {"role": "assistant"}]},
            {"messages": []},
        ),
        [
            (":1", "ends with `user`"),
            (":2", r'messages\[1\]\.role` is "robot"'),
            (":2", r"messages\[2\]"),
            (":3", "a list of messages"),
        ],
    ),
    "10-alpaca.json": (
        "sft",
        json.dumps(
            [{"instruction": "", "output": ""}]
            + [{"instruction": f"x {i}", "output": "y"} for i in range(30)]
            + [{"instruction": "x"}]
        ).encode(),
        [(":row 1", "`instruction` is empty"), (":row 1", "`output` is empty"), (":row 32", "no `output`")],
    ),
    "11-half.json": ("sft", b'[\n {"instr', [("", "11-half.json:2: broken JSON")]),
    "12-object.json": ("sft", b'{"rows": []}', [("", "found an object with `rows`, expected a list of rows")]),
    "13-cells.csv": (
        "ratings",
        b"text,rating\ngood film,2\nbad\nfine film,x\ndull film,99\n",
        [(":3", "found 1 cells, expected 2"), (":4", '`rating` is "x"'), (":5", '"99", expected -4 to 4')],
    ),
    "14-columns.csv": ("ratings", b"text,text\na,b\n", [("", "14-columns.csv:1: found the columns")]),
    "15-quotes.csv": ("ratings", b'text,rating\n"a,1\n', [("", "broken CSV")]),
    "16-ratings.jsonl": (
        "ratings",
        lines({"text": "a b", "ratings": [1, 9, "z"]}, {"text": "a b", "ratings": []}, {"text": "a b"}),
        [
            (":1", r"ratings\[2\]` is 9"),
            (":1", r"ratings\[3\]` is \"z\""),
            (":2", "at least one number"),
            (":3", "no `rating`"),
        ],
    ),
    "17-not.parquet": ("sft", b"PAR1 not really", [("", "not a readable Parquet file")]),
    "18-nulls.parquet": (
        "preference",
        parquet(pa.Table.from_pylist([P, {"prompt": None, "chosen": "a", "rejected": None}])),
        [(":row 2", "expected both to open with the same turns|no `rejected`")],
    ),
    "19-cut.jsonl.gz": (
        "sft",
        gzip.compress(lines({"prompt": "p", "completion": "c"}))[:-9],
        [("", "damaged gzip file")],
    ),
    "20-transcripts.jsonl": (
        "preference",
        lines(
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
            {"chosen": "x", "rejected": "y"},
        ),
        [(":1", "both to open with the same turns"), (":2", "both to open with the same turns")],
    ),
    "21-surrogate.jsonl": (
        "sft",
        b'{"prompt": "\\ud800", "completion": "x"}',
        [(":1", "no valid Unicode at character 1")],
    ),
    "25-edited-labels.jsonl": (
        "labels",
        lines(line(Compared("p", ("a", "b"), None, None), "tie", "ada") | {"answers": ["a", "B"]}, P),
        [(":1", "`pair` is not of these texts"), (":2", "no `answers`"), (":2", "no `choice`"), (":2", "no `rater`")],
    ),
    "22-empty.jsonl": ("sft", b"\n\n", [("", "holds no rows")]),
    "23-notes.txt": ("sft", b"text", [("", r"unknown kind of file `\.txt`")]),
    "24-missing.jsonl": ("sft", None, [("", "not found; correct its path")]),
    "25-utf16.jsonl": (
        "sft",
        lines(P, P, P).decode().encode("utf-16"),
        [("", "found UTF-16, expected UTF-8")],
    ),
    "26-bytes.csv": (
        "ratings",
        b"text,rating\ngood film,1\nbad \xff,2\nfine film,1\nworse \xe9,2\ndull film,99\n",
        [(":3", "not UTF-8"), (":5", "not UTF-8"), (":6", '`rating` is "99"')],
    ),
    "27-bytes.parquet": (
        "sft",
        parquet(pa.table({"prompt": [f"p {i}" for i in range(31)], "completion": NOT_UTF8})),
        [(":row 1", "`completion` is not UTF-8; write the file again")],
    ),
    "28-doubled.jsonl": (
        "preference",
        lines('{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}', P),
        [(":1", "found `chosen` twice in one object")],
    ),
    "29-two-lists.json": (
        "preference",
        json.dumps({"data": [P], "test": [P]}).encode(),
        [("", r"found 2 lists of rows \(`data`, `test`\), expected a list of rows")],
    ),
    "30-names.jsonl": (
        "prompts",
        lines({"\x1b[2J\ud800" + "n" * 99: 1} | {f"k{i}": 1 for i in range(99)}).replace(b"?", b"\\ud800"),
        [(":1", r"no `prompt`; found `\\x1b\[2J\\ud800n+\.\.\.`, .*`k10` and 88 more; a row of kind prompts")],
    ),
    "31-human.jsonl": (
        "preference",
        lines({"chosen": f"{HUMAN} Hi", "rejected": f"{HUMAN} Yo\n\nHuman: So?"}),
        [(":1", "`rejected` is a transcript that ends with the human's turn")],
    ),
    "32-two-prompts.jsonl": (
        "sft",
        lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": "c"}),
        [(":1", '`prompt` is "c", expected what `messages` says too')],
    ),
}


def write_good(folder, name="good.jsonl", rows=GOOD):
    (folder / name).write_bytes(lines(*rows))
    return {"kind": "preference", "path": str(folder / name)}


def look(folder, *sources, model=None, **data) -> Report:
    params = parse_params({"data": {"sources": list(sources), "template": "none", **data}, "model": model or {}})
    return check(seed=0, data=params.data, model=params.model, scratch=folder, progress=lambda **step: None)


def broken_source(folder, name):
    kind, content, _ = BROKEN[name]
    if content is not None:
        (folder / name).write_bytes(content)
    return {"kind": kind, "path": str(folder / name)}


def assert_said(problems, folder, name):
    expected = BROKEN[name][2]
    assert len(problems) == len(expected), problems
    for problem, (place, message) in zip(problems, expected, strict=True):
        assert problem["where"].endswith(f"{name}{place}")
        assert re.search(message, problem["message"]), problem["message"]
        assert str(folder / name) in problem["message"], "a sentence by itself says where"
        assert "\n" not in problem["message"]


@pytest.mark.parametrize("name", BROKEN)
def test_everything_that_is_wrong_with_a_file_is_said(tmp_path, name):
    report = look(tmp_path, write_good(tmp_path), broken_source(tmp_path, name))
    assert_said(report.document()["problems"], tmp_path, name)
    assert report.rows["good.jsonl"] == len(GOOD), "what is good is counted all the same"
    assert report.tables["pairs_train"]["rows"] > 0


@pytest.mark.parametrize("name", BROKEN)
def test_prepare_stops_at_the_first_of_it_with_the_same_sentence(tmp_path, name):
    source = broken_source(tmp_path, name)
    first = look(tmp_path, source, write_good(tmp_path)).problems[0].message
    data = parse_params({"data": {"sources": [source, write_good(tmp_path)]}}).data
    with pytest.raises(UserError, match=re.escape(first)):
        run(seed=0, data=data, model=Model(), out=tmp_path / "out", progress=lambda **step: None)


def test_the_command_says_it_all_at_once_and_exits_with_2(tmp_path):
    """All broken files together, in the terminal and as JSON; good data exits with 0."""
    (tmp_path / "raw").mkdir()
    sources = [write_good(tmp_path / "raw"), *(broken_source(tmp_path / "raw", name) for name in BROKEN)]

    def command(sources, *arguments):
        (tmp_path / "params.yaml").write_text(json.dumps({"data": {"sources": sources, "template": "none"}}))
        line = [sys.executable, "-m", "flows.cli", "data", "check", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = command(sources, "--json")
    assert done.returncode == 2, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is False
    for name in BROKEN:
        said = [problem for problem in document["problems"] if name in problem["where"]]
        assert_said(said, tmp_path / "raw", name)
    shown = command(sources)
    assert shown.returncode == 2
    for problem in document["problems"]:
        assert problem["message"] in shown.stdout
    fine = command(sources[:1])
    assert (fine.returncode, fine.stderr) == (0, "")
    assert "good.jsonl: 96 good rows" in fine.stdout
    assert not [path for path in (tmp_path / ".rlhf").iterdir() if path.name.startswith("check-")]


def test_what_a_file_holds_gives_the_terminal_no_orders(tmp_path):
    """Neither by names of fields, nor by values, nor by its own name; all of it is printed in any case."""
    path = tmp_path / "\x1b[31mred [bold].jsonl"
    answers = rb'"chosen": "a", "rejected": {"\udfff": 1}'
    path.write_bytes(rb'{"\u009b2J \ud800 [red]": 1}' + b"\n" + rb'{"prompt": "\u001b]0;title\u0007", %s}' % answers)
    sources = [write_good(tmp_path), {"kind": "preference", "path": str(path)}]
    (tmp_path / "params.yaml").write_text(json.dumps({"data": {"sources": sources, "template": "none"}}))
    for arguments in ([], ["--json"]):
        line = [sys.executable, "-m", "flows.cli", "data", "check", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (2, b"")
        shown = done.stdout.decode()
        assert "[bold].jsonl" in shown
        assert all(character.isprintable() or character == "\n" for character in shown)


# What prepare puts up with --------------------------------------------------------------------------------------------


def remarks(report):
    return {remark.name: remark for remark in report.remarks}


def test_duplicates_and_contradictions_name_both_rows(tmp_path):
    turned = {"prompt": GOOD[5]["prompt"], "chosen": GOOD[5]["rejected"], "rejected": GOOD[5]["chosen"]}
    report = look(tmp_path, write_good(tmp_path, rows=[*GOOD, GOOD[3], turned]))
    path, found = tmp_path / "good.jsonl", remarks(report)
    assert not report.problems
    assert found["duplicates"].places == [f"{path}:97 and {path}:4"]
    assert sorted(found["contradictions"].places) == [f"{path}:6 and {path}:98", f"{path}:98 and {path}:6"]
    assert found["contradictions"].files == {str(path): 2}


def test_pairs_that_raters_left_undecided_are_said(tmp_path):
    compared = Compared(GOOD[0]["prompt"], (" one", " other"), None, None)
    said = [("first", "ada"), ("second", "bob"), ("skip", "eve")]
    (tmp_path / "labels.jsonl").write_bytes(lines(*(line(compared, choice, rater) for choice, rater in said)))
    labels = {"kind": "labels", "path": str(tmp_path / "labels.jsonl")}
    report = look(tmp_path, write_good(tmp_path), labels)
    assert remarks(report)["undecided"].places == [f"{tmp_path / 'labels.jsonl'}:1"]
    assert report.rows["labels.jsonl"] == 3
    assert not report.problems


def test_the_numbers_are_those_of_prepare(tmp_path):
    source = write_good(tmp_path, rows=[*GOOD, *GOOD[:9]])
    report = look(tmp_path, source)
    data = parse_params({"data": {"sources": [source], "template": "none"}}).data
    counts = run(seed=0, data=data, model=Model(), out=tmp_path / "out", progress=lambda **step: None)
    details = json.loads((tmp_path / "out/metrics.json").read_text())["details"]
    assert {name: table["rows"] for name, table in report.tables.items()} == counts
    assert {name: table["tokens"] for name, table in report.tables.items()} == details["tokens"]
    assert report.tables["pairs_train"]["balance"] == details["balance"]["pairs_train"]
    assert report.rows == details["rows"]
    assert remarks(report)["duplicates"].rows == details["dropped"]["pairs"]["duplicates"] == 9


def test_what_is_cut_is_said_with_its_place(tmp_path):
    rows = [*GOOD, P | {"prompt": "so " * 300 + "what", "chosen": " " + "yes " * 200}]
    report = look(tmp_path, write_good(tmp_path, rows=rows), max_prompt_tokens=40, max_response_tokens=60)
    found, place = remarks(report), f"{tmp_path / 'good.jsonl'}:97"
    assert [said.split(": ")[0] for said in found["cut prompts"].places] == [place]
    assert [said.split(": ")[0] for said in found["cut answers"].places] == [place]
    assert "`data.max_response_tokens` (60; the longest has " in found["cut answers"].message
    assert not report.problems


def test_prompts_longer_than_the_model(tmp_path, write_model):
    write_model(tmp_path / "base")
    settings = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 64}))
    source, model = write_good(tmp_path, rows=[*GOOD, P | {"prompt": "why " * 100}]), {"base": str(tmp_path / "base")}
    report = look(tmp_path, source, model=model, max_prompt_tokens=32, max_response_tokens=32)
    assert remarks(report)["beyond the model"].files == {source["path"]: 1}
    assert not report.problems
    report = look(tmp_path, source, model=model, max_prompt_tokens=33, max_response_tokens=32)
    (problem,) = report.problems
    assert "33 and data.max_response_tokens: 32 make 65 tokens" in problem.message
    assert report.rows, "the rest is looked at all the same"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"base": "no/such/folder"}, {}, "`model.base: no/such/folder`: no such folder or file"),
        ({}, {"template": "chat"}, "`data.template: chat`: the tokenizer has no chat template"),
    ],
)
def test_a_model_that_does_not_load_is_one_problem_and_the_rows_are_looked_at(tmp_path, model, data, message):
    bad = broken_source(tmp_path, "06-identical.jsonl")
    report = look(tmp_path, write_good(tmp_path, rows=[*GOOD, GOOD[0]]), bad, model=model, **data)
    first, *others = report.document()["problems"]
    assert first["where"] == "params.yaml"
    assert message in first["message"]
    assert_said(others, tmp_path, "06-identical.jsonl")
    assert report.rows["good.jsonl"] == len(GOOD) + 1
    assert remarks(report)["duplicates"].rows == 1
    assert sum(table["rows"] for name, table in report.tables.items() if "pairs" in name) == len(GOOD) + 1
    assert not any("tokens" in table for table in report.tables.values()), "whose tokens?"


def test_causes_come_before_what_follows_from_them(tmp_path):
    """That no row has a field is known at the end, and said first; that nothing is left, last."""
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "p"}, {"prompt": "q"}))
    source = {"kind": "preference", "path": str(tmp_path), "fields": {"chosen": "good", "rejected": "bad"}}
    places = [problem.where.removeprefix(str(tmp_path)) for problem in look(tmp_path, source).problems]
    assert places == ["", "", *["/a.jsonl:1"] * 2, *["/a.jsonl:2"] * 2, *["data.sources"] * 6]


def test_what_is_read_as_something_else_is_remarked(tmp_path):
    whole = [row | {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in GOOD]
    report = look(tmp_path, write_good(tmp_path, rows=[*whole[:9], whole[9] | {"margin": "nan"}]))
    found = remarks(report)
    assert found["repeated prompts"].rows == 10
    assert found["no margin"].places == [f"{tmp_path / 'good.jsonl'}:10"]
    assert "near leaks" not in found
    report = look(
        tmp_path,
        write_good(tmp_path, rows=[*GOOD, {**P, "prompt": "w" * 16, "chosen": "w" * 17, "rejected": "w" * 18}]),
    )
    assert remarks(report)["kept prompts"].places == [f"{tmp_path / 'good.jsonl'}:97"]


def test_answers_that_differ_in_white_space_alone_are_remarked(tmp_path):
    report = look(
        tmp_path, write_good(tmp_path, rows=[*GOOD, {"prompt": "p", "chosen": "so it is", "rejected": "so it  is"}])
    )
    assert remarks(report)["white space"].places == [f"{tmp_path / 'good.jsonl'}:97"]
    assert "contradictions" not in remarks(report)


@pytest.mark.parametrize(("way", "longer"), [("longer", "chosen"), ("shorter", "rejected")])
def test_a_length_bias_is_said(tmp_path, way, longer):
    rows = [row | {longer: row[longer] + " and so on and on"} for row in GOOD]
    assert (
        f"(100%) choose the {way} answer"
        in remarks(look(tmp_path, write_good(tmp_path, rows=rows)))["length bias"].message
    )


def test_exact_and_near_leaks(tmp_path):
    """A text of both sides: by its whole as a rating, by its prompt as an example; prompts that differ in a word."""
    long = "Explain to a curious reader, in plain words and without haste, how the northern tides follow the moon"
    near = [{"prompt": f"{long} number {i}", "chosen": f" yes {i}", "rejected": f" no {i} {i}"} for i in range(30)]
    texts = [f"number {i} is a fine film" for i in range(40)]
    (tmp_path / "ratings.jsonl").write_bytes(
        lines(*({"text": text, "rating": i % 9 - 4} for i, text in enumerate(texts)))
    )
    examples = [{"prompt": t.removesuffix(" is a fine film"), "completion": " is a fine film"} for t in texts]
    (tmp_path / "sft.jsonl").write_bytes(lines(*examples))
    sources = [
        {"kind": "ratings", "path": str(tmp_path / "ratings.jsonl")},
        {"kind": "sft", "path": str(tmp_path / "sft.jsonl")},
    ]
    report = look(tmp_path, write_good(tmp_path, rows=[*GOOD, *near]), *sources, heldout=0.5)
    found = remarks(report)
    assert found["leaks"].rows > 5
    assert all("ratings.jsonl" in place and "sft.jsonl" in place for place in found["leaks"].places)
    assert found["near leaks"].files[str(tmp_path / "good.jsonl")] > 5
    assert re.search(r"good\.jsonl:\d+ is near .*good\.jsonl:\d+ \(\d\d%\)", "\n".join(found["near leaks"].places))
    assert "near leaks" not in remarks(look(tmp_path, write_good(tmp_path)))


@pytest.mark.parametrize("kind", ["preference", "sft", "ratings"])
def test_near_leaks_are_seen_in_what_is_trained_on(tmp_path, kind):
    """Prompts that have nothing in common, with answers that have almost all."""
    long = "the northern tides follow the moon, without haste and in plain sight of any reader who is curious, for"
    names = {"preference": ("chosen", "rejected"), "sft": ("completion",), "ratings": ("text",)}[kind]
    rows = [
        {"prompt": f"{row['prompt']}?", names[0]: f" {long} {n} days"} | dict.fromkeys(names[1:], f" {n}")
        for n, row in enumerate(GOOD)
    ]
    (tmp_path / "near.jsonl").write_bytes(lines(*(row | {"rating": n % 9 - 4} for n, row in enumerate(rows))))
    report = look(tmp_path, write_good(tmp_path), {"kind": kind, "path": str(tmp_path / "near.jsonl")}, heldout=0.5)
    found = remarks(report)["near leaks"]
    assert len(GOOD) * 0.3 < found.files[str(tmp_path / "near.jsonl")] < len(GOOD) * 0.6
    assert len(set(found.places)) == found.rows, "a row is told of once"


def near_copies(path, train, heldout):
    texts = NearTexts(path)
    for side, group in ((False, train), (True, heldout)):
        for number, text in enumerate(group):
            texts.add(f"{side}:{number}", text, side)
    copies = texts.copies(np.ones(len(train) + len(heldout), np.bool_))
    texts.close()
    return copies


WORDS = st.lists(
    st.sampled_from(["sun", "rain", "tide", "moon", "你好", "世界", "שלום", "ab", "c", "🎬"]), max_size=30
).map(" ".join)


@given(train=st.lists(WORDS, max_size=8), heldout=st.lists(WORDS, max_size=8))
def test_every_near_copy_that_is_said_is_one(tmp_path_factory, train, heldout):
    for copy in near_copies(tmp_path_factory.mktemp("near") / "near", train, heldout):
        one, other = heldout[int(copy.heldout[5:])], train[int(copy.train[6:])]
        assert similarity(one.lower(), other.lower()) == copy.similarity >= SIMILAR


@given(texts=st.lists(WORDS, min_size=1, max_size=8))
def test_copies_but_for_case_and_white_space_are_always_found(tmp_path_factory, texts):
    found = near_copies(tmp_path_factory.mktemp("near") / "near", texts, [f" {text.upper()}\n" for text in texts])
    assert {copy.heldout for copy in found} == {f"True:{i}" for i in range(len(texts))}


def test_most_near_copies_are_found_and_a_text_does_not_touch_its_neighbours(tmp_path):
    import random

    draw = random.Random(0)
    train = [
        " ".join(
            draw.choices(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"], k=40)
        )
        for _ in range(300)
    ]
    changed = [text.replace(text.split()[7], "omega", 1) for text in train]
    assert len(near_copies(tmp_path / "near", train, changed)) > 290
    alone = signed([changed[3]])
    assert (signed(changed)[3] == alone).all()
