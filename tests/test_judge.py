"""judge.py against a real HTTP server on loopback: fair, biased, silly or failing. HF_HUB_OFFLINE is set."""

import argparse
import html
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, run_script

import judge

KEY = "sk-very-secret-0123456789"
SHOWN = re.compile(r"<response_A>(.*)</response_A>\n<response_B>(.*)</response_B>", re.DOTALL)
GOOD_AND_BAD = {"sft": ["bad", "poor"] * 6, "p3o": ["a much better one", "a much, much better one"] * 6}


def fair(first, second, n):
    return "TIE" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


class Server:
    """A chat endpoint that answers judge(first, second, number of the request): a text, a list of parts, or
    (status, text); after `delay` seconds."""

    def __init__(self, judge, delay=0.0):
        self.judge, self.requests, self.headers, self.at_once, lock = judge, [], [], [0, 0], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.at_once = [outer.at_once[0] + 1, max(outer.at_once[1], outer.at_once[0] + 1)]
                    content = body["messages"][-1]["content"]
                    verdict = outer.judge(*SHOWN.search(content).groups(), len(outer.requests))
                time.sleep(delay)
                message = {"role": "assistant", "content": verdict}
                answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                answer |= {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                status, text = verdict if isinstance(verdict, tuple) else (200, json.dumps(answer))
                with lock:
                    outer.at_once[0] -= 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.close = self.http.server_close
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Starts a Server. Questions come one by one, and again after a moment, unless a test says otherwise."""
    servers = []
    monkeypatch.setattr(judge, "JUDGE_WAITS", (0.01, 0.02, 0.03))
    monkeypatch.setattr(judge, "JUDGE_WORKERS", 1)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)

    def start(*args, **options):
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.close()


def write_answers(folder, texts, S=2, gold=False):
    """answers.jsonl as far as judge.py reads it; texts: {policy: [responses]}, S a prompt."""
    rows = []
    for name, responses in texts.items():
        for i, text in enumerate(responses):
            row = {"policy": name, "prompt_id": i // S, "prompt": f"prompt {i // S} with {{braces}}"}
            row |= {"response": text, "reward": 0.0, "logp": dict.fromkeys(texts, -1.0), "kl_exact": 0.0}
            rows.append(row | {"length": 3, "ended": True} | ({"gold_reward": 1.0} if gold else {}))
    folder.mkdir(parents=True, exist_ok=True)
    header = {"samples_per_prompt": S, "num_prompts": len(next(iter(texts.values()))) // S}
    header["policies"] = {name: f"out/{name}" for name in texts if name != "sft"}
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))


def arguments(input_dir, url, **options):
    options = {"judge_model": "some/judge", "judge_criteria": None, "judge_samples": None} | options
    return argparse.Namespace(**{"input_dir": str(input_dir), "judge_base_url": url} | options)


def ask(server, folder, texts=GOOD_AND_BAD, S=2, gold=False, **options):
    """main on answers that are these texts; judge.json."""
    write_answers(folder, texts, S, gold)
    judge.main(arguments(folder, server.url, **options))
    text = (folder / "judge.json").read_text()
    assert "NaN" not in text
    return json.loads(text)


def fails(server, folder, **options):
    """The one line in which main ends."""
    with pytest.raises(SystemExit) as error:
        ask(server, folder, **options)
    line = error.value.code
    assert line.startswith("error: ") and "\n" not in line and KEY not in line
    assert not (folder / "judge.json").exists()
    return line


def contents(server):
    return [body["messages"][-1]["content"] for body in server.requests]


def rate(result, a="p3o", b="sft"):
    return result["policies"][a]["win_rate_vs"][b]


# ------------------------------------------------------------------------------------------------- win rates
def test_a_fair_judge_sees_all_responses_in_both_orders_and_finds_the_better_policy(serve, tmp_path, capsys):
    server = serve(fair)
    texts = {"sft": [f"bad {i}" for i in range(12)], "p3o": [f"much better {i}" for i in range(12)]}
    result = ask(server, tmp_path, texts)
    assert rate(result) == [1.0, 1.0, 1.0] and rate(result, "sft", "p3o") == [0.0, 0.0, 0.0]
    assert (result["model"], result["pairs"], result["unparsable"]) == ("some/judge", 12, 0)
    shown = [SHOWN.search(text).groups() for text in contents(server)]
    pairs = list(zip(texts["p3o"], texts["sft"]))
    assert len(shown) == 24 and set(shown) == {*pairs, *((b, a) for a, b in pairs)}
    assert all("prompt 3 with {braces}" in text for text in contents(server)[6:8])
    sent = {"model": "some/judge", "stream": False}  # no temperature, which some judges refuse
    assert all(body | sent == body and set(body) == {*sent, "messages"} for body in server.requests)
    assert "p3o against sft: 1.000 [1.000, 1.000], ties 0.000" in capsys.readouterr().out
    report = (tmp_path / "judge.md").read_text()
    assert "some/judge" in report and "- p3o against sft: 1.000" in report and "12 pairs, 0 of them" in report


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_preference_for_a_place_cancels(serve, tmp_path, place):
    result = ask(serve(lambda *_: place), tmp_path)
    assert rate(result) == [0.5, 0.5, 0.5] and result["policies"]["sft"]["tie_rate_vs"]["p3o"] == 1.0


def test_a_biased_judge_that_sees_a_difference_still_counts(serve, tmp_path):
    """It says A unless B is much longer: 2 pairs of 6 won in both orders, 4 decided by the place alone."""
    texts = {"sft": ["x"] * 6, "a": ["x" * 90] * 2 + ["xx"] * 4}
    result = ask(serve(lambda a, b, _: "B" if len(b) > 50 else "A"), tmp_path, texts, S=1)
    assert rate(result, "a")[0] == pytest.approx((2 + 4 / 2) / 6)
    assert result["policies"]["a"]["tie_rate_vs"]["sft"] == pytest.approx(4 / 6)


def test_ties_count_half_and_a_win_beside_a_tie_is_a_win(serve, tmp_path):
    same = {name: ["same length"] * 6 for name in ("sft", "p3o")}
    assert rate(ask(serve(fair), tmp_path, same)) == [0.5, 0.5, 0.5]
    server = serve(lambda a, b, n: "TIE" if len(a) > len(b) else "B")
    assert rate(ask(server, tmp_path / "b"))[0] == 1.0


def test_every_two_policies_meet_and_the_interval_is_over_prompts(serve, tmp_path):
    """Against a naive count, with answers that differ from prompt to prompt."""
    lengths = torch.randint(1, 9, (3, 24), generator=torch.Generator().manual_seed(0)).tolist()
    texts = {name: ["x" * n for n in own] for name, own in zip(("sft", "a", "b"), lengths)}
    result = ask(serve(fair), tmp_path, texts, S=3)
    for a, b in itertools.permutations(texts, 2):
        score = {True: 1.0, False: 0.0}
        pairs = [0.5 if x == y else score[len(x) > len(y)] for x, y in zip(texts[a], texts[b])]
        by_prompt = [statistics.mean(pairs[i : i + 3]) for i in range(0, 24, 3)]
        value, low, high = rate(result, a, b)
        assert value == pytest.approx(statistics.mean(pairs))
        rows = torch.randint(8, (1000, 8), generator=torch.Generator().manual_seed(0)).tolist()
        means = torch.tensor([statistics.mean(by_prompt[i] for i in row) for row in rows])
        assert [low, high] == pytest.approx(means.quantile(torch.tensor([0.025, 0.975])).tolist(), abs=1e-5)
        assert result["policies"][a]["tie_rate_vs"][b] == pytest.approx(pairs.count(0.5) / 24)
    assert result["pairs"] == 3 * 24


def test_fewer_samples_when_asked(serve, tmp_path):
    server = serve(lambda a, b, n: "A" if "first" in a else "B")
    texts = {"sft": ["x1", "y"] * 3, "p3o": ["first", "second"] * 3}
    result = ask(server, tmp_path, texts, judge_samples=1)
    assert result["pairs"] == 3 and rate(result)[0] == 1.0
    assert not any("second" in body["messages"][0]["content"] for body in server.requests)


def test_criteria(serve, tmp_path):
    for folder, options, said in (
        ("a", {}, "helpful, harmless"),
        ("b", {"gold": True}, "the place and the aspect"),
        ("c", {"judge_criteria": "length alone", "gold": True}, "What counts: length alone."),
    ):
        server = serve(fair)
        result = ask(server, tmp_path / folder, **options)
        assert all(said in body["messages"][0]["content"] for body in server.requests)
        assert result["criteria"] in server.requests[0]["messages"][0]["content"]


# --------------------------------------------------------------------------------------------------- verdicts
def test_what_can_be_read():
    values = {
        "A": 1,
        "B": 0,
        "TIE": 0.5,
        " A\n": 1,
        "**B**": 0,
        "[[A]]": 1,
        "A.": 1,
        '"TIE"': 0.5,
        "__B__": 0,
    }
    values |= {"<think>A or B?\nB is longer.</think>\n\nA": 1, "no opening tag </think>**TIE**": 0.5}
    assert {text: judge.parse_verdict(text) for text in values} == values
    unreadable = ["", "C", "a", "A or B", "AB", "TIED", "Answer: A", "A is better", "A\nB", "I pick B"]
    for text in [*unreadable, "<think>A", "<think>A</think>", "A</think>", "<think>B</think>A or B"]:
        assert judge.parse_verdict(text) != judge.parse_verdict(text), text  # NaN


def test_nonsense_is_counted_and_never_guessed(serve, tmp_path, capsys):
    result = ask(serve(lambda *_: "Response A is better, I think"), tmp_path)
    assert result["unparsable"] == result["pairs"] == 12 and rate(result) == [None, None, None]
    assert "p3o against sft: -, ties -" in capsys.readouterr().out
    texts = {"sft": [f"{i}" for i in range(12)], "p3o": [f"better {i}" for i in range(12)]}
    server = serve(lambda a, b, n: "AB" if "3" in a or b == "5" else fair(a, b, n))
    result = ask(server, tmp_path / "part", texts)
    assert result["unparsable"] == 2 and rate(result)[0] == 1.0


def test_answers_in_parts_and_empty_ones(serve, tmp_path):
    def parts(a, b, n):
        letter = fair(a, b, n)
        return [
            {"type": "thinking", "thinking": "B"},
            {"type": "text", "text": letter[0]},
            {"text": letter[1:]},
        ]

    assert rate(ask(serve(parts), tmp_path))[0] == 1.0


@pytest.mark.parametrize("empty", [None, "", " \n", []])
def test_an_empty_answer_is_counted_now_and_asked_again_by_the_next_run(serve, tmp_path, empty):
    server = serve(lambda a, b, n: empty if n <= 3 else fair(a, b, n))
    first = ask(server, tmp_path)
    assert first["unparsable"] >= 2 and rate(first)[0] == 1.0 and len(server.requests) == 24
    second = ask(server, tmp_path)
    assert second["unparsable"] == 0 and rate(second)[0] == 1.0 and len(server.requests) == 27
    path = tmp_path / "judge.jsonl"  # an older judge.py has kept an empty answer
    lines = [line for line in path.read_text().split("\n") if line]
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"answer": ""}), *lines[1:]]))
    assert ask(server, tmp_path)["unparsable"] == 0 and len(server.requests) == 28


# --------------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize("status", [500, 429, 503, 408])
def test_what_fails_now_and_then_is_asked_again(serve, tmp_path, status):
    texts = {"sft": [f"{i}" for i in range(12)], "p3o": [f"better {i}" for i in range(12)]}
    server = serve(lambda a, b, n: (status, "busy") if n % 3 == 0 else fair(a, b, n))
    assert rate(ask(server, tmp_path, texts))[0] == 1.0
    assert len(server.requests) == 24 + 11  # every third of 35


def test_it_waits_longer_each_time_and_ends(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_WAITS", (0.02, 0.04, 0.08))
    server, start = serve(lambda *_: (500, "out of order")), time.perf_counter()
    line = fails(server, tmp_path)
    assert len(set(contents(server)[:4])) == 1 and len(server.requests) <= 5  # the fifth: another question
    assert time.perf_counter() - start > 0.14 and "HTTP 500: out of order" in line and "run again" in line


@pytest.mark.parametrize("status", [401, 404, 400])
def test_a_wrong_key_or_name_is_not_asked_again_and_the_server_says_why(serve, tmp_path, status):
    reason = json.dumps({"error": {"message": f"no such model,\n{KEY} or not"}})
    server = serve(lambda *_: (status, reason))
    line = fails(server, tmp_path)
    assert len(set(contents(server))) == len(server.requests) <= 2
    assert f"HTTP {status}: " in line and "no such model" in line


def test_a_refused_question_is_unparsable_once_others_were_answered_and_asked_again(serve, tmp_path):
    texts = {"sft": [f"{i}" for i in range(12)], "p3o": [f"better {i}" for i in range(12)]}
    server = serve(lambda a, b, n: (400, "content filter") if "7" in a else fair(a, b, n))
    result = ask(server, tmp_path, texts)
    assert result["unparsable"] == 1 and rate(result)[0] == 1.0 and len(server.requests) == 24
    server.judge = fair
    assert (
        ask(server, tmp_path, texts)["unparsable"] == 0 and len(server.requests) == 24 + 2
    )  # response 7 and "better 7", shown first


def test_no_server_is_one_line(serve, tmp_path):
    server = serve(fair)
    server.http.shutdown()
    server.close()
    assert "ConnectError" in fails(server, tmp_path)


def test_many_at_once_lose_nothing(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "JUDGE_WORKERS", 8)
    texts = {"sft": [f"{i}" for i in range(40)], "p3o": [f"better {i}" for i in range(40)]}
    server = serve(fair, delay=0.01)
    result = ask(server, tmp_path, texts)
    assert rate(result)[0] == 1.0 and len(server.requests) == 80 and 4 <= server.at_once[1] <= 8
    lines = (tmp_path / "judge.jsonl").read_text().split("\n")[1:]
    assert len({json.loads(line)["question"] for line in lines}) == len(lines) == 80


def test_a_failing_judge_keeps_the_answers_before_it(serve, tmp_path):
    texts = {"sft": [f"{i}" for i in range(12)], "p3o": [f"better {i}" for i in range(12)]}
    server = serve(lambda a, b, n: (401, "no credit") if n == 9 else fair(a, b, n))
    fails(server, tmp_path, texts=texts)
    time.sleep(0.3)
    asked = len(server.requests)
    assert 9 <= asked <= 10  # one was under way, and its answer is lost
    with open(tmp_path / "judge.jsonl", "a") as file:
        file.write('\n{"question": "half a li')  # killed while writing
    server.judge = fair
    first = ask(server, tmp_path, texts)
    assert len(server.requests) == asked + 24 - 8 and rate(first)[0] == 1.0
    second = ask(server, tmp_path, texts)
    assert len(server.requests) == asked + 24 - 8 and second == first


def test_every_answer_is_on_disk_soon(serve, tmp_path):
    """All answers but the last one, which may just have been sent, are there when the next question comes."""

    def look(a, b, n):
        found.append((tmp_path / "judge.jsonl").read_text().count("}"))
        return fair(a, b, n)

    found = []
    ask(serve(look, delay=0.01), tmp_path)
    assert all(n - 1 <= count <= n for n, count in enumerate(found)) and len(found) == 24


HANGING = r"""
import itertools, os, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
numbers = itertools.count()
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        drips = next(numbers) % 2
        if drips:
            self.send_response(200)
            self.end_headers()
        os.write(1, b"asked\n")
        while True:
            time.sleep(0.1)
            if drips:
                self.wfile.write(b" ")
    def log_message(self, *args): pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_ctrl_c_ends_the_program_whatever_the_server_does(tmp_path):
    """A process of its own; of eight requests half are never answered, and half get a byte now and then."""
    write_answers(tmp_path, GOOD_AND_BAD)
    server = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    command = [sys.executable, ROOT / "judge.py", "--input_dir", tmp_path, "--judge_base_url", url]
    options = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # a background job ignores it
    program = subprocess.Popen([*command, "--judge_model", "m"], stderr=subprocess.PIPE, text=True, **options)
    try:
        for _ in range(8):
            assert server.stdout.readline() == "asked\n"
        program.send_signal(signal.SIGINT)
        _, printed = program.communicate(timeout=20)
        assert program.returncode == -signal.SIGINT and "KeyboardInterrupt" in printed.splitlines()[-1]
    finally:
        program.kill()
        server.kill()
        server.wait()
        server.stdout.close()


def test_odd_lines_in_the_cache_are_passed_over(serve, tmp_path):
    rows = [
        {"question": None, "answer": None},
        {"question": ["x"], "answer": "A"},
        {"answer": "A"},
        [1],
        3,
        None,
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n\xff\x00\n" + json.dumps({"question": "x", "answer": [{}]})
    tmp_path.joinpath("judge.jsonl").write_bytes(text.encode("latin-1"))
    assert rate(ask(serve(fair), tmp_path))[0] == 1.0


def test_another_judge_endpoint_or_question_is_not_answered_from_the_cache(serve, tmp_path):
    ask(serve(fair), tmp_path)
    server = serve(fair)  # another port
    ask(server, tmp_path)
    assert len(server.requests) == 24
    ask(server, tmp_path, judge_model="another/judge")
    assert len(server.requests) == 48
    ask(server, tmp_path, judge_criteria="length alone")
    assert len(server.requests) == 72
    ask(server, tmp_path, {name: [text + "!" for text in own] for name, own in GOOD_AND_BAD.items()})
    assert len(server.requests) == 96
    ask(server, tmp_path)
    assert len(server.requests) == 96


# ---------------------------------------------------------------------------------------------------- the key
def test_the_key_is_in_the_header_and_in_no_file(serve, tmp_path, capsys):
    server = serve(
        lambda a, b, n: f"your key is {KEY}" if n == 1 else fair(a, b, n)
    )  # a server that echoes it
    result = ask(server, tmp_path)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and not any(KEY in path.read_text() for path in files)
    printed = capsys.readouterr()
    assert KEY not in json.dumps(result) + printed.out + printed.err
    assert not any(server.url in path.read_text() for path in files)  # it may hold a password


@pytest.mark.parametrize("end", ["\r\n", "\n", " ", "\t\r\n"])
def test_the_line_end_of_a_file_is_no_part_of_the_key(serve, tmp_path, monkeypatch, end):
    monkeypatch.setenv("JUDGE_API_KEY", end + KEY + end)
    server = serve(fair)
    assert rate(ask(server, tmp_path))[0] == 1.0
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", ["two\nlines", "two words", "\ufeffsk-mark", "sk-\u00e9", "sk-\x00-1"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(serve, tmp_path, monkeypatch, key):
    monkeypatch.setattr(judge.os, "environ", {"JUDGE_API_KEY": key})  # the real one holds no zero
    server = serve(fair)
    line = fails(server, tmp_path)
    assert (
        "JUDGE_API_KEY" in line and key not in line and ascii(key)[1:-1] not in line and not server.requests
    )


ODD = "sk/a\"b+c=d&e<f>%g'h\\i"
SPELLINGS = {
    "plain": lambda key: key,
    "json": lambda key: json.dumps(key),
    "json in json": lambda key: json.dumps(json.dumps(key)),
    "repr": repr,
    "bytes": lambda key: repr(f"Bearer {key}\r\n".encode()),
    "unicode escapes": lambda key: "".join(f"\\u{ord(c):04X}" for c in key),
    "hex escapes": lambda key: "".join(f"\\x{ord(c):02x}" for c in key),
    "url": lambda key: urllib.parse.quote(key),
    "url, all": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "url twice": lambda key: urllib.parse.quote_plus(urllib.parse.quote_plus(key)),
    "html": html.escape,
    "html numbers": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "lower case": str.lower,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", [KEY, ODD])
def test_no_spelling_of_the_key_is_shown_or_kept(serve, tmp_path, monkeypatch, key, spelling):
    """A server answers with it and another fails with it. No eight characters of it in a row are left."""
    monkeypatch.setenv("JUDGE_API_KEY", key)
    echo = SPELLINGS[spelling](key)
    hidden = judge.hide(f"before {echo} after", key)
    assert hidden.startswith("before ") and hidden.endswith(" after") and "***" in hidden
    assert not any(echo[i : i + 8] in hidden.replace("Bearer ", "") for i in range(3, len(echo) - 10))
    fails(serve(lambda *_: (401, f"wrong key {echo}")), tmp_path)
    ask(serve(lambda a, b, n: f"A {echo}"), tmp_path)
    text = (tmp_path / "judge.jsonl").read_text() + (tmp_path / "judge.json").read_text()
    assert "***" in text and key not in text and json.dumps(echo)[1:-1] not in text


@pytest.mark.parametrize("key", ["A", "B", "TIE", "x", "none", "EMPTY"])
def test_a_key_that_is_no_secret_changes_no_verdict(serve, tmp_path, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    result = ask(serve(fair), tmp_path)
    assert rate(result)[0] == 1.0 and result["unparsable"] == 0


def test_without_a_key_the_hub_token_stays_at_home(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    server = serve(fair)
    ask(server, tmp_path)
    assert server.headers and not any("hf_the_users_own" in str(headers) for headers in server.headers)


# ------------------------------------------------------------------------------------------------ the script
def test_the_script_from_end_to_end(serve, tmp_path):
    """HF_HUB_OFFLINE is set, as in every test: a local judge is asked all the same."""
    server = serve(fair)
    write_answers(tmp_path / "out/evaluation", GOOD_AND_BAD)
    run = run_script("judge.py", "--judge_base_url", server.url, "--judge_model", "m", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    last = "out/evaluation: 12 pairs, 0 of them without a verdict; judge.json, judge.md"
    assert run.stdout.splitlines() == ["p3o against sft: 1.000 [1.000, 1.000], ties 0.000", last]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"url": "localhost:8000"}, "give --judge_base_url http://HOST/v1"),
        ({"judge_samples": 3}, "give 1 to 2"),
        ({"judge_samples": 0}, "give 1 to 2"),
        ({"input_dir": "nowhere"}, "run evaluate.py first"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, options, said):
    write_answers(tmp_path, GOOD_AND_BAD)
    with pytest.raises(SystemExit) as error:
        judge.main(arguments(**{"input_dir": tmp_path, "url": "http://x/v1"} | options))
    assert (
        error.value.code.startswith("error: ") and said in error.value.code and "\n" not in error.value.code
    )
    assert not (tmp_path / "judge.jsonl").exists()


def test_what_it_shares_with_frontier_is_the_same():
    texts = {name: (ROOT / f"{name}.py").read_text() for name in ("frontier", "judge")}
    for function in ("check", "read_answers", "bootstrap", "show"):
        sources = [re.search(rf"^def {function}\(.*?\n\n\n", text, re.M | re.S)[0] for text in texts.values()]
        assert sources[0] == sources[1]
