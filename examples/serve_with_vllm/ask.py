"""Ask a server of OpenAI's API for text: python ask.py TEXT [--url URL] [--tokens N]

Needs nothing but Python; the server is that of ``qplug serve``.
"""

import argparse
import json
from urllib.request import Request, urlopen


def ask(url: str, text: str, tokens: int) -> str:
    """What the first model that ``url`` serves finds likeliest to come after ``text``."""
    with urlopen(f"{url}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request) as response:
        return str(json.load(response)["choices"][0]["text"])


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("text")
    words.add_argument("--url", default="http://127.0.0.1:8000")
    words.add_argument("--tokens", type=int, default=32)
    told = words.parse_args()
    print(ask(told.url, told.text, told.tokens))
