"""MLServer: adaptive batching of base64 PNGs, which a runtime written for them decodes."""

import asyncio
import sys

import numpy as np
from classifier import Classifier
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    async def load(self) -> bool:
        self._classify = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        predictions = self._classify(Base64Codec.decode_input(payload.inputs[0]))
        indices = NumpyCodec.encode_output("index", np.array([one["index"] for one in predictions]))
        return InferenceResponse(model_name=self.name, outputs=[indices])


if __name__ == "__main__":
    model = ModelSettings(name="classifier", implementation=Model, max_batch_size=32, max_batch_time=0.002)
    # On one core a worker process beside the server's own only adds a hand-over. debug would log every access.
    # Nothing needs metrics, or gRPC, which takes any free port.
    unused = {"grpc_port": 0, "metrics_endpoint": None, "parallel_workers": 0, "debug": False}
    settings = Settings(host="127.0.0.1", http_port=int(sys.argv[1]), **unused)
    asyncio.run(MLServer(settings).start([model]))
