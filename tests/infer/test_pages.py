"""The page pool against a plain account: no page leaks, none is given twice, and what is found is true."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from baleen.infer.pages import ROOT, PagePool, page_key

TOTAL, SIZE = 12, 2


class Pool(RuleBasedStateMachine):
    """Requests of few different tokens, so that prefixes coincide, come, grow, publish and go."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(TOTAL, SIZE)
        self.requests = []  # each: its full pages' keys, its pages, how many of them are published
        self.content = {}  # page -> key, as a memory would hold it

    @rule(target=held, texts=st.lists(st.sampled_from([(0, 0), (0, 1), (1, 0)]), max_size=4))
    def begin(self, texts):
        """Find a prefix, hold it, take pages for the rest and write them."""
        keys = []
        for tokens in texts:
            keys.append(page_key(keys[-1] if keys else ROOT, tokens))
        found = self.pool.find(keys)
        assert [self.content[page] for page in found] == keys[: len(found)]
        idle = sum(self.pool.is_idle(page) for page in found)
        missing = len(keys) - len(found)
        if missing > self.pool.free - idle:
            return multiple()
        self.pool.hold(found)
        pages = found + self.pool.take(missing)
        for page, key in zip(pages[len(found) :], keys[len(found) :], strict=True):
            self.content[page] = key
        request = {"keys": keys, "pages": pages, "published": len(found)}
        self.requests.append(request)
        return request

    @rule(request=held)
    def publish(self, request):
        at = request["published"]
        if at < len(request["pages"]):
            self.pool.publish(request["pages"][at], request["keys"][at])
            request["published"] += 1

    @rule(request=consumes(held))
    def end(self, request):
        self.pool.release(request["pages"])
        self.requests = [other for other in self.requests if other is not request]

    @invariant()
    def counts_are_right(self):
        holders = [sum(request["pages"].count(page) for request in self.requests) for page in range(TOTAL)]
        assert self.pool._holders == holders
        assert self.pool.in_use == sum(count > 0 for count in holders)
        assert self.pool.free + self.pool.in_use == TOTAL
        for request in self.requests:
            assert [self.content[page] for page in request["pages"]] == request["keys"]  # nobody wrote over them


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase


def test_longest_idle_goes_first_and_the_end_of_a_text_before_its_beginning():
    pool = PagePool(4, SIZE)
    keys = [page_key(ROOT, (0, 0))]
    keys.append(page_key(keys[0], (0, 0)))
    old, new = pool.take(2), pool.take(1)
    for page, key in zip(old, keys, strict=True):
        pool.publish(page, key)
    pool.publish(new[0], page_key(ROOT, (5, 5)))
    pool.release(old)
    pool.release(new)
    pool.take(2)  # the one never used, and then an old one
    assert pool.find(keys) == old[:1] and pool.find([page_key(ROOT, (5, 5))]) == new
    pool.take(1)
    assert pool.find(keys) == [] and pool.find([page_key(ROOT, (5, 5))]) == new


def test_keys_name_the_whole_prefix():
    a, b = page_key(ROOT, (1, 2)), page_key(ROOT, (2, 1))
    assert len({a, b, page_key(a, (1, 2)), page_key(b, (1, 2)), page_key(ROOT, (1, 2, 1, 2))}) == 5


def test_mistakes_are_noticed():
    pool = PagePool(2, SIZE)
    page = pool.take(1)
    pool.release(page)
    for mistake in (lambda: pool.release(page), lambda: pool.publish(page[0], b"key"), lambda: pool.take(3)):
        with pytest.raises(AssertionError):
            mistake()
