"""
A real daemon's log, from its first line to its last.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from .chain import Equipment, standard_settings
from .conftest import MakeChain
from .images import Images
from .installing import CHECKOUT
from .processes import PATIENCE, Process, environment, eventually, free_port
from .test_together import blob_path
from .test_workers import wait_for_workers

SCHEMA = json.loads((CHECKOUT / "docs" / "log.schema.json").read_text("utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
REQUESTS = 40


def lines_of(path: Path) -> list[dict[str, Any]]:
    """
    Parse a log, each line of which must match the schema.
    """
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for each in found:
        VALIDATOR.validate(each)
    return found


def messages(lines: list[dict[str, Any]]) -> str:
    return "\n".join(each["message"] for each in lines)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_line_is_an_object(make_chain: MakeChain, images: Images, processes: int) -> None:
    """
    From twistd's first line to its last, with pulls, faults and an upstream that goes; and every request has its line.
    """
    settings = {"PROXY_LOG_FORMAT": "json", "PROXY_WORKER_PROCESSES": str(processes), "PROXY_UPSTREAM_TRIES": "1"}
    chain = make_chain(settings=settings)
    if processes > 1:
        wait_for_workers(chain)
    daemon, blob = chain.daemon, blob_path(images)
    for path in (blob, blob, "/v2/team/none/manifests/none", "/v2/%7f"):
        daemon.ask(path, headers={"X-Request-Id": "e2e-story"})
        daemon.settle()  # else the second may still follow the first one's transfer
    chain.cut()
    daemon.ask("/v2/team/none/manifests/other")
    daemon.cache.rename(daemon.cache.with_name("gone"))  # to remove it is a race with the daemon, which writes there
    daemon.cache.write_text("a file where a directory was")
    daemon.ask(blob)
    for number in range(REQUESTS):
        daemon.ask("/healthz", headers={"X-Request-Id": f"last-{number}"})
    assert daemon.process.terminate() == 0
    lines = lines_of(daemon.process.output)
    assert any("starting up" in each["message"] for each in lines[:3])  # warnings about settings may come before
    assert lines[-1]["message"] == "Server Shut Down."
    requests = [each for each in lines if each["logger"] == "access"]
    assert {f"last-{number}" for number in range(REQUESTS)} <= {each["request"] for each in requests}
    story = [(each["status"], each["reason"]) for each in requests if each["request"] == "e2e-story"]
    # each process batches its own lines before it writes them, so two of them write in any order
    assert sorted(story) == [(200, "cached"), (200, "first-use"), (404, "bad-request"), (404, "not-found")]
    assert {each["level"] for each in lines} > {"info", "error"}


def start_piped(equipment: Equipment, home: Path, front: str, **settings: str) -> tuple[int, bytes]:
    """
    Start a daemon as systemd does, stop it once it says that it listens; return its status and its output.
    """
    reading, writing = os.pipe()
    status = os.fstat(writing)
    usual = {"PROXY_PORT": str(free_port()), "PROXY_CACHE_DIR": str(home / "cache")}
    wanted = {**standard_settings(front), **usual, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}", **settings}
    process = subprocess.Popen(
        [str(equipment.twistd), "-n", "--pidfile=", "ecr-proxy"],
        env=environment(home, {name: value for name, value in wanted.items() if value is not None}),
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as output:
            said = b""
            while b"Token received" not in said and (line := output.readline()):
                said += line
            process.send_signal(signal.SIGTERM)
            said += output.read()
        return process.wait(PATIENCE), said
    finally:
        if process.poll() is None:
            process.kill()


def test_levels_reach_the_journal(make_chain: MakeChain, equipment: Equipment, tmp_path: Path) -> None:
    """
    Each line has the mark of its level, and no time; with JSON there is no mark, for the object has the level.
    """
    front = make_chain(wait=False).front_url
    code, said = start_piped(equipment, tmp_path, front)
    assert code == 0
    lines = said.decode().splitlines()
    assert len(lines) > 3
    assert all(re.match(r"<[2-7]>\[[\w.]+#\w+\] ", line) for line in lines), said
    assert any(line.startswith("<6>[") and "Token received" in line for line in lines)
    code, said = start_piped(equipment, tmp_path, front, PROXY_LOG_FORMAT="json")
    (tmp_path / "log").write_bytes(said)
    assert "Token received" in messages(lines_of(tmp_path / "log"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reader_that_stops_stops_nobody(
    make_chain: MakeChain, equipment: Equipment, tmp_path: Path, processes: int
) -> None:
    """
    Nothing reads the pipe: requests are still answered, and the daemon ends when told.
    """
    port = free_port()
    front = make_chain(wait=False).front_url
    usual = {"PROXY_PORT": str(port), "PROXY_CACHE_DIR": str(tmp_path / "cache")}
    wanted = {**standard_settings(front), **usual, "PROXY_WORKER_PROCESSES": str(processes)}
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [str(equipment.twistd), "-n", "--pidfile=", "ecr-proxy"],
        env=environment(tmp_path, {name: value for name, value in wanted.items() if value is not None}),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    try:
        eventually(lambda: answers(port, "/healthz"), "it listens")
        for _ in range(300):  # each line has 6 KB: together more than the pipe and the daemon's memory take
            assert answers(port, f"/v2/{'x' * 6000}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        with os.fdopen(reading, "rb") as output:
            said = output.read()
        assert said.count(b"x" * 6000) < 300
        assert all(line[:4].isdigit() for line in said.splitlines())
    finally:
        if process.poll() is None:
            process.kill()


def answers(port: int, path: str) -> bool:
    """
    Return True if there is any answer.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return connection.recv(8).startswith(b"HTTP/1.1")
    except (ConnectionRefusedError, TimeoutError):  # workers may take long to start on a busy machine
        return False


