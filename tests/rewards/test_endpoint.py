"""The chat client against a real server on this machine: tries again, gives up, keeps replies, never shows the key."""

from __future__ import annotations

import email.utils
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chat_server import ChatServer, completion
from trimtab.errors import TrimtabError, UsageError
from trimtab.measure.cache import Cache
from trimtab.rewards.endpoint import GIVE_UP, Endpoint, Reply

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def talk(words: str) -> list[Any]:
    return [{"role": "user", "content": words}]


def endpoint(server: ChatServer, slept: list[float] | None = None, **options: Any) -> Endpoint:
    waits = [] if slept is None else slept
    return Endpoint(server.url, "m", **{"sleep": waits.append, "concurrency": 1, **options})


def one(server: ChatServer, slept: list[float] | None = None, **options: Any) -> Reply:
    return endpoint(server, slept, **options).chat([talk("hi")], {"temperature": 0})[0]


def test_a_request_and_its_reply() -> None:
    with ChatServer(lambda n, body: completion("yes", {"yes": 0.75, "no": 0.25})) as server:
        reply = one(server)
        assert server.paths == ["/v1/chat/completions"] and server.keys == [None]
    assert server.requests == [{"model": "m", "messages": talk("hi"), "temperature": 0}]
    assert (reply.text, reply.kind, reply.error) == ("yes", "", "")
    assert [token for token, _ in reply.positions[0]["top"]] == ["yes", "no"]


def test_replies_are_in_order_whatever_arrives_first() -> None:
    def slow(number: int, body: dict[str, Any]) -> str:
        words = body["messages"][0]["content"]
        time.sleep(0.05 if int(words) % 2 == 0 else 0.0)
        return f"to {words}"

    with ChatServer(slow) as server:
        asked = endpoint(server, concurrency=4)
        replies = asked.chat([talk(str(i % 6)) for i in range(8)], {})
    assert [reply.text for reply in replies] == [f"to {i % 6}" for i in range(8)]
    assert asked.calls == len(server.requests) == 6  # equal requests are sent once
    assert asked.tokens == 60


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_backoff_doubles_until_the_last_try(status: int) -> None:
    slept: list[float] = []
    with ChatServer(lambda n, body: status) as server:
        reply = one(server, slept)
    assert len(server.requests) == 4 and slept == [1.0, 2.0, 4.0]
    assert reply.text is None and reply.kind == (
        "rate limit" if status == 429 else "server error" if status >= 500 else "bad request"
    )
    slept.clear()
    with ChatServer(lambda n, body: status if n < 2 else "now") as server:
        assert one(server, slept).text == "now"
    assert slept == [1.0, 2.0]


def test_retry_after_is_honoured_in_seconds_and_as_a_date() -> None:
    slept: list[float] = []
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    answers: list[Any] = [(429, {"Retry-After": "7"}), (503, {"Retry-After": later}), (429, {"Retry-After": "soon"})]
    with ChatServer(lambda n, body: answers[n] if n < 3 else "ok") as server:
        assert one(server, slept).text == "ok"
    assert slept[0] == 7.0 and 25 < slept[1] <= 30 and slept[2] == 4.0
    slept.clear()
    with ChatServer(lambda n, body: (429, {"Retry-After": "3600"})) as server:
        assert one(server, slept).kind == "rate limit"
    assert not slept and len(server.requests) == 1  # nobody waits an hour for a verdict


def test_a_timeout_is_recorded() -> None:
    with ChatServer(lambda n, body: lambda handler: time.sleep(1)) as server:
        reply = one(server, timeout=0.1, retries=1)
        assert len(server.requests) == 2
    assert reply.text is None and reply.kind == "timeout" and "0.1 seconds" in reply.error


