"""Turns your data set into the plain format that all the other scripts read.

    python data.py --dataset NAME_OR_PATH --model MODEL --output_dir data/NAME

The data set is a hub name, a .json, .jsonl, .jsonl.gz or .parquet file, a folder of them, or a save_to_disk
folder. For harmless-base/test.jsonl.gz of HH-RLHF the command takes seconds on one CPU core. It ends with
    data/hh: 2073 train, 115 validation, 115 test rows; next: python sft.py --model gpt2 --dataset data/hh

    columns of the data set      columns that are written
    prompt, chosen, rejected     prompt, chosen, rejected
    chosen, rejected             prompt, chosen, rejected; answers begin after the last "\n\nAssistant:"
    prompt, completion           prompt, completion
    messages                     prompt, completion; the completion is the last message
    prompt                       prompt
    text                         prompt, completion; the prompt is empty

Values are texts or conversations, which are lists of {"role", "content"}. Literal text is written: a prompt
has the chat markup in it, and BOS if the tokenizer puts BOS before texts. The other scripts put EOS behind
responses; data.json says which token ends a turn. Read parse first, then render and convert.
"""

import gzip
import json
import os
import random
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow.parquet
import transformers
from tqdm import tqdm


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    dataset: str = flag("", "hub name, file or folder of the data set")
    model: str = flag("", "model that you will train; only its tokenizer is loaded")
    output_dir: str = flag("", "folder for the rows and data.json")
    train_split: str = flag("", "split to train on; if no split is given, their names decide")
    test_split: str = flag("", "split that becomes test; without it some prompts of train are held out")
    overwrite: bool = flag(False, "replace the rows in an output_dir that data.py has written")


FORMATS = "prompt+chosen+rejected", "chosen+rejected", "prompt+completion", "messages", "prompt", "text"
WRITTEN = ["prompt"], ["prompt", "completion"], ["prompt", "chosen", "rejected"]  # by number of responses
KINDS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev", "eval"}, "test": {"test"}}
FILES = [f"{split}.jsonl" for split in KINDS] + ["data.json"]
UNREAD = "system history documents images tools tool_calls function_call reasoning_content thinking".split()


# -------------------------------------------------------------------------------------- reading the data set
def check(condition, message):
    """Ends the program with a one-line error message if the condition does not hold."""
    if not condition:
        sys.exit(f"error: {message}")


