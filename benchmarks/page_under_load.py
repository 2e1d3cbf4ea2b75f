"""A page under load: clients that upload and look at the same time. Failures, latencies, memory of the server.

$ python benchmarks/page_under_load.py --clients 20 --seconds 300
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from safetensors.torch import save_file


def upload(address: str, path: Path) -> str:
    """The name that the server gave a file."""
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'.encode()
    body = head + path.read_bytes() + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)  # noqa: S310 this machine
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310 likewise
        return json.load(response)[0]


def look(address: str, name: str, labels: str, anchor_weight: float) -> str:
    """What the page answers to an upload."""
    data = [{"path": name, "meta": {"_type": "gradio.FileData"}}, labels, anchor_weight]
    body, headers = json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/gradio_api/call/look", body, headers)  # noqa: S310 likewise
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310 likewise
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/look/{event}", timeout=300) as response:  # noqa: S310
        return response.read().decode()


def memory(pid: int) -> float:
    """Resident memory of a process and its children, in GB."""
    found = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            if int(path.name) == pid or int(stat[1]) == pid:
                found += int((path / "statm").read_text().split()[1])
        except OSError:  # it has ended
            continue
    return found * os.sysconf("SC_PAGE_SIZE") / 1e9


def load(address: str, pid: int, videos: list[Path], labels: str, *, clients: int, seconds: float) -> dict[str, Any]:
    """Visit a page with many clients at once; each uploads and looks, again and again."""
    end = time.monotonic() + seconds
    latencies: list[float] = []
    failures: list[str] = []

    def visit(client: int) -> None:
        i = client
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                name = upload(address, videos[i % len(videos)])
                found = look(address, name, labels, (i % 21) / 20)
                if "event: complete" not in found or "figure" not in found:
                    failures.append(found[:300])
            except OSError as error:
                failures.append(repr(error))
            latencies.append(time.monotonic() - begun)
            i += clients

    threads = [threading.Thread(target=visit, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    memories = []
    while any(thread.is_alive() for thread in threads):
        memories.append(round(memory(pid), 3))
        time.sleep(min(10, seconds / 10))
    latencies.sort()
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(latencies),
        "failures": failures,
        "p50_s": round(statistics.median(latencies), 2),
        "p95_s": round(latencies[int(0.95 * len(latencies))], 2),
        "memory_gb": memories,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    from measuring import save  # beside this script; a test of the page takes `load` from it as a part of a package

    from applications.openvclip import build
    from applications.openvclip.miniature import tiny_clip

    manifest = build.data_set("miniature:zs_object")
    videos = [Path(manifest.location(i)) for i in range(0, len(manifest), 50)]
    labels = ", ".join(manifest.classes[:8])
    with tempfile.TemporaryDirectory() as folder:
        theta = Path(folder, "theta.safetensors")  # the slider needs weights that differ from the anchor
        save_file({n: 1.01 * w if "visual." in n else w for n, w in tiny_clip.load().state_dict().items()}, theta)
        command = [sys.executable, "-m", "applications.openvclip", "serve", "--weights", str(theta), "--port", "7899"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            next(line for line in server.stdout if "Ctrl-C" in line)
            address = "http://127.0.0.1:7899"
            result = load(address, server.pid, videos, labels, clients=options.clients, seconds=options.seconds)
        finally:
            server.terminate()
            server.wait()
    save("page_under_load", result)


if __name__ == "__main__":
    main()
