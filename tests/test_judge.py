"""The judge of evaluate.py against a real HTTP server on loopback: fair, biased, silly or failing."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

import evaluate
from evaluate import RunError

KEY = "sk-very-secret-0123456789"
SHOWN = re.compile(r"<response_A>\n(.*)\n</response_A>\n<response_B>\n(.*)\n</response_B>", re.DOTALL)
EXAMPLES = [{"prompt": f"prompt {i} with {{braces}}"} for i in range(6)]
POLICIES = {  # of two responses to a prompt only the first is judged; good ones are longer
    "sft": {"text": ["bad", "never shown"] * 6},
    "p3o": {"text": ["a much better one", "never shown"] * 6},
}


def fair(first, second, n):
    return "TIE" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


class Server:
    """A chat endpoint that answers judge(first, second, number of the request); an int is an HTTP status."""

    def __init__(self, judge):
        self.judge, self.requests, self.headers = judge, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                content = body["messages"][-1]["content"]
                verdict = outer.judge(*SHOWN.search(content).groups(), len(outer.requests))
                message = {"role": "assistant", "content": verdict}
                answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                answer |= {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                text = f"no, {KEY}" if isinstance(verdict, int) else json.dumps(answer)
                self.send_response(verdict if isinstance(verdict, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    """Starts a Server; waits between attempts are recorded in server.waits, not waited."""
    servers, waits = [], []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # no request leaves the machine
    monkeypatch.setattr(evaluate.time, "sleep", waits.append)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)

    def start(judge):
        servers.append(Server(judge))
        servers[-1].waits = waits
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def ask_all(server, folder, policies=POLICIES, **options):
    args = evaluate.Args(
        output_dir=str(folder),
        dataset="no/toy",
        samples_per_prompt=2,
        judge_base_url=server.url,
        judge_model="some/judge",
        **options,
    )
    return evaluate.judge_all(policies, EXAMPLES, args)


def test_a_fair_judge_sees_both_orders_and_finds_the_better_policy(serve, tmp_path):
    server = serve(fair)
    result = ask_all(server, tmp_path)
    assert result["win_rate_vs"]["p3o"]["sft"][0] == 1.0 and result["win_rate_vs"]["sft"]["p3o"][0] == 0.0
    assert (result["pairs"], result["unparsable"], result["requests"]) == (6, 0, 12) and len(
        server.requests
    ) == 12
    contents = [body["messages"][-1]["content"] for body in server.requests]
    orders = [SHOWN.search(content).groups() for content in contents]
    assert orders.count(("bad", "a much better one")) == orders.count(("a much better one", "bad")) == 6
    assert all("prompt 3 with {braces}" in content for content in contents[6:8])
    assert {body["model"] for body in server.requests} == {"some/judge"}


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_preference_for_a_place_cancels(serve, tmp_path, place):
    result = ask_all(serve(lambda *_: place), tmp_path)
    rate, low, high = result["win_rate_vs"]["p3o"]["sft"]
    assert rate == 0.5 and low < 0.5 < high and result["unparsable"] == 0


def test_a_biased_judge_that_sees_a_difference_still_counts(serve, tmp_path):
    """It says A unless B is much longer: 2 pairs won in both orders, 4 decided by the place alone."""
    policies = {"a": {"text": ["x" * 90, ""] * 2 + ["xx", ""] * 4}, "b": {"text": ["x", ""] * 6}}
    result = ask_all(serve(lambda a, b, _: "B" if len(b) > 50 else "A"), tmp_path, policies)
    assert result["win_rate_vs"]["a"]["b"][0] == pytest.approx((2 + 4 / 2) / 6)


def test_ties_count_half(serve, tmp_path):
    policies = {name: {"text": ["same length", ""] * 6} for name in ("a", "b")}
    assert ask_all(serve(fair), tmp_path, policies)["win_rate_vs"]["a"]["b"][0] == 0.5
    server = serve(lambda a, b, n: "TIE" if len(a) > len(b) else "B")  # wins in one order, ties in the other
    assert ask_all(server, tmp_path / "b")["win_rate_vs"]["p3o"]["sft"][0] == 1.0


def test_nonsense_is_counted_and_never_guessed(serve, tmp_path):
    result = ask_all(serve(lambda *_: "Response A is better, I think"), tmp_path)
    assert result["unparsable"] == result["pairs"] == 6
    assert result["win_rate_vs"]["p3o"]["sft"] == [None, None, None]
    part = ask_all(serve(lambda a, b, n: "AB" if n in (2, 5) else fair(a, b, n)), tmp_path / "part")
    assert part["unparsable"] == 2 and part["win_rate_vs"]["p3o"]["sft"][0] == 1.0


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
    assert {text: evaluate.parse_verdict(text) for text in values} == values
    for text in ("", None, "C", "a", "A or B", "AB", "TIED", "Answer: A", "A is better", "A\nB", "I pick B"):
        assert evaluate.parse_verdict(text) is None


@pytest.mark.parametrize("status", [500, 429, 503, 408])
def test_every_third_call_fails_and_is_asked_again(serve, tmp_path, status):
    server = serve(lambda a, b, n: status if n % 3 == 0 else fair(a, b, n))
    result = ask_all(server, tmp_path)
    assert result["win_rate_vs"]["p3o"]["sft"][0] == 1.0 and result["unparsable"] == 0
    assert result["requests"] == len(server.requests) == 17 and server.waits == [1.0] * 5


def test_retries_wait_longer_each_time_and_end(serve, tmp_path):
    server = serve(lambda *_: 500)
    with pytest.raises(RunError) as error:
        ask_all(server, tmp_path)
    assert len(server.requests) == 6 and server.waits == [1, 2, 4, 8, 16]
    assert error.value.status == 1 and "run again" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("status", [401, 404, 400])
def test_a_wrong_key_or_name_is_not_asked_again(serve, tmp_path, status):
    server = serve(lambda *_: status)
    with pytest.raises(RunError, match="JUDGE_API_KEY") as error:
        ask_all(server, tmp_path)
    assert len(server.requests) == 1 and error.value.status == 2 and KEY not in str(error.value)


def test_no_server_is_one_line(serve, tmp_path):
    server = serve(fair)
    server.http.server_close()
    with pytest.raises(RunError, match="the judge fails"):
        ask_all(server, tmp_path)
    assert len(server.waits) == 5


def test_an_interrupted_evaluation_pays_nothing_twice(serve, tmp_path):
    broken = serve(lambda a, b, n: 500 if n > 7 else fair(a, b, n))
    with pytest.raises(RunError):
        ask_all(broken, tmp_path)
    with open(tmp_path / "judge.jsonl", "a") as file:
        file.write('{"question": "half a li')  # killed while writing
    server = serve(fair)
    first = ask_all(server, tmp_path)
    assert len(server.requests) == 12 - 7
    again = serve(fair)
    second = ask_all(again, tmp_path)
    assert again.requests == [] and second["requests"] == 0 and second["win_rate_vs"] == first["win_rate_vs"]
    rows = [line for line in (tmp_path / "judge.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len({json.loads(row)["question"] for row in rows}) == len(rows) == 12


def test_another_question_is_not_answered_from_the_cache(serve, tmp_path):
    ask_all(serve(fair), tmp_path)
    server = serve(fair)
    ask_all(server, tmp_path, judge_criteria="length alone")
    assert len(server.requests) == 12
    assert all("What counts: length alone" in body["messages"][-1]["content"] for body in server.requests)
    changed = {name: {"text": [text + "!" for text in policy["text"]]} for name, policy in POLICIES.items()}
    ask_all(server, tmp_path, changed)
    assert len(server.requests) == 24


def test_the_key_is_in_the_header_and_in_no_file(serve, tmp_path, capsys):
    server = serve(
        lambda a, b, n: f"your key is {KEY}" if n == 1 else fair(a, b, n)
    )  # a server that echoes it
    result = ask_all(server, tmp_path)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY in path.read_text() for path in files)
    printed = capsys.readouterr()
    assert KEY not in json.dumps(result) + printed.out + printed.err


def test_without_a_key_the_hub_token_stays_at_home(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    server = serve(fair)
    ask_all(server, tmp_path)
    assert server.headers and not any("hf_the_users_own" in str(headers) for headers in server.headers)


def test_the_verdicts_reach_the_report(serve, chain, tmp_path, monkeypatch):
    """main from end to end: the SFT model under another name, told apart by nobody, ties with itself."""
    folder = tmp_path / "chain"
    shutil.copytree(chain, folder)
    shutil.copytree(folder / "out/sft", folder / "out/twin")
    settings = {"temperature": 1.0, "prompt_length": 32, "response_length": 24, "missing_eos_penalty": 1.0}
    settings |= {"model": "out/sft", "reward_model": "out/reward_model", "beta": 0.1}
    (folder / "out/twin/args.json").write_text(json.dumps({"args": settings}))
    monkeypatch.chdir(folder)
    server = serve(fair)
    options = {"judge_base_url": server.url, "judge_model": "some/judge", "device": "cpu"}
    args = evaluate.Args(num_prompts=3, samples_per_prompt=2, **options)
    evaluate.main(args)
    output = folder / "out/evaluation"
    judge = json.loads((output / "summary.json").read_text())["judge"]
    assert judge["win_rate_vs"]["twin"]["sft"][0] == 0.5 and judge["pairs"] == 3
    assert "Win rates by the judge some/judge" in (output / "report.md").read_text()
    assert not any(KEY.encode() in path.read_bytes() for path in output.rglob("*"))
    assert all("place and the aspect" in body["messages"][-1]["content"] for body in server.requests)
