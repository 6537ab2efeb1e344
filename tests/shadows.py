"""Clients of a server with a shadow: what tests send, and how they wait for what it found."""

import threading

from serving import PNG


def send(client, images, encode):
    for image in images:
        assert client.post("/predict", content=encode(image), headers=PNG).status_code == 200


def card_when(client, is_there):
    """The card of the shadow as soon as `is_there` says so of it."""
    until = threading.Event()
    timer = threading.Timer(60, until.set)
    timer.start()
    try:
        while not is_there(card := client.get("/model").json()["shadow"]):
            assert not until.is_set(), card
        return card
    finally:
        timer.cancel()


def running(client):
    return card_when(client, lambda card: card["is_running"])
