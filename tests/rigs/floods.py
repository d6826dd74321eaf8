"""Floods of strangers, from a process of their own: guesses at passwords, bodies with encodings.

    python -m tests.rigs.floods SMTP-PORT HTTP-PORT

It prints a line when it begins. When its standard input ends it prints how many requests of each
kind it made. All come from one address. The process has a low priority, because the machines of
strangers would use no CPU of the relay's machine.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress

_FROM = ("127.0.0.66", 0)
_GUESSERS = 20
_POSTERS = 10
_PAUSE = 0.1
_BODY = gzip.compress(bytes(400_000_000), 1)[:400_000]

counts: Counter[str] = Counter()


def _guess(port: int, stop: threading.Event) -> None:
    word = base64.b64encode(b"\0app1\0wrong").decode()
    with socket.create_connection(("127.0.0.1", port), 10, _FROM) as client:
        replies = client.makefile("rb")
        replies.readline()
        client.sendall(b"EHLO stranger.example\r\n")
        while replies.readline()[3:4] == b"-":
            pass
        while not stop.wait(_PAUSE):
            client.sendall(f"AUTH PLAIN {word}\r\n".encode())
            code = replies.readline()[:3]
            counts[f"AUTH {code.decode()}"] += 1
            if code != b"535":
                return


def _post(port: int, stop: threading.Event) -> None:
    head = (
        "POST /v3/client.example/messages HTTP/1.1\r\nHost: relay\r\nContent-Encoding: gzip\r\n"
        f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(_BODY)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), 10, _FROM) as client:
        client.sendall(head.encode() + _BODY)
        counts[f"POST {client.recv(100)[9:12].decode()}"] += 1
    stop.wait(_PAUSE)


def _again(what: object, port: int, stop: threading.Event) -> None:
    assert callable(what)
    while not stop.is_set():
        with suppress(OSError):
            what(port, stop)
        stop.wait(_PAUSE)


def main() -> None:
    os.nice(10)
    smtp_port, http_port = map(int, sys.argv[1:])
    stop = threading.Event()
    jobs = [(_guess, smtp_port)] * _GUESSERS + [(_post, http_port)] * _POSTERS
    print("begins", flush=True)
    threads = [threading.Thread(target=_again, args=(*job, stop)) for job in jobs]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
