"""What the scripts read from data sets: every accepted format and file, exact ids, what becomes of the rest.

Tokens are bytes (tests/conftest.py), so that expected ids can be written down from the text. Every script has
the same loaders, byte for byte (test_copies.py); here p3o.py's are tested.
"""

import gzip
import json
import random
import re
import unicodedata
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
from conftest import CHATML, ROOT, byte_tokenizer
from transformers import GPT2Tokenizer

import p3o

SHARED = ROOT.parent / "shared" / "data"
ROOMY = SimpleNamespace(prompt_length=10**6, response_length=10**6)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = byte_tokenizer(**SPECIAL)
CHAT = byte_tokenizer(chat_template=CHATML, **SPECIAL)
IM_END = CHAT.convert_tokens_to_ids("<|im_end|>")


# ---------------------------------------------------------------------------------------------------- helpers
def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return str(path)


def read(path, n, tokenizer=PLAIN, splits=("train",), args=ROOMY, **kwargs):
    examples, eos_id = p3o.read_examples(str(path), list(splits), n, tokenizer, args, **kwargs)
    return examples, eos_id


def counts(capsys):
    """(rows used, rows read, {reason: rows}) as the log says it; every row must be accounted for."""
    line = capsys.readouterr().out.strip().splitlines()[-1]
    used, total = map(int, re.search(r"(\d+) of (\d+) rows used", line).groups())
    dropped = {why: int(n) for n, why in re.findall(r", (\d+) dropped: ([^,]+)", line)}
    assert used + sum(dropped.values()) == total, line
    return used, total, dropped


