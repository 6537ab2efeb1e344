"""Ray Serve: one replica, requests joined by serve.batch."""

import signal
import sys

import ray
from classifier import Classifier, Prediction
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=1, max_ongoing_requests=128, ray_actor_options={"num_cpus": 1})
class Service:
    def __init__(self) -> None:
        self._classifier = Classifier()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def classify(self, pngs: list[bytes]) -> list[Prediction]:
        return self._classifier(pngs)

    async def __call__(self, request: Request) -> Prediction:
        return await self.classify(await request.body())


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Service.bind(), logging_config={"enable_access_log": False, "log_level": "WARNING"})
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
