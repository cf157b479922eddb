"""The tables of payloads and transports hold what they name, and old names of fields still work."""

import logging
from typing import get_args, get_type_hints

import pytest

from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import load_object
from cluster.weight_sync.transports import PAYLOADS, TRANSPORTS, choose, make_payload
from tests.builders import make_config


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_both_ends_of_a_transport_are_where_the_table_says(transport: str) -> None:
    assert callable(load_object(TRANSPORTS[transport].sender, "sender"))
    receiver = load_object(TRANSPORTS[transport].receiver, "receiver")
    assert callable(receiver.begin)
    assert callable(receiver.end)


@pytest.mark.parametrize(("payload", "is_incremental"), [("full", False), ("delta", True)])
def test_payloads_are_where_the_table_says(payload: str, is_incremental: bool) -> None:
    assert make_payload(payload).is_incremental == is_incremental
    assert PAYLOADS.keys() == {"full", "delta"}


def test_run_files_may_name_every_transport() -> None:
    assert set(get_args(get_type_hints(WeightSyncConfig)["transport"])) == {"auto", *TRANSPORTS}


def test_a_payload_of_ones_own_goes_through_the_object_store() -> None:
    path = "tests.cluster.weight_sync.test_transports:Mine"
    assert choose(make_config(f"weight_sync.payload='{path}'"), on_gpu=True) == (path, "object_store")


class Mine:
    is_incremental = False


def test_a_payload_that_is_not_there_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"'no_such_module:Payload' as weight_sync\.payload cannot be imported"):
        choose(make_config("weight_sync.payload='no_such_module:Payload'"), on_gpu=False)
    with pytest.raises(ConfigError, match=r"payload = 'patch' is none of .'full', 'delta'. and no package"):
        choose(make_config("weight_sync.payload=patch"), on_gpu=False)


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "object_store"])
def test_only_the_object_store_takes_changes(transport: str) -> None:
    config = make_config(f"weight_sync.transport={transport}", "weight_sync.payload=delta")
    with pytest.raises(ConfigError, match=f"'delta' needs weight_sync.transport = 'object_store', found '{transport}'"):
        choose(config, on_gpu=True)


def test_the_former_names_of_fields_still_work_with_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "preceptor"):
        config = make_config("weight_sync={backend='object_store',mode='delta'}")
    assert (config.weight_sync.transport, config.weight_sync.payload) == ("object_store", "delta")
    assert sorted(record.getMessage().partition(": ")[2] for record in caplog.records) == [
        "weight_sync.backend is now weight_sync.transport; rename it",
        "weight_sync.mode is now weight_sync.payload; rename it",
    ]
