"""LitServe: batches of 32 images at most, gathered for 2 ms at most."""

import sys

import litserve as ls
from classifier import Classifier, Prediction
from fastapi import Request


class Api(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.classify = Classifier()

    def decode_request(self, request: Request) -> bytes:
        return request["image"].file.read()

    def predict(self, pngs: list[bytes]) -> list[Prediction]:
        return self.classify(pngs)


if __name__ == "__main__":
    server = ls.LitServer(Api(max_batch_size=32, batch_timeout=0.002), accelerator="cpu", workers_per_device=1)
    quiet = {"log_level": "warning", "access_log": False, "generate_client_file": False}
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, **quiet)
