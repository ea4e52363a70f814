"""Asks a running server for one picture, and looks at everything on the way: health, metrics, key, the picture itself.

python docker/smoke_test.py URL [API_KEY_FILE]; nothing but the standard library. Ends with 1 and the reason if
anything is not as documented.
"""

import base64
import json
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

PNG = b"\x89PNG\r\n\x1a\n"


def fail(reason: str) -> NoReturn:
    """End the program with a reason."""
    sys.exit(f"smoke test failed: {reason}")


def ask(url: str, body: dict[str, Any] | None = None, key: str | None = None) -> tuple[int, bytes]:
    """The status and the body of the answer, errors included."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def expect(url: str, wanted: int, body: dict[str, Any] | None = None, key: str | None = None) -> bytes:
    """The body, if the status is the one wanted."""
    status, answer = ask(url, body, key)
    if status != wanted:
        fail(f"{url} answered {status}, not {wanted}: {answer[:500]!r}")
    return answer


def main() -> None:
    """Run the test."""
    url = sys.argv[1].rstrip("/")
    key = Path(sys.argv[2]).read_text(encoding="utf-8").strip() if len(sys.argv) > 2 else None
    request = {"prompt": "", "n": 1, "seed": 1, "num_inference_steps": 2}
    expect(f"{url}/v2/health/live", 200)
    expect(f"{url}/v2/health/ready", 200)
    if key:
        expect(f"{url}/v1/images/generations", 401, request)
        expect(f"{url}/v1/images/generations", 401, request, f"not-{key}")
    answers = [expect(f"{url}/v1/images/generations", 200, request, key) for _ in range(2)]
    pictures = [base64.b64decode(json.loads(answer)["data"][0]["b64_json"]) for answer in answers]
    if not pictures[0].startswith(PNG):
        fail(f"the picture is no PNG: {pictures[0][:16]!r}")
    if pictures[0] != pictures[1]:
        fail("the same seed gave two different pictures")
    width, height = struct.unpack(">II", pictures[0][16:24])
    metrics = expect(f"{url}/metrics", 200, key=key).decode()
    if "\nqdm_requests_waiting" not in f"\n{metrics}":
        fail("/metrics has no qdm_requests_waiting, which the autoscaler reads")
    print(f"smoke test passed: one picture of {width} x {height}, twice the same")


if __name__ == "__main__":
    main()
