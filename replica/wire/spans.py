"""Spans for OpenTelemetry whose ids every process derives from a request's digest; nothing is passed on for them.

    trace id   the first 16 bytes of the digest: the SHA-256 of the client's envelope as it is sent and ordered
    span id    the first 8 bytes of SHA-256("trustlog/span" || 0 0 0 || digest || u16 place || stage), big-endian; a
               place is a replica's number, 0xffff for the client; a stage is a name in ASCII

A request is sampled if the last 8 bytes of its trace id, as a number, are below fraction x 2^64: OpenTelemetry's
TraceIdRatioBased, so all processes that have one fraction keep the same requests. A client chooses its envelopes'
bytes, so it can have more of its own requests sampled than that; what waits to be exported is bounded, and dropped
beyond.

Configured by OpenTelemetry's own variables. Without an endpoint in them nothing of it is imported.
"""

import hashlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
FRACTION: Final = "OTEL_TRACES_SAMPLER_ARG"
DISABLED: Final = "OTEL_SDK_DISABLED"
SERVICE_NAME: Final = "OTEL_SERVICE_NAME"
CLIENT: Final = 0xFFFF  # the client's place
TRACE_ID_SIZE: Final = 16
SPAN_ID_SIZE: Final = 8
CLOSE_S: Final = 2.0
TROUBLES_MAX: Final = 16

_TAG: Final = b"trustlog/span\0\0\0"


def span_id(digest: bytes, stage: str, place: int) -> int:
    """Return the id of a stage's span at a place; never 0, which is no id."""
    raw = hashlib.sha256(_TAG + digest + place.to_bytes(2, "big") + stage.encode("ascii")).digest()
    return int.from_bytes(raw[:SPAN_ID_SIZE], "big") or 1


class Spans:
    """Makes finished spans of sampled requests for a processor, which exports them in a thread of its own."""

    def __init__(self, processor: "SpanProcessor", resource: "Resource", fraction: float = 1.0) -> None:
        # Imported here, and so only where spans are made.
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

        self._trace, self._span = trace, ReadableSpan
        self._scope = InstrumentationScope("trustlog")
        self._flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._processor, self._resource = processor, resource
        self._bound = math.floor(fraction * (1 << 64))
        self.handler: logging.Handler | None = None

    def is_sampled(self, digest: bytes) -> bool:
        """Say whether the request with this digest (32 bytes) is traced, here and everywhere."""
        trace_id = digest[:TRACE_ID_SIZE]
        return int.from_bytes(trace_id[8:], "big") < self._bound and any(trace_id)

    def record(
        self,
        digest: bytes,
        stage: str,
        place: int,
        begun_ns: int,
        ended_ns: int,
        parent: tuple[str, int] | None,
        attributes: Mapping[str, int | bool] | None = None,
    ) -> None:
        """Hand on one span. begun_ns, ended_ns: since 1970, by this machine's clock. parent: stage and place."""
        # A stage may have more than one span, one for each view: the name is the same for all.
        name = stage.partition("/")[0]
        trace = self._trace
        kinds = {"request": trace.SpanKind.CLIENT, "replica": trace.SpanKind.SERVER}
        span = self._span(
            f"trustlog {name}",
            context=self._context(digest, stage, place, is_remote=False),
            parent=None if parent is None else self._context(digest, *parent, is_remote=parent[1] != place),
            resource=self._resource,
            attributes=dict(attributes or {}),
            kind=kinds.get(name, trace.SpanKind.INTERNAL),
            start_time=begun_ns,
            end_time=max(begun_ns, ended_ns),
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """Export what waits, for a limited time: whoever collects traces must not keep a program from ending."""
        # It has no time limit of its own that would count while the other side is silent.
        closing = threading.Thread(target=self._processor.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if self.handler is not None:
            logging.getLogger("opentelemetry").removeHandler(self.handler)

    def _context(self, digest: bytes, stage: str, place: int, *, is_remote: bool) -> Any:  # noqa: ANN401 - of an extra
        trace_id = int.from_bytes(digest[:TRACE_ID_SIZE], "big")
        return self._trace.SpanContext(trace_id, span_id(digest, stage, place), is_remote, self._flags)


def open_spans(
    service: str,
    instance: str,
    trouble: Callable[[str], None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Spans | None:
    """Return where spans go as the environment says, None if it names no endpoint or they cannot be exported.

    service, instance: who makes them, if OTEL_SERVICE_NAME does not name the service. trouble: told in words why there
    are none, and what goes wrong later, each kind once.
    """
    environ = os.environ if environ is None else environ
    if not any(environ.get(name) for name in ENDPOINTS) or environ.get(DISABLED, "").lower() == "true":
        return None
    tell = trouble or (lambda _: None)
    try:
        fraction = _fraction(environ.get(FRACTION) or "1")
        attributes = {"service.instance.id": instance}
        if not environ.get(SERVICE_NAME):
            attributes["service.name"] = service
        processor, resource = _exporting(attributes)
    except ImportError as error:
        tell(
            f"no traces: {' or '.join(ENDPOINTS)} is set, but OpenTelemetry is not installed here ({error}): "
            "pip install 'trustlog[tracing]'"
        )
        return None
    except ValueError as error:
        tell(f"no traces: {error}")
        return None
    spans = Spans(processor, resource, fraction)
    spans.handler = _Troubles(tell)
    logging.getLogger("opentelemetry").addHandler(spans.handler)
    return spans


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction <= 1:
        raise ValueError(f"{FRACTION} must be a number from 0 to 1, the part of all requests to trace")
    return fraction


def _exporting(attributes: Mapping[str, str]) -> tuple["SpanProcessor", "Resource"]:
    """Return what exports over OTLP and HTTP; the exporter reads the endpoint, headers and certificates itself."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    return BatchSpanProcessor(OTLPSpanExporter()), Resource.create(attributes)


class _Troubles(logging.Handler):
    """Passes on what OpenTelemetry warns of, each kind once; without a handler Python would print it all."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        if record.msg in self._told or len(self._told) >= TROUBLES_MAX:
            return
        self._told.add(record.msg)
        self._tell(f"traces: {record.getMessage()}")
