"""What is said on rank 0 alone; where Lightning is not imported, which tells the rank and shows it, this does."""

import logging
import os

from lightning_utilities.core.rank_zero import rank_zero_info as rank_zero_info
from lightning_utilities.core.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn as rank_zero_warn

if not hasattr(rank_zero_only, "rank"):
    _ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    rank_zero_only.rank = next((int(rank) for rank in _ranks if rank is not None), 0)  # type: ignore[attr-defined]
    _logger = logging.getLogger("lightning_utilities")  # Lightning's own takes its place once it is imported
    _logger.setLevel(logging.INFO)
    if not logging.getLogger().hasHandlers():
        _logger.addHandler(logging.StreamHandler())
