"""A local server that answers as little of wandb's protocol as runs and artifacts need, well or badly.

It keeps what it is sent, so that a benchmark or a test can ask which steps a run has there. As a process of its own,
`python -m scripts.benchmarks.wandb_server` prints its address; PUT /mood/slow changes its mood, and GET /steps/ID
answers with the steps of a run.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, cast

Mood = Literal["well", "slow", "500", "429", "403", "reset", "never"]

SLOW_S = 2.0  # before each answer
NEVER_S = 600.0  # longer than any benchmark waits


class WandbServer(ThreadingHTTPServer):
    """Answers in its `mood`, which may change at any time: well, late, with an error, with a reset, or never.

    `history` has the lines that each run holds, by the run's id; `artifacts` the digests of what was logged.
    """

    daemon_threads = True

    def __init__(self, mood: Mood = "well") -> None:
        super().__init__(("127.0.0.1", 0), WandbRequest)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.mood: Mood = mood
        self.refuses_rows = False  # with 403, as for an account whose quota is used up
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.artifacts: dict[str, str] = {}
        self.asked: list[str] = []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    def steps(self, run_id: str) -> list[int]:
        """Return the step of each line of the run, in the order of the lines."""
        lines = self.history.get(run_id, {})
        return [lines[place]["_step"] for place in sorted(lines)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the other side hangs up as it likes

    def __enter__(self) -> WandbServer:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class WandbRequest(BaseHTTPRequestHandler):
    server: WandbServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, order, *words = self.path.split("/")
        match "order" if order in ("mood", "steps") else self.server.mood:
            case "order":
                if order == "mood":
                    self.server.mood = cast(Mood, words[0])
                self.send(200, {"steps": self.server.steps(words[0])})
            case "never":
                self.server.stopped.wait(NEVER_S)
                self.close_connection = True
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()  # with nothing to linger for, a reset in place of a goodbye
                self.close_connection = True
            case "500" | "429" | "403":
                self.send(int(self.server.mood), {"error": f"the server's mood is {self.server.mood}"})
            case mood:
                if mood == "slow":
                    time.sleep(SLOW_S)
                if self.server.refuses_rows and self.path.endswith("/file_stream"):
                    self.send(403, {"error": "no quota is left"})
                else:
                    self.send(200, {"data": self.answer(body)})

    do_GET = do_PUT = do_POST

    def send(self, code: int, content: dict[str, Any]) -> None:
        answer = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def answer(self, body: bytes) -> dict[str, Any]:
        """Return the data that wandb expects, after keeping what it sends."""
        if self.path.endswith("/file_stream"):
            self.keep_history(json.loads(body).get("files", {}).get("wandb-history.jsonl", {}))
            return {}
        if self.path != "/graphql":
            self.server.asked.append(f"{self.command} {self.path}")
            return {}
        query = json.loads(body)
        name, variables = query.get("operationName", ""), query.get("variables", {})
        self.server.asked.append(name)
        project = {"id": "P", "name": "a_project", "entity": {"id": "E", "name": "an_entity"}}
        file = {"id": "F", "uploadUrl": f"{self.server.url}/upload", "uploadHeaders": []}
        match name:
            case "UpsertBucket":
                bucket = {"id": "B", "name": variables["name"], "displayName": "", "project": project}
                return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
            case "RunResumeStatus":
                return {"model": project | {"bucket": self.bucket(variables["name"])}}
            case "Viewer":
                return {"viewer": {"id": "V", "username": "a_user", "entity": "an_entity", "flags": "{}", "teams": {}}}
            case "CreateRunFiles":
                files = [{"name": n, "uploadUrl": f"{self.server.url}/{n}"} for n in variables["files"]]
                return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                given = variables.get("input", variables)
                digest = given["digest"]
                state = "COMMITTED" if digest in self.server.artifacts else "PENDING"
                self.server.artifacts.setdefault(digest, given["artifactCollectionName"])
                artifact = {"id": digest, "state": state, "artifactSequence": {"id": "S", "latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest":
                return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}
            case "UpdateArtifactManifest":
                return {"updateArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}
            case "CreateArtifactFiles":
                nodes = [
                    {
                        "storagePath": one["name"],
                        "uploadUrl": file["uploadUrl"],
                        "uploadHeaders": [],
                        "artifact": {"id": "A"},
                    }
                    for one in variables["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "D"}}}
            case _:
                return {"project": None}  # of which artifacts of this name are of another type

    def keep_history(self, streamed: dict[str, Any]) -> None:
        """Keep lines at the places that they are sent for: a line that is sent again takes its own place."""
        lines = self.server.history.setdefault(self.path.split("/")[-2], {})
        for place, line in enumerate(streamed.get("content", []), streamed.get("offset", 0)):
            lines[place] = json.loads(line)

    def bucket(self, run_id: str) -> dict[str, Any] | None:
        """Return what wandb needs to go on with the run; None if there is none."""
        lines = self.server.history.get(run_id)
        if lines is None:
            return None
        tail = json.dumps([json.dumps(lines[max(lines)])]) if lines else "[]"
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": tail, "eventsTail": "[]", "config": "{}", "summaryMetrics": "{}"}
        return {
            "id": "B",
            "name": run_id,
            "displayName": "",
            "tags": [],
            "notes": "",
            **counts,
            **texts,
            "wandbConfig": '{"t": 1}',
        }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), WandbServer() as server:
        print(server.url, flush=True)
        server.stopped.wait()
