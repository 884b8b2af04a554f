"""What `l2e-ds analyze` prints."""

from types import SimpleNamespace

import pytest

from l2e_ds.analysis.measures import SHARES
from l2e_ds.analysis.summary import Result, suggested_shares
from tests.unit.analysis.test_figures import tables_of


@pytest.mark.parametrize("share", [SHARES[0], 0.02, SHARES[-1]])
def test_a_share_at_the_edge_of_those_tried_is_said(share):
    tables = tables_of(0)
    rest = {"suggested_share_low": 0.01, "suggested_share_high": 0.03, "suggested_fkr": 0.1}
    tables["scale"] = tables["scale"].assign(suggested_share=share, **rest)
    tables["layers"] = tables["layers"].assign(suggested_share=0.05, **rest)
    text = suggested_shares([Result(SimpleNamespace(label="model"), tables, 100, None, {})])
    edge = share != 0.02
    assert f"| model | all | {share:.2%} [1.00%, 3.00%]{' (edge)' if edge else ''} | 10.0% |" in text
    assert text.count("(edge) |") == edge == text.count("0.1% to 20%; the rate may be lower beyond")
