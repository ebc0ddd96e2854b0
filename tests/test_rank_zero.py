"""What is said, where Lightning is not imported."""

import os
import subprocess
import sys

import pytest

SAYS = """
import sys
from akl_lightning.rank_zero import rank_zero_info, rank_zero_warn
rank_zero_info("counted")
rank_zero_warn("odd")
assert "lightning" not in sys.modules
"""


@pytest.mark.parametrize(
    ("rank", "heard"), [({}, True), ({"RANK": "0", "LOCAL_RANK": "1"}, True), ({"RANK": "1"}, False)]
)
def test_rank_0_alone_speaks_without_lightning(rank: dict[str, str], heard: bool) -> None:
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in ranks} | rank
    said = subprocess.run([sys.executable, "-c", SAYS], env=environment, capture_output=True, text=True, check=True)
    assert ("counted\n" in said.stderr) == ("odd" in said.stderr) == heard
