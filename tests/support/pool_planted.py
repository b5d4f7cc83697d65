"""Planted bugs of KVPool: one line of a class each. Random calls or a check of one thing must notice every one."""

# ruff: noqa: E501 (a table, one case a line)
from __future__ import annotations

import inspect
import sys
from types import FunctionType

from memattn.pool.kv_pool import KVPool
from memattn.pool.pages import PagedStreams
from memattn.pool.retention import Retention
from memattn.pool.summaries import Summaries
from memattn.pool.tiers import DeviceTier, RecordTier, Tiers
from support.relations import with_bug

BUGS = {
    "evicted pages are not copied": (Tiers, "for source, target, sources, targets in plan.copies:", "for source, target, sources, targets in plan.copies[:0]:"),
    "only the first copy of a plan": (Tiers, "for source, target, sources, targets in plan.copies:", "for source, target, sources, targets in plan.copies[:1]:"),
    "erasures before copies": (Tiers, "        for source, target, sources, targets in plan.copies:", "        for level, frames in zip(self.levels, plan.erased):\n            level is None or not frames or level.erase(torch.tensor(frames))\n        for source, target, sources, targets in plan.copies:"),
    "freed pages keep their bytes": (Tiers, "            if frames:\n", "            if False:\n"),
    "deleted rows keep their bytes": (Tiers, "            if rows:\n", "            if False:\n"),
    "values are not copied": (Tiers, "zip(_parts(a), _parts(b), strict=True)", "list(zip(_parts(a), _parts(b), strict=True))[:1]"),
    "values keep their bytes on the device": (DeviceTier, "for part in (self.k, self.v):", "for part in (self.k,):"),
    "rows below the device keep their bytes": (RecordTier, "for part in self.parts:\n            part[frame, row]", "for part in self.parts[:1]:\n            part[frame, row]"),
    "written rows are not rounded": (PagedStreams, "if self.config.compress else x.contiguous()", "if False else x.contiguous()"),
    "an update forgets who shares the page": (PagedStreams, "self.apply(self.table.make_writable(stream, address(some.contiguous()), len(some)))\n            chosen", "self.apply(self.table.load(address(torch.full_like(some, stream)), address(some.contiguous()), len(some), False))\n            chosen"),
    "an update writes the rows of another order": (PagedStreams, "+ rows[chosen],", "+ rows[chosen].flip(0),"),
    "an insertion loses the rest of the page": (PagedStreams, "tokens.followed_by(rest)", "tokens"),
    "an insertion goes behind the page": (PagedStreams, "rest = page.part(before, len(page.k))", "rest = page.part(before, before)"),
    "summaries of what is gone": (PagedStreams, "for handle in handles if self.summaries else ():", "for handle in ():"),
    "summaries count rows without a token": (PagedStreams, "k[0][ids >= 0]", "k[0]"),
    "a mean of the last tokens only": (Summaries, "here[rows] = old + (new - keys.shape[1] * old) / count", "here[rows] = new / keys.shape[1]"),
    "a minimum of the last tokens only": (Summaries, "here[rows] = new if fresh else pick(here[rows], new)", "here[rows] = new"),
    "summaries are not copied with their page": (Summaries, "x[row, target] = x[row, source] if source >= 0 else 0", "x[row, target] = 0"),
    "lengths ignored": (KVPool, "self._retention.append(stream, new.part(0, n))", "self._retention.append(stream, new)"),
    "rows of the batch mixed up": (KVPool, "new = NewTokens(k[b].detach(), v[b].detach(), None", "new = NewTokens(k[b].detach(), v[0].detach(), None"),
    "a merge without positions": (KVPool, ".moved_to(self.device))", ".part(0, 0).moved_to(self.device))"),
    "tags of a deletion ignored": (KVPool, "(tags == tag) & (ids >= 0)", "ids >= 0"),
    "a deletion that leaves the file": (KVPool, "for path, name in list(self._saved.items()):", "for path, name in ():"),
    "forgetting one too few": (Retention, "self._forget(stream, len(part.k) - free)", "self._forget(stream, len(part.k) - free - 1)"),
}  # fmt: skip


def plant(bug: str, monkeypatch) -> None:
    """The class with the bug in place of the real one, until the test ends."""
    owner, old, new = BUGS[bug]
    namespace = dict(vars(sys.modules[owner.__module__]))
    exec(*with_bug(bug, old, new, inspect.getsource(owner)), namespace)
    for name, attribute in vars(namespace[owner.__name__]).items():
        if isinstance(attribute, FunctionType):
            monkeypatch.setattr(owner, name, attribute)
