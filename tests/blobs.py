"""Small blobs in one go, for tests."""

from mycoswarmd.flow.ports import BlobStore


async def put(store: BlobStore, data: bytes, *, expect_sha256: str | None = None, each: int = 1 << 16) -> str:
    """Store bytes, piece by piece."""
    async with store.writing(expect_sha256=expect_sha256) as blob:
        for start in range(0, len(data), each):
            await blob.write(data[start : start + each])
        return await blob.finish()


async def get(store: BlobStore, sha256: str, *, each: int = 1 << 16) -> bytes:
    """Return all of a blob."""
    async with store.reading(sha256) as blob:
        data = b"".join([piece async for piece in blob.pieces(each)])
        assert len(data) == blob.size_bytes
        return data
