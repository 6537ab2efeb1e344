"""Clients of a server with a shadow: what tests send, and how they wait for what it found."""

from serving import PNG, until


def send(client, images, encode):
    for image in images:
        assert client.post("/predict", content=encode(image), headers=PNG).status_code == 200


def card_when(client, is_there):
    """The card of the shadow as soon as `is_there` says so of it."""
    return until(lambda: is_there(card := client.get("/model").json()["shadow"]) and card)


def running(client):
    return card_when(client, lambda card: card["is_running"])
