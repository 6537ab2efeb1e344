"""The client where some images are bad: the others are answered all the same, against the real server."""

import asyncio
import json

import httpx
import numpy as np
import pytest

from common.cli import run_command
from common.refusal import Refusal
from serve.client import AsyncClient, Bounds, Client, ClientConfig, command
from serve.client_protocol import Result, Retry, ServerProblem, predict_each
from serve.request.app import make_app
from serve.request.limits import Limits
from train.data.folder import SUFFIXES


@pytest.fixture
def photos(tmp_path, pixels, encode):
    """Five readable images in a folder and one below it, among three that are none."""
    root = tmp_path / "my photos"
    (root / "below").mkdir(parents=True)
    for index, image in enumerate(pixels):
        (root / ("below" if index == 4 else "") / f"{index}.PNG").write_bytes(encode(image))
    (root / "0 cut.png").write_bytes(encode(pixels[0])[:-40])
    (root / "2 junk.jpg").write_bytes(b"no image")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "notes.txt").write_bytes(b"no image")
    return root


@pytest.fixture
def each(runtime, live):
    """Results for the images, by both clients."""

    def each(images, *, max_images=64, **options):
        async def ask(url):
            async with AsyncClient(url) as client:
                return [result async for result in client.predict_each(images, **options)]

        with live(make_app(runtime, Limits(max_images=max_images))) as url:
            with Client(url) as client:
                results = list(client.predict_each(images, **options))
            others = asyncio.run(ask(url))
        assert list(map(str, others)) == list(map(str, results))
        return results

    return each


@pytest.mark.slow
@pytest.mark.parametrize("num_bad", [1, 3, 12])
def test_bad_images_have_a_reason_in_their_place_and_the_others_results(num_bad, each, runtime, pixels, encode):
    good = [encode(image) for image in pixels] * 4
    places = set(np.random.default_rng(num_bad).permutation(20)[:num_bad].tolist())
    images = [b"bad" if index in places else content for index, content in enumerate(good)]
    expected = runtime(np.concatenate([pixels] * 4)).argmax(axis=1)
    results = each(images, bounds=Bounds(images_per_request=8, requests_at_once=2))
    for index, result in enumerate(results):
        if index in places:
            assert isinstance(result, ServerProblem)
            assert result.type == "urn:diracnet:problem:undecodable"
        else:
            assert isinstance(result, Result)
            assert result.index == expected[index]


def result_of(conversation, answer):
    """`answer` gives the reply to each request."""
    reply = None
    while True:
        try:
            reply = answer(conversation.send(reply))
        except StopIteration as end:
            return end.value


def test_a_bad_image_among_many_is_found_by_halves():
    sent, images = [], [b"%d" % index for index in range(64)]

    def answer(send):
        sent.append(send.body["params"])
        files = [file for _, (_, file) in send.body.get("files", ())] or [send.body["content"]]
        guess = {"label": "a", "probability": 1.0}
        results = [{**guess, "index": int(file), "top": [{**guess, "index": int(file)}]} for file in files]
        return httpx.Response(422) if b"41" in files else httpx.Response(200, json={"results": results})

    results = result_of(predict_each([*images], top_k=2, retry=Retry()), answer)
    assert isinstance(results.pop(41), ServerProblem)
    assert [result.index for result in results] == [*range(41), *range(42, 64)]
    assert sent == [{"top_k": 2}] * (1 + 2 * 6)


@pytest.mark.slow
def test_files_that_cannot_be_read_here_are_not_sent(each, photos):
    paths = [photos / "gone.png", photos / "1.PNG", photos]
    gone, one, folder = each(paths)
    assert str(gone).startswith("cannot read")
    assert isinstance(one, Result)
    assert isinstance(folder, Refusal)
    assert not isinstance(folder, ServerProblem)
    assert all(isinstance(result, Refusal) for result in each([photos / "gone.png"] * 3))


@pytest.mark.slow
def test_an_empty_file_alone_in_a_request_ends_nothing(each, pixels, encode):
    empty, one = each([b"", encode(pixels[0])], bounds=Bounds(images_per_request=1))
    assert str(empty) == "the file is empty"
    assert isinstance(one, Result)


@pytest.mark.slow
def test_a_server_that_takes_fewer_images_gets_smaller_requests(each, pixels, encode):
    results = each([encode(image) for image in pixels], max_images=2)
    assert all(isinstance(result, Result) for result in results)


@pytest.mark.slow
def test_a_request_that_is_wrong_in_itself_is_not_blamed_on_its_images(each, pixels, encode):
    with pytest.raises(ServerProblem, match="got '0'"):
        each([encode(image) for image in pixels], top_k=0)


@pytest.mark.slow
def test_the_command_asks_for_whole_folders_and_names_what_was_not_answered(live, runtime, photos, capsys):
    with live(make_app(runtime, Limits())) as url:
        status = run_command(command, ClientConfig, argv=[str(photos), "--url", url])
        table = capsys.readouterr().out
        assert run_command(command, ClientConfig, argv=[str(photos), "--url", url, "--json"]) == 1
        rows = json.loads(capsys.readouterr().out)
        assert run_command(command, ClientConfig, argv=[str(photos / "below"), "--url", url]) == 0
    assert status == 1
    for name in ("0 cut.png", "2 junk.jpg", "gone.png"):
        assert f"not answered: {photos / name}: " in table
    assert f"left out, not one of {', '.join(SUFFIXES)}: 1, first " in table
    assert "3 of 8 images were not answered" in table
    answered = {row["image"].removeprefix(f"{photos}/") for row in rows if "label" in row}
    assert answered == {"0.PNG", "1.PNG", "2.PNG", "3.PNG", "below/4.PNG"}
    assert sum("error" in row for row in rows) == 3
