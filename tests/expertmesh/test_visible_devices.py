"""`expertmesh up` gives every service a device of its own."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from expertmesh.visible_devices import one_for_each

NPU = "ASCEND_RT_VISIBLE_DEVICES"


def test_a_cpu_is_shared() -> None:
    assert one_for_each("cpu", {}, 3) == [{}, {}, {}]


def test_the_first_devices_are_dealt_out_where_none_is_named() -> None:
    assert one_for_each("npu", {}, 3) == [{NPU: "0"}, {NPU: "1"}, {NPU: "2"}]


def test_devices_that_are_named_are_dealt_out_in_their_order() -> None:
    assert one_for_each("npu", {NPU: "6, 4,5"}, 2) == [{NPU: "6"}, {NPU: "4"}]


def test_too_few_devices_are_refused_with_the_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"names 2 devices, but a router and 2 expert workers take one each"
    ):
        one_for_each("npu", {NPU: "0,1"}, 3)
