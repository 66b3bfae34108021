"""Nobody but the person who started it uses the studio, and no page of hers reads elsewhere."""

import pytest

from sd_lora.studio.guard import LARGEST
from tests.studio.conftest import Served

FORM = {"Content_Type": "application/x-www-form-urlencoded"}

HOSTILE = {
    "no token": ("/new", "GET", {"Cookie": ""}),
    "a guessed token": ("/?token=guessed", "GET", {"Cookie": ""}),
    "another's cookie": ("/runs", "GET", {"Cookie": "sd_lora_studio_1=guessed"}),
    "a name that leads here": ("/new", "GET", {"Host": "evil.example"}),
    "our name, another port": ("/new", "GET", {"Host": "127.0.0.1:1"}),
    "another page's form": ("/new/clear", "POST", {"Origin": "http://evil.example"}),
    "another port's form": ("/new/clear", "POST", {"Origin": "http://127.0.0.1:1"}),
    "a form from nowhere": ("/new/clear", "POST", {"Origin": "null"}),
    "a form without a page": ("/new/clear", "POST", {"Origin": ""}),
    "an image in another page": ("/runs", "GET", {"Sec_Fetch_Site": "same-site"}),
    "too large a form": ("/new/look", "POST", {"Content_Length": str(LARGEST + 1)}),
    "a form of no length": ("/new/look", "POST", {"Transfer_Encoding": "chunked"}),
    "a path upwards": ("/static/../secret", "GET", {}),
    "the same, encoded": ("/static/%2e%2e/%2e%2e/app.py", "GET", {}),
    "a folder that is not opened": ("/choose?at=/etc", "GET", {}),
    "a folder above": ("/choose?at=..", "GET", {}),
    "a path with a NUL": ("/choose?at=%00", "GET", {}),
}
"""A request that somebody else could make → address, method, headers."""


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_requests_get_nothing(studio: Served, case: str) -> None:
    """Each gets a refusal, and neither a cookie nor a file nor a page of the studio."""
    path, method, headers = HOSTILE[case]
    status, text, found = studio.ask(path, method, **headers)
    assert 400 <= status < 500
    assert "set-cookie" not in found
    assert "<html" not in text
    assert "do not tell" not in text
    assert "root" not in text


def test_each_address_opens_one_browser(studio: Served) -> None:
    """A used address gives a second browser nothing; the studio makes it one of its own."""
    used = studio.address.partition(f":{studio.port}")[2]
    assert studio.ask(used, Cookie="")[0] == 403
    assert studio.ask(used)[0] == 303  # the first browser may come by it again
    _, text, _ = studio.ask("/another", "POST", **FORM)
    another = text.partition(f":{studio.port}")[2].partition("<")[0]
    status, _, headers = studio.ask(another, Cookie="")
    assert status == 303
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=Strict" in headers["set-cookie"]


def test_answers_forbid_other_origins(studio: Served) -> None:
    """A page may load from the studio alone, run no script of its own, and stand in no frame."""
    for path in ("/new", "/static/studio.css", "/uplot/uPlot.iife.min.js"):
        status, text, headers = studio.ask(path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "same-origin"  # else our forms come from "null"
        assert "frame-ancestors 'none'" in policy
        assert 'style="' not in text
        assert "://" not in text.replace("http://www.w3.org", "") or path != "/new"


def test_names_and_captions_are_text(studio: Served) -> None:
    """Markup in a field comes back escaped, in the form and in its messages."""
    script = "%3Cscript%3Ealert(1)%3C/script%3E"
    body = f"folder={script}&instance_prompt={script}&rank={script}".encode()
    status, text, _ = studio.ask("/new/look", "POST", body, **FORM)
    assert status == 200
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text
    assert "<script>alert" not in studio.ask("/new")[1]


@pytest.mark.parametrize("name", ["../../out.png", "/etc/out.png", "a/../../b.png", "..\\b.png"])
def test_uploads_stay_in_their_folder(studio: Served, name: str) -> None:
    """A file whose name leads out of the set's folder is refused."""
    parts = {"set": "mine", "path": name}
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in parts.items()
    )
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\nA\r\n'
    body += b"--x--\r\n"
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    status, text, _ = studio.ask("/new/upload", "POST", body, **kind)
    assert status == 400
    assert "no name of a file" in text