def read_file(path):
    """Reads a local file as it is now. load_dataset might return an older version, or dates for texts."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        first = file.readline()
        if first.lstrip().startswith("["):
            return json.loads(first + file.read())
        return [json.loads(line) for lines in ([first], file) for line in lines if line.strip()]


def choose_splits(names, args):
    """Returns {"train": its name, ...}, as the flags or the words in the names say, and never by position."""
    chosen = {"train": args.train_split, "validation": "", "test": args.test_split}
    told = any(chosen.values())
    for split in [] if told else KINDS:  # train_prefs is for training
        named = [name for name in names if KINDS[split] & set(re.findall("[a-z]+", name.lower()))]
        chosen[split] = " or ".join(named)
    found = {split: name for split, name in chosen.items() if name}
    known = "train" in found and set(found.values()) <= set(names) and (told or len(found) == len(names))
    check(known, f"the use of the splits {names} is unclear; choose by --train_split and --test_split")
    return found


def read_data(args):
    """Returns the rows of each split, {"train": [{column: value}, ...], ...}, and the columns to read."""
    path, splits = Path(args.dataset), {}  # {name of a split: its files, or a datasets.Dataset}
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(args.dataset)
            splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
        elif not path.is_dir():
            splits = {"train": [path]} if path.exists() else datasets.load_dataset(args.dataset)
        for file in sorted(path.rglob("[!.]*.*")) if not splits else []:
            if file.suffix in (".json", ".jsonl", ".gz", ".parquet"):
                name = re.sub(r"(-\d+-of-\d+)?\..*", "", file.name)  # train-00000-of-00002 is a part of train
                splits.setdefault(str(file.relative_to(path).with_name(name)), []).append(file)
        check(splits, f"{path} holds no .json, .jsonl, .jsonl.gz or .parquet file; give another --dataset")
        names, data = choose_splits(list(splits), args), {}
        for split, part in ((split, splits[name]) for split, name in names.items()):
            files = part if isinstance(part, list) else []
            data[split] = [row for file in files for row in read_file(file)] if files else part.to_list()
    except json.JSONDecodeError as error:
        sys.exit(f"error: {args.dataset!r} has {error.doc[:80]!r}, which is no JSON ({error}); mend it")
    except (OSError, EOFError, ValueError, datasets.exceptions.DatasetsError) as error:
        sys.exit(f"error: cannot read {args.dataset!r}: {str(error.__cause__ or error)!r:.300}; check it")
    found = set.intersection(*(set().union(*rows) for rows in data.values()))
    columns = next((form.split("+") for form in FORMATS if found.issuperset(form.split("+"))), None)
    check(columns, f"{args.dataset!r} has columns {sorted(found)}; rename them to {' or '.join(FORMATS)}")
    print(f"{args.dataset!r}: reading {columns} of {names}; not read: {sorted(found - {*columns})}")
    return data, columns


# ------------------------------------------------------------------------------------- what a model will see
def check_extras(row, messages):
    """Raises ValueError if the row calls its response bad, or has more than texts for a model to see."""
    for name, value in row.items():
        other = row.get(name.replace("chosen", "rejected"))
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        if numbers and value < other and re.search("rating|score|reward", name):
            raise ValueError(f"{name} is below that of rejected")
    if row.get("label") is False:
        raise ValueError("label is false")
    for name in UNREAD:
        if any(part.get(name) not in (None, "", "[]", [], {}) for part in [row, *messages]):
            raise ValueError(f"{name} cannot be written")


def parse(row, columns):
    """Returns the prompt, as a text or messages, and the responses. Raises ValueError if one is unusable."""
    values = {column: row.get(column) for column in columns}
    messages = [message for value in values.values() if isinstance(value, list) for message in value]
    check_extras(row, [message for message in messages if isinstance(message, dict)])
    for column, value in values.items():
        if not isinstance(value, list if column == "messages" else str | list):
            raise ValueError(f"{column} has the type {type(value).__name__}")
        if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*.(role|content)\b", value):
            raise ValueError(f"{column} is a conversation that is stored as text")
    texts = [m.get(key) if isinstance(m, dict) else None for m in messages for key in ("role", "content")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a message without texts as role and content")
    start, prompt, responses = [], values.pop("prompt", ""), list(values.values())
    prompts = [prompt]
    if any(isinstance(value, list) for value in [prompt, *responses]):  # responses may repeat the prompt
        start = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}][: len(prompt)]
        parts = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
        parts = [start + part if part and part[0]["role"] == "assistant" else part for part in parts]
        prompts = [part[:-1] for part in parts] or [start]
        answers = all(part and part[-1]["role"] == "assistant" for part in parts)
        if not answers or not prompts[0] or prompts[0][-1]["role"] == "assistant":
            raise ValueError("the last message is not the assistant's, or it answers none")
        responses = [part[-1]["content"] for part in parts]
    elif columns == ["chosen", "rejected"]:
        parts = [response.rpartition("\n\nAssistant:") for response in responses]
        prompts, responses = [before + turn for before, turn, _ in parts], [answer for _, _, answer in parts]
    if prompts[0] != prompts[-1] or any(message not in prompts[0] for message in start):
        raise ValueError("prompts differ")
    if columns == ["chosen", "rejected"] and not prompts[0]:
        raise ValueError("no '\\n\\nAssistant:' and no prompt")
    if not all(response.strip() for response in responses):
        raise ValueError("empty response")
    return prompts[0], responses


def render(prompt, answer, tokenizer):
    """Returns the prompt as the chat template writes it, and what it writes behind the answer."""
    options = {"tokenize": False, "enable_thinking": False}  # the data has answers without thoughts
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
        answered = [*prompt, {"role": "assistant", "content": answer}]
        complete = tokenizer.apply_chat_template(answered, **options)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template fails: {' '.join(str(error).split())[:100]}") from error
    start, complete = "".join((text + answer).split()), "".join(complete.split())
    if not complete.startswith(start):  # it loses a text, or a model would be asked by another prompt
        raise ValueError("the chat template does not continue its own prompt with the answer")
    return text, complete.removeprefix(start)


def convert(rows, columns, chat, eos, tokenizer):
    """Returns the rows as they are written, {reason: number of rows dropped}, and EOS if it was not given."""
    bos = tokenizer.bos_token if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    written, dropped = [], Counter()
    for row in tqdm(rows, "rows", disable=None):
        try:
            prompt, responses = parse(row, columns)
            if isinstance(prompt, list) != chat:
                raise ValueError("text among conversations, or the reverse")
            if chat:
                text, behind = [render(prompt, answer, tokenizer) for answer in responses or ["yes"]][-1]
                eos = eos or (re.findall("|".join(special), behind) or [tokenizer.eos_token])[0]
            else:  # the first token of a response needs a token before it
                text = bos + prompt.removeprefix(bos) or tokenizer.bos_token or eos
            responses = [response.removesuffix(eos) for response in responses]
            if any(eos in response or not response.strip() for response in responses):
                raise ValueError("EOS inside a response, or nothing but EOS")
            if len(set(responses)) < len(responses):
                raise ValueError("chosen and rejected are the same")
            "".join([text, *responses]).encode()  # half a surrogate pair raises UnicodeError, a ValueError
            written.append(dict(zip(WRITTEN[len(responses)], [text, *responses])))
        except ValueError as reason:
            dropped[str(reason)] += 1
    return written, dict(dropped.most_common()), eos


def hold_out(rows, splits):
    """Moves 5% of rows["train"], 500 at most, to each of `splits`. All rows of a prompt go the same way."""
    train, keys = rows["train"], [row["prompt"] for row in rows["train"]]
    if len(set(keys)) == 1:  # texts have the empty prompt, so that what follows tells them apart
        keys = [json.dumps(row) for row in train]
    count, home = Counter(keys), dict.fromkeys(keys, "train")
    order, size = list(count), max(min(len(train) // 20, 500), min(count.values()))
    random.Random(0).shuffle(order)
    for split in splits:
        room = size
        for key in order:
            if home[key] == "train" and count[key] <= room:
                home[key], room = split, room - count[key]
    for split in ["train", *splits]:
        rows[split] = [row for row, key in zip(train, keys) if home[key] == split]
        check(rows[split], f"train has too few prompts to hold out {splits}; add rows")


# ----------------------------------------------------------------------------------------- the output folder
def is_plain(folder):
    """Tells whether data.py has written the files in this folder."""
    record = folder / "data.json"
    return record.is_file() and '"eos_token": "' in record.read_text(encoding="utf-8", errors="replace")


def check_output(folder, args):
    """Checks that the output folder is free, or that data.py has written all that is in it."""
    check(folder.is_dir() or not os.path.lexists(folder), f"{folder} is no folder; give another --output_dir")
    names, new = {path.name for path in folder.glob("*")}, {f"{name}.new" for name in FILES}
    ours = names <= {*FILES, *new} and (is_plain(folder) or names & new)  # a killed run leaves .new files
    check(ours or not names, f"{folder} holds files that data.py did not write; give another --output_dir")
    check(args.overwrite or "data.json" not in names, f"{folder} was written before; give --overwrite")


def describe(rows, eos, tokenizer, args):
    """Prints three rows as the model will see them, and lengths in tokens. Returns the next command."""
    for row in rows[:3]:
        for column, text in row.items():
            text = text if len(text) <= 200 else f"{text[:100]} [...] {text[-100:]}"
            print(f"{column:10} {text!r}", "" if column == "prompt" else f"+ {eos!r}")  # repr shows line ends
    stage = "p3o.py" if len(rows[0]) == 1 else f"sft.py --model {shlex.quote(args.model)}"
    command = f"python {stage} --dataset {shlex.quote(args.output_dir)}"
    sample = rows[:: len(rows) // 5000 + 1]  # all rows might take minutes
    for name, columns in [("prompt", ["prompt"]), ("response", list(rows[0])[1:])][: len(rows[0])]:
        texts = [row[column] + eos * (name == "response") for row in sample for column in columns]
        n = sorted(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        most = n[len(n) * 95 // 100]
        print(f"--{name}_length: {most} tokens hold 95% of {len(n)} texts, {n[-1]} hold all")
        command += f" --{name}_length {most}"
    return command


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    transformers.logging.set_verbosity_error()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some characters of the data
    check(args.dataset and args.model and args.output_dir, "give --dataset, --model and --output_dir")
    source, folder = Path(args.dataset), Path(args.output_dir)
    plain = is_plain(source if source.is_dir() else source.parent)
    check(not plain, f"{source} is in the plain format already; give it to sft.py or a later script")
    check_output(folder, args)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}; give a --model that has a tokenizer")
    check(tokenizer.eos_token, f"the tokenizer of {args.model} has no EOS; give another --model")
    data, columns = read_data(args)
    chats = [any(isinstance(row.get(column), list) for column in columns) for row in data["train"]]
    chat = 2 * sum(chats) > len(chats)
    rows, counts, eos = {}, {}, None if chat else tokenizer.eos_token
    for split, part in data.items():
        rows[split], dropped, eos = convert(part, columns, chat, eos, tokenizer)
        counts[split] = {"in": len(part), "written": len(rows[split]), "dropped": dropped}
        lost = f"{sum(dropped.values())} dropped {dropped or ''}"
        check(rows[split], f"no row of {split} is left, {lost}; mend the rows, or give another --model")
        print(f"{split}: {len(part)} rows in = {len(rows[split])} written + {lost}")
    hold_out(rows, [split for split in KINDS if split not in rows])
    about = {"dataset": args.dataset, "model": args.model, "rows": counts, "eos_token": eos}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(FILES, [*(rows[split] for split in KINDS), [about]]):
        with open(folder / f"{name}.new", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=row is about) + "\n" for row in part)
    for name in FILES:  # an old or a new file stands in its place at every moment; data.json comes last
        os.replace(folder / f"{name}.new", folder / name)
    command = describe(rows["train"], eos, tokenizer, args)
    print(f"{folder}: {', '.join(f'{len(rows[split])} {split}' for split in KINDS)} rows; next: {command}")


if __name__ == "__main__":
    usage = "python data.py --dataset NAME_OR_PATH --model MODEL --output_dir data/NAME [--flag value ...]"
    parser = transformers.HfArgumentParser(Args, usage=usage, allow_abbrev=False)
    main(Args(**vars(parser.parse_args())))
