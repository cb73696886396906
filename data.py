"""Stage 0: your data set, in any of the formats below, to the one plain format that all scripts read.

    python data.py --dataset NAME_OR_PATH --model MODEL --output_dir data/NAME

reads a hub data set, a folder, a .json, .jsonl(.gz) or .parquet file or a save_to_disk folder. For HH-RLHF's
harmless-base/test.jsonl.gz and GPT-2's tokenizer its last line is, seconds later,
    data/hh: 2073 train, 115 validation, 115 test rows; next: python reward_model.py --dataset data/hh ...

columns, texts or conversations    become literal texts
prompt, chosen, rejected           prompt, chosen, rejected
chosen, rejected                   the same; the prompt is all but the last message or "\n\nAssistant:" turn
prompt, completion                 prompt, completion
messages                           the same; the completion is the last message
prompt                             prompt
text                               prompt, completion; the prompt is empty

A conversation is a list of {"role", "content"}. A written prompt is all that a model is to see, with BOS, if
the tokenizer adds it by habit, or with chat markup. Behind responses the scripts put EOS, nothing else: the
eos_token of data.json, in conversations the end of the assistant's turn; sft.py makes it the model's own.
"""

import json
import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoTokenizer


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    dataset: str = flag("", "hub name, folder or file")
    model: str = flag("", "the model to be trained; only its tokenizer is read")
    output_dir: str = flag("", "folder to write")
    train_split: str = flag("", "split to train on; without this and the next, the splits' names decide")
    test_split: str = flag("", "split that becomes test; empty: some of the training prompts do")
    overwrite: bool = flag(False, "replace a folder that data.py wrote")


FORMATS = "prompt+chosen+rejected", "chosen+rejected", "prompt+completion", "messages", "prompt", "text"
WRITTEN = ["prompt"], ["prompt", "completion"], ["prompt", "chosen", "rejected"]  # by number of responses
KINDS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev", "eval"}, "test": {"test"}}


def read_data(args):
    """{"train": [{column: value}, ...], ...}, for each split there is; the columns: the first of FORMATS."""
    path, todo = Path(args.dataset), "name a hub data set, JSON lines, parquet or a save_to_disk folder"
    with explained(f"cannot read data set {args.dataset!r}", todo):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = datasets.load_from_disk(args.dataset)
        elif path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(kind, data_files=args.dataset)
        else:
            data = datasets.load_dataset(args.dataset)
        data = data if isinstance(data, dict) else {str(data.split or "train"): data}
        names = choose_splits(list(data), args)
        found = set.intersection(*[set(data[name].column_names) for name in names.values()])
        columns = next((x.split("+") for x in FORMATS if found.issuperset(x.split("+"))), None)
        require(columns, f"no format has columns {sorted(found)}; rename them to {' or '.join(FORMATS)}")
        print(f"{args.dataset!r}: reading {'+'.join(columns)} of {names}")
        return {split: list(data[name].select_columns(columns)) for split, name in names.items()}


def choose_splits(names, args):
    """{"train": its name, ...}: as told, or by the words in the names (train_prefs), never by position."""
    chosen = {"train": args.train_split, "validation": "", "test": args.test_split}
    todo = f"choose from {names} by --train_split and --test_split"
    for name in [] if any(chosen.values()) else names:
        words = set(re.findall("[a-z]+", name.lower()))
        kinds = [split for split in KINDS if words & KINDS[split]]
        require(len(kinds) == 1 and not chosen[kinds[0]], f"no telling what split {name!r} is for; {todo}")
        chosen[kinds[0]] = name
    require(chosen["train"] and {*names, ""} >= {*chosen.values()}, f"no such splits: {chosen}; {todo}")
    return {split: name for split, name in chosen.items() if name}