# ----------------------------------------------------------------------------------------------- every format
HH = "\n\nHuman: why?\n\nAssistant: because.\n\nHuman: oh {i}\n\nAssistant:"
TURNS = [{"role": "system", "content": "Be é."}, user("q {i}"), assistant("what?"), user("that")]
TURNS_TEXT = (
    "<|im_start|>system\nBe é.<|im_end|>\n<|im_start|>user\nq {i}<|im_end|>\n"
    "<|im_start|>assistant\nwhat?<|im_end|>\n<|im_start|>user\nthat<|im_end|>\n<|im_start|>assistant\n"
)
ASK, ASK_TEXT = [user("q {i}")], "<|im_start|>user\nq {i}<|im_end|>\n<|im_start|>assistant\n"
FORMATS = {  # name: (row, prompt, responses, conversational)
    "preferences": ({"prompt": "p {i}", "chosen": " good", "rejected": " bad"}, "p {i}", [" good", " bad"]),
    "preferences, columns in another order": (
        {"rejected": "bad", "id": 7, "chosen": "good", "prompt": "p {i}"},
        "p {i}",
        ["good", "bad"],
    ),
    "implicit prompt of HH-RLHF": (
        {"chosen": HH + " Well…", "rejected": HH + " No"},
        HH,
        [" Well…", " No"],
    ),
    "prompt and completion": ({"prompt": "p {i}", "completion": " c\n"}, "p {i}", [" c\n"]),
    "prompt only": ({"prompt": "p {i}"}, "p {i}", []),
    "text": ({"text": "once {i}"}, "", ["once {i}"]),
    "preferences, conversational": (
        {"prompt": TURNS, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        TURNS_TEXT,
        ["good", "bad"],
    ),
    "implicit prompt, conversational": (
        {"chosen": TURNS + [assistant("good")], "rejected": TURNS + [assistant("bad")]},
        TURNS_TEXT,
        ["good", "bad"],
    ),
    "prompt as text, whole conversations": (
        {"prompt": "q {i}", "chosen": ASK + [assistant("A")], "rejected": ASK + [assistant("B")]},
        ASK_TEXT,
        ["A", "B"],
    ),
    "prompt and completion, conversational": (
        {"prompt": ASK, "completion": [assistant("A\n")]},
        ASK_TEXT,
        ["A\n"],
    ),
    "prompt only, conversational": ({"prompt": TURNS}, TURNS_TEXT, []),
    "messages": ({"messages": TURNS + [assistant("done {i}")]}, TURNS_TEXT, ["done {i}"]),
}


def fill(value, i):
    """The row with {i} filled in, so that rows differ."""
    return json.loads(json.dumps(value).replace("{i}", str(i)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_formats(name, tokenizer, tmp_path, capsys):
    """Exact texts and ids, for as many responses as the format has and for fewer; not for more."""
    row, prompt, responses = FORMATS[name]
    conversational = "conversation" in name or name == "messages"
    path = write_jsonl(tmp_path / "rows.jsonl", [fill(row, i) for i in range(6)])
    for n in (0, 1, 2):
        if n > len(responses) or (n == 0 and "text" in row):
            with pytest.raises(p3o.RunError, match=f"has columns .*{list(row)[0]}.*; expected prompt.chosen"):
                read(path, n, tokenizer)
            continue
        if conversational and tokenizer is PLAIN:
            with pytest.raises(p3o.RunError, match="holds conversations; "):
                read(path, n, tokenizer)
            continue
        examples, eos_id = read(path, n, tokenizer)
        assert counts(capsys) == (5, 5, {}), "6 rows, 1 of them held out"
        assert eos_id == (IM_END if conversational else tokenizer.eos_token_id)
        for i, example in enumerate(examples):
            text, answers = fill(prompt, i), fill(responses[:n], i)
            assert example["prompt"] == text
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert example["prompt_ids"] == (ids or [eos_id])
            assert example["response_ids"] == [encode(answer) + [eos_id] for answer in answers]


def encode(text):
    """Ids of PLAIN and CHAT by hand: bytes, numbered in the order of their printable stand-ins."""
    stand_in = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    order = stand_in + [b for b in range(256) if b not in stand_in]  # the rest is mapped to U+0100 and up
    return [order.index(b) for b in text.encode()]


def test_chat_template_tokens_are_single_ids(tmp_path):
    """Markup of a conversation becomes special tokens, and the response ends in the end of turn, not EOS."""
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": [user("hé")], "completion": [assistant("A")]}] * 2
    )
    (example,), eos_id = read(path, 1, CHAT)
    start = CHAT.convert_tokens_to_ids("<|im_start|>")
    expected = [start, *encode("user\nhé"), IM_END, *encode("\n"), start, *encode("assistant\n")]
    assert example["prompt_ids"] == expected
    assert example["response_ids"] == [[*encode("A"), IM_END]] and eos_id == IM_END != CHAT.eos_token_id


def test_bos_is_added_to_texts_only_and_once(tmp_path):
    """By the tokenizer's own habit: before a prompt, never before a response, not to conversations."""
    bos = byte_tokenizer(add_bos=True, chat_template=CHATML, **SPECIAL)
    rows = [{"prompt": "p", "chosen": "A", "rejected": "B"}, {"prompt": "", "chosen": "A", "rejected": "B"}]
    examples, eos_id = read(write_jsonl(tmp_path / "a.jsonl", rows + rows[:1]), 2, bos)
    assert [e["prompt_ids"] for e in examples] == [[bos.bos_token_id, *encode("p")], [bos.bos_token_id]]
    assert examples[0]["response_ids"] == [[*encode("A"), eos_id], [*encode("B"), eos_id]]
    chats = [{"prompt": [user("p")], "completion": [assistant("A")]}] * 2
    (example,), _ = read(write_jsonl(tmp_path / "b.jsonl", chats), 1, bos)
    assert bos.bos_token_id not in example["prompt_ids"] + example["response_ids"][0]
    (example,), eos_id = read(write_jsonl(tmp_path / "c.jsonl", [{"text": "once"}] * 2), 1, PLAIN)
    assert example["prompt_ids"] == [eos_id], (
        "without BOS an empty prompt is one EOS, so that y_1 has a context"
    )


def test_end_of_turn_of_other_templates():
    """Whatever the template puts behind an answer; EOS where it puts nothing."""
    for behind, expected in (("<|im_end|>\n", IM_END), ("</s>", CHAT.eos_token_id), ("", CHAT.eos_token_id)):
        template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + behind + "{% endfor %}"
        tokenizer = byte_tokenizer(chat_template=template, **SPECIAL)
        assert p3o.end_of_turn(tokenizer) == expected, behind


# -------------------------------------------------------------------------------------------- every container
ROWS = [{"prompt": f"p {i} \u2028 é", "completion": f" c {i}"} for i in range(41)]


def split_files(folder, extension, splits):
    for split, rows in splits.items():
        if extension == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        else:
            write_jsonl(folder / f"{split}.{extension}", rows)
    return folder


def container(kind, folder):
    """(path, {split: rows}): ROWS in a container of some kind; None: the whole without splits."""
    splits = {"train": ROWS[:30], "validation": ROWS[30:37], "test": ROWS[37:]}
    if kind == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps(ROWS), encoding="utf-8")
        return path, None
    if kind in ("jsonl", "jsonl.gz"):
        return write_jsonl(folder / f"rows.{kind}", ROWS), None
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet", None
    if kind == "Dataset on disk":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        return folder, None
    if kind == "DatasetDict on disk":
        dictionary = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
        dictionary.save_to_disk(folder)
        return folder, splits
    if kind == "folder of one file":
        write_jsonl(folder / "anything.jsonl", ROWS)
        return folder, None
    if kind == "folder without validation":
        del splits["validation"]
        return split_files(folder, "jsonl", splits), splits
    return split_files(folder, kind.removeprefix("folder of "), splits), splits


CONTAINERS = [
    "json",
    "jsonl",
    "jsonl.gz",
    "parquet",
    "folder of jsonl",
    "folder of jsonl.gz",
    "folder of parquet",
    "folder of one file",
    "folder without validation",
    "Dataset on disk",
    "DatasetDict on disk",
]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(kind, tmp_path, capsys):
    """The same rows come back in the same order; held out are validation, else test, else the last 5%."""
    (tmp_path / "data").mkdir()
    path, splits = container(kind, tmp_path / "data")
    splits = splits or {"train": ROWS[:38], "test": ROWS[38:]}  # 41 // 20 + 1 rows held out
    for wanted, rows in (
        (["train"], splits["train"]),
        (["validation", "test"], splits.get("validation", splits["test"])),
        (["test"], splits["test"]),
    ):
        examples, _ = read(path, 1, splits=wanted)
        assert counts(capsys) == (len(rows), len(rows), {})
        assert [e["prompt"] for e in examples] == [row["prompt"] for row in rows]
        assert [e["response_ids"][0][:-1] for e in examples] == [encode(row["completion"]) for row in rows]


@pytest.mark.parametrize("n, held_out", [(2, 1), (19, 1), (20, 2), (100, 6), (10100, 500)])
def test_held_out_rule(n, held_out, tmp_path):
    """Without a held-out split the last rows are lent: 5%, at least 1, at most 500; train lacks them."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(n)])
    train, _ = p3o.open_split(path, ["train"])
    test, split = p3o.open_split(path, ["validation", "test"])
    assert split == "test" and len(test) == held_out
    assert [*train["text"], *test["text"]] == [str(i) for i in range(n)]


def test_missing_split_is_an_error(tmp_path):
    split_files(tmp_path, "jsonl", {"validation": ROWS[:3]})
    with pytest.raises(p3o.RunError, match=r"has splits \['validation'\]; name one of them 'train'"):
        read(tmp_path, 1)


# ------------------------------------------------------------------------------------------- what is left out
def test_every_unusable_row_is_counted_by_reason(tmp_path, capsys):
    good = {"prompt": "p", "chosen": "A", "rejected": "B"}
    bad = {
        "null or not text": [{"chosen": None}, {"prompt": None}],
        "prompt longer than --prompt_length": [{"prompt": "x" * 11}],
        "empty response": [{"chosen": ""}, {"rejected": " \n\t"}, {"rejected": "\u3000"}],
        "chosen and rejected are the same": [{"chosen": "B"}, {"chosen": "A" * 7, "rejected": "A" * 6 + "B"}],
    }
    rows = [good | change for changes in bad.values() for change in changes] + [good] * 3
    rows += [good | {"prompt": "x" * 10, "chosen": "12345", "rejected": "123456"}]
    args = SimpleNamespace(prompt_length=10, response_length=6)
    split_files(tmp_path, "jsonl", {"train": rows, "test": rows})
    examples, eos_id = read(tmp_path, 2, args=args)
    assert counts(capsys) == (4, 12, {why: len(changes) for why, changes in bad.items()})
    assert [e["prompt"] for e in examples] == ["p", "p", "p", "x" * 10]
    cut = [[*encode("12345"), eos_id], encode("123456")]
    assert examples[-1]["response_ids"] == cut, "a longer response is cut, and then without EOS"
    read(tmp_path, 0, args=args)  # as prompts, rows need no good responses
    used, total, dropped = counts(capsys)
    assert (used, total) == (9, 12) and set(dropped) == {
        "null or not text",
        "prompt longer than --prompt_length",
    }


def test_dialogues_that_cannot_be_used(tmp_path, capsys):
    """HH-RLHF style: another prompt, a prompt cut elsewhere, no turn of the assistant, nothing said in it."""
    good = {"chosen": HH + " yes", "rejected": HH + " no"}
    bad = [
        {"rejected": HH[1:] + " no"},
        {"rejected": HH + " no" + HH + " yes"},
        {"chosen": "yes", "rejected": "no"},
    ]
    rows = [good, *(good | change for change in bad), good | {"chosen": HH}, good | {"rejected": HH + " "}]
    split_files(tmp_path, "jsonl", {"train": rows, "test": rows})
    examples, _ = read(tmp_path, 2)
    assert counts(capsys) == (1, 6, {"prompts of chosen and rejected differ": 3, "empty response": 2})
    assert examples[0]["prompt"] == HH


def test_limit_stops_reading(tmp_path, capsys):
    split_files(
        tmp_path,
        "jsonl",
        {"train": [{"prompt": "", "completion": "c"}, {"prompt": None}] + ROWS, "test": ROWS},
    )
    examples, _ = read(tmp_path, 0, limit=5)
    assert [e["prompt"] for e in examples] == ["", *(row["prompt"] for row in ROWS[:4])]
    assert counts(capsys) == (5, 6, {"null or not text": 1})


def test_conversations_that_cannot_be_used(tmp_path, capsys):
    """Each is dropped with a reason; none raises anything else, none is taken for something it is not."""
    good, ask = {"chosen": ASK + [assistant("A")], "rejected": ASK + [assistant("B")]}, ASK
    bad = [
        {"chosen": None},
        {"chosen": []},
        {"chosen": ask, "rejected": ask},
        {"chosen": [user("other"), assistant("A")]},
        {"chosen": ask + [{"role": "assistant"}]},
        {"chosen": ask + [{"role": "assistant", "content": None}]},
        {"rejected": ask + [assistant("A")]},
        {"rejected": ask + [assistant(" ")]},
        {"rejected": ask + [assistant("A"), user("the last word is not the assistant's")]},
    ]
    rows = [good] + [good | change for change in bad]
    split_files(tmp_path, "jsonl", {"train": rows, "test": rows})
    examples, _ = read(tmp_path, 2, CHAT)
    used, total, _ = counts(capsys)
    assert (used, total) == (1, len(rows)) and len(examples) == 1


def test_the_last_message_must_be_the_assistants(tmp_path, capsys):
    """What the user said is no demonstration, and no end of a prompt to be answered."""
    good, bad = ASK + [assistant("A")], ASK + [assistant("A"), user("B")]
    rows = [{"messages": messages} for messages in (good, bad, ASK, good)]
    split_files(tmp_path, "jsonl", {"train": rows, "test": rows})
    for n in (0, 1):
        examples, _ = read(tmp_path, n, CHAT)
        assert [e["prompt"] for e in examples] == [ASK_TEXT] * 2
        assert counts(capsys)[:2] == (2, 4)


def test_no_part_of_an_explicit_prompt_is_lost(tmp_path):
    """A completion of several messages behind an explicit prompt: the prompt counts, or the row does not."""
    several = {"prompt": [user("first")], "completion": [assistant("A"), user("B"), assistant("C")]}
    plain = {"prompt": [user("first")], "completion": [assistant("A")]}
    split_files(tmp_path, "jsonl", {"train": [plain, several], "test": [plain]})
    for n in (0, 1):
        assert all("first" in example["prompt"] for example in read(tmp_path, n, CHAT)[0])


@pytest.mark.parametrize("first", ["null", "text"])
def test_conversations_are_known_whatever_the_first_row_is(first, tmp_path, capsys):
    """A null or a stray text in front must not change how the conversations behind it are encoded."""
    chats = [{"prompt": ASK, "completion": [assistant("A")]}] * 4
    stray = {"null": {"prompt": None, "completion": None}, "text": {"prompt": "p", "completion": "c"}}[first]
    split_files(tmp_path, "jsonl", {"train": [stray, *chats], "test": chats})
    examples, eos_id = read(tmp_path, 1, CHAT)
    used, total, dropped = counts(capsys)
    assert total == 5 and used + sum(dropped.values()) == 5
    if first == "null":
        assert eos_id == IM_END and used == 4
    for example in examples:
        is_chat = example["prompt_ids"][0] == CHAT.convert_tokens_to_ids("<|im_start|>")
        assert example["response_ids"][0][-1] == eos_id
        assert is_chat == (eos_id == IM_END), "texts and conversations must not be mixed"


# -------------------------------------------------------------------------------------------------- real data
def gpt2_tokenizer():
    folder = SHARED / "gpt2-tokenizer"
    if not folder.exists():
        pytest.skip("GPT-2's tokenizer files are not here")
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_real_hh_rlhf_rows(capsys):
    """The raw file's quirks: 5 pairs whose prompts differ, 4 empty responses; everything else is used."""
    path = SHARED / "hh_harmless_base_test.raw.jsonl.gz"
    if not path.exists():
        pytest.skip("the HH-RLHF rows are not here")
    tokenizer = gpt2_tokenizer()
    raw = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    examples, used, total, dropped = [], 0, 0, Counter()
    for splits in (["train"], ["validation", "test"]):
        part, eos_id = read(path, 2, tokenizer, splits)
        numbers = counts(capsys)
        used, total, dropped = used + numbers[0], total + numbers[1], dropped + Counter(numbers[2])
        examples += part
    assert total == len(raw) == 2312
    assert dropped == {"prompts of chosen and rejected differ": 5, "empty response": 4}
    expected = []
    for row in raw:
        (prompt, chosen), (other, rejected) = (
            row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")
        )
        if prompt == other and chosen.strip() and rejected.strip():
            expected.append((prompt + "\n\nAssistant:", chosen, rejected))
    assert [e["prompt"] for e in examples] == [prompt for prompt, *_ in expected]
    for example, (prompt, *responses) in list(zip(examples, expected, strict=True))[::100]:
        assert example["prompt_ids"] == tokenizer(prompt)["input_ids"]
        assert [ids[-1] for ids in example["response_ids"]] == [eos_id] * 2
        assert [tokenizer.decode(ids[:-1]) for ids in example["response_ids"]] == responses
        assert responses[0].startswith(" "), "responses keep their leading space"


def test_real_gpt2_tokenizer():
    """Known ids of GPT-2's vocabulary; its EOS (also BOS and pad) behind responses, not before prompts."""
    row = {"prompt": "Hello world", "chosen": " yes", "rejected": " no"}
    example = p3o.encode_row(row, 2, gpt2_tokenizer(), False, 50256, ROOMY)
    assert example["prompt_ids"] == [15496, 995]
    assert example["response_ids"] == [[3763, 50256], [645, 50256]]


# ------------------------------------------------------------------------------------------------- data order
@pytest.mark.parametrize("rows, size", [(10, 3), (10, 10), (7, 20), (1, 4), (64, 64)])
def test_data_order_takes_each_row_once_per_pass(rows, size):
    steps = [p3o.data_order(rows, size, step, 0) for step in range(1, 2 * rows + 2)]
    assert all(len(step) == size for step in steps)
    taken = sum(steps, [])
    passes = [taken[first : first + rows] for first in range(0, len(taken) - rows + 1, rows)]
    assert all(sorted(one) == list(range(rows)) for one in passes)
    assert rows < 7 or len({tuple(one) for one in passes}) == len(passes), "each pass has an order of its own"


def test_data_order_depends_on_seed_and_step_alone():
    orders = {seed: [p3o.data_order(50, 8, step, seed) for step in range(1, 30)] for seed in (0, 1, 2)}
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for step in (29, 3, 17):  # as a resumed run asks: without the steps before
        assert p3o.data_order(50, 8, step, 1) == orders[1][step - 1]


# ------------------------------------------------------------------------------------------------------- fuzz
ALPHABETS = [
    [chr(c) for c in range(32, 127)],
    [chr(c) for c in range(0, 32)] + ["\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\ufeff"],
    ["\u0301", "\u200d", "\u202e", "\u2066", "\u00ad", "\U000e0041", "\ufe0f", "\u20e3"],
    ["é", "ß", "İ", "日", "本", "한", "ا", "ש", "ก", "\U0001f469", "\U0001f3fd", "\U0001f1e9", "𝔄", "ﬁ"],
    ["\ue000", "\uffff", "\ufdd0", "\U0010ffff", "\U000f0000", "\ufffd"],
    [
        "<s>",
        "</s>",
        "<|im_end|>",
        "<|im_start|>",
        "\n\nAssistant:",
        "\n\nHuman:",
        "{{",
        "{% raw %}",
        "%s",
        "\\n",
    ],
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


def random_chat(rng, start=()):
    turns = list(start) + [
        rng.choice([user, assistant])(random_text(rng)) for _ in range(rng.randrange(0, 4))
    ]
    return turns + [assistant(random_text(rng))] * (rng.random() < 0.8)


def random_row(rng, columns):
    """A row with these columns; each value right, wrong in kind, or wrong in content."""
    chat, shared = rng.random() < 0.4, [user(random_text(rng))]
    start = random_text(rng) + "\n\nAssistant:"
    row = {}
    for column in columns:
        if rng.random() < 0.15:
            row[column] = random_junk(rng)
        elif chat:
            row[column] = random_chat(rng, shared if rng.random() < 0.7 else ())
        else:
            row[column] = start * (columns == ("chosen", "rejected")) * (rng.random() < 0.8) + random_text(
                rng
            )
    return row


def check_example(example, row, n, tokenizer, eos_id, args):
    """What an accepted row must look like."""
    assert isinstance(example["prompt"], str) and 1 <= len(example["prompt_ids"]) <= args.prompt_length
    assert len(example["response_ids"]) == n
    for ids in example["response_ids"]:
        assert 2 <= len(ids) <= args.response_length
        assert ids[-1] == eos_id or len(ids) == args.response_length
        assert all(type(i) is int and 0 <= i < len(tokenizer) for i in example["prompt_ids"] + ids)
    assert n < 2 or example["response_ids"][0] != example["response_ids"][1]
    assert all(isinstance(value, str | list) for value in row.values()), "not text, and yet accepted"


class Rows(list):
    """As much of a datasets.Dataset as the loader uses."""

    column_names = property(lambda self: list(self[0]))

    def select_columns(self, columns):
        return Rows({column: row[column] for column in columns} for row in self)


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT], ids=["plain", "chat"])
def test_fuzz_rows(tokenizer, monkeypatch, capsys):
    """Random rows: encode_row gives an example or a ValueError, and the log accounts for every row."""
    rng, args = random.Random(0), SimpleNamespace(prompt_length=60, response_length=12)
    outcomes = Counter()
    for trial in range(250):
        columns, most = rng.choice([f for f in p3o.FORMATS])
        n = rng.randrange(0, most + 1) if columns != ("text",) else 1
        rows = Rows(random_row(rng, columns) for _ in range(rng.randrange(1, 12)))
        chat, eos_id = rng.random() < 0.5, rng.choice([tokenizer.eos_token_id, len(tokenizer) - 1])
        for row in rows:
            before = repr(row)
            try:
                example = p3o.encode_row(row, n, tokenizer, chat, eos_id, args)
            except ValueError as error:
                outcomes[str(error).splitlines()[0]] += 1
            else:
                check_example(example, row, n, tokenizer, eos_id, args)
                outcomes["used"] += 1
            assert repr(row) == before, "the row was changed"
        monkeypatch.setattr(p3o, "open_split", lambda name, splits: (rows, splits[0]))
        try:
            examples, eos_id = read("fuzz", n, tokenizer, args=args)
        except p3o.RunError as error:
            assert "0 of" in str(error) or "holds conversations" in str(error)
            capsys.readouterr()
        else:
            used, total, _ = counts(capsys)
            assert used == len(examples) and total == len(rows)
            for example in examples:
                check_example(example, {}, n, tokenizer, eos_id, args)
    assert outcomes["used"] > 150 and len(outcomes) >= 5, outcomes


