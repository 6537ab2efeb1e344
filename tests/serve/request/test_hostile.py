"""Thousands of bad bodies: each answered with its problem, nothing leaked, nothing kept."""

import ctypes
import gc
import json
import os
from pathlib import Path

import pytest
from hostile import requests
from starlette.testclient import TestClient

from serve.request.app import make_app
from serve.request.limits import Limits

ROOT = Path(__file__).resolve().parents[3]
KEPT_BYTES = 32 * 2**20  # what allocators may hold more of after the second time than after the first
_M_MMAP_THRESHOLD = -3  # of <malloc.h>


@pytest.fixture
def allocator():
    """glibc's, that gives back what is free: large blocks at once, the rest when `malloc_trim` asks.

    Left alone it learns from the first large block that is freed to keep blocks of up to 32 MiB. Pillow's have
    16 MiB: an image of 8000x7000 pixels then leaves up to 210 MB that are free and resident, or takes them away
    again, whichever block lies last.
    """
    libc = ctypes.CDLL(None)
    assert libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    return libc


def resident_bytes(allocator):
    gc.collect()
    allocator.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="memory is that of Linux and glibc")
def test_no_body_breaks_the_server(runtime, pixels, encode, allocator):
    bad, statuses = [], {}
    limits = Limits(max_body_bytes=4 * 2**20)
    with TestClient(make_app(runtime, limits), raise_server_exceptions=False) as client:
        sound = encode(pixels[0])
        expected = client.post("/predict", content=sound).json()["results"]
        sent = list(requests())
        for request in sent:
            response = post(client, request)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            if fault := fault_of(response):
                bad.append(f"{request.what}: {response.status_code} {fault}")
        before = resident_bytes(allocator)
        for request in sent:
            post(client, request)
        kept = resident_bytes(allocator) - before
        assert client.post("/predict", content=sound).json()["results"] == expected
    assert not bad, "\n".join(bad[:20])
    assert len(sent) > 2000
    assert {200, 400, 413, 415, 422} <= set(statuses), statuses
    assert kept < KEPT_BYTES, f"{kept / 2**20:.0f} MB more than before"


def post(client, request):
    headers = {name: value.encode("latin-1") for name, value in request.headers.items()}
    return client.post("/predict", content=request.body, headers=headers)


def fault_of(response):
    """What a client must never see, or None."""
    if response.status_code >= 500 and response.status_code not in (503, 504):
        return "is the server's own failure"
    if response.status_code == 200:
        return None if response.json()["results"] else "answers nothing"
    if response.headers["content-type"] != "application/problem+json":
        return f"is no problem document but {response.headers['content-type']}"
    problem = json.loads(response.text)
    if problem["status"] != response.status_code or not problem["detail"]:
        return "has a problem that says nothing"
    leaks = [word for word in ("Traceback", "site-packages", str(ROOT), '.py"') if word in response.text]
    return f"leaks {leaks}" if leaks else None
