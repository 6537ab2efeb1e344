"""mosec: batches of 32 images at most, gathered for 2 ms at most, in one worker behind its server in Rust."""

from classifier import Classifier, Prediction
from mosec import Server, Worker


class Classify(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.classify = Classifier()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[Prediction]:
        return self.classify(data)


if __name__ == "__main__":
    server = Server()  # which reads --address, --port and --log-level
    server.append_worker(Classify, num=1, max_batch_size=32, max_wait_time=2)
    server.run()
