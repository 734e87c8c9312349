from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("protocol_version", "worker", "pid")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker: str
    pid: int
    def __init__(self, protocol_version: _Optional[int] = ..., worker: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("protocol_version", "lease_id", "lease_ttl_ms", "arena_path", "data_endpoint", "checkpoint", "layout_digest", "fingerprint", "all_fit")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    DATA_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ALL_FIT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    lease_id: int
    lease_ttl_ms: int
    arena_path: str
    data_endpoint: str
    checkpoint: str
    layout_digest: str
    fingerprint: str
    all_fit: bool
    def __init__(self, protocol_version: _Optional[int] = ..., lease_id: _Optional[int] = ..., lease_ttl_ms: _Optional[int] = ..., arena_path: _Optional[str] = ..., data_endpoint: _Optional[str] = ..., checkpoint: _Optional[str] = ..., layout_digest: _Optional[str] = ..., fingerprint: _Optional[str] = ..., all_fit: bool = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class DetachReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreStats(_message.Message):
    __slots__ = ("model", "checkpoint", "fingerprint", "layers", "experts_per_layer", "record_bytes", "frames", "ready_frames", "pinned_frames", "arena_bytes", "page_locked", "staged_records", "staged_bytes", "staging_seconds", "demands", "demands_ready", "hints", "evictions", "uptime_seconds", "leases", "preload_seconds", "hinted_bytes", "refused", "resident_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    READY_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_LOCKED_FIELD_NUMBER: _ClassVar[int]
    STAGED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEMANDS_FIELD_NUMBER: _ClassVar[int]
    DEMANDS_READY_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PRELOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HINTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    checkpoint: str
    fingerprint: str
    layers: int
    experts_per_layer: int
    record_bytes: int
    frames: int
    ready_frames: int
    pinned_frames: int
    arena_bytes: int
    page_locked: bool
    staged_records: int
    staged_bytes: int
    staging_seconds: float
    demands: int
    demands_ready: int
    hints: int
    evictions: int
    uptime_seconds: float
    leases: _containers.RepeatedCompositeFieldContainer[LeaseInfo]
    preload_seconds: float
    hinted_bytes: int
    refused: int
    resident_bytes: int
    def __init__(self, model: _Optional[str] = ..., checkpoint: _Optional[str] = ..., fingerprint: _Optional[str] = ..., layers: _Optional[int] = ..., experts_per_layer: _Optional[int] = ..., record_bytes: _Optional[int] = ..., frames: _Optional[int] = ..., ready_frames: _Optional[int] = ..., pinned_frames: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., page_locked: bool = ..., staged_records: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., staging_seconds: _Optional[float] = ..., demands: _Optional[int] = ..., demands_ready: _Optional[int] = ..., hints: _Optional[int] = ..., evictions: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., leases: _Optional[_Iterable[_Union[LeaseInfo, _Mapping]]] = ..., preload_seconds: _Optional[float] = ..., hinted_bytes: _Optional[int] = ..., refused: _Optional[int] = ..., resident_bytes: _Optional[int] = ...) -> None: ...

class LeaseInfo(_message.Message):
    __slots__ = ("lease_id", "worker", "pid", "pinned_frames")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PINNED_FRAMES_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    worker: str
    pid: int
    pinned_frames: int
    def __init__(self, lease_id: _Optional[int] = ..., worker: _Optional[str] = ..., pid: _Optional[int] = ..., pinned_frames: _Optional[int] = ...) -> None: ...

class StopStoreRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopStoreReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