def test_what_ends_it_is_critical(refusing: str, equipment: Equipment, tmp_path: Path) -> None:
    """
    Rejected credentials end the daemon: the journal has the right level.
    """
    code, said = start_piped(equipment, tmp_path, refusing)
    assert code == 1
    assert re.search(rb"^<2>\[ecrproxy\.\S+#critical\] AWS credentials are refused", said, re.MULTILINE), said


def test_what_keeps_it_from_starting_is_critical(equipment: Equipment, tmp_path: Path) -> None:
    """
    As with a wrong setting: one line that the journal recognizes, or an object.
    """
    nowhere = "http://127.0.0.1:1"
    code, said = start_piped(equipment, tmp_path, nowhere, PROXY_CACHE_LIMIT="64 parsecs")
    assert (code, said[:37]) == (1, b"<2>ecr-proxy: PROXY_CACHE_LIMIT='64 p")
    code, said = start_piped(equipment, tmp_path, nowhere, PROXY_CACHE_LIMIT="64 parsecs", PROXY_LOG_FORMAT="json")
    (tmp_path / "log").write_bytes(said)
    (line,) = lines_of(tmp_path / "log")
    assert (code, line["level"], line["message"][:17]) == (1, "critical", "PROXY_CACHE_LIMIT")


def test_a_file_is_written_in_the_same_format(equipment: Equipment, tmp_path: Path) -> None:
    """
    twistd's --logfile is the file, the settings define the format; above a level there are no requests.
    """
    log = tmp_path / "twistd.log"
    usual = {"PROXY_PORT": str(free_port()), "PROXY_CACHE_DIR": str(tmp_path / "cache"), "PROXY_LOG_FORMAT": "json"}
    given = standard_settings("http://127.0.0.1:1") | usual | {"PROXY_LOG_LEVEL": "error"}
    process = Process(
        [equipment.twistd, "-n", "--pidfile=", f"--logfile={log}", "ecr-proxy"],
        environment(tmp_path, {name: value for name, value in given.items() if value is not None}),
        tmp_path / "output",
        tmp_path,
    )
    try:
        eventually(lambda: log.exists() and "No token" in log.read_text(), "it has said that there is no token")
    finally:
        process.stop()
    assert process.output.read_text() == ""
    assert {each["level"] for each in lines_of(log)} == {"error"}
