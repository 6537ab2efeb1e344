"""Calls of gRPC: with NVIDIA's client, or with any bytes."""

from contextlib import contextmanager

import grpc
import numpy as np
import tritonclient.grpc as triton

NAME = "DiracNet-10-0.25"
SERVICE = "/inference.GRPCInferenceService/"


class Raw:
    """A channel that sends any bytes, and tells all of an answer."""

    def __init__(self, target, **options):
        # A subchannel of its own, or gRPC would use the connection of another channel to the same address.
        settings = {"grpc.use_local_subchannel_pool": 1, "grpc.max_send_message_length": -1, **options}
        self.channel = grpc.insecure_channel(target, list(settings.items()))

    def start(self, message, method="ModelInfer", **options):
        return self.channel.unary_unary(SERVICE + method).future(message, **{"timeout": 60, **options})

    def __call__(self, message, method="ModelInfer", **options):
        """The name of its status, its words or its bytes, and its trailing metadata."""
        call = self.start(message, method, **options)
        status = call.code()
        said = call.result() if status == grpc.StatusCode.OK else call.details()
        return status.name, said, dict(call.trailing_metadata() or ())


@contextmanager
def tritons(target):
    with triton.InferenceServerClient(target) as client:
        yield client


def images_of(array, datatype="UINT8", *, name="images"):
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return [tensor]


def request_of(images, **members):
    """The bytes of a request for pixels, or of another one by its members."""
    pb = triton.service_pb2
    tensor = pb.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=images.shape)
    fields = {"model_name": NAME, "inputs": [tensor], "raw_input_contents": [np.ascontiguousarray(images).tobytes()]}
    return pb.ModelInferRequest(**{**fields, **members}).SerializeToString()
