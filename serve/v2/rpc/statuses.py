"""What gRPC calls each problem."""

from grpc import StatusCode

from serve.request import problems

STATUS_OF = {
    problems.BAD_REQUEST: StatusCode.INVALID_ARGUMENT,
    problems.UNAUTHORIZED: StatusCode.UNAUTHENTICATED,
    problems.NOT_FOUND: StatusCode.NOT_FOUND,
    problems.TIMEOUT: StatusCode.DEADLINE_EXCEEDED,
    problems.TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    problems.TOO_MANY_IMAGES: StatusCode.RESOURCE_EXHAUSTED,
    problems.TOO_MANY_PIXELS: StatusCode.RESOURCE_EXHAUSTED,
    problems.UNDECODABLE: StatusCode.INVALID_ARGUMENT,
    problems.INTERNAL: StatusCode.INTERNAL,
    problems.NOT_A_NUMBER: StatusCode.INTERNAL,
    problems.NOT_READY: StatusCode.UNAVAILABLE,
    problems.OVERLOADED: StatusCode.UNAVAILABLE,
    problems.DEADLINE: StatusCode.DEADLINE_EXCEEDED,
}
