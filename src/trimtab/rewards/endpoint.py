"""A small client for chat endpoints that speak the OpenAI protocol (a service, vLLM, llama.cpp, Ollama, ...).

    POST URL/chat/completions  {"model": ..., "messages": [...], "temperature": 0, "max_tokens": 16, "logprobs": true, ...}

What came back is a `Reply`: words and, where offered, the log-probabilities of the tokens; or None and the kind of failure.
A failure is never a verdict, and never ends a run: it is recorded. Only what no other request can do better with ends it:
a refused key, an address that does not exist, a redirect (not followed: the key goes to the named host alone), or
`GIVE_UP` requests in a row to which nothing listens.

429, 408, 5xx, time-outs, broken connections and replies that are not the protocol's JSON are tried again, up to `retries`
times, after 1, 2, 4, ... seconds or what Retry-After says. A well-formed reply is kept in the cache at once, under
(url, model, request), failures are not: a repeated or interrupted run asks only for what it lacks.

The key is read from the environment at each call and is in no fingerprint, cache, record or message.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trimtab.errors import TrimtabError, UsageError
from trimtab.fingerprint import fingerprint_of
from trimtab.measure.cache import Cache
from trimtab.policy import Message

DEFAULT_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
GIVE_UP = 8
MOST_BYTES = 10_000_000
AGAIN = (408, 409, 425, 429)
FAILED = ("timeout", "connection", "rate limit", "server error", "bad request", "malformed", "empty")  # not kept


@dataclass(frozen=True)
class Reply:
    """What the endpoint said.

    text       the words; None: none came
    positions  for each token of the reply {"token": str, "top": [[token, log-probability], ...]}, [] where not offered
    kind       "" for words; else "timeout", "connection", "rate limit", "server error", "bad request", "malformed",
               "refusal" (the endpoint marked it as one; `text` holds its words), "empty"
    error      the failure in words; "" where there is none
    """

    text: str | None
    positions: list[dict[str, Any]] = field(default_factory=list)
    kind: str = ""
    error: str = ""


@dataclass
class _Tried:
    """One attempt. again: worth another. after: what Retry-After asks for. nobody: nothing listens at the address."""

    reply: Reply
    again: bool = False
    after: float | None = None
    nobody: bool = False
    spent: int = 0  # tokens


class Endpoint:
    """One model behind one address. calls: requests sent; tokens: those the endpoint says it has used."""

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str | None = DEFAULT_KEY,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 4,
        cache: Cache | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model, self.key_env = _checked_url(url), model, key_env
        if not model:
            raise UsageError(f"the endpoint {self.url} needs the name of a model: model=NAME")
        if not timeout > 0 or retries < 0 or concurrency < 1:
            raise UsageError(
                "timeout must be above 0, retries 0 or more and concurrency 1 or more, "
                f"not {timeout}, {retries} and {concurrency}"
            )
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.cache = Cache(None) if cache is None else cache
        self.calls = self.tokens = 0
        self._sleep, self._lock, self._unheard = sleep, threading.Lock(), 0
        self._no_logprobs = False
        local = (urlsplit(self.url).hostname or "") in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_Stay(), *proxies)
        self._key()

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def fingerprint(self) -> str:
        return fingerprint_of("endpoint", self.url, self.model)

    def chat(self, conversations: Sequence[list[Message]], settings: Mapping[str, Any], take: int = 0) -> list[Reply]:
        """A reply a conversation, in order. settings: the rest of the request; take: which sample of it this is.

        Equal requests are sent once.
        """
        bodies = [{"model": self.model, "messages": talk, **settings} for talk in conversations]
        keys = [fingerprint_of("chat", self.url, body, take) for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))
        known: dict[str, Reply] = {}
        for key in wanted:
            if (kept := self.cache.load("replies", key)) is not None:
                known[key] = Reply(**kept)
        missing = [key for key in wanted if key not in known]
        pool = ThreadPoolExecutor(max_workers=min(self.concurrency, max(1, len(missing))))
        stop = threading.Event()
        offered = not self._no_logprobs
        try:
            known |= zip(missing, pool.map(lambda key: self._ask(key, wanted[key], stop), missing), strict=True)
        finally:
            stop.set()  # after an error or Ctrl-C nothing more is tried again
            pool.shutdown(wait=True, cancel_futures=True)
        if offered and self._no_logprobs:
            message = f"{self.model} at {self.host} offers no log-probabilities: its verdicts are read from its words"
            warnings.warn(message, stacklevel=2)
        return [known[key] for key in keys]

    def _ask(self, key: str, body: dict[str, Any], stop: threading.Event) -> Reply:
        words_alone = {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs")}
        for attempt in range(self.retries + 1):
            tried = self._once(words_alone if self._no_logprobs else body)
            if tried.reply.kind == "bad request" and "logprobs" in body and not self._no_logprobs:
                # some services know no log-probabilities and refuse the whole request
                second = self._once(words_alone)
                if not second.reply.kind:
                    self._no_logprobs, tried = True, second
            with self._lock:
                self.tokens += tried.spent
                last = attempt == self.retries
                self._unheard = 0 if not tried.nobody else self._unheard + last
                if self._unheard >= GIVE_UP:
                    raise TrimtabError(
                        f"nothing answers at {self.url} ({tried.reply.error}; {GIVE_UP} requests in a row): "
                        "start the server or mend url=; what was answered is kept"
                    )
            if not tried.again:
                break
            pause = 2.0**attempt if tried.after is None else tried.after
            if last or pause > LONGEST_WAIT or stop.is_set():
                break
            self._sleep(pause)
        if tried.reply.kind in ("", "refusal"):
            self.cache.save("replies", key, asdict(tried.reply))
        return tried.reply

    def _once(self, body: dict[str, Any]) -> _Tried:
        request = urllib.request.Request(  # noqa: S310  http and https alone pass `_checked_url`
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        key = self._key()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        with self._lock:
            self.calls += 1
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                data = answer.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error, key)
        except TimeoutError:
            return self._timed_out()
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return self._timed_out()
            nobody = isinstance(error.reason, OSError) and not isinstance(error.reason, ConnectionResetError)
            return _Tried(Reply(None, [], "connection", f"no connection: {error.reason}"), True, None, nobody)
        except (OSError, http.client.HTTPException) as error:
            what = f"the connection broke: {type(error).__name__}"
            return _Tried(Reply(None, [], "connection", what), again=True)
        return _read(data, key)

    def _timed_out(self) -> _Tried:
        return _Tried(Reply(None, [], "timeout", f"no reply within {self.timeout:g} seconds"), again=True)

    def _refused(self, error: urllib.error.HTTPError, key: str | None) -> _Tried:
        code = error.code
        if code == 401:
            known = f"the key in {self.key_env}" if key else f"a request without a key (${self.key_env} is not set)"
            raise UsageError(
                f"{self.host} refuses {known} (HTTP 401): set the environment variable, or name it: key_env="
            )
        if code == 404:
            raise UsageError(f"{self.url} with model={self.model} does not exist (HTTP 404): check url= and model=")
        if 300 <= code < 400:
            raise UsageError(
                f"{self.url} answers with a redirect (HTTP {code}), which is not followed: give its last address"
            )
        try:
            said = error.read(MOST_BYTES).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        kind = "rate limit" if code == 429 else "server error" if code >= 500 else "bad request"
        what = f"HTTP {code}: {_without(key, ' '.join(said.split()))[:200]}"
        after = _seconds(error.headers.get("Retry-After"))
        return _Tried(Reply(None, [], kind, what), code in AGAIN or code >= 500, after)

    def _key(self) -> str | None:
        """The key, or None. UsageError, which never quotes it, where it was asked for and cannot serve."""
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key and self.key_env != DEFAULT_KEY:
            raise UsageError(f"the environment variable {self.key_env} holds no key: set it, or give key_env=none")
        if not all("!" <= letter <= "~" for letter in key):
            raise UsageError(f"the key in {self.key_env} holds characters that no key has (spaces, line breaks, ...)")
        return key or None


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: what was named is all that is talked to."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _checked_url(url: str) -> str:
    """The full address of chat completions. UsageError for another scheme, or secrets inside."""
    try:
        parts = urlsplit(url.strip())
        bad_port = parts.port is None and parts.netloc.endswith(":")
    except ValueError:
        raise UsageError(
            "url= is not an address: give the base of an endpoint, such as http://localhost:8000/v1"
        ) from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            "url= must hold no name, password or '?': a key goes into an environment variable, named by key_env="
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or bad_port:
        raise UsageError(
            f"url={url!r} is not an address: give the base of an endpoint, such as http://localhost:8000/v1"
        )
    base = url.strip().rstrip("/")
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def _read(data: bytes, key: str | None) -> _Tried:
    """A reply from the body of an answer with status 200."""
    shown = _without(key, data[:200].decode("utf-8", "replace"))
    malformed = _Tried(Reply(None, [], "malformed", f"not a chat completion: {shown!r}"), again=True)
    if len(data) > MOST_BYTES:
        return malformed
    try:
        body = json.loads(data)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return malformed
    usage = body.get("usage")
    spent = usage.get("total_tokens") if isinstance(usage, dict) else None
    tried = _Tried(malformed.reply, spent=spent if isinstance(spent, int) and spent > 0 else 0)
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if isinstance(refusal, str) and refusal:
        tried.reply = Reply(_without(key, refusal), [], "refusal", "the endpoint marks it as a refusal")
    elif choice.get("finish_reason") == "content_filter":
        tried.reply = Reply(_without(key, str(text or "")), [], "refusal", "stopped by the endpoint's content filter")
    elif text is None or text == "":
        cut = choice.get("finish_reason") == "length"
        why = " within max_tokens: give more to a model that thinks first" if cut else ""
        tried.reply = Reply(None, [], "empty", f"the reply has no words{why}")
    elif isinstance(text, str):
        tried.reply = Reply(_without(key, text), _positions(choice.get("logprobs")))
    else:
        tried.again = True
    return tried


def _positions(logprobs: Any) -> list[dict[str, Any]]:
    """The tokens of a reply with their alternatives; [] where anything is not as the protocol says."""
    out: list[dict[str, Any]] = []
    try:
        for entry in logprobs["content"]:
            tokens = [str(one["token"]) for one in entry["top_logprobs"]]
            values = [float(one["logprob"]) for one in entry["top_logprobs"]]
            if any(math.isnan(value) or value > 1e-3 for value in values):
                return []
            # -inf is no JSON; some write -9999 for it
            top = [[token, max(value, -9999.0)] for token, value in zip(tokens, values, strict=True)]
            out.append({"token": str(entry["token"]), "top": top})
    except (KeyError, TypeError, ValueError):
        return []
    return out


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds: a number, or a date. None where there is none or it is neither."""
    if not header:
        return None
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, wait) if not math.isnan(wait) else None


def _without(key: str | None, text: str) -> str:
    """A text that does not quote the key. Stand-ins such as EMPTY, which local servers are given, are no secret."""
    return text.replace(key, "[key]") if key and len(key) >= 8 else text
