"""Who holds which page of the cache: reference counts, and full pages found again by what stands before their end."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

ROOT = b""  # the key of an empty prefix
DRAFTED = b"drafted"  # the same, of pages whose rows of the MTP layers are filled as well


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names a full page by its tokens and, through the key of the page before, by all tokens before them."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 0 .. total - 1. A page is held by one request or by several that share a prefix.

    A full page may be published under its key. When its last holder lets go of it, it stays findable until its memory
    is wanted: the page unused for longest goes first.
    """

    def __init__(self, total: int, page_size: int):
        self.total, self.page_size = total, page_size
        self._never_used = range(total)
        self._blank: list[int] = []  # used once, holding nothing of value
        self._holders = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody, longest idle first

    @property
    def free(self) -> int:
        """Pages that `take` can give, published ones that nobody holds among them."""
        return len(self._never_used) + len(self._blank) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.total - self.free

    def take(self, count: int) -> list[int]:
        """`count` pages of unknown content, each with one holder."""
        assert 0 <= count <= self.free, f"{count} pages wanted, {self.free} free"
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            elif self._never_used:
                page, self._never_used = self._never_used[0], self._never_used[1:]
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each of a request's pages, given from its first to its last."""
        for page in reversed(pages):  # a prefix is of no use without what stands before it: that goes last
            assert self._holders[page] > 0, f"page {page} is held by nobody"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """This page is full and will not be written again. The first page of a key stays the one that is found."""
        assert self._holders[page] > 0, f"page {page} is held by nobody"
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The longest run of published pages from the first key on; nobody holds them for it yet."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One holder more for each of these, which were found."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def is_idle(self, page: int) -> bool:
        """Published, held by nobody: counted in `free`."""
        return page in self._idle
