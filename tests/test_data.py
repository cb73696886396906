"""data.py: from every format and file that users have to the exact texts that a model is to see, and what becomes of the rest.

Tokens are bytes (tests/conftest.py). Most tests call data.py's own command line within this process.
"""

import datetime
import gzip
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CHATML, ROOT, byte_tokenizer, run_script
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer

import data

SHARED = ROOT.parent / "shared" / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SPLITS = ["train", "validation", "test"]


# ---------------------------------------------------------------------------------------------------- helpers
@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{name: folder of a tokenizer}: without habits; that puts BOS in front, and EOS behind; with ChatML."""
    both = byte_tokenizer(add_bos=True, **SPECIAL)
    ends = [(text, both.convert_tokens_to_ids(text)) for text in ("<s>", "</s>")]
    both.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert both("x")["input_ids"][-1] == both.eos_token_id, "puts EOS behind a text"
    tokenizers = {
        "plain": byte_tokenizer(**SPECIAL),
        "bos": byte_tokenizer(add_bos=True, **SPECIAL),
        "bos_eos": both,
        "no_bos": byte_tokenizer(eos_token="</s>"),
        "no_eos": byte_tokenizer(bos_token="<s>"),
        "chat": byte_tokenizer(chat_template=CHATML, **SPECIAL),
        "chat_bos": byte_tokenizer(chat_template=CHATML, add_bos=True, **SPECIAL),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    return folder


def with_template(folder, template, **special):
    byte_tokenizer(chat_template=template, **{**SPECIAL, **special}).save_pretrained(folder)
    return folder


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class Run:
    """data.py's main, run here: .rows {split: rows}, .about (data.json), .out."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, dataset, model, output_dir, **flags):
        self.capsys.readouterr()
        data.main(data.Args(str(dataset), str(model), str(output_dir), **flags))
        folder = Path(output_dir)
        rows = {split: read_jsonl(folder / f"{split}.jsonl") for split in SPLITS}
        about, out = json.loads((folder / "data.json").read_text()), self.capsys.readouterr().out
        for split, count in about["rows"].items():
            assert count["in"] == count["written"] + sum(count["dropped"].values())
            assert f"{split}: {count['in']} rows in = {count['written']} written + " in out
        assert sum(count["written"] for count in about["rows"].values()) == sum(map(len, rows.values()))
        return SimpleNamespace(rows=rows, about=about, out=out, all=sum(rows.values(), []))

    def fails(self, *args, **flags):
        """The one line of an expected failure."""
        with pytest.raises(SystemExit) as exit:
            self(*args, **flags)
        error = exit.value.code
        assert error.startswith("error: ") and "; " in error and "\n" not in error, error
        return error


@pytest.fixture
def run(capsys):
    return Run(capsys)


def numbered(rows):
    """Rows in the order of the number in their prompt or completion."""
    return sorted(rows, key=lambda row: int("".join(c for c in json.dumps(row) if c.isdigit()) or 0))


# ----------------------------------------------------------------------------------------------- every format
HH = "\n\nHuman: why?\n\nAssistant: because.\n\nHuman: oh {i}\n\nAssistant:"
TURNS = [{"role": "system", "content": "Be é."}, user("q {i}"), assistant("what?"), user("that")]
TURNS_TEXT = (
    "<|im_start|>system\nBe é.<|im_end|>\n<|im_start|>user\nq {i}<|im_end|>\n"
    "<|im_start|>assistant\nwhat?<|im_end|>\n<|im_start|>user\nthat<|im_end|>\n<|im_start|>assistant\n"
)
ASK, ASK_TEXT = [user("q {i}")], "<|im_start|>user\nq {i}<|im_end|>\n<|im_start|>assistant\n"
TEXTS = {  # name: (row of the data set, row written)
    "preferences": (
        {"prompt": "p {i}", "chosen": " good", "rejected": " bad"},
        {"prompt": "p {i}", "chosen": " good", "rejected": " bad"},
    ),
    "preferences, other columns, another order": (
        {"rejected": "bad", "score": 0.5, "chosen": "good", "text": "t", "prompt": "p {i}"},
        {"prompt": "p {i}", "chosen": "good", "rejected": "bad"},
    ),
    "implicit prompt of HH-RLHF": (
        {"chosen": HH + " Well…", "rejected": HH + " No"},
        {"prompt": HH, "chosen": " Well…", "rejected": " No"},
    ),
    "prompt and completion": (
        {"prompt": "p {i}\x00\u2028", "completion": " c\n"},
        {"prompt": "p {i}\x00\u2028", "completion": " c\n"},
    ),
    "prompt": ({"prompt": "p {i}"}, {"prompt": "p {i}"}),
    "text": ({"text": "once {i}"}, {"prompt": "<s>", "completion": "once {i}"}),
}
CONVERSATIONS = {
    "preferences": (
        {"prompt": TURNS, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": TURNS_TEXT, "chosen": "good", "rejected": "bad"},
    ),
    "implicit prompt": (
        {"chosen": TURNS + [assistant("good")], "rejected": TURNS + [assistant("bad")]},
        {"prompt": TURNS_TEXT, "chosen": "good", "rejected": "bad"},
    ),
    "prompt as text, whole conversations": (
        {"prompt": "q {i}", "chosen": ASK + [assistant("A")], "rejected": ASK + [assistant("B")]},
        {"prompt": ASK_TEXT, "chosen": "A", "rejected": "B"},
    ),
    "prompt as text, answers": (
        {"prompt": "q {i}", "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": ASK_TEXT, "chosen": "A", "rejected": "B"},
    ),
    "prompt and completion": (
        {"prompt": ASK, "completion": [assistant(" A\n")]},
        {"prompt": ASK_TEXT, "completion": " A\n"},
    ),
    "completion of several messages": (
        {"prompt": TURNS[:2], "completion": TURNS[2:] + [assistant("A")]},
        {"prompt": TURNS_TEXT, "completion": "A"},
    ),
    "prompt": ({"prompt": TURNS}, {"prompt": TURNS_TEXT}),
    "messages": (
        {"messages": TURNS + [assistant("done {i}")]},
        {"prompt": TURNS_TEXT, "completion": "done {i}"},
    ),
}


def fill(value, i):
    """The row with {i} filled in, so that rows differ."""
    return json.loads(json.dumps(value).replace("{i}", str(i)))


@pytest.mark.parametrize("name", TEXTS)
def test_formats_of_texts(name, models, run, tmp_path):
    """Texts stay as they are, even if the model has a chat template; the tokenizer's EOS ends them."""
    row, written = TEXTS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [fill(row, i) for i in range(6)])
    done = run(path, models / "chat", tmp_path / "out")
    assert numbered(done.all) == [fill(written, i) for i in range(6)]
    assert [list(row) for row in done.all] == [list(written)] * 6, "the columns in their order"
    assert done.about["eos_token"] == "</s>"
    assert {split: len(rows) for split, rows in done.rows.items()} == {"train": 4, "validation": 1, "test": 1}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_formats_of_conversations(name, models, run, tmp_path):
    row, written = CONVERSATIONS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", [fill(row, i) for i in range(6)])
    done = run(path, models / "chat", tmp_path / "out")
    assert numbered(done.all) == [fill(written, i) for i in range(6)]
    assert done.about["eos_token"] == "<|im_end|>"
    assert done.about["dataset"] == str(path) and done.about["model"] == str(models / "chat")
    assert "chat_template is not set" in run.fails(path, models / "plain", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --------------------------------------------------------------------------------- what the model is to see
@pytest.mark.parametrize(
    "model, seen",
    [
        ("plain", ["p 0", "<s>", "<s>p 2"]),  # an empty prompt is BOS
        ("no_bos", ["p 0", "</s>", "<s>p 2"]),  # or else EOS
        ("bos", ["<s>p 0", "<s>", "<s>p 2"]),  # once
        ("bos_eos", ["<s>p 0", "<s>", "<s>p 2"]),  # and no EOS
    ],
)
def test_bos_of_texts(model, seen, models, run, tmp_path):
    """As the tokenizer puts it by habit, and no second one."""
    rows = [{"prompt": prompt, "completion": f"c {i}"} for i, prompt in enumerate(["p 0", "", "<s>p 2"])]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), models / model, tmp_path / "out")
    by_completion = {row["completion"]: row["prompt"] for row in done.all}
    assert [by_completion[f"c {i}"] for i in range(3)] == seen


