"""What stands between gRPC and every RPC: the fleet token, and errors as statuses clients can act on."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from common.errors import (
    ConfigError,
    ExpertMeshError,
    NotReady,
    QueueFull,
    ReloadRefused,
    RequestError,
    StreamLost,
)

logger = logging.getLogger(__name__)

DOMAIN = "expertmesh"
CONFIG_RELOAD = "CONFIG_RELOAD"
"""The type of a precondition that a change of the configuration does not meet."""
INTERNAL_SENTENCE = "an internal error ended this call; the log of the service says more"
AUTHORIZATION = "authorization"

# grpc's handlers are generic in its stubs only, and an interceptor sees the handlers of every RPC.
Handler: TypeAlias = Any
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


def status_of(error: ExpertMeshError) -> grpc.Status:
    """The status a client sees: code, sentence, and google.rpc details."""
    code = grpc.StatusCode[error.grpc_status]
    rich = status_pb2.Status(code=code.value[0], message=str(error))
    for detail in _details(error):
        packed = AnyMessage()
        packed.Pack(detail)
        rich.details.append(packed)
    return rpc_status.to_status(rich)


def _details(error: ExpertMeshError) -> list[Any]:
    if isinstance(error, RequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, ConfigError) and error.paths:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=path, description=sentence)
            for path, sentence in zip(error.paths, error.problems, strict=True)
        ]
        return [error_details_pb2.BadRequest(field_violations=violations)]
    if isinstance(error, ReloadRefused):
        unmet = [
            error_details_pb2.PreconditionFailure.Violation(
                type=CONFIG_RELOAD, subject=subject, description=sentence
            )
            for subject, sentence in error.refusals.items()
        ]
        return [error_details_pb2.PreconditionFailure(violations=unmet)]
    if isinstance(error, QueueFull):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    if isinstance(error, NotReady | StreamLost):
        return [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    return [error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns an ExpertMeshError into its status, anything else into a log entry and a bare INTERNAL."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the RPC's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        method = handler_call_details.method
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guarded_stream(handler.unary_stream, method),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guarded_unary(handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guarded_unary(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # the edge of the process: nothing may pass as UNKNOWN with its text
            await _abort(context, method, error)

    return guarded


def _guarded_stream(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        responses = behavior(request, context)
        try:
            async for response in responses:
                yield response
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:  # as above
            await _abort(context, method, error)
        finally:
            # A cancelled call must reach the `finally` of the RPC now, not when its generator is collected.
            await responses.aclose()

    return guarded


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, ExpertMeshError) and error.grpc_status != "INTERNAL":
        await context.abort_with_status(status_of(error))
    logger.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_SENTENCE)


class FleetTokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call, reflection and health included, that does not carry the fleet token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Compare the token; let the call pass or refuse it."""
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get(AUTHORIZATION, "")
        given = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(given, self._expected):
            return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        return _refusal(handler)


def _refusal(handler: Handler) -> Handler:
    sentence = (
        "the fleet token is missing or wrong: router and expert workers must share one, "
        "through EXPERTMESH_FLEET_TOKEN or ExpertMesh.fleetTokenFile"
    )

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence)
        yield b""

    if handler is not None and handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    if handler is not None and handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse)


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that carries the fleet token."""
    return ((AUTHORIZATION, f"Bearer {token}"),)
