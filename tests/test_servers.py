"""Servers that tests start: who answers at a port is the server that was started there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from tests.fixtures.s3 import SCRIPT, TAKEN


def test_an_s3_server_whose_port_another_one_has_says_so(s3_server: str, tmp_path: Path) -> None:
    taken = urlsplit(s3_server).port
    assert taken is not None
    for port in (taken, taken - 1):  # the gateway's and, of the second, the monitor's
        again = subprocess.run(
            [SCRIPT, "start", tmp_path, str(port), str(os.getpid())], capture_output=True, check=False
        )
        assert again.returncode == TAKEN, again.stderr
        assert not (tmp_path / "pids").exists()