@pytest.mark.parametrize("bos, count", [("", 0), ("{{ bos_token }}", 1)])
def test_bos_of_conversations_is_the_templates(bos, count, models, run, tmp_path):
    model = tmp_path / "model"
    byte_tokenizer(chat_template=bos + CHATML, add_bos=True, **SPECIAL).save_pretrained(model)
    rows = [{"messages": [user(f"q {i}"), assistant("A")]} for i in range(4)]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), model, tmp_path / "out")
    assert [row["prompt"].count("<s>") for row in done.all] == [count] * 4
    assert all(row["prompt"].startswith("<s>" * count + "<|im_start|>user\nq") for row in done.all)


def closing(behind, content="{{ m['content'] }}", header="<|im_start|>{{ m['role'] }} "):
    """A template that puts something behind every message."""
    loop = "{% for m in messages %}" + header + content + behind + "{% endfor %}"
    start = header.replace("{{ m['role'] }}", "assistant")
    return loop + "{% if add_generation_prompt %}" + start + "{% endif %}"


LLAMA_2 = (  # the real one, shortened: a space before and behind the answer, BOS in front of each question
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
HARMONY = (  # special tokens between the header and the answer, which the generation prompt lacks
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|mid|>final{% endif %}<|mid|>"
    "{{ m['content'] }}{% if m['role'] == 'assistant' %}<|return|>{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
THINKING = (  # the generation prompt opens what a finished answer no longer has
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
LONG = "an answer that is longer than thirty characters {i}"
END_OF_TURN = {  # name: (template, answer, EOS)
    "ChatML": (CHATML, LONG, "<|im_end|>"),
    "ChatML, an answer that its markup contains": (CHATML, "e", "<|im_end|>"),
    "the tokenizer's own EOS": (closing("</s>"), LONG, "</s>"),
    "Llama 2, with a space in front": (LLAMA_2, LONG, "</s>"),
    "Llama 2, short answer": (LLAMA_2, "s", "</s>"),
    "words in front": (closing("\n\n[END]\n<|im_end|>\n"), LONG, "<|im_end|>"),
    "no special token: EOS": (closing("\n###\n", header="{{ m['role'] }}: "), LONG, "</s>"),
    "nothing behind: EOS": (closing("", header="{{ m['role'] }}: "), LONG, "</s>"),
    "answer stripped": (
        closing("<|im_end|>", content="{{ m['content'] | trim }}"),
        " " + LONG + "\n",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", END_OF_TURN)
def test_end_of_turn(name, run, tmp_path):
    """The special token that closes an answer is recorded as EOS, and stands in no response."""
    template, answer, eos = END_OF_TURN[name]
    model = with_template(tmp_path / "model", template)
    rows = [fill({"prompt": [user("q {i}")], "completion": [assistant(answer)]}, i) for i in range(4)]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), model, tmp_path / "out")
    assert done.about["eos_token"] == eos
    assert Counter(row["completion"] for row in done.all) == Counter(fill(answer, i) for i in range(4))


PARTS_ONLY = (  # a template for content as parts: of a text it writes nothing
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOT_CONTINUED = {  # templates whose conversation does not begin with the prompt and the answer
    "special tokens before the answer": HARMONY,
    "a generation prompt that opens a thought": THINKING,
    "content as parts": PARTS_ONLY,
    "no generation prompt": CHATML.split("{% if add_generation_prompt")[0],
    "a first letter in upper case": closing("<|im_end|>", content="{{ m['content'] | capitalize }}"),
}


@pytest.mark.parametrize("answer", ["s", LONG, None])
@pytest.mark.parametrize("name", NOT_CONTINUED)
def test_a_template_that_does_not_continue_its_prompt_with_the_answer(name, answer, run, tmp_path):
    """All rows are dropped, whatever the answers look like, and also where there are prompts only."""
    model = with_template(tmp_path / "model", NOT_CONTINUED[name])
    rows = [{"prompt": [user(f"q {i}")]} for i in range(4)]
    rows = [row | {"completion": [assistant(answer)]} for row in rows] if answer else rows
    error = run.fails(write_jsonl(tmp_path / "rows.jsonl", rows), model, tmp_path / "out")
    assert "no row of train is left" in error and "does not continue its own prompt" in error
    assert not (tmp_path / "out").exists()


def test_rows_that_a_template_changes_are_dropped(run, tmp_path):
    """A thought is cut from an answer, so that the model would learn what the template never shows."""
    template = THINKING.replace("<think>\n", "")
    answers = ["<think>hm</think>a", "b", "c", "d"]
    rows = [{"prompt": [user(f"q {i}")], "completion": [assistant(a)]} for i, a in enumerate(answers)]
    done = run(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        with_template(tmp_path / "model", template),
        tmp_path / "out",
    )
    assert {row["completion"] for row in done.all} == {"b", "c", "d"} and done.about[
        "eos_token"
    ] == "<|im_end|>"


def test_a_template_with_a_thinking_mode(run, tmp_path):
    """Templates like Qwen3's put an empty thought before an answer; without thinking the prompt holds it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    rows = [{"messages": [user(f"q {i}"), assistant("A")]} for i in range(4)]
    done = run(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        with_template(tmp_path / "model", template),
        tmp_path / "out",
    )
    assert all(row["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for row in done.all)


def test_end_of_turn_where_there_are_prompts_only(run, models, tmp_path):
    """Nothing but a question in the data: the template is asked with that as an answer."""
    rows = [{"prompt": [user(f"q {i}")]} for i in range(4)]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), models / "chat", tmp_path / "out")
    assert done.about["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("kind, eos", [("text", "</s>"), ("conversation", "<|im_end|>")])
def test_eos_in_responses(kind, eos, run, models, tmp_path):
    """At the end one is taken off, as scripts add it; inside, the row is dropped; another's EOS is text."""
    other = {"</s>": "<|im_end|>", "<|im_end|>": "</s>"}[eos]
    answers = ["a 0" + eos, "a" + eos + "b", eos, "a 3" + other, "a" + eos + eos, "a 5", "a 6"]
    if kind == "text":
        rows = [{"prompt": f"q {i}", "completion": answer} for i, answer in enumerate(answers)]
    else:
        rows = [{"messages": [user(f"q {i}"), assistant(answer)]} for i, answer in enumerate(answers)]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), models / "chat", tmp_path / "out")
    assert {row["completion"] for row in done.all} == {"a 0", "a 3" + other, "a 5", "a 6"}
    assert done.about["rows"]["train"]["dropped"] == {"EOS inside a response, or nothing but EOS": 3}


def test_a_template_that_refuses_rows(run, tmp_path):
    """Single rows are dropped and counted with the template's words; all of them: one line, no traceback."""
    demand = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('I \x1b[2J want a\nsystem') }}{% endif %}"
    )
    model = with_template(tmp_path / "model", demand + CHATML)
    good = [
        {"messages": [{"role": "system", "content": "s"}, user(f"q {i}"), assistant("A")]} for i in range(5)
    ]
    bad = [{"messages": [user(f"q {i}"), assistant("A")]} for i in range(2)]
    done = run(write_jsonl(tmp_path / "some.jsonl", bad + good), model, tmp_path / "out")
    assert len(done.all) == 5 and done.about["eos_token"] == "<|im_end|>"
    ((reason, count),) = done.about["rows"]["train"]["dropped"].items()
    assert count == 2 and "system" in reason and "\x1b" not in done.out
    error = run.fails(write_jsonl(tmp_path / "all.jsonl", bad), model, tmp_path / "none")
    assert "no row of train" in error and "system" in error and not (tmp_path / "none").exists()


