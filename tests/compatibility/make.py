"""Makes a store to be kept: `python -m tests.compatibility.make schema-N.tar.xz`, once a schema version.

What it holds is small and of every kind: 40 rows of which some fail, two shards, every stage, one promoted release.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
PORT = 18431
"""pairs.csv names it, and so it is in the keys of what was made."""
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
KEPT = ("objects", "records", "manifests", "ledgers", "checkpoints")
"""Folders of a store that hold named bytes; the others are copies for people."""


def picture(number: int) -> bytes:
    """A PNG unlike those of other numbers."""
    image = Image.new("RGB", (40, 40), COLOURS[number % 6])
    image.paste(COLOURS[(number + 1 + number // 6) % 6], (8, 8, 20 + number % 12, 24))
    image.putpixel((number % 40, 0), (number, 0, 0))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves 36 pictures, then bytes that are none, and one 404."""

    def do_GET(self) -> None:
        number = int(self.path.strip("/").removesuffix(".png"))
        body = picture(number) if number < 36 else b"no picture"
        self.send_response(404 if number == 37 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def main(target: Path) -> None:
    """Runs the recipe on a new store and packs what is named in it."""
    lines = (f"http://127.0.0.1:{PORT}/{n}.png,a {COLOURS[n % 6]} square number {n}\n" for n in range(40))
    (HERE / "pairs.csv").write_text("url,caption\n" + "".join(lines))
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipelines.cli", "run", "recipe.yaml", "--store", folder]
        subprocess.run(command, cwd=HERE, check=True)
        with tarfile.open(target, "w:xz") as packed:
            for name in KEPT:
                packed.add(Path(folder, name), name)
    server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