# --------------------------------------------------------------------------------- what the model is to see
def parse(row):
    """(prompt, [response, ...]); the prompt of a conversation is a list. ValueError: why a row is no use."""
    prompt, responses = row.get("prompt", []), [row[column] for column in row if column != "prompt"]
    if not all(isinstance(value, str | list) for value in row.values()):
        raise ValueError("null or not text")
    if any(isinstance(value, list) for value in row.values()):  # responses may repeat the prompt or not
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        wholes = [prompt + part if part[0]["role"] == "assistant" else part for part in responses]
        prompts = [whole[:-1] for whole in wholes] or [prompt]
        if not all(isinstance(message["content"], str) for message in sum(wholes, prompt)):
            raise ValueError("a message that is not text")
        if any(whole[-1]["role"] != "assistant" for whole in wholes) or prompts[0][-1]["role"] == "assistant":
            raise ValueError("the last message is not the assistant's, or answers none")
        if any(message not in prompts[0] for message in prompt):
            raise ValueError("prompts differ")
        responses = [whole[-1]["content"] for whole in wholes]
    elif "prompt" in row or "text" in row:
        prompts = [prompt or ""]
    else:  # dialogues as in HH-RLHF: the last turn is the response
        parts = [response.rpartition("\n\nAssistant:") for response in responses]
        prompts, responses = [before + turn for before, turn, _ in parts], [answer for _, _, answer in parts]
        if not all(prompts):
            raise ValueError("no '\\n\\nAssistant:' and no prompt")
    if prompts[0] != prompts[-1]:
        raise ValueError("prompts differ")
    return prompts[0], responses


