"""Turns a failed gRPC call into an error of common.errors with one clear sentence."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from common.errors import (
    ControlError,
    ExpertMeshError,
    NotReady,
    QueueFull,
    ReloadRefused,
    RequestError,
    StreamLost,
    VersionConflict,
    VersionUnknown,
)

STREAM_REASONS = {"WORKER_LOST", "STREAM_LOST"}


def error_from(error: grpc.aio.AioRpcError, target: str) -> ExpertMeshError:
    """What went wrong with a call to `target`, for a person."""
    message = error.details() or ""
    details = _Details(error)
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return RequestError(details.field, message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return QueueFull(message, details.retry_after_s)
        case grpc.StatusCode.FAILED_PRECONDITION if details.refusals:
            return ReloadRefused(details.refusals)
        case grpc.StatusCode.ABORTED:
            return VersionConflict(message)
        case grpc.StatusCode.NOT_FOUND:
            return VersionUnknown(message)
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(target, details.reason, message)
        case code:
            return ControlError(_no_answer(target, code, message))


def _unavailable(target: str, reason: str, message: str) -> ExpertMeshError:
    if reason in STREAM_REASONS:
        return StreamLost(message, reason)
    return NotReady(message, reason) if reason else ControlError(_unreachable(target, message))


def _no_answer(target: str, code: grpc.StatusCode, message: str) -> str:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{target} did not answer in time; is the router busy or stopped?"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{target} does not serve this call ({message}); is it a port of an expertmesh router?"
    return f"{target} answered {code.name}: {message}"


def _unreachable(target: str, message: str) -> str:
    if "Connection refused" in message:
        return f"nothing listens on {target} (connection refused); start a router with: expertmesh up"
    if "DNS resolution failed" in message or "errors resolving" in message:
        return f"the host of {target} cannot be resolved; give HOST:PORT of a running router"
    return f"the connection to {target} failed or was lost: {message}"


class _Details:
    """The google.rpc details of a failed call; empty where it carries none."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.field = ""
        self.reason = ""
        self.retry_after_s = 1.0
        self.refusals: dict[str, str] = {}
        try:
            # The synchronous function is the one that understands AioRpcError.
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
        except (ValueError, DecodeError):
            return
        for one in status.details if status else ():
            self._read(one)

    def _read(self, detail: Any) -> None:
        bad_request = error_details_pb2.BadRequest()
        reason = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        unmet = error_details_pb2.PreconditionFailure()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            self.field = bad_request.field_violations[0].field
        elif detail.Unpack(reason):
            self.reason = reason.reason
        elif detail.Unpack(unmet):
            self.refusals = {one.subject: one.description for one in unmet.violations}
        elif detail.Unpack(retry):
            self.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
