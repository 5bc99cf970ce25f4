import pytest

from mycoswarmd.engines.address import parse_address
from mycoswarmd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "base_url", "socket_path"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", None),
        ("http://127.8.9.1:8080/v1/", "http://127.8.9.1:8080", None),
        ("http://[::1]:1234/v1", "http://[::1]:1234", None),
        ("http://127.0.0.1", "http://127.0.0.1:80", None),
        ("unix:/run/x.sock", "http://engine", "/run/x.sock"),
    ],
)
def test_local_addresses(text: str, base_url: str, socket_path: str | None) -> None:
    found = parse_address(text, engine="e")
    assert (found.base_url, found.socket_path) == (base_url, socket_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:80",
        "https://127.0.0.1:80",
        "http://localhost:80",
        "http://api.example.com",
        "http://192.168.1.5:80",
        "http://10.0.0.1",
        "http://0.0.0.0:80",
        "http://[::]:80",
        "http://[fe80::1]:80",
        "http://[::ffff:8.8.8.8]:80",
        "http://127.0.0.1@evil.example:80",
        "http://user:pw@127.0.0.1:80",
        "http://127.0.0.1:80/other",
        "http://127.0.0.1:80/v1?x=1",
        "http://127.0.0.1:80#x",
        "http://127.0.0.1:99999",
        "http://127.0.0.1.example.com",
        "http://2130706433/",
        "http://0x7f.1/",
        "unix:relative.sock",
        "unix:/a\0b",
        "file:///etc/passwd",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text, engine="e")
    assert caught.value.code == "engine-address"
    assert "127.0.0.1" in caught.value.hint
