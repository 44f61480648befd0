"""A word through the store of torchrun's agent; runs in a rank process, which has torch."""

from __future__ import annotations

from datetime import timedelta


def publish(host: str, port: int, key: str, value: str, seconds: float) -> None:
    """Write a text where all ranks of the world can read it."""
    _connect(host, port, seconds).set(key, value)


def look_up(host: str, port: int, key: str, seconds: float) -> str | None:
    """Return the text that rank 0 wrote, None where it wrote none within so many seconds."""
    from torch.distributed import DistStoreError

    store = _connect(host, port, seconds)
    try:
        store.wait([key], timedelta(seconds=seconds))
    except DistStoreError:
        return None
    return bytes(store.get(key)).decode()


def _connect(host: str, port: int, seconds: float):  # type: ignore[no-untyped-def]
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )
