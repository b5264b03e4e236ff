"""Hostile files are looked at in a process of their own, whose memory and time have limits: what it says of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ADDRESSES = 5 * 2**30  # bytes of address space; torch alone maps 2 GB
MOST_MEMORY = 700 * 2**20  # beyond what the process held before
SECONDS = 20

LOOKS = """
import json, resource, signal, sys, warnings
from pathlib import Path
from sae_training.formats.inspection import in_json, in_words, inspect
from sae_training.sparse_autoencoder import SparseAutoencoder
warnings.simplefilter("ignore")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def whole(path): told = inspect(path, full=True); in_words(told); in_json(told)
def many(path): [one for one in SparseAutoencoder.load_many(path).values()]
def session(path):
    LMSparseAutoencoderSessionloader.load_session_from_pretrained(path)
def late(*_): raise TimeoutError
looks = {look.__name__: look for look in (SparseAutoencoder.load_from_pretrained, many, inspect, whole, session)}
if "session" in sys.argv[3]:  # its imports take seconds, which are not the file's
    import transformer_lens
    from sae_training.utils import LMSparseAutoencoderSessionloader
signal.signal(signal.SIGALRM, late)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
held = peak()
for path in map(Path, sys.argv[4:]):
    for look in map(looks.get, sys.argv[3].split()):
        signal.alarm(int(sys.argv[2]))
        try: look(path); said = "read"
        except (ValueError, OSError) as error:
            said = "refused" if str(path) in str(error) and len(str(error)) < 9000 else f"{type(error)}: {error}"[:400]
        except BaseException as error: said = f"{type(error)}: {error}"[:400]
        signal.alarm(0)
        print(json.dumps([path.name, look.__name__, said, peak() - held]), flush=True)
"""


INSPECTING = ("inspect", "whole")
WAYS = ("load_from_pretrained", "many", "inspect", "whole")


def looked_at(paths: list[Path], ways: tuple[str, ...] = WAYS) -> dict[str, dict[str, str]]:
    """By file and way to look at it: "read", "refused" (an error that names the file), or what else came of it."""
    command = [sys.executable, "-c", LOOKS, str(ADDRESSES), str(SECONDS), " ".join(ways), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, dict[str, str]] = {path.name: {} for path in paths}
    for line in done.stdout.splitlines():
        name, way, said, memory = json.loads(line)
        found[name][way] = said if memory < MOST_MEMORY else f"{said} in {memory:,} bytes"
    assert done.returncode == 0, f"{done.stdout[-500:]} {done.stderr[-2000:]}"
    return found


def all_refuse(paths: list[Path], ways: tuple[str, ...] = WAYS) -> None:
    found = looked_at(paths, ways)
    refused = {
        name: {way: "refused" if said == "read" and way in INSPECTING else said for way, said in by_way.items()}
        for name, by_way in found.items()
    }  # to be inspected, a file may have a problem
    others = {name: said for name, said in refused.items() if said != dict.fromkeys(ways, "refused")}
    assert not others, others
