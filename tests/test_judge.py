"""judge.py against a real HTTP server on loopback: fair, biased, silly or failing. HF_HUB_OFFLINE is set."""

import argparse
import functools
import html
import itertools
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_plus

import pytest
import torch
from conftest import ROOT, run_script

import judge

KEY = "sk-very-secret-0123456789"
SHOWN = re.compile(r"<response_A>(.*)</response_A>\n<response_B>(.*)</response_B>", re.DOTALL)
GOOD_AND_BAD = {"sft": ["bad", "poor"] * 6, "p3o": ["a much better one", "a much, much better one"] * 6}
NUMBERED = {"sft": [f"{i}" for i in range(12)], "p3o": [f"better {i}" for i in range(12)]}


def fair(first, second, n):
    return "TIE" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


class Server:
    """A chat endpoint that answers judge(first, second, number of the request): a text, parts or (status, text)."""

    def __init__(self, judge, delay=0.0):
        self.judge, self.questions, self.requests, self.headers = judge, [], [], []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.questions.append(body["messages"][-1]["content"])
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    shown = SHOWN.search(outer.questions[-1]).groups()
                    verdict = outer.judge(*shown, len(outer.requests))
                time.sleep(delay)
                answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": verdict}}]})
                status, text = verdict if isinstance(verdict, tuple) else (200, answer)
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{http.server_port}/v1"
        threading.Thread(target=http.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):  # questions come one by one, and again after a moment
    monkeypatch.setattr(judge, "JUDGE_WAITS", (0.02, 0.04, 0.08))
    monkeypatch.setattr(judge, "JUDGE_WORKERS", 1)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    return Server


