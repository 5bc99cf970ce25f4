"""Ask one question over the OpenAI-compatible API and show the answer as it comes. Standard library only."""

import http.client
import json
import sys


def main() -> None:
    """Take HOST:PORT, KEY, MODEL and the question from the command line."""
    address, key, model, question = sys.argv[1:5]
    connection = http.client.HTTPConnection(address, timeout=120)
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 80,
        "temperature": 0,
        "messages": [{"role": "user", "content": question}],
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(response.read().decode())
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            sys.exit(chunk["error"]["message"])
        for choice in chunk["choices"]:
            sys.stdout.write(choice["delta"].get("content") or "")
            sys.stdout.flush()
    said = {name: response.headers[f"X-Mycoswarm-{name}"] for name in ("Node", "Zone", "Rule", "Receipt")}
    print("\n  --", ", ".join(f"{name.lower()} {value}" for name, value in said.items()))


if __name__ == "__main__":
    main()