def test_fuzz_files(tmp_path, capsys):
    """The same through the real readers: the log accounts for every row of the file, whatever was in it."""
    rng, args, read_in = random.Random(1), SimpleNamespace(prompt_length=60, response_length=12), 0
    for trial in range(25):
        columns, most = rng.choice([f for f in p3o.FORMATS])
        rows = [random_row(rng, columns) for _ in range(rng.randrange(2, 12))]
        path = write_jsonl(tmp_path / f"{trial}.jsonl", rows)
        try:
            examples, eos_id = read(path, min(most, 1), CHAT, args=args)
        except p3o.RunError as error:
            assert "; " in str(error) and "\n" not in str(error)
            capsys.readouterr()
        else:
            used, total, _ = counts(capsys)
            assert total == len(rows) - 1 and used == len(examples), "one row is held out"
            read_in += 1
    assert read_in > 5


# -------------------------------------------------------------------------------------------------- printable
def test_printable_keeps_control_characters_away():
    """No character of Unicode that could drive a terminal or turn the line gets through; the others stay."""
    for first in (*range(0, 0x20000, 4096), 0xE0000, 0xF0000, 0x10F000):
        text = "".join(map(chr, range(first, first + 4096)))
        result = p3o.printable(text)
        assert all(unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029" for c in result)
        assert result.isprintable()
    assert p3o.printable("\x1b[2J\r\n\u202e") == r"\x1b[2J\r\n\u202e"
    for text in ("plain", "é 日本 \U0001f600", 'it\'s "quoted"', "back\\slash"):
        assert p3o.printable(text) == text
