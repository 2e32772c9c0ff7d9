"""Files out of the page cache, so that reading them is reading the disk."""

import os
import pathlib


def drop_page_cache(folder: pathlib.Path) -> bool:
    """Drop all files below a folder from the page cache, as far as the system offers that.

    Returns:
        Whether it was tried. Where it is not (macOS), readers of the store bypass the cache anyway.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # only clean pages are dropped
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return True