def end_of_turn(asked, messages, answer, tokenizer):
    """The first special token that the chat template puts behind an answer; the tokenizer's EOS if none."""
    messages = [*messages, {"role": "assistant", "content": answer}]
    answered = tokenizer.apply_chat_template(messages, tokenize=False)
    end = answer.strip()[-30:]  # a template may strip an answer, or cut its beginning
    behind = answered[len(asked) :].partition(end)[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for i in tokenizer(behind, add_special_tokens=False)["input_ids"]:
        if i in special.union(tokenizer.all_special_ids):
            return tokenizer.convert_ids_to_tokens(i)
    print("the chat template puts no special token behind an answer: EOS will end it")
    return tokenizer.eos_token


def convert(rows, chat, eos, tokenizer):
    """(rows as written, {reason: rows dropped}, EOS); where EOS is None, the first conversation tells it."""
    bos = tokenizer.bos_token if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    written, dropped = [], Counter()
    for row in rows:
        try:
            prompt, responses = parse(row)
            if isinstance(prompt, list) != chat:
                raise ValueError("text among conversations, or the reverse")
            if not all(response.strip() for response in responses):
                raise ValueError("empty response")
            if chat:
                text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                eos = eos or end_of_turn(text, prompt, [*responses, prompt[-1]["content"]][0], tokenizer)
            else:  # the first token of a response needs one before it
                text = bos + prompt.removeprefix(bos) or tokenizer.bos_token or eos
            responses = [response.removesuffix(eos) for response in responses]
            if any(eos in response or not response.strip() for response in responses):
                raise ValueError("EOS inside a response, or nothing but EOS")
            if len(set(responses)) < len(responses):
                raise ValueError("chosen and rejected are the same")
            written.append(dict(zip(WRITTEN[len(responses)], [text, *responses])))
        except ValueError as reason:
            dropped[str(reason)] += 1
        except Exception as error:  # whatever the chat template raises
            dropped[f"not a conversation for the chat template ({error})"[:160]] += 1
    return written, dict(dropped.most_common()), eos


def hold_out(rows, splits):
    """Moves 5% of rows["train"], 500 at most, to each of `splits`: a prompt with all its rows or not."""
    train, keys = rows["train"], [row["prompt"] for row in rows["train"]]
    if len(set(keys)) == 1:  # the empty prompt of texts: they are told apart by what follows
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
        require(rows[split], f"train has too few prompts to hold out {splits}; add rows")


def describe(rows, eos, tokenizer, args):
    """Prints three rows as the model will see them and lengths in tokens; returns the next command."""
    for row in rows[:3]:
        for column, text in row.items():
            text = text if len(text) <= 200 else f"{text[:100]} [...] {text[-100:]}"
            print(f"{column:10} {text!r}", "" if column == "prompt" else f"+ {eos!r}")  # repr: escaped
    stage = {1: "p3o.py", 2: f"sft.py --model {args.model}", 3: "reward_model.py"}[len(rows[0])]
    command = f"python {stage} --dataset {args.output_dir}"
    texts = {"prompt": [row["prompt"] for row in rows]}
    texts["response"] = [row[column] + eos for row in rows for column in row if column != "prompt"]
    for name in [name for name in texts if texts[name]]:
        n = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[name])
        most = n[len(n) * 95 // 100]
        print(f"--{name}_length: the median is {n[len(n) // 2]} tokens; {most} hold 95%, {n[-1]} all")
        command += f" --{name}_length {most}"
    return command


def require(condition, message, status=2):
    """If it does not hold, ends the run in one line: what is wrong; what to do. Status 2: input, 1: run."""
    if not condition:
        message = "".join(c if c.isprintable() else "?" for c in message)  # no text may drive the terminal
        print(f"error: {message}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def explained(wrong, todo, status=2):
    """Whatever is raised inside ends the run in one line: each library raises kinds of its own."""
    try:
        yield
    except Exception as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
        require(False, f"{wrong} ({reason}); {todo}", status)


def guard(main, args_class):
    """Command line -> main(args). What a user can mend ends the run in one line, not in a traceback."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(60)  # above CRITICAL: what it reports as errors, we raise
    with explained("cannot read the command line", "see --help"):
        parser = transformers.HfArgumentParser(args_class, allow_abbrev=False, exit_on_error=False)
        (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    try:
        main(args)
    except KeyboardInterrupt:
        require(False, "interrupted; what was saved is kept", 130)
    except torch.OutOfMemoryError:
        require(False, "out of memory; lower --micro_batch_size, which may change on --resume, or lengths", 1)


# ------------------------------------------------------------------------------------------------------ main
def main(args):
    require(args.dataset and args.model and args.output_dir, "too few flags are given; see --help")
    folder, elsewhere = Path(args.output_dir), "choose another --output_dir"
    files = {path.name for path in folder.glob("*")}
    ours = "data.json" in files and files <= {"data.json", *(f"{split}.jsonl" for split in KINDS)}
    require(ours or not (files or folder.is_file()), f"{folder} holds other files; {elsewhere}")
    require(args.overwrite or not files, f"{folder} was written before; give --overwrite, or {elsewhere}")
    with explained(f"cannot load a tokenizer from {args.model!r}", "name another --model"):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    require(tokenizer.eos_token, f"the tokenizer of {args.model!r} has no EOS; name another --model")
    # 1. Read and convert the splits there are, and hold out rows for the others.
    data, rows, dropped = read_data(args), {}, {}
    chat = any(isinstance(value, list) for row in data["train"] for value in row.values())
    eos = None if chat else tokenizer.eos_token
    for split, part in data.items():
        rows[split], dropped[split], eos = convert(part, chat, eos, tokenizer)
        lost = f"{len(part) - len(rows[split])} dropped {dropped[split] or ''}"
        require(rows[split], f"no row of {split} is left, {lost}; mend them, or change --model")
        print(f"{split}: {len(part)} rows in = {len(rows[split])} written + {lost}")
    hold_out(rows, [split for split in KINDS if split not in rows])
    for split in ["validation", "test"]:
        shared = {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows[split]}
        print(f"{split}: {len(rows[split])} rows; {len(shared)} of their prompts are in train, too")
    # 2. Show the rows, write them beside, and move them into place: the folder is there whole or not at all.
    command = describe(rows["train"], eos, tokenizer, args)
    sizes = {split: len(part) for split, part in rows.items()}
    counts = {"in": {split: len(part) for split, part in data.items()}, "written": sizes, "dropped": dropped}
    about = {"dataset": args.dataset, "model": args.model, "eos_token": eos, "rows": counts}
    with explained(f"cannot write {folder}", f"make room, or {elsewhere}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".data_") as beside:
            new = Path(beside, "new")
            new.mkdir()
            for split, part in rows.items():
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
                (new / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            (new / "data.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
            if folder.exists():
                folder.rename(Path(beside, "old"))
            new.rename(folder)
    print(f"{folder}: {', '.join(f'{sizes[split]} {split}' for split in KINDS)} rows; next: {command}")


if __name__ == "__main__":
    guard(main, Args)
