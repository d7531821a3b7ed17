"""The public names of the library.

    from engram import Client, LocalBuffer, Mirror, ReplayLoader

Formats have modules of their own: `engram.strip`, `engram.pack`, `engram.tar`, `engram.draw`, `engram.batch`; what
operators ask for is in `engram.oversight`. A data set for PyTorch is in `engram.torch`, the one module that imports
torch.
"""

from engram.batch import Batch
from engram.client import Client
from engram.errors import (
    BadExtractor,
    BadUpload,
    BudgetExceeded,
    Cancelled,
    Conflict,
    EngramError,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
    StorageFull,
    StripCorrupt,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from engram.loader import ReplayLoader
from engram.local import LocalBuffer
from engram.mirror import Mirror
from engram.schemas import Buffer, Decision, Ingest, IngestOptions, Manifest, Task
from engram.strip import decode_jpeg

__version__ = "0.2.0"

__all__ = [
    "BadExtractor",
    "BadUpload",
    "Batch",
    "BudgetExceeded",
    "Buffer",
    "Cancelled",
    "Client",
    "Conflict",
    "Decision",
    "EngramError",
    "Forbidden",
    "Ingest",
    "IngestOptions",
    "InvalidRequest",
    "LocalBuffer",
    "Manifest",
    "Mirror",
    "NotFound",
    "RateLimited",
    "ReplayLoader",
    "StorageFull",
    "StripCorrupt",
    "Task",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "__version__",
    "decode_jpeg",
]
