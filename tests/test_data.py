"""data.py: from every format and file that users have to the exact texts that a model is to see. Tokens are bytes."""

import functools
import gzip
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow.parquet
import pytest
from conftest import CHATML, ROOT, byte_tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

import data

SHARED = ROOT.parent / "shared" / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SPLITS = ["train", "validation", "test"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer(**SPECIAL).save_pretrained(folder / "plain")
    byte_tokenizer(add_bos=True, **SPECIAL).save_pretrained(folder / "bos")
    byte_tokenizer(eos_token="</s>").save_pretrained(folder / "no_bos")
    byte_tokenizer(bos_token="<s>").save_pretrained(folder / "no_eos")
    byte_tokenizer(chat_template=CHATML, **SPECIAL).save_pretrained(folder / "chat")
    return folder


def user(text, role="user"):
    return {"role": role, "content": text}


assistant = functools.partial(user, role="assistant")


def write(path, rows):
    """Writes rows in the format that the name of the file says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class Run:
    """data.py's main on a path or a list of rows: .rows {split: rows}, .all of them, .about (data.json), .out."""

    def __init__(self, capsys, models, tmp_path):
        self.capsys, self.models, self.tmp_path = capsys, models, tmp_path

    def template(self, template, **special):
        byte_tokenizer(chat_template=template, **SPECIAL, **special).save_pretrained(self.tmp_path / "model")
        return self.tmp_path / "model"

    def args(self, dataset, model="plain", out="out", **flags):
        dataset = write(self.tmp_path / "rows.jsonl", dataset) if isinstance(dataset, list) else dataset
        return data.Args(str(dataset), str(self.models / model), str(self.tmp_path / out), **flags)

    def __call__(self, *args, **flags):
        args = self.args(*args, **flags)
        self.capsys.readouterr()
        data.main(args)
        rows = {split: read_jsonl(Path(args.output_dir, f"{split}.jsonl")) for split in SPLITS}
        about, out = json.loads(Path(args.output_dir, "data.json").read_text()), self.capsys.readouterr().out
        assert all(line.isprintable() for line in out.split("\n")), "nothing may drive the terminal"
        for split, count in about["rows"].items():
            assert count["in"] == count["written"] + sum(count["dropped"].values())
            assert f"{split}: {count['in']} rows in = {count['written']} written + " in out
        return SimpleNamespace(rows=rows, about=about, out=out, all=sum(rows.values(), []))

    def files(self):
        stats = ((path, os.lstat(path)) for path in self.tmp_path.rglob("*"))
        return {path: (stat.st_ino, stat.st_mode, stat.st_mtime_ns) for path, stat in stats}

    def fails(self, *args, **flags):
        """The one line of an expected failure, which changes no file."""
        args, before = self.args(*args, **flags), self.files()
        with pytest.raises(SystemExit) as exit:
            data.main(args)
        error = exit.value.code
        assert error.startswith("error: ") and "; " in error and "\n" not in error, error
        assert self.files() == before
        return error


@pytest.fixture
def run(capsys, models, tmp_path):
    return Run(capsys, models, tmp_path)


def numbered(rows):
    return sorted(rows, key=lambda row: int("".join(c for c in json.dumps(row) if c.isdigit()) or 0))


def fill(value, i):
    return json.loads(json.dumps(value).replace("{i}", str(i)))


HH = "\n\nHuman: why?\n\nAssistant: because.\n\nHuman: oh {i}\n\nAssistant:"
TURNS = [{"role": "system", "content": "Be é."}, user("q {i}"), assistant("what?"), user("that")]
TURNS_TEXT = (
    "<|im_start|>system\nBe é.<|im_end|>\n<|im_start|>user\nq {i}<|im_end|>\n"
    "<|im_start|>assistant\nwhat?<|im_end|>\n<|im_start|>user\nthat<|im_end|>\n<|im_start|>assistant\n"
)
ASK, ASK_TEXT = [user("q {i}")], "<|im_start|>user\nq {i}<|im_end|>\n<|im_start|>assistant\n"
GOOD, WORSE, A = [assistant("good")], [assistant("bad")], [assistant(" A\n")]


@pytest.mark.parametrize(
    "row, values",  # of the data set, and of what is written
    [
        ({"rejected": "b", "score": 1, "chosen": " g", "prompt": "p {i}"}, ["p {i}", " g", "b"]),
        ({"chosen": HH + " Well…", "rejected": HH + " No"}, [HH, " Well…", " No"]),
        ({"prompt": "p {i}\x00\u2028", "completion": " c\n"}, ["p {i}\x00\u2028", " c\n"]),
        ({"prompt": "p {i}"}, ["p {i}"]),
        ({"text": "once {i}"}, ["<s>", "once {i}"]),
        ({"prompt": TURNS, "chosen": GOOD, "rejected": WORSE}, [TURNS_TEXT, "good", "bad"]),
        ({"chosen": TURNS + GOOD, "rejected": TURNS + WORSE}, [TURNS_TEXT, "good", "bad"]),
        ({"prompt": "q {i}", "chosen": ASK + GOOD, "rejected": ASK + WORSE}, [ASK_TEXT, "good", "bad"]),
        ({"prompt": "q {i}", "chosen": GOOD, "rejected": WORSE}, [ASK_TEXT, "good", "bad"]),
        ({"prompt": TURNS[:2], "completion": TURNS[2:] + A}, [TURNS_TEXT, " A\n"]),
        ({"prompt": TURNS}, [TURNS_TEXT]),
        ({"messages": TURNS + A}, [TURNS_TEXT, " A\n"]),
    ],
)
def test_formats(row, values, run, tmp_path):
    """Texts stay as they are, even if the model has a chat template. What is written is no data set for a second run."""
    rows, columns = [fill(row, i) for i in range(6)], data.WRITTEN[len(values) - 1]
    done = run(rows, "chat")
    expected = [list(zip(columns, fill(values, i))) for i in range(6)]
    assert [list(row.items()) for row in numbered(done.all)] == expected
    assert [len(done.rows[split]) for split in SPLITS] == [4, 1, 1]
    chat = "<|im_start|>" in values[0]
    assert done.about["eos_token"] == ("<|im_end|>" if chat else "</s>")
    assert not chat or "chat_template is not set" in run.fails(rows, "plain", "other")
    for again in (tmp_path / "out", tmp_path / "out/train.jsonl"):
        assert "is in the plain format already; give it to sft.py" in run.fails(again, "chat", "again")


def test_bos_of_texts(run):
    """As the tokenizer puts it by habit, and no second one. An empty prompt becomes BOS, or else EOS."""
    rows = [{"prompt": prompt, "completion": f"c {i}"} for i, prompt in enumerate(["p 0", "", "<s>p 2"])]
    for model, start, empty in ("plain", "", "<s>"), ("no_bos", "", "</s>"), ("bos", "<s>", "<s>"):
        seen = {row["completion"]: row["prompt"] for row in run(rows, model, model).all}
        assert seen == {"c 0": start + "p 0", "c 1": empty, "c 2": "<s>p 2"}
    assert "has no EOS; give another" in run.fails(ROWS, "no_eos", "none")


def chats(answers):
    return [{"prompt": [user(f"q {i}")], "completion": [assistant(a)]} for i, a in enumerate(answers)]


def closing(behind, content="{{ m['content'] }}", header="<|im_start|>{{ m['role'] }} ", more=""):
    """A template that puts something behind every message."""
    loop = "{% for m in messages %}" + header + content + behind + "{% endfor %}"
    start = header.replace("{{ m['role'] }}", "assistant")
    return loop + "{% if add_generation_prompt %}" + start + more + "{% endif %}"


LLAMA_2 = (  # the real one, shortened: a space before and behind the answer
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CUT = "{{ m['content'].split('</think>')[-1] }}"
LONG = "an answer that is longer than thirty characters {i}"


@pytest.mark.parametrize(
    "template, answer, eos",
    [
        (CHATML, LONG, "<|im_end|>"),
        (LLAMA_2, LONG, "</s>"),
        (LLAMA_2, "s", "</s>"),
        (closing("\n###\n", header="{{ m['role'] }}: "), LONG, "</s>"),
        (closing("<|im_end|>", "{{ m['content'] | trim }}"), " " + LONG + "\n", "<|im_end|>"),
    ],
)
def test_end_of_turn(template, answer, eos, run):
    """The special token that closes an answer is recorded as EOS, and stands in no response. BOS is the template's."""
    answers = [fill(answer, i) for i in range(4)]
    done = run(chats(answers), run.template(template, add_bos=True))
    assert done.about["eos_token"] == eos
    assert sorted(row["completion"] for row in done.all) == answers
    assert {row["prompt"].count("<s>") for row in done.all} == {template.count("bos_token")}


REWRITES = [
    closing("<|return|>", "<|mid|>{{ m['content'] }}"),  # special tokens before the answer
    closing("<|im_end|>", CUT, more="<think>\n"),  # opens what a finished answer no longer has
    closing("<|im_end|>", "{% for part in m['content'] %}{{ part.text }}{% endfor %}"),
    closing("<|im_end|>", "{{ m['content'] | capitalize }}"),
    CHATML.split("{% if add_generation_prompt")[0],
]


@pytest.mark.parametrize("template", REWRITES)
def test_a_template_that_does_not_continue_its_prompt_with_the_answer(template, run):
    """All rows are dropped, whatever the answers look like, and also where there are prompts only."""
    for rows in (chats(["s"] * 4), chats([LONG] * 4), [{"prompt": [user(f"q {i}")]} for i in range(4)]):
        error = run.fails(rows, run.template(template))
        assert "no row of train is left" in error and "does not continue its own prompt" in error


def test_templates_that_think(run):
    """An answer whose thought the template cuts is dropped. Qwen3's puts an empty thought before each: the prompt does."""
    done = run(chats(["<think>hm</think>a", *"bcd"]), run.template(closing("<|im_end|>", CUT)))
    assert {row["completion"] for row in done.all} == {*"bcd"} and done.about["eos_token"] == "<|im_end|>"
    more = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    template = closing("<|im_end|>", "<think></think>{{ m['content'] }}", more=more)
    done = run(chats("abcd"), run.template(template), "qwen")
    assert all(row["prompt"].endswith("<|im_start|>assistant <think></think>") for row in done.all)


def test_eos_in_responses(run):
    """At the end one is taken off, as scripts add it; inside, the row is dropped; another's EOS is text."""
    for eos, other in (("</s>", "<|im_end|>"), ("<|im_end|>", "</s>")):
        answers = ["a 0" + eos, "a" + eos + "b", eos, "a 3" + other, "a" + eos + eos, "a 5", "a 6"]
        texts = [{"prompt": f"q {i}", "completion": answer} for i, answer in enumerate(answers)]
        done = run(texts if eos == "</s>" else chats(answers), "chat", eos[-4:-1])
        assert {row["completion"] for row in done.all} == {"a 0", "a 3" + other, "a 5", "a 6"}
        assert done.about["rows"]["train"]["dropped"] == {"EOS inside a response, or nothing but EOS": 3}


def test_a_template_that_refuses_rows(run):
    """Single rows are dropped and counted with the template's words; all of them: one line, no traceback."""
    refusal = "{{ raise_exception('I \x1b[2J want a\nsystem') }}"
    model = run.template("{% if messages[0]['content'] == 'q 0' %}" + refusal + "{% endif %}" + CHATML)
    done = run(chats("AAAAAA"), model)
    ((reason, count),) = done.about["rows"]["train"]["dropped"].items()
    assert len(done.all) == 5 and count == 1 and "system" in reason and "\x1b" not in done.out
    assert "system" in run.fails(chats("A"), model, "none")
    assert "chat template" in run.fails(chats("A"), run.template("{% for m in messages %}"), "none")


ROWS = [{"prompt": f"p {i} \u2028 é", "completion": f" c {i}"} for i in range(41)]
PARTS = {"train": ROWS[:30], "validation": ROWS[28:37], "test": ROWS[37:]}
CONTAINERS = (
    "jsonl",
    "Dataset on disk",
    "DatasetDict on disk",
    "shards",
    "folder of jsonl.gz",
    "folder of parquet",
)


def folder_of(form, folder, parts):
    for split, rows in parts.items():
        write(folder / f"{split}.{form}", rows)
    return folder


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(kind, run, tmp_path):
    """The same rows in the same order, from a path with brackets; given splits stay what they are, else rows of train
    are held out. load_dataset reads back what is written, also where the folder's name looks like a split."""
    path = tmp_path / "rows [v2] *?"
    if kind.startswith("folder of "):
        folder_of(kind.removeprefix("folder of "), path, PARTS)
    elif kind == "Dataset on disk":
        datasets.Dataset.from_list(ROWS, split="test").save_to_disk(path)  # keeps its name
        assert "'test'" in run.fails(path)
    elif kind == "DatasetDict on disk":
        parts = {split: datasets.Dataset.from_list(rows) for split, rows in reversed(PARTS.items())}
        datasets.DatasetDict(parts).save_to_disk(path)
    elif kind == "shards":
        for i, rows in enumerate((ROWS[:20], ROWS[20:])):  # with a byte order mark and Windows line ends
            file = write(path / f"data/train-0000{i}-of-00002.jsonl", rows)
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    else:
        path = write(path / f"rows.{kind}", ROWS)
    done = run(path, out="train_test", train_split="test" if kind == "Dataset on disk" else "")
    if kind.startswith(("folder", "DatasetDict")):
        read = datasets.load_dataset(str(tmp_path / "train_test"))
        assert done.rows == PARTS == {split: list(rows) for split, rows in read.items()}
    else:
        assert [len(done.rows[split]) for split in SPLITS] == [37, 2, 2]
        assert numbered(done.all) == ROWS and done.rows["train"] == numbered(done.rows["train"])
    assert {path.name for path in (tmp_path / "train_test").iterdir()} == set(data.FILES)


CLEAR = {"eval train": "train eval", "test_prefs train_prefs": "train_prefs - test_prefs"}
CLEAR |= {"dev TEST Train": "Train dev TEST", "a b; b a": "b - a"}  # names; flags: train, validation, test
UNCLEAR = "train_sft train_prefs test_sft", "train heldout", "train_eval test", "test", "a b; c"


@pytest.mark.parametrize("case", [*CLEAR, *UNCLEAR])
def test_splits_go_by_name(case):
    """In whatever order they come; what is unclear is an error that lists them and names the flags."""
    names, _, flags = case.partition("; ")
    args = SimpleNamespace(**dict(zip(["train_split", "test_split"], [*flags.split(" "), ""])))
    for order in (names.split(), names.split()[::-1]):
        if case in CLEAR:
            chosen = {split: name for split, name in zip(SPLITS, CLEAR[case].split()) if name != "-"}
            assert data.choose_splits(order, args) == chosen
        else:
            with pytest.raises(SystemExit, match="--train_split and --test_split") as exit:
                data.choose_splits(order, args)
            assert str(order) in exit.value.code


SIZES = [(3, 1, 1), (39, 1, 1), (40, 1, 2), (11000, 1, 500), (198, 3, 9), (11001, 3, 498), (100, 100, 5)]


@pytest.mark.parametrize("n, of_prompt, size", SIZES)
def test_held_out_rule(n, of_prompt, size):
    """5% of the rows, at most 500, for each of two; all rows of a prompt, unless there is but one, as texts have."""
    rows = {"train": [{"prompt": str(i // of_prompt), "completion": i} for i in range(n)]}
    data.hold_out(rows, ["validation", "test"])
    assert [len(rows[split]) for split in SPLITS] == [n - 2 * size, size, size]
    numbers = [[row["completion"] for row in rows[split]] for split in SPLITS]
    assert sorted(sum(numbers, [])) == list(range(n)) and numbers[0] == sorted(numbers[0])
    prompts = [{row["prompt"] for row in rows[split]} for split in SPLITS]
    assert of_prompt == n or len(set.union(*prompts)) == sum(map(len, prompts)), "a prompt on two sides"
    assert n <= 100 or numbers[1] not in (list(range(n - size, n)), list(range(size))), "from all over"


def test_few_or_frequent_prompts(run):
    """A frequent prompt stays in train. Of two prompts none must be torn apart between train and test."""
    rows = {"train": [{"prompt": "often"}] * 60 + [{"prompt": str(i)} for i in range(40)]}
    data.hold_out(rows, ["validation", "test"])
    assert len(rows["train"]) == 90 and rows["train"].count({"prompt": "often"}) == 60
    assert "too few prompts" in run.fails([{"prompt": f"p {i % 2}", "completion": str(i)} for i in range(50)])


def dropped(rows, model):
    """{reason: rows} of data.convert, which must account for every row; the others are written."""
    tokenizer, names = AutoTokenizer.from_pretrained(model), set().union(*rows)
    columns = next(form.split("+") for form in data.FORMATS if names.issuperset(form.split("+")))
    chat = any(isinstance(row.get(column), list) for row in rows for column in columns)
    written, reasons, _ = data.convert(rows, columns, chat, None if chat else tokenizer.eos_token, tokenizer)
    assert len(written) + sum(reasons.values()) == len(rows)
    return reasons


PAIR, CHAT = {"prompt": "p", "chosen": "A", "rejected": "B"}, {"messages": [user("q"), assistant("A")]}
DIALOGUE = {"chosen": HH + "A", "rejected": HH + "B"}


def test_texts_that_cannot_be_used(models):
    """Also KTO's bad examples, pairs that their ratings turn round, what a model should see and would not."""
    stored = CHAT["messages"]
    surrogate = "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed"
    wrong = {
        "chosen has the type NoneType": [{"chosen": None}],
        "rejected has the type int": [{"rejected": 3}],
        "empty response": [{"chosen": ""}, {"rejected": " \n\t"}, {"rejected": "\u3000"}],
        "chosen and rejected are the same": [{"chosen": "B"}, {"chosen": "B</s>"}],
        surrogate: [{"prompt": "\ud800"}],
        "label is false": [{"label": False}],
        "score_chosen is below that of rejected": [{"score_chosen": 1.5, "score_rejected": 2}],
        "system cannot be written": [{"system": "Be brief."}],
        "chosen is a conversation that is stored as text": [{"chosen": json.dumps(stored)}],
        "rejected is a conversation that is stored as text": [{"rejected": str(stored)}],
    }
    fine = dict(label=True, tools=None, system="", chosen_rating=3, rejected_rating=3, images=[])
    rows = [PAIR | change for changes in wrong.values() for change in changes] + [PAIR, PAIR | fine]
    assert dropped(rows, models / "plain") == {reason: len(changes) for reason, changes in wrong.items()}
    rows = [CHAT, CHAT | fine, CHAT | {"tools": [{"name": "f"}]}, CHAT | {"messages": json.dumps(stored)}]
    rows += [{"messages": [user("q"), assistant("A") | {"thinking": "hm"}]}]
    reasons = "tools cannot be written", "thinking cannot be written", "messages has the type str"
    assert dropped(rows, models / "chat") == dict.fromkeys(reasons, 1)
    differ = [{"rejected": HH[1:] + "B"}, {"rejected": HH + "B" + HH + "A"}, {"rejected": "B"}]
    changes = [{}, *differ, {"chosen": "A", "rejected": "B"}, {"chosen": HH}, {"rejected": HH + " "}]
    expected = {"prompts differ": 3, "no '\\n\\nAssistant:' and no prompt": 1, "empty response": 2}
    assert dropped([DIALOGUE | change for change in changes], models / "plain") == expected


def test_conversations_that_cannot_be_used(models, run):
    """Each is dropped with a reason; none raises anything else, none is taken for something it is not."""
    ask, A, B = [user("q")], [assistant("A")], [assistant("B")]
    good = {"chosen": ask + A, "rejected": ask + B}
    bad = [
        {"chosen": x}
        for x in (None, [], "text", ["text"], [user("other"), *A], ask, ask + [{"content": "A"}])
    ]
    bad += [{"chosen": ask + [assistant(content)]} for content in (None, [{"type": "text", "text": "A"}])]
    bad += [{"rejected": x} for x in (ask + A, ask + [assistant(" ")], ask + A + ask)] + [DIALOGUE]
    for change in bad:
        assert sum(dropped([good, good | change], models / "chat").values()) == 1, change
    # A whole conversation must contain the prompt beside it, which must end in something to answer.
    prompts = ["q", "other", [user("s", "system"), *ask]]
    assert sum(dropped([{"prompt": prompt, **good} for prompt in prompts], models / "chat").values()) == 2
    assert sum(dropped([{"prompt": ask}, {"prompt": ask + A}], models / "chat").values()) == 1
    strays = [{"prompt": stray, "completion": stray} for stray in (None, "c", 3)]
    done = run([*strays, *chats("AAAA")], "chat")  # conversations, whatever the first row is
    assert len(done.all) == 4 and done.about["eos_token"] == "<|im_end|>"
    assert done.about["rows"]["train"]["dropped"]["text among conversations, or the reverse"] == 1


def test_lengths_and_next_command(run, models, tmp_path):
    """Counts of tokens, EOS included; the lengths of the next command hold 95% of the rows."""
    rows = [{"prompt": i * "p" + str(i % 10), "chosen": i * "c", "rejected": "d"} for i in range(1, 101)]
    parts = {"train": rows, "validation": rows[:1], "test": rows[:1]}
    shutil.copytree(models / "bos", tmp_path / "a model")
    done = run(folder_of("jsonl", tmp_path / "data", parts), tmp_path / "a model", "my out")
    assert "98 tokens hold 95% of 100 texts, 102 hold all" in done.out
    assert "92 tokens hold 95% of 200 texts, 101 hold all" in done.out
    command = ["python", "sft.py", "--model", f"{tmp_path}/a model", "--dataset", f"{tmp_path}/my out"]
    command += ["--prompt_length", "98", "--response_length", "92"]
    assert shlex.split(done.out.split("next: ")[1]) == command, "a shell understands it"


BAD = {  # its bytes, or {split: rows} of a folder; what the error says
    "nobody/nothing": (None, "cannot read"),
    "empty.jsonl": (b"", "columns"),
    "folder": ({}, "holds no .json, .jsonl, .jsonl.gz or .parquet file"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', '{"prompt": \\n'),
    "latin.jsonl": (b'{"prompt": "\xe9"}\n', "utf-8"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "p"}\n')[:-9], "cannot read"),
    "columns.jsonl": (b'{"question": "q", "a\\u001b": 1}', " or ".join(data.FORMATS)),
    "no_test": ({"train": ROWS, "test": [ROWS[0] | {"completion": ""}]}, "no row of test is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_sets(name, run, tmp_path):
    made, word = BAD[name]
    if isinstance(made, bytes):
        (tmp_path / name).write_bytes(made)
    elif made is not None:
        (tmp_path / name).mkdir()
        folder_of("jsonl", tmp_path / name, made)
    assert word in run.fails(name if made is None else tmp_path / name, out="made/out")


def words(path):
    return {row["prompt"].split()[0] for row in read_jsonl(path)}


OLD, NEW = ([{"prompt": f"{word} {i}"} for i in range(9)] for word in ("old", "new"))


def test_output_folder(run, tmp_path):
    """Never overwritten without --overwrite, and with it only what data.py wrote; then nothing old is left."""
    out = tmp_path / "out"
    out.mkdir()  # empty: free
    run(OLD)
    assert "give --overwrite" in run.fails(NEW)
    run.fails(tmp_path / "missing.jsonl", overwrite=True)
    run(NEW, overwrite=True)
    assert [words(out / f"{split}.jsonl") for split in SPLITS] == [{"new"}] * 3
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        assert "did not write" in run.fails(OLD, overwrite=overwrite)
    for text in ("", "[]", '{"prompt": "my rows"}', '[{"prompt": "p"}]'):  # somebody else's data.json
        write(tmp_path / "other/train.jsonl", OLD)
        (tmp_path / "other/data.json").write_text(text)
        assert "did not write" in run.fails(OLD, out="other", overwrite=True)
    os.mkfifo(tmp_path / "FIFO")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "device").symlink_to("/dev/null")  # by a link, so that no mistake can harm it
    for name, overwrite in itertools.product(("rows.jsonl", "FIFO", "link", "device"), (False, True)):
        assert "is no folder" in run.fails(ROWS, out=name, overwrite=overwrite)


@pytest.mark.parametrize("name", ["jsonl", "json", "jsonl.gz", "parquet", "folder/train.jsonl"])
def test_files_are_read_as_they_are_now(name, run, tmp_path):
    """Other rows of the same size and time, as cp -p and tar keep it, are other rows. Dates stay texts."""
    path = tmp_path / f"rows.{name}"
    dates = "2020-01-0{i}", "2020-01-01T10:00:0{i}Z", "12:30:0{i}"
    for date, word in itertools.product(dates, ("old", "new")):
        rows = [{"prompt": f"{word} {i}", "completion": fill(date, i)} for i in range(9)]
        os.utime(write(path, rows), (10**9, 10**9))
        done = run(path.parent if "/" in name else path, overwrite=True)
        assert sorted(done.all, key=lambda row: row["prompt"]) == rows


@pytest.mark.parametrize("moves", [1, 2, 4])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_files_are_moved(moves, overwrite, run, tmp_path):
    """Old or new files stand in their place; the next run mends the folder and leaves nothing else in it."""
    out = tmp_path / "out"
    if overwrite:
        run(OLD)

    def main(args, count=itertools.count(1), replace=os.replace):
        os.replace = lambda *paths: replace(*paths) if next(count) < moves else os.kill(os.getpid(), 9)
        data.main(args)

    args = [run.args(NEW, overwrite=overwrite)]
    process = multiprocessing.get_context("fork").Process(target=main, args=args, daemon=True)
    process.start()
    process.join(100)
    assert process.exitcode == -9
    for i, split in enumerate(SPLITS if overwrite else []):
        assert words(out / f"{split}.jsonl") == {"new" if i < moves - 1 else "old"}
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out"}, "nothing hidden"
    run(NEW, overwrite=overwrite)
    assert [words(out / f"{split}.jsonl") for split in SPLITS] == [{"new"}] * 3
    assert {path.name for path in out.iterdir()} == set(data.FILES)


def test_real_hh_rlhf_rows(run, tmp_path):
    """The raw file: 5 pairs whose prompts differ, 4 empty responses; all else is written."""
    if not (SHARED / "gpt2-tokenizer").exists():
        pytest.skip("GPT-2's tokenizer and the real rows are not here")
    path, expected = SHARED / "hh_harmless_base_test.raw.jsonl.gz", Counter()
    GPT2Tokenizer.from_pretrained(SHARED / "gpt2-tokenizer").save_pretrained(tmp_path / "gpt2")
    done = run(path, tmp_path / "gpt2", "data/hh")
    assert "2312 rows in = 2303 written + 9 dropped {'prompts differ': 5, 'empty response': 4}" in done.out
    last = "data/hh: 2073 train, 115 validation, 115 test rows; next: python sft.py --model gpt2 --dataset data/hh"
    assert last in done.out.replace(f"{tmp_path}/", "") and last in data.__doc__
    for row in map(json.loads, gzip.open(path, "rt", encoding="utf-8")):
        texts = [row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")]
        if texts[0][0] == texts[1][0] and all(answer.strip() for _, answer in texts):
            expected[texts[0][0] + "\n\nAssistant:", texts[0][1], texts[1][1]] += 1
    assert Counter(tuple(row.values()) for row in done.all) == expected


VALUES = [None, 3, {}, "", " \n", "p", "{{ q", "\x00</s>", "a<|im_end|>b", "\ud800", [], [None], [3], [{}]]
VALUES += ["\n\nAssistant: a", "\n\nAssistant: b", [[user("p")]], [user("p", role=[])], [{"content": "a"}]]
VALUES += [[user(None)], [user("p")], [assistant("a")], [user("é"), assistant("</s>"), user("p")]]
VALUES += [[user("p"), assistant("a")], [user("p"), assistant("b")]]


@pytest.mark.parametrize("columns", data.FORMATS)
def test_every_kind_of_value_in_every_column(columns, models):
    """Whatever is in a row: it is written as texts a model can be trained on, or counted with a reason."""
    columns = columns.split("+")
    rows = [dict(zip(columns, values)) for values in itertools.product(VALUES, repeat=len(columns))]
    before = repr(rows)
    for model, chat in (("bos", False), ("chat", True)):
        tokenizer = AutoTokenizer.from_pretrained(models / model)
        written, dropped, eos = data.convert(rows, columns, chat, None if chat else "</s>", tokenizer)
        assert len(written) + sum(dropped.values()) == len(rows) and repr(rows) == before
        assert (written or columns == ["messages"]) and len(dropped) > 2
        for row in written:
            assert list(row) in data.WRITTEN and row["prompt"]
            responses = list(row.values())[1:]
            assert all(isinstance(text, str) and text.strip() and eos not in text for text in responses)
            assert len(set(responses)) == len(responses)
