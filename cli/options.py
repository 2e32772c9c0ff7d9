"""What several commands share: option texts, and the progress of a download."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edgekv.cli.progress import DownloadProgress, StatusLine

# As in edgekv.models.registry, whose import would cost `--help` a tenth of its time.
DEFAULT_MODEL = "smollm2-135m"
MODEL_HELP = "A model's name, a Hugging Face repo id, a folder, or a GGUF file."
JSON_HELP = "Print one JSON object on stdout."


@contextmanager
def fetching() -> Iterator[DownloadProgress]:
    """The `progress` callback for a block that may download; its bar is gone after the block."""
    with StatusLine(sys.stderr) as line:
        yield DownloadProgress(line, lambda text: print(text, file=sys.stderr, flush=True))
