"""What is never asked."""

from __future__ import annotations

import pytest

from infra.errors import Refused
from pipelines.download.blocklist import Blocklist


@pytest.mark.parametrize(
    ("entry", "host", "path", "expected"),
    [
        ("ads.test", "ads.test", "/1.png", True),
        ("ads.test", "cdn.ads.test", "/1.png", True),
        ("ads.test", "ads.test.", "/1.png", True),
        ("ads.test", "goodads.test", "/1.png", False),
        ("ADS.test", "ads.test", "/1.png", True),
        ("bücher.test", "xn--bcher-kva.test", "/", True),
        ("10.0.0.1", "10.0.0.1", "/", True),
        ("http*://*/ads/*", "a.test", "/ads/1.png", True),
        ("http*://*/ads/*", "a.test", "/pads/1.png", False),
        ("*/ADS/*", "a.test", "/ads/1.png", True),
        ("*/[0-9].gif?*", "a.test", "/1.gif?x", True),
        ("https://a.test/*", "a.test", "/1.png", False),
    ],
)
def test_hosts_block_all_below_them_and_patterns_the_whole_url(entry, host, path, expected):
    assert Blocklist([entry, "other.test"]).blocks(host, f"http://{host}{path}") is expected


@pytest.mark.parametrize("entry", ["", " a.test", "*.ads.test", "ads.test:80", "a b"])
def test_what_is_neither_host_nor_pattern_is_refused(entry):
    with pytest.raises(Refused, match=r"download\.block"):
        Blocklist([entry])


def test_nothing_is_blocked_by_default():
    assert not Blocklist().blocks("a.test", "http://a.test/")
