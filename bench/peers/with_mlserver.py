"""MLServer: adaptive batching of base64 PNGs, which a runtime written for them decodes."""

import asyncio
import sys

import numpy as np
from classifier import Classifier, decode
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    async def load(self) -> bool:
        self._classify = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = [decode(content) for content in Base64Codec.decode_input(payload.inputs[0])]
        indices = np.array([answer["index"] for answer in self._classify(images)])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("index", indices)])


async def serve(port: int) -> None:
    model = ModelSettings(name="classifier", implementation=Model, max_batch_size=32, max_batch_time=0.002)
    # On one core a worker process beside the server's own only adds a hand-over. debug is what logs every access.
    # Nobody asks for gRPC, which takes any free port, or for metrics.
    settings = Settings(
        host="127.0.0.1", http_port=port, grpc_port=0, metrics_endpoint=None, parallel_workers=0, debug=False
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