def test_a_template_with_a_syntax_error(run, tmp_path):
    model = with_template(tmp_path / "model", "{% for m in messages %}")
    rows = [{"messages": [user(f"q {i}"), assistant("A")]} for i in range(3)]
    error = run.fails(write_jsonl(tmp_path / "rows.jsonl", rows), model, tmp_path / "out")
    assert "chat template" in error and "--model" in error and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- every container
ROWS = [{"prompt": f"p {i} \u2028 é", "completion": f" c {i}"} for i in range(41)]
PARTS = {"train": ROWS[:30], "validation": ROWS[30:37], "test": ROWS[37:]}


def split_files(folder, extension, splits):
    for split, rows in splits.items():
        if extension == "parquet":
            folder.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        else:
            write_jsonl(folder / f"{split}.{extension}", rows)
    return folder


def container(kind, folder):
    """(path, has splits): ROWS in a container of some kind."""
    if kind == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps(ROWS), encoding="utf-8")
        return path, False
    if kind in ("jsonl", "jsonl.gz"):
        return write_jsonl(folder / f"rows.{kind}", ROWS), False
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet", False
    if kind == "Dataset on disk":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        return folder, False
    if kind == "DatasetDict on disk":
        parts = {split: datasets.Dataset.from_list(rows) for split, rows in PARTS.items()}
        datasets.DatasetDict(parts).save_to_disk(folder)
        return folder, True
    return split_files(folder, kind.removeprefix("folder of "), PARTS), True


FILES = ["json", "jsonl", "jsonl.gz", "parquet"]
FOLDERS = ["folder of jsonl", "folder of jsonl.gz", "folder of parquet"]


@pytest.mark.parametrize("kind", [*FILES, *FOLDERS, "Dataset on disk", "DatasetDict on disk"])
def test_containers(kind, models, run, tmp_path):
    """The same rows in the same order; given splits stay what they are, else rows of train are held out."""
    (tmp_path / "data").mkdir()
    path, has_splits = container(kind, tmp_path / "data")
    done = run(path, models / "plain", tmp_path / "out")
    if has_splits:
        assert done.rows == PARTS
    else:
        assert {split: len(rows) for split, rows in done.rows.items()} == {
            "train": 37,
            "validation": 2,
            "test": 2,
        }
        assert numbered(done.all) == ROWS
        assert done.rows["train"] == numbered(done.rows["train"])


@pytest.mark.parametrize("name", ["toy", "train_test"])
def test_what_is_written_reads_back(name, models, run, tmp_path):
    """load_dataset, as the training scripts call it, sees the three files alone, whatever the folder's name."""
    done = run(split_files(tmp_path / "data", "jsonl", PARTS), models / "plain", tmp_path / name)
    read = datasets.load_dataset(str(tmp_path / name))
    assert {split: list(rows) for split, rows in read.items()} == done.rows == PARTS
    assert {path.name for path in (tmp_path / name).iterdir()} == {
        "data.json",
        *(f"{x}.jsonl" for x in SPLITS),
    }