def _hang_up(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def _half(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("broken", "kind"), [(_hang_up, "connection"), (_half, "malformed")])
def test_a_broken_connection_is_tried_again(broken: Any, kind: str) -> None:
    with ChatServer(lambda n, body: broken if n == 0 else "ok") as server:
        assert one(server).text == "ok"
    with ChatServer(lambda n, body: broken) as server:
        assert one(server, retries=0).kind == kind


MALFORMED = [
    b"not json", b"", b"[]", b"null", b"\xff\xfe", b'{"choices": []}', b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": 7}}]}', b"[" * 100_000, b'{"choices": {"a": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_json_is_none(data: bytes) -> None:
    with ChatServer(lambda n, body: data) as server:
        reply = one(server, retries=1)
        assert len(server.requests) == 2
    assert reply.text is None and reply.kind == "malformed" and len(reply.error) < 300


def test_refusals_and_silence() -> None:
    with ChatServer(lambda n, body: completion(None, refusal="I will not judge")) as server:
        assert one(server) == Reply("I will not judge", [], "refusal", "the endpoint marks it as a refusal")
    filtered = completion("")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    with ChatServer(lambda n, body: filtered) as server:
        assert one(server).kind == "refusal"
    for silent in (None, ""):
        with ChatServer(lambda n, body, silent=silent: completion(silent)) as server:  # type: ignore[misc]
            assert one(server).kind == "empty" and len(server.requests) == 1
    cut = completion("")
    cut["choices"][0]["finish_reason"] = "length"
    with ChatServer(lambda n, body: cut) as server:
        assert "give more to a model that thinks" in one(server).error


def test_parts_and_strange_log_probabilities() -> None:
    with ChatServer(
        lambda n, body: completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    ) as server:  # type: ignore[arg-type]
        assert one(server).text == "ab"
    for top in ([{"token": "a"}], [{"token": "a", "logprob": 3.0}], [{"token": "a", "logprob": "x"}], "no", None):
        body = completion("a")
        body["choices"][0]["logprobs"] = {"content": [{"token": "a", "top_logprobs": top}]}
        with ChatServer(lambda n, b, body=body: body) as server:  # type: ignore[misc]
            assert one(server) == Reply("a", [])


def test_a_cache_hit_makes_no_second_call(tmp_path: Path) -> None:
    with ChatServer(lambda n, body: f"reply {n}") as server:
        first, second = (endpoint(server, cache=Cache(tmp_path)) for _ in range(2))
        talks = [talk("a"), talk("b")]
        replies = first.chat(talks, {"temperature": 0})
        assert second.chat(talks, {"temperature": 0}) == replies and second.calls == 0 and len(server.requests) == 2
        second.chat(talks, {"temperature": 0}, take=1)  # another sample is another request
        second.chat(talks, {"temperature": 1})
        assert len(server.requests) == 6


@pytest.mark.parametrize("failure", [429, 500, b"not json"])
def test_failures_are_not_kept(tmp_path: Path, failure: Any) -> None:
    with ChatServer(lambda n, body: failure if n == 0 else "ok") as server:
        assert one(server, retries=0, cache=Cache(tmp_path)).kind
        assert one(server, retries=0, cache=Cache(tmp_path)).text == "ok"
        assert one(server, retries=0, cache=Cache(tmp_path)).text == "ok"
    assert len(server.requests) == 2


def test_a_killed_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """SIGKILL after five of twelve replies: the second run asks for the other seven alone."""
    script = (
        "import sys; from pathlib import Path; from trimtab.measure.cache import Cache\n"
        "from trimtab.rewards.endpoint import Endpoint\n"
        "asked = Endpoint(sys.argv[1], 'm', concurrency=1, cache=Cache(Path(sys.argv[2])))\n"
        "talks = [[{'role': 'user', 'content': str(i)}] for i in range(12)]\n"
        "print([reply.text for reply in asked.chat(talks, {})])"
    )
    killed: list[subprocess.Popen[str]] = []

    def reply(number: int, body: dict[str, Any]) -> str:
        if number == 5:
            os.kill(killed[0].pid, signal.SIGKILL)
            time.sleep(0.2)
        return "to " + body["messages"][0]["content"]

    with ChatServer(reply) as server:
        command = [sys.executable, "-c", script, server.url, str(tmp_path)]
        killed.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert killed[0].wait() == -signal.SIGKILL
        killed[0].communicate()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([f"to {i}" for i in range(12)])
    asked = [body["messages"][0]["content"] for body in server.requests]
    assert asked == [*map(str, range(6)), *map(str, range(5, 12))]


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def gossip(number: int, body: dict[str, Any]) -> Any:
        told = [completion(f"your key is {KEY}"), f"key {KEY}".encode(), completion(None, refusal=KEY)]
        return told[number] if number < 3 else lambda handler: handler.send_error(400, KEY, f"bad {KEY}")

    with ChatServer(gossip) as server:
        asked = endpoint(server, key_env="MY_KEY", retries=0, cache=Cache(tmp_path))
        replies = asked.chat([talk(str(i)) for i in range(4)], {})
    assert server.keys == [f"Bearer {KEY}"] * 4
    shown = [repr(replies), asked.fingerprint, repr(vars(asked)), *(str(w.message) for w in recwarn)]
    kept = [path.read_text() + path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2 and not [text for text in [*shown, *kept] if KEY in text]
    assert replies[0].text == "your key is [key]" and replies[3].kind == "bad request" and "[key]" in replies[3].error


def test_a_key_that_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="MY_KEY holds no key"):
        Endpoint("http://localhost/v1", "m", "MY_KEY")
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(UsageError, match="characters that no key has") as error:
        Endpoint("http://localhost/v1", "m", "MY_KEY")
    assert KEY not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer(lambda n, body: "ok") as server:
        assert one(server, key_env=None).text == "ok" and server.keys == [None]


def test_what_no_other_request_does_better_with_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        ChatServer(lambda n, body: 401) as server,
        pytest.raises(UsageError, match="refuses the key in MY_KEY") as error,
    ):
        one(server, key_env="MY_KEY")
    assert KEY not in str(error.value) and len(server.requests) == 1
    with ChatServer(lambda n, body: 404) as server, pytest.raises(UsageError, match="check url= and model="):
        one(server)


def test_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key must not travel to an address that nobody named."""
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatServer(lambda n, body: "caught") as elsewhere:
        there = {"Location": f"{elsewhere.url}/chat/completions"}
        with ChatServer(lambda n, body: (307, there)) as server, pytest.raises(UsageError, match="redirect"):
            one(server, key_env="MY_KEY")
        assert not elsewhere.requests


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    asked = Endpoint(url, "m", concurrency=1, sleep=lambda _: None)
    few = asked.chat([talk(str(i)) for i in range(GIVE_UP - 1)], {})
    assert {reply.kind for reply in few} == {"connection"}
    with pytest.raises(TrimtabError, match="nothing answers at"):
        asked.chat([talk("one more")], {})


def test_an_endpoint_without_log_probabilities(tmp_path: Path) -> None:
    def picky(number: int, body: dict[str, Any]) -> Any:
        return 400 if "logprobs" in body else "words"

    settings = {"logprobs": True, "top_logprobs": 20}
    with ChatServer(picky) as server:
        asked = endpoint(server, cache=Cache(tmp_path))
        with pytest.warns(UserWarning, match="offers no log-probabilities"):
            assert [reply.text for reply in asked.chat([talk("a"), talk("b")], settings)] == ["words", "words"]
        assert len(server.requests) == 3  # refused once, then asked without
        assert endpoint(server, cache=Cache(tmp_path)).chat([talk("a")], settings)[0].text == "words"
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/v1", "is not an address"),
        ("localhost:8000", "is not an address"),
        ("http://", "is not an address"),
        ("http://host:x/v1", "is not an address"),
        ("http://name:word@host/v1", "no name, password"),
        ("https://host/v1?api-key=abc", "no name, password"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Endpoint(url, "m")
    assert "word" not in str(error.value).replace("password", "") and "abc" not in str(error.value)


def test_bad_options() -> None:
    for options in ({"timeout": 0.0}, {"retries": -1}, {"concurrency": 0}):
        with pytest.raises(UsageError, match="timeout must be above 0"):
            Endpoint("http://localhost/v1", "m", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="model=NAME"):
        Endpoint("http://localhost/v1", "")
    full = Endpoint("http://localhost/v1/chat/completions/", "m")
    assert full.url == Endpoint("http://localhost/v1", "m").url == json.loads(json.dumps(full.url))