def write_answers(folder, texts, S=2, gold=False):
    """answers.jsonl as far as judge.py reads it; texts: {policy: [responses]}, S a prompt."""
    header = {"samples_per_prompt": S, "num_prompts": len(texts["sft"]) // S}
    rows = [header | {"policies": {name: f"out/{name}" for name in texts if name != "sft"}}]
    for name, responses in texts.items():
        for i, text in enumerate(responses):
            row = {"policy": name, "prompt_id": i // S, "prompt": f"prompt {i // S} with {{braces}}"}
            rows.append(row | {"response": text} | ({"gold_reward": 1.0} if gold else {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(input_dir, url, **options):
    options = {"judge_model": "some/judge", "judge_criteria": None, "judge_samples": None} | options
    return argparse.Namespace(**{"input_dir": str(input_dir), "judge_base_url": url} | options)


def ask(server, folder, texts=GOOD_AND_BAD, S=2, gold=False, **options):
    write_answers(folder, texts, S, gold)
    judge.main(arguments(folder, server.url, **options))
    return json.loads((folder / "judge.json").read_text())


def fails(server, folder, **options):
    with pytest.raises(SystemExit) as error:
        ask(server, folder, **options)
    line = error.value.code
    assert line.startswith("error: ") and "\n" not in line and KEY not in line
    assert not (folder / "judge.json").exists()
    return line


def rate(result, a="p3o", b="sft"):
    return result["policies"][a]["win_rate_vs"][b]


def test_a_fair_judge_sees_all_responses_in_both_orders_and_finds_the_better_policy(serve, tmp_path):
    """The script from end to end. HF_HUB_OFFLINE is set, and a local judge is asked all the same."""
    server, folder = serve(fair), tmp_path / "out/evaluation"
    write_answers(folder, NUMBERED)
    run = run_script("judge.py", "--judge_base_url", server.url, "--judge_model", "some/judge", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    line = "p3o against sft: 1.000 [1.000, 1.000], ties 0.000"
    result = json.loads((folder / "judge.json").read_text())
    assert run.stdout.splitlines()[0] == line and line in (folder / "judge.md").read_text()
    assert rate(result) == [1.0, 1.0, 1.0] and rate(result, "sft", "p3o") == [0.0, 0.0, 0.0]
    assert (result["model"], result["pairs"], result["unparsable"]) == ("some/judge", 12, 0)
    shown, pairs = [SHOWN.search(text).groups() for text in server.questions], [*zip(*NUMBERED.values())]
    assert len(shown) == 24 and set(shown) == {*pairs, *((b, a) for a, b in pairs)}
    assert sum("prompt 3 with {braces}" in text for text in server.questions) == 4
    for body in server.requests:  # no temperature, which some judges refuse
        assert body | {"model": "some/judge", "stream": False} == body and len(body) == 3


def test_a_preference_for_a_place_cancels_and_ties_count_half(serve, tmp_path):
    clear, same = {"sft": ["x"] * 6, "p3o": ["xx"] * 6}, dict.fromkeys(("sft", "p3o"), ["same length"] * 6)
    mixed = {"sft": ["x"] * 6, "p3o": ["x" * 90] * 2 + ["xx"] * 4}
    cases = [
        (lambda *_: "A", clear, 1 / 2, 1),
        (lambda a, b, n: "B" if len(b) > 50 else "A", mixed, 4 / 6, 4 / 6),  # 2 pairs won, 4 tied
        (fair, same, 1 / 2, 1),
        (lambda *args: [{"type": "thinking", "thinking": "B"}, {"text": fair(*args)}], clear, 1, 0),
        (lambda a, b, n: "TIE" if len(a) > len(b) else "B", clear, 1, 0),  # a win beside a tie is a win
    ]
    for answer, texts, expected, ties in cases:  # each at a port of its own, so not from the cache
        result = ask(serve(answer), tmp_path, texts, S=1)
        assert rate(result)[0] == pytest.approx(expected)
        assert result["policies"]["sft"]["tie_rate_vs"]["p3o"] == pytest.approx(ties)


def test_every_two_policies_meet(serve, tmp_path):
    lengths = torch.randint(1, 9, (3, 24), generator=torch.Generator().manual_seed(0)).tolist()
    texts = {name: ["x" * n for n in own] for name, own in zip(("sft", "a", "b"), lengths)}
    result = ask(serve(fair), tmp_path, texts, S=3)
    for a, b in itertools.permutations(texts, 2):
        pairs = [(len(x) > len(y)) + (x == y) / 2 for x, y in zip(texts[a], texts[b])]
        by_prompt = [statistics.mean(pairs[i : i + 3]) for i in range(0, 24, 3)]
        value, low, high = rate(result, a, b)
        assert value == pytest.approx(statistics.mean(pairs))
        assert min(by_prompt) < low < value < high < max(by_prompt)
        assert result["policies"][a]["tie_rate_vs"][b] == pytest.approx(pairs.count(0.5) / 24)
    assert result["pairs"] == 3 * 24


def test_fewer_samples_and_other_criteria_when_asked(serve, tmp_path):
    server, options = serve(fair), {"judge_samples": 1, "judge_criteria": "length alone"}
    assert ask(server, tmp_path, NUMBERED, gold=True, **options)["pairs"] == 6
    assert all("better 1<" not in text and "counts: length alone." in text for text in server.questions)
    for gold, said in ((False, "helpful, harmless"), (True, "the place and the aspect")):
        assert said in ask(server, tmp_path, gold=gold)["criteria"] and said in server.questions[-1]


def test_what_can_be_read():
    values = dict.fromkeys(["A", " A\n", "[[A]]", "A.", "<think>A or B?\nB is longer.</think>\n\nA"], 1)
    values |= dict.fromkeys(["B", "**B**", "__B__"], 0)
    values |= dict.fromkeys(["TIE", '"TIE"', "no opening tag </think>**TIE**"], 0.5)
    assert {text: judge.parse_verdict(text) for text in values} == values
    unreadable = ["", "C", "a", "A or B", "AB", "TIED", "Answer: A", "A is better", "A\nB", "I pick B"]
    for text in [*unreadable, "<think>A", "<think>A</think>", "A</think>", "<think>B</think>A or B"]:
        assert math.isnan(judge.parse_verdict(text)), text
    for key, verdict in itertools.product(["A", "B", "TIE", "x", "none", "EMPTY"], ["A", "B", "TIE"]):
        assert judge.hide(verdict, key) == verdict, "a key that is no secret changes no verdict"


def test_nonsense_is_counted_and_never_guessed(serve, tmp_path):
    result = ask(serve(lambda *_: "Response A is better, I think"), tmp_path)
    assert result["unparsable"] == result["pairs"] == 12 and rate(result) == [None, None, None]
    result = ask(serve(lambda a, b, n: "AB" if "3" in a or b == "5" else fair(a, b, n)), tmp_path, NUMBERED)
    assert result["unparsable"] == 2 and rate(result)[0] == 1.0


def test_an_empty_answer_is_counted_now_and_asked_again_by_the_next_run(serve, tmp_path):
    for empty in (None, " \n", []):
        server = serve(lambda a, b, n: empty if n <= 3 else fair(a, b, n))
        first, second = ask(server, tmp_path), ask(server, tmp_path)
        assert first["unparsable"] >= 2 and second["unparsable"] == 0 and len(server.requests) == 24 + 3
        assert rate(first)[0] == rate(second)[0] == 1.0


def test_what_fails_now_and_then_is_asked_again_after_longer_and_longer(serve, tmp_path):
    failures = itertools.cycle([500, 429, 408])
    server = serve(lambda a, b, n: (next(failures), "busy") if n % 3 == 0 else fair(a, b, n))
    assert rate(ask(server, tmp_path / "0", NUMBERED))[0] == 1.0 and len(server.requests) == 24 + 11  # of 35
    server, start = serve(lambda *_: (500, "out of order")), time.perf_counter()
    line = fails(server, tmp_path)
    assert len(set(server.questions[:4])) == 1 and len(server.requests) <= 5  # the fifth: another question
    assert time.perf_counter() - start > 0.14 and "HTTP 500: out of order" in line and "run again" in line
    server.url = "http://127.0.0.1:9/v1"  # where nobody listens
    assert "ConnectError" in fails(server, tmp_path)


def test_a_refused_question_is_unparsable_once_others_were_answered_and_asked_again(serve, tmp_path):
    server = serve(lambda a, b, n: (400, "content filter") if "7" in a else fair(a, b, n))
    result = ask(server, tmp_path, NUMBERED)
    assert result["unparsable"] == 1 and rate(result)[0] == 1.0 and len(server.requests) == 24
    server.judge = fair  # "7" and "better 7", shown first, are asked again
    assert ask(server, tmp_path, NUMBERED)["unparsable"] == 0 and len(server.requests) == 24 + 2


def test_a_failing_judge_keeps_the_answers_before_it_and_odd_lines_are_passed_over(serve, tmp_path):
    server = serve(lambda a, b, n: (401, "no credit") if n == 9 else fair(a, b, n))
    fails(server, tmp_path, texts=NUMBERED)
    time.sleep(0.3)
    asked = len(server.requests)  # 9, or 10: one was under way, and its answer is lost
    with open(tmp_path / "judge.jsonl", "ab") as file:  # the last line was killed while writing
        file.write(b'\n{"question": ["x"], "answer": "A"}\n{}\n[1]\nnull\n\xff\x00\n{"question": "x')
    server.judge = fair
    first, second = ask(server, tmp_path, NUMBERED), ask(server, tmp_path, NUMBERED)
    assert len(server.requests) == asked + 24 - 8 and rate(first)[0] == 1.0 and second == first


def test_eight_questions_at_a_time_and_ctrl_c_ends_the_program_while_they_wait(serve, tmp_path):
    write_answers(tmp_path, NUMBERED)
    server = serve(fair, delay=60)
    command = [sys.executable, ROOT / "judge.py", "--input_dir", tmp_path, "--judge_base_url", server.url]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    options = {"stderr": subprocess.PIPE, "preexec_fn": heed}
    with subprocess.Popen([*command, "--judge_model", "m"], **options) as program:
        while len(server.requests) < 8 and program.poll() is None:
            time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        _, printed = program.communicate(timeout=20)
    assert program.returncode == -signal.SIGINT and printed.strip().endswith(b"KeyboardInterrupt")
    assert len(server.requests) == 8


def test_another_judge_endpoint_or_question_is_not_answered_from_the_cache(serve, tmp_path):
    ask(serve(fair), tmp_path)
    server, asked = serve(fair), []  # another port
    for options in ({}, {"judge_model": "another/judge"}, {"judge_criteria": "length"}, {"texts": NUMBERED}):
        for _ in range(2):
            ask(server, tmp_path, **options)
            asked.append(len(server.requests))
    assert asked == [24, 24, 48, 48, 72, 72, 96, 96]


def test_the_key_is_in_the_header_and_in_no_file(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", f"\t{KEY}\r\n")  # read from a file
    server = serve(lambda a, b, n: f"your key is {KEY}" if n == 1 else fair(a, b, n))
    ask(server, tmp_path)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 4 and not any(KEY in text for text in [*texts, *capsys.readouterr()])
    assert not any(server.url in text for text in texts)  # it may hold a password
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")  # without a key the token of the hub stays at home
    server = serve(fair)
    ask(server, tmp_path)
    assert server.headers and not any("hf_the_users_own" in str(headers) for headers in server.headers)


@pytest.mark.parametrize("key", ["two\nlines", "two words", "\ufeffsk-mark", "sk-\u00e9", "sk-\x00-1"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(serve, tmp_path, monkeypatch, key):
    monkeypatch.setattr(judge.os, "environ", {"JUDGE_API_KEY": key})  # the real one holds no zero
    server = serve(fair)
    line = fails(server, tmp_path)
    assert "JUDGE_API_KEY" in line and key not in line and ascii(key)[1:-1] not in line
    assert not server.requests


SPELLINGS = [str, str.lower, html.escape, lambda key: json.dumps(json.dumps(key))]
SPELLINGS += [lambda key: repr(f"Bearer {key}\r\n".encode()), lambda key: quote_plus(quote_plus(key))]
for form in ("\\u{:04X}", "\\x{:02x}", "%{:02x}", "&#{};"):
    SPELLINGS.append(lambda key, form=form: "".join(form.format(ord(c)) for c in key))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("key", [KEY, "sk/a\"b+c=d&e<f>%g'h\\i"])
def test_no_spelling_of_the_key_is_shown_or_kept(serve, tmp_path, monkeypatch, key, spelling):
    """A server answers with it and another fails with it. No eight characters of it in a row are left."""
    monkeypatch.setenv("JUDGE_API_KEY", key)
    echo = spelling(key)
    hidden = judge.hide(f"before {echo} after", key)
    assert hidden.startswith("before ") and hidden.endswith(" after") and "***" in hidden
    assert not any(echo[i : i + 8] in hidden.replace("Bearer ", "") for i in range(3, len(echo) - 10))
    server, status = serve(lambda *_: (status, f"wrong\nkey {echo}")), 401 if key == KEY else 400
    assert f"HTTP {status}: wrong" in fails(server, tmp_path)
    assert len(set(server.questions)) == len(server.requests) <= 2, "it is not asked again"
    ask(serve(lambda a, b, n: f"A {echo}"), tmp_path)
    text = (tmp_path / "judge.jsonl").read_text() + (tmp_path / "judge.json").read_text()
    assert "***" in text and key not in text and json.dumps(echo)[1:-1] not in text


def test_wrong_input_ends_in_one_line(tmp_path):
    write_answers(tmp_path, GOOD_AND_BAD)
    wrong = [({"judge_samples": number}, "1 to 2") for number in (0, 3)]
    wrong += [
        ({"url": "localhost:8000"}, "--judge_base_url"),
        ({"input_dir": "nowhere"}, "run evaluate.py first"),
    ]
    for options, said in wrong:
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{said}[^\n]*$"):
            judge.main(arguments(**{"input_dir": tmp_path, "url": "http://x/v1"} | options))
    assert not (tmp_path / "judge.jsonl").exists()