# ------------------------------------------------------------------------------------------------------ splits
@pytest.mark.parametrize(
    "names, flags, expected",
    [
        (["train"], {}, {"train": "train"}),
        (["eval", "train"], {}, {"train": "train", "validation": "eval"}),
        (["test_prefs", "train_prefs"], {}, {"train": "train_prefs", "test": "test_prefs"}),
        (["test_sft", "train_sft"], {}, {"train": "train_sft", "test": "test_sft"}),
        (["dev", "TEST", "Train"], {}, {"train": "Train", "validation": "dev", "test": "TEST"}),
        (["sft.valid", "sft.train"], {}, {"train": "sft.train", "validation": "sft.valid"}),
        (["train", "val"], {}, {"train": "train", "validation": "val"}),
        (["train", "validation", "test"], {}, {"train": "train", "validation": "validation", "test": "test"}),
        (
            ["train_sft", "train_prefs", "test_sft", "test_prefs"],
            {},
            None,
        ),
        (["train", "heldout"], {}, None),
        (["train_eval", "test"], {}, None),
        (["train", "validation", "eval"], {}, None),
        (["test"], {}, None),
        (["a", "b"], {"train_split": "c"}, None),
        (["a", "b"], {"test_split": "b"}, None),
        (["a", "b"], {"train_split": "b"}, {"train": "b"}),
        (["a", "b"], {"train_split": "b", "test_split": "a"}, {"train": "b", "test": "a"}),
        (["train_sft", "test_sft", "train"], {"train_split": "train_sft"}, {"train": "train_sft"}),
    ],
)
def test_splits_go_by_name(names, flags, expected):
    """In whatever order they come; what is unclear is an error that lists them and names the flags."""
    for order in (names, names[::-1]):
        args = SimpleNamespace(**{"train_split": "", "test_split": "", **flags})
        if isinstance(expected, dict):
            assert data.choose_splits(order, args) == expected
            continue
        with pytest.raises(SystemExit) as exit:
            data.choose_splits(order, args)
        assert str(order) in exit.value.code and "--train_split and --test_split" in exit.value.code


@pytest.mark.parametrize("names", [("eval", "train"), ("test_prefs", "train_prefs")])
def test_never_trains_on_held_out_rows(names, models, run, tmp_path):
    """A DatasetDict whose first split is not the training one."""
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in zip(names, (ROWS[:5], ROWS[5:]))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    done = run(tmp_path / "data", models / "plain", tmp_path / "out")
    given, made = ("validation", "test") if names[0] == "eval" else ("test", "validation")
    assert done.rows[given] == ROWS[:5]
    assert len(done.rows[made]) == 1 and numbered(done.rows["train"] + done.rows[made]) == ROWS[5:]


def test_a_split_that_was_saved_alone_keeps_its_name(models, run, tmp_path):
    folder = split_files(tmp_path / "data", "jsonl", PARTS)
    datasets.load_dataset(str(folder))["test"].save_to_disk(tmp_path / "test_rows")
    assert "'test'" in run.fails(tmp_path / "test_rows", models / "plain", tmp_path / "out")
    done = run(tmp_path / "test_rows", models / "plain", tmp_path / "out", train_split="test")
    assert numbered(done.all) == PARTS["test"]


