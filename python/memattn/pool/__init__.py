"""`KVPool`: paged keys and values over device memory, host memory and a mapped file."""

from memattn.pool.config import PoolFull
from memattn.pool.forgetting import Forgetting, PageStatistics
from memattn.pool.gathered import Gathered, TokenTable
from memattn.pool.kv_pool import KVPool
from memattn.pool.saved import erase_saved

__all__ = ["Forgetting", "Gathered", "KVPool", "PageStatistics", "PoolFull", "TokenTable", "erase_saved"]