@pytest.mark.parametrize(
    "n, of_prompt, size",
    [(3, 1, 1), (39, 1, 1), (40, 1, 2), (100, 1, 5), (11000, 1, 500)]
    + [(9, 3, 3), (99, 3, 3), (198, 3, 9), (11001, 3, 498)]
    + [(3, 3, 1), (100, 100, 5)],  # one prompt in all, as texts have: rows are held out one by one
)
def test_held_out_rule(n, of_prompt, size):
    """5% of the rows, at most 500, for each of two; all rows of a prompt, of which several rows have the same."""
    train = [{"prompt": str(i // of_prompt), "completion": str(i)} for i in range(n)]
    rows, again = {"train": train}, {"train": train}
    data.hold_out(rows, ["validation", "test"])
    data.hold_out(again, ["validation", "test"])
    assert rows == again, "the same in every run"
    assert [len(rows[split]) for split in SPLITS] == [n - 2 * size, size, size]
    assert sorted(int(row["completion"]) for split in SPLITS for row in rows[split]) == list(range(n))
    assert rows["train"] == sorted(rows["train"], key=lambda row: int(row["completion"])), "order is kept"
    prompts = [{row["prompt"] for row in rows[split]} for split in SPLITS]
    if of_prompt < n:
        assert len(set.union(*prompts)) == sum(len(part) for part in prompts), "a prompt on two sides"
    if n > 100:
        assert rows["validation"] != train[-size:] and rows["validation"] != train[:size], (
            "from all over the data"
        )


def test_one_frequent_prompt_is_not_held_out():
    train = [{"prompt": "often"}] * 60 + [{"prompt": str(i)} for i in range(40)]
    rows = {"train": train}
    data.hold_out(rows, ["validation", "test"])
    assert [len(rows[split]) for split in SPLITS] == [90, 5, 5] and rows["train"][:60] == train[:60]


def test_two_prompts_are_too_few_for_three_splits(models, run, tmp_path):
    """Held out one after the other, the last prompt must not be torn apart between train and test."""
    rows = [{"prompt": f"p {i % 2}", "completion": f"c {i}"} for i in range(50)]
    error = run.fails(write_jsonl(tmp_path / "rows.jsonl", rows), models / "plain", tmp_path / "out")
    assert "too few prompts" in error and not (tmp_path / "out").exists()


def test_given_splits_are_kept(models, run, tmp_path):
    parts = {"train": ROWS[:30], "validation": ROWS[28:35], "test": ROWS[35:]}
    done = run(split_files(tmp_path / "data", "jsonl", parts), models / "plain", tmp_path / "out")
    assert done.rows == parts, "given splits are kept"


# ------------------------------------------------------------------------------------------- what is left out
def dropped(rows, model):
    """{reason: rows} of data.convert, which must account for every row; the others are written."""
    tokenizer, names = data.transformers.AutoTokenizer.from_pretrained(model), set().union(*rows)
    columns = next(form.split("+") for form in data.FORMATS if names.issuperset(form.split("+")))
    chat = any(isinstance(row.get(column), list) for row in rows for column in columns)
    written, reasons, _ = data.convert(rows, columns, chat, None if chat else tokenizer.eos_token, tokenizer)
    assert len(written) + sum(reasons.values()) == len(rows)
    return reasons


def test_texts_that_cannot_be_used(models):
    right = {"prompt": "p", "chosen": "A", "rejected": "B"}
    wrong = {
        "chosen has the type NoneType": [{"chosen": None}],
        "prompt has the type NoneType": [{"prompt": None}],
        "rejected has the type int": [{"rejected": 3}],
        "prompt has the type dict": [{"prompt": {"a": "b"}}],
        "empty response": [{"chosen": ""}, {"rejected": " \n\t"}, {"rejected": "\u3000"}],
        "chosen and rejected are the same": [{"chosen": "B"}, {"chosen": "B</s>"}],
        "rejected has the type date": [{"rejected": datetime.date(2020, 1, 1)}],
        "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed": [
            {"prompt": "\ud800"}
        ],
    }
    rows = [right | change for changes in wrong.values() for change in changes] + [right] * 3
    assert dropped(rows, models / "plain") == {reason: len(changes) for reason, changes in wrong.items()}


JSON_CHAT = json.dumps([user("q"), assistant("A")])
EXTRAS = {  # reason: (row, what is added to it)
    "label is false": ({"prompt": "p", "completion": "c"}, {"label": False}),
    "chosen_rating is below that of rejected": (
        {"prompt": "p", "chosen": "A", "rejected": "B"},
        {"chosen_rating": 1, "rejected_rating": 2.5},
    ),
    "score_chosen is below that of rejected": (
        {"chosen": HH + "A", "rejected": HH + "B"},
        {"score_chosen": 1.5, "score_rejected": 2},
    ),
    "tools cannot be written": ({"messages": [user("q"), assistant("A")]}, {"tools": [{"name": "f"}]}),
    "system cannot be written": ({"prompt": "p", "chosen": "A", "rejected": "B"}, {"system": "Be brief."}),
    "tool_calls cannot be written": (
        {"messages": [user("q"), assistant("A")]},
        {"messages": [user("q"), assistant("A") | {"tool_calls": [{"name": "f"}]}]},
    ),
    "reasoning_content cannot be written": (
        {"messages": [user("q"), assistant("A")]},
        {"messages": [user("q"), assistant("A") | {"reasoning_content": "hm"}]},
    ),
    "messages has the type str": ({"messages": [user("q"), assistant("A")]}, {"messages": JSON_CHAT}),
    "chosen is a conversation that is stored as text": (
        {"prompt": "p", "chosen": "A", "rejected": "B"},
        {"chosen": JSON_CHAT},
    ),
    "rejected is a conversation that is stored as text": (
        {"prompt": "p", "chosen": "A", "rejected": "B"},
        {"rejected": str([user("q"), assistant("A")])},
    ),
}


@pytest.mark.parametrize("reason", EXTRAS)
def test_rows_that_say_more_than_their_texts(reason, models):
    """KTO's bad examples, pairs that their ratings turn round, what a model should see and would not."""
    row, change = EXTRAS[reason]
    model = models / ("chat" if "messages" in row else "plain")
    assert dropped([row, row | change], model) == {reason: 1}
    empty = {
        "label": True,
        "tools": None,
        "system": "",
        "chosen_rating": 3,
        "rejected_rating": 3,
        "images": [],
    }
    assert dropped([row, row | empty], model) == {}


def test_dialogues_that_cannot_be_used(models):
    """HH-RLHF style: another prompt, a prompt cut elsewhere, no turn of the assistant, nothing said in it."""
    good = {"chosen": HH + " yes", "rejected": HH + " no"}
    differ = [good | {"rejected": HH[1:] + " no"}, good | {"rejected": HH + " no" + HH + " yes"}]
    none = [{"chosen": "yes", "rejected": "no"}, good | {"rejected": "no"}]
    empty = [good | {"chosen": HH}, good | {"rejected": HH + " "}]
    expected = {"prompts differ": 3, "no '\\n\\nAssistant:' and no prompt": 1, "empty response": 2}
    assert dropped([good, *differ, *none, *empty], models / "plain") == expected


def test_conversations_that_cannot_be_used(models):
    """Each is dropped with a reason; none raises anything else, none is taken for something it is not."""
    ask, good = [user("q")], {"chosen": [user("q"), assistant("A")], "rejected": [user("q"), assistant("B")]}
    bad = [
        {"chosen": None},
        {"chosen": []},
        {"chosen": "text"},
        {"chosen": ["text"]},
        {"chosen": ask, "rejected": ask},
        {"chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"chosen": [user("other"), assistant("A")]},
        {"chosen": ask + [{"role": "assistant"}]},
        {"chosen": ask + [{"content": "A"}]},
        {"chosen": ask + [{"role": "assistant", "content": None}]},
        {"chosen": ask + [{"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
        {"chosen": [user(None), assistant("A")], "rejected": [user(None), assistant("B")]},
        {"rejected": ask + [assistant("A")]},
        {"rejected": ask + [assistant(" ")]},
        {"rejected": ask + [assistant("A"), user("the last word is not the assistant's")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: A", "rejected": "\n\nHuman: q\n\nAssistant: B"},
    ]
    for change in bad:
        assert sum(dropped([good, good | change], models / "chat").values()) == 1, change


def test_no_part_of_an_explicit_prompt_is_lost(models):
    """A whole conversation beside a prompt must contain it; a prompt must end in something to answer."""
    whole = {"chosen": [user("q"), assistant("A")], "rejected": [user("q"), assistant("B")]}
    bad = [{"prompt": "other", **whole}, {"prompt": [{"role": "system", "content": "s"}, user("q")], **whole}]
    bad += [
        {"prompt": [user("q"), assistant("hm")], "chosen": [assistant("A")], "rejected": [assistant("B")]}
    ]
    assert sum(dropped([{"prompt": "q", **whole}, *bad], models / "chat").values()) == 3
    assert (
        sum(
            dropped(
                [{"prompt": [user("q"), assistant("A")]}, {"prompt": [user("q")]}], models / "chat"
            ).values()
        )
        == 1
    )


@pytest.mark.parametrize("first", ["null", "text", "number"])
def test_conversations_are_known_whatever_the_first_row_is(first, models, run, tmp_path):
    chats = [{"prompt": [user(f"q {i}")], "completion": [assistant("A")]} for i in range(4)]
    stray = {"null": None, "text": "c", "number": 3}[first]
    rows = [{"prompt": stray, "completion": stray}, *chats]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), models / "chat", tmp_path / "out")
    assert len(done.all) == 4 and done.about["eos_token"] == "<|im_end|>"
    reason = {"null": "prompt has the type NoneType", "number": "prompt has the type int"}.get(
        first, "text among conversations, or the reverse"
    )
    assert done.about["rows"]["train"]["dropped"] == {reason: 1}
    assert f"train: 5 rows in = 4 written + 1 dropped {{{reason!r}: 1}}" in done.out


# ------------------------------------------------------------------------------------------------- what is said
def test_rows_are_shown_as_the_model_sees_them(models, run, tmp_path):
    """The joint, EOS and every character of the text in sight, and no text that could drive the terminal."""
    rows = [{"prompt": f"\x1b[2J\u202e p {i}\n", "completion": f" \r\x9b c {i}"} for i in range(40)]
    done = run(write_jsonl(tmp_path / "rows.jsonl", rows), models / "bos", tmp_path / "out")
    assert all(line.isprintable() for line in done.out.split("\n"))
    lines = done.out.split("\n")
    for row in done.rows["train"][:3]:
        at = lines.index(f"prompt     {row['prompt']!r} ")
        assert lines[at + 1] == f"completion {row['completion']!r} + '</s>'"
    assert done.out.count("+ '</s>'") == 3


def test_lengths_and_next_command(models, run, tmp_path):
    """Counts of tokens, EOS included; the lengths of the next command hold 95% of the rows."""
    rows = [
        {"prompt": "p" * (i + 1) + str(i % 10), "chosen": "c" * (i + 1), "rejected": "d"} for i in range(100)
    ]
    parts = {"train": rows, "validation": rows[:1], "test": rows[:1]}
    out, model = tmp_path / "my out", tmp_path / "a model"
    shutil.copytree(models / "bos", model)
    done = run(split_files(tmp_path / "data", "jsonl", parts), model, out)
    assert "--prompt_length: 98 tokens hold 95% of 100 texts, 102 hold all" in done.out
    assert "--response_length: 92 tokens hold 95% of 200 texts, 101 hold all" in done.out
    last = done.out.splitlines()[-1]
    assert last.startswith(f"{out}: 100 train, 1 validation, 1 test rows; next: ")
    command = ["python", "sft.py", "--model", str(model), "--dataset", str(out)]
    lengths = ["--prompt_length", "98", "--response_length", "92"]
    assert shlex.split(last.split("next: ")[1]) == command + lengths, "a shell understands it"
    short = [{"prompt": row["prompt"]} for row in rows]
    done = run(write_jsonl(tmp_path / "prompts.jsonl", short), model, tmp_path / "prompts")
    assert f"next: python p3o.py --dataset {tmp_path / 'prompts'} --prompt_length 9" in done.out
    assert "--response_length" not in done.out


def test_output_that_is_not_utf8_and_an_unwritable_cache(models, tmp_path):
    """What the terminal cannot show is replaced; local files go through no cache."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"雨 {i}", "completion": "c"} for i in range(9)])
    flags = "--dataset", path, "--model", models / "plain", "--output_dir", tmp_path / "out"
    changes = dict.fromkeys(("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), "/proc/nothing")
    changes["PYTHONIOENCODING"] = "cp1252"
    done = run_script("data.py", *flags, cwd=tmp_path, env={**os.environ, **changes})
    assert done.returncode == 0 and "\\u96e8" in done.stdout, done.stderr
    assert len(read_jsonl(tmp_path / "out" / "train.jsonl")) == 7


def test_an_error_while_rows_are_shown_loses_nothing(models, run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(write_jsonl(tmp_path / "rows.jsonl", ROWS), models / "plain", tmp_path / "out")
    assert len(read_jsonl(tmp_path / "out" / "train.jsonl")) == 37


# ---------------------------------------------------------------------------------------------------- failures
def no_utf8(path):
    values = pyarrow.py_buffer(b"\xe9"), pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, values[1], values[0]])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)


BAD = {  # name of the data set: (how it is made, what the error says)
    "missing.jsonl": (lambda path: None, ["cannot read"]),
    "nobody/nothing": (lambda path: None, ["cannot read"]),
    "empty.jsonl": (lambda path: path.write_text(""), ["no columns"[3:]]),
    "folder": (lambda path: path.mkdir(), ["holds no .json, .jsonl, .jsonl.gz or .parquet file"]),
    "broken.jsonl": (lambda path: path.write_text('{"prompt": "a"}\n{"prompt": \n'), ['{"prompt": \\n']),
    "latin.jsonl": (lambda path: path.write_bytes(b'{"prompt": "\xe9"}\n'), ["utf-8"]),
    "cut.jsonl.gz": (
        lambda path: path.write_bytes(gzip.compress(b'{"prompt": "p"}\n')[:-9]),
        ["cannot read"],
    ),
    "surrogate.jsonl": (lambda path: path.write_text('{"prompt": "\\ud800"}\n'), ["surrogates not allowed"]),
    "bytes.parquet": (no_utf8, ["utf-8"]),
    "text.parquet": (lambda path: path.write_text("no parquet"), ["cannot read"]),
    "columns.jsonl": (
        lambda path: path.write_text('{"question": "q", "answer\\u001b": "a"}\n'),
        [
            "'question'",
            "prompt+chosen+rejected or chosen+rejected or prompt+completion or messages or prompt or text",
        ],
    ),
    "useless.jsonl": (
        lambda path: write_jsonl(
            path, [{"prompt": "p", "completion": " "}, {"prompt": None, "completion": "c"}]
        ),
        ["no row of train is left", "'empty response': 1", "'prompt has the type NoneType': 1"],
    ),
    "one.jsonl": (lambda path: write_jsonl(path, [{"prompt": "p"}]), ["too few prompts"]),
    "no_train": (lambda path: split_files(path, "jsonl", {"test": ROWS[:3]}), ["['test']", "--train_split"]),
    "no_validation": (
        lambda path: split_files(
            path, "jsonl", {"train": ROWS[:3], "test": [{"prompt": "p", "completion": ""}]}
        ),
        ["no row of test is left"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_sets(name, models, run, tmp_path, monkeypatch):
    """One line that says what is wrong and what to do, and not a file more than before."""
    make, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    error = run.fails(name, models / "plain", tmp_path / "made" / "out")
    assert all(word in error for word in words), error
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_flags(models, run, tmp_path):
    rows, out = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    assert "has no EOS; give another" in run.fails(rows, models / "no_eos", out)
    assert "has a tokenizer" in run.fails(rows, tmp_path / "nothing", out)
    for flags in ((rows, "", out), ("", models / "plain", out), (rows, models / "plain", "")):
        data_error = "error: give --dataset, --model and --output_dir"
        with pytest.raises(SystemExit, match=data_error):
            run(*flags)
    assert sorted(tmp_path.iterdir()) == [rows]


# ------------------------------------------------------------------------------------------- the output folder
def test_output_folder(models, run, tmp_path):
    """Never overwritten without --overwrite, and with it only what data.py wrote; then nothing old is left."""
    one, two = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(9)])
        for name in "ab"
    )
    plain, out = models / "plain", tmp_path / "out"
    out.mkdir()  # empty: free
    first = run(one, plain, out)
    with pytest.raises(SystemExit, match="give --overwrite"):
        run(two, plain, out)
    assert all(row["prompt"].startswith("a") for row in read_jsonl(out / "train.jsonl"))
    run.fails(tmp_path / "missing.jsonl", plain, out, overwrite=True)  # lost nothing
    assert read_jsonl(out / "train.jsonl") == first.rows["train"]
    second = run(two, plain, out, overwrite=True)
    assert all(row["prompt"].startswith("b") for row in second.all)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "out"}, "no folder beside"
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        assert "did not write" in run.fails(one, plain, out, overwrite=overwrite)
        assert "did not write" in run.fails(one, plain, tmp_path, overwrite=overwrite)
    assert (out / "notes.txt").read_text() == "mine" and two.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"prompt": "my rows"}', '[{"prompt": "p"}]'])
def test_a_data_json_of_somebody_else_is_never_touched(text, models, run, tmp_path):
    """The name is a common one, and with train.jsonl beside it the folder looks like ours."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "out").mkdir()
    for name in ("data.json", "train.jsonl"):
        (tmp_path / "out" / name).write_text(text)
        assert "did not write" in run.fails(rows, models / "plain", tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / name).read_text() == text


def make_path(kind, path):
    if kind == "file":
        path.write_text("mine")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:  # a device by a link, so that no mistake can harm it
        path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["file", "FIFO", "socket", "dangling link", "device"])
def test_a_path_that_is_no_folder_is_never_touched(kind, models, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path, rows = Path("out"), write_jsonl(Path("rows.jsonl"), ROWS)
    make_path(kind, path)
    before = os.lstat(path)
    for overwrite in (False, True):
        assert "is no folder" in run.fails(rows, models / "plain", path, overwrite=overwrite)
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode, before.st_mtime_ns) == (
        after.st_ino,
        after.st_mode,
        after.st_mtime_ns,
    )
    assert {file.name for file in Path().iterdir()} == {"out", "rows.jsonl"}


@pytest.mark.parametrize("kind", TEXTS | CONVERSATIONS)
def test_its_own_output_is_no_circle(kind, models, run, tmp_path):
    """It is in the plain format already, and what a second reading would make of it has lost the end of turn."""
    row = (TEXTS | CONVERSATIONS)[kind][0]
    path = write_jsonl(tmp_path / "rows.jsonl", [fill(row, i) for i in range(6)])
    run(path, models / "chat", tmp_path / "out")
    for again in (tmp_path / "out", tmp_path / "out" / "train.jsonl"):
        error = run.fails(again, models / "chat", tmp_path / "again")
        assert "is in the plain format already; give it to sft.py" in error
    (tmp_path / "mine").mkdir()
    shutil.copy(path, tmp_path / "mine" / "data.json")  # a data set of that name is one
    assert len(run(tmp_path / "mine" / "data.json", models / "chat", tmp_path / "again").all) == 6


# -------------------------------------------------------------------------------------- files as they are now
def test_files_are_read_as_they_are_now(models, run, tmp_path):
    """cp -p, rsync -t and tar keep times: other rows of the same size and time are other rows."""
    for form in ("jsonl", "json", "jsonl.gz", "parquet", "folder"):
        path = tmp_path / f"rows.{form}"
        for word in ("old", "new"):
            rows = [{"prompt": f"{word} {i}"} for i in range(9)]
            target = path / "train.jsonl" if form == "folder" else path
            if form == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
            elif form == "json":
                target.write_text(json.dumps(rows))
            else:
                write_jsonl(target, rows)
            os.utime(target, (10**9, 10**9))
            done = run(path, models / "plain", tmp_path / f"out_{form}", overwrite=True)
            assert {row["prompt"] for row in done.all} == {row["prompt"] for row in rows}, form


@pytest.mark.parametrize("form", [*FILES, "folder of jsonl", "Dataset on disk"])
def test_a_path_with_brackets(form, models, run, tmp_path):
    folder = tmp_path / "rows [v2] *?"
    folder.mkdir()
    path, _ = container(form, folder)
    assert len(run(path, models / "plain", tmp_path / "out [1]").all) == len(ROWS)


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_dates_stay_texts(form, models, run, tmp_path):
    """A reader that infers types makes timestamps of them."""
    answers = [f"2020-01-0{i + 1}" for i in range(4)] + ["2020-01-01T10:00:00Z", "12:30:00"]
    for some in (answers[:4], answers[4:5] * 4, answers[5:] * 4):
        rows = [{"prompt": f"when {i}", "completion": answer} for i, answer in enumerate(some)]
        path = write_jsonl(tmp_path / f"rows.{form}", rows)
        done = run(path, models / "plain", tmp_path / "out", overwrite=True)
        assert numbered(done.all) == numbered(rows)


def test_shards_and_byte_order_mark(models, run, tmp_path):
    for i, first in enumerate((0, 20)):
        path = write_jsonl(
            tmp_path / "rows" / "data" / f"train-0000{i}-of-00002.jsonl", ROWS[first : first + 20]
        )
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert numbered(run(tmp_path / "rows", models / "plain", tmp_path / "out").all) == ROWS[:40]


# ------------------------------------------------------------------------------------------------------- kills
def killed(args, moves):
    """Runs data.py's main in a fork, which is killed before it moves this file. Returns the exit code."""

    def main(calls=[], replace=os.replace):
        def move(*paths):
            calls.append(paths)
            if len(calls) == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = move
        data.main(args)

    process = multiprocessing.get_context("fork").Process(target=main, daemon=True)
    process.start()
    process.join(100)
    return process.exitcode


@pytest.mark.parametrize("moves", [1, 2, 4])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_files_are_moved(moves, overwrite, models, run, tmp_path):
    """Old or new files stand in their place; the next run mends the folder and leaves nothing else in it."""
    out, rows = tmp_path / "out", {}
    for word in ("old", "new"):
        rows[word] = write_jsonl(tmp_path / f"{word}.jsonl", [{"prompt": f"{word} {i}"} for i in range(9)])
    if overwrite:
        run(rows["old"], models / "plain", out)
    args = data.Args(str(rows["new"]), str(models / "plain"), str(out), overwrite=overwrite)
    assert killed(args, moves) == -signal.SIGKILL
    for split in SPLITS if overwrite else []:
        texts = {row["prompt"].split()[0] for row in read_jsonl(out / f"{split}.jsonl")}
        assert texts == {"new" if SPLITS.index(split) < moves - 1 else "old"}
    assert {path.name for path in tmp_path.iterdir()} == {"old.jsonl", "new.jsonl", "out"}, "nothing hidden"
    done = run(rows["new"], models / "plain", out, overwrite=overwrite)
    assert {row["prompt"].split()[0] for row in done.all} == {"new"}
    assert {path.name for path in out.iterdir()} == {"data.json", *(f"{split}.jsonl" for split in SPLITS)}


def test_a_failure_while_writing_leaves_what_was_there(models, run, tmp_path, monkeypatch):
    path, out = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    first = run(path, models / "plain", out)

    def full(path, mode, **kwargs):
        if mode == "w":
            raise OSError(28, "No space left on device")
        return open(path, mode, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(data, "open", full, raising=False)
        with pytest.raises(OSError):
            run(path, models / "plain", out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out"}
    assert read_jsonl(out / "train.jsonl") == first.rows["train"]
    assert run(path, models / "plain", out, overwrite=True).rows == first.rows


# -------------------------------------------------------------------------------------------------- real data
@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A folder with GPT-2's tokenizer."""
    if not (SHARED / "gpt2-tokenizer").exists():
        pytest.skip("GPT-2's tokenizer files are not here")
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Tokenizer.from_pretrained(SHARED / "gpt2-tokenizer").save_pretrained(folder)
    return folder


def test_real_hh_rlhf_rows(gpt2, run, tmp_path, monkeypatch):
    """The raw file: 5 pairs whose prompts differ, 4 empty responses; all else is written, and read back."""
    path = SHARED / "hh_harmless_base_test.raw.jsonl.gz"
    if not path.exists():
        pytest.skip("the HH-RLHF rows are not here")
    monkeypatch.chdir(tmp_path)
    out = run(path, gpt2, "data/hh").out
    assert "2312 rows in = 2303 written + 9 dropped {'prompts differ': 5, 'empty response': 4}" in out
    last = "data/hh: 2073 train, 115 validation, 115 test rows; next: python sft.py --model gpt2 --dataset data/hh"
    assert (
        out.splitlines()[-1].replace(shlex.quote(str(gpt2)), "gpt2").startswith(last) and last in data.__doc__
    )
    expected = []
    for row in map(json.loads, gzip.open(path, "rt", encoding="utf-8")):
        texts = [row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")]
        if texts[0][0] == texts[1][0] and all(answer.strip() for _, answer in texts):
            expected.append((texts[0][0] + "\n\nAssistant:", texts[0][1], texts[1][1]))
    read = datasets.load_dataset(str(tmp_path / "data/hh"))
    written = {split: [tuple(row.values()) for row in read[split]] for split in SPLITS}
    assert Counter(sum(written.values(), [])) == Counter(expected)
    train = set(written["train"])
    assert written["train"] == [row for row in expected if row in train], "in their order"
    prompts = [{row[0] for row in written[split]} for split in SPLITS]
    assert len(set.union(*prompts)) == sum(map(len, prompts)), "no prompt in two splits"


@pytest.mark.parametrize("name, rows", [("rt_polarity_eval", 1000), ("hh_harmless_eval", 278)])
def test_real_rows_in_plain_columns_stay_as_they_are(name, rows, gpt2, run, tmp_path):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the real rows are not here")
    done = run(path, gpt2, tmp_path / "out")
    columns = list(done.all[0])
    expected = [tuple(row[column] for column in columns) for row in read_jsonl(path)]
    assert len(done.all) == rows and Counter(tuple(row.values()) for row in done.all) == Counter(expected)
    assert done.about["eos_token"] == "<|endoftext|>"


def test_real_texts_for_gpt2(gpt2, run, tmp_path):
    """GPT-2 adds no BOS, but has one: before a text without prompt it stands, so that token 1 has a context."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Hello world {i}"} for i in range(5)])
    done = run(path, gpt2, tmp_path / "out")
    assert {row["prompt"] for row in done.all} == {"<|endoftext|>"}
    path = write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"Hi {i}", "completion": " yes"} for i in range(5)]
    )
    assert {row["prompt"] for row in run(path, gpt2, tmp_path / "pairs").all} == {f"Hi {i}" for i in range(5)}


# ------------------------------------------------------------------------------------------------------- fuzz
ALPHABETS = [
    [chr(c) for c in range(32, 127)],
    [chr(c) for c in range(0, 32)] + ["\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\ufeff"],
    ["\u0301", "\u200d", "\u202e", "\u2066", "\u00ad", "\U000e0041", "\ufe0f", "\u20e3"],
    ["é", "ß", "İ", "日", "本", "한", "ا", "ש", "ก", "\U0001f469", "\U0001f3fd", "\U0001f1e9", "𝔄", "ﬁ"],
    ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "\n\nAssistant:", "{{", "{% raw %}", "%s", "\\n"],
]


def random_text(rng):
    if rng.random() < 0.1:
        return rng.choice(["", " ", "\n", "\x00"])
    return "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(rng.randrange(1, 12)))


def random_junk(rng):
    text = random_text(rng)
    choices = [None, 0, -1, True, 2.5, float("nan"), [], {}, [[]], [None], [3], [text], {text: text}, [{}]]
    choices += [[{"role": text}], [{"content": text}], [user(None)], [user(3)], [user([text])], [user({})]]
    choices += [
        [user(text), None],
        [[user(text)]],
        [{"role": None, "content": text}],
        [{"role": [], "content": ""}],
    ]
    return rng.choice(choices)


def random_row(rng, columns):
    """A row with these columns; each value right, wrong in kind, or wrong in content."""
    chat, shared, row = rng.random() < 0.4, [user(random_text(rng))], {}
    start = random_text(rng) + "\n\nAssistant:"
    for column in columns:
        if rng.random() < 0.15:
            row[column] = random_junk(rng)
        elif chat:
            turns = [rng.choice([user, assistant])(random_text(rng)) for _ in range(rng.randrange(0, 4))]
            row[column] = (
                shared * (rng.random() < 0.7) + turns + [assistant(random_text(rng))] * (rng.random() < 0.8)
            )
        else:
            row[column] = start * (columns[0] == "chosen") * (rng.random() < 0.8) + random_text(rng)
    return row


def test_fuzz(models):
    """Whatever is in a row: it is written as texts a model can be trained on, or counted with a reason."""
    rng, reasons, used = random.Random(0), Counter(), 0
    load = data.transformers.AutoTokenizer.from_pretrained
    tokenizers = [load(models / name) for name in ("bos", "chat")]
    for trial in range(400):
        columns = rng.choice(data.FORMATS).split("+")
        rows = [random_row(rng, columns) for _ in range(rng.randrange(1, 12))]
        before, tokenizer, chat = repr(rows), tokenizers[trial % 2], rng.random() < 0.5
        eos = None if chat else tokenizer.eos_token
        written, dropped, eos = data.convert(rows, columns, chat, eos, tokenizer)
        assert len(written) + sum(dropped.values()) == len(rows) and repr(rows) == before
        for row in written:
            assert list(row) in data.WRITTEN and row["prompt"]
            responses = list(row.values())[1:]
            assert all(isinstance(text, str) and text.strip() and eos not in text for text in responses)
            assert len(set(responses)) == len(responses)
        reasons.update(dropped)
        used += len(written)
    assert used > 300 and len(reasons) >= 8, (used, reasons)
